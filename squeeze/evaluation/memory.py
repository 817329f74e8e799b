"""Bytes of weights, of a cache, and at the peak: what is allocated, not what is nominal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def weight_bytes(model: nn.Module) -> int:
    """Sum the bytes of a model's parameters and buffers.

    Tensors that share memory, like a tied embedding and output layer, count once.
    """
    return _distinct_bytes([*model.parameters(), *model.buffers()])


def kv_bytes(past_key_values: Any) -> int:
    """Sum the bytes a cache holds.

    Args:
        past_key_values: A cache that states its ``nbytes``, or any Hugging Face cache; for the
            latter every tensor of every layer counts, in dictionaries and sequences too.
    """
    stated = getattr(past_key_values, "nbytes", None)
    if stated is not None:
        return int(stated)
    return _distinct_bytes(_tensors([vars(layer) for layer in past_key_values.layers]))


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of ``peak_bytes``; does nothing where memory is not traced."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes allocated since ``reset_peak``, or ``None`` away from CUDA."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum sizes, once per storage and place in it."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata  # Meta tensors all have address 0, not this.
        size = tensor.numel() * tensor.element_size()
        sizes[storage, tensor.storage_offset(), size] = size
    return sum(sizes.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Walk dictionaries, sequences and tensors made of tensors for what holds the bytes."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        yield from _tensors([getattr(value, name) for name in names])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
