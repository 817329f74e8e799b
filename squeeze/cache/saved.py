"""A cache's layers as tensors and plain data, and back: what a saved prompt holds of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from squeeze.cache.layer import PackedLayer
from squeeze.errors import UnsupportedError
from squeeze.types import Tensors, resolve_dtype


def export_layer(layer: Any, name: str, tensors: Tensors) -> dict[str, Any]:
    """Set a layer's tensors aside under ``name`` and return the rest as plain data.

    Packed bytes are taken as they are. What no row owns, past its blocks or tokens, becomes zero:
    equal caches give equal files, and no foreign memory gets into one.

    Args:
        layer: A packed layer, or one of transformers' own.
        name: Prefix of its tensors.
        tensors: Where they are put, on the CPU.

    Raises:
        UnsupportedError: transformers' layer holds something else than tensors and plain data.
    """
    if not isinstance(layer, PackedLayer):
        return {key: _describe(x, f"{name}.{key}", tensors) for key, x in vars(layer).items()}
    counts, blocks = layer.exact.counts.host, layer.blocks
    for key in ("keys", "values"):
        exact = getattr(layer.exact, key)[:, :, : max(counts)].cpu().clone()
        for row, count in enumerate(counts):
            exact[row, :, count:] = 0
        tensors[f"{name}.exact.{key}"] = exact
        storage = layer.key_blocks if key == "keys" else layer.value_blocks
        for component, x in storage.merged(layer.max_blocks).items():
            for row, count in enumerate(blocks):
                x[count:, row] = 0
            tensors[f"{name}.{key}.{component}"] = x
    return {"total": layer.total, "pads": layer.pads, "exact": counts, "blocks": blocks}


def load_layer(
    layer: Any, name: str, facts: dict[str, Any], tensors: Tensors, device: torch.device
) -> None:
    """Fill an empty layer with what ``export_layer`` took, its exact tokens on ``device``."""
    if not isinstance(layer, PackedLayer):
        vars(layer).update({key: _rebuild(x, tensors, device) for key, x in facts.items()})
        return
    keys, values = (tensors[f"{name}.exact.{key}"].to(device) for key in ("keys", "values"))
    layer.pads = list(facts["pads"])
    layer.lazy_initialization(keys, values)
    layer.total = facts["total"]
    layer.exact.reserve(keys.shape[2])
    layer.exact.keys[:, :, : keys.shape[2]] = keys
    layer.exact.values[:, :, : keys.shape[2]] = values
    layer.exact.counts.set(list(facts["exact"]))
    layer.block_counts.set(list(facts["blocks"]))
    if not layer.max_blocks:
        return
    for key, storage in (("keys", layer.key_blocks), ("values", layer.value_blocks)):
        prefix = f"{name}.{key}."
        blocks = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        storage.grow(layer.max_blocks, {n: x[:1].to(device) for n, x in blocks.items()})
        storage.write(0, None, blocks)


def _describe(value: Any, name: str, tensors: Tensors) -> list[Any]:
    """Turn an attribute into data that says how to rebuild it."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu()
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[k, _describe(v, f"{name}.{k}", tensors)] for k, v in value.items()]]
    if isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    raise UnsupportedError(
        f"save_prompt: {name}",
        f"holds a {type(value).__name__}, which has no place in the file",
        "tensors, numbers and text",
        "Save prompts of models whose other layers are sliding or linear attention",
    )


def _rebuild(fact: list[Any], tensors: Tensors, device: torch.device) -> Any:
    kind, value = fact
    if kind == "tensor":
        # A tensor of a file is a window on it until it is copied.
        return tensors[value].to(device, copy=True)
    if kind == "dict":
        return {key: _rebuild(x, tensors, device) for key, x in value}
    if kind == "device":
        return device
    return resolve_dtype(value) if kind == "dtype" else value
