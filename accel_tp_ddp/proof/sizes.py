"""Smaller sizes for a model's config: whatever a plan depends on stays, such as ratios, ties and what divides by what.

Fields are told by their names and by how their values relate to each other, never by the architecture.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, isqrt, lcm
from typing import Any

__all__ = [
    "Choice",
    "changes_between",
    "cut_layers",
    "kinds_in_lists",
    "layer_counts",
    "named_layers",
    "parts_of",
    "shrunk",
]

_HEADS = re.compile(r"(^|_)(n_|num_)?(\w+_)?heads?(_kv|_per_layer|_per_stage)?$|^(mamba_)?n_?groups$|^o_groups$")
_HEAD_WIDTH = re.compile(r"(^|_)(head_dim|head_size|headdim|d_head|d_kv|dim_head|kv_channels)$")
_NO_HEADS = re.compile(r"^(mamba_)?d_head$|head_(dim|size)|heads_per_ngram|per_head|dim_head|headdim|loss")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
_LAYERS = re.compile(
    r"^(\w+_)?(num_hidden_layers|n_layers?|num_layers|num_blocks|layers|num_(de|en)coder_layers|num_(\w+_)?layers)$"
    r"|^(\w+_)?depth$|^num_layers_per_stack$"
)
_NO_LAYERS = re.compile(
    r"shared_layers|nextn|adapter|conv_layers|feat_extract|upsampl|every|sparse_|_dense_layers|window"
)
_WIDTH = re.compile(
    r"(^|_)(size|sizes|dim|dims|width|inner|units|channels|features|proj|rank|lowrank|ffn|d_ff|d_inner|d_ssm|extent|"
    r"projs?_dims|output_size|embd|d_rel)$|^d_|_dim_|_size_per_layer|^(qkv?|lru)_|^conv_dim$|_size_mlp$|_size_global$"
)
_NO_WIDTH = re.compile(
    r"vocab|image|patch|crop|kernel|window|chunk|block|batch|pool(?!er_)|position|pos_emb|grid|tile|num_channels|in_chan|stride|"
    r"merge_size|group_size|mel|state_size|d_state|d_conv|input_feat|cache|codebook|head_hidden|sampling|hash|^input_dim$"
)
_EXPERTS = re.compile(r"(^|_)(n_|num_)?(\w+_)?experts$|^zero_expert_num$|^num_experts\w*$")
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN = re.compile(r"experts?_per_tok|top_?k|moe_k$|topk")
_WINDOW = re.compile(
    r"sliding_window(_size)?$|attention_chunk_size$|^local_attention$|^window_size$|keep_window_size$"
)
_POSITIONS = re.compile(r"position_embeddings$|_positions$|^n_ctx$|max_seq_len$|context_length$|model_max_length$")
_NOISE = re.compile(r"dropout|pdrop|drop_rate|drop_path|layerdrop|jitter|noise|^mask_(time|feature)_prob$|drop_prob")
_TOKEN = re.compile(r"token|(^|_)(ids?|index)$")
_PART = re.compile(r"dropout|^_|dtype|version|initializer|^(output|return|use|id2label|label2id|num_labels)")

_VOCABULARY, _WINDOW_SIZE, _EVERY_TOKEN = 128, 8, 64


@dataclass(frozen=True)
class Choice:
    """How far a config is to be shrunk.

    Attributes:
        layers: For each part's path and field that counts layers, which of them to keep; all where it is left out.
        heads: Of heads that are more, how many a rank keeps; None keeps all.
        ratio: How many times as many queries as keys there are at least, if there are so many.
        width: Of a head; None keeps all widths of the model as they are.
        images: Whether images are smaller as well.
        quiet: Whether nothing is to drop out or be drawn at random.
        without: Names of fields that stay as they are.
    """

    layers: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    heads: int | None = 2
    ratio: int = 2
    width: int | None = 16
    images: bool = True
    quiet: bool = False
    without: frozenset[str] = frozenset()


def parts_of(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of a config and of those inside it, by the path to it."""
    own = config if isinstance(config, dict) else vars(config)
    yield path, own
    for name, value in list(own.items()):
        inside = f"{path}.{name}" if path else name
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from parts_of(value, inside)
        elif isinstance(value, dict) and name.endswith("_config"):
            yield from parts_of(value, inside)


