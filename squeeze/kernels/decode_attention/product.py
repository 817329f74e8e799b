"""Products of few rows with a tile, shared by the kernel and every format."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(rows, tile):
    """``rows [M, K] @ tile [K, N]`` in float32.

    A tensor core takes 16 rows and 8 columns at a time: fewer than 16 rows become the columns, and
    the tile the rows, so that half as many are padding.
    """
    if rows.shape[0] < 16:
        result = tl.trans(tl.dot(tl.trans(tile), tl.trans(rows), input_precision="ieee"))
    else:
        result = tl.dot(rows, tile, input_precision="ieee")
    return result


@triton.jit
def multiply_add(rows, tile, total):
    """``rows [M, K] @ tile [K, N] + total``, as ``multiply``."""
    if rows.shape[0] < 16:
        sums = tl.trans(total)
        result = tl.trans(tl.dot(tl.trans(tile), tl.trans(rows), sums, input_precision="ieee"))
    else:
        result = tl.dot(rows, tile, total, input_precision="ieee")
    return result
