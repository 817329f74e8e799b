"""What every kernel in place of a linear layer asks of the machine and of its input."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from squeeze.errors import DeviceError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def require_triton(op: str, x: Tensor) -> None:
    """Refuse what the Triton kernel ``op`` cannot run; nothing falls back by itself.

    Raises:
        DeviceError: no Triton, no NVIDIA GPU and no interpreter, or a dtype that it does not read.
    """
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(op, "implementation triton", "reference", "Install the triton package")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DeviceError(
            op,
            f"implementation triton on device {x.device.type}",
            "a CUDA device",
            "Choose implementation: reference to run here",
        )
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DeviceError(op, f"implementation triton for {x.dtype}", allowed)
