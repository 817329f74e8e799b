"""Check the call and choose the implementation of block-sparse causal attention."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from squeeze.errors import DeviceError, UnsupportedError
from squeeze.kernels.block_sparse_attention import reference
from squeeze.kernels.block_sparse_attention.sage import Quantize
from squeeze.types import BlockIndex, Implementation

OP = "block_sparse_attention"


def block_sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: BlockIndex | None,
    *,
    starts: Tensor | None = None,
    scaling: float,
    softcap: float | None = None,
    quantize: Quantize | None = None,
    implementation: Implementation,
) -> tuple[Tensor, Tensor]:
    """Attend the last T_q of T tokens to those of the T tokens that an index lists, causally.

    out[t] = sum_j p[t, j] v[j] over listed j <= t; p = softmax_j(scaling * q[t] . k[j]). An average
    that the index lists is a key and a value too, its score raised by ln of its count of tokens.
    Head h reads key/value head h // (H / H_kv); nothing is repeated. Any strides are fine.

    Args:
        query: After RoPE, ``[B, H, T_q, D]``, T_q <= T, float16, bfloat16, float32 (or float64:
            reference).
        keys: After RoPE, ``[B, H_kv, T, D]``, dtype of the query; H_kv divides H.
        values: ``[B, H_kv, T, D]``, dtype of the query.
        index: What each block of queries reads, by position within the row; ``None`` is every
            earlier token.
        starts: int64 ``[B]``, left-padding tokens of each row, or ``None`` when there are none.
        scaling: Multiplies the dot products.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``, or ``None``.
        quantize: ``int8`` or ``float8``: whole blocks of keys read in order, all of them where the
            index is ``None``, are multiplied in eight bits (SageAttention): rounded queries and
            keys without their mean, E4M3 weights and values (``sage``). On normal inputs outputs
            have a cosine of 0.9994 with those of ``None``, which rounds nothing; float8 keys only
            0.9988.
        implementation: ``reference`` or ``triton``; ``auto`` is resolved while planning.
    Returns:
        Output ``[B, H, T_q, D]`` in the query's dtype, and the natural logarithm of the softmax
        denominator ``[B, H, T_q]``, float32 (float64 for float64 inputs). Padding rows, and rows
        that list no key, give 0 and -inf.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``implementation`` is auto.
        DeviceError: triton was asked for where it cannot run.
        UnsupportedError: triton was asked for with a dtype, head size or block size it lacks, or
            eight bits with a bound of the scores, or on a GPU without E4M3 products.
    Source: SageAttention2, arXiv 2411.10958, and SageAttention, arXiv 2410.02367.
    Differs: queries have a scale per token and none of their mean taken away; keys per block of the
        index and values per channel as there; gathered keys stay in 16 bits.
    """
    _check(query, keys, values, index, starts)
    if quantize is not None and softcap is not None:
        raise UnsupportedError(
            OP, "eight-bit products under a bound of the scores", "no softcap, or no quantize"
        )
    if implementation is Implementation.REFERENCE:
        return reference.attend(query, keys, values, index, starts, scaling, softcap, quantize)
    if implementation is Implementation.TRITON:
        _check_triton(query, index, quantize)
        from squeeze.kernels.block_sparse_attention import triton

        return triton.attend(query, keys, values, index, starts, scaling, softcap, quantize)
    raise ValueError(f"{OP}: implementation must be resolved before the call, got {implementation}")


def _check(
    query: Tensor, keys: Tensor, values: Tensor, index: BlockIndex | None, starts: Tensor | None
) -> None:
    (B, H, T_q, D), (H_kv, T) = query.shape, keys.shape[1:3]
    if keys.shape != values.shape or keys.shape != (B, H_kv, T, D) or H % H_kv or T_q > T:
        shapes = [tuple(tensor.shape) for tensor in (query, keys, values)]
        raise ValueError(f"{OP}: need [B, H, T_q, D] and twice [B, H_kv, T, D], got {shapes}")
    if len({(tensor.dtype, tensor.device) for tensor in (query, keys, values)}) > 1:
        raise ValueError(f"{OP}: query, keys and values must share a dtype and a device")
    if starts is not None and (starts.shape != (B,) or starts.dtype != torch.int64):
        raise ValueError(f"{OP}: starts must be int64 [{B}], got {starts.dtype} {starts.shape}")
    if index is None:
        return
    expected = (B, H, -(-T // index.block_size) + 1)
    for offsets in (index.block_offsets, index.column_offsets, index.pooled_offsets):
        if offsets is not None and offsets.shape != expected:
            raise ValueError(f"{OP}: offsets must be {expected}, got {tuple(offsets.shape)}")
    if (index.column_offsets is None) != (index.column_ids is None):
        raise ValueError(f"{OP}: column offsets and ids come together")
    if (index.pooled_offsets is None) != (index.pooled_ids is None):
        raise ValueError(f"{OP}: pooled offsets and ids come together")
    if index.permutation is not None:
        segment = index.segment_size
        slots = (B, H, T // segment * segment) if segment else None
        if segment % index.block_size or index.permutation.shape != slots:
            found = tuple(index.permutation.shape)
            raise ValueError(f"{OP}: permutation must be {slots} of whole segments, got {found}")


def _check_triton(query: Tensor, index: BlockIndex | None, quantize: Quantize | None) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (query.is_cuda or interpreted) or importlib.util.find_spec("triton") is None:
        raise DeviceError(
            OP,
            f"implementation 'triton' for tensors on {query.device}",
            "a CUDA device with triton installed, or TRITON_INTERPRET=1",
            "Use implementation: reference",
        )
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedError(OP, f"{query.dtype}", "float16, bfloat16, float32")
    if query.shape[-1] > 256:
        raise UnsupportedError(OP, f"head size {query.shape[-1]}", "at most 256")
    if index is not None and index.block_size not in (64, 128):
        raise UnsupportedError(OP, f"block size {index.block_size}", "64 or 128")
    if quantize is not None and query.is_cuda:
        major, minor = torch.cuda.get_device_capability(query.device)
        if (major, minor) < (8, 9):
            raise UnsupportedError(
                OP, f"E4M3 products on compute capability {major}.{minor}", "8.9 and later"
            )
