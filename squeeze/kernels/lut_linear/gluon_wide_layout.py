"""Where things lie in the shared memory of ``gluon_wide``.

In bytes: the ring ``[warp, place, row of the lane, lane, 16]``; the bytes of x as a warpgroup's
products read them, ``[step, c, word q, half, column, 16]``, byte ``4 t + b`` of a half of the
channels ``(4 (4 half + b) + c) u + 16 step + 4 t + q``, column 2 m row m's high bytes and 2 m + 1
its low ones: eight columns of 16 bytes are one core matrix; (scale, scale times the sum of
integers) of x ``[step, row]``; tables ``[row, piece, entry]``; (scale, bias) ``[row]``; and the
totals of warpgroups that share tiles ``[tile, ACROSS, value, lane]``, in the place of the bytes of
x where these are used no more.
"""

from __future__ import annotations

from triton.experimental import gluon


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
def factors_at(warps, depth, steps, columns):
    """Where factors of x begin, behind the ring and the bytes of x."""
    return ring_bytes(warps, depth) + steps * 4 * group_bytes(columns)


@gluon.constexpr_function
def tables_at(warps, depth, steps, columns):
    """Where the tables begin."""
    return factors_at(warps, depth, steps, columns) + steps * columns * 4


@gluon.constexpr_function
def facts_at(warps, bits, depth, steps, columns, own, pieces):
    """Where scale and bias of the rows begin."""
    return tables_at(warps, depth, steps, columns) + own * 64 * pieces * 2**bits


@gluon.constexpr_function
def reused(warps, steps, columns, own, across):
    """Whether totals take the place of x: all are ready at once, and it is large enough."""
    once = own == warps // 4 // across
    return once and totals_bytes(columns, own, across) <= steps * 4 * group_bytes(columns)


@gluon.constexpr_function
def totals_bytes(columns, own, across):
    """Bytes of the warpgroups' totals."""
    return own * across * columns * 128 if across > 1 else 0


@gluon.constexpr_function
def totals_at(warps, bits, depth, steps, columns, own, pieces, across):
    """Where the warpgroups' totals begin."""
    if reused(warps, steps, columns, own, across):
        return ring_bytes(warps, depth)
    return facts_at(warps, bits, depth, steps, columns, own, pieces) + own * 64 * 8


@gluon.constexpr_function
def shared_bytes(warps, bits, depth, steps, columns, own, pieces, across):
    """Bytes of shared memory."""
    end = facts_at(warps, bits, depth, steps, columns, own, pieces) + own * 64 * 8
    if reused(warps, steps, columns, own, across):
        return end
    return end + totals_bytes(columns, own, across)
