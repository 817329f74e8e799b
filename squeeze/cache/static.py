"""A packed cache whose decode step a CUDA graph can record and replay.

Everything is allocated for ``max_length`` tokens by the first call and stays where it is; without
a maximum it stays until ``reserve`` is asked for more. A step appends at counts that live on the
device, so it neither waits for the host nor has shapes that depend on data. Full blocks are encoded
between steps by the host, which knows when each row is due.

    cache = squeeze.static_cache(model, 4096)
    model(prompt, past_key_values=cache)
    with cache.recording():
        model(token, position_ids=place, past_key_values=cache)  # warm up, then
        cache.rewind()
        with torch.cuda.graph(graph):
            logits = model(token, position_ids=place, past_key_values=cache).logits
    graph.replay(), cache.advance()  # for every token
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from squeeze.cache.exact import Span
from squeeze.cache.layer import PackedLayer, every_row
from squeeze.cache.packed import PackedCache, adopt
from squeeze.cache.spec import LayerSpec
from squeeze.errors import UnsupportedError

# A cache without a maximum is made ready for this many tokens at least.
BUCKET_TOKENS = 1024


class StaticPackedLayer(PackedLayer):
    """A packed layer that allocates in its first call, or in ``reserve``, and never in a step.

    Args:
        spec: How the layer stores.
        max_length: Tokens that fit, padding included; ``None`` for a layer that grows.
        step_tokens: Most tokens of a step that may be recorded.
    """

    def __init__(self, spec: LayerSpec, max_length: int | None, step_tokens: int = 1) -> None:
        self.max_length, self.step_tokens = max_length, step_tokens
        self.recorded_blocks: int | None = None  # set while a step is being recorded
        self.reserved = 0  # tokens that a row may have before anything moves
        self.known_places: tuple[int, ...] | None = None  # until something may have moved
        super().__init__(spec)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "known_places": None}  # a copy lies elsewhere

    def reset(self) -> None:
        """Forget the tokens; memory of fixed shape stays, and so does what was recorded."""
        self.known_places = None
        if not self.is_initialized or self.max_length is None:
            super().reset()
            self.reserved = 0
            return
        rows = len(self.blocks)
        self.total, self.pads = 0, [0] * rows
        self.exact.counts.set([0] * rows)
        self.block_counts.set([0] * rows)

    @torch.no_grad()
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything for the batch that arrives."""
        super().lazy_initialization(key_states, value_states)
        self.exact.whole = self.spec.exact_slots - 1 + self.step_tokens
        if self.max_length is not None:
            self.reserve(self.max_length)

    @torch.no_grad()
    def reserve(self, tokens: int) -> None:
        """Make room for rows of ``tokens`` tokens; what was recorded holds if nothing moved."""
        spec, blocks, self.reserved = self.spec, self.spec.ready(tokens), tokens
        self.known_places = None
        self.exact.reserve(self.exact.whole)
        for side, storage, x in (
            (spec.keys, self.key_blocks, self.exact.keys),
            (spec.values, self.value_blocks, self.exact.values),
        ):
            # Where blocks are found by their addresses, more of them may come while tables stay.
            wanted = blocks
            if self.max_length is None and storage.addressed:
                storage.reserve_addresses(blocks)
                wanted = 1
            if storage.capacity >= wanted:
                continue
            if storage.segments:
                like = storage.segments[0]
            else:
                block = x.new_zeros(1, 1, x.shape[1], spec.block_length, x.shape[3])
                # What a side computes once is there before anything is recorded.
                like = every_row(side.encode(block, spec.implementation), x.shape[0])
            storage.grow(wanted, like)

    @property
    def capacity(self) -> int:
        """Block slots of a row, or how many can be addressed where these grow."""
        if self.max_length is not None:
            return self.spec.ready(self.max_length)
        return self.key_blocks.reach or self.key_blocks.capacity

    def places(self) -> tuple[int, ...]:
        """Say where everything lies that a step reads or writes: a recorded one follows these."""
        if self.known_places is not None:
            return self.known_places
        exact, sides = self.exact, (self.key_blocks, self.value_blocks)
        tensors = [exact.keys, exact.values, exact.counts.device, self.block_counts.device]
        tensors += [table for side in sides for table in (side.addresses or {}).values()]
        read = [0 if side.addressed else len(side.segments) for side in sides]
        self.known_places = (self.capacity, *read, *(x.data_ptr() for x in tensors))
        return self.known_places

    @property
    def max_blocks(self) -> int:
        """Block slots that attention looks at: all that a recorded step may ever see."""
        return super().max_blocks if self.recorded_blocks is None else self.recorded_blocks

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand the call's keys and values to the attention function, if they fit.

        Raises:
            UnsupportedError: the cache is full, or was allocated for another number of rows.
        """
        rows = len(self.blocks) if self.is_initialized else key_states.shape[0]
        if key_states.shape[0] != rows and self.max_length is not None:
            raise _error("batch", f"got {key_states.shape[0]} rows", f"{rows}, as at first")
        self.check_room(key_states.shape[2])
        self.known_places = None
        return super().update(key_states, value_states)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend as any packed layer does; up to ``step_tokens`` by device counts alone."""
        steps = keys.shape[2]
        recording = self.recorded_blocks is not None
        grows = self.max_length is None and not recording
        if grows or steps > self.step_tokens or max(self.pads) > self.total:
            if recording:
                raise _error(
                    "recording",
                    f"got a call of {steps} tokens",
                    f"steps of at most {self.step_tokens}, after every row's padding",
                )
            return super().attend(query, keys, values, scaling, softcap)
        with torch.no_grad():
            self.exact.append(keys, values)
            result = self.read(query, self.exact.keys, self.exact.values, scaling, softcap)
        if not recording:
            self.advance(steps)
        return result

    def advance(self, steps: int) -> None:
        """Count ``steps`` tokens that the device has appended, and encode what is due."""
        self.count(steps)
        self.settle()

    def count(self, steps: int) -> None:
        """Count ``steps`` tokens that the device has appended; ``settle`` must follow."""
        self.check_room(steps)
        counts = self.exact.counts
        self.total += steps
        counts.host = [count + steps for count in counts.host]

    @property
    def is_due(self) -> bool:
        """Whether a row has a block to be encoded before the next step."""
        return self.spec.ready(max(self.exact.counts.host)) > 0

    def make_room(self) -> None:
        """Allocate slots for the blocks that are due by the host's counts."""
        counts = zip(self.blocks, self.exact.counts.host, strict=True)
        needed = max(blocks + self.spec.ready(count) for blocks, count in counts)
        for storage in (self.key_blocks, self.value_blocks):
            if storage.capacity < needed:
                storage.grow(needed)
                self.known_places = None

    @torch.no_grad()
    def settle(self) -> None:
        """Encode the blocks that are due, rows that agree together."""
        if self.is_due:
            self.known_places = None
            self._settle(Span(self.exact.keys, self.exact.values, [0] * len(self.blocks)))

    def rewind(self) -> None:
        """Bring the device's counts back to the host's: what ran since did not happen."""
        self.exact.counts.sync()
        self.block_counts.sync()

    def get_max_length(self) -> int:
        """Return the tokens that fit, padding included; -1 where there is no maximum."""
        return super().get_max_length() if self.max_length is None else self.max_length

    def _select(self, order: list[int]) -> None:
        self.known_places = None
        if len(order) != len(self.pads) and self.max_length is not None:
            raise _error(
                "batch", f"cannot go from {len(self.pads)} rows to {len(order)}", "as many rows"
            )
        super()._select(order)

    def check_room(self, steps: int) -> None:
        """Refuse ``steps`` more tokens where they do not fit.

        Raises:
            UnsupportedError: they do not.
        """
        if self.max_length is not None and self.total + steps > self.max_length:
            raise _error(
                "max_length",
                f"{self.total} tokens and {steps} more do not fit",
                f"{self.max_length} tokens, padding included",
            )


