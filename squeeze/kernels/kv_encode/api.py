"""Encode blocks of keys or values: validate, then choose the implementation.

The specification is the format's own ``encode``. ``affine``, ``graded`` and ``float8`` have a
kernel; every other format encodes by its own torch code under either implementation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from squeeze.errors import DeviceError
from squeeze.kernels.kv_encode.layout import rotates, takes
from squeeze.types import Implementation, Tensors

PLACE = "kernels.kv_encode"


@torch.no_grad()
def encode(
    format: Any,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    implementation: Implementation,
    center: Tensor | None = None,
    matrix: Tensor | None = None,
    out: Tensors | None = None,
) -> Tensors:
    """Encode whole blocks, as ``format.encode(x, parameters)`` does.

    The kernel's codes and constants equal the reference's, the sign of a zero constant and the bits
    of a NaN aside. With a ``matrix`` they are those of a float32 product, whose rounding depends on
    the order of its sums: the kernel's is the channels', whatever else is encoded with a block.

    Args:
        format: A ``types.KVFormat``.
        x: ``[N, B, H_kv, L, D]``, model dtype, any strides; ``triton`` wants adjacent channels.
        parameters: What ``format.fit`` returned.
        implementation: ``reference``, or ``triton``: the kernel where ``layout.takes`` the blocks,
            and the format's torch code elsewhere. ``auto`` must have been resolved.
        center: float32 ``[H_kv, D]``, subtracted from ``x`` in float32 first; or ``None``.
        matrix: float32 ``[H_kv, D, D]``: a head's rows are multiplied by it before all else. A
            kernel does so where ``layout.rotates`` the blocks, and torch elsewhere; or ``None``.
        out: Where the components go, ``[N, B, H_kv, ...]``: slots of a segment, say. Each head's
            part must be contiguous. Default: new tensors.
    Returns:
        The components; those of ``out`` itself when it is given.
    Raises:
        DeviceError: ``triton`` without an NVIDIA GPU, the interpreter, or the package.
        ValueError: shapes, dtypes or strides that the kernel would misread, or ``auto``.
    Cost: the kernel reads ``x`` once and writes the components; it allocates nothing else.
    """
    if implementation is Implementation.TRITON:
        require_triton(x.device)
        if matrix is not None and not rotates(format, *x.shape[-2:]):
            x, matrix = x.float() @ matrix, None
        if takes(format, *x.shape[-2:]):
            from squeeze.kernels.kv_encode import triton

            return triton.encode(format, x, center, matrix, out)
    elif implementation is not Implementation.REFERENCE:
        raise ValueError("implementation is auto; it is resolved while planning")
    if matrix is not None:
        x = x.float() @ matrix
    if center is not None:
        x = x.float() - center.unsqueeze(-2)
    encoded: Tensors = format.encode(x, parameters)
    if out is None:
        return encoded
    for name, component in encoded.items():
        out[name].copy_(component)
    return out


def require_triton(device: torch.device) -> None:
    """Raise unless a Triton kernel can run on ``device``.

    Raises:
        DeviceError: no NVIDIA GPU and no interpreter, or no Triton.
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
