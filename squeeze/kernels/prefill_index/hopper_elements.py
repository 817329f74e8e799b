"""Choose and launch the kernel of low-bit estimates for Hopper (``gluon_elements``)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

ROWS, COLUMNS = 256, 128  # of one product: queries, keys
STAGES = 5
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def operand(query: Tensor, bits: int) -> torch.dtype:
    """Return how integers of ``bits`` are stored.

    Eight-bit floats hold those of four bits exactly, and the float32 sums of 128 products, below
    2^13, stay exact too; sums of integers would have to be converted, one instruction each.
    """
    small = bits <= 4 and query.shape[-1] <= 128
    return torch.float8_e4m3fn if small and _on_hopper(query) else torch.int8


def takes(codes: Tensor) -> bool:
    """Whether the kernel runs a call: on Hopper, of a head size that it covers."""
    return _on_hopper(codes) and codes.shape[-1] in (64, 80, 128)


def weigh_elements(
    codes: Tensor,
    scales: Tensor,
    totals: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    added: Tensor,
    size: int,
    first: int,
    stride: int,
    softcap: float | None,
    rows: range,
) -> Tensor:
    """Launch once; arguments and results are those of ``api.weigh_elements``.

    ``codes`` and ``key_codes`` of one dtype, int8 or float8_e4m3fn. Scratch memory: a number per 16
    of the queries at work, or those of one block if they are fewer, and block of keys.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from squeeze.kernels.prefill_index.gluon_elements import weigh_elements as kernel

    (B, H, queries, D), (H_kv, tokens), device = codes.shape, key_codes.shape[1:3], codes.device
    kind = gl.int8 if codes.dtype == torch.int8 else gl.float8e4nv
    wide, blocks = 64 if D <= 64 else 128, COLUMNS // size
    # Numbers of keys are read by whole tiles.
    end = -tokens % COLUMNS
    key_scales, added = (pad(x, (0, end)) if end else x for x in (key_scales, added))

    def described(x: Tensor, each: int) -> TensorDescriptor:
        block = [1, each, wide]
        layout = gl.NVMMASharedLayout.get_default_for(block, kind)
        return TensorDescriptor.from_tensor(x.flatten(0, 1), block, layout)

    each = size // stride
    tiles, width = triton.cdiv(len(rows) * each, ROWS), rows.stop
    items = B * H * tiles
    grid = min(items, torch.cuda.get_device_properties(device).multi_processor_count)
    padded = triton.cdiv(width, blocks) * blocks
    scratch = torch.empty(grid * ROWS // min(16, each) * padded, dtype=torch.float32, device=device)
    out = torch.empty(B, H, len(rows), width, dtype=torch.float32, device=device)
    kernel[(grid,)](
        described(codes, ROWS), described(key_codes, COLUMNS), scales, totals,
        key_scales.contiguous(), added.contiguous(), scratch, out,
        (rows.start - first) * each, len(rows), rows.start * size, width, padded, items, B * H,
        queries, tokens + end,
        GROUPS=H // H_kv, SIZE=size, STRIDE=stride, WIDE=wide, SOFTCAP=softcap or 0.0,
        STAGES=STAGES, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out
