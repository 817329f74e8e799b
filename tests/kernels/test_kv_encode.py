import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from squeeze.errors import DeviceError
from squeeze.kernels.kv_encode import api
from squeeze.kernels.kv_encode.layout import rotates, takes
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.bitmap import Bitmap
from squeeze.quant.kv.float8 import Float8
from squeeze.quant.kv.graded import Graded
from squeeze.types import Implementation

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter, without a GPU"
)
BOTH = [Implementation.REFERENCE, pytest.param(Implementation.TRITON, marks=interpreted)]


@pytest.fixture(autouse=True)
def fused_multiply_add(monkeypatch):
    """Round once, as every GPU does: the interpreter rounds the product too."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@dataclass(frozen=True)
class Case:
    """One call: a format, ``N x B x H_kv`` blocks of a length and head size, and a dtype."""

    format: object
    blocks: tuple = (2, 1, 1)
    length: int = 128
    size: int = 64
    dtype: torch.dtype = torch.float16
    centered: bool = False


def normal(case, device="cpu"):
    """Normal values; one channel is far off, one constant, one zero, some values repeat."""
    x = 3 * torch.randn(*case.blocks, case.length, case.size, device=device)
    x[..., 5] += 600
    x[..., 7] = 1.7
    x[..., 9] = 0
    x[..., :40, 11] = 0.25
    return x.to(case.dtype)


def guarded(x):
    """View ``[N, B, H_kv, L, D]`` in NaN ``[B, T, H_kv, D]``, as a projection writes."""
    blocks, batch, heads, length, size = x.shape
    shape = (batch, blocks * length + 5, heads, size + 16)
    buffer = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[:, 3 : 3 + blocks * length, :, 8 : 8 + size].transpose(1, 2)
    view = view.unflatten(2, (blocks, length)).permute(2, 0, 1, 3, 4)
    view.copy_(x)
    return view


def same(got, expected, case=None):
    """Compare all components; NaN equals NaN, and a zero its negative."""
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        assert got[name].shape == truth.shape
        assert got[name].dtype == truth.dtype
        close = (got[name] == truth) | (got[name] != got[name]) & (truth != truth)
        where = (~close).nonzero()[:3].tolist()
        assert close.all(), f"{name} differs {int((~close).sum())} times, at {where}, {case}"


def check(case, x=None, seed=0, device="cpu"):
    """Compare the kernel with the format's own code."""
    torch.manual_seed(seed)
    x = normal(case, device) if x is None else x
    center = torch.randn(x.shape[2], x.shape[4], device=device) if case.centered else None
    expected = case.format.encode(x if center is None else x.float() - center[:, None], {})
    view = guarded(x)
    got = api.encode(case.format, view, {}, implementation=Implementation.TRITON, center=center)
    same(got, expected, case)
    return got


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
CASES = [
    Case(Affine(4, "channel", 64), (3, 1, 1), centered=True, dtype=BFLOAT16),
    Case(Affine(4, "channel", 128), (1, 3, 1), size=80),
    Case(Affine(4, "channel", 32), (1, 1, 3), size=96, length=64),
    Case(Affine(4, "channel", 256), (1, 1, 1), length=256),
    Case(Affine(2, "channel", 64), (1, 2, 1), dtype=BFLOAT16),
    Case(Affine(2, "channel", 128, True), (1, 1, 2), size=48),
    Case(Affine(3, "channel", 32), (1, 1, 2), size=40),
    Case(Affine(3, "channel", 128, True), (1, 1, 1), centered=True, dtype=FLOAT32),
    Case(Affine(8, "channel", 64), (1, 2, 1), dtype=FLOAT32),
    Case(Affine(8, "channel", 32, True), (1, 1, 2), length=32, size=80),
    Case(Affine(4, "token", 64), (1, 2, 2), dtype=BFLOAT16),
    Case(Affine(4, "token", 40), (1, 1, 3), size=80, length=96, centered=True),
    Case(Affine(4, "token", 1), (1, 1, 1), length=32, size=16, dtype=FLOAT32),
    Case(Affine(2, "token", 32, True), (2, 1, 1), size=96),
    Case(Affine(2, "token", 256), (1, 1, 1), size=256, length=32),
    Case(Affine(3, "token", 64), (1, 1, 1), dtype=BFLOAT16),
    Case(Affine(3, "token", 24, True), (1, 1, 2), size=96, length=32),
    Case(Affine(8, "token", 80), (1, 1, 3), size=80, length=32),
    Case(Graded((4, 0)), (1, 2, 1), dtype=FLOAT32),
    Case(Graded((4, 2, 1, 0)), (1, 1, 2), dtype=BFLOAT16, centered=True),
    Case(Graded((3, 1), 32), (2, 1, 1), size=80, length=96, dtype=FLOAT32),
    Case(Graded((8, 2), 64), (1, 1, 2), size=96),
    Case(Graded((1,)), (1, 2, 1), size=40, length=256, dtype=BFLOAT16),
    Case(Graded((2,), 256), (1, 1, 1), size=80, length=256),
    Case(Float8("token"), (3, 2, 1), length=32, size=80, centered=True),
    Case(Float8("token"), (1, 1, 2), length=96, dtype=BFLOAT16),
    Case(Float8("head"), (2, 1, 1), length=256, dtype=FLOAT32),
    Case(Float8("head"), (1, 1, 2), size=96, dtype=BFLOAT16),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(case):
    check(case, seed=CASES.index(case))


ROTATED = [
    Case(Graded((4, 0)), (1, 2, 2), size=32, centered=True),
    Case(Graded((4, 2, 1, 0)), (2, 1, 1), size=32, dtype=FLOAT32, centered=True),
    Case(Graded((8, 3), 64), (1, 1, 3), size=96),
    Case(Graded((4,), 32), (1, 1, 2), size=16),
    Case(Affine(2, "channel", 128, True), (1, 1, 2), size=48),
    Case(Affine(3, "channel", 64), (1, 2, 1), size=16, length=64, dtype=FLOAT32),
    Case(Affine(8, "channel", 32), (1, 1, 1), size=80, length=32, centered=True),
]


def rotation(heads, size, device="cpu", exact=True):
    """Matrices of every head: of few bits, so that no sum of ``dyadic`` rounds, or orthogonal."""
    x = torch.randn(heads, size, size, device=device)
    return (4 * x).round().clamp(-15, 15) / 8 if exact else torch.linalg.qr(x).Q.contiguous()


def dyadic(case, device="cpu"):
    """Multiples of an eighth, one channel far off, one zero."""
    shape = (*case.blocks, case.length, case.size)
    x = (torch.randn(shape, device=device) * 16).round().clamp(-63, 63) / 8
    x[..., 5] += 100
    x[..., 9] = 0
    return x.to(case.dtype)


def check_rotated(case, seed=0, device="cpu"):
    """Compare with the format's own code behind torch's product, where no sum rounds."""
    torch.manual_seed(seed)
    assert rotates(case.format, case.length, case.size)
    x, heads = dyadic(case, device), case.blocks[2]
    matrix = rotation(heads, case.size, device)
    center = torch.randn(heads, case.size, device=device) if case.centered else None
    product = (x.double() @ matrix.double()).float()
    expected = case.format.encode(product if center is None else product - center[:, None], {})
    options = {"implementation": Implementation.TRITON, "center": center, "matrix": matrix}
    same(api.encode(case.format, guarded(x), {}, **options), expected, case)


@interpreted
@pytest.mark.parametrize("case", ROTATED)
def test_a_product_in_the_kernel_equals_the_reference(case):
    check_rotated(case, seed=ROTATED.index(case))


def check_precision(blocks, device="cpu"):
    """Few codes of 8 bits differ from those of the float64 product, and then by one.

    One in twenty thousand does behind torch's float32 product, and one in fifty where the factors
    are rounded to 11 bits, as tensor cores would.
    """
    case = Case(Graded((8, 0)), blocks, size=128, dtype=BFLOAT16)
    torch.manual_seed(0)
    x = torch.randn(*blocks, 128, 128, device=device).to(case.dtype)
    matrix = rotation(blocks[2], 128, device, exact=False)
    options = {"implementation": Implementation.TRITON, "matrix": matrix}
    got = api.encode(case.format, x, {}, **options)["codes"].int()
    expected = case.format.encode(x.double() @ matrix.double(), {})["codes"].int()
    off = (got - expected).abs()
    assert off.max() <= 1
    assert off.double().mean() < 1e-3


@interpreted
def test_products_are_as_exact_as_float32():
    check_precision((1, 1, 2))


@interpreted
def test_a_rotated_special_value_spoils_its_token_alone():
    case = Case(Graded((4, 0), 32), (1, 1, 1), length=64, size=16, dtype=FLOAT32)
    torch.manual_seed(0)
    x, matrix = dyadic(case), rotation(1, 16)
    x[..., 40, 3] = torch.nan
    expected = case.format.encode(x @ matrix, {})
    got = api.encode(case.format, x, {}, implementation=Implementation.TRITON, matrix=matrix)
    same(got, expected)
    assert got["scale"].isnan().any(-1).flatten().tolist() == [False, True]


@pytest.mark.parametrize("implementation", BOTH)
def test_what_no_kernel_rotates_is_rotated_first(implementation):
    torch.manual_seed(0)
    x, matrix, center = torch.randn(1, 2, 2, 32, 24), rotation(2, 24), torch.randn(2, 24)
    for format in (Affine(4, "token", 8), Affine(4, "channel", 32), Float8()):
        assert not rotates(format, 32, 24)
        options = {"implementation": implementation, "center": center, "matrix": matrix}
        got = api.encode(format, x, {}, **options)
        same(got, format.encode(x @ matrix - center[:, None], {}))


@interpreted
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quotients_beside_halves_round_as_if_exact(bits, granularity, symmetric):
    torch.manual_seed(bits)
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    # Such steps are exact in float16, and no value is past it.
    step = (torch.rand(32, 1) * 7 + 1).half().float() * 2.0 ** torch.randint(-12, 5, (32, 1))
    halves = (torch.randint(-levels if symmetric else 0, levels, (32, 32)) + 0.5) * step
    up, down = halves.nextafter(torch.tensor(torch.inf)), halves.nextafter(torch.tensor(-torch.inf))
    x = torch.cat([halves, up, down, halves, halves], 1)[:, :128]
    x = x.clamp(-levels * step if symmetric else torch.zeros_like(step), levels * step)
    x[:, 127], x[:, 126] = levels * step[:, 0], 0
    x = x.mT if granularity == "channel" else x
    case = Case(Affine(bits, granularity, 128, symmetric), dtype=FLOAT32)
    got = check(case, x.contiguous()[None, None, None])
    assert torch.equal(got["scale"].float().flatten(), step.flatten())


def extremes():
    """Groups of 32 values: special numbers beside ordinary ones, per row."""
    x = torch.randn(12, 32)
    x[0, 3] = torch.nan
    x[1, 5], x[2, 6] = torch.inf, -torch.inf
    x[3], x[4] = 1e6, -1e6
    x[5, 0], x[5, 1] = 65504.0, -65504.0
    x[6] = 2.0**-26
    x[6, 4] = -(2.0**-40)
    x[7] *= 2.0**-24
    x[8], x[9] = 0.0, -3.7
    x[10] *= 1e5
    x[11] *= torch.finfo(FLOAT32).tiny / 8
    return x


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # a scale past float16
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    "format",
    [
        Affine(4, "channel", 32),
        Affine(3, "token", 32),
        Affine(8, "token", 32, True),
        *(Graded((bits,), 32) for bits in (1, 2, 4)),
    ],
)
def test_special_values(format, dtype):
    groups = extremes().to(dtype)
    if getattr(format, "granularity", "channel") == "channel":
        x = groups.mT.contiguous()[None, None, None]
    else:
        x = torch.zeros(32, 32, dtype=dtype)
        x[:12] = groups
        x = x[None, None, None]
    got = check(Case(format, dtype=dtype), x)
    known = ~got["scale"].isnan().flatten()[:12]
    assert known.tolist() == [False] + [True] * 11


