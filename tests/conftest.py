"""Tiny models and settings shared by all tests."""

from __future__ import annotations

import os

# The processes that tests start keep to one core too: pytest -n runs several side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Before anything imports triton: kernels then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

import tests.tiny as tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def llama():
    """A dense two-layer Llama in float32."""
    return tiny.model("llama")
