"""What a packed layer stands for, as dense tensors that tests compare."""

from __future__ import annotations

from torch import Tensor

from squeeze.cache import PackedLayer


def dequantized(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Return what is stored as dense ``[B, H_kv, total, D]``; padding is zero."""
    return _side(layer, "keys"), _side(layer, "values")


def _side(layer: PackedLayer, which: str) -> Tensor:
    side, buffer = getattr(layer.spec, which), getattr(layer.exact, which)
    storage = layer.key_blocks if which == "keys" else layer.value_blocks
    sinks, length = layer.spec.sink_tokens, layer.spec.block_length
    out = buffer.new_zeros(*buffer.shape[:2], layer.total, buffer.shape[3])
    packed = storage.merged(layer.max_blocks)
    for row, (pad, blocks) in enumerate(zip(layer.pads, layer.blocks, strict=True)):
        exact = buffer[row, :, : layer.exact.counts.host[row]]
        head = min(sinks, exact.shape[1])
        out[row, :, pad : pad + head] = exact[:, :head]
        out[row, :, layer.total - (exact.shape[1] - head) :] = exact[:, head:]
        if blocks:
            parts = {name: x[:blocks, row].to(out.device) for name, x in packed.items()}
            dense = side.decode(parts).permute(1, 0, 2, 3).flatten(1, 2)
            out[row, :, pad + sinks : pad + sinks + blocks * length] = dense.to(out.dtype)
    return out
