"""Compile the kernels for a GPU that need not be here, and print what they became as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import re

import torch
from launched import absent, launches, run_tool, usage

from squeeze.kernels.float8_linear import fused
from squeeze.kernels.float8_linear import triton as kernel
from squeeze.types import ClusteredWeight

CASES = ((2, 4096, 4096), (3, 14336, 4096), (4, 4096, 4096), (4, 4096, 14336))


def weight(bits, out_features, in_features):
    """A packed weight without memory, a codebook per row."""
    indices = absent(out_features, in_features // 32 * bits, dtype=torch.int32)
    codebook = absent(out_features, 1, 2**bits, dtype=torch.uint8)
    scale = absent(out_features, dtype=torch.float16)
    shape = (out_features, in_features)
    return ClusteredWeight(indices, codebook, scale, bits, shape, 1, in_features, inputs="float8")


def main():
    """Compile what the launchers choose."""
    rows = []
    for bits, out_features, in_features in CASES:
        x = absent(2048, in_features, dtype=torch.bfloat16)
        with launches(90) as made:
            kernel.prepare(x, weight(bits, out_features, in_features))
            if (bits, out_features, in_features) == CASES[-1]:
                kernel.rounded_inputs(x)
                assert fused.fits(x, weight(*CASES[-1]))
                fused.float8_linear(x, weight(*CASES[-1]), absent(out_features, dtype=x.dtype))
        for name, compiled in made:
            code = run_tool(compiled, "nvdisasm", "-c")
            rows.append({"kernel": name, "bits": bits, **usage(compiled)})
            rows[-1]["casts"] = code.count("F2FP.SATFINITE.E4M3.F32")
            rows[-1]["products"] = code.count("QGMMA.64x256x32.F32.E4M3.E4M3 R")
            rows[-1]["lookups"] = compiled.asm["ptx"].count("prmt.b32")
            rows[-1]["wide_stores"] = len(re.findall(r"STG\.E\S*\.128", code))
    print(json.dumps(rows))


main()
