"""Where things lie in the shared memory of ``gluon``, and the order in which planes are used.

In bytes: the ring ``[warp, plane, row of the lane, lane, 16]``; the bytes of x in the order of the
second operand of an m16n8k32 product ``[step, 2 c + pair, column, lane % 4, 16]``, sixteen of
channels ``(4 b + c) u + 16 step + 4 t + 2 pair + q`` at ``8 q + b``, column 2 m row m's high bytes
and 2 m + 1 its low ones; (scale, scale times the sum of integers) of x ``[step, row]``; tables
``[row, piece, entry]``; (scale, bias) ``[row]``; and the totals of warps that share tiles ``[tile,
ACROSS, value, lane]``.
"""

from __future__ import annotations

from triton.experimental import gluon


@gluon.constexpr_function
def ring_bytes(warps, tiles, bits):
    """Bytes of the ring."""
    return warps * tiles * bits * 1024


@gluon.constexpr_function
def tables_at(warps, tiles, bits, steps, x_rows):
    """Where the tables begin, behind the ring, the bytes of x and their factors."""
    return ring_bytes(warps, tiles, bits) + steps * x_rows * 1032 + steps * x_rows * 8 % 16


@gluon.constexpr_function
def facts_at(warps, tiles, bits, steps, x_rows, own_tiles, pieces):
    """Where scale and bias of the rows begin."""
    rows = own_tiles * tiles * 16
    return tables_at(warps, tiles, bits, steps, x_rows) + rows * pieces * 2**bits


@gluon.constexpr_function
def totals_at(warps, tiles, bits, steps, x_rows, own_tiles, pieces):
    """Where the warps' totals begin."""
    rows = own_tiles * tiles * 16
    return facts_at(warps, tiles, bits, steps, x_rows, own_tiles, pieces) + rows * 8


@gluon.constexpr_function
def shared_bytes(warps, tiles, bits, steps, x_rows, own_tiles, pieces, across, columns):
    """Bytes of shared memory."""
    start = totals_at(warps, tiles, bits, steps, x_rows, own_tiles, pieces)
    return start + (own_tiles * across * 2 * tiles * columns * 128 if across > 1 else 0)


@gluon.constexpr_function
def order(bits):
    """Planes of a step in the order of their use, and the value groups used after each."""
    if bits == 4:
        return ((0, (0,)), (1, (1,)), (2, (2,)), (3, (3,)))
    if bits == 3:
        return ((2, ()), (0, (0, 2)), (1, (1, 3)))
    return ((0, (0, 2)), (1, (1, 3)))


@gluon.constexpr_function
def places(bits):
    """Planes of a step."""
    return len(order(bits))


@gluon.constexpr_function
def plane_of(bits, at):
    """The plane used at one place of a step."""
    return order(bits)[at][0]


@gluon.constexpr_function
def group_of(bits, at, i):
    """The i-th value group used at one place of a step."""
    return order(bits)[at][1][i]


@gluon.constexpr_function
def groups_of(bits, at):
    """How many value groups are used at one place of a step."""
    return len(order(bits)[at][1])


@gluon.constexpr_function
def sum_at(tile, piece, column, pieces, columns, chains):
    """Where the four sums of a tile, a piece of the entries and a column tile begin."""
    return 4 * chains * ((tile * pieces + piece) * columns + column)
