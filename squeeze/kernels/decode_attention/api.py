"""Attention of the current tokens over a packed cache: validate, then choose the implementation."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from squeeze.errors import DeviceError, UnsupportedError
from squeeze.kernels.decode_attention import reference
from squeeze.types import Implementation, PackedBlocks

PLACE = "kernels.decode_attention"


@torch.no_grad()
def decode_attention(
    query: Tensor,
    packed_query: Tensor,
    shift: Tensor | None,
    keys: PackedBlocks | None,
    values: PackedBlocks | None,
    block_counts: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    exact_counts: Tensor,
    *,
    scaling: float,
    implementation: Implementation,
    softcap: float | None = None,
    split_output: bool = False,
    max_blocks: int | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Attend to packed blocks and to exact keys and values under one softmax.

    A packed token scores ``scaling * (packed_query . key + shift)``, an exact one
    ``scaling * query . key``; with a softcap ``c`` a score ``s`` becomes ``c * tanh(s / c)``. All
    valid packed blocks are visible to every query. Query ``i`` of row ``b`` sees the exact slots
    below ``exact_counts[b] - (T_q - 1 - i)``. A query that sees nothing gets output 0 and
    log-sum-exp -inf. Memory past the counts is never used.

    Args:
        query: ``[B, H, T_q, D]``, model dtype, in the basis of ``exact_keys``.
        packed_query: The same queries in the stored basis; ``query`` itself without a transform.
        shift: float32 ``[B, H, T_q]``, what a transform of the keys took from the dot products;
            or ``None``.
        keys: Packed blocks of all rows, or ``None`` before the first block is full.
        values: As ``keys``: same segment sizes and block length, any format.
        block_counts: int32 ``[B]``; row ``b`` owns blocks 0 to ``block_counts[b] - 1``.
        exact_keys: ``[B, H_kv, E, D]``, model dtype, any strides with unit channel stride; the
            valid slots of a row start at 0 and end with the current ``T_q`` tokens.
        exact_values: Same shape and dtype.
        exact_counts: int32 ``[B]``, valid slots of each row, the current tokens included.
        scaling: Multiplies every dot product; usually ``D ** -0.5``.
        implementation: ``reference`` or ``triton``; ``auto`` must have been resolved.
        softcap: Bound of the scores, or ``None``.
        split_output: Return the packed and the exact contribution unmerged.
        max_blocks: An upper bound of ``block_counts`` known to the caller, which saves launching
            for slots that are reserved and empty. Default: all slots of the segments, or of tables
            of addresses, which may have room for more.
        output_dtype: What the outputs are rounded to.
    Returns:
        ``(output, lse)``, or with ``split_output`` ``(packed_output, exact_output, lse)``, whose
        outputs add up to ``output``. Outputs ``[B, H, T_q, D]`` and natural-log ``lse``
        ``[B, H, T_q]`` are float32 (float64 from the reference for float64 queries), outputs of
        another ``output_dtype`` in that.
    Raises:
        DeviceError: ``triton`` without an NVIDIA GPU, the interpreter, or the package.
        UnsupportedError: ``triton`` for a format that brings no tile functions.
        ValueError: shapes that contradict each other, or ``auto``.
    """
    _check_shapes(query, packed_query, shift, exact_keys, exact_values)
    _check_blocks(keys, values, query.shape[0])
    slots = 0 if keys is None else _slots(keys)
    count = slots if max_blocks is None else min(max_blocks, slots)
    if not count:
        keys = values = None
    stored = (query, packed_query, shift, keys, values, block_counts)
    exact_slots = (exact_keys, exact_values, exact_counts)
    if implementation is Implementation.REFERENCE:
        packed, exact, lse = reference.decode_attention(
            *stored, *exact_slots, scaling=scaling, softcap=softcap, max_blocks=count
        )
        outputs: tuple[Tensor, ...] = (packed, exact) if split_output else (packed + exact,)
        if output_dtype != torch.float32:
            outputs = tuple(output.to(output_dtype) for output in outputs)
        return (*outputs, lse)
    if implementation is not Implementation.TRITON:
        raise ValueError("implementation is auto; it is resolved while planning")
    require_triton(query.device, *(blocks.format for blocks in (keys, values) if blocks))
    from squeeze.kernels.decode_attention import bitmap, codebook, streamed, triton

    # All compute the same: three are made for certain formats, the last takes every one.
    kernel: ModuleType = triton
    if codebook.takes(packed_query, exact_keys.shape[1], keys, values):
        kernel = codebook
    elif bitmap.takes(packed_query, (exact_keys, exact_values), keys, values):
        kernel = bitmap
    elif scaling > 0 and streamed.takes(packed_query, (exact_keys, exact_values), keys, values):
        kernel = streamed
    return kernel.decode_attention(
        *stored,
        *exact_slots,
        scaling=scaling,
        softcap=softcap,
        max_blocks=count,
        split_output=split_output,
        output_dtype=output_dtype,
    )


