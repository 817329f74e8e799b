"""Record a piece of work on the device, to be repeated at the cost of one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

# torch says this once, where its synchronization debug mode is first set, and sets it.
NOTICE = "Synchronization debug mode is a prototype"


class Recorder(Protocol):
    """Records work that reads and writes tensors where they are."""

    def busy(self) -> bool:
        """Whether somebody else is recording."""

    def watch(self) -> AbstractContextManager[None]:
        """Run work that must not wait for the device: it raises RuntimeError if it does."""

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what ``work`` does; whether it is done as well is open.

        Returns:
            What repeats it, and what ``work`` returned: tensors that every repetition fills.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class CudaGraphs:
    """Records CUDA graphs, which share the memory of their intermediate results."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.anchor: Any = None  # a graph that lives on: a pool without any cannot be used again

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        return CudaGraphs()

    def busy(self) -> bool:
        """Whether somebody else is recording on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Let torch raise where it would wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        try:
            _debug(2)
            yield
        finally:
            _debug(before)

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture ``work``, which must have run before; results are overwritten by any replay."""
        if self.anchor is None:
            self.pool = torch.cuda.graph_pool_handle()
            self.anchor, _ = self._capture(lambda: torch.zeros(1, device="cuda"))
        graph, result = self._capture(work)
        return graph.replay, result

    def _capture(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device in the meantime is none of this work's business.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = work()
        return graph, result


def _debug(mode: int) -> None:
    """Set what torch does where it waits: 0 nothing, 1 warns, 2 raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOTICE)
        torch.cuda.set_sync_debug_mode(mode)
