"""What is saved of a prepared model are its full weights: the files of plain DDP."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ..helpers.compare import relative_error
from ..helpers.files import contents
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import SOURCES, TOLERANCE, accelerator_for, shard, token_batch


def saved(tp, way, tied, folder, shard_size):
    accelerator = accelerator_for(tp)
    model = accelerator.prepare(build_model("llama", tied=tied))
    unwrapped = accelerator.unwrap_model(model)
    if way == "save_model":
        accelerator.save_model(model, folder, max_shard_size=shard_size)
    elif way == "save_model as pickle":
        accelerator.save_model(model, folder, max_shard_size=shard_size, safe_serialization=False)
    elif way == "save_pretrained":
        unwrapped.save_pretrained(folder, is_main_process=accelerator.is_main_process, max_shard_size=shard_size)
    elif way == "save_pretrained everywhere":
        unwrapped.save_pretrained(folder, max_shard_size=shard_size)
    else:
        unwrapped.save_pretrained(
            folder,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
            max_shard_size=shard_size,
        )
    accelerator.wait_for_everyone()
    return model(**token_batch()).logits.detach() if tp else None


def saved_after_localizing_by_hand(source, folder):
    accelerator = accelerator_for(2)
    model = shard(build_model("llama"), accelerator.torch_device_mesh["tp"], source)
    model = accelerator.prepare(model)
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_a_model_sharded_by_hand_and_then_prepared_saves_full_weights(source, ranks, tmp_path):
    from safetensors.torch import load_file

    run_on_ranks(saved_after_localizing_by_hand, ranks, source, str(tmp_path))
    state, wanted = load_file(tmp_path / "model.safetensors"), build_model("llama").state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", ["save_model", "save_pretrained", "save_pretrained with state_dict"])
def test_a_saved_model_is_plain_ddps_byte_for_byte_and_loads(way, tied, shard_size, tmp_path):
    from transformers import AutoModelForCausalLM

    run_on_ranks(saved, 2, None, way, tied, str(tmp_path / "plain"), shard_size)
    logits = run_on_ranks(saved, 4, 2, way, tied, str(tmp_path / "sharded"), shard_size)
    plain, sharded = contents(tmp_path / "plain"), contents(tmp_path / "sharded")
    configs = {"config.json", "generation_config.json"} if way == "save_model" else set()
    assert sharded.keys() - configs == plain.keys()
    assert {name for name in plain if sharded[name] != plain[name]} == set()
    weights = [name for name in sharded if name.endswith(".safetensors")]
    assert (len(weights) > 2) == (shard_size == "60KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    wanted = build_model("llama", tied=tied).state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert relative_error(logits[0], loaded(**token_batch()).logits) < TOLERANCE


@pytest.mark.parametrize("way", ["save_model as pickle", "save_pretrained everywhere"])
def test_less_usual_ways_of_saving_write_the_full_weights(way, tmp_path):
    run_on_ranks(saved, 2, 2, way, False, str(tmp_path), "10GB")
    if way == "save_model as pickle":
        state = torch.load(tmp_path / "pytorch_model.bin")
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "model.safetensors")
    wanted = build_model("llama").state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def check_state_dict(tied):
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("llama", tied=tied))
    wanted = build_model("llama", tied=tied).state_dict()
    state = accelerator.get_state_dict(model)
    wrapped = accelerator.get_state_dict(model, unwrap=False)
    of_the_bare_model = accelerator.get_state_dict(accelerator.unwrap_model(model))
    if not accelerator.is_main_process:
        assert state == wrapped == of_the_bare_model == {}
        return
    assert list(state) == list(of_the_bare_model) == list(wanted)
    for name in wanted:
        assert torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype
        assert type(state[name]) is torch.Tensor
    same = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert same == tied
    prefix = "module." if isinstance(model, DistributedDataParallel) else ""
    assert list(wrapped) == [prefix + name for name in wanted]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_get_state_dict_is_the_unsharded_models_on_the_main_process_and_empty_elsewhere(tied, ranks):
    run_on_ranks(check_state_dict, ranks, tied)
