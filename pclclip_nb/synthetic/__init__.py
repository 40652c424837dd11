"""Drawn people, and a small CLIP that was trained on them"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .people import make_synthetic_reid

__all__ = ["make_synthetic_reid"]


def __getattr__(name):
    if name in __all__:
        return getattr(import_module(".people", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
