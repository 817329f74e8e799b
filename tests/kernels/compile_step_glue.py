"""Compile the glue of a decode step for GPUs that need not be here, and print what it takes.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

import torch

from squeeze.kernels.step_glue import triton as kernel
from tests.kernels.launched import launches, usage


def launch(dtype, rows, steps, hidden, heads, kv_heads, size, normalised):
    """Launch everything that a layer does, on tensors without memory."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x = empty(rows, steps, hidden)
    kernel.add_rms_norm(x, x, empty(hidden), 1e-6)
    kernel.add_rms_norm(x, None, empty(hidden), 1e-6)
    joint = empty(rows, steps, (heads + 2 * kv_heads) * size)
    parts = joint.split([heads * size, kv_heads * size, kv_heads * size], -1)
    parts = [part.unflatten(-1, (-1, size)) for part in parts]
    angles = empty(1, steps, size), empty(1, steps, size)
    exact = empty(rows, kv_heads, 272, size), empty(rows, kv_heads, 272, size)
    norm = empty(size) if normalised else None
    counts = empty(rows, dtype=torch.int32)
    kernel.rope_append(*parts, *angles, *exact, counts, norm, norm, 1e-6)
    both = empty(rows, steps, 7 * hidden)
    kernel.silu_mul(*both.split(both.shape[-1] // 2, -1))
    output = empty(rows, heads, steps, size, dtype=torch.float32)
    kernel.join_heads(output, dtype)


def main():
    """Compile what an 8B model and an odd one launch."""
    found = []
    for capability in map(int, sys.argv[1:]):
        with launches(capability) as made:
            launch(torch.bfloat16, 1, 1, 4096, 32, 8, 128, False)
            launch(torch.bfloat16, 8, 1, 5120, 40, 8, 128, True)
            launch(torch.float16, 3, 2, 96, 6, 2, 80, True)
            launch(torch.float32, 1, 1, 8192, 64, 8, 128, False)
        for name, compiled in made:
            overlaps = "griddepcontrol.wait" in compiled.asm["ptx"]
            found.append({"kernel": name, "capability": capability, "overlaps": overlaps,
                          **usage(compiled)})  # fmt: skip
    print(json.dumps(found))


main()
