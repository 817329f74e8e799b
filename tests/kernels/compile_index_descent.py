"""Compile the kernel of descent over indices as it is launched, for a GPU that need not be here.

Run by a test in a process of its own, because the interpreter and the compiler exclude each other.
Prints one line of JSON per kernel; argument: the compute capability times ten.
"""

import json
import sys
from unittest import mock

import torch
from launched import absent, launches, usage

from squeeze.kernels.index_descent.triton import descend

# Groups, rows of each, columns, runs, entries. One block of columns: all others are like it.
CASES = ((1, 4096, 64, 1, 16), (4, 1024, 64, 1, 8), (2, 75, 40, 3, 256))


def main():
    """Compile each case and describe its kernel."""
    for groups, height, size, runs, entries in CASES:
        dense, values = (absent(size, groups, height, dtype=torch.float32) for _ in range(2))
        found = absent(size, groups, height, dtype=torch.int64)
        hessian = absent(groups, size, size, dtype=torch.float32)
        tables = absent(groups, height, runs, entries, dtype=torch.float32)
        equal = mock.patch.object(torch, "equal", return_value=True)  # there is nothing to compare
        with launches(int(sys.argv[1])) as made, equal:
            descend(dense, hessian, tables, values, found, -(-size // runs), 1)
        for name, compiled in made:
            facts = {"kernel": name, "case": [groups, height, size, runs, entries]}
            print(json.dumps(facts | usage(compiled)), flush=True)


main()
