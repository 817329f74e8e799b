"""Compile the sparse-input kernels for GPUs that need not be here, and print what they take.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from squeeze.kernels.sparse_gemv import triton as kernel

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TYPES = {
    "x": "*bf16", "weight": "*bf16", "bias": "*bf16", "threshold": "*fp32", "scratch": "*i32",
    "partial": "*fp32", "size": "i32", "out_features": "i32", "in_features": "i32",
    "x_stride": "i32", "column_stride": "i32",
}  # fmt: skip
ALIGNED = ("x", "weight", "bias", "threshold", "scratch", "partial", "y", "out_features",
           "column_stride")  # fmt: skip


def build(name, capability, y, **constants):
    """Compile one kernel with bfloat16 operands, pointers and sizes divisible by 16."""
    function = getattr(kernel, f"_{name}_kernel")
    names = function.arg_names
    types = TYPES | {"y": y}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in names}
    values = {(names.index(arg),): value for arg, value in constants.items()}
    hints = {(names.index(a),): [["tt.divisibility", 16]] for a in ALIGNED if a in names}
    source = ASTSource(function, signature, constexprs=values, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def run_tool(compiled, *command):
    """What a tool prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        full = [os.path.join(TOOLS, command[0]), *command[1:], file.name]
        return subprocess.run(full, capture_output=True, text=True, check=True).stdout


def main():
    """Compile what the launcher chooses for one row and for four, and the sum."""
    rows = []
    for capability in map(int, sys.argv[1:]):
        for m in (1, 4):
            options = {"M": m, "SPLIT": 4, "CHANNELS": 1024, "BK": 64 // m, "BN": kernel.BN}
            compiled = build("gemv", capability, "*fp32", BIASED=True, **options)
            rows.append({"kernel": "gemv", "capability": capability, **facts(compiled), **options})
        options = {"SPLIT": 4, "BLOCK": 256}
        compiled = build("sum", capability, "*bf16", BIASED=True, **options)
        rows.append({"kernel": "sum", "capability": capability, **facts(compiled), **options})
    print(json.dumps(rows))


def facts(compiled):
    """Registers, bytes of stack (spills) per thread, and 16-byte loads."""
    text = run_tool(compiled, "cuobjdump", "-res-usage")
    code = run_tool(compiled, "nvdisasm", "-c")
    if os.environ.get("DUMP"):
        print(code, file=sys.stderr)
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text)[1]),
        "wide_loads": len(re.findall(r"LDG\.\S*128", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    }


main()
