"""Triton kernel of exact one-dimensional k-means: one warp per row, one layer of runs at a time.

Let D_k[j] be the most that k runs of the first j values take off the inertia:
``D_k[j] = max_i D_{k-1}[i] + gain(i, j)``, ``gain(i, j) = (M_j - M_i)^2 / (W_j - W_i)``, in float64
from prefix sums W of w and M of w x. Where the best i stands never falls, neither as j rises nor as
k does. So the nodes at the ends of BLOCK others are searched first, from the last to the first,
each between where it stood a layer ago and where the next one stands; the nodes between two ends
then try all candidates between theirs. Ends have a lane per candidate, the nodes of a block a lane
each, and these read the same candidate: no sums over lanes, no atomics, the same bits on every run.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # nodes between two ends, a lane each
TILE = 128  # candidates of an end, or values of a prefix sum, at a time
UNROLL = 4  # candidates of a block on their way at a time
PROGRAMS = 16  # rows that a multiprocessor works on: warps hide one another's latency
SCRATCH_BYTES = 1 << 30  # of all rows in flight
TINY = 1e-300  # deviation of equal values, which divides zeros
RECIPROCAL = tl.constexpr("""{
    .reg .f64 part, error;
    rcp.approx.ftz.f64 part, $1;
    neg.f64 error, $1;
    fma.rn.f64 error, error, part, 0d3FF0000000000000;
    fma.rn.f64 error, error, error, error;
    fma.rn.f64 $0, part, error, part;
}""")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _gain(weight, moment, weights, moments, SLOW: tl.constexpr):
    """What the run between two nodes takes off the inertia, float64; NaN if it is empty.

    The reciprocal is within 2**-52: an estimate of 20 bits and a cubic step, without the branches
    of a division that heeds subnormal numbers.
    """
    span = weight - weights
    step = moment - moments
    if SLOW:
        part = 1.0 / tl.where(span > 0, span, 1.0)
    else:
        part = tl.inline_asm_elementwise(
            RECIPROCAL, "=d,d", [span], dtype=tl.float64, is_pure=True, pack=1
        )
    return (step * step) * part


@triton.jit
def _search(
    weight, moment, score, node, low, high, TILE: tl.constexpr, SLOW: tl.constexpr
):  # fmt: skip
    """The first i in [low, high) with the most ``score[i] + gain(i, node)``; low if there is none.

    Every lane keeps the best of its candidates; they are compared once, at the end.
    """
    place = tl.arange(0, TILE)
    best = tl.full((TILE,), float("-inf"), tl.float64)
    start = tl.full((TILE,), 0, tl.int32) + low
    node_weight, node_moment = tl.load(weight + node), tl.load(moment + node)
    for first in range(low, high, TILE):
        i = first + place
        mask = i < high
        value = tl.load(score + i, mask=mask, other=float("-inf"))
        value += _gain(
            node_weight,
            node_moment,
            tl.load(weight + i, mask=mask, other=0.0),
            tl.load(moment + i, mask=mask, other=0.0),
            SLOW,
        )
        better = (value > best) & mask
        best = tl.where(better, value, best)
        start = tl.where(better, i, start)
    return tl.min(tl.where(best == tl.max(best, 0), start, node), 0)


@triton.jit
def _layer(
    weight, moment, score, starts, n, k,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr, SLOW: tl.constexpr,
):  # fmt: skip
    """Turn ``score`` from D_{k-1} into D_k at nodes k to n; write where its last runs start.

    Blocks go from the last to the first, so that no candidate is overwritten before its last use.
    ``starts`` is the layer's row; the one before it belongs to the layer before, if k > 2.
    """
    old = starts - (n + 1)
    bound = tl.load(old + n, mask=k > 2, other=0).to(tl.int32) & 0xFFFF
    high = _search(weight, moment, score, n, tl.maximum(bound, k - 1), n, TILE, SLOW)
    for end in range(n, k - 1, -BLOCK):
        before = end - BLOCK
        bound = tl.load(old + before, mask=(k > 2) & (before >= k), other=0).to(tl.int32) & 0xFFFF
        low = tl.minimum(tl.maximum(bound, k - 1), high)  # rounding may part them where runs tie
        if before >= k:
            stop = tl.minimum(high + 1, before)
            low = _search(weight, moment, score, before, low, stop, TILE, SLOW)
        node = before + 1 + tl.arange(0, BLOCK)
        mask = node >= k
        node_weight = tl.load(weight + node, mask=mask, other=0.0)
        node_moment = tl.load(moment + node, mask=mask, other=0.0)
        best = tl.full((BLOCK,), float("-inf"), tl.float64)
        start = tl.full((BLOCK,), 0, tl.int32) + low
        for first in range(low, high + 1, UNROLL):
            for u in tl.static_range(UNROLL):
                i = first + u  # past high at times, which harms nobody: rows are padded
                value = tl.load(score + i) + _gain(
                    node_weight, node_moment, tl.load(weight + i), tl.load(moment + i), SLOW
                )
                better = (value > best) & (i < node)
                best = tl.where(better, value, best)
                start = tl.where(better, i, start)
        tl.debug_barrier()  # all lanes have read the candidates among these nodes
        tl.store(score + node, best, mask=mask)
        tl.store(starts + node, start.to(tl.int16), mask=mask)
        high = low
    tl.debug_barrier()


@triton.jit
def _mass(weights, i, mask, mean, WEIGHTED: tl.constexpr, FLOOR: tl.constexpr):
    """Weights over their mean, float64, at least FLOOR; 1 where all are 0, and 0 off the mask."""
    value = tl.where(mask, 1.0, 0.0).to(tl.float64)
    if WEIGHTED:
        given = tl.load(weights + i, mask=mask, other=0.0).to(tl.float64)
        given = tl.maximum(given / tl.where(mean > 0, mean, 1.0), FLOOR)
        value = tl.where(mean > 0, tl.where(mask, given, 0.0), value)
    return value


@triton.jit
def _distinct(values, centroids, n, clusters, TILE: tl.constexpr):
    """Count distinct values and write the first of them as centroids, the last repeated."""
    count = 0
    for first in range(0, n, TILE):
        i = first + tl.arange(0, TILE)
        mask = i < n
        value = tl.load(values + i, mask=mask, other=0.0).to(tl.float64)
        left = tl.load(values + i - 1, mask=mask & (i > 0), other=0.0).to(tl.float64)
        fresh = (mask & ((i == 0) | (value > left))).to(tl.int32)
        rank = count + tl.cumsum(fresh, 0) - 1
        tl.store(centroids + rank, value, mask=(fresh == 1) & (rank < clusters))
        count += tl.sum(fresh, 0)
    last = tl.load(values + n - 1).to(tl.float64)
    for first in range(count, clusters, TILE):
        i = first + tl.arange(0, TILE)
        tl.store(centroids + i, tl.zeros((TILE,), tl.float64) + last, mask=i < clusters)
    return count


@triton.jit
def _sums(
    values, weights, weight, moment, score, n,
    WEIGHTED: tl.constexpr, FLOOR: tl.constexpr, TINY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write W, M and D_1 of a row at zero mean and unit variance; return mean and deviation.

    Sums in float64, TILE at a time.
    """
    total = tl.zeros((TILE,), tl.float64)
    if WEIGHTED:
        for first in range(0, n, TILE):
            i = first + tl.arange(0, TILE)
            total += tl.load(weights + i, mask=i < n, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / n
    anchor = tl.load(values).to(tl.float64)
    mass, shift = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
    for first in range(0, n, TILE):
        i = first + tl.arange(0, TILE)
        share = _mass(weights, i, i < n, mean, WEIGHTED, FLOOR)
        mass += share
        shift += share * (tl.load(values + i, mask=i < n, other=0.0).to(tl.float64) - anchor)
    whole = tl.sum(mass, 0)
    middle = anchor + tl.sum(shift, 0) / whole
    square = tl.zeros((TILE,), tl.float64)
    for first in range(0, n, TILE):
        i = first + tl.arange(0, TILE)
        away = tl.load(values + i, mask=i < n, other=0.0).to(tl.float64) - middle
        square += _mass(weights, i, i < n, mean, WEIGHTED, FLOOR) * away * away
    spread = tl.maximum(tl.sqrt(tl.sum(square, 0) / whole), TINY)
    zero = whole * 0.0
    tl.store(weight, zero)
    tl.store(moment, zero)
    before_weight, before_moment = zero, zero
    for first in range(0, n, TILE):
        i = first + tl.arange(0, TILE)
        share = _mass(weights, i, i < n, mean, WEIGHTED, FLOOR) / whole
        away = tl.load(values + i, mask=i < n, other=0.0).to(tl.float64) - middle
        part = share * (away / spread)
        weights_here = before_weight + tl.cumsum(share, 0)
        moments_here = before_moment + tl.cumsum(part, 0)
        tl.store(weight + 1 + i, weights_here, mask=i < n)
        tl.store(moment + 1 + i, moments_here, mask=i < n)
        tl.store(score + 1 + i, moments_here * moments_here / weights_here, mask=i < n)
        before_weight += tl.sum(share, 0)
        before_moment += tl.sum(part, 0)
    tl.debug_barrier()
    return middle, spread


@triton.jit
def _walk(values, centroids, weight, moment, starts, start, n, clusters, middle, spread):
    """Write the centroids of the best path, from its last run to its first.

    A mean of prefix sums may leave its run by rounding; equal values must give that value.
    """
    end = n
    for step in range(0, clusters):
        run = clusters - 1 - step
        mass = tl.load(weight + end) - tl.load(weight + start)
        mean = middle + spread * ((tl.load(moment + end) - tl.load(moment + start)) / mass)
        mean = tl.maximum(mean, tl.load(values + start).to(tl.float64))
        mean = tl.minimum(mean, tl.load(values + end - 1).to(tl.float64))
        tl.store(centroids + run, mean)
        end = start
        layer = starts + (run - 2) * (n + 1)
        start = tl.load(layer + end, mask=run >= 2, other=0).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize=["rows", "n", "clusters", "width"])
