"""What is gathered and reduced: each replica's once, as each process's under plain DDP."""

import pytest
import torch
from accelerate import DataLoaderConfiguration
from accelerate.utils import broadcast_object_list, operations, reduce
from torch.utils.data import DataLoader

from ..helpers.prepared import REPLICAS, Stream, assert_equal_per_replica, plain_and_sharded, replica
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp


class Indexed:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"id": index, "row": torch.tensor([index, -index]), "flag": torch.tensor(index % 2 == 0)}


def gathered(tp, samples, even_batches=True):
    accelerator = accelerator_for(tp, MLP_PLAN, dataloader_config=DataLoaderConfiguration(even_batches=even_batches))
    _, loader = accelerator.prepare(build_mlp(), DataLoader(Indexed(samples), batch_size=4))
    found = {kind: [] for kind in ("tensor", "nested", "strings", "pairs", "forced", "tuple", "flags", "scalars")}
    for batch in loader:
        ids = batch["id"]
        found["tensor"] += accelerator.gather_for_metrics(ids).tolist()
        nested = accelerator.gather_for_metrics({"a": {"b": batch["row"]}, "c": [ids, (ids + 1,)]})
        assert nested["c"][1][0].tolist() == (nested["c"][0] + 1).tolist()
        found["nested"] += nested["a"]["b"].tolist()
        found["strings"] += accelerator.gather_for_metrics([f"sample {index}" for index in ids.tolist()])
        found["pairs"] += accelerator.gather_for_metrics([{"id": i, "half": i / 2} for i in ids.tolist()])
        found["forced"] += [int(t) for t in accelerator.gather_for_metrics(list(ids), use_gather_object=True)]
        predictions, labels = accelerator.gather_for_metrics((batch["row"].float().requires_grad_(), ids))
        found["tuple"] += list(zip(predictions.tolist(), labels.tolist()))
        found["flags"] += accelerator.gather_for_metrics(batch["flag"]).tolist()
        found["scalars"].append(accelerator.gather_for_metrics(ids.float().mean()).numel())
    return found


@REPLICAS
@pytest.mark.parametrize("samples", [11, 16, 9, 3])
def test_each_sample_is_gathered_once_and_in_order(samples, dp):
    plain, sharded = plain_and_sharded(gathered, dp, samples)
    for found in sharded:
        assert found["tensor"] == list(range(samples))
        assert found["strings"] == [f"sample {index}" for index in range(samples)]
        found.pop("scalars")
    for found in plain:
        found.pop("scalars")
    assert_equal_per_replica(plain, sharded)


