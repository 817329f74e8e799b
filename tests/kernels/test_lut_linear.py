"""The clustered linear layer: every layout by the reference, the kernels against float64."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeeze.errors import DeviceError
from squeeze.kernels.bits import pack
from squeeze.kernels.lut_linear.api import lut_linear, reconstruct
from squeeze.quant.weights.kmeans import KMeans
from squeeze.types import ClusteredWeight, Implementation

pytest.importorskip("triton")
from squeeze.kernels.lut_linear import few_rows, whole_rows, wide_rows

TRITON = Implementation.TRITON
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)
SHARING = {"row": (1, None), "rows": (4, None), "tensor": (None, None), "tile": (8, 64)}


def clustered(out_features, in_features, bits, sharing="row", entries="int8", device="cpu"):
    """A random packed weight and its indices."""
    rows, columns = SHARING[sharing]
    rows, columns = rows or out_features, columns or in_features
    codes = torch.randint(0, 2**bits, (out_features, -(-in_features // 32) * 32))
    groups = (-(-out_features // rows), -(-in_features // columns), 2**bits)
    if entries == "int8":
        codebook = torch.randint(-127, 128, groups, dtype=torch.int8).sort(-1).values
        scale = (torch.rand(out_features) * 1e-3 + 1e-4).half()
    else:
        codebook, scale = (torch.randn(groups) * 0.05).half().sort(-1).values, None
    weight = ClusteredWeight(
        pack(codes, bits).to(device), codebook.to(device), None if scale is None else
        scale.to(device), bits, (out_features, in_features), rows, columns,
    )  # fmt: skip
    return weight, codes[:, :in_features]


def guarded(tensor):
    """The same values as a non-contiguous slice of a buffer full of NaN."""
    buffer = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 7), torch.nan, dtype=tensor.dtype)
    view = buffer.to(tensor.device)[1:-1, 3:-4]
    view.copy_(tensor)
    return view


def assert_close(actual, x, weight, bias):
    """At most twice the reference's error to float64, plus one rounding of the output."""
    dense = reconstruct(weight).double()
    oracle = x.double() @ dense.T + bias.double()
    reference = lut_linear(x, weight, bias).double()
    band = torch.finfo(x.dtype).eps * oracle.abs().max()
    allowed = 2 * (reference - oracle).abs().max() + band
    worst = (actual.double() - oracle).abs().max()
    assert worst <= allowed, f"{worst} > {allowed} for x {tuple(x.shape)}, {weight.shape}"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("entries", ["int8", "float16"])
def test_reconstruct_looks_up_every_index(bits, sharing, entries):
    weight, codes = clustered(13, 100, bits, sharing, entries)
    dense = reconstruct(weight)
    for row, column in [(0, 0), (12, 99), (7, 64), (8, 63), (5, 31)]:
        entry = weight.codebook[row // weight.rows, column // weight.columns, codes[row, column]]
        scale = 1.0 if weight.scale is None else weight.scale[row].float()
        assert dense[row, column] == entry.float() * scale


def test_reference_multiplies_in_the_dtype_of_x():
    weight, _ = clustered(6, 40, 4)
    x, bias = torch.randn(2, 3, 40).bfloat16(), torch.randn(6)
    y = lut_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    dense = reconstruct(weight).bfloat16()
    assert torch.equal(y, torch.nn.functional.linear(x, dense, bias.bfloat16()))


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "bits", "sharing", "entries", "dtype"),
    [
        (1, 1, "row", "int8", torch.float16),
        (1, 3, "tile", "int8", torch.float32),
        (3, 2, "rows", "float16", torch.float16),
        (1, 5, "tensor", "float16", torch.float32),
        (2, 7, "rows", "int8", torch.float16),
        (5, 3, "row", "int8", torch.float16),
        (5, 8, "tensor", "int8", torch.float32),
        (17, 4, "tile", "int8", torch.float16),
        (6, 6, "rows", "float16", torch.float32),
        (257, 4, "row", "int8", torch.float32),
        (257, 3, "tile", "float16", torch.float16),
    ],
)
def test_kernels_match_float64(rows, bits, sharing, entries, dtype):
    weight, _ = clustered(13, 72, bits, sharing, entries)
    x, bias = guarded(torch.randn(rows, 72).to(dtype)), torch.randn(13).to(dtype)
    y = lut_linear(x, weight, bias, implementation=TRITON)
    assert y.dtype == dtype
    assert_close(y, x, weight, bias)


@needs_interpreter
def test_kernel_keeps_leading_dimensions_and_takes_no_rows():
    weight, _ = clustered(5, 32, 2)
    x = torch.randn(2, 1, 32)
    y = lut_linear(x, weight, implementation=TRITON)
    torch.testing.assert_close(y, lut_linear(x, weight))
    empty = lut_linear(x[:0], weight, implementation=TRITON)
    assert empty.shape == (0, 1, 5)