def _kmeans_kernel(
    values, weights, centroids, sums, starts, rows, n, clusters, width,
    WEIGHTED: tl.constexpr, FLOOR: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, TILE: tl.constexpr, SLOW: tl.constexpr,
):  # fmt: skip
    """Centroids ``[rows, clusters]`` of sorted rows ``[rows, n]``.

    A program has its own W, M and D ``[3, width]`` in ``sums``, and where the last runs of layers 2
    to ``clusters - 1`` start, ``[clusters - 2, n + 1]`` in ``starts``; both serve row after row.
    """
    program = tl.program_id(0).to(tl.int64)
    weight = sums + program * 3 * width
    moment = weight + width
    score = moment + width
    starts += program * tl.maximum(clusters - 2, 0) * (n + 1)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * n
        target = centroids + tl.cast(row, tl.int64) * clusters
        count = _distinct(values + offset, target, n, clusters, TILE)
        if count > clusters:
            middle, spread = _sums(
                values + offset, weights + offset, weight, moment, score, n,
                WEIGHTED, FLOOR, TINY, TILE,
            )  # fmt: skip
            for k in range(2, clusters):
                layer = starts + (k - 2) * (n + 1)
                _layer(weight, moment, score, layer, n, k, BLOCK, UNROLL, TILE, SLOW)
            start = 0
            if clusters > 1:
                last = starts + (clusters - 3) * (n + 1) + n
                bound = tl.load(last, mask=clusters > 2, other=0).to(tl.int32) & 0xFFFF
                low = tl.maximum(bound, clusters - 1)
                start = _search(weight, moment, score, n, low, n, TILE, SLOW)
            _walk(
                values + offset, target, weight, moment, starts, start, n, clusters, middle, spread
            )
        tl.debug_barrier()  # the next row overwrites what this one still reads


