import os

import pytest
import torch

from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.binary_spectral import BinarySpectral
from squeeze.quant.kv.ternary import Ternary
from tests.kernels.tile_cases import Case, check, compiled, interpreted

QUARTER, HALF = BinarySpectral(0.25), BinarySpectral(0.5, group_size=32)
CASES = [
    Case(QUARTER, QUARTER, length=128, shifted=True),
    Case(HALF, HALF, length=64, kv_heads=1, groups=4, steps=2),
    Case(BinarySpectral(0.125), Ternary(), length=128, size=80, groups=1),
    Case(Affine(4, "channel", 64), QUARTER, length=256, kv_heads=1, groups=7, softcap=3.0),
    Case(QUARTER, HALF, length=128, size=128, dtype=torch.float16, kv_heads=1),
    Case(
        BinarySpectral(0.25, protected=2),
        BinarySpectral(0.5, group_size=32, protected=4),
        length=256,
        kv_heads=1,
        groups=3,
        shifted=True,
    ),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    check(case, seed=CASES.index(case))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize(
    "names",
    [
        ("spectral:90",),
        pytest.param(
            ("spectral:80", "spectral_half:90", "spectral_mixed:90", "spectral_protected:90"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kernel_compiles_without_a_gpu(names):
    compiled(*names)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("format", [QUARTER, HALF, BinarySpectral(protected=4)], ids=str)
def test_kernel_on_the_gpu_matches_float64(format, size):
    case = Case(format, format, length=128, size=size, groups=4, blocks=(11, 4), exact=(130, 64))
    for dtype in (torch.bfloat16, torch.float16):
        check(Case(**{**vars(case), "dtype": dtype}), device="cuda")
