"""Integer linear layers against dense ones in the library, by rows of the input.

Measured as ``lut_linear``: copies of the weight that no cache holds together, in one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.lut_linear import COPIES, REPLAYS, ROWS, SHAPES, _dense_call, _median_us
from squeeze.kernels.integer_linear.api import integer_linear
from squeeze.quant.weights.integer import Integer
from squeeze.types import Implementation, IntegerWeight

OP = "integer_linear"
FORMS = (
    Integer(bits=4),
    Integer(bits=4, group_size=64, symmetric=False),
    Integer(bits=3, group_size=64, symmetric=False),
    Integer(bits=8, group_size=0),
)


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every shape, form and number of rows; a CPU runs the reference on one small shape.

    Yields:
        One dictionary per case: op, shape ``[out, in]``, rows, bits (16 is the library),
        effective_bits, implementation, median_us, bytes of one weight, baseline, and speedup over
        the library in the same dtype as x.
    """
    place = torch.device(device)
    small = place.type == "cpu"
    for shape in ((384, 384),) if small else SHAPES:
        for rows in (1, 16) if small else ROWS:
            yield from _shape(shape, rows, place, repeats)


def _shape(
    shape: tuple[int, int], rows: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure the library and every form on one shape."""
    small = device.type == "cpu"
    implementation = Implementation.REFERENCE if small else Implementation.TRITON
    dtype = torch.float32 if small else torch.bfloat16
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    dense = torch.randn(*shape, device=device).to(dtype)
    library = _median_us([_dense_call(x, dense.clone()) for _ in range(COPIES)], device, repeats)
    facts = {"op": OP, "shape": list(shape), "rows": rows, "dtype": str(dtype)[6:]}
    yield facts | {
        "bits": 16, "effective_bits": 8.0 * dense.itemsize, "implementation": "library",
        "median_us": library, "bytes": dense.nbytes, "baseline": True, "speedup": 1.0,
    }  # fmt: skip
    del dense
    for form in FORMS:
        weights = [_weight(form, shape, device) for _ in range(COPIES)]
        ours = _median_us([_call(x, each, implementation) for each in weights], device, repeats)
        yield facts | {
            "bits": form.bits, "effective_bits": round(weights[0].effective_bits, 3),
            "implementation": implementation.value, "median_us": ours, "bytes": weights[0].nbytes,
            "baseline": False, "speedup": library / ours,
        }  # fmt: skip


def _call(x: Tensor, weight: IntegerWeight, how: Implementation) -> Callable[[], Tensor]:
    return lambda: integer_linear(x, weight, implementation=how)


def _weight(form: Integer, shape: tuple[int, int], device: torch.device) -> IntegerWeight:
    """A random packed weight."""
    weight = form.empty(*shape, device)
    weight.codes.random_(-(2**31), 2**31 - 1)
    weight.scale.fill_(1e-3)
    if weight.zero is not None:
        weight.zero.random_(0, 2**weight.bits)
    return weight
