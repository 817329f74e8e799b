"""The linear layer of E4M3 entries and inputs: its rounding, its reference, and the kernels."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from squeeze.errors import DeviceError
from squeeze.kernels.bits import pack
from squeeze.kernels.float8_linear.api import float8_linear
from squeeze.kernels.float8_linear.reference import round_inputs, rounded_inputs
from squeeze.kernels.lut_linear.reference import reconstruct
from squeeze.types import ClusteredWeight, Implementation

triton = pytest.importorskip("squeeze.kernels.float8_linear.triton")
fused = pytest.importorskip("squeeze.kernels.float8_linear.fused")

TRITON = Implementation.TRITON
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def palette(out_features, in_features, bits, rows=1, device="cpu"):
    """A random packed weight of E4M3 entries, ``rows`` rows sharing a codebook."""
    codes = torch.randint(0, 2**bits, (out_features, -(-in_features // 32) * 32))
    book = (torch.randn(-(-out_features // rows), 1, 2**bits) * 100).sort(-1).values
    scale = (torch.rand(out_features) * 1e-3 + 1e-4).half()
    return ClusteredWeight(
        pack(codes, bits).to(device), book.to(torch.float8_e4m3fn).view(torch.uint8).to(device),
        scale.to(device), bits, (out_features, in_features), rows, in_features, inputs="float8",
    )  # fmt: skip


def tokens(rows, channels, dtype=torch.float32, device="cpu"):
    """Tokens of very different size, one of them zero."""
    size = torch.logspace(-4, 3, rows)[:, None] * (torch.arange(rows) != rows // 2)[:, None]
    return (torch.randn(rows, channels) * size).to(dtype).to(device)


def in_order(codes, in_features):
    """Undo the kernels' order of channels: byte n of word w is channel n W + w."""
    words = codes.shape[1] // 8
    return codes.view(-1, words, 8).mT.flatten(1)[:, :in_features]


def summed_on_tensor_cores(x, weight, bias):
    """The product in sums as Hopper keeps them, float64 ``[rows, out]`` before it is rounded.

    32 products and the sum so far are cut to 13 places after the leading bit of the largest.
    """
    codes, scale = round_inputs(x.double())
    entries = reconstruct(weight).double() / weight.scale.double()[:, None]
    sums = codes.new_zeros(len(x), len(entries), 1, dtype=torch.float64)
    for some, others in zip(codes.double().split(32, 1), entries.split(32, 1), strict=True):
        terms = torch.cat([sums, some[:, None] * others], 2)
        place = torch.frexp(terms.abs().amax(2, keepdim=True)).exponent - 14
        sums = torch.ldexp(torch.ldexp(terms, -place).trunc().sum(2, keepdim=True), place)
    return sums[..., 0] * weight.scale.double() * scale + bias.double()


def assert_close(actual, x, weight, bias, reference=None):
    """At most twice the reference's error to float64, plus one rounding of the output."""
    oracle = float8_linear(x.double(), weight, bias)
    if reference is None:
        reference = float8_linear(x, weight, bias).double()
    band = torch.finfo(x.dtype).eps * oracle.abs().amax(1, keepdim=True)
    allowed = 2 * (reference - oracle).abs().amax(1, keepdim=True) + band
    excess = ((actual.double() - oracle).abs() - allowed).max()
    assert excess <= 0, f"{excess} too far for x {tuple(x.shape)}, {weight.shape}"


