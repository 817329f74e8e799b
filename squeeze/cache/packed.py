"""The packed KV cache: a transformers cache whose full-attention layers store packed blocks.

Of each row, the first ``sink_tokens`` and the newest ``residual_length`` tokens stay exact (at most
one block more); everything between is encoded once, block by block, and never again. Rows may start
at different positions (left padding): everything counts from a row's first real token, so a row's
result does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import DynamicCache

from squeeze.cache.layer import PackedLayer
from squeeze.cache.offload import Prefetcher
from squeeze.cache.salience import joined
from squeeze.cache.spec import LayerSpec
from squeeze.errors import UnsupportedError


class PackedCache(DynamicCache):
    """A ``DynamicCache`` whose full-attention layers are packed; the others keep their kind."""

    padded_right = False  # a row of the first call was; nothing may follow it
    prefetcher: Prefetcher | None = None

    def __repr__(self) -> str:
        packed = [i for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)]
        return (
            f"{type(self).__name__}({len(packed)} of {len(self.layers)} layers packed: {packed}, "
            f"{self.get_seq_length()} tokens, {self.nbytes} bytes)"
        )

    @property
    def packed_layers(self) -> list[PackedLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers, those offloaded to CPU memory included."""
        sizes: list[int] = [
            layer.nbytes if isinstance(layer, PackedLayer) else _dense_bytes(layer)
            for layer in self.layers
        ]
        return sum(sizes) + (self.prefetcher.nbytes if self.prefetcher else 0)

    @property
    def host_nbytes(self) -> int:
        """Of ``nbytes``, what ``kv_cache.offload`` keeps in CPU memory."""
        return sum(layer.host_nbytes for layer in self.packed_layers)

    def set_padding(self, pads: Sequence[int]) -> None:
        """Say how many tokens of left padding each row has so far."""
        for layer in self.packed_layers:
            layer.pads = list(pads)

    def note_types(self, types: Tensor | None, steps: int) -> None:
        """Say of what kinds the coming call's tokens are: int ``[B, steps]``, 0 for text.

        Those of all tokens so far may stand before them. ``None``: all are text.
        """
        for layer in self.packed_layers:
            layer.types = joined(layer.types, types, self.get_seq_length(), steps)

    def connect(self) -> None:
        """Give the offloaded layers what brings their blocks to the device."""
        moved = [layer for layer in self.packed_layers if layer.spec.offload]
        self.prefetcher = Prefetcher(moved) if moved else None
        for layer in moved:
            layer.prefetcher = self.prefetcher


def adopt(cache: Any, config: Any, specs: dict[int, LayerSpec]) -> PackedCache:
    """Turn an empty dynamic cache into a packed one, in place; ``None`` makes a new one.

    In place, because ``generate`` holds on to the cache it made. An offloading cache, as
    ``cache_implementation="offloaded"`` asks for, makes one that offloads its packed layers.

    Raises:
        UnsupportedError: the cache holds tokens already, or is not a dynamic one.
    """
    cache = DynamicCache(config=config) if cache is None else cache
    if type(cache) is not DynamicCache or cache.get_seq_length() > 0:
        raise UnsupportedError(
            "past_key_values",
            f"got a {type(cache).__name__} that a squeezed model cannot use",
            "none, an empty DynamicCache, or the cache that this model returned",
            "Leave past_key_values and cache_implementation out; squeeze.static_cache makes one of "
            "fixed shape",
        )
    if getattr(cache, "offloading", False):
        specs = {i: replace(spec, offload=True) for i, spec in specs.items()}
        cache.offloading = False  # transformers moves whole layers; ours moves packed blocks
    if not cache.layers:
        cache.layers = DynamicCache(config=config).layers
    cache.layer_class_to_replicate = None
    cache.layers = [
        PackedLayer(specs[i]) if i in specs else layer for i, layer in enumerate(cache.layers)
    ]
    cache.__class__ = PackedCache
    packed = cast(PackedCache, cache)
    packed.connect()
    return packed


def _dense_bytes(layer: Any) -> int:
    # Layers of linear attention keep dictionaries of tensors.
    values = [v for x in vars(layer).values() for v in (x.values() if isinstance(x, dict) else [x])]
    tensors = [x for x in values if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)
