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

from squeeze.kernels.integer_linear import triton as kernel

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
POINTERS = dict.fromkeys(("x", "y", "bias", "dense"), "*bf16") | {
    "codes": "*i32",
    "scale": "*fp16",
    "zero": "*u8",
    "exponents": "*i8",
}
SIZES = ("out_features", "in_features", "steps", "x_stride", "m_total")


def build(name, capability, *, bits, **constants):
    """Compile one kernel with bfloat16 operands for one compute capability."""
    function = getattr(kernel, f"_{name}_kernel")
    constants = {
        "u": 4, "M": 1, "BITS": bits, "ASYMMETRIC": False, "SCALED": False, "BIASED": True,
        "DOT": tl.bfloat16, "BM": 16, "BN": 16, "BT": 128, "SPLIT": 1,
    } | constants  # fmt: skip
    types = POINTERS | dict.fromkeys(SIZES, "i32")
    names = function.arg_names
    signature = {arg: types.get(arg, "constexpr") for arg in names}
    values = {(names.index(arg),): value for arg, value in constants.items() if arg in names}
    source = ASTSource(function, signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def usage(compiled):
    """Registers and bytes of stack (spills) per thread, and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            )
            for option in ("-res-usage", "-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", text.stdout)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text.stdout)[1]),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code.stdout, re.M)),
    }


def main():
    """Compile what the launchers choose for groups of 128, for each capability given."""
    wide = {"BN": 64, "BT": 32}
    every = [("vector", {"bits": 4, "BN": 8}), ("matrix", {"bits": 4, **wide})]
    more = [
        ("dense", {"bits": 3}),
        ("vector", {"bits": 3, "M": 4, "BN": 8, "ASYMMETRIC": True}),
        ("matrix", {"bits": 8, "BM": 64, "SCALED": True, **wide}),
    ]
    rows = []
    for capability in map(int, sys.argv[1:]):
        for name, options in every + (more if capability == 90 else []):
            facts = usage(build(name, capability, **options))
            rows.append({"kernel": name, "capability": capability, **options, **facts})
    print(json.dumps(rows))


main()