@interpreted
def test_float8_scales_and_special_values():
    rows = torch.zeros(32, 32)
    rows[:12] = extremes()
    powers = 2.0 ** torch.arange(-30, 18, 3)
    rows[12:28, 0] = 448 * powers
    rows[28, 0], rows[29, 0] = 448.0, torch.tensor(448.0).nextafter(torch.tensor(1e9))
    got = check(Case(Float8("token"), dtype=FLOAT32), rows[None, None, None])
    assert got["scale"].flatten()[28:30].tolist() == [1.0, 2.0]


@interpreted
def test_every_bfloat16_is_cast_to_float8_as_torch_does():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BFLOAT16)
    usual = bits[(bits.abs() <= 448) & (bits.abs() >= 2.0**-18)]
    x = torch.full((32 * (len(usual) // 480 + 1), 16), 448.0, dtype=BFLOAT16)
    x[:, :15] = usual.repeat(2)[: 15 * len(x)].view(-1, 15)
    got = check(Case(Float8("token"), dtype=BFLOAT16), x[None, None, None])
    assert got["codes"].unique().numel() == 254


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("format", [Affine(4, "channel", 64), Float8(), Graded((4, 2), 64)])
def test_blocks_go_into_the_slots_given(format, implementation):
    x = torch.randn(2, 2, 1, 64, 16)
    expected = format.encode(x, {})
    segment = {
        name: torch.full((5, 4, *part.shape[2:]), 77, dtype=part.dtype)
        for name, part in expected.items()
    }
    out = {name: part[1:3, ::2] for name, part in segment.items()}
    got = api.encode(format, x, {}, implementation=implementation, out=out)
    same(got, expected)
    for name, part in segment.items():
        assert got[name].data_ptr() == out[name].data_ptr()
        same({"slots": part[1:3, ::2]}, {"slots": expected[name]})
        part[1:3, ::2] = 77
        assert part.eq(77).all(), name


@interpreted
def test_a_block_does_not_depend_on_its_neighbours():
    case = Case(Affine(3, "channel", 32), (3, 2, 2), length=32, size=16)
    x = normal(case)
    whole = api.encode(case.format, x, {}, implementation=Implementation.TRITON)
    for n, b, h in ((0, 0, 0), (2, 1, 1), (1, 0, 1)):
        index = (slice(n, n + 1), slice(b, b + 1), slice(h, h + 1))
        alone = api.encode(case.format, x[index], {}, implementation=Implementation.TRITON)
        same(alone, {name: part[index] for name, part in whole.items()})


@pytest.mark.parametrize("implementation", BOTH)
def test_no_blocks_are_encoded_to_none(implementation):
    x = torch.randn(0, 2, 3, 64, 16)
    got = api.encode(Affine(4, "channel", 64), x, {}, implementation=implementation)
    assert [part.shape[:3] for part in got.values()] == [(0, 2, 3)] * 3


@interpreted
def test_what_has_no_kernel_is_encoded_by_the_format():
    x = torch.randn(1, 1, 1, 96, 16)
    for format in (
        Graded((4, 2), 32),
        Affine(4, "channel", 32),
        Graded((5, 0), 32),
        Bitmap(),
    ):
        assert not takes(format, 96, 16)
        got = api.encode(format, x, {}, implementation=Implementation.TRITON)
        same(got, format.encode(x, {}))
    assert takes(Affine(8, "channel", 32), 96, 16)
    assert takes(Affine(3, "token", 32), 96, 32)
    assert all(takes(Affine(3, "channel", 64), length, 16) for length in (64, 128, 256, 1024))


def test_choice_of_implementation_is_explicit(monkeypatch):
    x = torch.randn(1, 1, 1, 32, 16)
    with pytest.raises(ValueError, match="auto"):
        api.encode(Float8(), x, {}, implementation=Implementation.AUTO)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DeviceError, match=r"device cpu.*CUDA device.*implementation: reference"):
        api.encode(Float8(), x, {}, implementation=Implementation.TRITON)


@interpreted
def test_what_the_kernel_would_misread_is_refused():
    def encode(x, format=Affine(4, "token", 16), **options):  # noqa: B008
        return api.encode(format, x, {}, implementation=Implementation.TRITON, **options)

    x = torch.randn(1, 1, 2, 32, 16)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        encode(x.double())
    with pytest.raises(ValueError, match="adjacent"):
        encode(x.repeat(1, 1, 1, 1, 2)[..., ::2])
    with pytest.raises(ValueError, match="16 tokens are no multiple of 32"):
        encode(x[..., :16, :])
    with pytest.raises(ValueError, match="groups of 3 do not divide 16"):
        encode(x, Affine(4, "token", 3))
    with pytest.raises(ValueError, match=r"center must be contiguous float32 \(2, 16\)"):
        encode(x, center=torch.zeros(16))
    with pytest.raises(ValueError, match=r"matrix must be contiguous float32 \(2, 16, 16\)"):
        encode(x, Affine(4, "channel", 32), matrix=torch.zeros(2, 16, 16).mT)
    out = encode(x)
    with pytest.raises(ValueError, match=r"out scale is torch\.float32"):
        encode(x, out=out | {"scale": out["scale"].float()})
    with pytest.raises(ValueError, match="out codes must be contiguous"):
        encode(x, out=out | {"codes": out["codes"].mT.contiguous().mT})


def test_importing_the_api_loads_no_kernel():
    code = (
        "import sys, squeeze.kernels.kv_encode.api;"
        "assert not any(n.startswith('squeeze') and 'triton' in n for n in sys.modules)"
    )
    root = str(Path(api.__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPILED = [
    ("four:90", "four_token:80"),
    pytest.param(("few:90", "few_token:90", "wide:90", "wide_token:90"), marks=pytest.mark.slow),
    pytest.param(("two:90", "two_token:90", "three:90", "three_token:90"), marks=pytest.mark.slow),
    pytest.param(("eight:90", "eight_token:100", "float8:80"), marks=pytest.mark.slow),
    pytest.param(("float8:90", "float8_head:90"), marks=pytest.mark.slow),
    pytest.param(("graded:90", "graded_one:90", "graded_two:90"), marks=pytest.mark.slow),
    ("few_rotated:90",),
    pytest.param(("rotated:90", "rotated_wide:90", "rotated:80"), marks=pytest.mark.slow),
    pytest.param(("rotated_one:90", "rotated_two:90", "rotated_three:90"), marks=pytest.mark.slow),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize("names", COMPILED)
def test_kernel_compiles_without_a_gpu(names):
    script = Path(__file__).with_name("compile_kv_encode.py")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(api.__file__).parents[3])
    command = [sys.executable, str(script), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["case"] for result in results] == list(names)
    # Bytes of stack: nothing spills but at most two registers.
    assert all(result["stack"] <= 8 for result in results), results


GPU_FORMATS = (
    *(Affine(b, "channel", g, s) for b in (2, 3, 4, 8) for g, s in ((64, False), (128, True))),
    *(Affine(b, "token", g, s) for b in (2, 3, 4, 8) for g, s in ((16, False), (32, True))),
    Affine(4, "channel", 32),
    Affine(4, "channel", 256),
    Graded((4, 0)),
    Graded((4, 2, 1, 0)),
    Graded((1,)),
    Graded((8, 3), 64),
    Float8("token"),
    Float8("head"),
)
GPU_SHAPES = (
    ((33, 3, 5), 256, 128, BFLOAT16, False),
    ((9, 1, 8), 256, 64, BFLOAT16, True),
    ((1, 2, 3), 256, 96, torch.float16, False),
    ((2, 1, 1), 256, 256, FLOAT32, True),
)
# Every format at two shapes of the four.
GPU_CASES = [
    Case(format, *shape)
    for i, format in enumerate(GPU_FORMATS)
    for j, shape in enumerate(GPU_SHAPES)
    if (i + i // 2 + j) % 2
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=range(len(GPU_CASES)))
def test_kernel_on_the_gpu_equals_the_reference(case):
    got = check(case, seed=GPU_CASES.index(case), device="cuda")
    x = normal(case)
    own = case.format.encode(x, {})
    there = api.encode(case.format, x.cuda(), {}, implementation=Implementation.TRITON)
    same({name: part.cpu() for name, part in there.items()}, own, case)
    assert got.keys() == own.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("group", [40, 80])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_that_are_no_power_of_two(bits, group):
    check(Case(Affine(bits, "token", group), (3, 2, 3), 128, 80, BFLOAT16), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format",
    [Affine(4, "channel", 32), Affine(3, "token", 32), Affine(8, "token", 32, True), Float8()],
)
def test_special_values_on_the_gpu(format):
    x = torch.zeros(32, 32)
    x[:12] = extremes()
    x = x.mT.contiguous() if getattr(format, "granularity", "") == "channel" else x
    check(Case(format, dtype=FLOAT32), x[None, None, None].cuda(), device="cuda")


GPU_ROTATED = [
    Case(format, blocks, 256, size, dtype, centered)
    for format in (Graded((4, 0)), Graded((4, 2, 1, 0), 64), Affine(3, "channel", 256))
    for blocks, size, dtype, centered in (
        ((1, 1, 8), 128, BFLOAT16, True),
        ((9, 3, 5), 64, torch.float16, False),
        ((33, 3, 5), 128, FLOAT32, True),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_ROTATED, ids=range(len(GPU_ROTATED)))
def test_a_product_on_the_gpu_equals_the_reference(case):
    check_rotated(case, seed=GPU_ROTATED.index(case), device="cuda")


@pytest.mark.gpu
def test_products_on_the_gpu_are_as_exact_as_float32():
    check_precision((40, 4, 8), "cuda")


@pytest.mark.gpu
def test_a_rotated_block_does_not_depend_on_its_neighbours():
    case = Case(Graded((4, 2, 1, 0)), (40, 4, 8), size=128, dtype=BFLOAT16)
    torch.manual_seed(0)
    x, matrix = normal(case, "cuda"), rotation(8, 128, "cuda", exact=False)
    options = {"implementation": Implementation.TRITON, "matrix": matrix}
    whole = api.encode(case.format, x, {}, **options)
    alone = api.encode(case.format, x[7:8, 2:3], {}, **options)
    same(alone, {name: part[7:8, 2:3] for name, part in whole.items()})


@pytest.mark.gpu
def test_launch_needs_no_synchronisation():
    case = Case(Affine(4, "channel", 64), (3, 1, 8), size=128, dtype=BFLOAT16)
    x = normal(case, "cuda")
    out = api.encode(case.format, x, {}, implementation=Implementation.TRITON)
    expected = {name: part.clone() for name, part in out.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        api.encode(case.format, x, {}, implementation=Implementation.TRITON, out=out)
    for part in out.values():
        part.zero_()
    graph.replay()
    same(out, expected, case)
