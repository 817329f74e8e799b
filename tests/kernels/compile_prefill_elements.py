"""Compile the kernels of low-bit estimates for GPUs that need not be here; print what they take.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

import torch

from squeeze.kernels.prefill_index import elements, hopper_elements, key_elements
from tests.kernels.launched import absent, launches, usage


def empty(*shape, dtype=torch.float32):
    """A tensor without memory."""
    return absent(*shape, dtype=dtype)


def rounding(dtype, heads, kv_heads, T, D, size, softcap=None, bits=4, stride=1):
    """Round all queries, or every ``stride``-th."""
    query = empty(1, heads, T // stride, D, dtype=dtype)
    keys = empty(1, kv_heads, T, D, dtype=dtype)
    means = empty(1, heads, 1, D), empty(1, kv_heads, 1, D)
    lengths = empty(1, dtype=torch.int64)
    numbers = (size, 0, stride, 0.1, softcap, bits)
    elements.round_queries(query, keys, *means, lengths, lengths, *numbers)


def keying(dtype, heads, kv_heads, T, D, bits=4):
    """Round all keys."""
    means = empty(1, kv_heads, 1, D), empty(1, heads, 1, D)
    key_elements.round_keys(empty(1, kv_heads, T, D, dtype=dtype), *means, 0.1, bits)


def weighing(launch, dtype, heads, kv_heads, T, D, size, softcap=None, stride=1):
    """Weigh all blocks."""
    codes = empty(1, heads, T // stride, D, dtype=dtype)
    key_codes = empty(1, kv_heads, T, D, dtype=dtype)
    queries, keys, added = empty(1, heads, T // stride), empty(1, kv_heads, T), empty(1, heads, T)
    rows = range(T // size)
    launch(codes, queries, queries, key_codes, keys, added, size, 0, stride, softcap, rows)


def main():
    """Compile what an 8B model and an odd one launch."""
    found = []
    for capability in map(int, sys.argv[1:]):
        with launches(capability) as made:
            rounding(torch.bfloat16, 32, 8, 131072, 128, 64)
            rounding(torch.bfloat16, 32, 8, 131072, 128, 64, stride=8)
            keying(torch.bfloat16, 32, 8, 131072, 128)
            weighing(elements.weigh_elements, torch.int8, 32, 8, 131072, 128, 64)
            weighing(elements.weigh_elements, torch.int8, 32, 8, 131072, 128, 64, stride=8)
            if capability == 90:
                rounding(torch.float16, 6, 2, 1280, 80, 128, 30.0, 8)
                keying(torch.float16, 6, 2, 1280, 80, 8)
                weighing(elements.weigh_elements, torch.int8, 6, 2, 1280, 80, 128, 30.0)
                on_hopper = hopper_elements.weigh_elements
                weighing(on_hopper, torch.float8_e4m3fn, 32, 8, 131072, 128, 64)
                weighing(on_hopper, torch.float8_e4m3fn, 32, 8, 131072, 128, 64, stride=8)
                weighing(on_hopper, torch.float8_e4m3fn, 32, 8, 131072, 128, 64, stride=4)
                weighing(on_hopper, torch.int8, 32, 8, 131072, 128, 64)
                weighing(on_hopper, torch.float8_e4m3fn, 6, 2, 1280, 80, 128, 30.0)
                weighing(on_hopper, torch.float8_e4m3fn, 4, 2, 1280, 64, 64)
        found += [{"kernel": name, "capability": capability, **usage(c)} for name, c in made]
    print(json.dumps(found))


main()
