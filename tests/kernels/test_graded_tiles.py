import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeeze.kernels.decode_attention import api
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.graded import Graded
from tests.kernels.tile_cases import Case, check, interpreted

KEYS, TWO = Graded((4, 3, 1, 0)), Graded((5, 2), 64)
CASES = [
    Case(KEYS, KEYS, length=128, shifted=True),
    Case(KEYS, Affine(2, "token", 64), length=128, kv_heads=1, groups=4),
    Case(TWO, Graded((1,), 128), length=128, size=80, groups=1, steps=2),
    Case(Graded((8, 7, 6, 5)), TWO, length=128, kv_heads=1, softcap=3.0),
    Case(Graded((1,), 256), Graded((3, 0), 256), length=256, kv_heads=1, groups=7),
    Case(Graded((6, 4, 3, 2, 2, 1, 0, 0), 32), KEYS, 128, size=128, kv_heads=1, steps=2),
    Case(KEYS, TWO, length=256, dtype=torch.float16, kv_heads=1),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    check(case, seed=CASES.index(case))


SCRIPT = """
import json, sys
from compile_decode_attention import compile_case
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.graded import Graded
case = (Graded((4, 3, 1, 0)), Affine(2, "token", 64), 128, int(sys.argv[1]), 8, "bf16")
print(json.dumps(compile_case(case, 90)))
"""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize("size", ["128", pytest.param("64", marks=pytest.mark.slow)])
def test_kernel_compiles_without_a_gpu(size):
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    paths = [str(Path(api.__file__).parents[3]), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", SCRIPT, size]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Bytes of stack; 64 registers' worth would stand in the inner loop.
    assert json.loads(done.stdout)["stack"] < 256, done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("format", [KEYS, TWO, Graded((1,), 128)], ids=str)
def test_kernel_on_the_gpu_matches_float64(format, size):
    case = Case(format, format, length=128, size=size, groups=4, blocks=(11, 4), exact=(130, 64))
    for dtype in (torch.bfloat16, torch.float16):
        check(Case(**{**vars(case), "dtype": dtype}), device="cuda")
