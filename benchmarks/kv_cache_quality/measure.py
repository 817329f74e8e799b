"""One cell of the table: what one row keeps of a model's quality, at one length, in how many bits.

Effective bits count what is stored of the packed tokens, scales and tables included, and not the
tokens a method keeps exact: those are in the bytes of the whole cache, which stand beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.kv_cache_quality.rows import Row, opened, versions
from squeeze import reference
from squeeze.cache import PackedLayer, Side
from squeeze.environment import commit
from squeeze.evaluation import TASKS, evaluate
from squeeze.evaluation.memory import kv_bytes
from squeeze.evaluation.scoring import encode, forward, scoring, start_tokens
from squeeze.model_info import describe
from squeeze.plan_cache import AMORTISED_TOKENS
from squeeze.types import bytes_of

MODE, SEED = "decode", 0
KEPT = ("value", "count", "window_nll")


@dataclass(frozen=True)
class Settings:
    """What all cells of one table share: the model, how much is measured, and on what."""

    model: str = "reference"
    device: str | None = None
    dtype: str | None = None
    windows: int = 16
    facts: int = 100


def measure(row: Row, length: int, settings: Settings, threads: int) -> dict[str, Any]:
    """Measure one row at one length.

    Args:
        row: How the cache is stored.
        length: Tokens of a window and of a prompt.
        settings: The model and the counts.
        threads: Of the CPU that this process may use.

    Returns:
        ``books_perplexity`` and ``needle``, the ``KEPT`` part of what ``evaluate`` gives;
        ``storage``, ``commit``, ``versions`` of what only this row needs, and ``seconds``.
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    start = time.monotonic()
    counts = {"books_perplexity": settings.windows, "needle": settings.facts}
    cell: dict[str, Any] = {}
    with opened(row, settings.model, settings.device, settings.dtype) as (model, tokenizer):
        for task in TASKS:
            options: dict[str, Any] = {"mode": MODE, "length": length, "limit": counts[task]}
            found = evaluate(model, tokenizer, [task], seed=SEED, **options)[task]
            cell[task] = {key: found[key] for key in KEPT if key in found}
        cell["storage"] = storage(model, tokenizer, length)
    seconds = round(time.monotonic() - start, 1)
    return cell | {"commit": commit(), "versions": versions(row), "seconds": seconds}


def storage(model: Any, tokenizer: Any, length: int) -> dict[str, float]:
    """Prefill one text of ``length`` tokens and count what its cache holds.

    Returns:
        ``effective_bits`` of the packed tokens, per value; ``bytes`` of the whole cache;
        ``dense_bytes`` of the same tokens in the model's own dtype.
    """
    ids = start_tokens(tokenizer)
    for book in reference.validation_books():
        ids += encode(tokenizer, book["text"][: 8 * length])
        if len(ids) >= length:
            break
    with scoring(model):
        batch = torch.tensor([ids[:length]], device=model.device)
        cache = forward(model, batch, keep=1, use_cache=True).past_key_values
    sizes = [item.kv_heads * item.head_dim for item in describe(model).attention]
    values = 2 * length * sum(sizes)
    total = kv_bytes(cache)
    packed = [
        (layer, size)
        for layer, size in zip(cache.layers, sizes, strict=True)
        if isinstance(layer, PackedLayer)
    ]
    bits = packed_bits(packed) if packed else 8 * total / values
    dense = values * model.dtype.itemsize
    return {"effective_bits": bits, "bytes": total, "dense_bytes": dense}


def packed_bits(layers: Iterable[tuple[PackedLayer, int]]) -> float:
    """Count bits per value in the packed blocks of one row, each layer's tables spread out.

    Args:
        layers: Each with the values that a token has on one side, H_kv * D.

    Raises:
        ValueError: no layer has packed anything yet.
    """
    stored, values = 0.0, 0
    for layer, size in layers:
        count = layer.blocks[0]
        if not count:
            raise ValueError("nothing is packed yet; measure a longer text")
        tokens = count * layer.spec.block_length
        for side, storage in (
            (layer.spec.keys, layer.key_blocks),
            (layer.spec.values, layer.value_blocks),
        ):
            block = bytes_of({name: x[0, 0] for name, x in storage.segments[0].items()})
            stored += count * block + _table_bytes(side) * tokens / AMORTISED_TOKENS
            values += tokens * size
    return 8 * stored / values


def _table_bytes(side: Side) -> int:
    """Bytes that do not grow with tokens."""
    return bytes_of(side.parameters) + sum(bytes_of(tables) for _, tables in side.transforms)
