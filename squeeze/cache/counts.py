"""One number per row, known to the host and to the device alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RowCounts:
    """Counts per row as host integers, so that no step waits for the device, and on the device.

    Tensors that a cache changes later are made outside inference mode, here and in the other files:
    a prompt may be read in that mode and gone on with outside.

    Attributes:
        host: One integer per row; replaced, never changed in place.
        device: int32 ``[B]``, the same numbers, changed in place.
    """

    @torch.inference_mode(False)
    def __init__(self, rows: int, device: torch.device) -> None:
        self.host: list[int] = [0] * rows
        self.device = torch.zeros(rows, dtype=torch.int32, device=device)

    def set(self, after: list[int]) -> None:
        """Take new numbers; an equal change of all rows needs no transfer."""
        if after == self.host:
            return
        changes = {b - a for a, b in zip(self.host, after, strict=True)}
        self.host = after
        if len(changes) == 1:
            self.device += changes.pop()
        else:
            self.sync()

    def sync(self) -> None:
        """Bring the device's numbers to the host's, whatever they were."""
        self.device.copy_(torch.tensor(self.host, dtype=torch.int32))

    @torch.inference_mode(False)
    def select(self, order: Sequence[int]) -> None:
        """Take the rows ``order``; as many rows as before keep the tensor where it is."""
        self.host = [self.host[row] for row in order]
        if len(self.host) != len(self.device):
            self.device = self.device.new_empty(len(self.host))
        self.sync()
