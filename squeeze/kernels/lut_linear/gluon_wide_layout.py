"""Where things lie in the shared memory of ``gluon_wide``, and in its image of x.

In bytes: the ring ``[warp, place, row of the lane, lane, 16]``; x by steps, each as it lies in the
image: the bytes as a warpgroup's products read them, ``[c, word q, half, column, 16]``, byte
``4 t + b`` of a half of the channels ``(4 (4 half + b) + c) u + 16 step + 4 t + q``, column 2 m row
m's high bytes and 2 m + 1 its low ones: eight columns of 16 bytes are one core matrix; and (scale,
scale times the sum of integers) ``[row]``; tables ``[row, piece, entry]``; (scale, bias) ``[row]``;
the totals of warpgroups that share tiles ``[tile, ACROSS, warp, value, lane]``, in the place of x
where it is used no more; and what the programs of a cluster send each other, ``[program, output]``.
Behind all that, rounded up to 256 bytes, a barrier of 8 for each step, and one for what is sent.
Where a program has one tile, x may have room for fewer steps than there are: a step then takes the
place of the one so many before it.
"""

from __future__ import annotations

from triton.experimental import gluon

SENT = 248  # bytes from the first barrier to that of what is sent


@gluon.constexpr_function
def ring_bytes(warps, depth):
    """Bytes of the ring: so many planes of a step for each warp."""
    return warps * depth * 1024


@gluon.constexpr_function
def column_bytes(columns):
    """Bytes between the halves of 32 channels of an operand, by its columns."""
    return 16 * columns


@gluon.constexpr_function
def word_bytes(columns):
    """Bytes between the operands of a lane's first to fourth word."""
    return 2 * column_bytes(columns)


@gluon.constexpr_function
def group_bytes(columns):
    """Bytes between the operands of the four value groups; 16 keep writes apart."""
    return 4 * word_bytes(columns) + 16


@gluon.constexpr_function
def piece_at(i, columns):
    """Where the i-th word that ``split`` makes of x lies behind the first."""
    low, half, word = i % 2, i // 2 % 2, i // 4
    return word * word_bytes(columns) + half * column_bytes(columns) + low * 16


@gluon.constexpr_function
def step_bytes(columns):
    """Bytes of a step of x: the operands and, behind them, the factors of the rows."""
    return 4 * group_bytes(columns) + 4 * columns


@gluon.constexpr_function
def tables_at(warps, depth, steps, columns):
    """Where the tables begin, behind the ring and x."""
    return ring_bytes(warps, depth) + steps * step_bytes(columns)


@gluon.constexpr_function
def facts_at(warps, bits, depth, steps, columns, own, pieces):
    """Where scale and bias of the rows begin."""
    return tables_at(warps, depth, steps, columns) + own * 64 * pieces * 2**bits


@gluon.constexpr_function
def reused(warps, steps, columns, own, across, cluster):
    """Whether totals take the place of x: all are ready at once, and it is large enough."""
    once = own == warps // 4 // across
    return once and totals_bytes(columns, own, across, cluster) <= steps * 4 * group_bytes(columns)


@gluon.constexpr_function
def totals_bytes(columns, own, across, cluster):
    """Bytes of the warpgroups' totals."""
    return own * across * columns * 128 if across * cluster > 1 else 0


@gluon.constexpr_function
def totals_at(warps, bits, depth, steps, columns, own, pieces, across, cluster):
    """Where the warpgroups' totals begin."""
    if reused(warps, steps, columns, own, across, cluster):
        return ring_bytes(warps, depth)
    return facts_at(warps, bits, depth, steps, columns, own, pieces) + own * 64 * 8


@gluon.constexpr_function
def sent_at(warps, bits, depth, steps, columns, own, pieces, across, cluster):
    """Where the outputs that the programs of a cluster send begin."""
    end = facts_at(warps, bits, depth, steps, columns, own, pieces) + own * 64 * 8
    if reused(warps, steps, columns, own, across, cluster):
        return end
    return end + totals_bytes(columns, own, across, cluster)


@gluon.constexpr_function
def shared_bytes(warps, bits, depth, steps, columns, own, pieces, across, cluster):
    """Bytes of shared memory."""
    end = sent_at(warps, bits, depth, steps, columns, own, pieces, across, cluster)
    return end + (own * columns * 128 if cluster > 1 else 0)


@gluon.constexpr_function
def barriers_at(end):
    """Where the barriers of the steps of x begin, behind so many bytes."""
    return (end + 255) // 256 * 256


@gluon.constexpr_function
def sent_barrier_at(end):
    """Where the barrier of what is sent lies, behind so many bytes."""
    return barriers_at(end) + SENT
