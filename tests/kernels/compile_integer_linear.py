"""Compile the kernels that the launcher chooses, for a GPU that need not be here; print JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
Arguments: numbers of rows of x. Every width meets every number of rows; zero points, exponents,
bias, group size, dtype and shape take turns.
"""

import itertools
import json
import sys

import torch
from launched import launches, usage

from squeeze.kernels.integer_linear.triton import integer_linear
from squeeze.types import IntegerWeight

BITS = (2, 3, 4, 5, 6, 7, 8)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (333, 1000))
TURNS = ((True, False), (False, True), (128, 64, 32), SHAPES)


def absent(*shape, dtype):
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(bits, zero, scaled, group_size, shape):
    """A packed weight of one form."""
    rows, columns = shape
    groups = -(-columns // group_size)
    return IntegerWeight(
        absent(rows, groups * group_size * bits // 32, dtype=torch.int32),
        absent(rows, groups, dtype=torch.float16),
        absent(rows, groups, dtype=torch.uint8) if zero else None,
        absent(columns, dtype=torch.int8) if scaled else None,
        bits,
        group_size,
        shape,
    )


def cases(counts):
    """Rows of x, width, zero points, exponents, group size and shape of each call."""
    combinations = list(itertools.product(*TURNS))
    for number, (rows, bits) in enumerate(itertools.product(counts, BITS)):
        yield rows, bits, *combinations[11 * number % len(combinations)]


def main():
    """Compile each case and describe its kernels."""
    for case in cases(map(int, sys.argv[1:])):
        rows, *form = case
        dtype = torch.bfloat16 if form[0] % 2 == rows % 2 else torch.float16
        x = absent(rows, form[-1][1], dtype=dtype)
        bias = absent(form[-1][0], dtype=dtype) if form[1] else None
        with launches(90) as made:
            integer_linear(x, weight(*form), bias)
        for name, compiled in made:
            print(json.dumps({"kernel": name, "case": case, **usage(compiled)}), flush=True)


main()
