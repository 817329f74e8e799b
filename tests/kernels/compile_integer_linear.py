"""Compile the kernels that the launcher chooses, for a GPU that need not be here; print JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
Arguments: numbers of rows of x. Every width meets every number of rows; zero points, exponents,
bias, group size, dtype and shape take turns. Those are launched as where the streamed kernel does
not fit; its own cases follow.
"""

import itertools
import json
import re
import sys

import torch
from launched import absent as on_gpu
from launched import launches, run_tool, usage

from squeeze.kernels.integer_linear.triton import integer_linear
from squeeze.types import IntegerWeight

BITS = (2, 3, 4, 5, 6, 7, 8)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (333, 1000))
TURNS = ((True, False), (False, True), (128, 64, 32), SHAPES)
# Rows of x, width, zero points, exponents, group size and shape.
STREAMED = (
    (1, 4, False, False, 128, (14336, 4096)),
    (1, 8, True, True, 64, (4096, 14336)),
    (4, 4, True, False, 1024, (333, 1024)),
    (16, 4, False, True, 128, (4096, 14336)),
    (16, 4, True, True, 64, (4096, 14336)),
    (16, 8, False, False, 64, (14336, 4096)),
)


def absent(*shape, dtype):
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(bits, zero, scaled, group_size, shape, absent=absent):
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


def streamed(case):
    """Compile a case of the streamed kernel; its kernels and instructions."""
    rows, *form = case
    dtype = torch.float16 if rows == 1 else torch.bfloat16
    x = on_gpu(rows, form[-1][1], dtype=dtype)
    bias = on_gpu(form[-1][0], dtype=dtype) if form[2] else None
    with launches(90) as made:
        integer_linear(x, weight(*form, absent=on_gpu), bias)
    for name, compiled in made:
        facts = {"kernel": name, "case": case, **usage(compiled)}
        if name == "multiply":
            code = run_tool(compiled, "nvdisasm", "-c")
            facts["early"] = len(re.findall(r"LDGSTS\S*128", code.split("ACQBULK", 1)[0]))
            facts["products"] = code.count("HMMA.16816")
        yield facts


def main():
    """Compile each case and describe its kernels."""
    for facts in itertools.chain.from_iterable(map(streamed, STREAMED)):
        print(json.dumps(facts), flush=True)
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
