"""Triton: low-bit estimates of all scores, reduced to the largest one of each pair of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.prefill_index import hopper_elements as hopper

LOG2_E = 1.4426950408889634
ROWS, COLUMNS = 128, 128  # queries and keys to one product
MAGIC = 12582912.0  # added and taken away, it rounds to the nearest integer, ties to even
TINY = torch.finfo(torch.float32).tiny


@triton.jit
def bounded(x, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr):
    """Return ``SOFTCAP * tanh(x / SOFTCAP)``, or x where there is no bound."""
    if SOFTCAP > 0:
        decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E / SOFTCAP))
        magnitude = (1.0 - decay) / (1.0 + decay) * SOFTCAP
        x = tl.where(x < 0, -magnitude, magnitude)
    return x


@triton.jit
def _round(
    query, keys, mean, key_mean, begins, lengths, codes, scales, totals, q_strides, k_strides,
    first, scaling, most,
    H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr,
    MAGIC: tl.constexpr, TINY: tl.constexpr, UPCAST: tl.constexpr, M: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Round STEP queries of a block, and sum what weighs nearby: blocks 0, own - 1 and own."""
    EACH: tl.constexpr = SIZE // STRIDE
    row = tl.program_id(0) * STEP
    own = first + row // EACH
    program = tl.program_id(1).to(tl.int64)
    b = program // H
    h = program % H
    place = tl.num_programs(0) * program * STEP + row
    m = tl.arange(0, M)
    there = m < STEP  # a product takes at least 16
    channel = tl.arange(0, WIDE)
    known = (channel < D)[None, :]
    inside = there[:, None] & known
    q_rows = query + b * q_strides[0] + h * q_strides[1] + row.to(tl.int64) * q_strides[2]
    q = tl.load(
        q_rows + m[:, None] * q_strides[2] + channel[None, :] * q_strides[3], mask=inside, other=0.0
    )
    exact = q.to(tl.float32)
    centred = exact - tl.load(mean + program * D + channel, mask=channel < D, other=0.0)[None, :]
    scale = tl.div_rn(tl.max(tl.abs(centred), 1), tl.full((M,), most, tl.float32))
    low = tl.div_rn(centred, tl.broadcast_to(tl.maximum(scale, TINY)[:, None], (M, WIDE)))
    low = ((low + MAGIC) - MAGIC).to(codes.dtype.element_ty)
    tl.store(codes + (place + m)[:, None] * D + channel[None, :], low, mask=inside)
    tl.store(scales + place + m, scale * scaling, mask=there)

    kv = b * (H // GROUPS) + h // GROUPS
    middle = tl.load(key_mean + kv * D + channel, mask=channel < D, other=0.0)
    shift = tl.sum(exact * middle[None, :], 1)
    if UPCAST:
        q = exact
    k_rows = keys + b * k_strides[0] + h // GROUPS * k_strides[1]
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for back in tl.static_range(3):
        block = tl.maximum(own - back, 0) if back < 2 else 0
        n = tl.arange(0, SIZE)
        tokens = (block * SIZE + n).to(tl.int64)
        k = tl.load(
            k_rows + tokens[:, None] * k_strides[2] + channel[None, :] * k_strides[3],
            mask=known, other=0.0,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = bounded((x - shift[:, None]) * scaling, SOFTCAP, LOG2_E)
        seen = (n[None, :] <= ((row % EACH + m) * STRIDE)[:, None]) | (back > 0)
        # Near the beginning the blocks are fewer than three.
        x = tl.where(seen & (own >= back), x, -float("inf"))
        raised = tl.maximum(top, tl.max(x, 1))
        total *= tl.exp2((top - raised) * LOG2_E)
        total += tl.sum(tl.exp2((x - raised[:, None]) * LOG2_E), 1)
        top = raised
    at = first * SIZE + (row + m) * STRIDE
    real = (at >= tl.load(begins + b)) & (at < tl.load(lengths + b))
    near = tl.where(real, top + tl.log2(total) / LOG2_E, float("inf"))
    tl.store(totals + place + m, near, mask=there)


@triton.jit
def _weigh(
    codes, scales, totals, key_codes, key_scales, added, out, start, number, first, width,
    queries, tokens, heads,
    GROUPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Find, for M queries, the largest relative score of every block that they may read."""
    BLOCKS: tl.constexpr = N // SIZE
    EACH: tl.constexpr = SIZE // STRIDE
    # The longest rows come first, so that the short ones fill the end.
    tile = tl.cdiv(number * EACH, M) - 1 - tl.program_id(0) // heads
    program = (tl.program_id(0) % heads).to(tl.int64)
    kv = program // GROUPS  # rows of the batch have the same number of heads
    own = start + tile * M + tl.arange(0, M)
    there = own < start + number * EACH
    channel = tl.arange(0, WIDE)
    inside = (channel < D)[None, :]
    rows = program * queries + own
    q = tl.load(
        codes + rows[:, None] * D + channel[None, :], mask=there[:, None] & inside, other=0.0
    )
    scale = tl.load(scales + rows, mask=there, other=0.0)
    total = tl.load(totals + rows, mask=there, other=float("inf"))
    block = tile * (M // EACH) + tl.arange(0, M // EACH)
    place = out + (program * number + block.to(tl.int64))[:, None] * width
    last = tl.minimum(first * SIZE + (start + (tile + 1) * M) * STRIDE, width * SIZE)
    for column in range(0, last, N):
        n = column + tl.arange(0, N)
        known = n < last
        keys = kv * tokens + n
        k = tl.load(
            key_codes + keys[:, None] * D + channel[None, :],
            mask=known[:, None] & inside, other=0.0,
        )  # fmt: skip
        x = tl.dot(q, tl.trans(k)).to(tl.float32)
        x = x * tl.load(key_scales + keys, mask=known, other=0.0)[None, :]
        more = tl.load(added + program * tokens + n, mask=known, other=0.0)
        x = x * scale[:, None] + more[None, :]
        held = tl.max(tl.reshape(x, (M, BLOCKS, SIZE)), 2)
        held = bounded(held, SOFTCAP, LOG2_E) - total[:, None]
        held = tl.max(tl.reshape(held, (M // EACH, EACH, BLOCKS)), 1)
        j = column // SIZE + tl.arange(0, BLOCKS)
        tl.store(place + j[None, :], held, mask=(block < number)[:, None] & (j < width)[None, :])


def round_queries(
    query: Tensor,
    keys: Tensor,
    mean: Tensor,
    key_mean: Tensor,
    begins: Tensor,
    lengths: Tensor,
    size: int,
    first: int,
    stride: int,
    scaling: float,
    softcap: float | None,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch once; arguments and results are those of ``api.round_queries``."""
    B, H, rows, D = query.shape
    kind = hopper.operand(query, bits)
    codes = torch.empty(query.shape, dtype=kind, device=query.device)
    scales, totals = query.new_empty(2, B, H, rows, dtype=torch.float32)
    step = min(64, size // stride)
    _round[(rows // step, B * H)](
        query, keys, mean.contiguous(), key_mean.contiguous(), begins, lengths, codes, scales,
        totals, query.stride(), keys.stride(), first, scaling, float(2 ** (bits - 1) - 1),
        H=H, GROUPS=H // keys.shape[1], D=D, WIDE=max(16, triton.next_power_of_2(D)), SIZE=size,
        STRIDE=stride, SOFTCAP=softcap or 0.0, LOG2_E=LOG2_E, MAGIC=MAGIC, TINY=TINY,
        UPCAST=query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        M=max(16, step), STEP=step, num_warps=4 if size == 64 else 8,
    )  # fmt: skip
    return codes, scales, totals


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
    """Launch once; arguments and results are those of ``api.weigh_elements``."""
    call = (codes, scales, totals, key_codes.to(codes.dtype), key_scales, added)
    if hopper.takes(codes):
        return hopper.weigh_elements(*call, size, first, stride, softcap, rows)
    (B, H, queries, D), (H_kv, tokens) = codes.shape, key_codes.shape[1:3]
    out = torch.empty(B, H, len(rows), rows.stop, dtype=torch.float32, device=codes.device)
    each = size // stride
    _weigh[(triton.cdiv(len(rows) * each, ROWS) * B * H,)](
        *call, out, (rows.start - first) * each, len(rows), first, rows.stop, queries, tokens,
        B * H, GROUPS=H // H_kv, D=D, WIDE=max(32, triton.next_power_of_2(D)), SIZE=size,
        STRIDE=stride, SOFTCAP=softcap or 0.0, LOG2_E=LOG2_E, M=ROWS, N=COLUMNS, num_warps=8,
    )  # fmt: skip
    return out