def programs(rows: int, n: int, clusters: int, processors: int) -> int:
    """Choose how many rows are in flight: as many as hide latency and fit the scratch memory."""
    size = 24 * (n + 1 + UNROLL) + 2 * max(clusters - 2, 0) * (n + 1)
    return max(1, min(rows, PROGRAMS * processors, SCRATCH_BYTES // size))


def centroids(values: Tensor, weights: Tensor | None, clusters: int, floor: float) -> Tensor:
    """Find the centroids of the best partition of every sorted row.

    Args:
        values: ``[P, n]``, any floating dtype, ascending along the last dimension; n at most
            65535, as the number of a node takes 16 bits.
        weights: ``[P, n]`` like them, at least 0; or ``None``.
        clusters: Number of runs, at least 1.
        floor: Least weight, as a share of the row's mean.
    Returns:
        float64 ``[P, clusters]``, ascending; with fewer distinct values the last is repeated.
    """
    rows, n = values.shape
    values = values.contiguous()
    given = values if weights is None else weights.contiguous()
    device = values.device
    processors = 1
    if device.type != "cpu":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    count = programs(rows, n, clusters, processors)
    width = n + 1 + UNROLL
    result = torch.empty(rows, clusters, dtype=torch.float64, device=device)
    sums = torch.empty(count, 3, width, dtype=torch.float64, device=device)
    sums[:, :, n + 1 :] = 0.0  # read by the last block, and passed over
    layers = max(clusters - 2, 1)
    starts = torch.empty(count, layers, n + 1, dtype=torch.int16, device=device)
    _kmeans_kernel[(count,)](
        values, given, result, sums, starts, rows, n, clusters, width,
        WEIGHTED=weights is not None, FLOOR=floor, TINY=TINY, BLOCK=BLOCK, UNROLL=UNROLL,
        TILE=TILE, SLOW=INTERPRETED, num_warps=1,
    )  # fmt: skip
    return result
