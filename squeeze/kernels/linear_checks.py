"""What kernels ask of the machine and of their input before they run."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from squeeze.errors import DeviceError
from squeeze.types import Implementation

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def by_triton(op: str, x: Tensor, implementation: Implementation | None) -> bool:
    """Say whether the kernel ``op`` runs; with ``None`` it does wherever it can on a GPU.

    Raises:
        ValueError: ``auto``, which belongs to plans.
        DeviceError: ``triton`` without Triton, or without an NVIDIA GPU and the interpreter.
    """
    if implementation is None:
        return importlib.util.find_spec("triton") is not None and x.device.type == "cuda"
    if implementation == Implementation.REFERENCE:
        return False
    if implementation != Implementation.TRITON:
        raise ValueError("implementation auto is not known here; leave it out to have one chosen")
    _require_machine(op, x)
    return True


def require_triton(op: str, x: Tensor) -> None:
    """Refuse what the Triton kernel ``op`` cannot run; nothing falls back by itself.

    Raises:
        DeviceError: no Triton, no NVIDIA GPU and no interpreter, or a dtype that it does not read.
    """
    _require_machine(op, x)
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DeviceError(op, f"implementation triton for {x.dtype}", allowed)


def _require_machine(op: str, x: Tensor) -> None:
    """Refuse a machine without Triton, and tensors on a device that it cannot reach."""
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(op, "implementation triton", "reference", "Install the triton package")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DeviceError(
            op,
            f"implementation triton on device {x.device.type}",
            "a CUDA device",
            "Choose implementation: reference to run here",
        )
