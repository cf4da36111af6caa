"""The ways in which tensor-parallel trainings have gone wrong without a word, each with the test that shows it.

`TRAPS` has an entry for each number. A fault is what the package would be without the fix (`helpers/faults.py`). It is
shown by a check of this file, which passes as things are and fails under the fault, or by a test elsewhere that does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from accel_tp_ddp import Style, full_gradients, full_state_dict, parallelize, register_style
from accel_tp_ddp.core import store as core_store
from accel_tp_ddp.styles.base import even_layout
from accel_tp_ddp.styles.packed import PackedColwise

from ..helpers.collectives import check_copy_to_tp, check_reduce_from_tp, run_check
from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.drifting import drift, noisy_gradients
from ..helpers.dropout import masks
from ..helpers.faults import FAULTS, LORA_FAULTS, MORE_FAULTS, RESUME_FAULTS, STYLE_FAULTS, injected
from ..helpers.gradients import accumulated, assert_gradients, causal, causal_loss, own_gradients, sharded
from ..helpers.models import VOCABULARY, build_model
from ..helpers.prepared import batches, check_continues, read_to_be_dispatched, replica
from ..helpers.ranks import RanksError, run_on_ranks
from ..helpers.sharded import (
    MLP_PLAN,
    TOLERANCE,
    accelerator_for,
    assert_gradients_close,
    build_mlp,
    shard,
    token_batch,
    tp_mesh,
)
from ..helpers.toys import OPT_PLAN, TOY_PLAN, build_opt, toy, unmasked_loss
from ..helpers.training import make_accelerator


@dataclass(frozen=True)
class Check:
    """What runs on the ranks, and what then has to hold of what they return; nothing may raise on any of them.

    Without the fix some hang: they are cut after `seconds`.
    """

    run: Callable[..., Any]
    ranks: int
    args: tuple = ()
    holds: Callable[[list[Any]], None] = field(default=lambda results: None)
    seconds: float = 120.0


@dataclass(frozen=True)
class Trap:
    """`shown`: a fault, and the check that shows it or the name of the test that does, as `folder.file.test`."""

    claim: str
    shown: tuple[tuple[str, Check | str], ...]


# --- checks ----------------------------------------------------------------------------------------------------------


def parameters_stay():
    model = shard(build_model("llama"), tp_mesh(), "torch_styles")
    before = dict(model.named_parameters())
    model(**token_batch()).loss.backward()
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(after[name] is param for name, param in before.items())
    assert not any(isinstance(param, DTensor) for param in after.values())
    assert all(param.grad is not None for param in after.values())


def steps_over_tensors_of_one_kind():
    for options in ({"foreach": True}, {"fused": True}):
        model, reference = shard(build_model("llama", vocab_size=132), tp_mesh(), "torch_styles"), None
        reference = build_model("llama", vocab_size=132)
        for each in (model, reference):
            optimizer = torch.optim.AdamW(each.parameters(), lr=0.01, eps=1e-5, **options)
            for seed in range(2):
                each(**token_batch(seed)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_tensors_close(full_state_dict(model), reference.state_dict(), 1e-4)


class Gains(nn.Module):
    """Bare parameters, one for each of the features that its neighbours shard, as of attention sinks."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 4.0, 16))

    def forward(self, x):
        return x * self.gain


class OfTheFeatures(Style):
    def layouts(self, site):
        return {"gain": even_layout(16, 0, site.tp_size)}


def build_with_gains():
    model = build_mlp()
    model.up = nn.Sequential(model.up, Gains())
    return model


def norm_has_bare_parameters():
    register_style("of_the_features", OfTheFeatures())
    plan = {"up.0": "colwise", "up.1": "of_the_features", "down": "rowwise"}
    for norm_type in (1, 2, float("inf")):
        model, reference = build_with_gains(), build_with_gains()
        accelerator = accelerator_for(2, plan)
        model = accelerator.prepare(model)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        for each in (model, reference):
            each(x).square().sum().backward()
        wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1, norm_type)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1, norm_type)
        assert accelerator.unwrap_model(model).up[1].gain.shape == (8,)
        assert relative_error(norm, wanted) < TOLERANCE, (norm_type, float(norm), float(wanted))
        assert_gradients_close(full_gradients(model), own_gradients(reference))


