"""A plan for a model that has none, from what its layers feed.

A small model is run once (`Flow`), and layers are taken together where the outputs of some reach the inputs of others:
queries, keys and values the projection behind the attention, gate and up the one that brings back. How such a block is
cut follows from which features need which; what its modules have to know of it is tried, rank after rank, by this
process alone. What is left is compared on the ranks, as in a proof: a rule stays only if the model computes the same.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.agreement import Ranks
from ..core.errors import NoPlanError, PlanError
from ..core.layout import Layout
from ..core.wrappers import unwrap
from ..plans.names import Names
from ..plans.peft import adapted_model
from ..plans.plan import Plan, PlanEntry, resolve_plan, unplanned
from ..plans.rules import InferredPlan
from ..styles.around import LocalHeads, Together
from ..styles.base import HEAD_WIDTH_NAMES, Site, Style
from ..styles.conv1d import in_features, is_linear, out_features
from ..styles.heads import KEY_VALUE_COUNTS, QUERY_COUNTS
from ..styles.linear import Colwise
from ..styles.region import Region
from ..styles.registry import get_style
from .compare import CpuRanks, compare, relative_error
from .fingerprint import fingerprint
from .flow import Flow, Needs
from .inputs import BATCH
from .ledger import Ledger
from .sizes import parts_of
from .small import CannotShrink, Small, small_unplanned

__all__ = ["Block", "infer_plan", "log_inferred", "propose", "sharded_share"]

logger = logging.getLogger(__name__)

_TRIALS = 100  # of what the modules of a block are told
_MORE_HEADS = 4
_ALIKE = 1e-4
_INTO = ("rowwise", "packed_rowwise(2)", "packed_rowwise(3)", "packed_rowwise(4)")
_PACKED = ("colwise", "packed_colwise", "packed_colwise(3)", "packed_qkv_colwise")
_MANY = tuple(f"packed_colwise({sections})" for sections in range(4, 17))


@dataclass(frozen=True)
class Block:
    """Layers that are cut together, or not at all.

    Attributes:
        layers: Their names in rules.
        options: Rules for them, the best first.
        problem: Why there is none better, where it is known.
    """

    layers: tuple[str, ...]
    options: tuple[InferredPlan, ...]
    problem: str = ""


def infer_plan(model: nn.Module, mesh: DeviceMesh) -> InferredPlan:
    """Rules for `model`, whatever others there are for it, with which a small one computes the same when sharded.

    Collective over all ranks; touches no weight. Prints as YAML: full names, `*` for the number of a layer.

    Args:
        model: Bare, unsharded.
        mesh: The tensor-parallel ranks of this replica.

    Raises:
        NoPlanError: On every rank, if none is found; with what was tried.
    """
    model, ranks, ledger = unwrap(model), Ranks("infer", otherwise=PlanError), Ledger()
    digest = fingerprint(model, unplanned(model, mesh.size()))
    known = InferredPlan(ranks.on_main(lambda: ledger.inferred(digest) or {}))
    if known and not _misfit(model, mesh.size(), known):
        return known
    rules = _infer(model, mesh, ranks)
    ranks.on_main(lambda: ledger.remember_inferred(digest, rules))
    return rules


def _infer(model: nn.Module, mesh: DeviceMesh, ranks: Ranks) -> InferredPlan:
    made, problem = None, ""
    try:
        made = propose(model, mesh.size())
    except CannotShrink as error:
        problem = str(error)
    except Exception as error:  # of the model's own code; the other ranks would wait for this one
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problems = [each for each in ranks.all(problem) if each]
    if made is None or problems:
        raise _no_plan(model, problems[0])
    small, blocks = made
    ranks.same([repr(blocks)], "rank {rank} infers another plan than rank {own} ({theirs!r} against {ours!r})")
    tried: list[str] = [f"{_listed(block.layers)}: {block.problem}" for block in blocks if not block.options]
    blocks = [block for block in blocks if block.options]
    rules = _merged(block.options[0] for block in blocks)
    if not rules or _finding(small, rules, mesh, ranks):
        rules = InferredPlan()
        for block in blocks:
            for option in block.options:
                problem = _finding(small, _merged([rules, option]), mesh, ranks)
                if not problem:
                    rules = _merged([rules, option])
                    break
                tried.append(f"{_listed(block.layers)} as {_listed(dict.fromkeys(option.values()))}: {problem}")
    if not rules:
        raise _no_plan(model, "; ".join(tried) or "no two layers feed each other in a way that can be cut")
    return rules


def propose(model: nn.Module, tp_size: int) -> tuple[Small, list[Block]]:
    """A small model, and what could be cut in it. The same on every rank; communicates nothing.

    Raises:
        CannotShrink: If there is no small model.
    """
    if adapted_model(model) is not model:
        raise CannotShrink("it has adapters; infer the plan of the bare model")
    search = _Search(model, small_unplanned(model, tp_size), tp_size)
    blocks = list(search.blocks())
    if search.untold:  # its heads may be too few for what is done with those of the full model
        try:
            other = _Search(model, small_unplanned(model, tp_size, _MORE_HEADS), tp_size)
        except CannotShrink:
            return search.small, blocks
        others = list(other.blocks())
        if other.untold < search.untold:
            return other.small, others
    return search.small, blocks


def log_inferred(plan: Plan, rules: InferredPlan) -> None:
    """Say on the main process that training goes by a plan which nobody wrote."""
    if Ranks("infer").is_main:
        logger.warning(
            "%s has no tensor-parallel plan. One was inferred from which of its layers feed which, and proved: it "
            "shards %.0f %% of the parameters. Look it over, and pass it as tp_plan to keep it:\n%s",
            plan.model,
            100 * sharded_share(plan),
            "\n".join(f"  {name}: {style}" for name, style in rules.items()),
        )


def sharded_share(plan: Plan) -> float:
    """Elements of sharded parameters as a share of all."""
    layouts, sizes = plan.layouts, dict(plan.parameters)
    return sum(size.numel() for name, size in sizes.items() if name in layouts) / max(
        sum(size.numel() for size in sizes.values()), 1
    )


def _no_plan(model: nn.Module, why: str) -> NoPlanError:
    return NoPlanError(
        f"tensor-parallel plan: {type(model).__name__} has no plan of its own, this package ships none for it, and "
        f'none could be inferred: {why}. Pass `tp_plan={{"name.of.a.module": "style", ...}}` or the path of a YAML '
        "file with such a mapping."
    )


def _finding(small: Small, rules: InferredPlan, mesh: DeviceMesh, ranks: Ranks) -> str:
    """What differs if the small model is sharded by these rules; "" if nothing does."""
    with CpuRanks(mesh) as cpus:
        try:
            findings = compare(small.model, small.inputs, cpus, rules).findings
        except PlanError as error:  # of the plan itself, so on every rank
            return str(error)
        said = f"`{findings[0].module}`: {findings[0].what}" if findings else ""
    return next((each for each in ranks.all(said) if each), "")


def _misfit(model: nn.Module, tp_size: int, rules: InferredPlan) -> str:
    try:
        resolve_plan(model, tp_size, rules)
    except PlanError as error:
        return str(error)
    return ""


def _merged(rules: Any) -> InferredPlan:
    """The rules of several blocks; a module around layers of two of them has the styles of both."""
    merged = InferredPlan()
    for each in rules:
        for name, style in each.items():
            known = merged[name].split(" + ") if name in merged else []
            merged[name] = " + ".join(dict.fromkeys([*known, *style.split(" + ")]))
    return merged


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


# ------------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class _Group:
    """What feeds what in one place of the model, in `small`: a layer's attention, a layer's MLP.

    Attributes:
        sources: Layers whose output is to be cut.
        sinks: Linear layers whose input then is.
    """

    sources: tuple[str, ...]
    sinks: tuple[str, ...]


@dataclass(frozen=True)
class _Stand:
    """In the place of a mesh, where a rank's part is tried without the others."""

    rank: int
    ranks: int

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


