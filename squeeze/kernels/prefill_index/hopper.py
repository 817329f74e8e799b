"""Choose and launch the kernel of cells for Hopper (``gluon``)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

LOG2_E = 1.4426950408889634
ROWS, COLUMNS, DEPTH = 128, 256, 64  # of one product: cells of queries, of keys, channels
STAGES = 4
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def takes(query: Tensor, keys: Tensor, stride: int, scaling: float, softcap: float | None) -> bool:
    """Whether the kernel runs a call: on Hopper, with 16-bit queries, and of a kind it covers."""
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) == (9, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and scaling > 0
        and min(query.shape[2], keys.shape[2]) >= stride
        and covers(query.shape[-1])
    )


def covers(D: int) -> bool:
    """Whether the kernel is known to be right for a head size, by comparison on an H200."""
    return D in (64, 80, 128)


def aligned(x: Tensor) -> Tensor:
    """Copy what rows of 16-byte pieces cannot be read from."""
    strides = [stride * x.element_size() % 16 for stride in x.stride()[:-1]]
    return x.contiguous() if x.stride(-1) != 1 or x.data_ptr() % 16 or any(strides) else x


def weigh_cells(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    stride: int,
    size: int,
    scaling: float,
    rows: range,
) -> Tensor:
    """Launch; arguments and results are those of ``api.weigh_cells``, without a bound of scores.

    One launch; scratch memory as ``cells.weigh_cells``, for one program a multiprocessor. Queries
    and keys that the copy engine cannot read in place are copied first.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from squeeze.kernels.prefill_index import gluon

    query, keys = aligned(query), aligned(keys)
    (B, H, T_q, D), (H_kv, T), device = query.shape, keys.shape[1:3], query.device
    cells, exact = size // stride, gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16

    def described(x: Tensor, each: int) -> list[TensorDescriptor]:
        """View ``x`` as cells of tokens: those that there are, and those that are whole."""
        b, h, t, d = x.stride()
        block = [1, 1, each, 1, DEPTH]
        layout = gl.NVMMASharedLayout.get_default_for(block, exact)
        numbers = (-(-x.shape[2] // stride), x.shape[2] // stride)
        return [
            TensorDescriptor(
                x, [*x.shape[:2], number, stride, D], [b, h, stride * t, t, d], block, layout
            )
            for number in numbers
        ]

    total, width = len(rows) * cells, rows.stop
    tiles = triton.cdiv(total, ROWS)
    items = B * H * tiles
    grid = min(items, torch.cuda.get_device_properties(device).multi_processor_count)
    padded = triton.cdiv(rows.start * cells + tiles * ROWS, COLUMNS) * COLUMNS // cells
    each = ROWS * (padded + padded * cells // COLUMNS)
    scratch = torch.empty(grid * each, dtype=torch.float32, device=device)
    out = torch.empty(B, H, len(rows), width, dtype=torch.float32, device=device)
    gluon.weigh[(grid,)](
        *described(query, ROWS), *described(keys, COLUMNS), out if starts is None else starts,
        scratch, out, rows.start * cells, total, width, padded, items, B * H, H, T, T_q,
        scaling / stride * LOG2_E,
        GROUPS=H // H_kv, S=stride, SHIFT=stride.bit_length() - 1, CELLS=cells,
        SLICES=triton.cdiv(D, DEPTH), HAS_STARTS=starts is not None, STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out
