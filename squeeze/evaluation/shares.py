"""Requests split over the processes that torchrun or accelerate started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from squeeze import processes
from squeeze.tensor_parallel import processes_of

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_shares(
    model: Any, items: Sequence[Item], answer: Callable[[Sequence[Item]], list[Answer]]
) -> list[Answer]:
    """Answer every item once, each process a run of them, and hand all answers to all processes.

    Every process has a whole model, of the same weights, and calls this. Where they share one model
    by tensor parallelism, all answer everything together.

    Args:
        model: What answers.
        items: The same in every process.
        answer: Returns the answers to a run of items, any number of them, in order.
    """
    if processes.count() == 1 or processes_of(model) is not None:
        return answer(items)
    own = processes.share(len(items))
    return processes.gather(answer(items[own.start : own.stop]))