def gpu_cases():
    """Every combination; those beyond one per kernel variant compile for minutes and are slow."""
    widths, every_rows = range(1, 9), (1, 3, 16, 100, 300)
    for case in itertools.product(every_rows, widths, SHARING, ("int8", "float16")):
        rows, bits, sharing, entries = case
        common = (sharing, entries) == ("row", "int8")
        quick = rows in (1, 16, 300) if common else (rows, bits) in {(1, 3), (16, 4), (300, 5)}
        yield pytest.param(*case, marks=[] if quick else pytest.mark.slow)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "bits", "sharing", "entries"), list(gpu_cases()))
def test_kernels_match_float64_on_the_gpu(rows, bits, sharing, entries):
    weight, _ = clustered(333, 1000, bits, sharing, entries, device="cuda")
    x = guarded(torch.randn(rows, 1000, device="cuda").bfloat16())
    bias = torch.randn(333, device="cuda").bfloat16()
    y = lut_linear(x, weight, bias, implementation=TRITON)
    assert_close(y, x, weight, bias)


def few_case(rows, shape, bits, sharing="row", entries="int8", dtype=torch.bfloat16):
    """x of rows that differ by orders of magnitude, a weight and a bias for few rows on the GPU."""
    weight, _ = clustered(*shape, bits, sharing, entries, device="cuda")
    x = torch.randn(rows, shape[1], device="cuda") * torch.logspace(-3, 3, shape[1], device="cuda")
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    hopper = torch.cuda.get_device_capability() == few_rows.CAPABILITY
    assert few_rows.takes(x.to(dtype), weight) == hopper  # which kernels the test is about
    return x.to(dtype), weight, bias


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "bits", "sharing", "entries"),
    [
        (1, (200, 4096), 4, "row", "int8"),
        (1, (4096, 14336), 3, "row", "int8"),
        (2, (333, 1000), 2, "row", "int8"),
        (3, (333, 1000), 3, "tensor", "float16"),
        (4, (40, 2304), 4, "row", "float16"),
        (5, (72, 1280), 4, "rows", "int8"),
        (8, (4096, 4096), 4, "row", "int8"),
        (9, (33, 4096), 3, "row", "int8"),
        (16, (48, 2048), 4, "row", "float16"),
        (16, (4096, 4096), 4, "row", "int8"),
        (13, (50, 7168), 2, "tensor", "int8"),
        (16, (4096, 14336), 3, "row", "int8"),
        (16, (4096, 14336), 4, "row", "int8"),
        (32, (200, 4096), 4, "row", "int8"),
        (17, (200, 4096), 4, "row", "int8"),
        (20, (333, 1000), 3, "row", "float16"),
        (33, (1024, 2304), 2, "rows", "int8"),
        (33, (640, 4096), 4, "row", "float16"),
        (64, (4096, 4096), 4, "row", "int8"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_rows_match_float64_on_the_gpu(rows, shape, bits, sharing, entries, dtype):
    x, weight, bias = few_case(rows, shape, bits, sharing, entries, dtype)
    for form in (x, guarded(x)):  # words of two numbers, and numbers at odd addresses
        y = lut_linear(form, weight, bias, implementation=TRITON)
        assert y.dtype == dtype
        assert_close(y, x, weight, bias)
    bare = lut_linear(x, weight, implementation=TRITON)
    assert_close(bare, x, weight, torch.zeros_like(bias))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "bad"), [(3, torch.inf), (4, -torch.inf), (16, torch.nan), (20, torch.inf)]
)
def test_numbers_that_are_not_finite_stay_so_on_the_gpu(bits, rows, bad):
    x, weight, _ = few_case(rows, (64, 4096), bits)
    x[1, 1700] = bad
    x[2] = 0
    y = lut_linear(x, weight, implementation=TRITON)
    assert not y[1].isfinite().any()
    y[1] = 0
    assert y.isfinite().all()
    assert not y[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_corrections_are_added_to_few_rows_on_the_gpu(rows):
    matrix = torch.randn(160, 1024, device="cuda") ** 3
    weight = KMeans(bits=4, importance="none", sparse_outliers=0.01).fit(matrix)
    assert len(weight.outlier_values) > 1000
    x, bias = torch.randn(rows, 1024, device="cuda").half(), torch.randn(160, device="cuda").half()
    y = lut_linear(x, weight, bias, implementation=TRITON)
    assert_close(y, x, weight, bias)


def chain(rows):
    """Layers each of which reads what the one before writes, and a first input."""
    shapes = [(4096, 4096), (14336, 4096), (4096, 14336), (4096, 4096)]
    layers = [
        clustered(*shape, bits, device="cuda")[0]
        for shape, bits in zip(shapes, (4, 3, 4, 2), strict=True)
    ]
    return layers, torch.randn(rows, 4096, device="cuda").bfloat16()


def through(layers, x, between=lambda: None):
    """The last layer's output; ``between`` runs after each layer."""
    for weight in layers:
        x = lut_linear(x, weight, implementation=TRITON)
        between()
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("entries", ["int8", "float16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_is_the_reference_on_the_gpu(bits, entries, dtype):
    for shape, sharing in (((333, 1024), "row"), ((40, 2304), "rows")):
        weight, _ = clustered(*shape, bits, sharing, entries, device="cuda")
        dense = torch.full((shape[0] + 1, shape[1]), 7.0, device="cuda", dtype=dtype)
        hopper = torch.cuda.get_device_capability() == few_rows.CAPABILITY
        assert whole_rows.fits(dense[:-1], weight) == hopper
        if hopper:
            whole_rows.decode(weight, dense[:-1])
            assert torch.equal(dense[:-1], reconstruct(weight).to(dtype))
        assert (dense[-1] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 33])
def test_a_chain_without_pauses_is_as_one_with_pauses_on_the_gpu(rows):
    layers, x = chain(rows)
    expected = through(layers, x, torch.cuda.synchronize)
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(through(layers, x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 300, 1024])
def test_a_recorded_chain_follows_its_input_on_the_gpu(rows):
    layers, x = chain(rows)
    through(layers, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = through(layers, x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, through(layers, x, torch.cuda.synchronize))


def described():
    """What the compiler made of every kernel, by a process without the interpreter."""
    script = Path(__file__).with_name("compile_lut_linear.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), "80", "90", "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compile_without_spills():
    every = described()
    for facts in every:
        assert facts["stack"] == 0, facts
        if "packed" in facts:
            assert (facts["lookups"] > 0) == facts["packed"], facts
    wide = [facts for facts in every if facts["kernel"] == "multiply" and "wide" in facts]
    images = sum(facts["kernel"] == "make_image" and "wide" in facts for facts in every)
    assert len(wide) == 8
    shapes = [assert_multiplies_by_warpgroups(facts) for facts in wide]
    assert images == len(wide)
    assert {shape.cluster for shape in shapes} == {1, 2}
    assert any(shape.held < shape.steps for shape in shapes)
    assert sum(facts["kernel"] == "decode_rows" for facts in every) == 4
    few = [facts for facts in every if facts["kernel"] == "multiply" and "wide" not in facts]
    assert {tuple(facts["case"][:3]) for facts in few} == {
        *itertools.product((2, 3, 4), ["int8"], (1, 4, 16)),
        *itertools.product([4], ["float16"], (1, 4, 16)),
    }
    for facts in few:
        assert_streams(facts)
    sliced = sum(facts["kernel"] == "_add_up" for facts in every if "wide" not in facts)
    assert sliced == 3  # of the cases


def assert_multiplies_by_warpgroups(facts):
    """Weights are on their way before the wait for x, and nothing is repeated.

    Returns the division.
    """
    bits, entries, rows, (out_features, in_features) = facts["case"]
    pieces = 1 if entries == "int8" else 2
    shape = wide_rows.divide(rows, out_features, -(-in_features // 32), pieces, bits, 132)
    assert facts["registers"] * facts["warps"] * 32 <= 65536, facts
    assert facts["early"] == 2 * shape.depth, facts
    assert facts["early_products"] == 0, facts
    # A step of a warpgroup: 512 channels, 32 a product.
    assert facts["warpgroup_products"] == 16 * shape.halves * pieces, facts
    assert (facts["cluster_barriers"] > 0) == (shape.cluster > 1), facts
    return shape


def assert_streams(facts):
    """Two programs fit, weights are on their way before the wait for x, and nothing is repeated."""
    bits, entries, rows, (out_features, in_features) = facts["case"]
    assert facts["registers"] * facts["warps"] * 32 <= 65536 // 2, facts
    assert facts["shared"] + 1024 <= 228 * 1024 // 2, facts  # 1 KB of each is the system's
    assert facts["early"] == 2 * bits, (
        facts
    )  # a copy per plane of 16 bytes' words and half of a tile
    assert facts["early_products"] == 0, facts
    pieces = 1 if entries == "int8" else 2
    shape = few_rows.divide(rows, out_features, -(-in_features // 32), pieces, bits, 132)
    # One step of a warp: 512 channels, 32 a product.
    assert facts["products"] == 16 * shape.halves * shape.column_tiles * pieces, facts


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight, _ = clustered(4, 32, 4)
    with pytest.raises(DeviceError, match=r"device cpu.*CUDA device.*reference"):
        lut_linear(torch.randn(1, 32), weight, implementation=TRITON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 31)}, "channels"),
        ({"bias": torch.randn(3)}, "bias is"),
        ({"implementation": Implementation.AUTO}, "while planning"),
    ],
)
def test_refuses(change, message):
    weight, _ = clustered(4, 32, 4)
    call = {"x": torch.randn(1, 32), "weight": weight, "bias": None} | change
    with pytest.raises(ValueError, match=message):
        lut_linear(**call)
