"""The rows of the table: dense, every shipped KV recipe, and transformers' own quantized cache."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from squeeze import api, recipe
from squeeze.errors import DeviceError
from squeeze.evaluation.scoring import supplied_cache
from squeeze.loading import load_model, load_tokenizer
from squeeze.plan import resolve_device

DENSE, RECIPE, TRANSFORMERS = "dense", "recipe", "transformers"
# The arguments that transformers' documentation recommends for each backend; group size and
# residual length are its defaults, and the latter is that of our recipes too.
BACKENDS: dict[str, dict[str, Any]] = {
    "hqq": {"axis_key": 1, "axis_value": 1, "q_group_size": 64, "residual_length": 128},
    "quanto": {"axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128},
}
# Optional, and of use to this benchmark alone: package and the version that it was tried with.
PACKAGES = {"hqq": ("hqq", "0.2.8.post1"), "quanto": ("optimum-quanto", "0.2.7")}
WIDTHS = (4, 2)


@dataclass(frozen=True)
class Row:
    """One way to store the cache.

    Attributes:
        name: Of the row on the command line and in the table; a recipe's own.
        kind: ``"dense"``, ``"recipe"`` or ``"transformers"``.
        settings: The recipe as a mapping, or the arguments of ``QuantizedCache``.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]


def discover() -> dict[str, Row]:
    """Return every row by name, dense first; recipes are those with only a ``kv_cache`` section."""
    rows = [Row("dense", DENSE, {})]
    for name in recipe.shipped():
        made = recipe.load(name)
        if made.kv_cache and not made.weights and not made.attention:
            rows.append(Row(name, RECIPE, made.to_dict()))
    for backend, arguments in BACKENDS.items():
        for bits in WIDTHS:
            settings = {"backend": backend, "nbits": bits, **arguments}
            rows.append(Row(f"{backend}{bits}", TRANSFORMERS, settings))
    found = {row.name: row for row in rows}
    assert len(found) == len(rows), "a recipe has the name of a row of transformers"
    return found


@contextmanager
def opened(
    row: Row, model: str, device: str | None, dtype: str | None
) -> Iterator[tuple[Any, Any]]:
    """Load the model with a row's cache in force.

    Yields:
        The model and its tokenizer.

    Raises:
        SqueezeError: the model or the machine cannot take the recipe, or a backend of transformers'
            cache is not installed.
    """
    if row.kind == RECIPE:
        made = api.run(dict(row.settings), model, evaluate=False, device=device, dtype=dtype)
        yield made.model, made.tokenizer
        return
    backend = backend_of(row)
    loaded = load_model(model, device=resolve_device(device), dtype=dtype)
    tokenizer = load_tokenizer(model)
    if not backend:
        yield loaded, tokenizer
        return
    with unpacking_in_torch() if backend == "quanto" else nullcontext():
        config = loaded.config
        with supplied_cache(loaded, lambda: QuantizedCache(config=config, **row.settings)):
            yield loaded, tokenizer


def backend_of(row: Row) -> str | None:
    """Return the backend of a row of transformers, checking that it is installed.

    Raises:
        DeviceError: it is not.
    """
    if row.kind != TRANSFORMERS:
        return None
    backend: str = row.settings["backend"]
    package, pinned = PACKAGES[backend]
    if importlib.util.find_spec(package.split("-")[0]) is None:
        remedy = f"pip install {package}=={pinned}"
        raise DeviceError(f"row {row.name}", f"{package} is not installed", remedy=remedy)
    return backend


def versions(row: Row) -> dict[str, str]:
    """Return the version of the package that a row needs besides the common ones."""
    if row.kind != TRANSFORMERS:
        return {}
    package, _ = PACKAGES[row.settings["backend"]]
    return {package: metadata.version(package)}


@contextmanager
def unpacking_in_torch() -> Iterator[None]:
    """Let quanto unpack its integers by torch operations, not by an extension it would compile.

    The integers are the same. The extension needs a compiler, and every process would wait for it.
    """
    importlib.import_module("optimum.quanto")  # defines the operation
    library = torch.library.Library("quanto", "IMPL")  # in force as long as it is alive
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that something is overridden
        for key in ("CPU", "CUDA"):
            library.impl("unpack", unpack, key, allow_override=True)
    yield


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Take apart bytes ``[n, ...]`` of quanto's; field i of all bytes comes before field i + 1.

    Returns:
        uint8 ``[n * 8 / bits, ...]``.
    """
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])