def peers_are_equal(results):
    assert results[0] == results[1] and results[2:3] == results[3:4]


def replicas_differ(results):
    peers_are_equal(results)
    assert results[0] != results[2]


def the_main_process_reads(results):
    assert results == [22, 0, 0, 0]


def same_gradients(build, loss, plan="auto", passes=1):
    expected = accumulated(build(), loss, range(passes), own_gradients)
    floor = 1e-3 * max(gradient.norm().item() for gradient in expected[0].values())
    assert_gradients([sharded(build, loss, plan, seeds=tuple(range(passes)))], expected, floor)


def labels_on_one_shard(model, seed):
    """Ids of the whole vocabulary of 129; labels of the first 33, a half of them to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(129, (3, 12), generator=generator)
    ids[0, :3] = torch.tensor([0, 33, 128])
    labels = torch.randint(33, (3, 12), generator=generator)
    labels[:, ::2] = -100
    return model(input_ids=ids, labels=labels).loss


def padding_rows():
    build = toy(33)
    register_style("packed_in_three", PackedColwise(sections=3))
    same_gradients(build, with_every_token, TOY_PLAN)


def with_every_token(model, seed):
    ids = torch.arange(129).repeat(2, 1)
    return torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), ids.flip(1))


def initialised_again():
    """By modules and by transformers, from another seed on each rank: as the whole model from the first one's."""
    for build, plan in ((toy(33), TOY_PLAN), (causal("llama", True), "auto")):
        register_style("packed_in_three", PackedColwise(sections=3))
        model, reference = parallelize(build(), tp_mesh(), plan), build()
        kept = dict(model.named_parameters())
        for each, seed in ((model, 5 + dist.get_rank()), (reference, 5)):
            torch.manual_seed(seed)
            if plan == "auto":
                for module in each.modules():
                    each._init_weights(module)
            else:
                for module in each.modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
        state, wanted = full_state_dict(model), reference.state_dict()
        assert not torch.equal(wanted[name := list(wanted)[0]], build().state_dict()[name])
        assert_tensors_close(state, wanted, 0.0)
        assert all(kept[name] is param for name, param in model.named_parameters())


def models_on_several_meshes():
    """Of the world and of its halves, two of them over the same ranks; forwards and backwards in turns."""
    halves = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "tp"))["tp"] for _ in range(2)]
    meshes = [halves[0], init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), halves[1]]
    models = [parallelize(build_mlp(seed), mesh, MLP_PLAN) for seed, mesh in enumerate(meshes)]
    references = [build_mlp(seed) for seed in range(3)]
    for group in (models, references):
        for step in range(2):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step), requires_grad=True)
            losses = [model(x).square().sum() for model in group]
            for index in (2, 0, 1):
                losses[index].backward()
    for model, reference in zip(models, references):
        assert_gradients_close(full_gradients(model), own_gradients(reference))


def an_empty_plan_is_refused():
    with pytest.raises(ValueError, match="shards no parameter"):
        parallelize(build_mlp(), tp_mesh(), {"up": "replicate", "down": "replicate"})


def normalised_by_tokens(tp):
    """The loss is summed over a ragged global batch of two microbatches and divided by its count of labels."""
    accelerator = accelerator_for(tp)
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
    number = replica(accelerator)
    history = []
    for step in range(2):
        batches = []
        for microbatch in range(2):
            generator = torch.Generator().manual_seed(100 * step + 10 * microbatch + number)
            ids = torch.randint(1, VOCABULARY, (2, 10), generator=generator)
            labels = ids.clone()
            labels[:, 3 + 2 * number + 3 * microbatch :] = -100
            batches.append({"input_ids": ids, "labels": labels})
        count = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
        total = accelerator.gather(count).sum()
        loss = 0.0
        for index, batch in enumerate(batches):
            part = model(**batch, num_items_in_batch=total).loss * accelerator.num_processes
            with accelerator.no_sync(model) if index == 0 else torch.enable_grad():
                accelerator.backward(part)
            loss += part.detach()
        norm = float(accelerator.clip_grad_norm_(model.parameters(), 100.0))
        optimizer.step()
        optimizer.zero_grad()
        history += [accelerator.reduce(loss, "mean").item(), norm]
    return history


