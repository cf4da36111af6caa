"""The model that a command is about: of its config, without weights."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from ..core.errors import BadInputError

__all__ = ["build_target", "model_of_config", "read_config", "said"]

_HINT = "Give a folder with a config.json, such a file, the name of a model of the hub, or `module:function`."


def build_target(spec: str, device: str = "meta", trust_remote_code: bool = False) -> nn.Module:
    """The model that `spec` names, in the dtype that its config states, with random weights or, on `meta`, with none.

    Args:
        spec: A folder, a `config.json`, a hub name, or `module:function`, of a function without arguments that returns
            a model (found from the current folder too).
        device: Where it is built.
        trust_remote_code: Whether code that comes with a checkpoint may run.

    Raises:
        BadInputError: If there is no such model.
    """
    module, colon, function = spec.partition(":")
    with torch.device(device):
        if colon and function.isidentifier() and not os.path.exists(spec):
            return _called(module, function)
        return model_of_config(read_config(spec, trust_remote_code), trust_remote_code)


def _called(module: str, function: str) -> nn.Module:
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
        made = build()
    except Exception as error:  # of the user's own code
        failed = isinstance(error, (ImportError, AttributeError))
        what = f"names no function: {error}" if failed else f"raised {said(error)}"
        raise BadInputError(f"`{module}:{function}` {what}. {_HINT}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())
    if not isinstance(made, nn.Module):
        raise BadInputError(f"`{module}:{function}` returned a {type(made).__name__}, and not a model. {_HINT}")
    return made


def read_config(spec: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config that `spec` names, as in `build_target`."""
    path = Path(spec)
    if path.is_dir() and not (path / "config.json").is_file():
        raise BadInputError(f"the folder {spec} has no config.json. {_HINT}")
    if not path.exists() and (path.is_absolute() or spec.startswith((".", "~")) or path.suffix == ".json"):
        raise BadInputError(f"there is no file or folder {spec} (from {Path.cwd()}). {_HINT}")
    try:
        return AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub raise whatever a value in the file leads to
        raise BadInputError(f"`{spec}` has no config that can be read: {said(error)}. {_HINT}") from error


def model_of_config(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Of the class that the config names, else a causal language model, else the bare model."""
    try:
        return _built(config, trust_remote_code)
    except BadInputError:
        raise
    except Exception as error:  # sizes that do not go together surface anywhere
        raise BadInputError(
            f"no model can be built from this {type(config).__name__}: {said(error)}. Correct its sizes."
        ) from error


def _built(config: Any, trust_remote_code: bool) -> nn.Module:
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind._from_config(config)
    problems = []
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            return auto.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, ImportError) as error:
            problems.append(said(error))
    raise BadInputError(f"there is no model for a {type(config).__name__}: {problems[0]}")


def said(error: Exception) -> str:
    """The first line of an error, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}".rstrip(".") if lines else type(error).__name__
