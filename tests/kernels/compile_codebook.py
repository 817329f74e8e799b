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
    "packed_query": "*bf16",
    "shift": "*fp32",
    "key_table": "*i64",
    "value_table": "*i64",
    "key_codebook": "*fp16",
    "value_codebook": "*fp16",
    "block_counts": "*i32",
    "exact_keys": "*bf16",
    "exact_values": "*bf16",
    "exact_counts": "*i32",
    "partial": "*fp32",
    "maxima": "*fp32",
    "totals": "*fp32",
}
INTEGERS = ("kv_heads", "groups", "steps", "splits", "columns")


STRIDES = ("query", "packed_query", "key", "value")


def compile_kernel(capability, tokens):
    """Compile with all options on."""
    constants = {"W": codebook.WARPS, "TOKENS": tokens, "PER_BLOCK": 128 // tokens}
    constants |= {"HAS_SHIFT": True, "HAS_SOFTCAP": True}
    signature = POINTERS | {f"{name}_strides": ("i32",) * 3 for name in STRIDES}
    signature |= {"scaling": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(constants, "constexpr")
    names = attend.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS}
    for name in STRIDES:
        place = names.index(f"{name}_strides")
        aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(3)}
    source = GluonASTSource(
        attend,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": codebook.WARPS, "maxnreg": codebook.REGISTERS}
    return triton.compile(source, target=target, options=options)


def count_loop(cubin):
    """Count the instructions of the longest loop by name.

    A jump back over an exit closes no loop: it returns from a wait that was moved out of line.
    """
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
            if "EXIT" not in names[start:]:
                longest = max(longest, (len(names) - start, start))
    size, start = longest
    return collections.Counter(names[start : start + size])


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        compiled = compile_kernel(int(sys.argv[1]), int(argument))
        result = {"tokens": int(argument), "shared": compiled.metadata.shared}
        result |= inspect(compiled.asm["cubin"])
        print(json.dumps(result | {"loop": count_loop(compiled.asm["cubin"])}), flush=True)
