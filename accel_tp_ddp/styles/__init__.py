"""How one module runs in parallel: a style is a small class, `registry` knows it by its name in plans."""

from .base import Site, Style
from .registry import get_style, register_style

__all__ = ["Site", "Style", "get_style", "register_style"]
