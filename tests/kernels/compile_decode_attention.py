"""Compile the kernel for GPUs that need not be here, and print registers and spills as JSON.

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
from triton.experimental.gluon._runtime import GluonASTSource

from squeeze.kernels.decode_attention import gluon, streamed, tuning
from squeeze.kernels.decode_attention import triton as kernel
from squeeze.quant.kv._raw import RawBlocks
from squeeze.quant.kv.affine import Affine

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
POINTERS = {
    "query": "*{0}",
    "packed_query": "*{0}",
    "shift": "*fp32",
    "block_counts": "*i32",
    "exact_keys": "*{0}",
    "exact_values": "*{0}",
    "exact_counts": "*i32",
    "partial": "*fp32",
    "maxima": "*fp32",
    "totals": "*fp32",
}
# Keys, values, block length, head size, rows of a tile, dtype.
CASES = {
    "tiny": (Affine(4, "token", 32), Affine(4, "token", 32), 32, 32, 16, "bf16"),
    "default": (Affine(4, "channel", 64), Affine(4, "token", 64), 128, 128, 8, "bf16"),
    "wide": (Affine(4, "channel", 128), Affine(4, "token", 128), 128, 128, 8, "bf16"),
    "short": (Affine(4, "channel", 64), Affine(4, "token", 64), 64, 64, 8, "bf16"),
    "two": (Affine(2, "channel", 32), Affine(2, "token", 64), 128, 128, 8, "bf16"),
    "three": (Affine(3, "channel", 128), Affine(3, "token", 40), 128, 80, 16, "bf16"),
    "eight": (Affine(8, "channel", 64), Affine(8, "token", 64, True), 128, 128, 8, "bf16"),
    "swapped": (Affine(4, "token", 32), Affine(4, "channel", 32), 128, 128, 16, "fp16"),
    "raw": (RawBlocks(), Affine(2, "token", 32), 64, 128, 64, "bf16"),
}
# Keys, values, block length, head size, columns, programs of a processor.
STREAMED = {
    "streamed_four": (Affine(4, "channel", 64), Affine(4, "token", 64), 128, 128, 8, 12),
    "streamed_wide": (Affine(4, "channel", 128), Affine(4, "token", 128), 128, 128, 8, 12),
    "streamed_two": (Affine(2, "channel", 64), Affine(2, "token", 64), 128, 128, 8, 12),
    "streamed_eight": (Affine(8, "token", 64), Affine(8, "token", 64, True), 64, 64, 16, 8),
}


def compile_streamed(case, capability):
    """Compile the streaming kernel as it is launched."""
    keys, values, length, size, columns, programs = case
    sides = streamed.pieces([streamed.describe(item, length, size) for item in (keys, values)])
    names = gluon.attend.arg_names
    constants = {"D": size, "N": columns, "SLOTS": 64, "HAS_SHIFT": True, "HAS_SOFTCAP": False}
    constants["OVERLAP"] = capability >= 90
    constants |= {"KEYS": sides[0], "VALUES": sides[1]}
    signature = {name: text.format("bf16") for name, text in POINTERS.items()}
    for name, side in zip(("key_tables", "value_tables"), sides, strict=True):
        signature[name] = ("*i64",) * (2 + side[5])
    signature |= {name: ("i32",) * 3 for name in names if name.endswith("strides")}
    signature |= {"scaling": "fp32", "softcap": "fp32"}
    counts = ("kv_heads", "groups", "steps", "exact_splits", "splits")
    signature |= dict.fromkeys(counts, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = {}
    for i, name in enumerate(names):
        if name in POINTERS:
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("strides"):
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
    source = GluonASTSource(
        gluon.attend,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": 1, "maxnreg": streamed.registers(programs)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": compiled.metadata.shared} | inspect(compiled.asm["cubin"])


def compile_case(case, capability, warps=None, stages=None):
    """Return warps, registers, stack bytes and shared memory of one compiled kernel."""
    keys, values, length, size, tile, dtype = case
    sides = [kernel.describe_side(item, length, size) for item in (keys, values)]
    constants = kernel.constants(
        sides[0], sides[1], size=size, tile=tile, packed=True, shifted=True, capped=False
    )
    signature = {name: text.format(dtype) for name, text in POINTERS.items()}
    for name, side, item in zip(("key_tables", "value_tables"), sides, (keys, values), strict=True):
        absent = 1 if getattr(item, "symmetric", False) else 0
        signature[name] = ("*i64",) * (len(side.module.COMPONENTS) - absent)
    for name in kernel._attend.arg_names:
        if name.endswith("strides"):
            signature[name] = ("i32",) * 3
    signature |= {"scaling": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(("kv_heads", "groups", "steps", "splits"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    names = kernel._attend.arg_names
    aligned = {}
    for i, name in enumerate(names):
        if name in POINTERS:
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("strides"):
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
    source = ASTSource(
        kernel._attend,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    chosen = tuning.default(max(side.warps for side in sides), tile)
    warps = warps or chosen.warps
    options = {"num_warps": warps, "num_stages": stages or chosen.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"warps": warps, "shared": compiled.metadata.shared} | inspect(compiled.asm["cubin"])


def compile_merge(capability):
    """Compile the second kernel for heads of 80 and 17 splits."""
    names = kernel._merge.arg_names
    constants = {"D": 80, "ALL": 32, "WIDTH": 16, "SPLIT_OUTPUT": True, "OVERLAP": capability >= 90}
    source = ASTSource(
        kernel._merge,
        {name: "constexpr" if name in constants else "*fp32" for name in names}
        | {"exact_splits": "i32", "columns": "i32"},
        {(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return {"shared": compiled.metadata.shared} | inspect(compiled.asm["cubin"])


def inspect(cubin):
    """Read registers and stack bytes from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [os.path.join(TOOLS, "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack)}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, capability = argument.split(":")
        merge = name == "merge"
        target = int(capability)
        if name in STREAMED:
            result = compile_streamed(STREAMED[name], target)
        else:
            result = compile_merge(target) if merge else compile_case(CASES[name], target)
        print(json.dumps({"case": name, "capability": target} | result), flush=True)
