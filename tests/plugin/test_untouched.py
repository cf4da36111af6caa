"""What stays as it was: other libraries, accelerators without the plugin, and everything at `tp_size=1`."""

import json
import subprocess
import sys
import textwrap

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel_tp_ddp.plugin.accelerator import OVERRIDES

from ..helpers.models import build_model
from ..helpers.prepared import REPLICAS
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for, build_mlp
from ..helpers.training import Spec, differences, train

REPLACED = [row.name for row in OVERRIDES]
IMPORT_TWICE = """
    import inspect, json, sys
    import torch, torch.distributed.tensor.parallel, torch.nn.utils, torch.optim, torch.amp
    import accelerate, accelerate.accelerator, accelerate.data_loader, accelerate.optimizer, accelerate.scheduler
    import accelerate.parallelism_config, accelerate.state, accelerate.utils.operations
    import transformers, transformers.trainer, transformers.modeling_utils, transformers.training_args
    import transformers.models.llama.modeling_llama

    def members():
        found = {}
        for module in [
            accelerate, accelerate.accelerator, accelerate.data_loader, accelerate.optimizer, accelerate.scheduler,
            accelerate.parallelism_config, accelerate.state, accelerate.utils, accelerate.utils.operations,
            torch, torch.distributed, torch.distributed.distributed_c10d, torch.nn, torch.nn.utils,
            torch.nn.functional, torch.optim, torch.distributed.tensor, torch.distributed.tensor.parallel,
            torch.nn.parallel, torch.amp, torch.autograd,
            transformers.trainer, transformers.modeling_utils, transformers.training_args,
            transformers.models.llama.modeling_llama,
        ]:
            for name, value in list(vars(module).items()):
                found[module.__name__, name] = id(value)
                if inspect.isclass(value):
                    for key, member in list(vars(value).items()):
                        if not key.startswith("__abc") and key not in ("_abc_impl", "__dict__", "__weakref__"):
                            found[module.__name__, name, key] = id(member)
        return found

    before = members()
    assert ("accelerate.accelerator", "Accelerator", "prepare") in before
    assert ("torch.nn", "Module", "__call__") in before
    assert ("transformers.trainer", "Trainer", "train") in before
    environment = dict(__import__("os").environ)
    import accel_tp_ddp
    from accel_tp_ddp import TensorParallelDDPPlugin
    after = members()
    changed = [key for key in before if after.get(key) != before[key]]
    added = [key for key in after if key not in before]
    print(json.dumps({"changed": changed, "added": added,
                      "environment": environment == dict(__import__("os").environ), "members": len(before)}))
"""


def test_importing_the_package_changes_nothing_elsewhere():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT_TWICE)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["members"] > 3000 and found["environment"]
    assert found["changed"] == []
    # What importing a submodule binds in its parent is a lazy import, not a change.
    assert [key for key in found["added"] if len(key) > 2] == []


def overrides(tp):
    accelerator = accelerator_for(tp)
    return sorted(name for name in vars(accelerator) if callable(getattr(type(accelerator), name, None)))


def test_only_an_accelerator_with_the_plugin_has_methods_of_its_own():
    assert run_on_ranks(overrides, 2, None) == [[]] * 2
    # For states that were saved at another tp_size, or in the background.
    assert run_on_ranks(overrides, 2, 1) == [["end_training", "load_state", "save_state"]] * 2
    assert run_on_ranks(overrides, 2, 2) == [sorted(REPLACED)] * 2


def two_accelerators():
    """Beside a hooked accelerator, one without the plugin is not hooked."""
    from accelerate.state import AcceleratorState

    accelerator_for(2)
    AcceleratorState._reset_state()
    other = Accelerator()
    model = other.prepare(build_mlp())
    return sorted(name for name in vars(other) if name in REPLACED), dist.get_process_group_ranks(model.process_group)


def test_an_accelerator_without_the_plugin_stays_plain_after_one_with_it():
    assert run_on_ranks(two_accelerators, 2) == [([], [0, 1])] * 2


def hooks_of(*owners):
    """How many hooks of any kind each has, by the names of the dicts that hold them."""
    return [
        {name: len(held) for name, held in vars(owner).items() if "hooks" in name and isinstance(held, dict)}
        for owner in owners
    ]


def untouched_model():
    accelerator = accelerator_for(1)
    model = build_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    hooks = hooks_of(optimizer, *model.modules())
    before = {name: id(module.forward.__func__) for name, module in model.named_modules()}
    prepared, _ = accelerator.prepare(model, optimizer)
    assert isinstance(prepared, DistributedDataParallel)
    assert hooks_of(optimizer, *model.modules()) == hooks
    assert {name: id(module.forward.__func__) for name, module in model.named_modules()} == before
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module)
    assert not any(hasattr(param, "tp_shard") for param in model.parameters())
    return sorted(vars(model).keys() & {"save_pretrained", "forward"})


def test_tp_size_one_touches_no_module():
    assert run_on_ranks(untouched_model, 2) == [[]] * 2


class Sent(TorchDispatchMode):
    """The collectives within: kind and elements."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            sizes = [leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.rows.append((str(func), sizes))
        return func(*args, **(kwargs or {}))


def a_step(tp):
    """What a step sends, and what hangs on the objects that take part in it."""
    accelerator = accelerator_for(tp)
    model = build_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.arange(1, 25).view(2, 12)
    for _ in range(3):  # DDP puts its buckets in another order in the second
        with Sent() as sent:
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    bare = optimizer.optimizer
    hooks = [sorted(name for name, value in vars(obj).items() if "hooks" in name and value) for obj in (model, bare)]
    own = [sorted(vars(obj)) for obj in (model, bare, optimizer, accelerator.unwrap_model(model))]
    return sent.rows, hooks, own


def test_a_step_at_tp_size_one_sends_what_plain_ddp_sends_and_has_no_hooks():
    plain, sized = run_on_ranks(a_step, 2, None), run_on_ranks(a_step, 2, 1)
    assert sized == plain
    rows, hooks, _ = sized[0]
    kinds = [kind.split(".")[1] for kind, _ in rows]
    assert kinds == ["broadcast_", "allreduce_"] and hooks[1] == [], "buffers, and gradients in one bucket"


@REPLICAS
def test_tp_size_one_is_plain_ddp_bit_for_bit(dp):
    plain, sized = run_on_ranks(train, dp, Spec("llama")), run_on_ranks(train, dp, Spec("llama", tp=1))
    assert set(differences(sized, plain).values()) == {0.0}
