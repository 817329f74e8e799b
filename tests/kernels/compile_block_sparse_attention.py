"""Compile the Hopper kernel of block-sparse attention without a GPU and count what it takes.

Run as ``python compile_block_sparse_attention.py '[rows, listed, columns, "int8"]'``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from squeeze.kernels.block_sparse_attention import gluon, hopper

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
NAMES = {gl.bfloat16: "bf16", gl.int8: "i8", gl.float8e4nv: "fp8e4nv"}
TYPES = {
    **dict.fromkeys(("query", "keys", "values", "out"), "*bf16"),
    **dict.fromkeys(("lse", "key_scales", "value_scales", "key_means"), "*fp32"),
    **dict.fromkeys(("block_offsets", "block_ids", "column_offsets", "column_ids"), "*i32"),
    "starts": "*i64",
    "scale": "fp32",
}


def described(dtype, shape):
    """Name a tensor descriptor's type as the compiler does."""
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return f"tensordesc<{NAMES[dtype]}{shape},{layout!r}>"


def compile_kernel(rows, listed, columns, to, D=128):
    """Compile what ``hopper.attend`` launches for bfloat16 queries and left padding."""
    options = hopper.settings(rows, hopper.KINDS[to], columns)
    constants = {
        "H": 32, "GROUPS": 4, "D": D, "BLOCK_D": D, "HAS_STARTS": True, "LISTED": listed,
        "COLUMNS": columns, "KIND": hopper.KINDS[to], "CONSUMERS": rows // 64,
        "STAGES": options.stages, "OVERLAP": options.overlap, "q_d": 1,
        "CONSUMER_REGISTERS": options.consumer, "PRODUCER_REGISTERS": options.producer,
    }  # fmt: skip
    if to is None:
        tables = [described(gl.bfloat16, [1, 1, rows, D])] * 2
    else:
        narrow = gl.int8 if to == "int8" else gl.float8e4nv
        tables = [described(narrow, [rows, D]), described(gl.float8e4nv, [D, rows])]
    types = TYPES | dict(zip(("k_desc", "v_desc"), tables, strict=True))
    names = gluon.attend.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n][0] == "*" or (n[:2] in ("q_", "k_", "v_") and signature[n] == "i32")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    limit = {} if options.limit is None else {"maxnreg": options.limit}
    return triton.compile(
        GluonASTSource(gluon.attend, signature, values, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4} | limit,
    )


def count(compiled):
    """Return stack bytes of a thread, shared bytes, and instructions on the tensor cores."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [os.path.join(TOOLS, tool), option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return {
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "products": len(re.findall(r"\b[HIQ]GMMA\b", code)),
    }


if __name__ == "__main__":
    print(json.dumps(count(compile_kernel(*json.loads(sys.argv[1])))))
