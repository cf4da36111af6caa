"""Which outputs of linear layers and embeddings reach which inputs of linear layers, feature by feature.

A model is run once, cut at the output of every such layer. What lies between two cuts is followed by gradients, so it
does not matter how the model spells it: views, splits, attention, functions of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layout import Ranges
from ..styles.conv1d import is_linear
from .observe import tensors_in

__all__ = ["Flow", "Needs"]


@dataclass(frozen=True)
class Needs:
    """What some features of a layer's input are made of.

    Attributes:
        outputs: By layer, which features of its output; without layers of which none is.
        parameters: By name, which elements of a parameter that is used on the way.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


class Flow:
    """One forward of a small model in training mode; the model itself is left as it is.

    Attributes:
        inputs: By linear layer, what it took in each of its calls.
        outputs: By linear layer or embedding, what it gave.
        exposed: The layers whose output reaches the model's own, past no other linear layer.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]):
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self._leaves: dict[str, list[Tensor]] = {}
        model = copy.deepcopy(model).train()
        for name, module in model.named_modules():
            if is_linear(module) or isinstance(module, nn.Embedding):
                self._cut(name, module)
        self._parameters = {name: param for name, param in model.named_parameters() if param.is_floating_point()}
        for param in self._parameters.values():
            param.requires_grad_(True)
        with torch.enable_grad():
            result = model(**copy.deepcopy(dict(inputs)))
        given = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
        self.exposed = frozenset(self._needs(given, [(0, None)]).outputs)

    def _cut(self, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            taken = args[0] if args else next(iter(kwargs.values()))
            self.inputs.setdefault(name, []).append(taken.clone())  # it may be changed in place later

        def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            self._leaves.setdefault(name, []).append(leaf)
            self.outputs.setdefault(name, []).append(leaf.detach().clone())
            return leaf.clone()

        if is_linear(module):
            module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def needs(self, layer: str, ranges: Ranges | None = None) -> Needs:
        """What the features in `ranges` of this linear layer's input are made of; all of them by default."""
        return self._needs([tensor for tensor in self.inputs[layer] if tensor.requires_grad], ranges or [(0, None)])

    def _needs(self, tensors: Sequence[Tensor], ranges: Sequence[tuple[int, int | None]]) -> Needs:
        if not tensors:
            return Needs()
        generator, weights = torch.Generator().manual_seed(3), []
        for tensor in tensors:
            weight = torch.zeros_like(tensor)
            for start, stop in ranges if tensor.ndim else ():
                part = weight[..., start:stop]
                part.copy_(torch.randn(part.shape, generator=generator))
            weights.append(weight if tensor.ndim else torch.ones_like(tensor))
        leaves = [(name, leaf) for name, calls in self._leaves.items() for leaf in calls]
        wanted = [*(leaf for _, leaf in leaves), *self._parameters.values()]
        gradients = torch.autograd.grad(tensors, wanted, weights, retain_graph=True, allow_unused=True)
        outputs: dict[str, Tensor] = {}
        for (name, _), gradient in zip(leaves, gradients):
            if gradient is not None:
                features = (gradient != 0).flatten(0, -2).any(0)
                outputs[name] = outputs[name] | features if name in outputs else features
        parameters = {
            name: gradient != 0
            for name, gradient in zip(self._parameters, gradients[len(leaves) :])
            if gradient is not None
        }
        return Needs(
            {name: features for name, features in outputs.items() if bool(features.any())},
            {name: elements for name, elements in parameters.items() if bool(elements.any())},
        )
