"""Store one encoded block of those rows that are due, where the device's own counts say.

Nothing waits for the counts, so a CUDA graph can hold it while every row fills its blocks in its
own time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from squeeze.kernels.block_store import reference
from squeeze.kernels.kv_encode.api import require_triton
from squeeze.types import Implementation, Tensors


@torch.no_grad()
def store_blocks(
    blocks: Mapping[str, Tensor],
    segments: Sequence[Tensors],
    addresses: Mapping[str, Tensor] | None,
    slots: Tensor,
    due: Tensor,
    *,
    implementation: Implementation,
) -> None:
    """Write block ``blocks[:, b]`` to slot ``slots[b]`` of row ``b`` where ``due[b]``.

    Args:
        blocks: Components ``[1, B, H_kv, ...]``.
        segments: The slots: the same components ``[N_i, B, H_kv, ...]``, contiguous, one behind the
            other; written to.
        addresses: Where each slot of a component starts, int64 ``[sum N_i or more]``; ``triton``
            writes there and looks at no segment.
        slots: int32 ``[B]``, below ``sum N_i`` where due; not read elsewhere.
        due: bool ``[B]``.
        implementation: ``auto`` must have been resolved.
    Raises:
        DeviceError: ``triton`` without an NVIDIA GPU, the interpreter, or the package.
        ValueError: ``triton`` without addresses, shapes that do not fit, or ``auto``.
    Cost: ``triton`` is one launch, which reads and writes the due rows once.
    """
    rows = len(slots)
    if due.shape != slots.shape or any(x.shape[:2] != (1, rows) for x in blocks.values()):
        shapes = {name: tuple(x.shape) for name, x in blocks.items()}
        raise ValueError(f"due {tuple(due.shape)}, slots {tuple(slots.shape)}, blocks {shapes}")
    if implementation is Implementation.TRITON:
        if addresses is None or set(addresses) != set(blocks):
            raise ValueError("implementation triton writes by addresses of every component")
        require_triton(slots.device)
        from squeeze.kernels.block_store import triton

        triton.store_blocks(blocks, addresses, slots, due)
    elif implementation is Implementation.REFERENCE:
        reference.store_blocks(blocks, segments, slots, due)
    else:
        raise ValueError("implementation is auto; it is resolved while planning")
