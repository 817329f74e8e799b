"""Choose and launch the kernel for Hopper (``gluon``).

It runs the kinds of calls whose results were compared with the reference on an H200 (``covers``);
every other call runs the portable kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from squeeze.kernels.block_sparse_attention.sage import Quantize, Small
from squeeze.kernels.block_sparse_attention.sage_triton import quantize
from squeeze.types import BlockIndex

LOG2_E = 1.4426950408889634
KINDS = {None: 0, "float8": 1, "int8": 2}
DENSE_ROWS = 128


@dataclass(frozen=True)
class Settings:
    """How one kind of call runs.

    Attributes:
        stages: Tiles of keys and of values in flight.
        overlap: Whether the softmax of a tile runs between its own products or only beside those of
            the other consumer.
        consumer: Registers of a thread that multiplies.
        producer: Registers of a thread that loads.
        limit: Registers per thread at the launch, where two programs share a multiprocessor.
    """

    stages: int
    overlap: bool
    consumer: int
    producer: int
    limit: int | None


def settings(rows: int, kind: int, columns: bool) -> Settings:
    """Return how a call runs; 12 (8 for 64 rows) warps share the registers of a multiprocessor."""
    stages = 2 if kind == 0 or columns else 4
    producer = (72 if kind == 0 else 56) if columns else 24
    if rows == 64:
        return Settings(stages, kind == 0, 256 - producer, producer, 128)
    return Settings(stages, kind == 0, (504 - producer) // 16 * 8, producer, None)


def takes(
    query: Tensor, index: BlockIndex | None, softcap: float | None, to: Quantize | None
) -> bool:
    """Whether the kernel runs a call: on Hopper, with 16-bit queries, and of a kind it covers."""
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) == (9, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and covers(query.shape[-1], index, to)
    )


def covers(D: int, index: BlockIndex | None, to: Quantize | None) -> bool:
    """Whether the kernel is known to be right for a head size, an index and a rounding.

    Heads of 128: every earlier token, or listed blocks and columns. Heads of 64: every earlier
    token, nothing rounded.
    """
    if index is None:
        return D == 128 or (D == 64 and to is None)
    others = (index.pooled_ids, index.permutation)
    return D == 128 and all(x is None for x in others)


def _aligned(x: Tensor) -> Tensor:
    """Copy what rows of 16-byte pieces, their offsets in 32 bits, cannot be read from."""
    strides = [stride * x.element_size() % 16 for stride in x.stride()[:-1]]
    far = x.shape[2] * x.stride(2) >= 1 << 31
    bad = x.stride(-1) != 1 or x.data_ptr() % 16 or any(strides) or far
    return x.contiguous() if bad else x


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: BlockIndex | None,
    starts: Tensor | None,
    scaling: float,
    to: Quantize | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and results are those of ``api.block_sparse_attention``.

    Keys and values that the copy engine cannot read in place are copied first.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from squeeze.kernels.block_sparse_attention import gluon

    (B, H, T_q, D), (H_kv, T) = query.shape, keys.shape[1:3]
    rows = DENSE_ROWS if index is None else index.block_size
    wide = 64 if D <= 64 else 128
    columns = index is not None and index.column_ids is not None
    options = settings(rows, KINDS[to], columns)
    out = torch.empty(B, H, T_q, D, dtype=query.dtype, device=query.device)
    lse = torch.empty(B, H, T_q, dtype=torch.float32, device=query.device)

    def described(x: Tensor, shape: list[int], dtype: gl.dtype) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)

    small: Small | None = None
    if to is None:
        keys, values = _aligned(keys), _aligned(values)
        exact = gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16
        tables = [described(x, [1, 1, rows, wide], exact) for x in (keys, values)]
    else:
        if columns:
            keys, values = _aligned(keys), _aligned(values)
        small = quantize(keys, values, starts, rows, to)
        narrow = gl.int8 if to == "int8" else gl.float8e4nv
        tables = [
            described(small.keys.flatten(0, 2), [rows, wide], narrow),
            described(small.values.flatten(0, 2), [wide, rows], gl.float8e4nv),
        ]
    lists: list[Tensor | None] = [None] * 4
    if index is not None:
        found = (index.block_offsets, index.block_ids, index.column_offsets, index.column_ids)
        lists = [None if x is None else x.contiguous() for x in found]
    blocks = triton.cdiv(T, rows)
    skipped = (T - T_q) // rows if starts is None else 0
    scales = [small.key_scales, small.value_scales, small.means] if small else [lse] * 3
    limit = {} if options.limit is None else {"maxnreg": options.limit}
    gluon.attend[(B * H, blocks - skipped)](
        *tables, query, keys, values, out, lse, lse if starts is None else starts,
        *(lse if x is None else x for x in lists), *scales,
        *query.stride(), *keys.stride()[:3], *values.stride()[:3],
        *(0 if x is None else x.shape[-1] for x in lists[1::2]),
        T, T_q, small.keys.shape[2] if small else 0, blocks, scaling * LOG2_E,
        H=H, GROUPS=H // H_kv, D=D, BLOCK_D=wide, HAS_STARTS=starts is not None,
        LISTED=index is not None, COLUMNS=columns, KIND=KINDS[to], CONSUMERS=rows // 64,
        STAGES=options.stages, OVERLAP=options.overlap, CONSUMER_REGISTERS=options.consumer,
        PRODUCER_REGISTERS=options.producer, num_warps=4, **limit,
    )  # fmt: skip
    return out, lse
