"""Compile the kernel for a GPU that need not be here, and print what it became as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json

import torch
from launched import absent, launches, run_tool, usage

from squeeze.kernels.lut_linear import many_rows
from squeeze.types import ClusteredWeight

CASES = (("int8", (4096, 4096)), ("float16", (4096, 14336)))


def main():
    """Compile what the launcher starts."""
    rows = []
    for entries, shape in CASES:
        codebook = absent(shape[0], 1, 16, dtype=getattr(torch, entries))
        scale = absent(shape[0], dtype=torch.float16) if entries == "int8" else None
        indices = absent(shape[0], shape[1] // 8, dtype=torch.int32)
        weight = ClusteredWeight(indices, codebook, scale, 4, shape, 1, shape[1])
        bias = absent(shape[0], dtype=torch.bfloat16) if entries == "int8" else None
        with launches(90) as made:
            many_rows.lut_linear(absent(2048, shape[1], dtype=torch.bfloat16), weight, bias)
        for _, compiled in made:
            code = run_tool(compiled, "nvdisasm", "-c")
            rows.append({"entries": entries, **usage(compiled)})
            rows[-1]["products"] = code.count("HGMMA.64x256x16.F32.BF16 R")
            rows[-1]["waits"] = code.count("WARPGROUP.DEPBAR")
            rows[-1]["full_waits"] = code.count("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    print(json.dumps(rows))


main()
