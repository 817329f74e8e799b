"""Clustered linear layers against dense ones in the library, by rows of the input.

The calls of one measurement read different copies of the weight in turn, together some times what
the GPU's own cache holds, and replay as one CUDA graph of many calls, so neither reuse nor the
start of a graph is in a figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from squeeze.kernels.bits import pack
from squeeze.kernels.lut_linear.api import lut_linear
from squeeze.types import ClusteredWeight, Implementation

OP = "lut_linear"
TESTS = ("tests/kernels/test_lut_linear.py", "tests/kernels/test_lut_many_rows.py")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
FORMS = ((4, "int8"), (4, "float16"), (3, "int8"))  # width of an index, dtype of the entries
ROWS = (1, 4, 16, 64, 2048)
INTEGER_ROWS, INTEGER_GROUP = 16, 128  # the library's int4 product is far behind above
COPIES, REPLAYS = 8, 20
CALLS = 32  # of a graph at least: starting one takes some microseconds
CACHED = 150_000_000  # bytes of all copies at least, three times the cache of an H200
# Width of an index, rows, shapes, and how many times as fast as cuBLAS.
BARS = ((4, 1, SHAPES[1:], 2.7), (4, 16, SHAPES, 2.2), (4, 2048, SHAPES, 0.9), (3, 1, SHAPES, 3.3))


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every shape, form and number of rows; a CPU runs the reference on one small shape.

    Yields:
        One dictionary per case: op, shape ``[out, in]``, rows, bits (16 is the library), entries,
        effective_bits, implementation, median_us, bytes of one weight, baseline, and speedup
        over the library in the same dtype as x.
    """
    place = torch.device(device)
    small = place.type == "cpu"
    for shape in ((384, 384),) if small else SHAPES:
        for rows in (1, 16) if small else ROWS:
            yield from _shape(shape, rows, place, repeats)


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how far the rows at hand meet the bars, where all that a bar asks for is measured.

    Bars of cuBLAS' time, and the library's int4 product by the form of as many bits.
    """
    found = {_case(row): row for row in rows}
    result = []
    for bits, entries in FORMS:
        name = f"{bits} bits {entries}"
        for width, count, shapes, wanted in BARS:
            if width == bits:
                asked = [(bits, entries, count, *shape) for shape in shapes]
                ratios = {case: found[case]["speedup"] for case in asked if case in found}
                bar = f"{name}, {count} rows against cuBLAS"
                result += judged(bar, wanted, asked, ratios)
        asked = [
            (bits, entries, count, *shape)
            for shape in SHAPES
            for count in ROWS
            if bits == 4 and count <= INTEGER_ROWS
        ]
        ratios = {}
        for case in asked:
            integer = found.get((bits, "uniform", *case[2:]))
            if integer and case in found:
                ratios[case] = integer["median_us"] / found[case]["median_us"]
        result += judged(f"{name} against the library's int4", 1.0, asked, ratios)
    return result


def judged(
    bar: str, wanted: float, asked: Sequence[tuple[Any, ...]], ratios: Mapping[Any, float]
) -> list[dict[str, Any]]:
    """One bar's result by the least of the ratios; none where one that it asks for is missing."""
    if not asked or any(case not in ratios for case in asked):
        return []
    least = min(asked, key=lambda case: ratios[case])
    ratio = ratios[least]
    return [
        {"bar": bar, "wanted": wanted, "ratio": ratio, "met": ratio >= wanted, "case": list(least)}
    ]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    """Width of an index, dtype of the entries, rows and shape of a measurement."""
    return row["bits"], row["entries"], row["rows"], *row["shape"]


def _shape(
    shape: tuple[int, int], rows: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure the libraries and every form on one shape."""
    small = device.type == "cpu"
    implementation = Implementation.REFERENCE if small else Implementation.TRITON
    dtype = torch.float32 if small else torch.bfloat16
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    dense = torch.randn(*shape, device=device).to(dtype)
    calls = [_dense_call(x, dense.clone()) for _ in range(COPIES)]
    library = _median_us(calls, device, repeats)
    facts = {"op": OP, "shape": list(shape), "rows": rows, "dtype": str(dtype)[6:]}
    yield facts | {
        "bits": 16, "entries": facts["dtype"], "effective_bits": 8.0 * dense.itemsize,
        "implementation": "library", "median_us": library, "bytes": dense.nbytes,
        "baseline": True, "speedup": 1.0,
    }  # fmt: skip
    del calls, dense
    if not small and rows <= INTEGER_ROWS:
        integers = [_integer_call(x, shape) for _ in range(COPIES)]
        taken = _median_us(integers, device, repeats)
        nbytes = shape[0] * shape[1] // 2 + shape[0] * shape[1] // INTEGER_GROUP * 4
        yield facts | {
            "bits": 4, "entries": "uniform", "effective_bits": 8 * nbytes / (shape[0] * shape[1]),
            "implementation": "library int4", "median_us": taken, "bytes": nbytes,
            "baseline": True, "speedup": library / taken,
        }  # fmt: skip
    for bits, entries in FORMS:
        weights = [_weight(*shape, bits, entries, device)]
        copies = 1 if small else max(COPIES, -(-CACHED // weights[0].nbytes))
        weights += [_weight(*shape, bits, entries, device) for _ in range(copies - 1)]
        ours = _median_us([_call(x, each, implementation) for each in weights], device, repeats)
        yield facts | {
            "bits": bits, "entries": entries,
            "effective_bits": round(weights[0].effective_bits, 3),
            "implementation": implementation.value, "median_us": ours, "bytes": weights[0].nbytes,
            "baseline": False, "speedup": library / ours,
        }  # fmt: skip


def _dense_call(x: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    return lambda: linear(x, dense)


def _call(x: Tensor, weight: ClusteredWeight, how: Implementation) -> Callable[[], Tensor]:
    return lambda: lut_linear(x, weight, implementation=how)


def _integer_call(x: Tensor, shape: tuple[int, int]) -> Callable[[], Tensor]:
    """The library's product with uniform 4-bit integers in groups."""
    out_features, in_features = shape
    codes = torch.randint(
        0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=x.device
    )
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.full(
        (in_features // INTEGER_GROUP, out_features, 2), 1e-2, dtype=x.dtype, device=x.device
    )
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, INTEGER_GROUP, scales)


def _weight(
    out_features: int, in_features: int, bits: int, entries: str, device: torch.device
) -> ClusteredWeight:
    """A random weight with a codebook per row."""
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, device=device)
    shape = (out_features, 1, 2**bits)
    codebook, scale = torch.randn(*shape, device=device).half(), None
    if entries == "int8":
        codebook = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scale = torch.full((out_features,), 1e-4, dtype=torch.float16, device=device)
    return ClusteredWeight(
        pack(codes, bits),
        codebook.sort(-1).values,
        scale,
        bits,
        (out_features, in_features),
        1,
        in_features,
    )


def _median_us(calls: Sequence[Callable[[], Tensor]], device: torch.device, repeats: int) -> float:
    """Median microseconds of one call."""
    if device.type == "cpu":
        return float(Timer("call()", globals={"call": calls[0]}).blocked_autorange().median * 1e6)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = -(-CALLS // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)
