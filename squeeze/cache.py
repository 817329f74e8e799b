"""The packed KV cache: a transformers cache whose full-attention layers store packed blocks.

Of each row, the first ``sink_tokens`` and the newest ``residual_length`` tokens stay exact (at most
one block more); everything between is encoded once, block by block, and never again. Rows may start
at different positions (left padding): everything counts from a row's first real token, so a row's
result does not depend on its neighbours.

``update`` returns a ``Handle`` instead of tensors. The attention function reads the state as it was
before the call beside the call's own exact keys and values, then commits them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from squeeze.errors import UnsupportedError
from squeeze.kernels.decode_attention.api import decode_attention
from squeeze.types import Implementation, PackedBlocks, Tensors, bytes_of

# Segments added after the first hold at most this share of what is there.
GROWTH = 32
# Tokens encoded at a time, which bounds the float32 copy.
ENCODE_TOKENS = 4096


@dataclass(frozen=True)
class Side:
    """The format, transforms and fitted parameters of the keys, or the values, of one layer."""

    format: Any
    parameters: Tensors
    transforms: tuple[tuple[Any, Tensors], ...] = ()

    def encode(self, x: Tensor) -> Tensors:
        """Transform and encode ``[..., H_kv, L, D]``."""
        if self.format.info.name != "raw":
            x = x.float()
        for transform, parameters in self.transforms:
            x = transform.apply(x, parameters).to(x.dtype)
        return self.format.encode(x, self.parameters)  # type: ignore[no-any-return]

    def decode(self, packed: Tensors) -> Tensor:
        """Undo ``encode`` up to the rounding, float32."""
        x: Tensor = self.format.decode(packed, self.parameters)
        for transform, parameters in reversed(self.transforms):
            x = transform.invert(x, parameters)
        return x


@dataclass(frozen=True)
class LayerSpec:
    """How one layer of the cache stores what it is given."""

    keys: Side
    values: Side
    block_length: int
    sink_tokens: int
    residual_length: int
    implementation: Implementation


@dataclass
class BlockStorage:
    """Packed blocks in segments ``[N, B, H_kv, ...]``; growing copies nothing that is packed."""

    segments: list[Tensors] = field(default_factory=list)
    addresses: Tensors | None = None

    @property
    def capacity(self) -> int:
        """Blocks that fit in the segments."""
        return sum(_length(segment) for segment in self.segments)

    def grow(self, blocks: int, like: Tensors) -> None:
        """Add a segment so that at least ``blocks`` fit; ``like`` gives shapes, ``[n, B, ...]``."""
        missing = blocks - self.capacity
        if missing <= 0:
            return
        count = max(missing, self.capacity // GROWTH)
        segment = {name: x.new_empty(count, *x.shape[1:]) for name, x in like.items()}
        self.segments.append(segment)
        self.index()

    def index(self) -> None:
        """Note the device address of every block, for kernels that follow pointers."""
        first = next(iter(self.segments[0].values()))
        tables: dict[str, list[Tensor]] = {}
        for name, x in itertools.chain.from_iterable(s.items() for s in self.segments):
            stride = x[0].numel() * x.element_size()
            offsets = torch.arange(len(x), dtype=torch.int64) * stride + x.data_ptr()
            tables.setdefault(name, []).append(offsets)
        self.addresses = {name: torch.cat(t).to(first.device) for name, t in tables.items()}

    def write(self, start: int, rows: Tensor | None, blocks: Tensors) -> None:
        """Store blocks ``[n, rows, H_kv, ...]`` from slot ``start`` on."""
        count, offset = _length(blocks), 0
        for segment in self.segments:
            size = _length(segment)
            first, last = max(start, offset), min(start + count, offset + size)
            if first < last:
                for name, x in blocks.items():
                    part = segment[name][first - offset : last - offset]
                    source = x[first - start : last - start]
                    if rows is None:
                        part.copy_(source)
                    else:
                        part[:, rows] = source
            offset += size

    def map(self, change: Any) -> None:
        """Replace every tensor by ``change(tensor)``."""
        self.segments = [{n: change(x) for n, x in s.items()} for s in self.segments]
        if self.segments:
            self.index()

    @property
    def nbytes(self) -> int:
        """Allocated bytes, tables of addresses included."""
        return sum(map(bytes_of, self.segments)) + bytes_of(self.addresses or {})


class Handle(NamedTuple):
    """What ``update`` returns: the layer as it was, and the call's exact keys and values."""

    layer: PackedLayer
    keys: Tensor
    values: Tensor