class Recordings(dict[Any, Any]):
    """Steps that were recorded over one cache, by kind; a copy of the cache begins without.

    Attributes:
        asked: How often calls of a kind came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[Any] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()


class StaticPackedCache(PackedCache):
    """A packed cache whose step can be recorded; see the module."""

    recordings: Recordings

    @property
    def static_layers(self) -> list[StaticPackedLayer]:
        """The layers, all of which are packed."""
        return cast(list[StaticPackedLayer], self.layers)

    @contextmanager
    def on_device(self, tokens: int | None = None) -> Iterator[None]:
        """Let calls only work on the device: whoever makes them advances or rewinds.

        Args:
            tokens: As ``recording`` takes it.
        """
        for layer in self.static_layers:
            wanted = layer.capacity if tokens is None else layer.spec.ready(tokens)
            layer.recorded_blocks = min(wanted, layer.capacity)
        try:
            yield
        finally:
            for layer in self.static_layers:
                layer.recorded_blocks = None

    @contextmanager
    def recording(self, tokens: int | None = None) -> Iterator[None]:
        """Let calls only work on the device, leaving counts and encoding to ``advance``.

        Args:
            tokens: Attention looks at no more than the blocks of a row this long, and a step so
                recorded is valid up to that length; fewer blocks start fewer programs. Default:
                ``max_length``.

        Raises:
            UnsupportedError: nothing was stored yet, so nothing is allocated.
        """
        if not self.get_seq_length():
            raise _error("recording", "the cache is empty", "a cache that a first call has filled")
        try:
            with self.on_device(tokens):
                yield
        finally:
            self.rewind()

    def takes(self, steps: int) -> bool:
        """Say whether a step of so many tokens may be recorded, and no other is at the moment."""
        return not self.is_recording and steps <= self.static_layers[0].step_tokens

    @property
    def is_recording(self) -> bool:
        """Whether calls only work on the device now."""
        return bool(self.layers) and self.static_layers[0].recorded_blocks is not None

    def reserve(self, tokens: int) -> None:
        """Make room for a call that makes the rows ``tokens`` long, and for those to come.

        Raises:
            UnsupportedError: the cache has a maximum, and this is more.
        """
        for layer in self.static_layers:
            layer.check_room(tokens - layer.total)
            if layer.max_length is None and tokens > layer.reserved:
                layer.reserve(bucket(tokens))

    def places(self) -> tuple[tuple[int, ...], ...]:
        """Say where everything lies that a step reads or writes."""
        return tuple(layer.places() for layer in self.static_layers)

    def advance(self, steps: int = 1) -> None:
        """Count the tokens of a replayed step, and encode the blocks that are full."""
        self.count(steps)
        self.settle()

    def count(self, steps: int) -> None:
        """Count the tokens of a replayed step; ``settle`` or another encoder must follow."""
        for layer in self.static_layers:
            layer.count(steps)

    @property
    def is_due(self) -> bool:
        """Whether blocks are to be encoded before the next step."""
        return any(layer.is_due for layer in self.static_layers)

    def settle(self) -> None:
        """Encode the blocks that are due by launches that suit their rows."""
        for layer in self.static_layers:
            layer.settle()

    def rewind(self) -> None:
        """Forget the calls that were made while recording, as after a warm-up."""
        for layer in self.static_layers:
            layer.rewind()


def bucket(tokens: int) -> int:
    """Round a length up to what is reserved for it: a power of two."""
    return max(BUCKET_TOKENS, 1 << (tokens - 1).bit_length())


def refusal(cache: PackedCache) -> str | None:
    """Say what keeps a cache's step from being recorded, ``None`` if nothing does."""
    dense = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, PackedLayer)]
    if dense:
        return f"layers {dense} keep their own cache"
    return "kv_cache.offload is on" if cache.prefetcher is not None else None