def has_tiles(name: str) -> bool:
    """Say whether the Triton kernel reads the format ``name``; imports nothing of Triton."""
    return importlib.util.find_spec(f"squeeze.kernels.decode_attention.tiles.{name}") is not None


def require_triton(device: torch.device, *formats: object) -> None:
    """Raise unless the Triton kernel can run on ``device`` for these formats.

    Raises:
        DeviceError: no NVIDIA GPU and no interpreter, or no Triton.
        UnsupportedError: a format without tile functions.
    """
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(PLACE, "triton is not installed", "", "Use implementation: reference")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DeviceError(
            PLACE,
            f"implementation triton on device {device}",
            "a CUDA device",
            "Move the model to the GPU or use implementation: reference",
        )
    for item in formats:
        name = item.info.name  # type: ignore[attr-defined]
        if not has_tiles(name):
            raise UnsupportedError(
                PLACE,
                f"format {name!r} has no Triton tile functions",
                "formats with a file in squeeze/kernels/decode_attention/tiles",
                "Use implementation: reference",
            )


def _slots(blocks: PackedBlocks) -> int:
    """Number of block slots that can be addressed."""
    if blocks.addresses:
        return len(next(iter(blocks.addresses.values())))
    return sum(map(_blocks_in, blocks.segments))


def _blocks_in(segment: dict[str, Tensor]) -> int:
    """Number of block slots of a segment."""
    return next(iter(segment.values())).shape[0]


def _check_shapes(
    query: Tensor, packed_query: Tensor, shift: Tensor | None, keys: Tensor, values: Tensor
) -> None:
    """Raise ValueError when the dense tensors do not belong together."""
    batch, heads, steps, size = query.shape
    if packed_query.shape != query.shape:
        raise ValueError(f"packed_query {packed_query.shape} differs from query {query.shape}")
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != size:
        raise ValueError(f"exact keys {keys.shape}, values {values.shape}, query {query.shape}")
    if heads % keys.shape[1]:
        raise ValueError(f"{heads} query heads are no multiple of {keys.shape[1]} KV heads")
    if shift is not None and shift.shape != (batch, heads, steps):
        raise ValueError(f"shift {shift.shape} is not {(batch, heads, steps)}")


def _check_blocks(keys: PackedBlocks | None, values: PackedBlocks | None, batch: int) -> None:
    """Raise ValueError when packed keys and values differ in their slots."""
    if (keys is None) != (values is None):
        raise ValueError("packed keys and values come together or not at all")
    if keys is None or values is None:
        return
    sizes = [tuple(map(_blocks_in, blocks.segments)) for blocks in (keys, values)]
    if sizes[0] != sizes[1] or keys.length != values.length:
        raise ValueError(
            f"keys hold {sizes[0]} blocks of {keys.length}, values {sizes[1]} of {values.length}"
        )
    rows = {next(iter(segment.values())).shape[1] for segment in keys.segments}
    if rows - {batch}:
        raise ValueError(f"packed blocks have {sorted(rows)} rows, the query has {batch}")