@cache
def normalised_by_tokens_in_plain_ddp():
    return run_on_ranks(normalised_by_tokens, 2, None)[0]


def losses_are_those_of_plain_ddp(results):
    for history in results:
        assert history == pytest.approx(normalised_by_tokens_in_plain_ddp(), rel=TOLERANCE)


def masks_agree_where_replicated(results):
    (first, state), (second, peer_state) = results[:2]
    assert state == peer_state
    for (ndim, mask, _), (_, peer_mask, _) in zip(first, second, strict=True):
        assert (mask == peer_mask) == (ndim == 3)


def masks_are_drawn_again_alike(results):
    for drawn, _ in results:
        masks = [mask for ndim, mask, _ in drawn if ndim == 4]
        assert len(masks) == 4 and sorted(masks[:2]) == sorted(masks[2:])


def saved_alone():
    accelerator = make_accelerator(2, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=4))])
    model = accelerator.prepare(build_model("llama"))
    store = dist.distributed_c10d._get_default_store()
    store.delete_key("told")  # by a run before
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        with torch.no_grad():  # another step's weights
            for param in model.parameters():
                param.mul_(2)
        store.wait(["told"], timedelta(seconds=30))
        return
    try:
        with (
            mock.patch.object(core_store, "PEERS_TIMEOUT", 1.0),
            pytest.raises(RuntimeError, match="every rank has to"),
        ):
            accelerator.get_state_dict(model)
    finally:
        store.set("told", "")


# --- the table -------------------------------------------------------------------------------------------------------

IN_GRPO = "plugin.test_trl.test_without_the_view_grpo_is_not_that_of_plain_ddp"
IN_TRAINER = "plugin.test_trainer.test_where_flos_are_summed_over_ranks_a_trainer_run_is_not_that_of_plain_ddp"
IN_A_RUN = "system.test_invisible.test_a_fault_of_a_run_is_caught"
OF_A_STYLE = "styles.test_full_gradients.test_a_fault_of_a_style_shows_in_the_gradients"
IN_GRADIENTS = "styles.test_full_gradients.test_a_fault_shows_in_the_gradients"
DROPOUT_RESUMES = "checkpoint.test_checkpoint.test_dropout_resumes_as_in_the_uninterrupted_run"

