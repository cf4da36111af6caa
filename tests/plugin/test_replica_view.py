"""The ranks of a replica present themselves as one process: programs count, gather and send as under plain DDP."""

import gc
import os

import accelerate.state
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list, gather, gather_object, operations, reduce, set_seed
from torch.utils.data import DataLoader

from accel_tp_ddp import TensorParallelDDPPlugin, full_state_dict
from accel_tp_ddp.plugin.replica_view import OVERRIDES, current_view

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY, build_model
from ..helpers.prepared import REPLICAS, assert_equal_per_replica, plain_and_sharded
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp
from ..helpers.training import make_accelerator

# --- counts ----------------------------------------------------------------------------------------------------------


def counts(tp, folder):
    from transformers import TrainingArguments

    args = TrainingArguments(folder, use_cpu=True, report_to=[])  # which resets the states
    accelerator = accelerator_for(tp)
    states = (accelerator, accelerator.state, AcceleratorState(), PartialState())
    set_seed(3, device_specific=True)
    return {
        "processes": [(each.num_processes, each.process_index) for each in states],
        "arguments": (args.world_size, args.process_index),
        "divided by": accelerator.num_processes // getattr(accelerator.parallelism_config, "tp_size", 1),
        "seed": torch.initial_seed(),
    }


@REPLICAS
def test_processes_are_counted_as_under_plain_ddp(dp, tmp_path):
    assert_equal_per_replica(*plain_and_sharded(counts, dp, str(tmp_path)))


