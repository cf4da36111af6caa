"""A shard is never written to an ordinary checkpoint, whatever module in the model is saved, and whoever saves it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from ..helpers.compare import assert_tensors_close
from ..helpers.files import contents
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for, token_batch


class Embedder(nn.Module):
    """Holds a model that saves itself, as sentence-transformers' models do."""

    def __init__(self):
        super().__init__()
        self.encoder = build_model("llama", tied=True)
        self.dense = nn.Linear(64, 8)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.dense(self.encoder.model(input_ids=batch["input_ids"]).last_hidden_state)

    def save(self, folder: Path) -> None:
        self.encoder.save_pretrained(folder / "encoder")
        self.encoder.model.save_pretrained(folder / "base")
        torch.save(self.state_dict(), folder / "all.pt")
        torch.save({name: value.cpu() for name, value in self.state_dict().items()}, folder / "copies.pt")


def save_inside(tp: int | None, folder: str):
    accelerator = accelerator_for(tp)
    torch.manual_seed(1)
    embedder = Embedder()
    plan = {f"encoder.{name}": style for name, style in embedder.encoder.tp_plan.items()}
    if tp:
        accelerator.state.parallelism_config.tp_plan = plan
    model = accelerator.prepare(embedder)
    if accelerator.is_main_process:
        Path(folder).mkdir()
        accelerator.unwrap_model(model).save(Path(folder))
    return model(**token_batch()).sum().item()


def test_any_module_inside_saves_the_files_of_plain_ddp_on_the_main_process_alone(tmp_path):
    plain = run_on_ranks(save_inside, 2, None, str(tmp_path / "plain"))
    sharded = run_on_ranks(save_inside, 4, 2, str(tmp_path / "sharded"))
    assert sharded == pytest.approx([plain[0]] * 4, rel=2e-4)
    for name in ("encoder", "base"):
        wanted, found = contents(tmp_path / "plain" / name), contents(tmp_path / "sharded" / name)
        assert found == wanted and len(wanted) > 1
    for name in ("all.pt", "copies.pt"):
        wanted, found = torch.load(tmp_path / "plain" / name), torch.load(tmp_path / "sharded" / name)
        assert list(found) == list(wanted) and all(type(tensor) is Tensor for tensor in found.values())
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        tied = ("encoder.lm_head.weight", "encoder.model.embed_tokens.weight")
        assert len({found[key].data_ptr() for key in tied}) == 1


def told(save) -> str | None:
    try:
        save()
    except RuntimeError as error:
        return str(error)
    return None


def refused(folder: str):
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("llama"))
    bare, mine = accelerator.unwrap_model(model), Path(folder, f"{dist.get_rank()}")
    held = copy.deepcopy(bare.state_dict())
    answers = {
        "save_model": told(lambda: save_model(bare, mine)),
        "save_file": told(lambda: save_file({k: v.detach().clone() for k, v in bare.state_dict().items()}, mine)),
        "moved copies": told(lambda: torch.save({k: v.half() for k, v in held.items()}, mine)),
    }
    if not accelerator.is_main_process:
        answers["torch.save"] = told(lambda: torch.save(bare.state_dict(), mine))
        assert "get_state_dict" in answers.pop("torch.save")
    with torch.no_grad():
        for value in held.values():
            value.mul_(2)  # which changes no parameter
    answers["changed copies"] = told(lambda: torch.save(held, mine))
    # all else is as it was: arithmetic, averages, loading
    state = bare.state_dict()
    mean = {name: (value + held[name]) / 3 for name, value in state.items()}
    assert all(type(value) is Tensor for value in mean.values())
    before = {name: param.detach().clone() for name, param in bare.named_parameters()}
    bare.load_state_dict(mean)
    assert_tensors_close(dict(bare.named_parameters()), before, 1e-6)
    bare.load_state_dict(held, assign=True)
    assert all(type(param) is nn.Parameter for param in bare.parameters())
    assert torch.equal(bare.lm_head.weight, 2 * before["lm_head.weight"])
    if accelerator.is_main_process:
        build_model("llama", seed=3).save_pretrained(f"{folder}/source")
    accelerator.wait_for_everyone()
    load_model(bare, f"{folder}/source/model.safetensors")
    full = accelerator.get_state_dict(model)
    return answers, full


def test_what_would_write_a_shard_is_refused_with_what_to_call_and_all_else_is_as_ever(tmp_path):
    results = run_on_ranks(refused, 2, str(tmp_path))
    for answers, _ in results:
        assert len(answers) == 4
        for name, answer in answers.items():
            assert answer is not None and "accelerator.get_state_dict(model)" in answer, name
    assert_tensors_close(results[0][1], build_model("llama", seed=3).state_dict(), 1e-7)
