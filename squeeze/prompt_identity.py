"""What a prompt's keys and values depend on: model, settings of the cache, prefill policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.attention import LayerState
from squeeze.cache import PackedCache, PackedLayer, Side
from squeeze.errors import CheckpointError

# Of a configuration, what says nothing about the keys and values that a prompt gets.
UNRELATED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "quantization_config",
        "transformers_version",
        "use_cache",
    ]
)
# Words of a weight that are summed at a time.
CHUNK = 1 << 20


def identity(model: Any, cache: PackedCache) -> dict[str, Any]:
    """Say what a prompt's keys and values depend on, as plain data."""
    config = model.config.get_text_config(decoder=True).to_dict()
    prefill = {
        str(i): found
        for i, state in model.squeeze_swap.states.items()
        if (found := _prefill(state))
    }
    layers = {
        str(i): {
            "keys": _side(layer.spec.keys),
            "values": _side(layer.spec.values),
            "block_length": layer.spec.block_length,
            "sink_tokens": layer.spec.sink_tokens,
            "residual_length": layer.spec.residual_length,
        }
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, PackedLayer)
    }
    found = {
        "config": {key: value for key, value in config.items() if key not in UNRELATED},
        "weights": weights_checksum(model),
        "kv_cache": layers,
        "prefill": prefill,
    }
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _side(side: Side) -> list[dict[str, Any]]:
    return [_method(x) for x in (*(transform for transform, _ in side.transforms), side.format)]


def _prefill(state: LayerState) -> dict[str, Any]:
    """Say what one layer does while a prompt is processed, empty where it is the model's own."""
    found = {} if state.policy is None else _method(state.policy)
    if state.quantize is not None:
        least = state.quantize_min_length
        found |= {"quantize": state.quantize, "quantize_min_length": least}
    return found


def _method(method: Any) -> dict[str, Any]:
    # The basis that a format works in is no method of its own and has no registered name.
    name = method.info.name if hasattr(method, "info") else type(method).__name__
    return {"method": name, **asdict(method)}


def check_identity(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise where model or settings are not those that the prompt was saved with."""
    words = {
        "config": "another model: its configuration",
        "weights": "another model: its weights",
        "kv_cache": "another cache: the settings of its layers",
        "prefill": "another prefill policy: the settings of its layers",
    }
    for part, what in words.items():
        if saved[part] == here[part]:
            continue
        where = ""
        if part != "weights":
            keys = sorted({*saved[part], *here[part]})
            where = ", ".join(k for k in keys if saved[part].get(k) != here[part].get(k))
        raise CheckpointError(
            str(path),
            f"was saved with {what} differ{f' in {where}' if where else ''}",
            "the model and recipe that it was saved with",
            "Load those, or prefill the prompt again",
        )


def weights_checksum(model: nn.Module) -> str:
    """Identify weights and fitted tables by content: the same on every device and in every file.

    Of each tensor's words w, the sums of ``w_i`` and of ``(i + 1) * w_i`` modulo ``2**64``.
    """
    rows: list[Any] = []
    sums: list[Tensor] = []
    for name, tensor in model.state_dict().items():
        rows.append([name, str(tensor.dtype), list(tensor.shape)])
        sums.append(_word_sums(tensor).cpu())
    for row, pair in zip(rows, sums, strict=True):
        row.append(pair.tolist())
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def _word_sums(tensor: Tensor) -> Tensor:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = data.view(torch.int32) if data.numel() % 4 == 0 else data
    total = torch.zeros(2, dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].long()
        places = torch.arange(start + 1, start + 1 + part.numel(), device=words.device)
        total += torch.stack([part.sum(), (part * places).sum()])
    return total
