"""The tokens of a layer that are not packed: of each row the sinks, then the newest tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from squeeze.cache.counts import RowCounts

# The buffers grow to a multiple of this many slots, until they are whole.
SLOTS = 64


class Span(NamedTuple):
    """Exact tokens of all rows, those of the running call included.

    Attributes:
        keys: ``[B, H_kv, E, D]``.
        values: Likewise.
        starts: Slot of each row's first sink; its tokens follow without a gap.
        salience: float32 ``[B, 1 or H_kv, E]``, where a format protects tokens by something else
            than its own error.
    """

    keys: Tensor
    values: Tensor
    starts: list[int]
    salience: Tensor | None = None


class ExactTokens:
    """Buffers ``[B, H_kv, E, D]`` whose rows hold, from slot 0, the sinks and the newest tokens.

    Keys and values of one shape are halves of one buffer, so that one launch moves both.

    Args:
        keys: Keys of a first call, which give batch, heads, dtype and device.
        values: Likewise.
        whole: Slots that are enough between two calls.
        sinks: Tokens that stay in the first slots for ever.
    """

    @torch.inference_mode(False)
    def __init__(self, keys: Tensor, values: Tensor, whole: int, sinks: int) -> None:
        self.keys, self.values, self.both = _allocate(keys, values, keys.shape[0], 0)
        self.whole, self.sinks = whole, sinks
        self.counts = RowCounts(keys.shape[0], keys.device)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        tensors = (self.keys, self.values, self.counts.device)
        return sum(x.numel() * x.element_size() for x in tensors)

    @torch.inference_mode(False)
    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` tokens in every row."""
        have = self.keys.shape[2]
        if slots <= have:
            return
        wanted = min(self.whole, -(-slots // SLOTS) * SLOTS)
        old = self.keys, self.values
        self.keys, self.values, self.both = _allocate(*old, len(self.keys), wanted)
        for new, before in zip((self.keys, self.values), old, strict=True):
            new[:, :, :have] = before

    def extend(self, keys: Tensor, values: Tensor, skipped: list[int], in_place: bool) -> Span:
        """Lay a call's real tokens behind those of each row, and count them in.

        Args:
            keys: ``[B, H_kv, T, D]`` of the call.
            values: Likewise.
            skipped: Of each row, how many of them are padding.
            in_place: Leave a first call where it is: its rows then start at different slots.
        """
        steps, before = keys.shape[2], self.counts.host
        after = [b + steps - s for b, s in zip(before, skipped, strict=True)]
        if not any(before) and (in_place or not any(skipped)):
            self.counts.set(after)
            return Span(keys, values, skipped)
        starts, longest = [0] * len(before), max(after)
        if longest <= self.whole:
            self.reserve(longest)
            if len(set(before)) > 1 and not any(skipped):
                self.append(keys, values)
                self.counts.host = after
                return Span(self.keys, self.values, starts)
        self.counts.set(after)
        targets = []
        for buffer, new in ((self.keys, keys), (self.values, values)):
            target = buffer
            if longest > self.whole:
                target = buffer.new_empty(*buffer.shape[:2], longest, buffer.shape[3])
            _place(buffer, target, new, before, skipped)
            targets.append(target)
        return Span(targets[0], targets[1], starts)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Lay ``T`` tokens behind those of each row by the device's counts, and raise these.

        The host's counts stay; nothing is awaited, allocated shapes do not change.
        """
        steps = keys.shape[2]
        slots = self.counts.device.long().view(-1, 1) + torch.arange(steps, device=keys.device)
        index = slots[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)
        self.counts.device += steps

    def keep(self, span: Span, packed: list[int]) -> None:
        """Hold what stays exact once ``packed`` tokens after each row's sinks are gone."""
        if span.keys is self.keys and not any(packed):
            return
        after = [e - n for e, n in zip(self.counts.host, packed, strict=True)]
        self.reserve(max(after))
        rows = list(zip(packed, after, span.starts, strict=True))
        # Of both halves, where they are one.
        groups: list[tuple[slice, tuple[int, int, int]]] = [
            (slice(row, None, len(rows)), facts) for row, facts in enumerate(rows)
        ]
        if len(set(rows)) == 1:
            groups = [(slice(None), rows[0])]
        sides = [(self.keys, span.keys), (self.values, span.values)]
        if self.both is not None and span.keys is self.keys and span.values is self.values:
            sides = [(self.both, self.both)]
        for buffer, source in sides:
            for index, facts in groups:
                _keep(buffer[index], source[index], self.sinks, *facts, moved=source is not buffer)
        self.counts.set(after)

    @torch.inference_mode(False)
    def select(self, order: list[int]) -> None:
        """Take the rows ``order``; as many rows as before keep the buffers where they are."""
        index = torch.tensor(order, device=self.keys.device)
        chosen = [x.index_select(0, index) for x in (self.keys, self.values)]
        if len(order) != len(self.keys):
            allocated = _allocate(self.keys, self.values, len(order), self.keys.shape[2])
            self.keys, self.values, self.both = allocated
        for buffer, new in zip((self.keys, self.values), chosen, strict=True):
            buffer.copy_(new)
        self.counts.select(order)


def _allocate(
    keys: Tensor, values: Tensor, rows: int, slots: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make room for other rows and slots; the third tensor has both, rows one after another.

    Zeros, as rows that have no block due are encoded beside those that have (``due``).
    """
    shapes = [(rows, x.shape[1], slots, x.shape[3]) for x in (keys, values)]
    if shapes[0] != shapes[1] or keys.dtype != values.dtype:
        return keys.new_zeros(shapes[0]), values.new_zeros(shapes[1]), None
    both = keys.new_zeros(2 * rows, *shapes[0][1:])
    return both[:rows], both[rows:], both


def _place(
    buffer: Tensor, target: Tensor, new: Tensor, before: list[int], skipped: list[int]
) -> None:
    """Write a call's real tokens behind each row's, and those too where ``target`` is new."""
    steps = new.shape[2]
    if len(set(before)) == 1 and not any(skipped):
        if target is not buffer:
            target[:, :, : before[0]] = buffer[:, :, : before[0]]
        target[:, :, before[0] : before[0] + steps] = new
        return
    for row, (count, skip) in enumerate(zip(before, skipped, strict=True)):
        if target is not buffer:
            target[row, :, :count] = buffer[row, :, :count]
        target[row, :, count : count + steps - skip] = new[row, :, skip:]


def _keep(
    buffer: Tensor, source: Tensor, sinks: int, packed: int, after: int, start: int, *, moved: bool
) -> None:
    """Copy sinks and newest tokens of rows that agree from ``source`` into ``buffer``."""
    head = min(sinks, after)
    if moved:
        buffer[:, :, :head] = source[:, :, start : start + head]
    if after > head and (packed or moved):
        rest = source[:, :, start + head + packed : start + after + packed]
        overlaps = not moved and after - head > packed
        buffer[:, :, head:after] = rest.clone() if overlaps else rest
