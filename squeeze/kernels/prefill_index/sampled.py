"""Triton: attention of sampled queries, summed by key and by block diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
CHUNK = 1024  # keys to one partial sum of a softmax denominator
TILE = 64  # sampled queries to one product


@triton.jit
def _scores(q, k, scale, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr):
    """Multiply, bound, and change to base 2; without a bound ``scale`` has done that."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP > 0:
        decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / SOFTCAP))
        magnitude = (1.0 - decay) / (1.0 + decay) * (SOFTCAP * LOG2_E)
        scores = tl.where(scores < 0, -magnitude, magnitude)
    return scores


@triton.jit
def _load(rows, stride_t, stride_d, tokens, keep, D: tl.constexpr, WIDE: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """Load the vectors of some tokens, zeros where ``keep`` is false."""
    channels = tl.arange(0, WIDE)
    pointers = rows + tokens.to(tl.int64)[:, None] * stride_t + channels[None, :] * stride_d
    x = tl.load(pointers, mask=keep[:, None] & (channels < D)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _sampled(lasts, steps, counts, tile, tiles, TILE: tl.constexpr, PASSES: tl.constexpr):
    """Return the tokens of a tile of sampled queries, latest first, and which there are."""
    number = tile // tiles
    last = lasts[0]
    step = steps[0]
    count = counts[0]
    for p in tl.static_range(1, PASSES):
        last = tl.where(number == p, lasts[p], last)
        step = tl.where(number == p, steps[p], step)
        count = tl.where(number == p, counts[p], count)
    u = tile % tiles * TILE + tl.arange(0, TILE)
    return last - u * step, u < count


@triton.jit
def _denominators(
    query, keys, starts, partial, q_strides, k_strides, lasts, steps, counts, tiles,
    T, T_q, chunks, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr, HAS_STARTS: tl.constexpr, UPCAST: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Store log2 of the sum of 2^score of a tile of queries over one chunk of keys."""
    program = tl.program_id(1)
    b = (program // H).to(tl.int64)
    h = (program % H).to(tl.int64)
    chunk = tl.program_id(2)
    tokens, real = _sampled(lasts, steps, counts, tl.program_id(0), tiles, TILE, PASSES)
    start = tl.load(starts + b).to(tl.int32) if HAS_STARTS else 0
    real = real & (tokens >= T - T_q) & (tokens >= start)
    q_head = query + b * q_strides[0] + h * q_strides[1]
    k_head = keys + b * k_strides[0] + h // GROUPS * k_strides[1]
    q = _load(q_head, q_strides[2], q_strides[3], tokens - (T - T_q), real, D, WIDE, UPCAST)
    top = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(CHUNK // KEYS):
        own = chunk * CHUNK + tile * KEYS + tl.arange(0, KEYS)
        k = _load(k_head, k_strides[2], k_strides[3], own, own < T, D, WIDE, UPCAST)
        scores = _scores(q, k, scale, SOFTCAP, LOG2_E)
        seen = (own[None, :] <= tokens[:, None]) & (own >= start)[None, :] & real[:, None]
        scores = tl.where(seen, scores, -float("inf"))
        raised = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = raised
    # 2^0 stands in where nothing was seen, so that no logarithm of 0 is taken.
    logs = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    rows = tl.num_programs(0) * TILE
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(partial + (program.to(tl.int64) * chunks + chunk) * rows + row, logs)


@triton.jit
def _joined(partial, logs, rows, chunks, TILE: tl.constexpr):
    """Join the chunks: log2 of the sum of 2^partial, inf where there is nothing."""
    program = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    top = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for chunk in range(chunks):
        each = tl.load(partial + (program * chunks + chunk) * rows + row)
        raised = tl.maximum(top, each)
        base = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp2(top - base) + tl.exp2(each - base)
        top = raised
    joined = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(logs + program * rows + row, joined)


@triton.jit
def _mass(
    query, keys, starts, logs, columns, parts, q_strides, k_strides, lasts, steps, counts,
    tiles, T, T_q, blocks, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr, HAS_STARTS: tl.constexpr, UPCAST: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Sum the weights of one block of keys over all sampled queries, and by query for diagonals.

    A query at token t stands d = t // SIZE - block blocks and f = t % SIZE tokens after the first
    key of the block. Key v of it lies on block diagonal d, and in proportion (f - v) / SIZE on the
    next one, or (v - f) / SIZE on the one before.
    """
    program = tl.program_id(1)
    b = (program // H).to(tl.int64)
    h = (program % H).to(tl.int64)
    block = tl.program_id(0)
    rows = PASSES * tiles * TILE
    start = tl.load(starts + b).to(tl.int32) if HAS_STARTS else 0
    q_head = query + b * q_strides[0] + h * q_strides[1]
    k_head = keys + b * k_strides[0] + h // GROUPS * k_strides[1]
    v = tl.arange(0, SIZE)
    own = block * SIZE + v
    k = _load(k_head, k_strides[2], k_strides[3], own, own < T, D, WIDE, UPCAST)
    total = tl.zeros((TILE, SIZE), tl.float32)
    for tile in range(PASSES * tiles):
        tokens, real = _sampled(lasts, steps, counts, tile, tiles, TILE, PASSES)
        real = real & (tokens >= T - T_q) & (tokens >= start)
        q = _load(q_head, q_strides[2], q_strides[3], tokens - (T - T_q), real, D, WIDE, UPCAST)
        row = tile * TILE + tl.arange(0, TILE)
        log = tl.load(logs + program.to(tl.int64) * rows + row)
        scores = _scores(q, k, scale, SOFTCAP, LOG2_E)
        seen = (own[None, :] <= tokens[:, None]) & (own >= start)[None, :] & real[:, None]
        weights = tl.exp2(tl.where(seen, scores, -float("inf")) - log[:, None])
        total += weights
        f = tl.where(real, tokens, 0) % SIZE
        ahead = (f[:, None] - v[None, :]).to(tl.float32) / SIZE
        target = parts + (program.to(tl.int64) * blocks + block) * 3 * rows + row
        tl.store(target, tl.sum(weights * (1.0 - tl.abs(ahead)), 1))
        tl.store(target + rows, tl.sum(weights * tl.maximum(ahead, 0.0), 1))
        tl.store(target + 2 * rows, tl.sum(weights * tl.maximum(-ahead, 0.0), 1))
    tl.store(columns + program.to(tl.int64) * T + own, tl.sum(total, 0), mask=own < T)


@triton.jit
def _diagonals(
    parts, diagonals, lasts, steps, counts, tiles, blocks,
    SIZE: tl.constexpr, TILE: tl.constexpr, PASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the three parts of every sampled query to the diagonals they belong to."""
    program = tl.program_id(1).to(tl.int64)
    distances = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    rows = PASSES * tiles * TILE
    total = tl.zeros((WIDTH, TILE), tl.float32)
    for tile in range(PASSES * tiles):
        tokens, real = _sampled(lasts, steps, counts, tile, tiles, TILE, PASSES)
        row = tile * TILE + tl.arange(0, TILE)
        for part in tl.static_range(3):
            # Part 1 belongs one diagonal farther, part 2 one nearer.
            shift = 1 if part == 1 else (-1 if part == 2 else 0)
            block = tokens[None, :] // SIZE - distances[:, None] + shift
            keep = (real & (tokens >= 0))[None, :] & (block >= 0) & (block < blocks)
            place = ((program * blocks + block) * 3 + part) * rows + row[None, :]
            total += tl.load(parts + place, mask=keep, other=0.0)
    target = diagonals + program * blocks + distances
    tl.store(target, tl.sum(total, 1), mask=distances < blocks)


def sampled_mass(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    scaling: float,
    softcap: float | None,
    rows: Sequence[range],
    size: int,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments and results are those of ``api.sampled_mass``.

    Four launches and two products; scratch memory of 12 bytes per sampled query and block of keys.
    """
    (B, H, T_q, D), (H_kv, T), device = query.shape, keys.shape[1:3], query.device
    counts = tuple(len(part) for part in rows)
    lasts, steps = tuple(part[-1] for part in rows), tuple(part.step for part in rows)
    tiles, blocks, chunks = (-(-n // m) for n, m in ((max(counts), TILE), (T, size), (T, CHUNK)))
    number = len(rows) * tiles * TILE
    partial = torch.empty(B, H, chunks, number, dtype=torch.float32, device=device)
    logs = torch.empty(B, H, number, dtype=torch.float32, device=device)
    parts = torch.empty(B, H, blocks, 3, number, dtype=torch.float32, device=device)
    columns = torch.empty(B, H, T, dtype=torch.float32, device=device)
    diagonals = torch.empty(B, H, blocks, dtype=torch.float32, device=device)
    strides = query.stride(), keys.stride()
    scale = scaling if softcap else scaling * LOG2_E
    shared = {
        "H": H, "GROUPS": H // H_kv, "D": D, "WIDE": max(16, triton.next_power_of_2(D)),
        "SOFTCAP": softcap or 0.0, "LOG2_E": LOG2_E, "HAS_STARTS": starts is not None,
        "UPCAST": query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        "TILE": TILE, "PASSES": len(rows), "num_warps": 4,
    }  # fmt: skip
    _denominators[(len(rows) * tiles, B * H, chunks)](
        query, keys, starts, partial, *strides, lasts, steps, counts, tiles,
        T, T_q, chunks, scale,
        **shared, CHUNK=CHUNK, KEYS=64, num_stages=2,
    )  # fmt: skip
    _joined[(len(rows) * tiles, B * H)](partial, logs, number, chunks, TILE=TILE)
    _mass[(blocks, B * H)](
        query, keys, starts, logs, columns, parts, *strides, lasts, steps, counts, tiles,
        T, T_q, blocks, scale, **shared, SIZE=size, num_stages=2,
    )  # fmt: skip
    _diagonals[(triton.cdiv(blocks, 16), B * H)](
        parts, diagonals, lasts, steps, counts, tiles, blocks,
        SIZE=size, TILE=TILE, PASSES=len(rows), WIDTH=16,
    )  # fmt: skip
    return columns, diagonals
