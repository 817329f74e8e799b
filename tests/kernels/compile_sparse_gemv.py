"""Compile the sparse-input kernels that the launcher chooses, for a GPU that need not be here.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
Prints one line of JSON per kernel; argument: the compute capability times ten. The cases are
launched as where the streamed kernel does not fit; its own follow.
"""

import json
import re
import sys

import torch
from launched import absent as on_gpu
from launched import launches, run_tool, usage

from squeeze.kernels.sparse_gemv import streamed as launcher
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
# Outputs, inputs, dtype, whether there is a bias: of the streamed kernel.
STREAMED = (
    (4096, 4096, torch.bfloat16, True),
    (14336, 4096, torch.bfloat16, False),
    (4096, 14336, torch.float16, True),
    (1000, 777, torch.float16, False),
)


def absent(*shape, dtype):
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def ahead(code):
    """Reads of 16 bytes that the loop's body starts before its barrier."""
    body = code[code.index(".L_x_0:") :]
    return len(re.findall(r"LDG\.\S*128", body[: body.index("BAR.SYNC")]))


def streamed(capability, outputs, inputs, dtype, biased):
    """Compile a case of the streamed kernel; its kernels and instructions."""
    weight = on_gpu(inputs, outputs, dtype=dtype).t()
    bias = on_gpu(outputs, dtype=dtype) if biased else None
    x, threshold = on_gpu(1, inputs, dtype=dtype), on_gpu(inputs, dtype=torch.float32)
    with launches(capability) as made:
        launcher.sparse_gemv(x, weight, threshold, bias)
    for name, compiled in made:
        facts = {"kernel": name, "case": [1, outputs, inputs, str(dtype)], **usage(compiled)}
        if name == "multiply":
            code = run_tool(compiled, "nvdisasm", "-c")
            facts["copies"] = len(re.findall(r"LDGSTS\S*128", code))
            facts["early_copies"] = len(re.findall(r"LDGSTS", code.split("ACQBULK", 1)[0]))
            facts["votes"] = code.count("VOTE")
        yield facts


def main():
    """Compile each case and describe its kernels."""
    capability = int(sys.argv[1])
    for case in STREAMED:
        for facts in streamed(capability, *case):
            print(json.dumps(facts), flush=True)
    for case in CASES:
        rows, outputs, inputs, dtype, biased = case
        weight = absent(inputs, outputs, dtype=dtype).t()
        bias = absent(outputs, dtype=dtype) if biased else None
        x, threshold = absent(rows, inputs, dtype=dtype), absent(inputs, dtype=torch.float32)
        with launches(capability) as made:
            sparse_gemv(x, weight, threshold, bias)
        for name, compiled in made:
            facts = {"kernel": name, "case": [*case[:3], str(dtype)], **usage(compiled)}
            if name == "_gemv_kernel" and inputs >= 4096:
                facts["ahead"] = ahead(run_tool(compiled, "nvdisasm", "-c"))
            print(json.dumps(facts), flush=True)


main()
