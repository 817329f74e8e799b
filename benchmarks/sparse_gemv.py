"""Linear layers that skip columns of small inputs against dense ones in the library.

The calls of one measurement read different copies of the weight, together more than the GPU's own
cache holds, and replay as one CUDA graph, so neither reuse nor launch overhead is in a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lut_linear import _dense_call, _median_us, judged
from squeeze.kernels.sparse_gemv.api import by_columns, sparse_gemv
from squeeze.types import Implementation

OP = "sparse_gemv"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
SPARSITIES = (0.0, 0.3, 0.5, 0.7)
ROWS = (1, 2, 4)
COPIES, REPLAYS = 8, 20
BARS = ((0.5, 1, 1.6),)  # sparsity, rows, and how many times as fast as cuBLAS


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every shape, share and number of rows; a CPU runs the reference on one small shape.

    Yields:
        One dictionary per case: op, shape ``[out, in]``, rows, sparsity of each row, live share of
        the columns, implementation, median_us, bytes of the live columns, baseline, and speedup
        over the library in the same dtype.
    """
    place = torch.device(device)
    small = place.type == "cpu"
    for shape in ((384, 384),) if small else SHAPES:
        for rows in (1,) if small else ROWS:
            yield from _shape(shape, rows, place, repeats)


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how far the rows at hand meet the bars, where all shapes are measured."""
    found = {
        (row["sparsity"], row["rows"], *row["shape"]): row["speedup"]
        for row in rows
        if not row["baseline"]
    }
    result = []
    for sparsity, count, wanted in BARS:
        asked = [(sparsity, count, *shape) for shape in SHAPES]
        bar = f"{sparsity:.0%} of x zero, {count} rows against cuBLAS"
        result += judged(bar, wanted, asked, found)
    return result


def _shape(
    shape: tuple[int, int], rows: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure the library and every share on one shape."""
    small = device.type == "cpu"
    implementation = Implementation.REFERENCE if small else Implementation.TRITON
    dtype = torch.float32 if small else torch.bfloat16
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    weights = [torch.randn(*shape, device=device).to(dtype) for _ in range(COPIES)]
    library = _median_us([_dense_call(x, each) for each in weights], device, repeats)
    facts = {"op": OP, "shape": list(shape), "rows": rows, "dtype": str(dtype)[6:]}
    yield facts | {
        "sparsity": 0.0, "live": 1.0, "implementation": "library", "median_us": library,
        "bytes": weights[0].nbytes, "baseline": True, "speedup": 1.0,
    }  # fmt: skip
    weights = [by_columns(each) for each in weights]
    for sparsity in SPARSITIES:
        bound = x[0].float().abs().quantile(sparsity) if sparsity else -1.0
        threshold = torch.full((shape[1],), float(bound), device=device)
        live = float((x.abs() > threshold).any(0).float().mean())
        calls = [_call(x, each, threshold, implementation) for each in weights]
        ours = _median_us(calls, device, repeats)
        yield facts | {
            "sparsity": sparsity, "live": round(live, 4), "implementation": implementation.value,
            "median_us": ours, "bytes": int(live * weights[0].nbytes), "baseline": False,
            "speedup": library / ours,
        }  # fmt: skip


def _call(
    x: Tensor, weight: Tensor, threshold: Tensor, how: Implementation
) -> Callable[[], Tensor]:
    return lambda: sparse_gemv(x, weight, threshold, implementation=how)