def shrunk(config: Any, tp_size: int, choice: Choice) -> Any:
    """A copy of `config` with smaller sizes."""
    result = copy.deepcopy(config)
    parts = [_Part(path, own) for path, own in parts_of(result)]
    sizes = _Sizes(parts, tp_size, choice)
    for part in parts:
        cut, final = _cut_layers(part, choice)
        for name, value in {**part.fields, **cut}.items():
            if name in final or name in choice.without or _PART.match(name) and not _NOISE.search(name):
                continue
            new = sizes.of(part, name, value)
            if new is not None:
                cut[name] = new
        part.fields.update(cut)
        for layer in part.layers.values():
            for name, value in layer.items():
                if (new := sizes.of(part, name, value)) is not None:
                    layer[name] = new
    for part in parts:
        sizes.settle(part)
        attention = part.fields.get("_attn_implementation_internal")
        if isinstance(attention, str) and attention not in ("eager", "sdpa"):  # what needs a GPU
            part.fields["_attn_implementation_internal"] = "sdpa"
    return result


def cut_layers(config: Any, layers: Mapping[tuple[str, str], tuple[int, ...]]) -> Any:
    """A copy of `config` with some of its layers, see `Choice.layers`, and everything else as it is."""
    result = copy.deepcopy(config)
    for part in [_Part(path, own) for path, own in parts_of(result)]:
        part.fields.update(_cut_layers(part, Choice(layers))[0])
    return result


