"""Compile the encoding kernels without a GPU; print registers and stack bytes as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

import triton
from compile_decode_attention import inspect
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from squeeze.kernels.kv_encode.layout import ranges
from squeeze.kernels.kv_encode.triton import describe, describe_float8
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.float8 import Float8
from squeeze.quant.kv.graded import Graded

POINTERS = {
    "x": "*{0}",
    "codes": "*u8",
    "scale": "*fp16",
    "zero": "*fp16",
    "center": "*fp32",
    "matrix": "*fp32",
}
STRIDES = {"x_strides": 4, "code_strides": 3, "constant_strides": 3}
SLABS = 2048
# Format, whose last range is compiled, block length, head size, dtype, whether a centre is
# subtracted; "few" fill one block, "rotated" are multiplied by a matrix first.
CASES = {
    "four": (Affine(4, "channel", 64), 128, 128, "bf16", True),
    "few": (Affine(4, "channel", 128), 128, 128, "bf16", False),
    "few_token": (Affine(4, "token", 64), 128, 128, "bf16", False),
    "four_token": (Affine(4, "token", 64), 128, 128, "bf16", False),
    "wide": (Affine(4, "channel", 128), 128, 128, "bf16", False),
    "wide_token": (Affine(4, "token", 128), 128, 128, "bf16", False),
    "two": (Affine(2, "channel", 128), 128, 128, "bf16", False),
    "two_token": (Affine(2, "token", 32, True), 128, 128, "fp16", False),
    "three": (Affine(3, "channel", 256), 256, 128, "bf16", False),
    "three_token": (Affine(3, "token", 40), 128, 80, "bf16", False),
    "eight": (Affine(8, "channel", 64, True), 128, 256, "bf16", False),
    "eight_token": (Affine(8, "token", 256), 64, 256, "fp32", False),
    "graded": (Graded((4, 0)), 128, 128, "fp32", False),
    "graded_one": (Graded((1,)), 128, 128, "bf16", False),
    "graded_two": (Graded((4, 2)), 128, 128, "fp32", True),
    "few_rotated": (Graded((4, 0)), 128, 128, "bf16", True),
    "rotated": (Graded((4, 0)), 128, 128, "bf16", True),
    "rotated_wide": (Affine(4, "channel", 128), 128, 128, "fp32", True),
    "rotated_one": (Graded((1,)), 128, 128, "bf16", True),
    "rotated_two": (Graded((4, 2)), 128, 128, "bf16", True),
    "rotated_three": (Affine(3, "channel", 256), 256, 128, "fp16", False),
    "float8": (Float8("token"), 128, 128, "bf16", False),
    "float8_head": (Float8("head"), 128, 256, "bf16", True),
}


def compile_case(case, capability, slabs=SLABS, rotated=False):
    """Compile one kernel as it is launched."""
    item, length, size, dtype, centered = case
    if isinstance(item, Float8):
        launch = describe_float8(item, slabs, length, size, centered)
    else:
        launch = describe(ranges(item, size)[-1], slabs, length, size, centered, rotated)
    names = launch.kernel.arg_names
    signature = {name: text.format(dtype) for name, text in POINTERS.items()}
    signature |= {name: ("i32",) * count for name, count in STRIDES.items()}
    signature |= {"batch": "i32", "kv_heads": "i32"} | dict.fromkeys(launch.constants, "constexpr")
    aligned = {}
    for i, name in enumerate(names):
        if name in POINTERS:
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in STRIDES:
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(STRIDES[name])}
    source = ASTSource(
        launch.kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in launch.constants.items()},
        aligned,
    )
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, capability = argument.split(":")
        slabs = 8 if "few" in name else SLABS
        compiled = compile_case(CASES[name], int(capability), slabs, "rotated" in name)
        result = {"case": argument, "shared": compiled.metadata.shared}
        print(json.dumps(result | inspect(compiled.asm["cubin"])), flush=True)
