"""Fused linear layers: several weights packed along one dimension, each of which is sharded by itself."""

from __future__ import annotations

from ..core.layout import Layout, packed_ranges
from .base import Site, Style
from .conv1d import in_features, is_linear, out_features
from .heads import LocalHeadsConfig, meets_a_neighbour, verify_whole_heads
from .linear import Colwise, Rowwise, bare_output_dim

__all__ = ["PackedColwise", "PackedQKVColwise", "PackedRowwise"]


class PackedColwise(Colwise):
    """Column-parallel for a weight whose output features are `sections` equal sections, such as gate and up.

        layers.*.mlp.gate_up_proj: packed_colwise  # weight [gate / tp + up / tp, inputs]
        blocks.*.attn.qkv: packed_colwise(3)       # queries, keys and values of equal size

    Cut as one piece, the first rank would hold all of gate and the second all of up. Forward: nothing; backward:
    all-reduce of the input's gradient.
    """

    usage = "packed_colwise(sections)"

    def __init__(self, sections: int = 2):
        self.count = _at_least_one(sections)

    def sections(self, site: Site) -> list[int]:
        return equal_sections(site, out_features(site.module), self.count)

    def output_layout(self, site: Site) -> Layout:
        return Layout(0, packed_ranges(self.sections(site), site.tp_size))

    def bare_layout(self, site: Site, name: str) -> Layout:
        """Rows of a matrix or of a stack of matrices, or a stack's or a single vector's biases."""
        return packed_bare_layout(site, name, bare_output_dim(site.held(name)), self.count)

    def allows_uneven(self, site: Site) -> bool:
        sizes = self.sections(site)
        return len(set(sizes)) == 1 and meets_a_neighbour(site, sizes[0], in_features)

    def verify(self, site: Site) -> None:
        if is_linear(site.module):
            verify_sections(site, self.sections(site), self.allows_uneven(site))
            verify_whole_heads(site, out_features(site.module), "output", repeats=False)
        Style.verify(self, site)


class PackedQKVColwise(PackedColwise):
    """Column-parallel for queries, keys and values packed one after the other, with fewer key/value heads or not.

        layers.*.self_attn.qkv_proj: packed_qkv_colwise  # weight [(queries + keys + values) / tp, inputs]

    The attention module slices its activations by head counts, so it is shown this rank's counts. Forward: nothing;
    backward: all-reduce of the input's gradient.
    """

    def __init__(self):
        super().__init__(sections=3)

    def output_layout(self, site: Site) -> Layout:
        queries, keys, values = self.sections(site)
        copies = site.ranks_per_head(keys)
        return Layout(0, packed_ranges([queries, keys, values], site.tp_size, [1, copies, copies]))

    def sections(self, site: Site) -> list[int]:
        width, counts = site.head_width(), site.head_counts()
        heads = counts.get("num_attention_heads")
        if width is None or heads is None:
            raise site.error(
                "the parent module states no head width or its config no num_attention_heads.",
                "Use `colwise_gather_output` with `rowwise_split_input` on the output projection.",
            )
        key_value = counts.get("num_key_value_heads", heads) * width
        return [heads * width, key_value, key_value]

    def verify(self, site: Site) -> None:
        if is_linear(site.module):
            sizes = self.sections(site)
            verify_sum(site, sizes)
            verify_whole_heads(site, sizes[0], "queries")
        Style.verify(self, site)

    def show_sizes(self, site: Site) -> None:
        super().show_sizes(site)
        if site.parent is not None and getattr(site.parent, "config", None) is site.config:
            setattr(site.parent, "config", LocalHeadsConfig(site.config, site.tp_size))


class PackedRowwise(Rowwise):
    """Row-parallel for a weight whose input features are `sections` equal sections.

        h.*.attn.out_proj: packed_rowwise(4)  # weight [outputs, 4 * (section / tp)]

    Forward: all-reduce of the output; backward: nothing.
    """

    usage = "packed_rowwise(sections)"

    def __init__(self, sections: int = 2):
        self.count = _at_least_one(sections)

    def input_layout(self, site: Site) -> Layout:
        sizes = equal_sections(site, in_features(site.module), self.count)
        return Layout(1, packed_ranges(sizes, site.tp_size))

    def bare_layout(self, site: Site, name: str) -> Layout:
        """The last dimension: the outputs of a stack of transposed matrices."""
        return packed_bare_layout(site, name, site.held(name).ndim - 1, self.count)

    def verify(self, site: Site) -> None:
        if is_linear(site.module):
            verify_sections(site, equal_sections(site, in_features(site.module), self.count))
        super().verify(site)


def _at_least_one(sections: int) -> int:
    if sections < 1:
        raise ValueError(f"`{sections}` is no number of sections")
    return sections


def packed_bare_layout(site: Site, name: str, dim: int, sections: int) -> Layout:
    param = site.held(name)
    section, rest = divmod(param.shape[dim], sections)
    if rest:
        raise site.error(
            f"dimension {dim} of `{site.parameter(name)}` of size {tuple(param.shape)} is not {sections} equal "
            "sections.",
            "Name another style, or `replicate`.",
        )
    return Layout(dim, packed_ranges([section] * sections, site.tp_size))


def equal_sections(site: Site, features: int, sections: int) -> list[int]:
    if features % sections:
        raise site.error(
            f"`{site.parameter('weight')}` of size {tuple(site.weight.shape)} is not {sections} equal sections.",
            "Register a style with the right number of sections, or use `colwise_gather_output`.",
        )
    return [features // sections] * sections


def verify_sum(site: Site, sizes: list[int]) -> None:
    weight = site.weight
    if not any(sum(sizes) == size for size in weight.shape):
        raise site.error(
            f"`{site.parameter('weight')}` of size {tuple(weight.shape)} does not hold sections of {sizes}.",
            "Use `colwise_gather_output` with `rowwise_split_input` on the next layer.",
        )


def verify_sections(site: Site, sizes: list[int], uneven: bool = False) -> None:
    verify_sum(site, sizes)
    weight = site.weight
    for size in sizes:
        if size % site.tp_size and not uneven:
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(weight.shape)} has a packed section of {size}, which "
                "is not divisible by tp_size.",
                f"Choose a tp_size that divides {size}, or set the style to `replicate`.",
            )
        width = site.head_width()
        if width is not None and size % width == 0 and size // width % site.tp_size:
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(weight.shape)} has packed sections of {size // width} "
                f"heads of width {width}, which are not divisible by tp_size.",
                f"Choose a tp_size that divides {size // width}, or set the projections of this attention to "
                "`replicate`.",
            )
