"""Where packed blocks live: segments that grow without copying, on the device or in CPU memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from squeeze.types import Tensors, bytes_of

# Segments added after the first hold at most this share of what is there.
GROWTH = 32


class BlockStorage:
    """Packed blocks in segments ``[N, B, H_kv, ...]``; growing copies nothing that is packed.

    Args:
        addressed: A kernel follows pointers to the blocks, so keep tables of their addresses.
        offload: Keep the blocks in CPU memory, page-locked where the encoder runs on a GPU.
    """

    def __init__(self, *, addressed: bool = False, offload: bool = False) -> None:
        self.addressed, self.offload = addressed, offload
        self.segments: list[Tensors] = []
        self.addresses: Tensors | None = None
        self.reach = 0  # slots that the tables of addresses have room for, so that they stay
        self.version = 0  # changes with the content

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockStorage:
        # Copied tensors lie elsewhere, and page-locked ones must stay so.
        made = BlockStorage(addressed=self.addressed, offload=self.offload)
        made.reach = self.reach
        made.segments = [
            {name: self._empty(x, len(x)).copy_(x) for name, x in segment.items()}
            for segment in self.segments
        ]
        made._index()
        return made

    @property
    def capacity(self) -> int:
        """Blocks that fit in the segments."""
        return sum(map(length_of, self.segments))

    @property
    def nbytes(self) -> int:
        """Allocated bytes, tables of addresses included."""
        return sum(map(bytes_of, self.segments)) + bytes_of(self.addresses or {})

    def grow(self, blocks: int, like: Tensors | None = None) -> None:
        """Add a segment so that at least ``blocks`` fit.

        ``like`` gives shapes, ``[n, B, ...]``. By default the first segment does; without one,
        nothing changes.
        """
        missing = blocks - self.capacity
        if like is None and self.segments:
            like = self.segments[0]
        if missing <= 0 or like is None:
            return
        count = max(missing, self.capacity // GROWTH)
        self.segments.append({name: self._empty(x, count) for name, x in like.items()})
        self._index(1)

    def slots(self, start: int, count: int) -> Tensors | None:
        """View ``count`` slots of all rows from ``start`` on, to be written at once.

        ``None`` when they are not all in one segment, or in CPU memory.
        """
        for segment, offset, size in () if self.offload else self.spans():
            if offset <= start and start + count <= offset + size:
                self.version += 1
                return {n: x[start - offset : start - offset + count] for n, x in segment.items()}
        return None

    def write(self, start: int, rows: Sequence[int] | None, blocks: Tensors) -> None:
        """Store blocks ``[n, rows, H_kv, ...]`` from slot ``start`` on; ``None`` is every row."""
        count = length_of(blocks)
        self.version += 1
        home = next(iter(self.segments[0].values())).device
        index = None if rows is None else torch.tensor(rows, device=home)
        for segment, offset, size in self.spans():
            first, last = max(start, offset), min(start + count, offset + size)
            if first >= last:
                continue
            for name, x in blocks.items():
                part = segment[name][first - offset : last - offset]
                source = x[first - start : last - start]
                if index is None:
                    part.copy_(source, non_blocking=self.offload)
                else:
                    part[:, index] = source.to(home)

    def spans(self) -> list[tuple[Tensors, int, int]]:
        """List each segment with the slot it starts at and its size."""
        spans, offset = [], 0
        for segment in self.segments:
            spans.append((segment, offset, length_of(segment)))
            offset += length_of(segment)
        return spans

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``change(tensor)``, in place where the shape stays."""
        self.version += 1
        self.settle()
        for segment in self.segments:
            for name, x in segment.items():
                changed = change(x)
                same = changed.shape == x.shape
                segment[name] = (x if same else self._empty(changed, len(changed))).copy_(changed)
        self._index()

    def merged(self, blocks: int) -> Tensors:
        """Copy the first ``blocks`` blocks of all rows to the CPU, one tensor per component."""
        self.settle()
        names = self.segments[0] if self.segments else ()
        return {n: torch.cat([s[n].cpu() for s in self.segments])[:blocks] for n in names}

    def settle(self) -> None:
        """Wait until blocks on their way to CPU memory are there."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()

    @torch.inference_mode(False)
    def _empty(self, like: Tensor, count: int) -> Tensor:
        shape = (count, *like.shape[1:])
        if not self.offload:
            return like.new_empty(shape)
        pinned = like.is_cuda or like.is_pinned()
        return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=pinned)

    @torch.inference_mode(False)
    def _index(self, newest: int | None = None) -> None:
        """Tabulate where all blocks are, or add those of the ``newest`` segments."""
        if not self.addressed or self.offload or not self.segments:
            return
        held, last = self.addresses or {}, self.capacity
        found = addresses(self.segments[-newest:] if newest and held else self.segments)
        for name, table in found.items():
            first, room = last - len(table), max(last, self.reach)
            if name not in held or len(held[name]) < room:
                grown = table.new_zeros(room)
                grown[:first] = held[name][:first] if first else 0
                held[name] = grown
            held[name][first:last] = table
        self.addresses = held

    def reserve_addresses(self, blocks: int) -> None:
        """Let the tables hold ``blocks`` slots, so that growing up to there moves none of them."""
        if blocks > self.reach:
            self.reach = blocks
            self._index()


def addresses(segments: Sequence[Tensors]) -> Tensors:
    """Tabulate where every block of every component starts, int64 ``[sum N_i]`` on its device."""
    tables: dict[str, list[Tensor]] = {}
    for segment in segments:
        for name, x in segment.items():
            first, stride = x.data_ptr(), x.stride(0) * x.element_size()
            end = first + len(x) * stride
            tables.setdefault(name, []).append(torch.arange(first, end, stride, device=x.device))
    return {n: parts[0] if len(parts) == 1 else torch.cat(parts) for n, parts in tables.items()}


def length_of(tensors: Tensors) -> int:
    """Count the blocks of a segment."""
    return next(iter(tensors.values())).shape[0]