TRAPS = {
    1: Trap(
        "no parameter vanishes after a forward",
        (("parameters left as DTensors after a forward", Check(parameters_stay, 2)),),
    ),
    2: Trap("DDP averages over the replicas, not over other shards", (("DDP over the world", IN_A_RUN),)),
    3: Trap(
        "an inf on one rank skips the step on all of them",
        (
            (
                "overflow on one rank",
                "plugin.test_reductions.test_without_an_agreement_one_rank_steps_and_its_peer_does_not",
            ),
        ),
    ),
    4: Trap(
        "the norm is that of the full gradient, what is replicated counted once",
        (("local clip norm", IN_A_RUN), ("replicated parameters counted by every rank", IN_A_RUN)),
    ),
    5: Trap(
        "what is reported is clipped, bare sharded parameters included",
        (
            ("norm without clipping", IN_A_RUN),
            ("bare parameters left out of the norm", Check(norm_has_bare_parameters, 2)),
            ("sinks of other heads", OF_A_STYLE),
        ),
    ),
    6: Trap(
        "partial gradients are summed once a backward, however many accumulate",
        (("partial gradients not summed", IN_A_RUN), ("partial gradients summed again", IN_GRADIENTS)),
    ),
    7: Trap(
        "a sum is a sum and an average an average",
        (
            ("copy with a mean for its sum", IN_A_RUN),
            ("copy without its backward", IN_A_RUN),
            ("gather with a sum in its backward", IN_GRADIENTS),
            ("reduce with a sum in its backward", IN_GRADIENTS),
            ("experts' input gradients not summed", OF_A_STYLE),
            ("routing weights' gradients not summed", OF_A_STYLE),
            ("expert bias with a divided gradient", OF_A_STYLE),
        ),
    ),
    8: Trap(
        "the part of the keys that latent attention shares gets the gradients of all heads",
        (("shared rotary keys not summed", OF_A_STYLE),),
    ),
    9: Trap(
        "what is replicated stays equal, and drift is healed",
        (
            (
                "replicated gradients not agreed on",
                Check(noisy_gradients, 4, (True,), peers_are_equal),
            ),
            (
                "drift not looked for",
                Check(
                    drift,
                    *(2, ("heal", "parameter")),
                    lambda results: peers_are_equal([checksums for checksums, _ in results]),
                ),
            ),
        ),
    ),
    10: Trap(
        "no result of a collective lies in a copy that is dropped",
        (
            ("sum into a copy that is dropped", Check(run_check, 2, (check_copy_to_tp, 2))),
            ("sum into a copy that is dropped", Check(run_check, 2, (check_reduce_from_tp, 2))),
        ),
    ),
    11: Trap(
        "what every rank has whole is added once: row-parallel biases, those of experts, experts without weights",
        (
            ("row bias on every rank", IN_A_RUN),
            ("expert bias on every rank", OF_A_STYLE),
            ("identity expert on every rank", OF_A_STYLE),
        ),
    ),
    12: Trap("packed weights are cut section by section", (("packed weights cut as one", IN_A_RUN),)),
    13: Trap(
        "key/value heads that ranks share get the gradients of all of these, and count once",
        (
            ("shared heads not summed", OF_A_STYLE),
            ("shared heads summed over all ranks", OF_A_STYLE),
            ("shared sections summed as a whole", OF_A_STYLE),
            ("shared heads counted by every rank", IN_A_RUN),
        ),
    ),
    14: Trap(
        "a module that keeps head counts computes with its own",
        (
            (
                "head counts of the whole model",
                Check(
                    same_gradients,
                    2,
                    (build_opt, unmasked_loss, OPT_PLAN),
                ),
            ),
            ("head counts of the whole model", Check(same_gradients, 2, (causal("phi3", False), causal_loss))),
            (
                "cached head counts left as they were",
                "styles.test_shared_heads.test_head_counts_of_the_full_model_give_an_error_or_wrong_gradients",
            ),
        ),
    ),
    15: Trap(
        "tied weights stay tied and get the gradients of both their uses",
        (("tied weights untied", Check(same_gradients, 2, (causal("llama", True), causal_loss))),),
    ),
    16: Trap(
        "a loss divided by the count of labels of the global batch is plain DDP's",
        (
            (
                "counts of every rank",
                Check(normalised_by_tokens, 4, (2,), losses_are_those_of_plain_ddp),
            ),
        ),
    ),
    17: Trap(
        "evaluation sees each sample once and in order, and a count counts each replica once",
        (
            ("metrics with duplicates", IN_A_RUN),
            ("ranks that count themselves", IN_GRPO),
            ("flos of every rank", IN_TRAINER),
        ),
    ),
    18: Trap("the schedule advances as under plain DDP", (("scheduler steps for every process", IN_A_RUN),)),
    19: Trap(
        "the ranks of a replica get the same data",
        (
            ("peers on different batches", IN_A_RUN),
            (
                "shuffles and dispatching without replicas",
                Check(batches, 2, (2, "weighted", 16, "by rank"), peers_are_equal),
            ),
            (
                "shuffles and dispatching without replicas",
                Check(
                    batches,
                    *(4, (2, "shuffled", 16, "by rank", False, False, True)),
                    peers_are_equal,
                ),
            ),
            (
                "shuffles and dispatching without replicas",
                Check(read_to_be_dispatched, 4, (2,), the_main_process_reads),
            ),
        ),
    ),
    20: Trap(
        "dropout and sampling draw alike where they have to, and again alike in recomputation",
        (
            (
                "one random stream for all heads",
                Check(masks, 2, (False,), masks_agree_where_replicated),
            ),
            ("random streams by process", Check(masks, 2, (True,), masks_agree_where_replicated)),
            (
                "random streams that go on",
                Check(masks, 2, (False, True), masks_are_drawn_again_alike),
            ),
            ("generation draws by itself", "model.test_generation.test_without_an_agreement_the_tokens_would_differ"),
            ("random states not loaded", DROPOUT_RESUMES),
            ("random states of the first rank", DROPOUT_RESUMES),
        ),
    ),
    21: Trap(
        "saving on the main process alone takes no part of other weights, says so, and hangs nobody",
        (("parts of another step are sent", Check(saved_alone, 2, seconds=20.0)),),
    ),
    22: Trap(
        "a resumed run continues with the optimizer state of its own shards, and where the schedule was",
        (
            ("optimizer state of the first peer", "checkpoint.test_checkpoint.test_a_wrongly_resumed_run_is_another"),
            ("scheduler not loaded", "checkpoint.test_checkpoint.test_a_wrongly_resumed_run_is_another"),
        ),
    ),
    23: Trap(
        "an optimizer built and stepped before `prepare` trains the shards",
        (("optimizer left behind", Check(check_continues, 2, ("adamw", 2))),),
    ),
    24: Trap(
        "foreach and fused optimizers never see DTensors among tensors",
        (("parameters never localized", Check(steps_over_tensors_of_one_kind, 2)),),
    ),
    25: Trap(
        "models on several meshes may take turns",
        (("sum over all meshes", Check(models_on_several_meshes, 4)),),
    ),
    26: Trap(
        "adapters are alike where they are replicated and get the gradients of all ranks",
        (
            ("LoRA A not summed", "styles.test_lora.test_a_lora_fault_is_caught"),
            ("LoRA A drawn by each rank", "styles.test_lora.test_a_lora_fault_is_caught"),
        ),
    ),
    27: Trap(
        "a plan that shards nothing is an error",
        (("a plan that shards nothing", Check(an_empty_plan_is_refused, 2)),),
    ),
    28: Trap(
        "an odd vocabulary, ignored labels and labels on one shard only change nothing",
        (
            (
                "padding kept in a gather",
                Check(same_gradients, 4, (partial(build_model, "llama", vocab_size=129), labels_on_one_shard)),
            ),
            (
                "lookup not masked",
                Check(same_gradients, 4, (partial(build_model, "llama", vocab_size=129), labels_on_one_shard)),
            ),
        ),
    ),
    29: Trap(
        "a shard has the padding row if it is its own, and is initialised again as a part of the whole",
        (
            ("padding row by its number in the whole", Check(padding_rows, 2)),
            ("initialisation of each part by itself", Check(initialised_again, 2)),
        ),
    ),
}