def ranks_that_write(folder):
    from transformers import Trainer, TrainingArguments

    plugin = TensorParallelDDPPlugin(tp_size=2)
    args = TrainingArguments(folder, use_cpu=True, report_to=[], parallelism_config=plugin)
    trainer = Trainer(build_model("llama"), args)
    accelerator = trainer.accelerator
    states = (accelerator, accelerator.state, PartialState())
    trainer_says = [
        args.should_save,
        args.should_log,
        trainer.is_world_process_zero(),
        trainer.is_local_process_zero(),
    ]
    ran = []
    for decorator in (accelerator.on_main_process, accelerator.on_last_process, accelerator.on_local_main_process):
        decorator(ran.append)(decorator.__name__)
    with args.main_process_first(desc="nothing"), accelerator.main_process_first():
        pass
    accelerator.wait_for_everyone()
    return {
        "main": {*(each.is_main_process for each in states), *trainer_says},
        "last": {each.is_last_process for each in states},
        "local": accelerator.local_process_index,
        "ran": ran,
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_rank_writes(ranks, tmp_path):
    on_main, on_last = ["on_main_process", "on_local_main_process"], ["on_last_process"]
    for rank, found in enumerate(run_on_ranks(ranks_that_write, ranks, str(tmp_path))):
        is_main, is_last = rank == 0, rank == ranks - 1
        ran = (on_main if is_main else []) + (on_last if is_last else [])
        assert found["main"] == {is_main} and found["last"] == {is_last}
        assert found["local"] == rank and sorted(found["ran"]) == sorted(ran)


def configs():
    plugin = TensorParallelDDPPlugin(tp_size=2, replica_check_steps=7)
    accelerator = Accelerator(parallelism_config=plugin)
    shown = accelerator.parallelism_config
    return {
        "shown": (shown.tp_size, shown.dp_replicate_size, shown.replica_check_steps, shown.tp_enabled),
        "own": (plugin.tp_size, plugin.dp_replicate_size, plugin.tp_enabled, isinstance(shown, type(plugin))),
        "mesh": tuple(accelerator.torch_device_mesh.shape),
        "ranks": (accelerator.data_parallel_rank, accelerator.tensor_parallel_rank),
    }


def test_the_config_shows_no_tensor_parallelism_and_the_plugin_and_mesh_tell_the_truth():
    for rank, found in enumerate(run_on_ranks(configs, 4)):
        assert found.pop("ranks") == divmod(rank, 2)
        assert found == {"shown": (1, 2, 7, True), "own": (2, 2, True, True), "mesh": (2, 2)}


# --- a program that counts by itself ---------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 13

    def __getitem__(self, index):
        ids = torch.randint(VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "row": torch.tensor(index)}


def own_loop(tp):
    """Counts, schedules, gathers and cuts by itself, as the loops of the `no_trainer` kind do."""
    from transformers import get_scheduler

    accelerator = make_accelerator(tp)
    set_seed(5)
    model = build_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader, evaluated = DataLoader(Rows(), batch_size=3), DataLoader(Rows(), batch_size=3)
    scheduler = get_scheduler("linear", optimizer, 2 * accelerator.num_processes, 8 * accelerator.num_processes)
    model, optimizer, loader, evaluated, scheduler = accelerator.prepare(
        model, optimizer, loader, evaluated, scheduler
    )
    found = {"rates": [], "losses": [], "norms": []}
    for batch in loader:
        batch.pop("row")
        loss = model(**batch).loss
        accelerator.backward(loss)
        found["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found["rates"].append(scheduler.get_last_lr()[0])
        found["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
    rows = torch.cat([accelerator.gather(batch["row"]) for batch in evaluated])
    found["rows"] = rows[: len(evaluated.dataset)].tolist()
    found["batch"] = 3 * accelerator.num_processes * accelerator.gradient_accumulation_steps
    found["objects"] = gather_object([{"process": PartialState().process_index}])
    found["sum"] = reduce(torch.ones(2), "sum").tolist()
    found["gathered"] = gather({"a": [torch.tensor([PartialState().process_index])]})["a"][0].tolist()
    return found


def assert_same_loop(sharded, plain):
    for rank, found in enumerate(sharded):
        for name, value in plain[rank // 2].items():
            assert found[name] == (pytest.approx(value, rel=2e-4) if isinstance(value[0], float) else value), name


@REPLICAS
def test_a_program_that_counts_schedules_gathers_and_cuts_by_itself_gives_what_it_gives_under_plain_ddp(dp):
    plain, sharded = run_on_ranks(own_loop, dp, None), run_on_ranks(own_loop, 2 * dp, 2)
    assert plain[0]["rows"] == list(range(13)) and len(plain[0]["objects"]) == plain[0]["sum"][0] == dp
    for results in (plain, sharded):
        for found in results:
            found["batch"] = [found["batch"]]
    assert_same_loop(sharded, plain)


def sent(tp):
    accelerator = accelerator_for(tp)
    own = accelerator.process_index
    values = {}
    for source in range(accelerator.num_processes):
        values["tensor", source] = broadcast(torch.tensor([10.0 * own + 1]), from_process=source).tolist()
        values["objects", source] = broadcast_object_list([{"from": own}], from_process=source)
    if accelerator.is_main_process:
        accelerator.set_trigger()
    values["trigger"] = accelerator.check_trigger()
    values["largest"] = reduce(torch.tensor([own, -own]), "max").tolist()
    values["padded"] = accelerator.pad_across_processes(torch.ones(own + 1), pad_index=4).tolist()
    return values


@REPLICAS
def test_what_is_sent_reaches_every_rank(dp):
    assert_equal_per_replica(*plain_and_sharded(sent, dp))


def outer_steps(tp):
    """Parameters that differ by process: their mean change is what all of them step by, and then one's are all's."""
    accelerator = make_accelerator(tp)
    set_seed(0)
    model = accelerator.prepare(build_model("llama"))
    for param in model.parameters():
        before = param.data.clone()
        param.data.mul_(1 + 0.1 * accelerator.process_index)
        param.data.copy_(before + accelerator.reduce(param.data - before, "mean"))
    averaged = full_state_dict(model)
    for param in model.parameters():
        param.data.add_(accelerator.process_index)
        broadcast(param.data, from_process=1)
    return averaged, full_state_dict(model)


def test_changes_of_shards_are_averaged_and_shards_sent_among_those_that_hold_the_same_part():
    plain = run_on_ranks(outer_steps, 2, None)
    for results in run_on_ranks(outer_steps, 4, 2):
        for ours, theirs in zip(results, plain[0], strict=True):
            assert_tensors_close(ours, theirs, 1e-5)


def saved_by_process_zero(tp, folder):
    accelerator = make_accelerator(tp)
    model = accelerator.prepare(build_model("llama"))
    if accelerator.process_index == 0:
        accelerator.unwrap_model(model).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return full_state_dict(model)


def test_what_process_zero_saves_is_the_full_model_written_once(tmp_path):
    from safetensors.torch import load_file

    expected = run_on_ranks(saved_by_process_zero, 4, 2, str(tmp_path))[0]
    saved = load_file(tmp_path / "model.safetensors")
    assert_tensors_close(saved, {name: expected[name] for name in saved}, 0.0)


# --- its beginning and its end ---------------------------------------------------------------------------------------


def stock():
    """What the view replaces, as objects."""
    found = {(row.owner, row.name): vars(row.upstream())[row.name] for row in OVERRIDES}
    return {**found, "torch": operations.torch}


def is_plain():
    states = [PartialState(), accelerate.state.AcceleratorState._shared_state]
    processes = {state["num_processes"] if isinstance(state, dict) else state.num_processes for state in states}
    own = PartialState()
    return (
        current_view() is None
        and processes == {dist.get_world_size()}
        and own.process_index == dist.get_rank()
        and own.is_main_process == (dist.get_rank() == 0)
        and operations.torch is torch
    )


def ended(how):
    os.environ["FORK_LAUNCHED"] = "1"  # or the process group would end, too
    plugin, before = TensorParallelDDPPlugin(tp_size=2, tp_plan=MLP_PLAN), stock()
    first = Accelerator(parallelism_config=plugin)
    model = first.prepare(build_mlp())
    assert first.num_processes == dist.get_world_size() // 2 and stock() != before
    model = first.free_memory(model)[0]
    second = Accelerator()  # shares the state, and so the plugin
    model = second.prepare(build_mlp())
    shown = (second.num_processes, second.process_index)
    del first
    gc.collect()
    assert current_view() is not None, "the second one holds it"
    if how == "end_training":
        second.end_training()
        assert (second.num_processes, second.process_index) == shown, "what it says of itself stays"
    elif how == "reset":
        AcceleratorState._reset_state()
        return current_view() is None, stock() == before, PartialState().num_processes == dist.get_world_size(), True
    else:
        del second, model
        gc.collect()
    return is_plain(), stock() == before, AcceleratorState().parallelism_config is plugin, plugin.tp_size == 2


@pytest.mark.parametrize("how", ["end_training", "gone", "reset"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_after_the_last_accelerator_everything_is_as_it_was(how, ranks):
    assert run_on_ranks(ended, ranks, how) == [(True,) * 4] * ranks


def another_layout():
    """One after the other, with other sizes: each has its own view."""
    found = []
    for tp in (2, 4, 2):
        accelerator = accelerator_for(tp)
        found.append((accelerator.num_processes, accelerator.process_index, gather_object([dist.get_rank()])))
        AcceleratorState._reset_state()
    plain = Accelerator()
    return [*found, (plain.num_processes, plain.process_index, gather_object([dist.get_rank()]))]


def test_accelerators_of_other_sizes_may_follow_one_another():
    for rank, found in enumerate(run_on_ranks(another_layout, 4)):
        pairs = (2, rank // 2, [rank % 2, 2 + rank % 2])
        assert found == [pairs, (1, 0, [rank]), pairs, (4, rank, [0, 1, 2, 3])]


def never_hooked(tp):
    before = stock()
    accelerator = accelerator_for(tp)
    accelerator.prepare(build_mlp())
    return stock() == before, current_view(), accelerator.num_processes


def test_without_the_plugin_and_at_tp_size_one_there_is_no_view():
    for tp in (None, 1):
        assert run_on_ranks(never_hooked, 2, tp) == [(True, None, 2)] * 2


# --- before there is an accelerator ----------------------------------------------------------------------------------


def generation_batches(tp, folder):
    from trl import GRPOConfig

    plugin = TensorParallelDDPPlugin(tp_size=tp) if tp else None
    sizes = {"per_device_train_batch_size": 2, "num_generations": 4, "generation_batch_size": 8}
    config = GRPOConfig(folder, use_cpu=True, bf16=False, report_to=[], parallelism_config=plugin, **sizes)
    return config.steps_per_generation, config.generation_batch_size, config.world_size, current_view() is not None


def test_configs_that_count_processes_count_replicas_before_there_is_an_accelerator(tmp_path):
    plain, sharded = plain_and_sharded(generation_batches, 2, str(tmp_path))
    assert plain[0][:3] == (2, 8, 2)
    assert [found[:3] for found in sharded] == [plain[0][:3]] * 4 and all(found[3] for found in sharded)
