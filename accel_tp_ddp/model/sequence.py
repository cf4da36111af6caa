"""Where the sequence of a model can be spread over the ranks: its layers, and the blocks in them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules import activation

from ..core.errors import PlanError
from ..plans.plan import Plan, PlanEntry
from ..styles.around import LocalHeads, LocalSizes, Requires, Together
from ..styles.base import Style
from ..styles.experts import Experts
from ..styles.forward import ParallelForward
from ..styles.latent_attention import HeadParameters, LocalParameters
from ..styles.linear import Colwise, Rowwise
from ..styles.peft.lora import OfParts
from ..styles.region import Region
from ..styles.replicated import AllReduce, LocalDropout
from ..styles.sequence import Block, Layer, Stack

__all__ = ["check_sequence", "spread_sequence"]

_OFF = "Set sequence_parallel=False."


def check_sequence(model: nn.Module, plan: Plan) -> None:
    """Raise if the sequence cannot be spread in the layers of `model`. Touches nothing, communicates nothing.

    Raises:
        PlanError: With the reason.
    """
    _layers(model, plan)


def spread_sequence(model: nn.Module, plan: Plan, region: Region) -> None:
    """Spread the sequence in the layers of a model whose styles have been applied."""
    owner, layers = _layers(model, plan)
    Stack(region, owner, [_Structure(layer, plan).layer() for layer in layers]).attach()


def _layers(model: nn.Module, plan: Plan) -> tuple[nn.Module, list[nn.Module]]:
    """The list of layers that holds most of what is sharded, and the module that has it."""
    what = f"sequence_parallel=True: this {type(model).__name__}"
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise PlanError(f"{what} is an encoder-decoder, whose decoder sees two sequences. {_OFF}")
    sharded = {id(entry.site.module): _elements(entry) for entry in plan.entries if entry.layouts}
    found: list[tuple[int, nn.Module, list[nn.Module]]] = []
    for owner in model.modules():
        for each in owner.children():
            if isinstance(each, nn.ModuleList) and len(each):
                held = [sum(sharded.get(id(inside), 0) for inside in layer.modules()) for layer in each]
                if any(held):
                    found.append((sum(held), owner, list(each)))
    if not found:
        raise PlanError(f"{what} has no list of layers that are sharded. {_OFF}")
    most, owner, layers = max(found, key=lambda each: each[0])  # of equals the outermost, which comes first
    if len({id(layer) for layer in layers}) < len(layers):
        raise PlanError(f"{what} has layers that are the same module. {_OFF}")
    if getattr(owner, "layerdrop", 0) or getattr(getattr(owner, "config", None), "layerdrop", 0):
        raise PlanError(f"{what} drops layers out. Build it with layerdrop=0, or set sequence_parallel=False.")
    return owner, layers


def _elements(entry: PlanEntry) -> int:
    held = dict(entry.site.module.named_parameters())
    return sum(held[name].numel() for name in entry.layouts if name in held) or 1


class _Structure:
    """What a layer is made of."""

    def __init__(self, layer: nn.Module, plan: Plan):
        self.module = layer
        inside = set(layer.modules())
        self.entries = [entry for entry in plan.entries if entry.site.module in inside]

    def layer(self) -> Layer:
        children = [child for name, child in _children(self.module)]
        if any(entry.site.module is self.module for entry in self.entries if not entry.style.leaves_alone):
            return Layer(self.module, None)
        if any(param is not None and param.ndim > 1 for param in self.module._parameters.values()):
            return Layer(self.module, None)
        blocks, plain, partial, biases = [], [self.module], [], []
        for child in children:
            entries = self._of(child)
            sharding = [entry for entry in entries if not entry.style.leaves_alone]
            if not sharding:
                if _is_pointwise(child):
                    plain += list(child.modules())
                else:
                    blocks.append(Block(child, None))
                continue
            styles = [style for entry in sharding for style in _single(entry.style)]
            opens = [style for style in styles if style.enters and style.local_output]
            closes = [style for style in styles if _closes(style)]
            alone = [style for entry in sharding if entry.site.module is child for style in _single(entry.style)]
            if bool(opens) != bool(closes) or any(style in alone for style in (*opens, *closes)):
                return Layer(self.module, None)
            calls = [call for entry in sharding for call in entry.style.calls(entry.site)]
            if not opens or not self._closes_region(child, sharding):
                ends = _ends(child, sharding)
                blocks.append(Block(child, None, ends))
                biases += [call for call in calls if ends and _closes(call.style)]
                continue
            blocks.append(Block(child, _outermost([call for call in calls if call.style.enters])))
            partial += [call for call in calls if call.partial_gradients]
            biases += [call for call in calls if _closes(call.style)]
        if not blocks:
            return Layer(self.module, None)
        return Layer(self.module, blocks, _with_parameters(plain), partial, biases)

    def _of(self, child: nn.Module) -> list[PlanEntry]:
        inside = set(child.modules())
        return [entry for entry in self.entries if entry.site.module in inside]

    @staticmethod
    def _closes_region(child: nn.Module, entries: list[PlanEntry]) -> bool:
        """Whether the input of a block goes to column-parallel layers alone, and row-parallel ones give its output."""
        covered: set[nn.Module] = set()
        for entry in entries:
            for style in _single(entry.style):
                if isinstance(style, OfParts):
                    covered |= {site.module for site, _ in style.parts(entry.site)}
                elif not (
                    (isinstance(style, Colwise) and style.local_output)
                    or _closes(style)
                    or style.partial_gradients
                    or isinstance(style, (HeadParameters, LocalDropout, LocalHeads, LocalParameters))
                    or isinstance(style, (LocalSizes, Requires))
                ):
                    return False
            covered.add(entry.site.module)
        return all(module in covered for module in child.modules() if _own_parameters(module))


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that run by themselves: the members of lists in their place."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield name, child


def _single(style: Style) -> list[Style]:
    return [one for each in style.styles for one in _single(each)] if isinstance(style, Together) else [style]


def _closes(style: object) -> bool:
    return isinstance(style, Rowwise) and style.local_input


def _ends(child: nn.Module, entries: list[PlanEntry]) -> bool:
    """Whether a block's output is that of one row-parallel layer, which is a part of it by itself."""
    closing = [entry for entry in entries if any(map(_closes, _single(entry.style)))]
    summed = [style for entry in entries for style in _single(entry.style) if isinstance(style, (AllReduce, Experts))]
    return len(closing) == 1 and closing[0].site.parent is child and not summed


def _outermost(calls: list[ParallelForward]) -> list[ParallelForward]:
    """Without those that another one runs, such as of the base layer of adapters."""
    by_module = {id(call.module): call for call in calls}
    return list(by_module.values())


def _own_parameters(module: nn.Module) -> bool:
    return any(param is not None for param in module._parameters.values())


def _with_parameters(modules: list[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if _own_parameters(module)]


_MIX = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_ALONE = (nn.Identity, nn.Dropout, *(getattr(activation, name) for name in activation.__all__))


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a module treats each place of the sequence by itself: a norm, a dropout, an activation."""
    if any(True for _ in module.children()):
        return isinstance(module, nn.Sequential) and all(_is_pointwise(child) for child in module)
    if isinstance(module, _MIX):
        return False
    if isinstance(module, _ALONE):
        return True
    held = [param for param in module._parameters.values() if param is not None]
    if any(param.ndim > 1 for param in held) or any(buffer is not None for buffer in module._buffers.values()):
        return False
    return bool(held) or "norm" in type(module).__name__.lower()
