"""Networks by name, with random, downloaded or published weights"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .create import create_backbone, load_backbone, load_published

__all__ = ["create_backbone", "load_backbone", "load_published"]


def __getattr__(name):
    if name in __all__:
        return getattr(import_module(".create", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
