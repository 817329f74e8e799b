"""Compile the kernels for GPUs that need not be here, and print registers and spills as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import re
import sys

import torch
import triton
import triton.language as tl
from launched import absent, launches, run_tool, usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from squeeze.kernels.lut_linear import few_rows, whole_rows, wide_rows
from squeeze.kernels.lut_linear import triton as kernel
from squeeze.types import ClusteredWeight

POINTERS = dict.fromkeys(("x", "y", "bias", "dense"), "*bf16") | {
    "indices": "*i32",
    "scale": "*fp16",
}
SIZES = ("out_features", "in_features", "x_stride", "m_total")
# Bits, entries, rows of x and shape of the weight.
FEW = (
    (2, "int8", 1, (4096, 14336)),
    (3, "int8", 1, (14336, 4096)),
    (4, "int8", 1, (4096, 4096)),
    (4, "int8", 1, (4096, 14336)),
    (2, "int8", 4, (333, 1000)),
    (3, "int8", 4, (4096, 4096)),
    (4, "int8", 4, (14336, 4096)),
    (2, "int8", 16, (14336, 4096)),
    (3, "int8", 16, (333, 1000)),
    (4, "int8", 16, (4096, 14336)),
    (4, "float16", 1, (333, 1000)),
    (4, "float16", 4, (4096, 4096)),
    (4, "float16", 16, (14336, 4096)),
)

WIDE = (
    (4, "int8", 16, (14336, 4096)),
    (4, "int8", 8, (4096, 4096)),
    (4, "int8", 16, (4096, 14336)),
    (3, "int8", 16, (333, 1000)),
    (4, "float16", 16, (4096, 14336)),
    (2, "int8", 32, (14336, 4096)),
    (4, "float16", 32, (4096, 4096)),
    (4, "int8", 64, (4096, 14336)),
)
DECODED = ((2, "int8"), (3, "int8"), (4, "int8"), (4, "float16"))


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


def weight(bits, entries, shape):
    """A packed weight without memory, a codebook per row."""
    rows, columns = shape
    codebook = absent(rows, 1, 2**bits, dtype=getattr(torch, entries))
    scale = absent(rows, dtype=torch.float16) if entries == "int8" else None
    indices = absent(rows, -(-columns // 32) * bits, dtype=torch.int32)
    return ClusteredWeight(indices, codebook, scale, bits, shape, 1, columns)


def by_warps(case):
    """What the launcher starts for few rows of x: bfloat16 and a bias, or float16 and none."""
    bits, entries, rows, shape = case
    dtype = torch.float16 if bits == 3 else torch.bfloat16
    bias = None if bits == 3 else absent(shape[0], dtype=dtype)
    with launches(90) as made:
        few_rows.lut_linear(absent(rows, shape[1], dtype=dtype), weight(bits, entries, shape), bias)
    for name, compiled in made:
        facts = {"kernel": name, "case": case, **usage(compiled)}
        facts["warps"] = compiled.metadata.num_warps
        if name == "multiply":
            facts |= instructions(run_tool(compiled, "nvdisasm", "-c"))
        yield facts


def by_warpgroups():
    """What the launchers start for more rows of x, and to decode."""
    for case in WIDE:
        bits, entries, rows, shape = case
        x = absent(rows, shape[1], dtype=torch.bfloat16)
        with launches(90) as made:
            wide_rows.lut_linear(x, weight(bits, entries, shape), None)
        for name, compiled in made:
            facts = {"kernel": name, "case": case, "wide": True, **usage(compiled)}
            facts["warps"] = compiled.metadata.num_warps
            if name == "multiply":
                facts |= instructions(run_tool(compiled, "nvdisasm", "-c"))
            yield facts
    for bits, entries in DECODED:
        with launches(90) as made:
            dense = absent(4096, 4096, dtype=torch.bfloat16)
            whole_rows.decode(weight(bits, entries, (4096, 4096)), dense)
        for name, compiled in made:
            yield {"kernel": name, "wide": True, **usage(compiled)}


def instructions(code):
    """Copies of weights before the wait for the kernel before, and products of bytes after it."""
    before, after = code.split("ACQBULK", 1)
    return {
        "early": len(re.findall(r"LDGSTS\S*128", before)),
        "products": len(re.findall(r"IMMA\.16832\.S8\.S8", after)),
        "early_products": before.count("IMMA") + before.count("IGMMA"),
        "warpgroup_products": after.count("IGMMA"),
        "cluster_barriers": code.count("UCGABAR"),
    }


def main():
    """Compile what the launchers choose, for each capability given."""
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
    if "90" in sys.argv[1:]:
        rows += [facts for case in FEW for facts in by_warps(case)]
        rows += by_warpgroups()
    print(json.dumps(rows))


main()