class _Differs(Exception):
    """What a rank would hand to a row-parallel layer is not its part of the input."""


class _Search:
    def __init__(self, model: nn.Module, small: Small, tp_size: int):
        self.full, self.small, self.tp_size = model, small, tp_size
        try:
            self.flow = Flow(small.model, small.inputs)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise CannotShrink(f"its layers cannot be followed: {type(error).__name__}: {text}") from error
        self.names, self.full_names = Names(small.model), Names(model)
        self.reached = {sink: set(self.flow.needs(sink).outputs) for sink in self.flow.inputs}
        self.claimed: set[str] = set()
        self.untold = 0  # blocks that could be cut, but for what the modules in them do with the parts

    def blocks(self) -> Iterator[Block]:
        """What can be cut well, and then what else can be cut at all."""
        yield from self._ends()
        yield from self._stacks()
        left: list[tuple[list[_Group], str]] = []
        # The few before the many: without norms, the layers of the residual stream hang together too.
        for groups in sorted(self._groups(), key=lambda groups: len(_layers(groups[:1]))):
            if not set(_layers(groups)) & self.claimed:
                best, problem = self._best(groups)
                if best is None:
                    left.append((groups, problem))
                    continue
                gathered = self._gathered(groups)
                self.claimed |= set(_layers(groups))
                yield Block(self._patterns(_layers(groups)), (best, gathered) if gathered else (best,))
            else:
                left.append((groups, "a part of it is cut already"))
        for groups, problem in left:
            if self.flow.exposed & set(groups[0].sinks):  # the residual stream
                continue
            gathered = self._gathered(groups)
            layers = tuple(name for name in _layers(groups) if name not in self.claimed)
            if layers:
                self.claimed |= set(layers)
                yield Block(self._patterns(layers), (gathered,) if gathered else (), problem)

    def _patterns(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pattern(self.small.model, name) for name in names))

    def _misfit(self, rules: InferredPlan) -> str:
        """Why the full model cannot be cut by these rules; "" if it can."""
        return _misfit(self.full, self.tp_size, rules)

    def _ends(self) -> Iterator[Block]:
        """The embedding of tokens and the layer that gives logits: both may always be cut by the vocabulary."""
        full = {name: self.full_names.match(pattern(self.small.model, name))[0] for name in self.flow.outputs}
        modules = {name: self.full_names.modules[other] for name, other in full.items()}
        rows = {name: each.num_embeddings for name, each in modules.items() if isinstance(each, nn.Embedding)}
        logits = {name: out_features(modules[name]) for name in self.flow.exposed if is_linear(modules[name])}
        vocabularies = _vocabularies(self.full) or set(rows.values()) & set(logits.values())
        styles = {name: "embedding_rowwise" for name, size in rows.items() if size in vocabularies}
        styles |= {name: "colwise_gather_output" for name, size in logits.items() if size in vocabularies}
        tied: dict[int, list[str]] = {}
        for name in styles:
            weight: Any = self.small.model.get_submodule(name)
            tied.setdefault(id(weight.weight), []).append(name)
        for names in tied.values():
            rules = InferredPlan({pattern(self.small.model, name): styles[name] for name in names})
            problem = self._misfit(rules)
            self.claimed |= set(names)
            yield Block(tuple(rules), () if problem else (rules,), problem)

    def _stacks(self) -> Iterator[Block]:
        """Modules that hold all experts as stacked matrices."""
        alike: dict[str, list[str]] = {}
        for name, module in self.names.modules.items():
            own = [param for param in module._parameters.values() if param is not None]
            if sum(param.ndim == 3 for param in own) > 1 and len(own) == len(list(module.parameters())):
                alike.setdefault(pattern(self.small.model, name), []).append(name)
        calls = self._calls([name for names in alike.values() for name in names]) if alike else {}
        for rule, names in alike.items():
            ran = [name for name in names if name in calls]
            labels = next((found for found in self._stacked(ran[0]) if self._adds_up(ran[0], found, calls)), None)
            if labels is None or not all(self._adds_up(name, labels, calls) for name in ran):
                yield Block((rule,), (), "its parameters cannot be told to be those of experts")
                continue
            rules = InferredPlan({f"{rule}.{leaf}": label for leaf, label in labels.items()})
            rules[rule] = "moe_tp_experts"
            problem = self._misfit(rules)
            yield Block((rule,), () if problem else (rules,), problem)

    def _calls(self, names: Sequence[str]) -> dict[str, tuple[tuple, dict[str, Any], Tensor]]:
        """What these modules took and gave, in a first call of each that gave a tensor."""
        calls: dict[str, tuple[tuple, dict[str, Any], Tensor]] = {}
        model = copy.deepcopy(self.small.model)
        for name in names:

            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    calls.setdefault(name, copy.deepcopy((args, kwargs, output)))

            model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        with torch.no_grad():
            model(**copy.deepcopy(self.small.inputs))
        return calls

    def _stacked(self, name: str) -> Iterator[dict[str, str]]:
        """Ways to cut the parameters of such a module: matrices along their rows or columns, in sections or not."""
        params = {leaf: param for leaf, param in self.names.modules[name]._parameters.items() if param is not None}
        matrices = ("packed_colwise", "rowwise", "colwise", "packed_rowwise")
        biases = ("packed_rowwise", "rowwise", "shared_bias")
        options = [matrices if param.ndim == 3 else biases for param in params.values()]
        yield from (dict(zip(params, labels)) for labels in itertools.islice(itertools.product(*options), _TRIALS))

    def _adds_up(self, name: str, labels: Mapping[str, str], calls: Mapping[str, Any]) -> bool:
        """Whether what the ranks' parts of the module give adds up to what it gave."""
        args, kwargs, want = calls[name]
        styles = {leaf: get_style(label, leaf) for leaf, label in labels.items()}
        module = self.names.modules[name]
        site = Site(name, module, self.names.parent(name), self.names.config(name), self.tp_size, "", styles)
        try:
            get_style("moe_tp_experts", name).verify(site)
            layouts = site.bare_layouts()
            got = torch.zeros_like(want)
            for rank in range(self.tp_size):
                part = copy.deepcopy(module)
                for leaf, param in part._parameters.items():
                    if param is not None and leaf in layouts:
                        param.data = _own(param.data, layouts[leaf], rank)
                    elif param is not None:
                        param.data = param.data / self.tp_size
                with torch.no_grad():
                    got += part(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception:  # of the plan, or of the module's own code on sizes that it did not expect
            return False
        return relative_error(got, want) < _ALIKE

    def _groups(self) -> list[list[_Group]]:
        """Layers that hang together, as one's output is in the other's input; those of the same names in one list."""
        left, found = {sink: sources for sink, sources in self.reached.items() if sources}, []
        while left:
            first = next(iter(left))
            sinks, sources = {first}, left.pop(first)
            while more := [sink for sink, own in left.items() if own & sources]:
                sinks |= set(more)
                sources = sources.union(*(left.pop(sink) for sink in more))
            if not sources & (self.flow.exposed | self.claimed) and not sinks & self.claimed:
                found.append((sources, sinks))
                if sources & sinks:  # layers in the midst of a block, such as those that latent keys pass
                    ends = sinks - sources
                    found.append((set().union(*(self.reached[sink] for sink in ends)), ends))
        alike: dict[tuple, list[_Group]] = {}
        order = list(self.flow.outputs).index
        for sources, sinks in found:
            group = _Group(tuple(sorted(sources, key=order)), tuple(sorted(sinks, key=order)))
            alike.setdefault(tuple(map(self._patterns, (group.sources, group.sinks))), []).append(group)
        return list(alike.values())

    def _best(self, groups: list[_Group]) -> tuple[InferredPlan | None, str]:
        """How the layers of these groups, which have the same names but for numbers, can be cut; or why not."""
        if problem := self._clash(groups):
            return None, problem
        problem = ""
        for cut in self._cuts(groups[0]):
            best, reason = self._told(groups, cut)
            if best is not None:
                return best, ""
            problem = problem or reason
        self.untold += bool(problem)
        return None, problem or "what lies between needs all features at once"

    def _clash(self, groups: list[_Group]) -> str:
        """Names in rules mean every layer of that name, and not these alone."""
        known = set(_layers(groups))
        for rule in self._patterns(tuple(known)):
            others = [name for name in self.names.match(rule) if name in self.flow.outputs and name not in known]
            if others:
                return f"`{others[0]}` has another place in the model than others of its name"
        return ""

    # ------------------------------------------------------------------------------------------- how it is cut

    def _cuts(self, group: _Group) -> Iterator[dict[str, str]]:
        """Styles by names in the small model: of the layers, and of parameters used between them.

        There are none where what lies between them mixes the features, as a norm over all of them does.
        """
        for into in _INTO if not set(group.sources) & set(group.sinks) else ():
            layouts = [self._layout(sink, into) for sink in group.sinks]
            if any(layout is None for layout in layouts):
                continue
            needs = [
                [self.flow.needs(sink, layout.ranges[rank]) for sink, layout in zip(group.sinks, layouts) if layout]
                for rank in range(self.tp_size)
            ]
            styles = dict.fromkeys(group.sinks, into)
            elsewhere = set().union(*(own for sink, own in self.reached.items() if sink not in group.sinks))
            linear = [source for source in group.sources if is_linear(self.small.model.get_submodule(source))]
            for source in group.sources:
                wanted = [_union(each.outputs.get(source) for each in own) for own in needs]
                if self._is_shared(source, wanted):
                    styles[source] = "mla_kv_a_proj"
                    continue
                if source in elsewhere:  # where all of its output is wanted
                    break
                if source not in linear:
                    labels: Sequence[str] = ("embedding_heads",)
                elif len(linear) == 1:
                    labels = (*self._by_heads(source), *_PACKED, *_MANY)
                else:
                    labels = (*_PACKED, *_MANY)
                label = next((label for label in labels if self._holds(source, label, wanted)), None)
                if label is None:
                    break
                styles[source] = label
            else:
                between = self._between(needs)
                if between is not None:
                    order = [name for name in self.flow.outputs if name in styles]
                    yield {**{name: styles[name] for name in order}, **between}

    def _site(self, name: str, label: str) -> Site:
        module = self.names.modules[name]
        return Site(name, module, self.names.parent(name), self.names.config(name), self.tp_size, label)

    def _layout(self, name: str, label: str) -> Layout | None:
        """How the style would cut the layer's weight; None if it cannot."""
        site, style = self._site(name, label), get_style(label, name)
        try:
            style.verify(site)
            return style.layouts(site)["weight"]
        except PlanError:
            return None

    def _holds(self, source: str, label: str, wanted: Sequence[Tensor | None]) -> bool:
        """Whether each rank would have what its part of the sinks' inputs is made of."""
        if self._layout(source, label) is None:
            return False
        return _covers(_handed_out(self._site(source, label), get_style(label, source)), 0, wanted)

    def _is_shared(self, source: str, wanted: Sequence[Tensor | None]) -> bool:
        """Whether all ranks use the same last columns of its output, as of keys with rotary positions."""
        first = wanted[0]
        if first is None or any(mask is None or not torch.equal(mask, first) for mask in wanted) or bool(first.all()):
            return False
        site, style = self._site(source, "mla_kv_a_proj"), get_style("mla_kv_a_proj", source)
        try:
            style.verify(site)
        except PlanError:
            return False
        return not bool(first[: len(first) - style.facts(site)["shared_columns"]].any())

    def _by_heads(self, source: str) -> Iterator[str]:
        """Styles of a fused projection that is viewed by key/value head."""
        kept = [name for name, value in vars(self.names.parent(source)).items() if type(value) is int]
        counts = [name for name in kept if "head" in name and name not in HEAD_WIDTH_NAMES]
        keys = [name for name in counts if name in KEY_VALUE_COUNTS or "kv" in name or "key" in name]
        for query in [name for name in counts if name not in keys]:
            yield from (f"grouped_qkv_colwise({query}, {key})" for key in keys)
            yield f"grouped_qkv_colwise({query})"

    def _between(self, needs: Sequence[Sequence[Needs]]) -> dict[str, str] | None:
        """Styles for parameters that are used on a rank's part of the features, and the modules that hold them.

        None if one can be used neither whole nor in parts.
        """
        styles: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for own in needs for each in own for name in each.parameters):
            wanted = [_union(each.parameters.get(name) for each in own) for own in needs]
            owner, leaf = self.names.owner_of(name)
            module = self.names.modules[owner]
            if is_linear(module) or isinstance(module, nn.Embedding):
                return None  # its weight is used without calling it
            known = [mask for mask in wanted if mask is not None]
            if len(known) == len(wanted) and all(torch.equal(mask, known[0]) for mask in known):
                styles.setdefault(owner, []).append("replicated_with_grad_allreduce")
                continue
            if self.names.match(name) == [owner]:
                layout = self._layout_of(owner, "head_parameters", leaf)
                if layout is None or not _covers(layout, layout.dim, wanted):
                    return None
                styles.setdefault(owner, []).append("head_parameters")
                continue
            for label in ("colwise", "rowwise"):
                layout = get_style(label, name).bare_layout(self._site(owner, label), leaf)
                if layout is not None and _covers(layout, layout.dim, wanted):
                    styles[name] = [label]
                    styles.setdefault(owner, []).append("local_params")
                    break
            else:
                return None
        return {name: " + ".join(dict.fromkeys(labels)) for name, labels in styles.items()}

    def _layout_of(self, name: str, label: str, leaf: str) -> Layout | None:
        site, style = self._site(name, label), get_style(label, name)
        try:
            style.verify(site)
        except PlanError:
            return None
        return style.layouts(site).get(leaf)

    # ------------------------------------------------------------------------------ what modules have to be told

    def _told(self, groups: list[_Group], cut: Mapping[str, str]) -> tuple[InferredPlan | None, str]:
        """Rules for the groups, with the sizes that the modules around have to be told; or why there are none."""
        rules = InferredPlan({pattern(self.small.model, name): label for name, label in cut.items()})
        problem = self._misfit(rules)
        if problem:
            return None, problem
        problem = self._rehearse(rules, groups)
        if not problem:
            return rules, ""
        hints = [*self._counts(groups[0]), *self._arguments(groups[0])]
        subsets = itertools.chain.from_iterable(itertools.combinations(hints, number + 1) for number in range(5))
        for chosen in itertools.islice(subsets, _TRIALS):
            trial = _merged([rules, *_told(chosen)])
            if not self._rehearse(trial, groups):
                problem = self._misfit(trial)
                return (None, problem) if problem else (trial, "")
        return None, problem

    def _around(self, group: _Group) -> list[str]:
        """The modules that hold the layers, up to the one that holds all of them."""
        layers = [name.split(".") for name in (*group.sources, *group.sinks)]
        common = 0
        while len({tuple(name[: common + 1]) for name in layers}) == 1:
            common += 1
        ends = ((name, end) for name in layers for end in range(len(name) - 1, max(common, 1) - 1, -1))
        return list(dict.fromkeys(".".join(name[:end]) for name, end in ends))

    def _counts(self, group: _Group) -> list[tuple[str, str]]:
        """Numbers that modules around the layers keep, which may be counts of heads or features."""
        modules = {name: self.names.modules[name] for name in (*group.sources, *group.sinks)}
        features = {out_features(each) for name, each in modules.items() if name in group.sources and is_linear(each)}
        features |= {in_features(each) for name, each in modules.items() if name in group.sinks}
        found: dict[tuple[str, str], int] = {}
        for name in self._around(group):
            module = self.names.modules[name]
            for attribute, value in vars(module).items():
                if (
                    type(value) is int
                    and value > 1
                    and value % self.tp_size == 0
                    and attribute not in HEAD_WIDTH_NAMES
                ):
                    if any(each % value == 0 for each in features):
                        found[pattern(self.small.model, name), attribute] = value
        known = (*QUERY_COUNTS, *KEY_VALUE_COUNTS)
        return sorted(found, key=lambda place: (place[1] not in known, -found[place]))[:9]

    def _arguments(self, group: _Group) -> list[tuple[str, str]]:
        """Styles that cut an argument of a module around the layers, where it may have a dimension of heads."""
        found: dict[tuple[str, str], None] = {}

        def look(name: str, heads: int, attribute: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                taken = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
                for key, value in [*taken.items(), *taken.get("kwargs", {}).items()]:
                    for dim in range(-value.ndim, -1) if isinstance(value, Tensor) and value.ndim > 2 else ():
                        if value.size(dim) in (heads, heads * value.size(0), heads * BATCH):
                            style = f"local_heads({key}, dim={dim}{f', heads={attribute}' if attribute else ''})"
                            found[pattern(self.small.model, name), style] = None

            return hook

        model = copy.deepcopy(self.small.model)
        for name in self._around(group):
            module, config = model.get_submodule(name), self._site(name, "local_heads").head_counts()
            stated = {"": config["num_attention_heads"]} if "num_attention_heads" in config else {}
            kept = {
                each: getattr(module, each) for each in QUERY_COUNTS if isinstance(getattr(module, each, 0.0), int)
            }
            for attribute, heads in (stated or kept).items():
                module.register_forward_pre_hook(look(name, heads, attribute), with_kwargs=True)
        with torch.no_grad():
            model(**copy.deepcopy(self.small.inputs))
        return list(found)[:6]

    def _gathered(self, groups: list[_Group]) -> InferredPlan | None:
        """What is always right: weights are cut, and what they give is gathered."""
        sources = {name for group in groups for name in group.sources}
        styles = {
            name: "colwise_gather_output" if name in sources else "rowwise_split_input"
            for name in _layers(groups)
            if name in self.flow.inputs and name not in self.claimed
        }
        rules = InferredPlan({pattern(self.small.model, name): style for name, style in styles.items()})
        return None if not rules or self._misfit(rules) else rules

    # ------------------------------------------------------------------------------------------- rank after rank

    def _rehearse(self, rules: InferredPlan, groups: list[_Group]) -> str:
        """What goes wrong if a rank computes the groups on its part of the features; "" if nothing does.

        The layers themselves do not run: the sources hand out this rank's part of what they gave, and the sinks check
        that they get this rank's part of what they took.
        """
        try:
            for rank in range(self.tp_size):
                self._as_rank(rank, rules, groups)
        except (PlanError, _Differs) as error:
            return str(error)
        except Exception as error:  # of the model's own code, on sizes that it did not expect
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return ""

    def _as_rank(self, rank: int, rules: InferredPlan, groups: list[_Group]) -> None:
        model = copy.deepcopy(self.small.model).train()
        sources = {name for group in groups for name in group.sources}
        sinks = {name for group in groups for name in group.sinks}
        plan: Plan = resolve_plan(model, self.tp_size, rules)
        for entry in plan.entries:
            entry.style.show_sizes(entry.site)
        for entry in plan.entries:
            name, module = entry.site.name, entry.site.module
            if name in sources:
                layout = _handed_out(entry.site, entry.style) if entry.layouts else None
                module.forward = self._hand_out(name, layout, rank)
            elif name in sinks:
                module.forward = self._check(name, entry.layouts["weight"], rank)
            else:
                _cut_parameters(entry, rank)
                for style in entry.style.styles if isinstance(entry.style, Together) else (entry.style,):
                    if isinstance(style, LocalHeads):
                        stand: Any = _Stand(rank, self.tp_size)
                        style.install(module, Region(stand), {}, style.facts(entry.site))
        with torch.no_grad():
            model(**copy.deepcopy(self.small.inputs))

    def _hand_out(self, name: str, layout: Layout | None, rank: int) -> Callable[..., Tensor]:
        calls = iter(self.flow.outputs[name])
        return lambda *args, **kwargs: (_part(next(calls), layout, rank) if layout else next(calls)).clone()

    def _check(self, name: str, layout: Layout, rank: int) -> Callable[..., Tensor]:
        calls, outputs = iter(self.flow.inputs[name]), iter(self.flow.outputs[name])

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            got, want = args[0] if args else next(iter(kwargs.values())), _part(next(calls).detach(), layout, rank)
            if got.shape != want.shape:
                raise _Differs(f"`{name}` would get {tuple(got.shape)} for {tuple(want.shape)}")
            if not relative_error(got, want) < _ALIKE:
                raise _Differs(f"`{name}` would get other numbers than its part of its input")
            return next(outputs).clone()

        return forward


def _told(hints: Sequence[tuple[str, str]]) -> list[InferredPlan]:
    """Rules for modules around layers: what they keep, and what they are given."""
    sizes: dict[str, list[str]] = {}
    given = []
    for module, hint in hints:
        if "(" in hint:
            given.append(InferredPlan({module: hint}))
        else:
            sizes.setdefault(module, []).append(hint)
    kept = (InferredPlan({module: f"local_sizes({', '.join(names)})"}) for module, names in sizes.items())
    return [*kept, *given]


def _layers(groups: Sequence[_Group]) -> tuple[str, ...]:
    """Their layers, each once."""
    return tuple(dict.fromkeys(name for group in groups for name in (*group.sources, *group.sinks)))


def pattern(model: nn.Module, name: str) -> str:
    """The name with `*` for numbers in lists of layers, but not for places in a sequence of different ones."""
    parts, module = [], model
    for part in name.split("."):
        inside = list(module._modules.values())
        repeats = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential)
            and len({type(each) for each in inside}) == 1
            and bool(inside[0]._modules)
        )
        parts.append("*" if part.isdigit() and repeats else part)
        child = module._modules.get(part)
        if child is None:  # a parameter
            break
        module = child
    return ".".join([*parts, *name.split(".")[len(parts) :]])


