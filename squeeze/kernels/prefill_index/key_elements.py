"""Triton: round keys to few bits, and add up what the queries' mean gives them, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.prefill_index import hopper_elements as hopper

KEYS = 64  # to one program
MAGIC = 12582912.0  # added and taken away, it rounds to the nearest integer, ties to even
TINY = torch.finfo(torch.float32).tiny


@triton.jit
def _round_keys(
    keys, key_mean, mean, codes, scales, added, k_strides, H_kv, tokens, scaling, most,
    GROUPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, MAGIC: tl.constexpr,
    TINY: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Round M keys of one head; all channels, and the sums over them, stay in registers."""
    rows = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    program = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDE)
    known, there = channel < D, rows < tokens
    inside = there[:, None] & known[None, :]
    k_rows = keys + program // H_kv * k_strides[0] + program % H_kv * k_strides[1]
    k = tl.load(
        k_rows + rows[:, None] * k_strides[2] + channel[None, :] * k_strides[3],
        mask=inside, other=0.0,
    )  # fmt: skip
    middle = tl.load(key_mean + program * D + channel, mask=known, other=0.0)
    k = k.to(tl.float32) - middle[None, :]
    scale = tl.div_rn(tl.max(tl.abs(k), 1), tl.full((M,), most, tl.float32))
    low = tl.div_rn(k, tl.broadcast_to(tl.maximum(scale, TINY)[:, None], (M, WIDE)))
    low = ((low + MAGIC) - MAGIC).to(codes.dtype.element_ty)
    place = program * tokens + rows
    tl.store(codes + place[:, None] * D + channel[None, :], low, mask=inside)
    tl.store(scales + place, scale, mask=there)
    for group in range(GROUPS):
        head = program * GROUPS + group
        q = tl.load(mean + head * D + channel, mask=known, other=0.0) * scaling
        tl.store(added + head * tokens + rows, tl.sum(k * q[None, :], 1), mask=there)


def round_keys(
    keys: Tensor, key_mean: Tensor, mean: Tensor, scaling: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch once; arguments and results are those of ``api.round_keys``."""
    (B, H_kv, tokens, D), H, device = keys.shape, mean.shape[1], keys.device
    codes = torch.empty(keys.shape, dtype=hopper.operand(keys, bits), device=device)
    scales = torch.empty(B, H_kv, tokens, dtype=torch.float32, device=device)
    added = torch.empty(B, H, tokens, dtype=torch.float32, device=device)
    _round_keys[(triton.cdiv(tokens, KEYS), B * H_kv)](
        keys, key_mean.contiguous(), mean.contiguous(), codes, scales, added, keys.stride(), H_kv,
        tokens, scaling, float(2 ** (bits - 1) - 1),
        GROUPS=H // H_kv, D=D, WIDE=max(16, triton.next_power_of_2(D)), MAGIC=MAGIC, TINY=TINY,
        M=KEYS, num_warps=4,
    )  # fmt: skip
    return codes, scales, added
