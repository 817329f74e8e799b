"""Compile the kernels for GPUs that need not be here, and print registers and spills as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from squeeze.kernels.lut_linear import triton as kernel

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
POINTERS = dict.fromkeys(("x", "y", "bias", "dense"), "*bf16") | {
    "indices": "*i32",
    "scale": "*fp16",
}
SIZES = ("out_features", "in_features", "x_stride", "m_total")


def build(name, capability, *, bits, codebook="*i8", registers=True, **constants):
    """Compile one kernel with bfloat16 operands for one compute capability."""
    function = getattr(kernel, f"_{name}_kernel")
    constants = {
        "u": 128, "M": 1, "ROWS": 1, "COLUMNS": 4096, "BLOCKS": 1, "BITS": bits,
        "REGISTERS": registers, "SCALED": codebook == "*i8", "BIASED": True, "DOT": tl.bfloat16,
        "BM": 16, "BN": 16, "BJ": 128, "SPLIT": 1,
    } | constants  # fmt: skip
    types = POINTERS | {"codebook": codebook} | dict.fromkeys(SIZES, "i32")
    names = function.arg_names
    signature = {arg: types.get(arg, "constexpr") for arg in names}
    values = {(names.index(arg),): value for arg, value in constants.items() if arg in names}
    source = ASTSource(function, signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def usage(compiled):
    """Registers and bytes of stack (spills) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text)[1]),
    }


def main():
    """Compile what the launchers choose for a 4096-wide layer, for each capability given."""
    wide = {"BN": 64, "BJ": 32}
    every = [("vector", {"bits": 4}), ("matrix", {"bits": 4, **wide}), ("dense", {"bits": 3})]
    more = [
        ("vector", {"bits": 3, "M": 4, "BN": 8}),
        ("matrix", {"bits": 3, "BM": 64, **wide}),
        ("matrix", {"bits": 6, "registers": False, **wide}),
        ("vector", {"bits": 3, "registers": False, "BLOCKS": 64, "COLUMNS": 64, "BN": 8}),
    ]
    rows = []
    for capability in map(int, sys.argv[1:]):
        for name, options in every + (more if capability == 90 else []):
            compiled = build(name, capability, **options)
            facts = {"kernel": name, "capability": capability, **options, **usage(compiled)}
            facts["packed"] = options.get("registers", True)
            facts["lookups"] = compiled.asm["ptx"].count("0x4B000000")
            rows.append(facts)
    print(json.dumps(rows))


main()
