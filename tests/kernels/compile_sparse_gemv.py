"""Compile the sparse-input kernels that the launcher chooses, for a GPU that need not be here.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
Prints one line of JSON per kernel; argument: the compute capability times ten.
"""

import json
import re
import sys

import torch
from launched import launches, run_tool, usage

from squeeze.kernels.sparse_gemv.triton import sparse_gemv

# Rows of x, outputs, inputs, dtype, whether there is a bias.
CASES = (
    (1, 14336, 4096, torch.bfloat16, False),
    (1, 4096, 14336, torch.bfloat16, True),
    (2, 4096, 4096, torch.float16, True),
    (3, 333, 1001, torch.bfloat16, False),
    (4, 14336, 4096, torch.bfloat16, True),
    (4, 64, 48, torch.float32, True),
)


def absent(*shape, dtype):
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def ahead(code):
    """Reads of 16 bytes that the loop's body starts before its barrier."""
    body = code[code.index(".L_x_0:") :]
    return len(re.findall(r"LDG\.\S*128", body[: body.index("BAR.SYNC")]))


def main():
    """Compile each case and describe its kernels."""
    for case in CASES:
        rows, outputs, inputs, dtype, biased = case
        weight = absent(inputs, outputs, dtype=dtype).t()
        bias = absent(outputs, dtype=dtype) if biased else None
        x, threshold = absent(rows, inputs, dtype=dtype), absent(inputs, dtype=torch.float32)
        with launches(int(sys.argv[1])) as made:
            sparse_gemv(x, weight, threshold, bias)
        for name, compiled in made:
            facts = {"kernel": name, "case": [*case[:3], str(dtype)], **usage(compiled)}
            if name == "_gemv_kernel" and inputs >= 4096:
                facts["ahead"] = ahead(run_tool(compiled, "nvdisasm", "-c"))
            print(json.dumps(facts), flush=True)


main()
