import os

import pytest
import torch

from squeeze.quant.kv._raw import RawBlocks
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.float8 import Float8
from tests.kernels.tile_cases import Case, check, compiled, interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
float8 = pytest.importorskip("squeeze.kernels.decode_attention.tiles.float8")

TOKEN, HEAD = Float8("token"), Float8("head")
CASES = [
    Case(TOKEN, TOKEN, shifted=True),
    Case(HEAD, HEAD, length=128, size=128, kv_heads=1, groups=4),
    Case(TOKEN, TOKEN, length=32, size=80, groups=1, steps=2, softcap=3.0),
    Case(TOKEN, RawBlocks(), groups=7, kv_heads=1, steps=3),
    Case(Affine(4, "channel", 64), HEAD, length=128, groups=4),
    Case(TOKEN, TOKEN, dtype=torch.float16, steps=2, shifted=True),
    Case(HEAD, TOKEN, length=256, dtype=torch.float16, kv_heads=1, size=96),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    check(case, seed=CASES.index(case))


@triton.jit
def read(codes, bits, SHIFT: tl.constexpr):
    index = tl.arange(0, 256)
    tl.store(bits + index, float8._shifted(tl.load(codes + index), SHIFT).to(tl.int16))


@interpreted
@pytest.mark.parametrize(("dtype", "factor"), [("float16", 2.0**8), ("bfloat16", 2.0**120)])
def test_every_code_is_read_as_its_number(dtype, factor):
    codes = torch.arange(256).to(torch.uint8)
    bits = torch.empty(256, dtype=torch.int16)
    read[(1,)](codes, bits, 4 if dtype == "bfloat16" else 7)
    numbers = bits.view(getattr(torch, dtype)).double() * factor
    expected = codes.view(torch.float8_e4m3fn).double()
    known = ~expected.isnan()
    assert known.sum() == 254
    assert torch.equal(numbers[known], expected[known])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize(
    "names",
    [
        ("float8:90",),
        pytest.param(("float8:80", "float8_half:90", "float8_80:90"), marks=pytest.mark.slow),
    ],
)
def test_kernel_compiles_without_a_gpu(names):
    compiled(*names)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("format", [TOKEN, HEAD], ids=str)
def test_kernel_on_the_gpu_matches_float64(format, size):
    case = Case(format, format, length=128, size=size, groups=4, blocks=(11, 4), exact=(130, 64))
    for dtype in (torch.bfloat16, torch.float16):
        check(Case(**{**vars(case), "dtype": dtype}), device="cuda")
