"""The integer linear layer: codes by hand, the kernels against float64, compilation for GPUs."""

import itertools
import os
from dataclasses import replace

import pytest
import torch

from squeeze.errors import DeviceError
from squeeze.kernels.bits import pack
from squeeze.kernels.float8_linear.reference import round_inputs, rounded_inputs
from squeeze.kernels.integer_linear.api import integer_linear, reconstruct, signed_codes
from squeeze.types import Implementation, IntegerWeight

pytest.importorskip("triton")
from launched import absent, asked_about

from squeeze.kernels.integer_linear import streamed

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)


def packed(rows, columns, bits, group_size=32, zero=True, scaled=False, device="cpu"):
    """A random packed weight and its codes."""
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, groups, group_size))
    weight = IntegerWeight(
        pack(codes, bits).flatten(1).to(device),
        (torch.rand(rows, groups) * 1e-2 + 1e-3).half().to(device),
        torch.randint(0, 2**bits, (rows, groups)).to(torch.uint8).to(device) if zero else None,
        torch.randint(-3, 4, (columns,)).to(torch.int8).to(device) if scaled else None,
        bits,
        group_size,
        (rows, columns),
    )
    return weight, codes.flatten(1)[:, :columns]


def float8_packed(rows, columns, bits, group_size=32, zero=True, scaled=False, device="cpu"):
    """A random weight under E4M3 scales, and its codes."""
    weight, codes = packed(rows, columns, bits, group_size, zero, scaled, device)
    scale = (weight.scale.float() * 2**13).to(torch.float8_e4m3fn).view(torch.uint8)
    row = torch.exp2(torch.randint(-15, -10, (rows,)).float()).to(device)
    return replace(weight, scale=scale, row_scale=row), codes


def guarded(tensor):
    """The same values as a non-contiguous slice of a buffer full of NaN."""
    buffer = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 7), torch.nan, dtype=tensor.dtype)
    view = buffer.to(tensor.device)[1:-1, 3:-4]
    view.copy_(tensor)
    return view


