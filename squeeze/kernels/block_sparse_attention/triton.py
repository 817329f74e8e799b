"""Block-sparse causal flash attention in Triton; ``reference`` is what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.block_sparse_attention import hopper
from squeeze.kernels.block_sparse_attention.pyramid import RUN, aligned, averages, counts
from squeeze.kernels.block_sparse_attention.sage import LIFT, Quantize, sizes
from squeeze.kernels.block_sparse_attention.sage_triton import quantize, to_e4m3
from squeeze.types import BlockIndex

LOG2_E = 1.4426950408889634
DENSE_ROWS = 128


@triton.jit
def _bounded(scores, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr):
    """Apply the bound to scaled scores and change to base 2; without one, scores are in base 2."""
    if SOFTCAP > 0:
        decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / SOFTCAP))
        magnitude = (1.0 - decay) / (1.0 + decay) * (SOFTCAP * LOG2_E)
        scores = tl.where(scores < 0, -magnitude, magnitude)
    return scores


@triton.jit
def _tile(
    acc,
    total,
    top,
    q,
    k_pointers,
    v_pointers,
    row_mask,
    channel_mask,
    visible,
    bonus,
    scale,
    SOFTCAP: tl.constexpr,
    LOG2_E: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_CHANNELS: tl.constexpr,
    MASK_SCORES: tl.constexpr,
    RAISED: tl.constexpr,
    LIFT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Take one tile of keys and values into the online softmax.

    s = scale * q k^T + bonus (base 2); top' = max(top, rowmax(s)); p = 2^(s - top' + LIFT);
    acc' = acc * 2^(top - top') + p v; total' = total * 2^(top - top') + rowsum(p).
    """
    if MASK_ROWS or MASK_CHANNELS:
        mask = row_mask[:, None] & channel_mask[None, :]
        k = tl.load(k_pointers, mask=mask, other=0.0)
    else:
        k = tl.load(k_pointers)
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [M, N]
    scores = _bounded(scores, SOFTCAP, LOG2_E)
    if RAISED:
        scores += bonus
    if MASK_SCORES:
        scores = tl.where(visible, scores, -float("inf"))
    raised = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; 0 stands in so that -inf - -inf never happens.
    base = tl.where(raised == -float("inf"), 0.0, raised) if MASK_SCORES else raised
    p = scores - base[:, None]
    if LIFT > 0:
        p += LIFT
    p = tl.exp2(p)
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if MASK_ROWS or MASK_CHANNELS:
        v = tl.load(v_pointers, mask=mask, other=0.0)
    else:
        v = tl.load(v_pointers)
    if UPCAST:
        v = v.to(tl.float32)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, raised