class PackedLayer(DynamicLayer):
    """One layer of a packed cache.

    ``exact`` buffers hold, per row from slot 0: the sinks, then the tokens not packed yet. The
    counts below are host integers, so that no step waits for the device; ``exact_counts`` and
    ``block_counts`` are the same numbers on the device.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.reset()

    def reset(self) -> None:
        """Forget everything and free it."""
        self.is_initialized = False
        self.keys = self.values = None
        self.total = 0  # tokens seen, padding included
        self.pads: list[int] = []  # left padding of each row
        self.exact: list[int] = []  # valid slots of the exact buffers, per row
        self.blocks: list[int] = []  # packed blocks, per row
        self.exact_keys: Tensor | None = None
        self.exact_values: Tensor | None = None
        self.exact_counts: Tensor | None = None
        self.block_counts: Tensor | None = None
        self.key_blocks, self.value_blocks = BlockStorage(), BlockStorage()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the exact buffers for the batch that arrives."""
        spec = self.spec
        batch, heads, _, size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = spec.sink_tokens + spec.residual_length + spec.block_length
        self.exact_keys = key_states.new_empty(batch, heads, capacity, size)
        self.exact_values = value_states.new_empty(batch, heads, capacity, value_states.shape[-1])
        self.exact, self.blocks = [0] * batch, [0] * batch
        self.pads = self.pads or [0] * batch
        self._sync_counts()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand the call's keys and values to the attention function, which commits them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend to what was stored before this call and, causally, to this call; then commit.

        Args:
            query: ``[B, H, T_q, D]``, after RoPE.
            keys: ``[B, H_kv, T_q, D]`` of this call, exact.
            values: Likewise.
            scaling: Multiplies the dot products.
            softcap: Bound of the scores, or ``None``.

        Returns:
            Output float32 ``[B, H, T_q, D]`` and its log-sum-exp float32 ``[B, H, T_q]``.
        """
        spec = self.spec
        exact_keys, exact_values = self._extend(keys, values)
        assert self.exact_counts is not None and self.block_counts is not None
        packed_query, shift = query, None
        for transform, parameters in spec.keys.transforms:
            packed_query, change = transform.prepare_query(packed_query, parameters)
            shift = change if shift is None else shift if change is None else shift + change
        parts = decode_attention(
            query,
            packed_query,
            shift,
            self._packed(spec.keys, self.key_blocks),
            self._packed(spec.values, self.value_blocks),
            self.block_counts,
            exact_keys,
            exact_values,
            self.exact_counts,
            scaling=scaling,
            softcap=softcap,
            split_output=bool(spec.values.transforms),
            max_blocks=max(self.blocks, default=0),
            implementation=spec.implementation,
        )
        if spec.values.transforms:
            packed, exact, lse = parts
            packed = self._undo_values(packed)
            output = packed + exact
        else:
            output, lse = parts
        self._settle(exact_keys, exact_values)
        return output, lse

    def commit(self, keys: Tensor, values: Tensor) -> None:
        """Store a call's keys and values without attending to them."""
        self._settle(*self._extend(keys, values))

    def _undo_values(self, output: Tensor) -> Tensor:
        kv_heads = self.exact_values.shape[1]  # type: ignore[union-attr]
        batch, heads, steps, size = output.shape
        # A value transform acts per KV head; the query heads of a group are its rows.
        rows = output.view(batch, kv_heads, heads // kv_heads * steps, size)
        for transform, parameters in reversed(self.spec.values.transforms):
            rows = transform.invert(rows, parameters)
        return rows.view(batch, heads, steps, size)

    def _packed(self, side: Side, storage: BlockStorage) -> PackedBlocks | None:
        if not storage.segments:
            return None
        return PackedBlocks(
            side.format,
            side.parameters,
            tuple(storage.segments),
            self.spec.block_length,
            storage.addresses,
        )

    def _extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Lay a call's real tokens behind each row's exact slots and count them in."""
        assert self.exact_keys is not None and self.exact_values is not None
        steps = keys.shape[2]
        skipped = [min(max(pad - self.total, 0), steps) for pad in self.pads]
        before = self.exact
        self.exact = [e + steps - s for e, s in zip(before, skipped, strict=True)]
        self.total += steps
        longest = max(self.exact)
        fits = longest <= self.exact_keys.shape[2]
        result = []
        for buffer, new in ((self.exact_keys, keys), (self.exact_values, values)):
            if not any(before) and not any(skipped):
                result.append(new)  # the first call, unpadded: it is laid out already
                continue
            if fits:
                target = buffer
            else:
                target = buffer.new_empty(*buffer.shape[:2], longest, buffer.shape[3])
            self._place(buffer, target, new, before, skipped)
            result.append(target)
        self._count(self.exact_counts, before, self.exact)
        return result[0], result[1]

    def _place(
        self, buffer: Tensor, target: Tensor, new: Tensor, before: list[int], skipped: list[int]
    ) -> None:
        steps = new.shape[2]
        if len(set(before)) == 1 and not any(skipped):
            if target is not buffer:
                target[:, :, : before[0]] = buffer[:, :, : before[0]]
            target[:, :, before[0] : before[0] + steps] = new
        elif steps == 1 and not any(skipped) and target is buffer:
            rows = torch.arange(len(before), device=buffer.device)
            target[rows, :, self.exact_counts] = new[:, :, 0]  # type: ignore[index]
        else:
            for row, (count, skip) in enumerate(zip(before, skipped, strict=True)):
                if target is not buffer:
                    target[row, :, :count] = buffer[row, :, :count]
                target[row, :, count : count + steps - skip] = new[row, :, skip:]

    def _settle(self, keys: Tensor, values: Tensor) -> None:
        """Encode every block that is full, and keep the rest in the exact buffers."""
        spec = self.spec
        length, sinks = spec.block_length, spec.sink_tokens
        ready = [max(0, (e - sinks - spec.residual_length) // length) for e in self.exact]
        for count in sorted(set(ready) - {0}):
            rows = [row for row, n in enumerate(ready) if n == count]
            self._encode(keys, values, rows, count)
        exact = [e - n * length for e, n in zip(self.exact, ready, strict=True)]
        self._keep(keys, values, ready, exact)
        before, self.exact = self.exact, exact
        self._count(self.exact_counts, before, exact)

    def _encode(self, keys: Tensor, values: Tensor, rows: list[int], count: int) -> None:
        length, sinks = self.spec.block_length, self.spec.sink_tokens
        everyone = len(rows) == keys.shape[0]
        index = None if everyone else torch.tensor(rows, device=keys.device)
        starts = {self.blocks[row] for row in rows}
        if len(starts) > 1:
            for row in rows:
                self._encode(keys, values, [row], count)
            return
        (start,) = starts
        step = max(1, ENCODE_TOKENS // length)
        for first in range(0, count, step):
            n = min(step, count - first)
            for side, storage, x in (
                (self.spec.keys, self.key_blocks, keys),
                (self.spec.values, self.value_blocks, values),
            ):
                span = x[:, :, sinks + first * length : sinks + (first + n) * length]
                span = span if index is None else span[index]
                blocks = side.encode(span.unflatten(2, (n, length)).permute(2, 0, 1, 3, 4))
                batch = keys.shape[0]
                like = {k: v[:, :1].expand(-1, batch, *v.shape[2:]) for k, v in blocks.items()}
                storage.grow(start + count, like)
                storage.write(start + first, index, blocks)
        before = list(self.blocks)
        for row in rows:
            self.blocks[row] += count
        self._count(self.block_counts, before, self.blocks)

    def _keep(self, keys: Tensor, values: Tensor, ready: list[int], exact: list[int]) -> None:
        length, sinks = self.spec.block_length, self.spec.sink_tokens
        for buffer, source in ((self.exact_keys, keys), (self.exact_values, values)):
            assert buffer is not None
            same = source is buffer
            if len(set(ready)) == 1 and len(set(exact)) == 1:
                groups: list[tuple[slice, int, int]] = [(slice(None), ready[0], exact[0])]
            else:
                groups = [
                    (slice(r, r + 1), n, e)
                    for r, (n, e) in enumerate(zip(ready, exact, strict=True))
                ]
            for rows, n, e in groups:
                if not same:
                    buffer[rows, :, : min(sinks, e)] = source[rows, :, : min(sinks, e)]
                if e > sinks and (n or not same):
                    moved = source[rows, :, sinks + n * length : e + n * length]
                    buffer[rows, :, sinks:e] = moved.clone() if same else moved

    def _count(self, counts: Tensor | None, before: list[int], after: list[int]) -> None:
        """Bring the device's counts from ``before`` to ``after``."""
        assert counts is not None
        changes = {b - a for a, b in zip(before, after, strict=True)}
        if len(changes) == 1:
            counts += changes.pop()
        else:
            counts.copy_(torch.tensor(after, dtype=torch.int32))

    def _sync_counts(self) -> None:
        self.exact_counts = torch.tensor(self.exact, dtype=torch.int32, device=self.device)
        self.block_counts = torch.tensor(self.blocks, dtype=torch.int32, device=self.device)

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Return what is stored as dense ``[B, H_kv, total, D]``; padding is zero. For tests."""
        assert self.exact_keys is not None and self.exact_values is not None
        sinks, length = self.spec.sink_tokens, self.spec.block_length
        results = []
        for side, storage, buffer in (
            (self.spec.keys, self.key_blocks, self.exact_keys),
            (self.spec.values, self.value_blocks, self.exact_values),
        ):
            out = buffer.new_zeros(*buffer.shape[:2], self.total, buffer.shape[3])
            for row, (pad, blocks, exact) in enumerate(
                zip(self.pads, self.blocks, self.exact, strict=True)
            ):
                head = min(sinks, exact)
                out[row, :, pad : pad + head] = buffer[row, :, :head]
                out[row, :, self.total - (exact - head) :] = buffer[row, :, head:exact]
                parts = [
                    side.decode({n: x[:, row] for n, x in s.items()}) for s in storage.segments
                ]
                if blocks:
                    dense = torch.cat(parts)[:blocks].permute(1, 0, 2, 3).flatten(1, 2)
                    start = pad + sinks
                    out[row, :, start : start + blocks * length] = dense.to(out.dtype)
            results.append(out)
        return results[0], results[1]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of this layer."""
        tensors = (self.exact_keys, self.exact_values, self.exact_counts, self.block_counts)
        exact = sum(x.numel() * x.element_size() for x in tensors if x is not None)
        return exact + self.key_blocks.nbytes + self.value_blocks.nbytes

    def get_seq_length(self) -> int:
        """Count the tokens seen, padding included."""
        return self.total

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the mask's length and offset; older transformers pass positions."""
        steps = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.total + steps, 0

    def get_max_length(self) -> int:
        """Say that there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, max_length: int) -> None:
        """Drop the newest ``-max_length`` tokens, or all beyond a positive ``max_length``.

        Raises:
            UnsupportedError: tokens that are packed already would have to go.
        """
        max_length = int(max_length)  # generate() may pass a tensor, which would alias the counts
        drop = -max_length if max_length <= 0 else max(0, self.total - max_length)
        if not drop or not self.is_initialized:
            return
        drop = min(drop, self.total)
        lengths = [self.total - pad for pad in self.pads]
        after = [e - min(drop, n) for e, n in zip(self.exact, lengths, strict=True)]
        for blocks, left in zip(self.blocks, after, strict=True):
            if blocks and left < self.spec.sink_tokens:
                newest = min(e - self.spec.sink_tokens for e in self.exact)
                raise UnsupportedError(
                    "past_key_values.crop",
                    f"dropping {drop} tokens reaches into packed blocks",
                    f"up to {newest} tokens now, always {self.spec.residual_length} after prefill",
                    "Raise kv_cache.residual_length, or prefill again",
                )
        self.total -= drop
        before, self.exact = self.exact, after
        self._count(self.exact_counts, before, after)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx``, as beam search does."""
        if self.is_initialized:
            self._select(beam_idx.to(self.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            rows = torch.arange(len(self.pads), device=self.device)
            self._select(rows.repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        order = rows.tolist()
        if order == list(range(len(self.pads))):
            return
        for name in ("pads", "exact", "blocks"):
            setattr(self, name, [getattr(self, name)[row] for row in order])
        for name in ("exact_keys", "exact_values"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        for storage in (self.key_blocks, self.value_blocks):
            storage.map(lambda x: x.index_select(1, rows))
        self._sync_counts()

    def offload(self) -> None:
        """Refuse: packed blocks stay on the device."""
        raise UnsupportedError(
            "cache_implementation",
            "'offloaded' was asked for a packed cache",
            "None",
            "Leave cache_implementation out",
        )

    prefetch = offload


class PackedCache(DynamicCache):
    """A ``DynamicCache`` whose full-attention layers are packed; the others keep their kind."""

    padded_right = False  # a row of the first call was; nothing may follow it

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers."""
        sizes: list[int] = [
            layer.nbytes if isinstance(layer, PackedLayer) else _dense_bytes(layer)
            for layer in self.layers
        ]
        return sum(sizes)

    def set_padding(self, pads: Sequence[int]) -> None:
        """Say how many tokens of left padding each row has so far."""
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.pads = list(pads)


def adopt(cache: Any, config: Any, specs: dict[int, LayerSpec]) -> PackedCache:
    """Turn an empty dynamic cache into a packed one, in place; ``None`` makes a new one.

    In place, because ``generate`` holds on to the cache it made.

    Raises:
        UnsupportedError: the cache holds tokens already, or is not a dynamic one.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not plain or cache.get_seq_length() > 0:
        raise UnsupportedError(
            "past_key_values",
            f"got a {type(cache).__name__} that a squeezed model cannot use",
            "none, an empty DynamicCache, or the cache that this model returned",
            "Leave past_key_values and cache_implementation out",
        )
    if not cache.layers:
        cache.layers = DynamicCache(config=config).layers
    cache.layer_class_to_replicate = None
    cache.layers = [
        PackedLayer(specs[i]) if i in specs else layer for i, layer in enumerate(cache.layers)
    ]
    cache.__class__ = PackedCache
    return cache  # type: ignore[no-any-return]


def _length(tensors: Tensors) -> int:
    return next(iter(tensors.values())).shape[0]


def _dense_bytes(layer: Any) -> int:
    tensors = (x for x in vars(layer).values() if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)
