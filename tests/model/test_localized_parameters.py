"""After sharding a model's parameters are plain, local, and the same objects under the same names: always.

Each test has the unsharded model beside the sharded one on every rank, and compares full gradients with it.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM

from accel_tp_ddp import ShardInfo, full_gradients, full_state_dict, parallelize

from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.models import ARCHITECTURES, LAYERS, VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import (
    MLP_PLAN,
    SOURCES,
    TOLERANCE,
    accelerator_for,
    assert_gradients_close,
    assert_right_gradients,
    build_mlp,
    full_backward,
    full_gradients_of,
    shard,
    token_batch,
    tp_mesh,
)

KINDS = pytest.mark.parametrize(
    "kind",
    [(name, False, "plan") for name in ARCHITECTURES]
    + [("llama", True, "plan"), ("gemma2", True, "plan"), ("gpt_neox", True, "plan")]
    + [("llama", False, source) for source in SOURCES[1:]],
    ids=lambda kind: "-".join([kind[0], *(["tied"] if kind[1] else []), kind[2]]),
)
FROM = pytest.mark.parametrize("source", SOURCES)


def both(kind=("llama", False, "plan"), mesh=None, **options):
    """The sharded model and the unsharded one."""
    name, tied, source = kind
    model = build_model(name, tied=tied, **options)
    return shard(model, mesh or tp_mesh(), source), build_model(name, tied=tied, **options)


def llama(source):
    return ("llama", False, source)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def objects_of(model):
    return [id(param) for param in model.parameters()]


# --- what the parameters are -----------------------------------------------------------------------------------------


def check_plain_and_the_same_for_three_steps(kind):
    model, reference = both(kind)
    names, objects = names_of(model), objects_of(model)
    assert names == names_of(reference)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def look(module, *_):
        assert not any(isinstance(param, DTensor) for param in model.parameters())
        seen.append((names_of(model), objects_of(model)))

    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "NeoXLayer", "Attention", "MLP")):
            module.register_forward_pre_hook(look)
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)
    for step in range(3):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) >= 3 * 3 * 2 * 3  # three modules in each of two layers, seen from three sides
    for now in [*seen, (names_of(model), objects_of(model))]:
        assert now == (names, objects)
    for param in model.parameters():
        assert type(param) is torch.nn.Parameter


@KINDS
def test_names_order_and_objects_stay_and_no_parameter_is_a_dtensor(kind):
    run_on_ranks(check_plain_and_the_same_for_three_steps, 2, kind)


def check_gradients(kind):
    model, reference = both(kind)
    for seed in range(2):
        assert_right_gradients(model, reference, token_batch(seed))


@KINDS
@pytest.mark.parametrize("tp", [2, 4])
def test_gradients_are_the_unsharded_models(kind, tp):
    run_on_ranks(check_gradients, tp, kind)


def held(kind):
    model, reference = both(kind)
    sizes = {}
    for (name, param), full in zip(model.named_parameters(), reference.parameters()):
        info = param.tp_shard
        if info is None or not info.is_sharded:
            assert param.shape == full.shape
            continue
        assert isinstance(info, ShardInfo) and info.mesh.size() == dist.get_world_size()
        assert info.global_shape == full.shape and param.shape != full.shape
        assert len(info.placements) == 1 and info.placements[0].is_shard(info.layout.dim)
        assert torch.equal(info.full_tensor(param), full), name
        assert param.untyped_storage().nbytes() == param.numel() * param.element_size(), f"{name} holds more"
        sizes[name] = (param.numel(), full.numel())
    return sizes


@KINDS
@pytest.mark.parametrize("tp", [2, 4])
def test_each_rank_holds_its_share_and_says_of_what(kind, tp):
    ranks = run_on_ranks(held, tp, kind)
    assert all(sizes.keys() == ranks[0].keys() and sizes for sizes in ranks)
    name, tied, source = kind
    linears = {"gpt_neox": 4, "phi3": 4}.get(name, 7)
    ends = 0 if source == "torch_parallelized" else 1 if tied else 2  # torch's styles here leave both whole
    assert sum(name.endswith("weight") for name in ranks[0]) == LAYERS * linears + ends
    for name, (_, full) in ranks[0].items():
        shares = [sizes[name][0] for sizes in ranks]
        assert sum(shares) == full, f"{name}: padding or overlap in {shares}"
        assert max(shares) <= full / tp * 1.04, f"{name}: {shares} of {full}"  # 131 rows over 4 ranks are at most 33


def replicated_infos(source):
    model, _ = both(llama(source))
    return [param.tp_shard for name, param in model.named_parameters() if "norm" in name]


@FROM
def test_tp_shard_is_none_where_a_parameter_is_replicated(source):
    for infos in run_on_ranks(replicated_infos, 2, source):
        assert infos == [None] * 5


def check_plain_parameters_keep_identity(kind):
    name, tied, _ = kind
    model = build_model(name, tied=tied)
    before = dict(model.named_parameters())
    accelerator = accelerator_for(2)
    prepared = accelerator.unwrap_model(accelerator.prepare(model))
    assert prepared is model
    after = dict(prepared.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", [("llama", False, ""), ("llama", True, ""), ("phi3", False, "")], ids=str)
def test_prepare_keeps_every_parameter_object(kind, ranks):
    run_on_ranks(check_plain_parameters_keep_identity, ranks, kind)


# --- tied embeddings -------------------------------------------------------------------------------------------------


def check_tied(folder):
    model, reference = both(("llama", True, "plan"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert names_of(model) == names_of(reference) and "lm_head.weight" not in names_of(model)
    local = model.state_dict(keep_vars=True)
    assert local["lm_head.weight"] is local["model.embed_tokens.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    other = torch.optim.SGD(reference.parameters(), lr=0.5)
    for seed in range(3):
        full_backward(model, token_batch(seed)), full_backward(reference, token_batch(seed))
        optimizer.step(), other.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = full_state_dict(model)
    assert list(state) == list(reference.state_dict())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert_tensors_close(state, reference.state_dict(), 1e-4)
    model.save_pretrained(folder)
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in state.items())


def test_tied_embeddings_stay_one_parameter_and_one_saved_tensor(tmp_path):
    run_on_ranks(check_tied, 2, str(tmp_path))
    from safetensors import safe_open

    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        assert {"model.embed_tokens.weight", "lm_head.weight"} & set(saved.keys()) == {"model.embed_tokens.weight"}
        assert saved.get_tensor("model.embed_tokens.weight").shape[0] == VOCABULARY


# --- ways to run a forward -------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def check_exception(kind, place, when):
    model, reference = both(kind)
    names, objects = names_of(model), objects_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(reference.parameters(), lr=0.1)

    def interrupt(*_):
        raise Interrupted

    for step in range(3):
        (where,) = [module for name, module in model.named_modules() if name.endswith(f"1.{place}")]
        register = where.register_forward_pre_hook if when == "before" else where.register_forward_hook
        hook = register(interrupt)
        with pytest.raises(Interrupted):
            model(**token_batch(seed=10 + step))
        hook.remove()
        assert (names_of(model), objects_of(model)) == (names, objects)
        assert_right_gradients(model, reference, token_batch(step))
        optimizer.step(), other.step()
    assert_tensors_close(full_state_dict(model), reference.state_dict(), 1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "kind, place",
    [
        (llama("plan"), "self_attn.k_proj"),
        (llama("plan"), "self_attn.o_proj"),
        (llama("plan"), "mlp.act_fn"),
        (("qwen3", False, "plan"), "self_attn.k_norm"),
        (llama("torch_styles"), "self_attn.k_proj"),
        (llama("torch_parallelized"), "mlp.down_proj"),
    ],
    ids=str,
)
def test_training_goes_on_rightly_after_an_exception_in_a_forward(kind, place, when):
    run_on_ranks(check_exception, 2, kind, place, when)


def check_twice(repeats, direct, source):
    model, reference = (build_mlp(repeats=repeats, direct=direct) for _ in range(2))
    if source == "plan":
        parallelize(model, tp_mesh(), MLP_PLAN)
    else:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        parallelize(model, tp_mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, wanted = model(x), reference(y)
    assert relative_error(out, wanted) < TOLERANCE
    out.square().sum().backward(), wanted.square().sum().backward()
    assert_gradients_close(full_gradients(model), full_gradients(reference))
    assert relative_error(x.grad, y.grad) < TOLERANCE


@pytest.mark.parametrize("source", ["plan", "torch_styles"])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_module_may_be_called_more_than_once(repeats, source):
    run_on_ranks(check_twice, 2, repeats, False, source)


@pytest.mark.parametrize("repeats", [1, 2])
def test_calling_forward_directly_gives_right_gradients(repeats):
    run_on_ranks(check_twice, 2, repeats, True, "plan")


def check_forward_directly_after_an_interrupted_call():
    model, reference = build_mlp(direct=True), build_mlp(direct=True)
    parallelize(model, tp_mesh(), MLP_PLAN)

    def interrupt(*_):
        raise Interrupted

    hook = model.up.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        model.up(torch.ones(4, 8))
    hook.remove()
    x, y = (torch.full((4, 8), 0.3, requires_grad=True) for _ in range(2))
    model(x).sum().backward(), reference(y).sum().backward()
    assert relative_error(x.grad, y.grad) < TOLERANCE


def test_calling_forward_directly_is_right_after_an_interrupted_call():
    run_on_ranks(check_forward_directly_after_an_interrupted_call, 2)


def check_several_forwards(source, order):
    model, reference = both(llama(source))
    for each in (model, reference):
        losses = [each(**token_batch(seed)).loss for seed in range(3)]
        if order == "together":
            sum(losses).backward()
        else:
            for loss in losses if order == "in order" else reversed(losses):
                loss.backward()
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))


@FROM
@pytest.mark.parametrize("order", ["together", "in order", "in reverse"])
def test_several_forwards_may_come_before_a_backward(source, order):
    run_on_ranks(check_several_forwards, 2, source, order)


def check_same_embeddings_twice(source):
    """The same tensor object enters twice: what is remembered of the first time must not spoil the second."""
    model, reference = both(llama(source))
    grads = []
    for each in (model, reference):
        embeddings = torch.randn((2, 6, 64), generator=torch.Generator().manual_seed(4)).requires_grad_()
        labels = token_batch(samples=2, length=6)["labels"]
        for _ in range(2):
            each(inputs_embeds=embeddings, labels=labels).loss.backward()
        sum(each(inputs_embeds=embeddings, labels=labels).loss for _ in range(2)).backward()
        grads.append(embeddings.grad)
    assert relative_error(*grads) < TOLERANCE
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))


@FROM
def test_the_same_input_object_may_come_again(source):
    run_on_ranks(check_same_embeddings_twice, 2, source)


def check_without_gradients(kind, context):
    model, reference = both(kind)
    assert_right_gradients(model, reference, token_batch(0))
    model.eval(), reference.eval()
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[context]():
        output, wanted = model(**token_batch(1)), reference(**token_batch(1))
    assert output.logits.shape[-1] == VOCABULARY and not output.logits.requires_grad
    assert relative_error(output.logits, wanted.logits) < TOLERANCE
    assert relative_error(output.loss, wanted.loss) < TOLERANCE
    assert_right_gradients(model, reference, token_batch(2))  # in eval mode
    model.train(), reference.train()
    assert_right_gradients(model, reference, token_batch(3))


@KINDS
@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
def test_evaluation_is_the_unsharded_models_and_training_goes_on(kind, context):
    run_on_ranks(check_without_gradients, 2, kind, context)


def check_no_grad_part(source):
    """A forward without gradients in between two whose graphs are still alive."""
    model, reference = both(llama(source))
    for each in (model, reference):
        first = each(**token_batch(0)).loss
        with torch.no_grad():
            each(**token_batch(1))
        (first + each(**token_batch(0)).loss).backward()
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))


@FROM
def test_a_forward_without_gradients_may_come_in_between(source):
    run_on_ranks(check_no_grad_part, 2, source)


def check_checkpointing(kind, reentrant):
    model, reference = both(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    names, objects = names_of(model), objects_of(model)
    runs = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for seed in range(2):
        assert_right_gradients(model, reference, token_batch(seed))
    assert len(runs) == 4, "each layer runs again in the backward, or nothing is tested here"
    assert (names_of(model), objects_of(model)) == (names, objects)


@KINDS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing_gives_right_gradients(kind, reentrant):
    run_on_ranks(check_checkpointing, 2, kind, reentrant)


def generate(kind, use_cache):
    model, reference = both(kind)
    model.eval(), reference.eval()
    prompt = {"input_ids": token_batch(samples=2, length=6)["input_ids"].clamp(min=3)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    prompt["attention_mask"][1, :2] = 0  # padded on the left
    options = {"max_new_tokens": 10, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    wanted = reference.generate(**prompt, **options)
    tokens = model.generate(**prompt, **options)
    assert tokens.shape[1] > 8
    assert torch.equal(tokens, wanted)
    assert_right_gradients(model, reference, token_batch(5))
    return tokens.tolist()


@KINDS
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_greedy_generation_gives_the_unsharded_models_tokens(kind, use_cache):
    first, second = run_on_ranks(generate, 2, kind, use_cache)
    assert first == second


# --- users' hooks ----------------------------------------------------------------------------------------------------


def check_embedding_hook(tied, registered):
    model, reference = build_model("llama", tied=tied), build_model("llama", tied=tied)
    seen = {}

    def watch(which, each):
        each.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.__setitem__(which, out.detach()))

    if registered == "before":
        watch("sharded", model)
    parallelize(model, tp_mesh())
    if registered == "after":
        watch("sharded", model)
    watch("unsharded", reference)
    assert_right_gradients(model, reference, token_batch())
    assert torch.equal(seen["sharded"], seen["unsharded"])


@pytest.mark.parametrize("registered", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_forward_hook_on_the_embedding_sees_the_full_vectors(tied, registered):
    run_on_ranks(check_embedding_hook, 2, tied, registered)


def check_changing_hooks(registered):
    """Hooks that change what goes in or comes out, as NEFTune and PEFT have them."""
    model, reference = build_model("llama"), build_model("llama")

    def change(each):
        each.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.5 + 0.1)
        each.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        each.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, output: output * 2)
        each.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        each.lm_head.register_forward_hook(lambda module, args, output: output.clamp(max=2.0))

    if registered == "before":
        change(model)
    parallelize(model, tp_mesh())
    if registered == "after":
        change(model)
    change(reference)
    assert_right_gradients(model, reference, token_batch())


@pytest.mark.parametrize("registered", ["before", "after"])
def test_forward_hooks_that_change_tensors_do_so_as_on_the_unsharded_model(registered):
    run_on_ranks(check_changing_hooks, 2, registered)


def backward_all_reduces(model, batch):
    loss = model(**batch).loss
    with CommDebugMode() as counter:
        loss.backward()
    assert {str(operation) for operation in counter.get_comm_counts()} == {"c10d.allreduce_"}
    return counter.get_total_counts()


def check_backward_hooks(kind):
    model, reference = both(kind)
    model.zero_grad()
    plain = backward_all_reduces(model, token_batch())
    seen = {"sharded": {}, "unsharded": {}}
    replicated_outside = {"mlp", "self_attn", "0", "1", "embed_tokens", "norm", "input_layernorm", "lm_head"}

    def watch(which, name):
        def hook(module, grad_input, grad_output):
            seen[which][name] = [grad.clone() for grad in (*grad_input, *grad_output) if grad is not None]

        return hook

    for name, module in model.named_modules():
        module.register_full_backward_hook(watch("sharded", name))
        module.register_full_backward_pre_hook(lambda module, grad_output: None)
    for name, module in reference.named_modules():
        module.register_full_backward_hook(watch("unsharded", name))
    model.zero_grad()
    hooked = backward_all_reduces(model, token_batch())
    assert_gradients_close(full_gradients_of(model), full_backward(reference, token_batch()))
    assert seen["sharded"].keys() == seen["unsharded"].keys()
    compared = 0
    for name in seen["sharded"]:
        if name.rpartition(".")[2] in replicated_outside:  # what is replicated, a hook sees as on the unsharded model
            ours, theirs = seen["sharded"][name], seen["unsharded"][name]
            for position, (got, wanted) in enumerate(zip(ours, theirs, strict=True)):
                if name == "lm_head" and position == 0:
                    continue  # inside the column-parallel module: this rank's part of a sum
                assert relative_error(got, wanted, floor=1e-6) < TOLERANCE, f"{name} {position}"
                compared += 1
    assert compared > 10
    return plain, hooked


@pytest.mark.parametrize("kind", [("llama", False, "plan"), ("qwen3", True, "plan"), ("phi3", False, "plan")], ids=str)
def test_full_backward_hooks_change_neither_gradients_nor_the_number_of_all_reduces(kind):
    for plain, hooked in run_on_ranks(check_backward_hooks, 2, kind):
        assert plain == hooked == 2 * 2 + 1  # attention and MLP of two layers, and the head


# --- copies ----------------------------------------------------------------------------------------------------------


def steps(model, reference, seeds, lr=0.3):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    other = torch.optim.SGD(reference.parameters(), lr=lr)
    for seed in seeds:
        assert_right_gradients(model, reference, token_batch(seed))
        optimizer.step(), other.step()


def check_copy(kind, when, how):
    from accel_tp_ddp.training.gradients import clip_grad_norm_

    model, reference = both(kind)
    if when == "after a step":
        steps(model, reference, [0])
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    twin_reference = copy.deepcopy(reference)
    assert names_of(twin) == names_of(model) and not set(objects_of(twin)) & set(objects_of(model))
    storages = {param.data_ptr() for param in model.parameters()}
    assert not storages & {param.data_ptr() for param in twin.parameters()}
    assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) == kind[1]
    steps(twin, twin_reference, [1, 2])
    steps(model, reference, [3])  # the copy's steps have not moved it
    assert_tensors_close(full_state_dict(model), reference.state_dict(), 1e-4)
    assert_tensors_close(full_state_dict(twin), twin_reference.state_dict(), 1e-4)
    full_backward(twin, token_batch(4)), full_backward(twin_reference, token_batch(4))
    norm = clip_grad_norm_(twin.parameters(), 0.1)
    wanted = torch.nn.utils.clip_grad_norm_(twin_reference.parameters(), 0.1)
    assert wanted > 0.2 and relative_error(norm, wanted) < TOLERANCE
    assert_gradients_close(full_gradients_of(twin), full_gradients_of(twin_reference))


OWN_STYLES = [llama("plan"), ("llama", True, "plan"), ("qwen3", False, "plan"), ("phi3", False, "plan")]


@pytest.mark.parametrize("when", ["before a step", "after a step"])
@pytest.mark.parametrize(
    "how, kind",
    [("deepcopy", kind) for kind in OWN_STYLES + [llama(source) for source in SOURCES[1:]]]
    + [("pickle", kind) for kind in OWN_STYLES],  # torch's own styles hang lambdas on the modules
    ids=str,
)
def test_a_copy_is_independent_and_computes_and_clips_rightly(kind, when, how):
    run_on_ranks(check_copy, 2, kind, when, how)


def check_unused_copy(kind):
    """As of an average of the weights (EMA), which is saved but never run."""
    model, reference = both(kind)
    twin = copy.deepcopy(model)
    assert_tensors_close(full_state_dict(twin), reference.state_dict(), 1e-7)


@pytest.mark.parametrize("kind", [llama(source) for source in SOURCES] + [("llama", True, "plan")], ids=str)
def test_the_full_state_dict_of_a_copy_that_never_ran_is_full(kind):
    run_on_ranks(check_unused_copy, 2, kind)


def check_copy_of_sharded_model_prepared():
    """It is sharded already: computed with rightly, or refused, but not cut a second time."""
    model, reference = build_mlp(), build_mlp()
    twin = copy.deepcopy(parallelize(model, tp_mesh(), MLP_PLAN))
    try:
        twin = accelerator_for(2, MLP_PLAN).prepare(twin)
    except ValueError as refusal:
        assert "sharded already" in str(refusal)
    else:
        assert relative_error(twin(torch.ones(2, 8)), reference(torch.ones(2, 8))) < TOLERANCE


def test_a_copy_of_a_sharded_model_is_not_sharded_again():
    run_on_ranks(check_copy_of_sharded_model_prepared, 2)


def check_deleted_model_is_freed():
    model, _ = both()
    full_backward(model, token_batch())
    watch = [weakref.ref(param) for param in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in watch)


def test_a_deleted_model_is_freed():
    run_on_ranks(check_deleted_model_is_freed, 2)


# --- padding ---------------------------------------------------------------------------------------------------------


def shapes_outside(folder):
    model, reference = both(("llama", False, "plan"))
    full_backward(model, token_batch())
    output = model(**token_batch())
    assert output.logits.shape == reference(**token_batch()).logits.shape
    state = full_state_dict(model)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in reference.state_dict().items()
    }
    grads = full_gradients(model)
    assert {name: grad.shape for name, grad in grads.items()} == {n: p.shape for n, p in reference.named_parameters()}
    model.save_pretrained(folder)
    return [param.shape[0] for param in (model.lm_head.weight, model.model.embed_tokens.weight)]


@pytest.mark.parametrize("tp, rows", [(2, [66, 65]), (4, [33, 33, 33, 32])])
def test_padding_of_an_uneven_vocabulary_never_shows(tp, rows, tmp_path):
    ranks = run_on_ranks(shapes_outside, tp, str(tmp_path))
    assert ranks == [[size, size] for size in rows]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape[0] == loaded.model.embed_tokens.weight.shape[0] == VOCABULARY
    wanted = build_model("llama").state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