@triton.jit
def _small_tile(
    acc,
    total,
    top,
    q,
    factor,
    over,
    k_pointers,
    v_pointers,
    visible,
    INT8: tl.constexpr,
    LIFT: tl.constexpr,
    MASK_SCORES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take one tile of eight-bit keys and values in: what ``_tile`` does, weights times 2^LIFT.

    The product of weights and values is added to the accumulator in float32.
    """
    k = tl.load(k_pointers)  # [BLOCK_N, BLOCK_D]
    if INTERPRETED:
        raw = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    elif INT8:
        raw = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    else:
        raw = tl.dot(q, tl.trans(k))
    scores = raw * factor[:, None]
    if MASK_SCORES:
        scores = tl.where(visible, scores, -float("inf"))
    raised = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(raised == -float("inf"), 0.0, raised) if MASK_SCORES else raised
    p = tl.exp2(scores - base[:, None] + LIFT)
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    # The values' order of tokens inside sixteen (``sage.Small``).
    p = tl.permute(tl.reshape(p, (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    p = to_e4m3(tl.reshape(p, (BLOCK_M, BLOCK_N)), INTERPRETED)
    v = tl.load(v_pointers)  # [BLOCK_D, BLOCK_N]
    if INTERPRETED:
        part = tl.dot(p.to(tl.float32), tl.trans(v.to(tl.float32)), input_precision="ieee")
    else:
        part = tl.dot(p, tl.trans(v))
    return acc * shrink[:, None] + part * over[None, :], total, raised


@triton.jit
def _attention(
    query,
    keys,
    values,
    out,
    lse,
    starts,
    block_offsets,
    block_ids,
    column_offsets,
    column_ids,
    pooled_offsets,
    pooled_ids,
    pooled_keys,
    pooled_values,
    permutation,
    key_codes,
    key_scales,
    key_means,
    value_codes,
    value_scales,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    v_b,
    v_h,
    v_t,
    v_d,
    block_capacity,
    column_capacity,
    pooled_capacity,
    slots,
    P,
    padded,
    T,
    T_q,
    blocks,
    scale,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    LISTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    POOLED: tl.constexpr,
    SEGMENT: tl.constexpr,
    RUN: tl.constexpr,
    SMALL: tl.constexpr,
    INT8: tl.constexpr,
    LIFT: tl.constexpr,
    UPCAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend one block of queries of one head: blocks, the diagonal, columns, then averages.

    Tiles are ``[BLOCK_M, BLOCK_D]`` of queries and ``[BLOCK_N, BLOCK_D]`` of keys and values. The
    accumulator, row sums and row maxima are float32 in registers; both products accumulate in
    float32, the second one takes p in the dtype of the values. Only the last listed block is masked
    by causality among blocks, since ids ascend; columns always are. With a permutation keys before
    the own segment are gathered. Program 0 of the second grid axis has the longest rows, so that
    the short ones fill the end of the launch. With SMALL blocks that are read in order come from
    the eight-bit codes, and every score loses the product of its query and the keys' mean.
    """
    program = tl.program_id(0)
    b = (program // H).to(tl.int64)
    h = (program % H).to(tl.int64)
    block = blocks - 1 - tl.program_id(1)
    start = tl.load(starts + b) if HAS_STARTS else b * 0
    length = T - start
    first = block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)  # positions of the queries
    # Positions past a row's end stand for its padding, so that every output row is written.
    tokens = tl.where(rows < length, start + rows, rows - length) - (T - T_q)  # among the queries
    writable = (rows < T) & (tokens >= 0)
    idle = (first >= length) | (start + first + BLOCK_M <= T - T_q)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    q_rows = query + b * q_b + h * q_h + tokens[:, None] * q_t + channels[None, :] * q_d
    q = tl.load(q_rows, mask=writable[:, None] & inside[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    k_head = keys + b * k_b + (h // GROUPS) * k_h + start * k_t
    v_head = values + b * v_b + (h // GROUPS) * v_h + start * v_t
    k_tile = offsets[:, None] * k_t + channels[None, :] * k_d
    v_tile = offsets[:, None] * v_t + channels[None, :] * v_d
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    PER_BLOCK: tl.constexpr = BLOCK_M // BLOCK_N
    NARROW: tl.constexpr = BLOCK_D != D

    if SMALL:
        pair = b * (H // GROUPS) + h // GROUPS
        wide = q.to(tl.float32)
        mean = tl.load(key_means + pair * BLOCK_D + channels)
        offset = tl.sum(wide * mean[None, :], 1) * scale
        LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
        step = tl.maximum(tl.max(tl.abs(wide), 1), 1e-12) / LARGEST
        wide = wide / step[:, None]
        if INT8:
            # Adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even.
            q_small = ((wide + 12582912.0) - 12582912.0).to(tl.int8)
        else:
            q_small = to_e4m3(wide, INTERPRETED)
        step *= scale
        k_codes = key_codes + pair * padded * BLOCK_D
        k_codes += offsets[:, None] * BLOCK_D + channels[None, :]
        v_codes = value_codes + pair * padded * BLOCK_D
        v_codes += channels[:, None] * padded + offsets[None, :]
        scales = key_scales + pair * (padded // BLOCK_M)
        over = tl.load(value_scales + pair * BLOCK_D + channels)
        lowered = -offset[:, None]
    else:
        lowered = tl.zeros((BLOCK_M, 1), tl.float32)

    if LISTED:
        lists = program.to(tl.int64) * (blocks + 1) + block
        begin = tl.load(block_offsets + lists)
        end = tl.load(block_offsets + lists + 1)
        ids = block_ids + program.to(tl.int64) * block_capacity
    else:
        begin = 0
        end = block + 1
        ids = block_ids
    if idle:
        end = begin
    if SEGMENT > 0:
        own = first // SEGMENT * SEGMENT  # the first position that is read in order
        order = permutation + program.to(tl.int64) * slots

    for t in range(begin * PER_BLOCK, (end - 1) * PER_BLOCK):
        if LISTED:
            key = tl.load(ids + t // PER_BLOCK) * BLOCK_M + t % PER_BLOCK * BLOCK_N
        else:
            key = t * BLOCK_N
        key = key.to(tl.int64)
        in_order = True
        if SEGMENT > 0:
            in_order = key >= own
        if SMALL and in_order:
            factor = step * tl.load(scales + key // BLOCK_M)
            acc, total, top = _small_tile(
                acc, total, top, q_small, factor, over, k_codes + key * BLOCK_D,
                v_codes + key, True, INT8, LIFT, False, INTERPRETED, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            if SEGMENT > 0:
                positions = key + offsets
                moved = tl.load(order + positions, mask=positions < own, other=0).to(tl.int64)
                positions = moved + tl.where(positions < own, 0, positions)
                k_rows = k_head + positions[:, None] * k_t + channels[None, :] * k_d
                v_rows = v_head + positions[:, None] * v_t + channels[None, :] * v_d
            else:
                k_rows = k_head + key * k_t + k_tile
                v_rows = v_head + key * v_t + v_tile
            acc, total, top = _tile(
                acc, total, top, q, k_rows, v_rows, offsets < BLOCK_N, inside, True, lowered,
                scale, SOFTCAP, LOG2_E, False, NARROW, False, SMALL, LIFT, UPCAST,
            )  # fmt: skip
    if end > begin:
        last = tl.load(ids + end - 1) if LISTED else block
        for t in range(0, PER_BLOCK):
            positions = last * BLOCK_M + t * BLOCK_N + offsets
            key = (last * BLOCK_M + t * BLOCK_N).to(tl.int64)
            in_order = True
            if SEGMENT > 0:
                in_order = key >= own
            if SMALL and in_order:
                factor = step * tl.load(scales + last)
                acc, total, top = _small_tile(
                    acc, total, top, q_small, factor, over, k_codes + key * BLOCK_D,
                    v_codes + key, positions[None, :] <= rows[:, None],
                    INT8, LIFT, True, INTERPRETED, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            else:
                if SEGMENT > 0:
                    moved = tl.load(order + positions, mask=positions < own, other=0)
                    positions = moved + tl.where(positions < own, 0, positions)
                    place = positions[:, None].to(tl.int64)
                    k_rows = k_head + place * k_t + channels[None, :] * k_d
                    v_rows = v_head + place * v_t + channels[None, :] * v_d
                else:
                    k_rows = k_head + key * k_t + k_tile
                    v_rows = v_head + key * v_t + v_tile
                acc, total, top = _tile(
                    acc, total, top, q, k_rows, v_rows,
                    positions < length, inside, positions[None, :] <= rows[:, None],
                    lowered, scale, SOFTCAP, LOG2_E, True, NARROW, True, SMALL, LIFT, UPCAST,
                )  # fmt: skip
    if COLUMNS:
        begin = tl.load(column_offsets + lists)
        end = tl.load(column_offsets + lists + 1)
        if idle:
            end = begin
        ids = column_ids + program.to(tl.int64) * column_capacity
        for t in range(begin, end, BLOCK_N):
            listed = t + offsets < end
            positions = tl.load(ids + t + offsets, mask=listed, other=0).to(tl.int64)
            listed = listed & (positions < length)
            acc, total, top = _tile(
                acc, total, top, q,
                k_head + positions[:, None] * k_t + channels[None, :] * k_d,
                v_head + positions[:, None] * v_t + channels[None, :] * v_d,
                listed, inside, listed[None, :] & (positions[None, :] <= rows[:, None]),
                lowered, scale, SOFTCAP, LOG2_E, True, NARROW, True, SMALL, LIFT, UPCAST,
            )  # fmt: skip
    if POOLED:
        begin = tl.load(pooled_offsets + lists)
        end = tl.load(pooled_offsets + lists + 1)
        if idle:
            end = begin
        ids = pooled_ids + program.to(tl.int64) * pooled_capacity
        head = (
            (b * (H // GROUPS) + h // GROUPS) * P * D
        )  # contiguous, from the row's first real token on
        k_head = pooled_keys + head
        v_head = pooled_values + head
        second = T // (2 * RUN) * RUN  # averages of 4 tokens begin here, those of 8 at third
        third = second + T // (4 * RUN) * RUN
        for t in range(begin * RUN, end * RUN, BLOCK_N):
            listed = t + offsets < end * RUN
            run = tl.load(ids + (t + offsets) // RUN, mask=listed, other=0)
            numbers = run * RUN + (t + offsets) % RUN
            level = tl.where(numbers >= third, 3.0, tl.where(numbers >= second, 2.0, 1.0))
            tile = numbers[:, None].to(tl.int64) * D + channels[None, :]
            acc, total, top = _tile(
                acc, total, top, q, k_head + tile, v_head + tile,
                listed, inside, listed[None, :], level[None, :] + lowered,
                scale, SOFTCAP, LOG2_E, True, NARROW, True, True, LIFT, UPCAST,
            )  # fmt: skip

    real = (rows < length) & (total > 0.0)
    total = tl.where(real, total, 1.0)
    acc = acc / total[:, None]
    target = program.to(tl.int64) * T_q + tokens
    logs = top + tl.log2(total)
    if SMALL:
        logs += offset - LIFT
    logs = tl.where(real, logs / LOG2_E, -float("inf"))
    tl.store(lse + target, logs, mask=writable)
    pointers = out + target[:, None] * D + channels[None, :]
    acc = tl.where(real[:, None], acc, 0.0).to(out.dtype.element_ty)
    tl.store(pointers, acc, mask=writable[:, None] & inside[None, :])


def launch_options(
    rows: int,
    head_dim: int,
    element_bytes: int,
    arch: int,
    pooled: bool = False,
    small: bool = False,
) -> dict[str, int]:
    """Return key tile, warps and pipeline stages for one kind of call.

    Args:
        rows: Queries per block, 64 or 128.
        head_dim: Padded to a power of two.
        element_bytes: Of the queries, keys and values.
        arch: Compute capability times ten. Without wgmma (9.x) or tcgen05 (10.x) the products keep
            their operands in registers, which leaves room for half the keys; 8.6, 8.9 and 12.x
            have 99 KiB of shared memory.
        pooled: Whether averages are read; on four warps that loop would spill registers.
        small: Whether blocks are eight-bit; likewise.
    """
    row_bytes = head_dim * element_bytes
    datacenter = arch // 10 in (9, 10)
    tile = 64 if datacenter and row_bytes <= 512 else 32
    few = arch == 90 and rows == 64 and row_bytes <= 256 and not pooled and not small
    deep = row_bytes <= 256 or (row_bytes <= 512 and (datacenter or arch == 80))
    return {"BLOCK_N": tile, "num_warps": 4 if few else 8, "num_stages": 2 if deep else 1}


def _arch(device: torch.device) -> int:
    """Return compute capability times ten; the interpreter, which has none, counts as Hopper."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: BlockIndex | None,
    starts: Tensor | None,
    scaling: float,
    softcap: float | None,
    to: Quantize | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch a kernel; arguments and results are those of ``api.block_sparse_attention``.

    On Hopper, calls that ``hopper.takes`` go to the kernel for it. The output is contiguous.
    Nothing waits for the device. Cost: reads each query tile once and the listed keys and values
    once per query block and head; no scratch memory but the eight-bit codes, half the bytes of keys
    and values, and the averages, 7/8 of the keys and values, where the index lists any (twice as
    much with left padding).
    """
    if hopper.takes(query, index, softcap, to):
        return hopper.attend(query, keys, values, index, starts, scaling, to)
    (B, H, T_q, D), (H_kv, T) = query.shape, keys.shape[1:3]
    rows = DENSE_ROWS if index is None else index.block_size
    out = torch.empty(B, H, T_q, D, dtype=query.dtype, device=query.device)
    lse = torch.empty(B, H, T_q, dtype=torch.float32, device=query.device)
    lists: list[Tensor | None] = [None] * 6
    order, segment = None, 0
    pooled: list[Tensor | None] = [None] * 2
    if index is not None:
        tensors = (
            index.block_offsets, index.block_ids, index.column_offsets, index.column_ids,
            index.pooled_offsets, index.pooled_ids,
        )  # fmt: skip
        lists = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        if index.pooled_ids is not None:
            pooled = [averages(aligned(x, starts)) for x in (keys, values)]
        if index.permutation is not None:
            order, segment = index.permutation.contiguous(), index.segment_size
    blocks = triton.cdiv(T, rows)
    # Which blocks hold queries is known here unless rows begin at places of their own.
    skipped = (T - T_q) // rows if starts is None else 0
    capacities = [0 if lists[i] is None else lists[i].shape[-1] for i in (1, 3, 5)]
    wide = max(32 if to else 16, triton.next_power_of_2(D))
    small: list[Tensor | None] = [None] * 5
    if to is not None:
        codes = quantize(keys, values, starts, rows, to)
        small = [codes.keys, codes.key_scales, codes.means, codes.values, codes.value_scales]
    _attention[(B * H, blocks - skipped)](
        query, keys, values, out, lse, starts, *lists, *pooled, order, *small,
        *query.stride(), *keys.stride(), *values.stride(), *capacities,
        0 if order is None else order.shape[-1], sum(counts(T)), sizes(T, D)[0],
        T, T_q, blocks,
        scaling if softcap else scaling * LOG2_E,
        H=H, GROUPS=H // H_kv, D=D, SOFTCAP=softcap or 0.0, LOG2_E=LOG2_E,
        HAS_STARTS=starts is not None, LISTED=index is not None, COLUMNS=lists[2] is not None,
        POOLED=lists[4] is not None, SEGMENT=segment, RUN=RUN,
        UPCAST=query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        INTERPRETED=triton.knobs.runtime.interpret,
        SMALL=to is not None, INT8=to == "int8", LIFT=float(LIFT) if to else 0.0,
        BLOCK_M=rows, BLOCK_D=wide,
        **launch_options(
            rows, wide, query.element_size(), _arch(query.device), lists[4] is not None,
            to is not None,
        ),
    )  # fmt: skip
    return out, lse
