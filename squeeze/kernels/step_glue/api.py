"""What stands between the products and the attention of a decode step, one launch each.

Every function rounds where the modules of transformers round, so that a step that uses them gives
the logits of one that does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels.linear_checks import require_triton
from squeeze.kernels.step_glue import reference
from squeeze.types import Implementation

OP = "step_glue"


@torch.no_grad()
def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    implementation: Implementation = Implementation.REFERENCE,
) -> tuple[Tensor, Tensor]:
    """Add the residual, and divide the sum by the root of its mean square.

    The sum is rounded; the mean and the quotient are float32, rounded before the weight.

    Args:
        x: ``[..., hidden]``, float16, bfloat16 or float32.
        weight: ``[hidden]`` in the dtype of ``x``.
        eps: Added to the mean square.
        residual: Like ``x``; ``None`` adds nothing.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        ``residual + x``, which is ``x`` itself without a residual, and what is normalised; both
        ``[..., hidden]`` in the dtype of ``x``.
    Raises:
        ValueError: shapes or dtypes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: one launch, which reads both and writes both once.
    """
    if tuple(weight.shape) != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} for {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} for {tuple(x.shape)}")
    if _by_triton(x, implementation):
        from squeeze.kernels.step_glue import triton

        return triton.add_rms_norm(x, residual, weight, eps)
    if residual is None:
        return x, reference.rms_norm(x, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


@torch.no_grad()
def rope_append(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    counts: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Rotate queries and keys by their positions, and store keys and values in the cache's slots.

    ``y = x * cos + rotated(x) * sin`` with ``rotated(x) = (-x[D/2:], x[:D/2])``; both products and
    the sum are rounded. Token ``i`` of row ``b`` goes to slot ``counts[b] - T + i``.

    Args:
        query: ``[B, T, H, D]``, any strides with adjacent channels; D is even.
        keys: ``[B, T, H_kv, D]`` likewise.
        values: Likewise.
        cos: ``[B or 1, T, D]`` in the dtype of the queries.
        sin: Likewise.
        exact_keys: ``[B, H_kv, E, D]``, written to; adjacent channels.
        exact_values: Likewise.
        counts: int32 ``[B]``, valid slots of each row, these ``T`` tokens included; at most E.
        query_norm: ``[D]``, weight of an RMS norm of every head before the rotation, or ``None``.
        key_norm: Likewise.
        eps: Of both norms.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        Rotated queries, ``[B, H, T, D]``, contiguous.
    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: one launch, which reads and writes every value once; nothing waits for the counts.
    """
    _check_rope(query, keys, values, cos, sin, exact_keys, exact_values, counts)
    for norm in (query_norm, key_norm):
        if norm is not None and (norm.shape != query.shape[-1:] or norm.dtype != query.dtype):
            raise ValueError(f"norm {tuple(norm.shape)} {norm.dtype} for {tuple(query.shape)}")
    call = (query, keys, values, cos, sin, exact_keys, exact_values, counts)
    if _by_triton(query, implementation):
        from squeeze.kernels.step_glue import triton

        return triton.rope_append(*call, query_norm, key_norm, eps)
    return reference.rope_append(*call, query_norm, key_norm, eps)


@torch.no_grad()
def silu_mul(
    gate: Tensor, up: Tensor, *, implementation: Implementation = Implementation.REFERENCE
) -> Tensor:
    """Compute ``silu(gate) * up``, where ``silu(g) = g / (1 + exp(-g))`` is rounded.

    Args:
        gate: ``[..., n]``, leading dimensions as if flattened, adjacent channels.
        up: Likewise.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        ``[..., n]``, contiguous.
    Raises:
        ValueError: shapes or dtypes that differ, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}")
    if _by_triton(gate, implementation):
        from squeeze.kernels.step_glue import triton

        return triton.silu_mul(gate, up)
    return reference.silu_mul(gate, up)


@torch.no_grad()
def join_heads(
    x: Tensor, dtype: torch.dtype, *, implementation: Implementation = Implementation.REFERENCE
) -> Tensor:
    """Round the attention's output and lay the heads of each token side by side.

    Args:
        x: ``[B, H, T, D]``, floating, adjacent channels.
        dtype: Of the result.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        ``[B, T, H D]``, contiguous; a view where there is one token and nothing to round.
    Raises:
        ValueError: ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    """
    batch, heads, steps, size = x.shape
    if x.dtype == dtype and steps == 1 and x.is_contiguous():
        return x.view(batch, 1, heads * size)
    if _by_triton(x, implementation):
        from squeeze.kernels.step_glue import triton

        return triton.join_heads(x, dtype)
    return reference.join_heads(x, dtype)


def _by_triton(x: Tensor, implementation: Implementation) -> bool:
    """Say which implementation computes, after what it asks for was checked."""
    if implementation == Implementation.REFERENCE:
        return False
    if implementation != Implementation.TRITON:
        raise ValueError("implementation auto is resolved while planning, not at run time")
    require_triton(OP, x)
    return True


def _check_rope(
    query: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    exact_keys: Tensor, exact_values: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """Refuse tensors that contradict one another."""
    batch, steps, _, size = query.shape
    kv_heads, slots = exact_keys.shape[1:3]
    shapes = {
        "keys": (keys, (batch, steps, kv_heads, size)),
        "values": (values, (batch, steps, kv_heads, size)),
        "exact_keys": (exact_keys, (batch, kv_heads, slots, size)),
        "exact_values": (exact_values, (batch, kv_heads, slots, size)),
        "counts": (counts, (batch,)),
        "cos": (cos, (cos.shape[0], steps, size)),
        "sin": (sin, tuple(cos.shape)),
    }
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
        if name != "counts" and tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the queries {query.dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has no adjacent channels")
    if cos.shape[0] not in (1, batch) or size % 2 or counts.dtype != torch.int32:
        raise ValueError(f"cos of {cos.shape[0]} rows, D {size}, counts {counts.dtype}")
