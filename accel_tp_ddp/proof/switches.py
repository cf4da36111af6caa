"""What of configs and modules decides how a model computes, without its sizes: switches, kinds, relations to ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

__all__ = ["attributes", "left_out", "relation", "switches"]

# Left out: what does not reach the mathematics of a forward in training. When unsure, a field stays in.
_NAMES = {"architectures", "auto_map", "base_model_name_or_path", "finetuning_task", "id2label", "label2id"}
_NAMES |= {"name_or_path", "peft_version", "prefix", "problem_type", "revision", "task_specific_params"}
_NAMES |= {"tokenizer_class", "transformers_version"}
_RUN = {"dtype", "early_stopping", "do_sample", "generation_config", "output_attentions", "output_hidden_states"}
_RUN |= {"output_scores", "remove_invalid_values", "return_dict", "torch_dtype", "use_cache", "gradient_checkpointing"}
_RUN |= {"return_dict_in_generate", "training", "inference_mode"}
_LEFT_OUT = _NAMES | _RUN
_LEFT_OUT_LIKE = re.compile(r"_token_ids?$|_token_index$|dropout|pdrop$|drop$|^drop_path|^initializer_|^init_std")

_SIZE = re.compile(r"dim|size|width|per_|scal|factor")
# Of transformers' own ways to compute attention, each takes the heads that it gets: which one makes no difference.
_ALIKE = re.compile(r"eager$|sdpa|flash|flex|paged\||.*/")
_DIGITS = re.compile(r"\d+")


def switches(config: Any, tp_size: int, path: str = "") -> Iterator[str]:
    """Rows `path.field value` of a config, of those inside it, and of the mappings and lists in it."""
    yield from dict.fromkeys(_rows(config, tp_size, path, ()))


def attributes(module: Any, tp_size: int) -> Iterator[str]:
    """Rows `name value` of the switches, kinds and head counts that a module keeps as attributes of its own."""
    for name, value in vars(module).items():
        if left_out(name) or name[0] == "_":
            continue
        if value is None or isinstance(value, (bool, str, FunctionType, BuiltinFunctionType)):
            yield f"{name} {_kind(name, value, tp_size)}"
        elif isinstance(value, int) and _counts(name):
            yield f"{name} {_kind(name, value, tp_size)}"


def relation(count: int, tp_size: int) -> str:
    """How a number of heads goes with the number of ranks."""
    one = "one, " if count == 1 else ""
    if count < 1 or max(count, tp_size) % min(count, tp_size):
        return f"{one}no multiple"
    if count < tp_size:
        return f"{one}{tp_size // count} ranks each"
    return f"{one}one a rank" if count == tp_size else "several a rank"


def _rows(value: Any, tp_size: int, path: str, around: tuple[int, ...]) -> Iterator[str]:
    name = path.rpartition(".")[2] if not path.endswith("*") else path.split(".")[-2] if "." in path else path
    if id(value) in around:
        return
    inside = (*around, id(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        yield f"{path} {'some' if value else 'none'}"
        for item in value:
            yield from _rows(item, tp_size, f"{path}.*", inside)
    elif (fields := _fields(value)) is not None:
        yield f"{path} {type(value).__name__}"
        for key, item in fields.items():
            key = str(key)
            if left_out(key):
                continue
            if key[:1] != "_":
                yield from _rows(item, tp_size, f"{path}.{_wild(key)}" if path else _wild(key), inside)
            elif key.startswith(("_attn_implementation", "_experts_implementation")):
                if isinstance(item, str) and not (key.startswith("_attn") and _ALIKE.match(item)):
                    yield f"{path}.{key} {item}"
    else:
        yield f"{path} {_kind(name, value, tp_size)}"


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """The fields of a config, a mapping, or any object that is not of one of Python's or torch's own types."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type) or callable(value) or type(value).__module__.partition(".")[0] in ("builtins", "torch"):
        return None
    return getattr(value, "__dict__", None)


def _kind(name: str, value: Any, tp_size: int) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return repr(_wild(value))
    if isinstance(value, int) and _counts(name):
        if "head" in name:
            return relation(value, tp_size)
        return ("divisible" if value % tp_size == 0 else "not divisible") if "expert" in name else _some(value)
    if isinstance(value, (int, float)):
        return "0" if value == 0 else "+" if value > 0 else "-"
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__name__


@lru_cache(maxsize=10_000)
def left_out(name: str) -> bool:
    return name in _LEFT_OUT or _LEFT_OUT_LIKE.search(name) is not None


@lru_cache(maxsize=10_000)
def _counts(name: str) -> bool:
    return ("head" in name or "expert" in name or "group" in name) and not _SIZE.search(name)


def _some(count: int) -> str:
    return str(count) if count < 2 else "several"


def _wild(text: str) -> str:
    """Names and numbers of layers, and sizes in strings, do not count."""
    return _DIGITS.sub("*", text)