def test_each_trap_has_an_entry():
    assert list(TRAPS) == list(range(1, 30))


def test_each_fault_belongs_to_a_trap():
    assert {fault for trap in TRAPS.values() for fault, _ in trap.shown} == {
        *(*FAULTS, *MORE_FAULTS),
        *(*STYLE_FAULTS, *LORA_FAULTS, *RESUME_FAULTS),
    }


def cases(kind):
    return list(shown_by(kind))


def shown_by(kind):
    for number, trap in TRAPS.items():
        for index, (fault, by) in enumerate(trap.shown):
            if isinstance(by, kind):
                yield pytest.param(fault, by, id=f"{number}.{index + 1} {trap.claim}")


@pytest.mark.parametrize("fault, test", cases(str))
def test_a_trap_names_a_test_that_is_there(fault, test):
    file, _, name = test.rpartition(".")
    module = import_module(f"tests.{file}")
    function, shown = getattr(module, name), getattr(module, "SHOWN_BY", {})
    if test == IN_A_RUN:
        assert fault in shown
    elif test == IN_GRADIENTS:
        (mark,) = (mark for mark in function.pytestmark if mark.args[0] == "model, fault")
        assert fault in {tried for _, tried in mark.args[1]}
    elif test == OF_A_STYLE:
        assert fault in shown
    else:
        assert fault not in FAULTS


def attempt(run, fault, args):
    """On a rank: what `run` returns, and what it raised."""
    with injected(fault):
        try:
            return run(*args), None
        except (Exception, pytest.fail.Exception) as error:
            return None, f"{type(error).__name__}: {error}"


def problem(check, fault):
    try:
        results = run_on_ranks(attempt, check.ranks, check.run, fault, check.args, timeout=check.seconds)
    except RanksError as error:  # hung, or out of step afterwards
        return str(error)
    raised = [error for _, error in results if error is not None]
    if raised:
        return raised[0]
    try:
        check.holds([result for result, _ in results])
    except AssertionError as error:
        return str(error) or "AssertionError"
    return None


@pytest.mark.parametrize("fault, check", cases(Check))
def test_a_trap_is_avoided_and_would_be_seen(fault, check):
    assert problem(check, None) is None
    assert problem(check, fault) is not None, f"nothing shows that {fault!r}"