def _vocabularies(model: nn.Module) -> set[int]:
    """How many tokens the model's embedding, or a config, says that there are."""
    config = getattr(model, "config", None)
    sizes = {own.get("vocab_size") for _, own in parts_of(config)} if hasattr(config, "to_dict") else set()
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if isinstance(embedding, nn.Embedding):
        sizes.add(embedding.num_embeddings)
    return {size for size in sizes if isinstance(size, int)}


def _handed_out(site: Site, style: Style) -> Layout:
    """Which of a layer's outputs each rank has under a style."""
    return style.handed_out(site) if isinstance(style, Colwise) else style.layouts(site)["weight"]


def _union(masks: Iterator[Tensor | None] | Any) -> Tensor | None:
    union: Tensor | None = None
    for mask in masks:
        if mask is not None:
            union = mask if union is None else union | mask
    return union


def _covers(layout: Layout, dim: int, wanted: Sequence[Tensor | None]) -> bool:
    """Whether each rank's part along `dim` has what it wants."""
    for ranges, mask in zip(layout.ranges, wanted):
        if mask is not None:
            rest = mask.clone()
            for start, stop in ranges:
                rest.narrow(dim, start, stop - start).fill_(False)
            if bool(rest.any()):
                return False
    return True


def _part(full: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's features of an activation."""
    return _own(full, replace(layout, dim=full.ndim - 1), rank)


def _cut_parameters(entry: PlanEntry, rank: int) -> None:
    for name, layout in entry.layouts.items():
        param = entry.site.held(name)
        param.data = _own(param.data, layout, rank)


def _own(full: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's part of a parameter."""
    return torch.cat([full.narrow(layout.dim, start, stop - start) for start, stop in layout.ranges[rank]], layout.dim)
