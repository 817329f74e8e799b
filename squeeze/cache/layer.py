"""One layer of a packed cache, as transformers drives it.

``update`` returns a ``Handle`` instead of tensors. The attention function reads the state as it was
before the call beside the call's own exact keys and values, then commits them: every block that is
full is encoded once, and never again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from squeeze.cache.blocks import BlockStorage, length_of
from squeeze.cache.counts import RowCounts
from squeeze.cache.exact import ExactTokens, Span
from squeeze.cache.offload import Prefetcher
from squeeze.cache.queries import to_float8
from squeeze.cache.salience import attention_mass, text_tokens
from squeeze.cache.spec import LayerSpec, Side
from squeeze.errors import UnsupportedError
from squeeze.kernels.decode_attention.api import decode_attention
from squeeze.types import Implementation, PackedBlocks, Tensors

# A call's queries, the factor of their products and the bound of the scores.
Asked: TypeAlias = tuple[Tensor, float, float | None]
# Tokens encoded at a time, over all rows, which bounds the float32 copy.
ENCODE_TOKENS = 4096


class Handle(NamedTuple):
    """What ``update`` returns: the layer as it was, and the call's exact keys and values."""

    layer: PackedLayer
    keys: Tensor
    values: Tensor


class PackedLayer(DynamicLayer):
    """A full-attention layer whose older tokens are packed.

    Attributes:
        total: Tokens seen, padding included.
        pads: Left padding of each row.
        types: Kinds of the row's tokens so far, int ``[B, T]``, 0 for text; ``None`` is all text.
        exact: The tokens that are not packed.
        block_counts: Packed blocks of each row.
        key_blocks: Their storage; ``value_blocks`` likewise.
    """

    is_sliding = False
    is_croppable = True
    exact: ExactTokens
    block_counts: RowCounts

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.prefetcher: Prefetcher | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything and free it."""
        self.is_initialized = False
        self.keys = self.values = None  # transformers' own buffers stay unused
        self.total = 0
        self.pads: list[int] = []
        self.types: Tensor | None = None
        self.key_blocks, self.value_blocks = (
            BlockStorage(
                addressed=self.spec.implementation is Implementation.TRITON,
                offload=self.spec.offload,
            )
            for _ in range(2)
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, dtype and device from the first call."""
        self.dtype, self.device = key_states.dtype, key_states.device
        slots, sinks = self.spec.exact_slots, self.spec.sink_tokens
        self.exact = ExactTokens(key_states, value_states, slots, sinks)
        self.block_counts = RowCounts(key_states.shape[0], self.device)
        self.pads = self.pads or [0] * key_states.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand the call's keys and values to the attention function, which commits them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handle = Handle(self, key_states, value_states)
        return handle, handle

    @property
    def blocks(self) -> list[int]:
        """Packed blocks of each row."""
        return self.block_counts.host if self.is_initialized else []

    @property
    def max_blocks(self) -> int:
        """Block slots that attention has to look at."""
        return max(self.blocks, default=0)

    @torch.no_grad()
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
        span = self._extend(keys, values, in_place=False)
        result = self.read(query, span.keys, span.values, scaling, softcap)
        self._settle(span, (query, scaling, softcap))
        return result

    @torch.no_grad()
    def attend_decoded(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        softcap: float | None,
        attend: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Do as ``attend`` does with a function of all keys and values; for many queries.

        Args:
            query: ``[B, H, T_q, D]``, as for ``attend``.
            keys: Of this call.
            values: Likewise.
            scaling: Multiplies the dot products.
            softcap: Bound of the scores, or ``None``.
            attend: Gets keys and values ``[B, H_kv, T, D]`` of all T tokens, padding 0, packed ones
                decoded, in the dtype of the call's; its result is returned.
        Cost: one layer's keys and values in full for as long as ``attend`` runs.
        """
        span = self._extend(keys, values, in_place=False)
        sides = zip((self.spec.keys, self.spec.values), self._packed(), span[:2], strict=True)
        result = attend(*(self._decoded(*side, span.starts) for side in sides))
        self._settle(span, (query, scaling, softcap))
        return result

    def _decoded(
        self, side: Side, packed: PackedBlocks | None, exact: Tensor, starts: list[int]
    ) -> Tensor:
        """Put sinks, decoded blocks and newest tokens of every row in order."""
        result = exact.new_zeros(*exact.shape[:2], self.total, exact.shape[3])
        length, sinks = self.spec.block_length, self.spec.sink_tokens
        facts = zip(self.pads, self.blocks, starts, self.exact.counts.host, strict=True)
        for row, (pad, blocks, start, count) in enumerate(facts):
            head, first = min(sinks, count), min(pad, self.total)
            result[row, :, first : first + head] = exact[row, :, start : start + head]
            newest = exact[row, :, start + head : start + count]
            result[row, :, first + head + blocks * length :] = newest
        first = 0
        for segment in packed.segments if packed is not None else ():
            slots = length_of(segment)
            step = max(1, ENCODE_TOKENS // (length * result.shape[0]))
            for slot in range(0, slots, step):
                part = {name: x[slot : slot + step] for name, x in segment.items()}
                dense = side.decode(part).to(result.dtype)  # [n, B, H_kv, L, D]
                dense = dense.permute(1, 2, 0, 3, 4).flatten(2, 3)
                for row, (pad, blocks) in enumerate(zip(self.pads, self.blocks, strict=True)):
                    tokens = min(dense.shape[2], (blocks - first - slot) * length)
                    if tokens > 0:
                        begin = pad + sinks + (first + slot) * length
                        result[row, :, begin : begin + tokens] = dense[row, :, :tokens]
            first += slots
        return result

    @torch.no_grad()
    def commit(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor | None = None,
        scaling: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        """Store a call's keys and values without attending to them.

        Its queries, as ``attend`` takes them, may say which tokens matter.
        """
        span = self._extend(keys, values, in_place=True)
        self._settle(span, None if query is None else (query, scaling, softcap))

    def read(
        self,
        query: Tensor,
        exact_keys: Tensor,
        exact_values: Tensor,
        scaling: float,
        softcap: float | None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the packed blocks and to exact slots that hold the current tokens too.

        The output is of ``dtype`` where nothing is to be undone in it, else float32.
        """
        spec = self.spec
        packed_query, shift = query, None
        for transform, parameters in spec.keys.transforms:
            packed_query, change = transform.prepare_query(packed_query, parameters)
            shift = change if shift is None else shift if change is None else shift + change
        if spec.queries == "float8":
            packed_query = to_float8(packed_query)
        keys, values = self._packed()
        parts = decode_attention(
            query,
            packed_query,
            shift,
            keys,
            values,
            self.block_counts.device,
            exact_keys,
            exact_values,
            self.exact.counts.device,
            scaling=scaling,
            softcap=softcap,
            split_output=bool(spec.values.transforms),
            max_blocks=self.max_blocks,
            implementation=spec.implementation,
            output_dtype=torch.float32 if spec.values.transforms else dtype,
        )
        if not spec.values.transforms:
            output, lse = parts
            return output, lse
        packed, exact, lse = parts
        return self._undo_values(packed) + exact, lse

    def _undo_values(self, output: Tensor) -> Tensor:
        kv_heads = self.exact.keys.shape[1]
        batch, heads, steps, size = output.shape
        # A value transform acts per KV head; the query heads of a group are its rows.
        rows = output.view(batch, kv_heads, heads // kv_heads * steps, size)
        for transform, parameters in reversed(self.spec.values.transforms):
            rows = transform.invert(rows, parameters)
        return rows.reshape(batch, heads, steps, size)

    def _packed(self) -> tuple[PackedBlocks | None, PackedBlocks | None]:
        """Say where the blocks are; those in CPU memory are brought to the device."""
        if not self.key_blocks.segments:
            return None, None
        places = [(tuple(s.segments), s.addresses) for s in (self.key_blocks, self.value_blocks)]
        if self.prefetcher is not None:
            places = self.prefetcher.fetch(self)
        keys, values = (
            PackedBlocks(side.format, side.parameters, segments, self.spec.block_length, table)
            for side, (segments, table) in zip(
                (self.spec.keys, self.spec.values), places, strict=True
            )
        )
        return keys, values

    def _extend(self, keys: Tensor, values: Tensor, in_place: bool) -> Span:
        steps = keys.shape[2]
        skipped = [min(max(pad - self.total, 0), steps) for pad in self.pads]
        self.total += steps
        return self.exact.extend(keys, values, skipped, in_place)

    def _settle(self, span: Span, asked: Asked | None = None) -> None:
        """Encode every block that is full, and keep the rest exact."""
        ready = [self.spec.ready(count) for count in self.exact.counts.host]
        if any(ready):
            self._pack(span._replace(salience=self._salience(span, asked)), ready)
        self.exact.keep(span, [n * self.spec.block_length for n in ready])

    def _salience(self, span: Span, asked: Asked | None) -> Tensor | None:
        """Rank the exact tokens ``[B, 1 or H_kv, E]`` for formats that protect some."""
        spec, counts, starts = self.spec, self.exact.counts.host, span.starts
        if spec.protects and spec.salience == "attention" and asked is not None:
            return attention_mass(asked[0], span.keys, starts, counts, *asked[1:])
        if spec.protects and spec.salience == "token_types" and self.types is not None:
            sinks = spec.sink_tokens
            places = zip(self.pads, self.blocks, strict=True)
            firsts = [pad + sinks + n * spec.block_length for pad, n in places]
            behind = [start + sinks for start in starts]
            left = [max(0, count - sinks) for count in counts]
            types = self.types.to(span.keys.device)
            return text_tokens(types, firsts, behind, left, span.keys.shape[2])
        return None

    def _pack(self, span: Span, ready: list[int]) -> None:
        """Encode the blocks that are due, rows that agree together."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, facts in enumerate(zip(ready, span.starts, self.blocks, strict=True)):
            groups.setdefault(facts, []).append(row)
        after = [b + n for b, n in zip(self.blocks, ready, strict=True)]
        for (count, start, slot), rows in groups.items():
            if count:
                start += self.spec.sink_tokens
                self._encode(span, rows, count, start, slot, max(after))
        self.block_counts.set(after)

    def _encode(
        self, span: Span, rows: list[int], count: int, start: int, slot: int, capacity: int
    ) -> None:
        """Pack ``count`` blocks of rows that agree, from exact slot ``start`` to block ``slot``."""
        length, batch = self.spec.block_length, span.keys.shape[0]
        chosen = rows if len(rows) < batch else None
        index = None if chosen is None else torch.tensor(rows, device=span.keys.device)
        step = max(1, ENCODE_TOKENS // (length * len(rows)))
        for first in range(0, count, step):
            n = min(step, count - first)
            tokens = slice(start + first * length, start + (first + n) * length)
            salience = span.salience
            if salience is not None:
                salience = salience[rows, :, tokens].unflatten(2, (n, length)).movedim(2, 0)
            for side, storage, x in (
                (self.spec.keys, self.key_blocks, span.keys),
                (self.spec.values, self.value_blocks, span.values),
            ):
                part = x[:, :, tokens] if index is None else x[:, :, tokens][index]
                part = part.unflatten(2, (n, length)).permute(2, 0, 1, 3, 4)
                storage.grow(capacity)
                out = storage.slots(slot + first, n) if index is None else None
                blocks = side.encode(part, self.spec.implementation, out, salience)
                if out is None:
                    storage.grow(capacity, every_row(blocks, batch))
                    storage.write(slot + first, chosen, blocks)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of this layer, those in CPU memory included."""
        if not self.is_initialized:
            return 0
        counts = self.block_counts.device
        exact = self.exact.nbytes + counts.numel() * counts.element_size()
        return exact + self.key_blocks.nbytes + self.value_blocks.nbytes

    @property
    def host_nbytes(self) -> int:
        """Of ``nbytes``, what is offloaded to CPU memory."""
        return self.key_blocks.nbytes + self.value_blocks.nbytes if self.spec.offload else 0

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

    def get_max_cache_shape(self) -> int:
        """Say the same to older transformers."""
        return self.get_max_length()

    def crop(self, max_length: int) -> None:
        """Drop the newest ``-max_length`` tokens, or all beyond a positive ``max_length``.

        Raises:
            UnsupportedError: tokens that are packed already would have to go.
        """
        max_length = int(max_length)  # generate() may pass a tensor, which would alias the counts
        drop = -max_length if max_length <= 0 else max(0, self.total - max_length)
        if not drop or not self.is_initialized:
            return
        drop, before = min(drop, self.total), self.exact.counts.host
        lengths = [self.total - pad for pad in self.pads]
        after = [e - min(drop, n) for e, n in zip(before, lengths, strict=True)]
        for blocks, left in zip(self.blocks, after, strict=True):
            if blocks and left < self.spec.sink_tokens:
                newest = min(before) - self.spec.sink_tokens
                raise UnsupportedError(
                    "past_key_values.crop",
                    f"dropping {drop} tokens reaches into packed blocks",
                    f"up to {newest} tokens now, always {self.spec.residual_length} after prefill",
                    "Raise kv_cache.residual_length, or prefill again",
                )
        self.total -= drop
        self.exact.counts.set(after)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx``, as beam search does."""
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            self._select([row for row in range(len(self.pads)) for _ in range(repeats)])

    @torch.no_grad()
    def _select(self, order: list[int]) -> None:
        if order == list(range(len(self.pads))):
            return
        self.pads = [self.pads[row] for row in order]
        self.types = None if self.types is None else self.types[order]
        self.exact.select(order)
        self.block_counts.select(order)
        for storage in (self.key_blocks, self.value_blocks):
            storage.map(lambda x: x.index_select(1, torch.tensor(order, device=x.device)))

    def offload(self) -> None:
        """Do nothing: packed blocks move by ``kv_cache.offload``."""

    prefetch = offload


def every_row(blocks: Tensors, batch: int) -> Tensors:
    """Shape blocks of some rows ``[n, rows, ...]`` as those of a whole batch, copying nothing."""
    return {name: x[:, :1].expand(-1, batch, *x.shape[2:]) for name, x in blocks.items()}
