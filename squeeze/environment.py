"""Versions, hardware and commit: the conditions that stand beside every number."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "squeeze-llm",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "lm-eval",
    "compressed-tensors",
)


def environment() -> dict[str, Any]:
    """Collect versions, hardware and commit of this process. Asks the GPU driver for its name."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {"cpu": platform.machine(), "cores": cores, "gpu": gpu}
    return {"versions": versions, "hardware": hardware, "commit": commit()}


def commit() -> str | None:
    """Return the checkout's commit, ``-dirty`` appended; ``None`` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
