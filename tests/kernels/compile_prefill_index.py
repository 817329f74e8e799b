"""Compile the kernels of a prefill index for GPUs that need not be here, and print what they take.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

import torch

from squeeze.kernels.prefill_index import (
    cells,
    choice,
    hopper,
    levels,
    lines,
    masses,
    routing,
    sampled,
    selection,
)
from tests.kernels.launched import absent, launches, usage


def empty(*shape, dtype=torch.int32):
    """A tensor without memory."""
    return absent(*shape, dtype=dtype)


def sample(dtype, heads, kv_heads, T, D, size, passes, stride, padded=False, softcap=None):
    """Read the last queries and some before them."""
    query, keys = empty(1, heads, T, D, dtype=dtype), empty(1, kv_heads, T, D, dtype=dtype)
    rows = [range(T - 64, T), *(range(T - 64 * stride - i, T - i, stride) for i in range(passes))]
    starts = empty(1, dtype=torch.int64) if padded else None
    sampled.sampled_mass(query, keys, starts, 0.1, softcap, rows, size)


def weigh(dtype, heads, kv_heads, T, D, size, stride, padded=False, softcap=None):
    """Weigh all blocks by antidiagonals."""
    query, keys = empty(1, heads, T, D, dtype=dtype), empty(1, kv_heads, T, D, dtype=dtype)
    starts = empty(1, dtype=torch.int64) if padded else None
    cells.weigh_cells(query, keys, starts, stride, size, 0.1, softcap, range(-(-T // size)))


def weigh_on_hopper(dtype, heads, kv_heads, T, D, size, stride, padded=False):
    """Likewise, with the kernel for Hopper."""
    query, keys = empty(1, heads, T, D, dtype=dtype), empty(1, kv_heads, T, D, dtype=dtype)
    starts = empty(1, dtype=torch.int64) if padded else None
    hopper.weigh_cells(query, keys, starts, stride, size, 0.1, range(-(-T // size)))


def select(heads, blocks, mass, floor, required):
    """List blocks of most weight."""
    lists = (empty(1, heads, blocks), empty(1, heads, blocks + 1), empty(1, heads, 8 * blocks))
    weights, lengths = empty(1, heads, blocks, blocks, dtype=torch.float32), empty(1).long()
    bound = empty(1, heads, 1, 1, dtype=torch.float32) if floor else None
    require = empty(1, heads, blocks, blocks, dtype=torch.bool) if required else None
    limits = empty(blocks)
    selection.select_blocks(weights, 0, limits, lengths, 64, mass, bound, require, *lists)


def layer(heads, blocks, per_head):
    """List blocks to read exactly and as averages."""
    exact, averaged = (
        (empty(1, heads, blocks), empty(1, heads, blocks + 1), empty(1, heads, each * blocks))
        for each in (8, 56)
    )
    weights, lengths = empty(1, heads, blocks, blocks, dtype=torch.float32), empty(1).long()
    masses = empty(heads, 1, 1, dtype=torch.float32) if per_head else 0.85, 0.9, 0.95, 1.0
    tokens = 64 * blocks
    levels.select_levels(weights, 0, empty(4, blocks), lengths, 64, tokens, masses, exact, averaged)


def choose(heads, T, per_head, padded):
    """Choose columns and diagonals."""
    columns = empty(1, heads, T, dtype=torch.float32)
    diagonals = empty(1, heads, -(-T // 64), dtype=torch.float32)
    starts = empty(1, dtype=torch.int64) if padded else None
    numbers = (empty(heads), empty(heads)) if per_head else (3000, 25)
    choice.choose_lines(columns, diagonals, starts, 64, 3, *numbers, (3000, 25))


def route(dtype, heads, kv_heads, T, D, number, chunk=256):
    """Count the votes of a segment's queries."""
    query = empty(1, heads, T // 2, D, dtype=dtype)
    parts = empty(3, 1, kv_heads, T // chunk, D, dtype=dtype)
    routing.launch(query, parts, empty(1, T // 2, dtype=torch.uint8), number, chunk, 64, T // 2)


def main():
    """Compile what an 8B model and an odd one launch."""
    found = []
    for capability in map(int, sys.argv[1:]):
        with launches(capability) as made:
            sample(torch.bfloat16, 32, 8, 131072, 128, 64, 4, 16)
            weigh(torch.bfloat16, 32, 8, 131072, 128, 64, 8)
            if capability == 90:
                sample(torch.float16, 6, 2, 1000, 80, 128, 1, 8, True, 30.0)
                weigh(torch.float16, 6, 2, 1000, 80, 128, 16, True, 30.0)
                weigh_on_hopper(torch.bfloat16, 32, 8, 131072, 128, 64, 8)
                weigh_on_hopper(torch.float16, 6, 2, 1000, 80, 128, 16, True)
                select(32, 2048, 0.9, False, False)
                select(32, 512, empty(32, 1, 1, dtype=torch.float32), True, True)
                layer(32, 2048, False)
                layer(32, 512, True)
                route(torch.bfloat16, 32, 8, 32768, 128, 7)
                route(torch.bfloat16, 32, 8, 131072, 128, empty(32))
                route(torch.bfloat16, 32, 8, 131072, 128, 7, 128)
                held = empty(1, 32, 1024, dtype=torch.int64)
                masses.add_masses(empty(1, 32, 64, 2048, dtype=torch.float32), 32, 2.0**40, held)
                choose(32, 131072, False, False)
                choose(6, 1000, True, True)
                chosen = empty(1, 32, 3000, dtype=torch.int64), empty(1, 32, 25, dtype=torch.int64)
                lines.list_lines(*chosen, empty(1).long(), 64, 2048, 0)
                lines.list_lines(chosen[0][..., :0], chosen[1], empty(1).long(), 128, 300, 10)
        found += [{"kernel": name, "capability": capability, **usage(c)} for name, c in made]
    print(json.dumps(found))


main()