def make_recordable(cache: PackedCache, step_tokens: int) -> StaticPackedCache:
    """Turn a cache that ``refusal`` lets pass into one whose steps can be recorded, in place.

    It goes on growing, by buckets, and whoever holds it holds the same cache. Nothing is copied
    before the first ``reserve``.
    """
    if not isinstance(cache, StaticPackedCache):
        for layer in cache.packed_layers:
            layer.__class__ = StaticPackedLayer
            static = cast(StaticPackedLayer, layer)
            static.max_length, static.step_tokens = None, step_tokens
            static.recorded_blocks, static.reserved, static.known_places = None, 0, None
            static.exact.whole = static.spec.exact_slots - 1 + step_tokens
        cache.__class__ = StaticPackedCache
        cast(StaticPackedCache, cache).recordings = Recordings()
    return cast(StaticPackedCache, cache)


def make_static(
    config: Any, specs: dict[int, LayerSpec], max_length: int, step_tokens: int
) -> StaticPackedCache:
    """Make an empty static cache.

    Raises:
        UnsupportedError: a layer is not packed or is offloaded, or a length is not positive.
    """
    for name, value in (("max_length", max_length), ("step_tokens", step_tokens)):
        if value < 1:
            raise _error(name, f"got {value}", "at least 1")
    cache = adopt(None, config, specs)
    found = refusal(cache)
    if found:
        raise _error("model", found, "models whose layers are all packed, on the device")
    cache.layers = [
        StaticPackedLayer(layer.spec, max_length, step_tokens) for layer in cache.packed_layers
    ]
    cache.__class__ = StaticPackedCache
    made = cast(StaticPackedCache, cache)
    made.recordings = Recordings()
    return made


def _error(what: str, received: str, allowed: str) -> UnsupportedError:
    remedy = "Make another static_cache, or pass none for a cache that grows"
    return UnsupportedError(f"static_cache: {what}", received, allowed, remedy)
