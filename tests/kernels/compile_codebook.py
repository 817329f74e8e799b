"""Compile ``gluon_codebook.attend`` without a GPU; print registers, stack and instructions as JSON.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from compile_decode_attention import TOOLS, inspect
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from squeeze.kernels.decode_attention import codebook
from squeeze.kernels.decode_attention.gluon_codebook import attend

POINTERS = {
    "query": "*bf16",
    "shift": "*fp32",
    "key_table": "*i64",
    "value_table": "*i64",
    "key_codebook": "*fp16",
    "value_codebook": "*fp16",
    "block_counts": "*i32",
    "partial": "*fp32",
    "maxima": "*fp32",
    "totals": "*fp32",
}
INTEGERS = ("kv_heads", "groups", "steps", "splits", "columns")


def compile_kernel(capability):
    """Compile with all options on."""
    constants = {"W": codebook.WARPS, "PER_BLOCK": 2, "HAS_SHIFT": True, "HAS_SOFTCAP": True}
    constants["OVERLAP"] = capability >= 90
    signature = POINTERS | {"strides": ("i32",) * 3, "scaling": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(constants, "constexpr")
    names = attend.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS}
    source = GluonASTSource(
        attend,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": codebook.WARPS})


def count_loop(cubin):
    """Count the instructions of the longest loop by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [os.path.join(TOOLS, "nvdisasm"), "-c", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    names, labels, longest = [], {}, (0, 0)
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        if code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*);", line):
            names.append(code[1])
            jump = re.search(r"\.L_x_\d+", code[2]) if code[1] == "BRA" else None
            start = labels.get(jump[0], len(names)) if jump else len(names)
            longest = max(longest, (len(names) - start, start))
    size, start = longest
    return collections.Counter(names[start : start + size])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compiled = compile_kernel(int(argument))
        result = {"capability": int(argument), "shared": compiled.metadata.shared}
        result |= inspect(compiled.asm["cubin"])
        print(json.dumps(result | {"loop": count_loop(compiled.asm["cubin"])}), flush=True)