def assert_close(actual, x, weight, bias):
    """At most twice the reference's error to float64, plus one rounding of the output."""
    oracle = x.double() @ reconstruct(weight).double().T + bias.double()
    reference = integer_linear(x, weight, bias).double()
    band = torch.finfo(x.dtype).eps * oracle.abs().max()
    allowed = 2 * (reference - oracle).abs().max() + band
    worst = (actual.double() - oracle).abs().max()
    assert worst <= allowed, f"{worst} > {allowed} for x {tuple(x.shape)}, {weight.shape}"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_reconstruct_is_the_formula(bits, zero, scaled):
    weight, codes = packed(13, 100, bits, zero=zero, scaled=scaled)
    dense = reconstruct(weight)
    for row, column in [(0, 0), (12, 99), (7, 64), (8, 63), (5, 31)]:
        middle = int(weight.zero[row, column // 32]) if zero else 2 ** (bits - 1)
        expected = (int(codes[row, column]) - middle) * float(weight.scale[row, column // 32])
        expected *= 2.0 ** -int(weight.exponents[column]) if scaled else 1
        assert dense[row, column] == expected


def test_folded_exponents_are_no_part_of_the_weight():
    weight, _ = packed(5, 64, 4, scaled=True)
    folded = reconstruct(replace(weight, folded=True))
    assert torch.equal(folded, reconstruct(replace(weight, exponents=None)))
    assert not torch.equal(folded, reconstruct(weight))


def test_signed_codes_decode_to_the_same_weight():
    weight, _ = packed(6, 96, 3)
    codes, zeros = signed_codes(weight)
    group = torch.arange(96) // 32
    steps = codes.float() - zeros.float()[:, group]
    assert torch.equal(steps * weight.scale.float()[:, group], reconstruct(weight))


def test_reference_multiplies_in_the_dtype_of_x():
    weight, _ = packed(6, 40, 4)
    x, bias = torch.randn(2, 3, 40).bfloat16(), torch.randn(6)
    y = integer_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    dense = reconstruct(weight).bfloat16()
    assert torch.equal(y, torch.nn.functional.linear(x, dense, bias.bfloat16()))


CASES = [
    # rows of x, bits, group size, zero, scaled, dtype
    (1, 4, 64, False, False, torch.float16),
    (1, 3, 96, True, True, torch.float32),
    (2, 8, 160, False, False, torch.float16),
    (4, 2, 32, True, False, torch.float32),
    (3, 6, 64, True, True, torch.float16),
    (5, 4, 64, False, True, torch.float16),
    (16, 3, 64, True, False, torch.float32),
    (17, 8, 160, True, True, torch.float32),
    (6, 5, 32, False, False, torch.float16),
    (6, 7, 96, True, False, torch.float32),
    (257, 4, 64, True, True, torch.float16),
    (257, 3, 160, False, False, torch.float32),
]


@needs_interpreter
@pytest.mark.parametrize(("rows", "bits", "group_size", "zero", "scaled", "dtype"), CASES)
def test_kernels_match_float64(rows, bits, group_size, zero, scaled, dtype):
    weight, _ = packed(13, 150, bits, group_size, zero, scaled)
    x, bias = guarded(torch.randn(rows, 150).to(dtype)), torch.randn(13).to(dtype)
    y = integer_linear(x, weight, bias, implementation=Implementation.TRITON)
    assert y.dtype == dtype
    assert_close(y, x, weight, bias)


@needs_interpreter
def test_kernel_keeps_leading_dimensions_and_takes_no_rows():
    weight, _ = packed(5, 32, 2)
    x = torch.randn(2, 1, 32)
    y = integer_linear(x, weight, implementation=Implementation.TRITON)
    torch.testing.assert_close(y, integer_linear(x, weight))
    empty = integer_linear(x[:0], weight, implementation=Implementation.TRITON)
    assert empty.shape == (0, 1, 5)


@needs_interpreter
def test_kernel_ignores_folded_exponents():
    weight, _ = packed(5, 64, 4, scaled=True)
    weight = replace(weight, folded=True)
    x = torch.randn(2, 64)
    y = integer_linear(x, weight, implementation=Implementation.TRITON)
    torch.testing.assert_close(y, integer_linear(x, weight))


def test_float8_inputs_multiply_sums_of_groups_by_e4m3_scales():
    weight, codes = float8_packed(7, 100, 4)
    x, bias = torch.randn(3, 100).double(), torch.randn(7).double()
    tokens, token_scale = round_inputs(x)
    products = tokens.double()[:, None] * (codes.double() - weight.zero[:, torch.arange(100) // 32])
    sums = torch.nn.functional.pad(products, (0, 28)).unflatten(2, (-1, 32)).sum(-1)
    scale = weight.scale.view(torch.float8_e4m3fn).double() * weight.row_scale.double()[:, None]
    expected = (sums * scale).sum(-1) * token_scale + bias
    torch.testing.assert_close(integer_linear(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_under_e4m3_scales_are_exact_in_sixteen_bits(dtype):
    weight, _ = float8_packed(7, 100, 4)
    dense = reconstruct(weight)
    assert torch.equal(dense.to(dtype).float(), dense)


FLOAT8_CASES = [
    (1, 4, 64, False, torch.float16),
    (3, 3, 96, True, torch.float32),
    (16, 4, 160, False, torch.float16),
    (17, 2, 32, True, torch.float32),
    (257, 4, 64, True, torch.float16),
]


@needs_interpreter
@pytest.mark.parametrize(("rows", "bits", "group_size", "zero", "dtype"), FLOAT8_CASES)
def test_kernels_with_float8_inputs_match_float64(rows, bits, group_size, zero, dtype):
    weight, _ = float8_packed(13, 150, bits, group_size, zero, scaled=zero)
    x, bias = guarded(torch.randn(rows, 150).to(dtype)), torch.randn(13).to(dtype)
    y = integer_linear(x, weight, bias, implementation=Implementation.TRITON)
    assert y.dtype == dtype
    assert not torch.equal(rounded_inputs(x), x)
    assert_close(y, rounded_inputs(x), weight, bias)  # rounding twice is rounding once


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "zero"),
    list(itertools.product((1, 3, 16, 100, 300), ((333, 1000), (2176, 4096)), (True, False))),
)
def test_kernels_with_float8_inputs_match_float64_on_the_gpu(rows, shape, zero):
    for dtype in (torch.bfloat16, torch.float16):
        weight, _ = float8_packed(*shape, 4, 128, zero, scaled=zero, device="cuda")
        x = guarded(torch.randn(rows, shape[1], dtype=dtype, device="cuda"))
        bias = torch.randn(shape[0], dtype=dtype, device="cuda")
        y = integer_linear(x, weight, bias, implementation=Implementation.TRITON)
        assert_close(y, rounded_inputs(x), weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "bits", "group_size", "zero"),
    list(itertools.product((1, 3, 16, 100, 300), (3, 4, 8), (64, 128), (True, False))),
)
def test_kernels_match_float64_on_the_gpu(rows, bits, group_size, zero):
    weight, _ = packed(333, 1000, bits, group_size, zero, scaled=zero, device="cuda")
    x = guarded(torch.randn(rows, 1000, dtype=torch.bfloat16, device="cuda"))
    bias = torch.randn(333, dtype=torch.bfloat16, device="cuda")
    y = integer_linear(x, weight, bias, implementation=Implementation.TRITON)
    assert_close(y, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "bits", "group_size", "zero"),
    list(itertools.product((1, 3, 7, 16), (4, 8), (64, 128, 1024), (True, False))),
)
def test_wide_layers_match_float64_on_the_gpu(rows, bits, group_size, zero):
    for shape in ((333, 1024), (2176, 4096)):
        weight, _ = packed(*shape, bits, group_size, zero, scaled=zero, device="cuda")
        x = guarded(torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda"))
        x = x if zero else x.half()
        bias = torch.randn(shape[0], dtype=x.dtype, device="cuda")
        y = integer_linear(x, weight, bias, implementation=Implementation.TRITON)
        assert_close(y, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_chain_without_pauses_is_as_one_with_pauses_on_the_gpu(rows, bits):
    shapes = ((4096, 4096), (14336, 4096), (4096, 14336), (4096, 4096))
    layers = [packed(*shape, bits, 128, device="cuda")[0] for shape in shapes]
    first = torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda")

    def through(between):
        x = first
        for weight in layers:
            x = integer_linear(x, weight, implementation=Implementation.TRITON)
            between()
        return x

    expected = through(torch.cuda.synchronize)
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(through(lambda: None), expected)


def test_contradictions_are_refused():
    weight, _ = packed(6, 64, 4)
    with pytest.raises(ValueError, match="x ends in 63 channels, the weight takes 64"):
        integer_linear(torch.ones(2, 63), weight)
    with pytest.raises(ValueError, match=r"scale is \(6, 1\), not \(6, 2\)"):
        integer_linear(torch.ones(2, 64), replace(weight, scale=weight.scale[:, :1]))
    with pytest.raises(ValueError, match=r"scale is torch\.float16, not torch\.uint8"):
        integer_linear(torch.ones(2, 64), replace(weight, row_scale=torch.ones(6)))
    with pytest.raises(ValueError, match="resolved while planning"):
        integer_linear(torch.ones(2, 64), weight, implementation=Implementation.AUTO)
    with pytest.raises(DeviceError, match="float64"):
        integer_linear(torch.ones(2, 64).double(), weight, implementation=Implementation.TRITON)


def test_every_kernel_the_launcher_chooses_compiles_into_registers(compiled):
    every = compiled("compile_integer_linear.py", "1", "3", "4", "16", "300")
    assert {facts["kernel"] for facts in every} == {
        "_vector_kernel",
        "_matrix_kernel",
        "_dense_kernel",
        "multiply",
        "_add_up",
    }
    for facts in every:
        if facts["kernel"] == "multiply":
            assert_streams(facts)
        else:
            assert facts["stack"] == 0, facts


def assert_streams(facts):
    """One program fits, and codes are on their way before the wait for x."""
    rows, bits, _, _, group_size, (out_features, in_features) = facts["case"]
    # Sixteen rows and groups of half a chunk: a few addresses do not fit in 128 registers.
    assert facts["stack"] <= (32 if rows == 16 and group_size == 64 else 0), facts
    assert facts["registers"] * 32 * streamed.WARPS <= 65536, facts
    assert facts["shared"] <= 227 * 1024, facts
    shape = streamed.divide(rows, out_features, in_features, group_size // 32, bits, 132)
    planes = bits // 4
    assert facts["early"] == 2 * planes * shape.depth, facts
    # A chunk and 8 columns of x: two products for each of 4 words of each plane, and of x's sum.
    subs, tiles = 1 + (group_size == 64), -(-shape.x_rows // 8)
    each = 8 * (planes + 1) * subs * tiles
    chunks = shape.own * -(-shape.chunks // streamed.WARPS)  # of a warp; a loop takes DEPTH at once
    assert facts["products"] == each * min(chunks, shape.depth), facts


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((4096, 4096), 128), ((14336, 4096), 64), ((4096, 14336), 128), ((17, 128), 64),
     ((128256, 4096), 128), ((64, 131072), 1024)],
)  # fmt: skip
@pytest.mark.parametrize("bits", [4, 8])
def test_a_division_covers_the_weight(rows, shape, group_size, bits):
    out_features, in_features = shape
    found = streamed.divide(rows, out_features, in_features, group_size // 32, bits, 132)
    chunks, tiles = -(-in_features // 128), -(-out_features // 16)
    assert found.slices * found.chunks >= chunks > (found.slices - 1) * found.chunks
    assert found.programs * found.own >= tiles > (found.programs - 1) * found.own
    assert rows <= found.x_rows < 2 * rows


def test_only_gpus_with_the_measured_capability_stream():
    x = absent(3, 256, dtype=torch.bfloat16)
    weight = IntegerWeight(
        absent(8, 32, dtype=torch.int32), absent(8, 2, dtype=torch.float16), None, None,
        4, 128, (8, 256),
    )  # fmt: skip
    for capability in (80, 86, 90, 100, 120):
        with asked_about(capability):
            assert streamed.fits(x, weight) == (capability == 90)
    with asked_about(90):
        assert streamed.fits(absent(16, 256, dtype=torch.float16), weight)
        assert not streamed.fits(absent(17, 256, dtype=torch.float16), weight)
        assert not streamed.fits(x.float(), weight)
        assert not streamed.fits(x, replace(weight, bits=3))
        assert not streamed.fits(x, replace(weight, group_size=32))
        assert not streamed.fits(x, replace(weight, group_size=96))
    assert not streamed.fits(torch.empty(3, 256, dtype=torch.bfloat16), weight)
