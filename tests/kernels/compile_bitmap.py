"""Compile ``gluon_bitmap.attend`` without a GPU; print registers, stack and instructions as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

import triton
from compile_codebook import count_loop
from compile_decode_attention import POINTERS, inspect
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from squeeze.kernels.decode_attention import bitmap, streamed
from squeeze.kernels.decode_attention.gluon_bitmap import attend

INTEGERS = ("kv_heads", "groups", "steps", "exact_splits", "splits")


def compile_kernel(capability, keys, values, programs):
    """Compile as it is launched for blocks of 128 tokens; survivors of a group of both sides."""
    names = attend.arg_names
    constants = {"SLOTS": bitmap.EXACT_SLOTS, "PER_BLOCK": 2, "HAS_SHIFT": True}
    constants |= {"KEY_FAR": keys - 4, "VALUE_FAR": values - 4, "HAS_SOFTCAP": False}
    constants["OVERLAP"] = capability >= 90
    signature = {name: text.format("bf16") for name, text in POINTERS.items()}
    signature |= dict.fromkeys(("key_tables", "value_tables"), ("*i64",) * 3)
    signature |= {name: ("i32",) * 3 for name in names if name.endswith("strides")}
    signature |= {"scaling": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = {}
    for i, name in enumerate(names):
        if name in POINTERS:
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("strides"):
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
    source = GluonASTSource(
        attend,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": 1, "maxnreg": streamed.registers(programs)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compiled = compile_kernel(*map(int, argument.split(":")))
        result = {"case": argument, "shared": compiled.metadata.shared}
        result |= inspect(compiled.asm["cubin"])
        print(json.dumps(result | {"loop": count_loop(compiled.asm["cubin"])}), flush=True)