def over_processes(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    scalar = torch.tensor(float(accelerator.process_index))
    one = torch.tensor(1.0)
    row = torch.tensor([accelerator.process_index])
    return {
        "processes": accelerator.num_processes,
        "scalar": accelerator.gather_for_metrics(scalar).tolist(),
        "gather": accelerator.gather(row).tolist(),
        "gather scalar": accelerator.gather(scalar).tolist(),
        "sum": float(accelerator.reduce(one, reduction="sum")),
        "mean": float(accelerator.reduce(scalar, reduction="mean")),
        "normalised": float(accelerator.gather(one).sum()) / accelerator.num_processes,
    }


@REPLICAS
def test_scalars_gather_and_reduce_are_those_of_plain_ddp(dp):
    plain, sharded = plain_and_sharded(over_processes, dp)
    assert_equal_per_replica(plain, sharded)
    assert plain[-1] == {
        "processes": dp,
        "scalar": [0.0, 1.0] if dp == 2 else 0.0,
        "gather": list(range(dp)),
        "gather scalar": [0.0, 1.0] if dp == 2 else 0.0,
        "sum": dp,
        "mean": (dp - 1) / 2,
        "normalised": 1.0,
    }


def gathered_objects(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    return [
        accelerator.gather_for_metrics(("a", "b")),
        accelerator.gather_for_metrics({"text": ["a", "b"], "more": ["c", "d"]}),
    ]


def gathered_from_stream(tp, samples):
    accelerator = accelerator_for(tp, MLP_PLAN)
    loader = accelerator.prepare(DataLoader(Stream(samples), batch_size=4))
    return sum((accelerator.gather_for_metrics(batch).tolist() for batch in loader), [])


@REPLICAS
@pytest.mark.parametrize("samples", [11, 16, 22])
def test_each_sample_of_an_iterable_dataset_is_gathered_once(samples, dp):
    plain, sharded = plain_and_sharded(gathered_from_stream, dp, samples)
    assert plain == [list(range(samples))] * dp
    assert sharded == [list(range(samples))] * 2 * dp


@REPLICAS
def test_objects_come_back_as_under_plain_ddp_whatever_their_type(dp):
    assert_equal_per_replica(*plain_and_sharded(gathered_objects, dp))


def gathered_structures(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    own = replica(accelerator)
    row = torch.tensor([[own, 10 * own]])
    nested = {"a": [row, (row + 1,)], "b": {"scalar": torch.tensor(float(own))}}
    gathered = accelerator.gather(nested)
    reduced = accelerator.reduce(nested["b"], "mean")
    padded = accelerator.pad_across_processes({"x": [torch.ones(own + 1, 2)]}, dim=0, pad_index=7)["x"][0]
    sent = broadcast_object_list([own, {"text": "a" * (own + 1)}])
    return {
        "rows": gathered["a"][0].tolist(),
        "nested": gathered["a"][1][0].tolist(),
        "scalars": gathered["b"]["scalar"].tolist(),
        "mean": reduced["scalar"].item(),
        "padded": padded.tolist(),
        "sent": sent,
    }


@REPLICAS
def test_nested_structures_are_gathered_padded_and_sent_as_under_plain_ddp(dp):
    assert_equal_per_replica(*plain_and_sharded(gathered_structures, dp))


def of_many_kinds(tp):
    """What one process takes, though a backend may not: a device, a type, a mean of integers."""
    accelerator = accelerator_for(tp, MLP_PLAN)
    scales = torch.ones(3, requires_grad=True)
    tensors = {
        "integers": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "short": torch.arange(3, dtype=torch.int16),  # gloo takes none, as NCCL takes no tensor of the CPU
        "eight bits": torch.arange(3.0).to(torch.float8_e4m3fn),
        "numbers": {"a": [torch.tensor(3, dtype=torch.int16)], "b": (torch.tensor(2.5),)},
        "with gradients": scales * 2,
    }
    found = {}
    for kind, tensor in tensors.items():
        for reduction in ("sum", "mean", "max", "none"):
            found[f"reduce {reduction}", kind] = accelerator.reduce(tensor, reduction)
            found[f"function {reduction}", kind] = operations.reduce(tensor, reduction)
            found[f"imported {reduction}", kind] = reduce(tensor, reduction)
        found["gather", kind] = accelerator.gather(tensor)
        found["gather_for_metrics", kind] = accelerator.gather_for_metrics(tensor)
        found["pad", kind] = accelerator.pad_across_processes(tensor, dim=0)
        found["broadcast", kind] = operations.broadcast(tensor)
        found["from another", kind] = operations.broadcast(tensor, from_process=1)
    found["objects", ""] = broadcast_object_list([tp is None or 1], from_process=1)
    accelerator.reduce(tensors["with gradients"]).sum().backward()
    found["gradient", ""] = scales.grad
    return operations.recursively_apply(lambda t: (str(t.dtype), t.tolist(), t.requires_grad), found)


def test_one_replica_takes_tensors_of_all_kinds_as_one_process_does():
    plain, sharded = plain_and_sharded(of_many_kinds, 1)
    assert len(plain[0]) == 8 * 17 + 2
    plain[0]["objects", ""] = [1]
    assert_equal_per_replica(plain, sharded)


def words_of_the_main_process(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    word = torch.tensor([7, 8], dtype=torch.int16) * int(accelerator.is_main_process)
    return accelerator.reduce(word, "sum").tolist(), operations.broadcast(word).tolist()


def test_what_the_main_process_alone_has_reaches_the_ranks_of_one_replica():
    plain, sharded = plain_and_sharded(words_of_the_main_process, 1)
    assert plain == [([7, 8], [7, 8])]
    assert_equal_per_replica(plain, sharded)
