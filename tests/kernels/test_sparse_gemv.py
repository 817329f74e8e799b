"""The sparse-input linear layer: dead channels are never read, live ones as in float64."""

import os

import pytest
import torch

from squeeze.errors import DeviceError
from squeeze.kernels.sparse_gemv.api import by_columns, sparse_gemv, thresholded
from squeeze.types import Implementation

pytest.importorskip("triton")
from launched import absent, asked_about

from squeeze.kernels.sparse_gemv import streamed

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)
TRITON = Implementation.TRITON


def case(rows, out_features, in_features, dtype=torch.float32, seed=0):
    """Inputs of which about half exceed their thresholds; the weight by columns, in NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    threshold = torch.rand(in_features, generator=generator) * 1.3
    buffer = torch.full((in_features + 2, out_features + 5), torch.nan, dtype=dtype)
    weight = buffer[1:-1, 2:-3]
    weight.copy_(torch.randn(in_features, out_features, generator=generator))
    bias = torch.randn(out_features, generator=generator).to(dtype)
    return x, weight.t(), threshold, bias


def assert_close(actual, x, weight, threshold, bias):
    """At most twice the reference's error to float64, plus one rounding of the output."""
    kept = torch.where(x.abs() > threshold, x, 0).double()
    oracle = kept @ weight.double().T + bias.double()
    reference = sparse_gemv(x, weight, threshold, bias).double()
    band = torch.finfo(x.dtype).eps * oracle.abs().max()
    allowed = 2 * (reference - oracle).abs().max() + band
    assert (actual.double() - oracle).abs().max() <= allowed


def test_values_at_the_threshold_are_zeroed_and_nan_is_not():
    x = torch.tensor([[1.0, -1.0, 1.5, -1.5, torch.nan, 3.0]])
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, torch.inf])
    expected = torch.tensor([[0.0, 0.0, 1.5, -1.5, torch.nan, 0.0]])
    torch.testing.assert_close(thresholded(x, threshold), expected, equal_nan=True)


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "dtype"),
    [
        (1, 128, 64, torch.float32),
        (1, 130, 257, torch.bfloat16),
        (1, 1, 1, torch.float32),
        (2, 200, 600, torch.float16),
        (3, 70, 1100, torch.float32),
        (4, 129, 300, torch.bfloat16),
    ],
)
def test_the_kernel_is_as_near_float64_as_the_reference(rows, out_features, in_features, dtype):
    x, weight, threshold, bias = case(rows, out_features, in_features, dtype)
    actual = sparse_gemv(x, weight, threshold, bias, implementation=TRITON)
    assert actual.dtype == dtype
    assert_close(actual, x, weight, threshold, bias)
    bare = sparse_gemv(x, weight, threshold, implementation=TRITON)
    assert_close(bare, x, weight, threshold, torch.zeros_like(bias))


@needs_interpreter
def test_columns_of_dead_channels_are_not_read():
    x, weight, threshold, bias = case(2, 96, 520)
    live = (x.abs() > threshold).any(0)
    weight = weight.clone(memory_format=torch.preserve_format)
    weight[:, ~live] = torch.nan
    actual = sparse_gemv(x, by_columns(weight), threshold, bias, implementation=TRITON)
    assert torch.isfinite(actual).all()
    none = torch.full_like(threshold, torch.inf)
    nothing = sparse_gemv(x, by_columns(weight), none, bias, implementation=TRITON)
    assert torch.equal(nothing, bias.expand(2, -1))


