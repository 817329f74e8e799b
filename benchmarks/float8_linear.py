"""Palettes of E4M3 entries times rounded tokens against the library's 16-bit product.

Rounding the tokens and decoding the weight are part of every figure. Calls and copies as in
``benchmarks.lut_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lut_linear import COPIES, REPLAYS, SHAPES, _dense_call, _median_us
from squeeze.kernels.bits import pack
from squeeze.kernels.float8_linear.api import float8_linear
from squeeze.types import ClusteredWeight, Implementation

OP = "float8_linear"
BITS = (4, 3)
ROWS = (1, 16, 256, 2048)
SPEEDUP, BAR_ROWS, BAR_BITS = 1.3, 2048, 4


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every shape, width and number of rows; a CPU runs the reference on one small shape.

    Yields:
        One dictionary per case: op, shape ``[out, in]``, rows, bits (16 is the library),
        effective_bits, implementation, median_us, bytes of one weight, baseline, and speedup
        over the library in the same dtype as x.
    """
    place = torch.device(device)
    small = place.type == "cpu"
    for shape in ((384, 384),) if small else SHAPES:
        for rows in (1, 16) if small else ROWS:
            yield from _shape(shape, rows, place, repeats)


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how far the rows at hand meet the bars: times faster than the library in bfloat16."""
    result = []
    for row in rows:
        if (row["rows"], row["bits"]) == (BAR_ROWS, BAR_BITS):
            bar = {"bar": f"{BAR_ROWS} tokens of {row['shape']}", "wanted": SPEEDUP}
            result.append({**bar, "ratio": row["speedup"], "met": row["speedup"] >= SPEEDUP})
    return result


def _shape(
    shape: tuple[int, int], rows: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure the library and every width on one shape."""
    small = device.type == "cpu"
    implementation = Implementation.REFERENCE if small else Implementation.TRITON
    dtype = torch.float32 if small else torch.bfloat16
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    dense = torch.randn(*shape, device=device).to(dtype)
    calls = [_dense_call(x, dense.clone()) for _ in range(COPIES)]
    library = _median_us(calls, device, repeats)
    facts = {"op": OP, "shape": list(shape), "rows": rows, "dtype": str(dtype)[6:]}
    yield facts | {
        "bits": 16, "effective_bits": 8.0 * dense.itemsize, "implementation": "library",
        "median_us": library, "bytes": dense.nbytes, "baseline": True, "speedup": 1.0,
    }  # fmt: skip
    del calls, dense
    for bits in BITS:
        weights = [random_weight(*shape, bits, device) for _ in range(COPIES)]
        ours = _median_us([_call(x, each, implementation) for each in weights], device, repeats)
        yield facts | {
            "bits": bits, "effective_bits": round(weights[0].effective_bits, 3),
            "implementation": implementation.value, "median_us": ours, "bytes": weights[0].nbytes,
            "baseline": False, "speedup": library / ours,
        }  # fmt: skip


def _call(x: Tensor, weight: ClusteredWeight, how: Implementation) -> Callable[[], Tensor]:
    return lambda: float8_linear(x, weight, implementation=how)


def random_weight(
    out_features: int, in_features: int, bits: int, device: torch.device
) -> ClusteredWeight:
    """Random codes under normal entries, a codebook per row."""
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, device=device)
    book = (torch.randn(out_features, 1, 2**bits, device=device) * 120).clamp(-448, 448)
    book = book.sort(-1).values.to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.full((out_features,), 1e-4, dtype=torch.float16, device=device)
    shape = (out_features, in_features)
    return ClusteredWeight(
        pack(codes, bits), book, scale, bits, shape, 1, in_features, inputs="float8"
    )
