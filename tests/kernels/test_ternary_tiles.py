import os

import pytest
import torch

from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.ternary import Ternary
from tests.kernels.tile_cases import Case, check, compiled, interpreted

CHANNEL, TOKEN = Ternary("channel", 128), Ternary("token", 64)
CASES = [
    Case(CHANNEL, CHANNEL, length=128, shifted=True),
    Case(TOKEN, TOKEN, length=128, kv_heads=1, groups=4),
    Case(Ternary("channel", 32), Ternary("token", 40), length=128, size=80, groups=1, steps=2),
    Case(Ternary("token", 16), Ternary("channel", 64), length=128, kv_heads=1, softcap=3.0),
    Case(Affine(4, "channel", 64), CHANNEL, length=256, kv_heads=1, groups=7),
    Case(CHANNEL, CHANNEL, length=128, size=128, dtype=torch.float16, kv_heads=1, steps=2),
    Case(TOKEN, Ternary("channel", 64), length=256, dtype=torch.float16, kv_heads=1),
    Case(Ternary(protected=4), Ternary(protected=2), length=128, size=80, shifted=True),
    Case(Ternary("token", 64, protected=2), Ternary("token", 16, protected=6), length=256),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    check(case, seed=CASES.index(case))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize(
    "names",
    [
        ("ternary:90",),
        pytest.param(
            ("ternary:80", "ternary_token:90", "ternary_mixed:90", "ternary_protected:90"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kernel_compiles_without_a_gpu(names):
    compiled(*names)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(
    "format",
    [CHANNEL, Ternary("token", 16), Ternary("channel", 32), Ternary(protected=8)],
    ids=str,
)
def test_kernel_on_the_gpu_matches_float64(format, size):
    case = Case(format, format, length=128, size=size, groups=4, blocks=(11, 4), exact=(130, 64))
    for dtype in (torch.bfloat16, torch.float16):
        check(Case(**{**vars(case), "dtype": dtype}), device="cuda")
