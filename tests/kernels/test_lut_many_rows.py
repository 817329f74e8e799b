"""The clustered linear layer that looks entries up for the tensor cores: arithmetic and choice."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from launched import absent, asked_about
from ptx import as_bits, run

from squeeze.kernels.bits import pack
from squeeze.kernels.lut_linear import gluon_dense, gluon_many, many_rows
from squeeze.kernels.lut_linear.reference import reconstruct
from squeeze.types import ClusteredWeight


def packed(shape=(4096, 4096), bits=4, columns=None, dtype=torch.int8):
    """A weight without memory."""
    groups = (shape[0], 1 if columns is None else shape[1] // columns, 2**bits)
    return ClusteredWeight(
        absent(shape[0], -(-shape[1] // 32) * bits, dtype=torch.int32),
        absent(*groups, dtype=dtype), absent(shape[0], dtype=torch.float16),
        bits, shape, 1, columns or shape[1],
    )  # fmt: skip


def table(entries, factor, dtype):
    """A row's table as the kernel holds it: low, then high bytes."""
    half, size = dtype == torch.float16, entries.element_size()
    assembly = gluon_dense.table(size, half)
    words = (entries.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    pairs = [(words[size * i], words[size * i + size - 1]) for i in range(4)]
    found = [run(assembly, 2, [*pair, as_bits(factor)]) for pair in pairs]
    return [low for low, _ in found] + [high for _, high in found]


@pytest.mark.parametrize("entries", [torch.int8, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entries_of_neighbouring_channels_are_pairs(dtype, entries):
    u, factor = 32, 0.0123
    codes = torch.randint(0, 16, (1, 32 * u))
    codes[0, :16] = torch.arange(16)
    book = torch.arange(-120, 120, 15, dtype=torch.float32).to(entries)
    expected = (book.float() * factor).to(dtype).view(torch.int16)[codes[0]]
    words = (pack(codes, 4)[0].long() & 0xFFFFFFFF).tolist()
    entry = table(book, factor, dtype)
    for q, part, j in itertools.product((0, 3), range(4), range(0, 32, 2)):
        pair = words[32 * q + j], words[32 * q + j + 1]
        found = run(gluon_many.look_up(part), 2, [*pair, *entry])
        for n, number in enumerate(found):
            first = 4 * (2 * part + n) * u + 32 * q + j  # where the kernel fetches x
            both = [int(value) & 65535 for value in expected[first : first + 2]]
            assert [number & 65535, number >> 16] == both


def test_what_the_kernel_takes():
    x = absent(2048, 4096, dtype=torch.bfloat16)
    assert many_rows.takes(x, packed())
    assert many_rows.takes(x.half(), packed(dtype=torch.float16))
    assert many_rows.takes(x[:, :3072], packed((4096, 3072)))
    assert many_rows.takes(x, replace(packed(), rows=8))
    assert not many_rows.takes(x.float(), packed())
    assert not many_rows.takes(x, packed(bits=3))
    assert not many_rows.takes(x, packed(columns=64))
    assert not many_rows.takes(x[:, :512], packed((4096, 512)))
    assert not many_rows.takes(x, packed((4100, 4096)))
    assert not many_rows.takes(absent(2048, 4100, dtype=x.dtype)[:, :4096], packed())
    assert not many_rows.takes(x.T, packed((4096, 2048)))


@pytest.mark.parametrize("out_features", [4096, 14336])
@pytest.mark.parametrize("rows", [512, 1024, 2048, 4096])
def test_the_kernel_measured_as_faster_is_chosen(rows, out_features):
    assert many_rows.faster(rows, out_features, 132) == ((rows, out_features) != (512, 4096))


def test_few_tiles_are_left_to_the_library():
    assert not many_rows.faster(257, 14336, 132)
    assert not many_rows.faster(257, 4096, 132)
    assert not many_rows.faster(2048, 1024, 132)
    assert many_rows.faster(4096, 1024, 132)


def test_where_it_is_chosen():
    x = absent(2048, 4096, dtype=torch.bfloat16)
    with asked_about(90):
        assert many_rows.fits(x, packed())
        assert many_rows.fits(x.half(), packed())
        assert many_rows.fits(x, replace(packed(), rows=8))
        assert not many_rows.fits(x.half(), replace(packed(), rows=8))
        assert many_rows.fits(x[:512], packed((14336, 4096)))
        assert not many_rows.fits(x[:512], packed())
        assert not many_rows.fits(x[:256], packed((14336, 4096)))
        assert not many_rows.fits(x, packed((4096, 4096), bits=3))
    with asked_about(100):
        assert not many_rows.fits(x, packed())
    assert not many_rows.fits(torch.empty(2048, 4096, dtype=torch.bfloat16), packed())


def test_it_is_compiled_without_spills_and_products_are_not_waited_for():
    script = Path(__file__).with_name("compile_lut_many_rows.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 2
    for facts in rows:
        assert facts["stack"] == 0, facts
        assert facts["shared"] <= 227 * 1024, facts
        # Two consumers, each with four steps of two tiles of two products.
        assert facts["products"] == 2 * 4 * 2 * 2, facts
        # A wait for all but the newest step after steps 1 to 3 and one for all after the fourth.
        assert (facts["waits"], facts["full_waits"]) == (8, 2), facts


def gpu_weight(shape, entries, rows):
    """A random weight on the GPU."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda")
    groups = (-(-shape[0] // rows), 1, 16)
    if entries == "int8":
        book = torch.randint(-127, 128, groups, dtype=torch.int8, device="cuda")
        scale = (torch.rand(shape[0], device="cuda") * 1e-4 + 5e-5).half()
    else:
        book, scale = (torch.randn(groups, device="cuda") * 0.01).half(), None
    return ClusteredWeight(pack(codes, 4), book, scale, 4, shape, rows, shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shape", "entries", "sharing", "dtype", "biased"),
    [
        (2048, (4096, 4096), "int8", 1, torch.bfloat16, False),
        (2048, (14336, 4096), "float16", 1, torch.bfloat16, True),
        (1024, (4096, 14336), "int8", 1, torch.bfloat16, True),
        (300, (1000, 1024), "int8", 8, torch.float16, True),
        (1, (136, 2048), "float16", 1, torch.float16, False),
    ],
)
def test_many_rows_match_float64_on_the_gpu(rows, shape, entries, sharing, dtype, biased):
    if torch.cuda.get_device_capability() != many_rows.CAPABILITY:
        pytest.skip("needs a Hopper GPU")
    weight = gpu_weight(shape, entries, sharing)
    x = torch.full((rows + 2, shape[1] + 16), torch.nan, device="cuda", dtype=dtype)
    x = x[:rows, 8:-8].copy_(torch.randn(rows, shape[1], device="cuda"))
    bias = torch.randn(shape[0], device="cuda").to(dtype) if biased else None
    assert many_rows.takes(x, weight)
    dense = reconstruct(weight).to(dtype)
    torch.cuda.synchronize()
    found = [many_rows.lut_linear(x, weight, bias) for _ in range(4)]
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    library = torch.nn.functional.linear(x, dense, bias)
    band = torch.finfo(dtype).eps * exact.abs().max()
    worst = (found[0] - exact).abs().max()
    assert worst <= 2 * (library - exact).abs().max() + band
    for other in found[1:]:
        assert torch.equal(found[0], other)
