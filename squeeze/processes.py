"""Processes that calibrate or evaluate together: each has its samples, and results are joined.

Outside an initialised ``torch.distributed`` there is one process, and nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Named = dict[str, dict[str, Tensor]]
T = TypeVar("T")


def join(device: str | None) -> str | None:
    """Join the processes that torchrun or accelerate started, if they did.

    Args:
        device: What was asked for.

    Returns:
        The device of this process: its own GPU where there are GPUs.
    """
    if started() == 1 or _together():
        return device
    on_gpu = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        return device
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def started() -> int:
    """Return how many processes torchrun or accelerate started, joined or not yet."""
    return count() if _together() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process."""
    return distributed.get_rank() if _together() else 0


def count() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if _together() else 1


def share(samples: int) -> range:
    """Return the samples of this process: a run of them, as long as the others' or one longer."""
    own, others = rank(), count()
    return range(samples * own // others, samples * (own + 1) // others)


def add_up(sums: Named) -> Named:
    """Add the sums of all processes; one that lacks a name counts as zero."""
    result: Named = {statistic: {} for statistic in sums}
    for statistic, name, found in _everywhere(sums):
        shape, dtype = next(one for one in found if one is not None)
        mine = sums[statistic].get(name)
        total = torch.zeros(shape, dtype=dtype) if mine is None else mine.clone()
        total = total.to(_channel())
        distributed.all_reduce(total)
        result[statistic][name] = total.to("cpu" if mine is None else mine.device)
    return result if count() > 1 else sums


def append(parts: Named, dim: int) -> Named:
    """Append what all processes hold along a dimension, in their order."""
    result: Named = {statistic: {} for statistic in parts}
    for statistic, name, found in _everywhere(parts):
        shape, dtype = next(one for one in found if one is not None)
        sizes = [one[0][dim] if one else 0 for one in found]
        mine = parts[statistic].get(name)
        padded = torch.zeros((*shape[:dim], max(sizes), *shape[dim + 1 :]), dtype=dtype)
        if mine is not None:
            padded.narrow(dim, 0, mine.shape[dim]).copy_(mine)
        whole = [torch.empty_like(padded, device=_channel()) for _ in sizes]
        distributed.all_gather(whole, padded.to(_channel()))
        pieces = zip(whole, sizes, strict=True)
        result[statistic][name] = torch.cat([t.cpu().narrow(dim, 0, n) for t, n in pieces], dim)
    return result if count() > 1 else parts


def gather(own: list[T]) -> list[T]:
    """Join the lists of all processes, in their order."""
    if not _together():
        return own
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, own)
    return [item for items in found for item in items]


def from_first(make: Callable[[], T]) -> T:
    """Have the first process make a value, and hand it to all."""
    held = [make() if rank() == 0 else None]
    if _together():
        distributed.broadcast_object_list(held)
    return held[0]  # type: ignore[return-value]


def wait() -> None:
    """Return when all processes have come here."""
    if _together():
        distributed.barrier()


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _everywhere(held: Named) -> list[tuple[str, str, list[Any]]]:
    """List all names that any process has, in one order, with what each process has of it."""
    if count() == 1:
        return []
    mine = {(s, n): (tuple(t.shape), t.dtype) for s, own in held.items() for n, t in own.items()}
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, mine)
    names = sorted(set().union(*found))
    return [(*key, [one.get(key) for one in found]) for key in names]


def _channel() -> torch.device:
    """Return where tensors have to be to be sent."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
