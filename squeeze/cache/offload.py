"""Packed blocks in CPU memory: each layer's are on the device one layer ahead of their use."""

from __future__ import annotations

import contextlib
import copy
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from squeeze.cache.blocks import BlockStorage, addresses
from squeeze.types import Tensors

if TYPE_CHECKING:
    from squeeze.cache.layer import PackedLayer

# Components start at multiples of this many bytes, which suits every dtype and wide loads.
ALIGNMENT = 256


class Staged(NamedTuple):
    """One layer's blocks on the device."""

    layer: int
    slot: int
    versions: tuple[Any, ...]
    sides: tuple[Tensors, Tensors]
    arrived: Any


class Prefetcher:
    """Two slots on the device: one is read while the next layer's blocks arrive in the other.

    Blocks are encoded on the device, written to CPU memory once, and copied back every step; the
    device holds two layers' blocks at a time. Copies run on a stream of their own. Where layers are
    on several devices, each device has its slots and its stream.

    Args:
        layers: The offloaded layers, in the order of their use.
    """

    def __init__(self, layers: list[PackedLayer]) -> None:
        self.layers = layers
        self.slots: dict[tuple[torch.device, int], Tensor] = {}
        self.staged: Staged | None = None
        self.streams: dict[torch.device, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefetcher:
        made = memo[id(self)] = Prefetcher([])
        made.layers = copy.deepcopy(self.layers, memo)
        return made

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the slots."""
        return sum(slot.numel() for slot in self.slots.values())

    def fetch(self, layer: PackedLayer) -> list[tuple[tuple[Tensors, ...], Tensors | None]]:
        """Return a layer's blocks on the device, and begin to copy the next layer's.

        Returns:
            For keys and for values the segments (one) and the table of addresses, if kept.
        """
        index = next(i for i, other in enumerate(self.layers) if other is layer)
        held = self.staged
        if held is None or held.layer != index or held.versions != _versions(layer):
            held = self._copy(index, 0)
        if held.arrived is not None:
            torch.cuda.current_stream(layer.device).wait_event(held.arrived)
        self.staged = self._copy((index + 1) % len(self.layers), 1 - held.slot)
        kept = layer.key_blocks.addressed
        return [((side,), addresses((side,)) if kept else None) for side in held.sides]

    def _copy(self, index: int, slot: int) -> Staged:
        layer = self.layers[index]
        blocks, storages = layer.max_blocks, (layer.key_blocks, layer.value_blocks)
        sides = self._carve(slot, layer, blocks) if blocks else ({}, {})
        arrived: Any = None
        on_gpu = blocks > 0 and layer.device.type == "cuda"
        with contextlib.ExitStack() as stack:
            if on_gpu:
                stream = self.streams.get(layer.device) or torch.cuda.Stream(layer.device)
                self.streams[layer.device] = stream
                # What is enqueued so far may read the slot, or write the blocks in CPU memory.
                stream.wait_stream(torch.cuda.current_stream(layer.device))
                stack.enter_context(torch.cuda.stream(stream))
            for side, storage in zip(sides, storages, strict=True):
                _gather(side, storage, blocks)
            if on_gpu:
                arrived = stream.record_event()
        return Staged(index, slot, _versions(layer), sides, arrived)

    @torch.inference_mode(False)
    def _carve(self, slot: int, layer: PackedLayer, blocks: int) -> tuple[Tensors, Tensors]:
        """Lay ``blocks`` blocks of every component of a layer into one slot."""
        places, end = [], 0
        for side, storage in enumerate((layer.key_blocks, layer.value_blocks)):
            for name, x in storage.segments[0].items():
                shape = (blocks, *x.shape[1:])
                size = prod(shape) * x.element_size()
                places.append((side, name, x.dtype, shape, end, size))
                end += -(-size // ALIGNMENT) * ALIGNMENT
        place = (layer.device, slot)
        if place not in self.slots or self.slots[place].numel() < end:
            self.slots.pop(place, None)  # before the larger one is allocated
            self.slots[place] = torch.empty(end, dtype=torch.uint8, device=layer.device)
        held = self.slots[place]
        sides: tuple[Tensors, Tensors] = ({}, {})
        for side, name, dtype, shape, start, size in places:
            sides[side][name] = held[start : start + size].view(dtype).view(shape)
        return sides


def _gather(side: Tensors, storage: BlockStorage, blocks: int) -> None:
    """Copy the first ``blocks`` blocks of all segments into one tensor per component."""
    for segment, offset, size in storage.spans():
        count = min(size, blocks - offset)
        if count > 0:
            for name, x in segment.items():
                side[name][offset : offset + count].copy_(x[:count], non_blocking=True)


def _versions(layer: PackedLayer) -> tuple[Any, ...]:
    storages = (layer.key_blocks, layer.value_blocks)
    return (*((storage, storage.version) for storage in storages), layer.max_blocks)
