"""Methods found by file name: ``quant/kv/affine.py`` is the KV format ``affine``.

There is no list to edit. A name is looked up by importing exactly that file, and the folder (more
precisely the package's ``__path__``) is what ``names`` scans.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from squeeze.errors import RecipeError, nearest
from squeeze.types import MethodInfo

KINDS = {
    "kv": "squeeze.quant.kv",
    "transform": "squeeze.quant.transforms",
    "weights": "squeeze.quant.weights",
    "prefill": "squeeze.sparsify.prefill",
    "activations": "squeeze.sparsify.activations",
}
Class = TypeVar("Class", bound=type)


def register(*, source: str, year: int) -> Callable[[Class], Class]:
    """Mark a frozen dataclass as the method its file is named after.

    Args:
        source: URL of the paper or repository the method comes from.
        year: Year of the source.
    """

    def mark(cls: Class) -> Class:
        package, _, name = cls.__module__.rpartition(".")
        kind = next((kind for kind, path in KINDS.items() if path == package), package)
        idea = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        cls.info = MethodInfo(kind, name, idea, source, year, cls)  # type: ignore[attr-defined]
        return cls

    return mark


def names(kind: str) -> list[str]:
    """List the methods of a kind: the public files in its folder."""
    package = importlib.import_module(KINDS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")


def get(kind: str, name: str, place: str = "method") -> type:
    """Import and return the method class ``name`` of ``kind``.

    Raises:
        RecipeError: the name is not a file of that kind; the message lists those that are.
    """
    known = names(kind)
    if name not in known:
        raise RecipeError(place, f"unknown method {name!r}", ", ".join(known), nearest(name, known))
    module = importlib.import_module(f"{KINDS[kind]}.{name}")
    for value in vars(module).values():
        info = getattr(value, "info", None)
        if isinstance(value, type) and isinstance(info, MethodInfo) and info.cls is value:
            return value
    raise TypeError(f"{module.__file__} registers no class; decorate one with @register")


def info(kind: str, name: str) -> MethodInfo:
    """Return the registered facts of one method."""
    return get(kind, name).info  # type: ignore[attr-defined,no-any-return]
