"""Check a call of the sparse-input linear layer and hand it to the chosen implementation."""

from __future__ import annotations

from torch import Tensor

from squeeze.kernels.linear_checks import require_triton
from squeeze.kernels.sparse_gemv import reference
from squeeze.types import Implementation


def thresholded(x: Tensor, threshold: Tensor) -> Tensor:
    """Zero what is not above its channel's threshold, ``[..., in]``."""
    return reference.thresholded(x, threshold)


def by_columns(weight: Tensor) -> Tensor:
    """Return the same ``[out, in]`` values with each column contiguous, as the kernel reads them.

    A copy, unless they lie so already. ``contiguous`` undoes it.
    """
    return weight.t().contiguous().t()


def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Compute ``x @ W.T + bias`` over the channels of ``x`` that exceed their thresholds.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32.
        weight: ``[out, in]`` in the dtype of ``x``; by columns (``by_columns``) for ``triton``.
        threshold: float32 ``[in]``.
        bias: ``[out]`` or ``None``.
        implementation: ``triton`` reads the live columns alone for up to ``MAX_ROWS`` rows of x,
            and for more, whose columns together are nearly all live, multiplies the zeroed x.
            ``auto`` belongs to the plan and is refused here.
    Returns:
        ``[..., out]`` in the dtype of ``x``.
    Raises:
        ValueError: shapes, dtypes, strides, devices that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: the live share of the weight's bytes; nothing waits for the device.
    """
    _check(x, weight, threshold, bias)
    if implementation == Implementation.REFERENCE:
        return reference.sparse_gemv(x, weight, threshold, bias)
    if implementation != Implementation.TRITON:
        raise ValueError("implementation auto is resolved while planning, not at run time")
    _check_triton(x, weight)
    from squeeze.kernels.sparse_gemv import triton

    if x.numel() > triton.MAX_ROWS * x.shape[-1]:
        return reference.sparse_gemv(x, weight, threshold, bias)
    return triton.sparse_gemv(x, weight, threshold, bias)


def _check(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    """Refuse tensors that contradict one another."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x ends in {x.shape[-1]} channels, the weight takes {in_features}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}")
    expected = {"threshold": (threshold, in_features), "bias": (bias, out_features)}
    for name, (tensor, size) in expected.items():
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {(size,)}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}")


def _check_triton(x: Tensor, weight: Tensor) -> None:
    """Refuse what the kernel cannot run; nothing falls back by itself."""
    require_triton("sparse_gemv", x)
    if weight.stride(0) != 1:
        raise ValueError("triton reads the weight by columns: pass by_columns(weight)")