@needs_interpreter
def test_a_row_alone_is_as_in_a_batch_and_many_rows_are_multiplied_whole():
    x, weight, threshold, bias = case(6, 64, 300)
    together = sparse_gemv(x.view(2, 3, 300), weight, threshold, bias, implementation=TRITON)
    assert torch.equal(together.view(6, 64), sparse_gemv(x, weight, threshold, bias))
    few = sparse_gemv(x[:4], weight, threshold, bias, implementation=TRITON)
    for row in range(4):
        alone = sparse_gemv(x[row : row + 1], weight, threshold, bias, implementation=TRITON)
        torch.testing.assert_close(few[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_by_columns_keeps_the_values():
    weight = torch.randn(6, 10)
    columns = by_columns(weight)
    assert columns.stride() == (1, 6)
    assert torch.equal(columns, weight)
    assert torch.equal(columns.contiguous(), weight)


def test_compiled_kernels_keep_everything_in_registers(compiled):
    every = compiled("compile_sparse_gemv.py", "90")
    assert {facts["kernel"] for facts in every} == {"_gemv_kernel", "_sum_kernel", "multiply"}
    for facts in every:
        assert facts["stack"] == 0, facts
        if facts["kernel"] == "multiply":
            assert_streams(facts)
            continue
        assert facts["registers"] <= 128, facts  # four programs per multiprocessor
        if "ahead" in facts:  # DEPTH columns of two pieces
            assert facts["ahead"] == (8 if facts["case"][0] <= 2 else 4), facts


def assert_streams(facts):
    """A program fits, and reads no column before it knows the live ones."""
    _, outputs, inputs, _ = facts["case"]
    assert facts["registers"] <= 128, facts  # of 512 threads
    assert facts["shared"] <= 227 * 1024, facts
    assert facts["early_copies"] == 0, facts
    # The first copies of a lane, and the loop's.
    shape = streamed.divide(outputs, inputs, 132)
    assert facts["copies"] == 2 * streamed.GROUPS * shape.each, facts
    chunks = shape.chunks
    batches = chunks % 8 or 8, 8 if chunks > 8 else 0  # before the loop, in its body
    assert facts["votes"] == sum(batches), facts


@pytest.mark.parametrize(
    "shape", [(8, 1), (1000, 777), (4096, 4096), (14336, 4096), (4096, 14336), (64, 65536)]
)
def test_a_division_covers_the_weight(shape):
    out_features, in_features = shape
    found = streamed.divide(out_features, in_features, 132)
    assert found.units in streamed.UNITS
    assert found.shares * found.chunks * 32 * found.warps >= in_features
    assert found.chunks * found.warps * 128 <= streamed.LIST_BYTES
    assert found.chunks <= 4 * streamed.GROUPS * found.each  # lists lie where the copies go


def test_divisions_are_the_ones_measured_as_best():
    asked = ((4096, 4096), (14336, 4096), (4096, 14336))
    found = {shape: streamed.divide(*shape, 132) for shape in asked}
    assert {shape: (f.units, f.shares, f.warps, f.each) for shape, f in found.items()} == {
        (4096, 4096): (32, 8, 8, 2),
        (14336, 4096): (16, 1, 16, 4),
        (4096, 14336): (16, 4, 16, 4),
    }


@pytest.mark.parametrize("out_features", [1024, 4096, 8192, 11008, 14336])
@pytest.mark.parametrize("in_features", [2048, 4096, 8192])
def test_divisions_of_layers_fill_one_wave(out_features, in_features):
    found = streamed.divide(out_features, in_features, 132)
    blocks = -(-out_features // 8 // found.units)
    assert 80 <= blocks * found.shares <= 132
    short = found.units * -(-in_features // found.shares) <= streamed.SHORT
    assert found.warps == (8 if short else 16)


def test_only_one_row_on_gpus_with_the_measured_capability_streams():
    x, weight = absent(1, 64, dtype=torch.bfloat16), absent(64, 48, dtype=torch.bfloat16).t()
    for capability in (80, 86, 90, 100, 120):
        with asked_about(capability):
            assert streamed.fits(x, weight) == (capability == 90)
    with asked_about(90):
        assert not streamed.fits(absent(2, 64, dtype=torch.bfloat16), weight)
        assert not streamed.fits(x.float(), weight)
        assert streamed.fits(x.half(), weight.half())
        assert not streamed.fits(x, absent(64, 44, dtype=torch.bfloat16).t())
    assert not streamed.fits(torch.empty(1, 64, dtype=torch.bfloat16), weight)


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match=r"device cpu.*CUDA device.*reference"):
        sparse_gemv(*case(1, 8, 32), implementation=TRITON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 31)}, "channels"),
        ({"x": torch.randn(1, 32).half()}, "the weight torch.float32"),
        ({"bias": torch.randn(3)}, "bias is"),
        ({"threshold": torch.rand(3)}, "threshold is"),
        ({"implementation": Implementation.AUTO}, "while planning"),
    ],
)
def test_a_call_that_contradicts_itself_is_refused(change, message):
    names = ("x", "weight", "threshold", "bias")
    call = dict(zip(names, case(1, 8, 32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        sparse_gemv(**call)


@needs_interpreter
def test_a_weight_by_rows_is_refused_by_the_kernel():
    x, weight, threshold, bias = case(1, 8, 32)
    with pytest.raises(ValueError, match="by_columns"):
        sparse_gemv(x, weight.contiguous(), threshold, bias, implementation=TRITON)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (1000, 777)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_the_kernel_on_a_gpu_inside_a_graph(shape, rows):
    x, weight, threshold, bias = (t.cuda() for t in case(rows, *shape, torch.bfloat16))
    weight = by_columns(weight)
    sparse_gemv(x, weight, threshold, bias, implementation=TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = sparse_gemv(x, weight, threshold, bias, implementation=TRITON)
    for seed in range(2):
        x.copy_(case(rows, *shape, torch.bfloat16, seed)[0])
        graph.replay()
        assert_close(actual, x, weight, threshold, bias)
