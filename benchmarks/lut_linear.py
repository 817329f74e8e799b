"""Clustered linear layers against dense ones in the library, by rows of the input.

The calls of one measurement read different copies of the weight, together more than the GPU's own
cache holds, and replay as one CUDA graph, so neither reuse nor launch overhead is in a figure.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from squeeze.kernels.bits import pack
from squeeze.kernels.lut_linear.api import lut_linear
from squeeze.types import ClusteredWeight, Implementation

OP = "lut_linear"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BITS = (2, 3, 4)
ROWS = (1, 16, 512)
ROTATED_BYTES, REPLAYS = 256 * 2**20, 20


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every shape, width and number of rows; a CPU runs the reference on one small shape.

    Yields:
        One dictionary per case: op, shape ``[out, in]``, rows, bits (16 is the library),
        effective_bits, implementation, median_us, bytes of one weight, baseline, and speedup
        over the library.
    """
    place = torch.device(device)
    small = place.type == "cpu"
    for shape in ((384, 384),) if small else SHAPES:
        for rows in (1, 16) if small else ROWS:
            yield from _shape(shape, rows, place, repeats)


def _shape(
    shape: tuple[int, int], rows: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure the library and every width on one shape."""
    small = device.type == "cpu"
    implementation = Implementation.REFERENCE if small else Implementation.TRITON
    dtype = torch.float32 if small else torch.bfloat16
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    dense = torch.randn(*shape, device=device).to(dtype)
    calls = [_dense_call(x, dense.clone()) for _ in range(_copies(dense.nbytes))]
    library = _median_us(calls, device, repeats)
    facts = {"op": OP, "shape": list(shape), "rows": rows, "dtype": str(dtype)[6:]}
    yield facts | {
        "bits": 16, "effective_bits": 8.0 * dense.itemsize, "implementation": "library",
        "median_us": library, "bytes": dense.nbytes, "baseline": True, "speedup": 1.0,
    }  # fmt: skip
    for bits in BITS:
        weight = _weight(shape[0], shape[1], bits, device)
        copies = [_copy(weight) for _ in range(_copies(weight.nbytes))]
        ours = _median_us([_call(x, copy, implementation) for copy in copies], device, repeats)
        yield facts | {
            "bits": bits, "effective_bits": round(weight.effective_bits, 3),
            "implementation": implementation.value, "median_us": ours, "bytes": weight.nbytes,
            "baseline": False, "speedup": library / ours,
        }  # fmt: skip


def _dense_call(x: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    return lambda: linear(x, dense)


def _call(x: Tensor, weight: ClusteredWeight, how: Implementation) -> Callable[[], Tensor]:
    return lambda: lut_linear(x, weight, implementation=how)


def _copies(nbytes: int) -> int:
    """Enough copies to push one another out of the cache, within reason."""
    return min(32, -(-ROTATED_BYTES // nbytes)) if nbytes > 2**20 else 1


def _copy(weight: ClusteredWeight) -> ClusteredWeight:
    """Copy the indices; codebook and scale are small and stay shared."""
    return dataclasses.replace(weight, indices=weight.indices.clone())


def _weight(
    out_features: int, in_features: int, bits: int, device: torch.device
) -> ClusteredWeight:
    """A random weight with an int8 codebook per row."""
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, device=device)
    codebook = torch.randint(-127, 128, (out_features, 1, 2**bits), dtype=torch.int8, device=device)
    return ClusteredWeight(
        pack(codes, bits),
        codebook.sort(-1).values,
        torch.full((out_features,), 1e-4, dtype=torch.float16, device=device),
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
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
