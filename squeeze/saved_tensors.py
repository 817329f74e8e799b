"""What autograd keeps between forward and backward, in fewer bytes: the devices of eDKM."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 1 << 16  # bytes of a tensor below which nothing is done


class _Moved:
    """A storage on its way through another device's memory."""

    def __init__(self, copy: Tensor) -> None:
        self.copy = copy


@dataclass(frozen=True)
class _View:
    """Where a saved tensor lies in a moved storage."""

    moved: _Moved
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Rows:
    """A saved tensor as its distinct rows and, for every row, which of them it is."""

    table: Any
    index: Any
    size: torch.Size


@dataclass(frozen=True)
class _Shard:
    """One process's part of a tensor that all processes of a group hold alike."""

    part: Any
    length: int


class SavedTensors:
    """Hold what is saved for backward in fewer bytes; gradients keep every bit.

    Use ``with saved:`` around the forward. Three devices, each on its own:

    *Uniquification*: inside ``with saved.rows_of(x)`` a saved tensor ``[*x.shape, k]`` has equal
    rows wherever bfloat16 ``x`` has equal values in the same block (first dimension), so a table of
    distinct rows and an index are kept, where these are smaller. *Marshaling*: a storage is copied
    to ``device`` once, however many operations save it or views of it, and copied back when needed.
    *Sharding*: of the indices, which all processes of a group hold alike, each keeps its part; they
    are gathered when needed.

    Args:
        unique: Uniquify.
        device: Where marshaling keeps tensors; ``None`` leaves them where they are.
        group: Processes to shard over, or ``None``. They must run the same forward and backward.
        smallest: Bytes of a tensor below which it is kept as it is.

    Source: M. Cho et al. 2023, eDKM, https://arxiv.org/abs/2309.00964, section 2.
    Differs: copies are shared between tensors of one storage and version, which is found by the
        storage and not by walking the graph a few steps; a table that would not be smaller is not
        made (a codebook per row has few equal values).
    """

    def __init__(
        self,
        *,
        unique: bool = False,
        device: torch.device | str | None = None,
        group: Any = None,
        smallest: int = SMALLEST,
    ) -> None:
        self.unique, self.group, self.smallest = unique, group, smallest
        self.device = None if device is None else torch.device(device)
        self._moved: dict[tuple[StorageWeakRef, int], weakref.ref[_Moved]] = {}
        self._index: tuple[torch.Size, Tensor, Any, int] | None = None
        self._held: list[weakref.ref[Any]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> SavedTensors:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)

    @contextmanager
    def rows_of(self, x: Tensor) -> Iterator[None]:
        """Say that tensors ``[*x.shape, k]`` saved in the block are functions of ``x`` row by row.

        Args:
            x: bfloat16 values, ``[blocks, ...]``; rows of other blocks are never shared.
        """
        before, self._index = self._index, None
        if self.unique:
            first, index = _distinct(x)
            held = self._move(index) if self.group is None else self._shard(index)
            self._index = (x.shape, first, held, index.element_size())
        try:
            yield
        finally:
            self._index = before

    @property
    def nbytes(self) -> int:
        """Bytes held for backward passes to come, each storage counted once."""
        storages = {}
        for held in self._held:
            handle = held()
            for tensor in _tensors(handle) if handle is not None else ():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _pack(self, tensor: Tensor) -> Any:
        # Detached: a result that its own node saves must not hold that node.
        handle = _Kept(self._packed(tensor.detach()))
        self._held = [held for held in self._held if held() is not None]
        self._held.append(weakref.ref(handle))
        return handle

    def _packed(self, tensor: Tensor) -> Any:
        if tensor.numel() * tensor.element_size() < self.smallest:
            return tensor
        if self._index is not None and tensor.shape[:-1] == self._index[0]:
            return self._uniquified(tensor, *self._index[1:])
        return self._move(tensor)

    def _uniquified(self, tensor: Tensor, first: Tensor, index: Any, index_bytes: int) -> Any:
        flat = tensor.flatten(0, -2)
        row_bytes = flat.shape[1] * flat.element_size()
        if len(first) * row_bytes + len(flat) * index_bytes >= len(flat) * row_bytes:
            return self._move(tensor)
        return _Rows(self._move(flat[first]), index, tensor.shape)

    def _shard(self, index: Tensor) -> Any:
        world, rank = self.group.size(), self.group.rank()
        padded = torch.nn.functional.pad(index, (0, -len(index) % world))
        part = padded.view(world, -1)[rank].clone()
        return _Shard(self._move(part), len(index))

    def _move(self, tensor: Tensor) -> Any:
        if self.device is None or tensor.layout != torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        # A weak reference keeps the identity of a freed storage from being given to another.
        key = (StorageWeakRef(storage), tensor._version)
        found = self._moved.get(key)
        moved = found() if found else None
        if moved is None:
            count = storage.nbytes() // tensor.element_size()
            whole = tensor.as_strided((count,), (1,), 0)
            moved = _Moved(whole.to(self.device, copy=True))
            self._moved = {k: r for k, r in self._moved.items() if r() is not None}
            self._moved[key] = weakref.ref(moved)
        return _View(
            moved, tensor.device, tensor.dtype, tensor.shape, tensor.stride(),
            int(tensor.storage_offset()),
        )  # fmt: skip

    def _unpack(self, handle: Any) -> Tensor:
        return self._restored(handle.content)

    def _restored(self, content: Any) -> Tensor:
        if isinstance(content, _View):
            whole = content.moved.copy.to(content.device).view(-1)
            whole = whole.view(content.dtype)
            return whole.as_strided(content.size, content.stride, content.offset)
        if isinstance(content, _Shard):
            part = self._restored(content.part)
            raw = part.contiguous().view(torch.uint8)  # not every backend sends uint16
            parts = [torch.empty_like(raw) for _ in range(self.group.size())]
            torch.distributed.all_gather(parts, raw, group=self.group)
            return torch.cat(parts).view(part.dtype)[: content.length]
        if isinstance(content, _Rows):
            index = self._restored(content.index)
            return self._restored(content.table)[index.long()].view(content.size)
        assert isinstance(content, Tensor)
        return content


class _Kept:
    """What the graph holds in place of a saved tensor."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _tensors(handle: Any) -> Iterator[Tensor]:
    """List what a handle holds."""
    if isinstance(handle, Tensor):
        yield handle
    elif isinstance(handle, _Moved):
        yield handle.copy
    elif handle is not None and not isinstance(handle, (int, str)):
        for name in ("content", "moved", "table", "index", "part"):
            yield from _tensors(getattr(handle, name, None))


def _distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """Find equal values within blocks: an occurrence of each, and an index ``[x.numel()]``.

    The index is uint16 where that holds them all, else int32.
    """
    codes = x.detach().contiguous().view(torch.int16).flatten(1).int()
    block = torch.arange(len(codes), device=x.device)[:, None] << 16
    values, index = torch.unique(codes + 32768 + block, return_inverse=True)
    index = index.flatten()
    first = torch.empty(len(values), dtype=torch.int64, device=x.device)
    first[index] = torch.arange(index.numel(), device=x.device)
    small = len(values) <= 1 << 16
    return first, index.to(torch.uint16) if small else index.int()
