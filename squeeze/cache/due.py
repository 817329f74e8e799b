"""Encode the blocks that are due without asking the device which rows these are.

Between two steps each row's oldest exact tokens lie behind its sinks, so the tokens of a block that
is due are in the same slots of every row. All rows are encoded; those that are due are stored. This
costs rows that were not due a little work, and nobody a wait: a CUDA graph can hold it. Done again,
it does nothing, as no row is due any more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.cache.layer import PackedLayer
from squeeze.kernels.block_store.api import store_blocks


@torch.no_grad()
def encode_due(layer: PackedLayer) -> None:
    """Encode and store one block of every row that has one due; counts on the device follow."""
    spec, exact, slots = layer.spec, layer.exact, layer.block_counts.device
    counts, length, first = exact.counts.device, spec.block_length, spec.sink_tokens
    due = counts >= first + spec.residual_length + length
    for side, storage, buffer in (
        (spec.keys, layer.key_blocks, exact.keys),
        (spec.values, layer.value_blocks, exact.values),
    ):
        block = buffer[:, :, first : first + length].unsqueeze(0)
        blocks = side.encode(block, spec.implementation)
        store_blocks(
            blocks,
            storage.segments,
            storage.addresses,
            slots,
            due,
            implementation=spec.implementation,
        )
        _close_up(buffer, first, length, due)
    counts.add_(due, alpha=-length)
    slots.add_(due)


def count_due(layer: PackedLayer) -> None:
    """Let the host's counts follow too."""
    spec, counts = layer.spec, layer.exact.counts
    ready = [spec.ready(count) for count in counts.host]
    layer.block_counts.host = [b + n for b, n in zip(layer.blocks, ready, strict=True)]
    counts.host = [c - n * spec.block_length for c, n in zip(counts.host, ready, strict=True)]
    for storage in (layer.key_blocks, layer.value_blocks):
        storage.version += 1


def _close_up(buffer: Tensor, first: int, length: int, due: Tensor) -> None:
    """Move what lies behind a due block to its place."""
    rest = buffer[:, :, first + length :]
    target = buffer[:, :, first : first + rest.shape[2]]
    target.copy_(torch.where(due.view(-1, 1, 1, 1), rest, target))
