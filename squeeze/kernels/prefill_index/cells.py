"""Triton: weights of blocks from the antidiagonals of cells of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeeze.kernels.prefill_index import hopper

LOG2_E = 1.4426950408889634
ROWS, COLUMNS = 128, 128  # cells of queries and of keys to one product
RESIDENT = 2  # programs to a multiprocessor


@triton.jit
def _bounded(scores, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr):
    if SOFTCAP > 0:
        decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / SOFTCAP))
        magnitude = (1.0 - decay) / (1.0 + decay) * (SOFTCAP * LOG2_E)
        scores = tl.where(scores < 0, -magnitude, magnitude)
    return scores


@triton.jit
def _product(
    q_rows, k_rows, q_cells, k_cells, start, before, T, q_t, q_d, k_t, k_d, steps,
    S: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return sum over t of q[a S + S - 1 - t] . k[c S + t] for cells a and c, ``[M, N]``.

    ``steps`` is S * PARTS; the compiler does not know it, so that it does not unroll the loop.
    """
    acc = tl.zeros((M, N), tl.float32)
    PARTS: tl.constexpr = WIDE // DEPTH
    for step in tl.range(0, steps, num_stages=STAGES):
        t = step // PARTS
        channels = step % PARTS * DEPTH + tl.arange(0, DEPTH)
        q_tokens = start + q_cells * S + (S - 1 - t)
        k_tokens = start + k_cells * S + t
        q_pointers = q_rows + (q_tokens - before).to(tl.int64)[:, None] * q_t + channels * q_d
        k_pointers = k_rows + k_tokens.to(tl.int64)[:, None] * k_t + channels * k_d
        if EVEN:
            q = tl.load(q_pointers)
            k = tl.load(k_pointers)
        else:
            inside = (channels < D)[None, :]
            there = (q_tokens >= before) & (q_tokens < T)
            q = tl.load(q_pointers, mask=there[:, None] & inside, other=0.0)
            k = tl.load(k_pointers, mask=(k_tokens < T)[:, None] & inside, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        acc = tl.dot(q, tl.trans(k), acc, input_precision="ieee")
    return acc


@triton.jit
def _weigh(
    query, keys, starts, scratch, out, q_strides, k_strides, first, total_cells, width, padded,
    items, heads, T, T_q, steps, scale,
    GROUPS: tl.constexpr, S: tl.constexpr, CELLS: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, SOFTCAP: tl.constexpr,
    LOG2_E: tl.constexpr, HAS_STARTS: tl.constexpr, UPCAST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weigh the blocks that M cells of queries may read, one item after another.

    The first sweep over the keys keeps, in scratch memory of the program's own, the sum of
    2^(score - maximum so far) per cell of queries and block of keys, and those maxima per tile. The
    second puts all on the row's denominator and averages the cells of each query block.
    """
    BLOCKS: tl.constexpr = N // CELLS
    slot = scratch + tl.program_id(0).to(tl.int64) * M * (padded + tl.cdiv(padded, BLOCKS))
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    j = tl.arange(0, BLOCKS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # The longest rows come first, so that the short ones fill the end.
        program = item % heads[1]
        tile = tl.cdiv(total_cells, M) - 1 - item // heads[1]
        b = (program // heads[0]).to(tl.int64)
        h = (program % heads[0]).to(tl.int64)
        start = tl.load(starts + b).to(tl.int32) if HAS_STARTS else 0
        before = T - T_q
        q_rows = query + b * q_strides[0] + h * q_strides[1]
        k_rows = keys + b * k_strides[0] + h // GROUPS * k_strides[1]
        a = first + tile * M + m
        # Where all cells are whole, those past the last stand for it: none that is real reads them.
        most = T // S - 1 if EVEN else T
        top = tl.full((M,), -float("inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        tiles = tl.cdiv(first + (tile + 1) * M, N)
        for number in range(0, tiles):
            c = number * N + n
            scores = _product(
                q_rows, k_rows, tl.minimum(a, most), tl.minimum(c, most), start, before, T,
                q_strides[2], q_strides[3], k_strides[2], k_strides[3], steps,
                S, D, WIDE, DEPTH, EVEN, UPCAST, M, N, STAGES,
            ) * scale  # fmt: skip
            scores = _bounded(scores, SOFTCAP, LOG2_E)
            if number * N + N > first + tile * M:
                scores = tl.where(c[None, :] <= a[:, None], scores, -float("inf"))
            raised = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - raised[:, None])
            total = total * tl.exp2(top - raised) + tl.sum(p, 1)
            top = raised
            held = tl.sum(tl.reshape(p, (M, BLOCKS, CELLS)), 2)
            tl.store(slot + m[:, None] * padded + number * BLOCKS + j[None, :], held)
            tl.store(slot + M * padded + number * M + m, raised)
        tl.debug_barrier()
        tokens = start + a * S  # the first of each cell
        real = (tokens + S > before) & (tokens + S > start) & (tokens < T)
        logs = top + tl.log2(total)
        rows = tile * (M // CELLS) + tl.arange(0, M // CELLS)
        place = out + (program.to(tl.int64) * (total_cells // CELLS) + rows[:, None]) * width
        keep = (rows < total_cells // CELLS)[:, None]
        for number in range(0, tl.cdiv(width, BLOCKS)):
            own = number * BLOCKS + j
            inside = real[:, None] & (number < tiles) & (own >= 0)[None, :]
            pointers = slot + m[:, None] * padded + own[None, :]
            held = tl.load(pointers, mask=inside, other=0.0)
            raised = tl.load(
                slot + M * padded + number * M + m, mask=real & (number < tiles), other=0.0
            )
            weights = held * tl.exp2(tl.where(real, raised - logs, 0.0))[:, None]
            weights = tl.sum(tl.reshape(weights, (M // CELLS, CELLS, BLOCKS)), 1) / CELLS
            tl.store(place + own[None, :], weights, mask=keep & (own < width)[None, :])
        tl.debug_barrier()


def programs(device: torch.device) -> int:
    """Return how many programs fill the device; the interpreter runs four."""
    if device.type == "cpu":
        return 4
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def _options(query: Tensor) -> dict[str, int]:
    """Return warps and, for Hopper's products, registers that let two programs share."""
    hopper = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] == 9
    return {"num_warps": 8} | ({"maxnreg": 128} if hopper and query.element_size() == 2 else {})


def weigh_cells(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    stride: int,
    size: int,
    scaling: float,
    softcap: float | None,
    rows: range,
) -> Tensor:
    """Launch; arguments and results are those of ``api.weigh_cells``.

    One launch; 4 bytes of scratch memory per cell of the queries at work and block of keys, and not
    of all queries. Calls that ``hopper.takes`` go to the kernel for it.
    """
    if hopper.takes(query, keys, stride, scaling, softcap):
        return hopper.weigh_cells(query, keys, starts, stride, size, scaling, rows)
    (B, H, T_q, D), (H_kv, T) = query.shape, keys.shape[1:3]
    cells, wide = size // stride, max(16, triton.next_power_of_2(D))
    number, width = len(rows) * cells, rows.stop
    items = B * H * triton.cdiv(number, ROWS)
    grid = min(items, programs(query.device))
    last = rows.start * cells + triton.cdiv(number, ROWS) * ROWS
    padded = triton.cdiv(last, COLUMNS) * COLUMNS // cells
    scratch = torch.empty(
        grid, ROWS, padded + padded * cells // COLUMNS, dtype=torch.float32, device=query.device
    )
    out = torch.empty(B, H, len(rows), width, dtype=torch.float32, device=query.device)
    even = starts is None and T_q == T and T % stride == 0 and wide == D
    _weigh[(grid,)](
        query, keys, starts, scratch, out, query.stride(), keys.stride(), rows.start * cells,
        number, width, padded, items, (H, B * H), T, T_q, stride * (wide // min(64, wide)),
        scaling / stride * (1.0 if softcap else LOG2_E),
        GROUPS=H // H_kv, S=stride, CELLS=cells, D=D, WIDE=wide, DEPTH=min(64, wide),
        EVEN=even, SOFTCAP=softcap or 0.0, LOG2_E=LOG2_E, HAS_STARTS=starts is not None,
        UPCAST=query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        M=ROWS, N=COLUMNS, STAGES=3, **_options(query),
    )  # fmt: skip
    return out