def test_a_token_is_rounded_under_the_power_of_two_that_it_needs():
    x = torch.tensor([[448.0, 17.0, 0.4], [450.0, -17.0, 0.0], [0.0, -0.0, 0.0]])
    codes, scale = round_inputs(x)
    assert scale.flatten().tolist() == [1.0, 2.0, 2.0**-126]
    # 17 lies between 16 and 18, 225 between 224 and 240, and 8.5 between 8 and 9: ties to even.
    assert codes.float().tolist() == [[448.0, 16.0, 0.40625], [224.0, -8.0, 0.0], [0.0, -0.0, 0.0]]
    assert rounded_inputs(x)[1].tolist() == [448.0, -16.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_tokens_are_exact_in_their_dtype_and_rounding_again_changes_nothing(dtype):
    x = tokens(9, 100, dtype)
    codes, scale = round_inputs(x)
    assert torch.equal(rounded_inputs(x).double(), codes.double() * scale.double())
    assert torch.equal(rounded_inputs(rounded_inputs(x)), rounded_inputs(x))
    largest = x.float().abs().amax(1, keepdim=True)
    error = (rounded_inputs(x).float() - x.float()).abs()
    assert (error <= torch.maximum(x.float().abs() / 16, largest * 2.0**-17)).all()


def test_tokens_that_are_not_finite_give_nan_and_leave_others_alone():
    weight, x = palette(6, 40, 4), tokens(3, 40)
    x[0, 3], x[2, 1] = torch.inf, torch.nan
    y = float8_linear(x, weight)
    assert y[[0, 2]].isnan().all()
    assert y[1].isfinite().all()


def test_a_token_does_not_depend_on_the_others():
    weight, x = palette(6, 40, 3), tokens(5, 40)
    together = float8_linear(x, weight)
    for i in range(5):
        torch.testing.assert_close(float8_linear(x[i : i + 1], weight), together[i : i + 1])


def test_reference_multiplies_rounded_tokens_in_float32():
    weight, x, bias = palette(6, 40, 4), tokens(4, 40, torch.bfloat16), torch.randn(6)
    codes, scale = round_inputs(x)
    expected = codes.double() @ reconstruct(weight).double().T * scale.double() + bias.double()
    y = float8_linear(x[:, None], weight, bias)
    assert y.shape == (4, 1, 6)
    torch.testing.assert_close(y[:, 0], expected.bfloat16(), rtol=2**-7, atol=0)


@needs_interpreter
@pytest.mark.parametrize(
    ("bits", "in_features", "shared"), [(2, 72, 1), (3, 200, 3), (4, 96, 1), (4, 520, 40)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_prepared_is_what_the_reference_multiplies(bits, in_features, shared, dtype):
    weight = palette(40, in_features, bits, shared)
    x = tokens(7, in_features + 3, dtype)[:, 1:-2]
    x[5, 2] = torch.nan
    x_codes, x_scale, w_codes, w_scale = triton.prepare(x, weight)
    codes, scale = round_inputs(x)
    known = torch.arange(7) != 5
    assert torch.equal(x_scale[known], scale[known])
    assert x_scale[5].isnan()
    found = in_order(x_codes.view(torch.uint8), in_features)
    assert torch.equal(found[known], codes.view(torch.uint8)[known])
    assert not x_codes[known].float()[:, -1].any() or in_features % 32 == 0
    dense = in_order(w_codes.float() * w_scale.T, in_features)
    assert torch.equal(dense, reconstruct(weight))


def in_quads(codes, in_features):
    """Undo the order of ``gluon``: block, instruction, half, thread of a quad, byte."""
    blocks = codes.view(len(codes), -1, 4, 2, 4, 4).transpose(2, 4)
    words = blocks.transpose(3, 4).flatten(4).flatten(1, 3)  # block, thread, instruction; bytes
    return words.mT.flatten(1)[:, :in_features]


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_ordered_for_the_fused_kernel(dtype):
    x = tokens(5, 700, dtype)
    found, scale = triton.ordered_tokens(x[:, 20:], 24)
    codes, expected = round_inputs(x[:, 20:])
    assert torch.equal(scale, expected)
    assert torch.equal(in_quads(found.view(torch.uint8), 680), codes.view(torch.uint8))
    # Word 6 of a token is that of thread 1 and instruction 2: bytes 4.. and 20.. after 64.
    word = codes.view(torch.uint8)[:, 6::96]
    assert torch.equal(found.view(torch.uint8)[:, 68:72], word[:, :4])
    assert torch.equal(found.view(torch.uint8)[:, 84:87], word[:, 4:7])


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_rounds_as_the_reference(dtype):
    x = tokens(9, 70, dtype)
    x[1, 3], x[2, 69] = torch.nan, -torch.inf
    expected = rounded_inputs(x)
    torch.testing.assert_close(triton.rounded_inputs(x), expected, rtol=0, atol=0, equal_nan=True)
    assert triton.rounded_inputs(x[:0]).shape == (0, 70)


@needs_interpreter
@pytest.mark.parametrize(("rows", "bits"), [(1, 4), (3, 2), (17, 3), (5, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_few_tokens_match_float64(rows, bits, dtype):
    weight, x, bias = palette(13, 72, bits), tokens(rows, 72, dtype), torch.randn(13)
    y = float8_linear(x, weight, bias.to(dtype), implementation=TRITON)
    assert y.dtype == dtype
    assert_close(y, x, weight, bias.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "bits", "shared"),
    [
        (1, (333, 1000), 4, 1),
        (16, (4096, 1000), 3, 1),
        (100, (64, 520), 2, 8),
        (triton.ROWS, (336, 1000), 4, 1),
        (300, (4096, 4096), 4, 1),
        (300, (64, 14336), 3, 64),
        (777, (4096, 72), 2, 1),
        (300, (333, 1000), 4, 1),
        (300, (64, 4096), 5, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_match_float64_on_the_gpu(rows, shape, bits, shared, dtype):
    weight = palette(*shape, bits, shared, device="cuda")
    x = tokens(rows, shape[1] + 8, dtype, "cuda")[:, 3:-5]
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    able = torch.cuda.get_device_capability() >= triton.CAPABILITY
    many = rows >= triton.ROWS and bits <= 4 and shape[0] % 16 == 0
    assert triton.fits(x, weight) == (able and many)  # which kernel the test is about
    for own in (None, bias):
        y = float8_linear(x, weight, own, implementation=TRITON)
        assert y.dtype == dtype
        assert_close(y, x, weight, torch.zeros_like(bias) if own is None else own)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_prepared_is_exact_on_the_gpu(bits):
    weight, x = palette(48, 1000, bits, 2, "cuda"), tokens(5, 1000, torch.bfloat16, "cuda")
    x_codes, x_scale, w_codes, w_scale = triton.prepare(x, weight)
    codes, scale = round_inputs(x)
    assert torch.equal(in_order(x_codes.view(torch.uint8), 1000), codes.view(torch.uint8))
    assert torch.equal(x_scale, scale)
    dense = in_order(w_codes.float() * w_scale.T, 1000)
    assert torch.equal(dense, reconstruct(weight))
    assert torch.equal(triton.rounded_inputs(x), rounded_inputs(x))


@pytest.mark.gpu
def test_tokens_that_are_not_finite_stay_so_on_the_gpu():
    weight, x = palette(64, 1024, 4, device="cuda"), tokens(300, 1024, torch.bfloat16, "cuda")
    x[7, 1000], x[9, 3] = torch.inf, torch.nan
    y = float8_linear(x, weight, implementation=TRITON)
    assert y[[7, 9]].isnan().all()
    y[[7, 9]] = 0
    assert y.isfinite().all()


def test_the_fused_kernel_is_chosen_where_its_tiles_fill_the_gpu():
    # Shapes and tokens of which it was the faster on 132 multiprocessors, then the slower.
    for tokens_, out_features in ((2048, 4096), (2048, 14336), (512, 14336), (256, 14336)):
        assert fused.filled(tokens_, out_features, 132) >= fused.FILLED
    for tokens_, out_features in ((512, 4096), (256, 4096), (128, 4096), (64, 14336)):
        assert fused.filled(tokens_, out_features, 132) < fused.FILLED
    assert fused.filled(512, 128 * 66, 132) == 1


def test_sums_of_few_bits_err_more_than_float32_but_little():
    weight, x, bias = palette(24, 2048, 4), tokens(24, 2048), torch.zeros(24)
    oracle = float8_linear(x.double(), weight)
    found = (summed_on_tensor_cores(x, weight, bias) - oracle).abs().amax(1)
    size = oracle.abs().amax(1)
    assert (found <= size * 2**-8).all()  # one rounding to bfloat16
    assert found.sum() > 100 * (float8_linear(x, weight) - oracle).abs().amax(1).sum()


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != fused.CAPABILITY,
    reason="runs on Hopper",
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("rows", "shape"), [(300, (336, 4096)), (256, (128, 256)), (130, (64, 1152)), (70, (48, 14336))]
)
@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_kernel_sums_as_tensor_cores_on_the_gpu(rows, shape, biased):
    weight = palette(*shape, 4, device="cuda")
    x = tokens(rows, shape[1], torch.bfloat16, "cuda")
    bias = torch.randn(shape[0], device="cuda").bfloat16() if biased else None
    y = fused.float8_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    own = y.new_zeros(shape[0]) if bias is None else bias
    assert_close(y, x, weight, own, summed_on_tensor_cores(x, weight, own).bfloat16().double())


@pytest.mark.gpu
@needs_hopper
def test_full_tiles_of_tokens_go_to_the_fused_kernel_on_the_gpu():
    weight, x = palette(4096, 1024, 4, device="cuda"), tokens(2048, 1024, torch.bfloat16, "cuda")
    x[7, 1000], x[9, 3] = torch.inf, torch.nan
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert triton.fits(x, weight)
    assert fused.fits(x, weight) == (fused.filled(2048, 4096, processors) >= fused.FILLED)
    assert not fused.fits(x.half(), weight)
    assert not fused.fits(x[:, 64:-64], weight)
    assert not fused.fits(x, replace(weight, rows=2))
    y = fused.float8_linear(x.view(2, 1024, 1024), weight, None).view(2048, 4096)
    assert y[[7, 9]].isnan().all()
    few, none = [0, 8, 10, 1024, 2047], y.new_zeros(64)
    first = {name: getattr(weight, name)[:64] for name in ("indices", "scale", "codebook")}
    first = replace(weight, **first, shape=(64, 1024))
    reference = summed_on_tensor_cores(x[few], first, none).bfloat16().double()
    assert_close(y[few, :64], x[few], first, none, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 300, 2048])
def test_a_recorded_call_follows_its_input_on_the_gpu(rows):
    weight, x = palette(4096, 4096, 4, device="cuda"), tokens(rows, 4096, torch.bfloat16, "cuda")
    float8_linear(x, weight, implementation=TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = float8_linear(x, weight, implementation=TRITON)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, float8_linear(x, weight, implementation=TRITON))


def described():
    """What the compiler made of every kernel, by a process without the interpreter."""
    script = Path(__file__).with_name("compile_float8_linear.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compile_without_spills_and_look_bytes_up_in_registers():
    every = described()
    assert {(facts["kernel"], facts["bits"]) for facts in every} == {
        *itertools.product(["_prepare_kernel"], (2, 3, 4)),
        ("_round_kernel", 4),
        ("_order_kernel", 4),
        ("multiply", 4),
    }
    for facts in every:
        assert facts["stack"] == 0, facts
        if facts["kernel"] == "_prepare_kernel":
            assert facts["registers"] <= 96, facts
            assert facts["casts"] > 0, facts
            # Both halves of eight codes: one look-up, or three where a table fills four registers.
            assert facts["lookups"] % (6 if facts["bits"] == 4 else 2) == 0, facts
            assert facts["wide_stores"] >= 8, facts
            assert facts["shared"] <= 128, facts
        if facts["kernel"] == "multiply":  # one of two warp groups on a multiprocessor
            assert facts["registers"] <= 255, facts
            assert facts["products"] == 8, facts  # two steps of four
            assert facts["shared"] <= 232448 - 1024, facts


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match=r"device cpu.*CUDA device.*reference"):
        float8_linear(torch.randn(1, 32), palette(4, 32, 4), implementation=TRITON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 31)}, "channels"),
        ({"bias": torch.randn(3)}, "bias is"),
        ({"implementation": Implementation.AUTO}, "while planning"),
    ],
)
def test_refuses(change, message):
    call = {"x": torch.randn(1, 32), "weight": palette(4, 32, 4), "bias": None} | change
    with pytest.raises(ValueError, match=message):
        float8_linear(**call)


def test_refuses_entries_of_another_dtype():
    weight = palette(4, 32, 4)
    narrow = weight.with_tensors({"codebook": weight.codebook.to(torch.int8)})
    with pytest.raises(ValueError, match=r"codebook is torch\.int8"):
        float8_linear(torch.randn(1, 32), narrow)
