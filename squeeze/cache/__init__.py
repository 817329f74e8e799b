"""The packed KV cache, from one layer's storage to the cache that ``generate`` uses."""

from squeeze.cache.layer import Handle, PackedLayer
from squeeze.cache.packed import PackedCache, adopt
from squeeze.cache.spec import LayerSpec, Side
from squeeze.cache.static import StaticPackedCache, make_recordable, make_static, refusal

__all__ = [
    "Handle",
    "LayerSpec",
    "PackedCache",
    "PackedLayer",
    "Side",
    "StaticPackedCache",
    "adopt",
    "make_recordable",
    "make_static",
    "refusal",
]
