"""Record a piece of work on the device, to be repeated at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


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

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        return CudaGraphs()

    def busy(self) -> bool:
        """Whether somebody else is recording on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Let torch raise where it would wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture ``work``, which must have run before; results are overwritten by any replay."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        return graph.replay, result
