"""Compile the storing of blocks for GPUs that need not be here, and print what it takes.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

import torch

from squeeze.kernels.block_store import triton as kernel
from tests.kernels.launched import launches, usage


def launch(rows, components):
    """Launch on tensors without memory."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    blocks = {name: empty(1, rows, *x[0], dtype=x[1]) for name, x in components.items()}
    tables = {name: empty(64) for name in components}
    kernel.store_blocks(blocks, tables, empty(rows).int(), empty(rows).bool())


def main():
    """Compile what 4 bits of an 8B model store, and components of odd sizes."""
    four = {"codes": ((8, 64, 128), torch.uint8), "scale": ((8, 128), torch.float16),
            "zero": ((8, 128), torch.float16)}  # fmt: skip
    odd = {"codes": ((3, 5, 7), torch.uint8), "scale": ((3, 2), torch.float32)}
    found = []
    for capability in map(int, sys.argv[1:]):
        with launches(capability) as made:
            launch(1, four)
            launch(32, four)
            launch(3, odd)
        for name, compiled in made:
            found.append({"kernel": name, "capability": capability, **usage(compiled)})
    print(json.dumps(found))


main()