class _Part:
    """A config, with what it says about attention heads."""

    def __init__(self, path: str, fields: dict[str, Any]):
        self.path, self.fields = path, fields
        self.before = dict(fields)
        self.layers = layers_apart(fields)
        held_in_all = [*fields.items(), *(item for layer in self.layers.values() for item in layer.items())]
        self.heads = {
            value for name, held in held_in_all if _is_heads(name) for value in _ints(held) if 0 < value <= 1024
        }
        self.widths = {name: held for name, held in fields.items() if _HEAD_WIDTH.search(name) and _is_size(held)}
        names = [name for name in _HIDDEN if _is_size(fields.get(name))]
        if "embed_dim" in names:  # beside which the other may be what the model hands to another
            names.insert(0, "embed_dim")
        self.hidden = fields[names[0]] if names else None
        main = [fields.get(name) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads")]
        main += [held for name, held in fields.items() if _is_heads(name) and name.endswith("attention_heads")]
        main += [held for name, held in fields.items() if _is_heads(name)]
        self.main = next((held for held in main if _is_size(held)), None)

    @property
    def head_width(self) -> int | None:
        """Width of the main heads."""
        for name in ("head_dim", "d_kv", "head_size", "kv_channels", "d_head", "attention_head_dim"):
            if name in self.widths:
                return self.widths[name]
        if self.hidden and self.main and self.hidden % self.main == 0:
            return self.hidden // self.main
        return next(iter(self.widths.values()), None)

    @property
    def exact(self) -> bool:
        """Whether the model is as wide as its heads together."""
        return bool(self.hidden and self.main and self.head_width and self.hidden == self.main * self.head_width)


def layers_apart(fields: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What transformers keeps of the fields that single layers have otherwise, by the number of the layer."""
    return getattr(fields.get("_heterogeneity_spec"), "per_layer_overrides", {})


class _Sizes:
    """What becomes of the values of all configs of a model."""

    def __init__(self, parts: list[_Part], tp_size: int, choice: Choice):
        self.tp_size, self.choice, self.parts = tp_size, choice, parts
        self.heads = {part.path: self._fewer_heads(part) for part in parts}
        self.hidden = self._hidden()
        self.vocabularies = self._vocabularies()
        self.tokens = self._tokens()

    def _fewer_heads(self, part: _Part) -> dict[int, int]:
        """Smaller counts of heads, each as divisible by the ranks and by smaller counts as it was."""
        tp = self.tp_size
        new: dict[int, int] = {}
        for value in sorted(part.heads):
            least = value if self.choice.heads is None else self.choice.heads * tp
            new[value] = next(
                (
                    count
                    for count in range(least, value)
                    if (count % tp == 0) == (value % tp == 0)
                    and all(count >= min(self.choice.ratio, value // other) * new[other] for other in new)
                    and all(count > new[other] for other in new)
                    and all((count % new[other] == 0) == (value % other == 0) for other in new)
                ),
                value,
            )
        return new

    def _hidden(self) -> dict[int, int]:
        """The models' widths: divisible by heads as before, different ones still different."""
        new: dict[int, int] = {}
        for width in sorted({part.hidden for part in self.parts if part.hidden}):
            if self.choice.width is None:
                new[width] = width
                continue
            least, wanted = 1, 0
            for part in self.parts:
                if part.hidden != width:
                    continue
                heads = self.heads[part.path]
                least = lcm(least, *(heads[count] for count in part.heads if width % count == 0))
                for count in part.heads:  # of a state space, whose heads are as wide as several models together
                    for name, times in part.fields.items():
                        if name.endswith("expand") and isinstance(times, (int, float)) and times > 0:
                            least = lcm(least, heads[count] // gcd(heads[count], int(times) or 1))
                if part.main and part.head_width:
                    full, small = part.main * part.head_width, heads[part.main] * self._main_width(part)
                    scaled = small if part.exact else max(small * width // full, self.choice.width)
                    wanted = max(wanted, scaled if part.exact or scaled != small else 2 * small)
            least = lcm(least * 2, self.tp_size if width % self.tp_size == 0 else 1)
            if width % 8 == 0:
                least = lcm(least, 8)
            wanted = wanted or 4 * self.choice.width
            value = -(-wanted // least) * least
            while value in new.values():
                value += least
            new[width] = value if value < width else width
        return new

    def _vocabularies(self) -> dict[int, int]:
        values = {
            value
            for part in self.parts
            for name, held in part.fields.items()
            if "vocab_size" in name and "divisible" not in name and "base" not in name
            for value in _ints(held)
        }
        new: dict[int, int] = {}
        for number, value in enumerate(sorted(value for value in values if value > 0)):
            base = _VOCABULARY + 16 * number
            base += -base % self.tp_size + value % self.tp_size
            new[value] = min(base, value)
        return new

    def _tokens(self) -> dict[int, int]:
        """Special tokens that the small vocabulary has not, by numbers that are free."""
        held = {
            value
            for part in self.parts
            for name, own in part.fields.items()
            if _is_token(name)
            for value in _ints(own)
            if value > 0
        }
        largest = min(self.vocabularies.values(), default=_VOCABULARY)
        limit = min(_EVERY_TOKEN, largest)
        free = iter([number for number in range(7, limit) if number not in held])
        return {value: next(free, limit - 1) if value >= limit else value for value in sorted(held)}

    def of(self, part: _Part, name: str, value: Any) -> Any:
        """The smaller value; None where it stays."""
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return None
        if _NOISE.search(name):
            if not self.choice.quiet:
                return None
            if isinstance(value, (int, float)):
                return type(value)(0)
            return type(value)(0.0 for _ in value) if isinstance(value, (list, tuple)) else None
        if name in ("initializer_range", "init_std") and isinstance(value, float):
            return max(value, 0.1)
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            return self._rotary(part, value)
        if isinstance(value, (list, tuple)):
            if not value or not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
                return None
            new = [self._number(part, name, each) for each in value]
            return type(value)(each if small is None else small for each, small in zip(value, new))
        return self._number(part, name, value) if isinstance(value, int) else None

    def _number(self, part: _Part, name: str, value: int) -> int | None:
        if value <= 0:
            return None
        if "vocab" in name:
            return self._of_vocabulary(value)
        if _is_heads(name):
            return self.heads[part.path].get(value)
        if _is_token(name):
            return self.tokens.get(value)
        if _EXPERTS.search(name) and not _CHOSEN.search(name):
            return self._experts(part, name, value)
        if name in _GROUPS:
            return min(value, self._groups(part))
        if name == "topk_group":
            return min(value, 2)
        if _CHOSEN.search(name):
            return min(value, 2 if _few_chosen(name) else _WINDOW_SIZE)
        if _WINDOW.search(name) and not _sees(part):
            return min(value, _WINDOW_SIZE)
        if _POSITIONS.search(name) and not part.fields.get("rope_parameters"):
            return min(value, 128 if "source" in name or "target" in name else 1024)
        if name == "image_size" or "tokens_per_image" in name or name in ("image_seq_length", "num_image_tokens"):
            return self._image(part, name, value)
        if self.choice.width is None:
            return None
        if name in part.widths:
            return self._head_width(part, value)
        if name in ("rotary_dim",):
            return self._head_width(part, value)
        if _WIDTH.search(name) and not _NO_WIDTH.search(name) or name in _HIDDEN:
            return self._width(part, value)
        if value >= 256 and not _NO_WIDTH.search(name) and not _POSITIONS.search(name):
            return self._related(part, value)
        return None

    def _of_vocabulary(self, value: int) -> int | None:
        if value in self.vocabularies:
            return self.vocabularies[value]
        below = [known for known in self.vocabularies if known < value <= known + 2048]  # an offset behind one
        return self.vocabularies[max(below)] + value - max(below) if below else None

    def _experts(self, part: _Part, name: str, value: int) -> int:
        if "shared" in name or "zero" in name:
            return self._like(value, min(value, 2))
        chosen = min(
            max((_ints(held)[0] for key, held in part.before.items() if _few_chosen(key) and _ints(held)), default=1),
            2,
        )
        groups = self._groups(part)
        least = max(4, chosen + 1, 2 * groups, self.tp_size * (2 if value % self.tp_size == 0 else 1))
        return self._like(value, least, groups)

    def _groups(self, part: _Part) -> int:
        """Of experts, of which some are chosen first: more than are chosen."""
        groups = max((part.before.get(name) or 1 for name in _GROUPS), default=1)
        return self._like(groups, min(groups, 4 if (part.before.get("topk_group") or 1) > 1 else 2))

    def _like(self, value: int, least: int, of: int = 1) -> int:
        """The least value from `least` on that the ranks divide as they divide `value`, and `of`, if it did."""
        tp = self.tp_size
        of = of if value % of == 0 else 1
        fits = (n for n in range(least, value) if (n % tp == 0) == (value % tp == 0) and n % of == 0)
        return next(fits, value)

    def _head_width(self, part: _Part, value: int) -> int:
        """Of a width of heads: all by one factor, the main ones as wide together as the model, if they were."""
        main = part.head_width
        if self.choice.width is None:
            return value
        small = self._main_width(part)
        if part.exact and part.main and part.hidden:
            small = self.hidden[part.hidden] // self.heads[part.path][part.main]
        scaled = value * small / main if main else self.choice.width
        return min(max(2 * round(scaled / 2), 4), value)

    def _main_width(self, part: _Part) -> int:
        """Of the main heads, by a factor that leaves no rest of the others' widths."""
        widths = [width for width in (part.head_width, *part.widths.values()) if width]
        wanted, main = self.choice.width, part.head_width
        if wanted is None or not main:
            return main or wanted or 0
        unit = gcd(*(width for width in widths if width <= 4 * main))
        grain = 2
        while grain * main < wanted * unit:
            grain *= 2
        return min(main // unit * grain, main)

    def _related(self, part: _Part, value: int) -> int | None:
        """A smaller value for one that is a width of the model, or that of all heads, or a multiple or part of one."""
        hidden: dict[int, int] = {}
        heads: dict[int, int] = {}
        for each in [part, *self.parts]:
            if each.hidden:
                hidden.setdefault(each.hidden, self.hidden[each.hidden])
        for width in [*part.widths.values(), *([part.head_width] if part.head_width else [])]:
            for count in part.heads:
                heads.setdefault(count * width, self.heads[part.path][count] * self._head_width(part, width))
        for full, small in [*hidden.items(), *heads.items()]:
            if value == full:
                return small
        for full, small in hidden.items():
            if value % full == 0 and value // full <= 8:
                return value // full * small
        for full, small in hidden.items():
            if full % value == 0 and full // value <= 8 and small % (full // value) == 0:
                return small // (full // value)
        for full, small in heads.items():
            if value in (2 * full, 3 * full):
                return value // full * small
        return None

    def _width(self, part: _Part, value: int) -> int:
        grain = next(grain for grain in (8 * self.tp_size, 8, 1) if value % grain == 0)  # as kernels want it
        related = self._related(part, value)
        if related is not None and (related % grain == 0 or value >= (part.hidden or 0)):
            return min(related, value)
        hidden = part.hidden or max((each.hidden for each in self.parts if each.hidden), default=0)
        if not hidden:
            return self._like(value, min(value, 32), 8)
        scaled = round(value * self.hidden[hidden] / hidden)
        return self._like(value, max(-(-scaled // grain) * grain, min(value, 16), self.tp_size), grain)

    def _image(self, part: _Part, name: str, value: int) -> int | None:
        if not self.choice.images:
            return None
        grids = [
            (side // patch, patch)
            for each in [part, *self.parts]
            if (side := _first(each.before.get("image_size"))) and (patch := _first(each.before.get("patch_size")))
        ]
        if not grids:
            return None
        grid, patch = grids[0]
        small = 8 if grid > 8 else grid
        if name == "image_size":
            return small * patch
        side = isqrt(value)
        if side * side == value and grid % side == 0:
            return max(small // (grid // side), 1) ** 2
        return None

    def _rotary(self, part: _Part, value: dict[str, Any]) -> dict[str, Any]:
        """Sections and factors of rotary positions, which cut the width of a head."""
        width = part.before.get("qk_rope_head_dim") or part.before.get("head_dim") or part.head_width
        if self.choice.width is None or not width:
            return value
        small = self._head_width(part, width)
        new: dict[str, Any] = {}
        for name, held in value.items():
            if isinstance(held, dict):
                new[name] = self._rotary(part, held)
            elif name.endswith("section") and isinstance(held, (list, tuple)):
                total = sum(held) * small // width
                new[name] = type(held)(_shares(held, total))
            elif name in ("long_factor", "short_factor") and isinstance(held, (list, tuple)):
                new[name] = type(held)(held[: max(len(held) * small // width, 1)])
            else:
                new[name] = held
        return new

    def settle(self, part: _Part) -> None:
        """What has to be so again: sums of widths, and heads that are as wide as the model expanded."""
        own, old = part.fields, part.before
        parts = ("qk_nope_head_dim", "qk_rope_head_dim")
        if all(_is_size(old.get(name)) for name in ("qk_head_dim", *parts)):
            if old["qk_head_dim"] == sum(old[name] for name in parts):
                own["qk_head_dim"] = sum(own[name] for name in parts)
        for name, times in old.items():
            if not name.endswith("expand") or not isinstance(times, (int, float)) or not part.hidden:
                continue
            for width_name, width in part.widths.items():
                for count_name, count in old.items():
                    if _is_heads(count_name) and _is_size(count) and count * width == int(times * part.hidden):
                        if width_name not in self.choice.without and self.choice.width is not None:
                            own[width_name] = int(times * self.hidden[part.hidden]) // own[count_name]


def layer_counts(config: Any) -> Iterator[tuple[tuple[str, str], int]]:
    """The fields that count layers, by path and name, where there are more than two."""
    for path, own in parts_of(config):
        for name, value in own.items():
            if _is_size(value) and 2 < value <= 1024 and _LAYERS.match(name) and not _NO_LAYERS.search(name):
                yield (path, name), value


def kinds_in_lists(config: Any, place: tuple[str, str], count: int) -> list[tuple]:
    """For each layer what the lists beside its count say about it, and the fields that say where a kind begins."""
    own = dict(parts_of(config))[place[0]]
    columns: list[list[Any]] = []
    if apart := layers_apart(own):
        columns.append([repr(sorted(apart.get(index, {}).items())) for index in range(count)])
    for name, value in own.items():
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)) and len(value) == count and not _indices(name, value, count):
            columns.append([repr(each) for each in value])
        elif _indices(name, value, count):
            columns.append([index in value for index in range(count)])
        elif _is_size(value) and value < count and (where := _BOUNDARY.get(name)):
            columns.append([where(index, value, count) for index in range(count)])
    return list(zip(*columns)) if columns else [()] * count


def named_layers(config: Any, place: tuple[str, str], count: int) -> set[int]:
    """The layers that short lists beside their count name by number, such as those whose outputs are put together."""
    own = dict(parts_of(config))[place[0]]
    lists = [value for name, value in own.items() if _indices(name, value, count) and len(value) <= 8]
    return {index for value in lists for index in value}


_BOUNDARY: dict[str, Callable[[int, int, int], bool]] = {
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers", "max_window_layers"),
        lambda index, value, count: index < value,
    ),
    "num_kv_shared_layers": lambda index, value, count: index >= count - value,
}


def _cut_layers(part: _Part, choice: Choice) -> tuple[dict[str, Any], set[str]]:
    """The fields of one part that change with the layers that are kept, and which of them hold no sizes."""
    new: dict[str, Any] = {}
    final: set[str] = set()
    for (path, name), kept in choice.layers.items():
        if path != part.path:
            continue
        count = part.before[name]
        new[name] = len(kept)
        final.add(name)
        if apart := {kept.index(index): held for index, held in part.layers.items() if index in kept}:
            part.layers.clear()
            part.layers.update(apart)
        for other, value in part.before.items():
            if other in new or other.startswith("_") and not isinstance(value, list):
                continue
            if _indices(other, value, count):
                new[other] = type(value)(kept.index(index) for index in value if index in kept)
                final.add(other)
            elif isinstance(value, (list, tuple)) and len(value) == count:
                new[other] = type(value)(value[index] for index in kept)
            elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
                new[other] = {type(key)(kept.index(int(key))): held for key, held in value.items() if int(key) in kept}
            elif _is_size(value) and value < count and (where := _BOUNDARY.get(other)):
                new[other] = sum(where(index, value, count) for index in kept)
                final.add(other)
    return new, final


def _indices(name: str, value: Any, count: int) -> bool:
    """Whether a list holds numbers of layers, and not one element for each layer."""
    if not isinstance(value, (list, tuple)) or not value or not all(_is_number(each) for each in value):
        return False
    if not re.search(r"layer|ind(ex|ices|exes)|idx", name) or len(value) > count:
        return False
    return all(0 <= each < count for each in value) and all(a < b for a, b in zip(value, value[1:]))


def changes_between(full: Any, small: Any) -> Iterator[tuple[str, Any, Any]]:
    """The numbers that differ between two configs."""
    others = dict(parts_of(small))
    for path, own in parts_of(full):
        for name, value in own.items():
            new = others.get(path, {}).get(name)
            if _is_number(value) and _is_number(new) and value != new:
                yield f"{path}.{name}" if path else name, value, new


def without(choice: Choice, names: frozenset[str]) -> Choice:
    return replace(choice, without=choice.without | names)


def _few_chosen(name: str) -> bool:
    """Whether it says how many experts a token goes to, and not how many positions an indexer keeps."""
    return bool(_CHOSEN.search(name)) and "index" not in name and "group" not in name and "block" not in name


def _sees(part: _Part) -> bool:
    return "patch_size" in part.before or "image_size" in part.before


def _is_heads(name: str) -> bool:
    return bool(_HEADS.search(name)) and not _NO_HEADS.search(name)


def _is_token(name: str) -> bool:
    return bool(_TOKEN.search(name)) and not re.search(r"layer|per_|num_|max_|embed|drop|active|lang|tokenizer", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_number(value) and value > 0


def _ints(value: Any) -> list[int]:
    if _is_number(value):
        return [value]
    return [each for each in value if _is_number(each)] if isinstance(value, (list, tuple)) else []


def _first(value: Any) -> int | None:
    return next(iter(_ints(value)), None)


def _shares(sections: Any, total: int) -> list[int]:
    """`total` in parts that are about as the sections, none of them empty."""
    full, total = sum(sections), max(total, len(sections))
    new = [max(round(each * total / full), 1) for each in sections]
    while sum(new) != total:
        index = max(range(len(new)), key=lambda i: new[i]) if sum(new) > total else new.index(min(new))
        new[index] += 1 if sum(new) < total else -1
    return new
