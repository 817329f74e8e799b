"""Compile the k-means kernel as it is launched, for a GPU that need not be here.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
Prints one line of JSON per kernel; argument: the compute capability times ten.
"""

import json
import re
import sys

import torch
from launched import absent, launches, run_tool, usage

from squeeze.kernels.kmeans1d.triton import centroids

# Rows, values, clusters, dtype, whether there are weights.
CASES = (
    (4096, 4096, 16, torch.float32, True),
    (4096, 14336, 8, torch.float32, True),
    (3, 1000, 5, torch.bfloat16, False),
)


def main():
    """Compile each case and describe its kernel."""
    for rows, n, clusters, dtype, weighted in CASES:
        values = absent(rows, n, dtype=dtype)
        weights = absent(rows, n, dtype=torch.float32) if weighted else None
        with launches(int(sys.argv[1])) as made:
            centroids(values, weights, clusters, 1e-9)
        for name, compiled in made:
            code = run_tool(compiled, "nvdisasm", "-c")
            calls = len(re.findall(r"MUFU\.RCP64H", code))
            facts = {"kernel": name, "case": [rows, n, clusters, str(dtype)], **usage(compiled)}
            print(json.dumps(facts | {"reciprocals": calls}), flush=True)


main()
