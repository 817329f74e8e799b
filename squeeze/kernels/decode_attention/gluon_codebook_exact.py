"""Attention of one KV head to its exact slots: programs of their own beside those of the blocks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

SLOTS = gl.constexpr(128)  # of a step
ROWS = gl.constexpr(16)  # query rows of a KV head, at most


@gluon.jit
def soft_cap(scores, cap):
    """``cap * tanh(scores / cap)`` of base-2 scores and cap; stays finite for any score."""
    return cap - 2.0 * cap / (gl.exp2(scores * (2.0 * 1.4426950408889634 / cap)) + 1.0)


@gluon.jit
def _load_rows(base, row, stride, there, layout: gl.constexpr):
    """Load rows of 128 adjacent channels; those that are not there are zero."""
    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))[None, :]
    places = (row.to(gl.int64) * stride)[:, None] + channel
    return gl.load(base + places, mask=there[:, None], other=0.0)


@gluon.jit
def attend_exact(
    query,
    exact_keys,
    exact_values,
    exact_counts,
    partial,
    maxima,
    totals,
    strides,
    key_strides,
    value_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    slab,
    columns,
    W: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
):
    """Online softmax over the exact slots, causal among the current tokens, into column 0.

    All rows of the head at once. Warps divide the slots of a step for the scores and the channels
    for the output, so that no warp waits for a long chain of its own.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, W], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    rows_as: gl.constexpr = gl.SliceLayout(1, mma)
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [W, 1], [1, 0])
    slots_as: gl.constexpr = gl.SliceLayout(1, loaded)
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    dtype: gl.constexpr = query.dtype.element_ty
    key_memory = gl.allocate_shared_memory(dtype, [SLOTS, 128], swizzled)
    value_memory = gl.allocate_shared_memory(dtype, [SLOTS, 128], swizzled)
    batch, kv_head = slab // kv_heads, slab % kv_heads
    count = gl.load(exact_counts + batch)
    row = gl.arange(0, ROWS, layout=slots_as)
    place = (kv_head * groups + row // steps) * strides[1] + row % steps * strides[2]
    base = query + batch * strides[0]
    queries = gl.convert_layout(_load_rows(base, place, 1, row < groups * steps, loaded), left)
    key_base = exact_keys + batch * key_strides[0] + kv_head * key_strides[1]
    value_base = exact_values + batch * value_strides[0] + kv_head * value_strides[1]
    row = gl.arange(0, ROWS, layout=rows_as)
    limit = count - (steps - 1 - row % steps)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, layout=rows_as)
    total = gl.zeros([ROWS], gl.float32, layout=rows_as)
    output = gl.zeros([ROWS, 128], gl.float32, layout=mma)
    for start in range(0, count, SLOTS):
        slot = start + gl.arange(0, SLOTS, layout=slots_as)
        keys = _load_rows(key_base, slot, key_strides[2], slot < count, loaded)
        values = _load_rows(value_base, slot, value_strides[2], slot < count, loaded)
        key_memory.store(keys)
        value_memory.store(values)
        zero = gl.zeros([ROWS, SLOTS], gl.float32, layout=mma)
        scores = mma_v2(queries, key_memory.permute((1, 0)).load(right), zero) * scaling
        if HAS_SOFTCAP:
            scores = soft_cap(scores, softcap)
        slot = start + gl.arange(0, SLOTS, layout=gl.SliceLayout(0, mma))
        scores = gl.where(slot[None, :] < limit[:, None], scores, float("-inf"))
        largest = gl.maximum(maximum, gl.max(scores, 1))
        finite = gl.where(largest == float("-inf"), 0.0, largest)
        decay = gl.exp2(maximum - finite)
        maximum = largest
        weights = gl.exp2(scores - finite[:, None])
        total = total * decay + gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(dtype), left)
        output = mma_v2(operand, value_memory.load(right), output * decay[:, None])
    there = row < groups * steps
    places = (slab * (groups * steps) + row).to(gl.int64) * columns
    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, mma))[None, :]
    gl.store(partial + places[:, None] * 128 + channel, output, mask=there[:, None])
    gl.store(maxima + places, maximum, mask=there)
    gl.store(totals + places, total, mask=there)
