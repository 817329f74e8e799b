"""What encoding the cache costs on one GPU, beside the attention that it serves.

32 query heads and 8 key/value heads of 128, bfloat16, blocks of 128 tokens. A call is the cache
layer's own: it transforms, encodes and stores keys and values, keeps the rest exact, and counts.
The calls of a measurement replay as one CUDA graph, so launches cost what they cost on the GPU.
``percent`` is the time per prompt over cuDNN's causal attention for that prompt, or the time per
step, a 128th of a block's, over our decode attention of that cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import decode_attention as decode
from squeeze.cache.layer import PackedLayer
from squeeze.cache.spec import LayerSpec, Side
from squeeze.cache.static import StaticPackedLayer
from squeeze.quant.kv.graded import Graded
from squeeze.quant.transforms.center import Center
from squeeze.quant.transforms.klt import Klt
from squeeze.types import Implementation

OP = "kv_encode"
HEADS, KV_HEADS, HEAD_DIM = decode.HEADS, decode.KV_HEADS, decode.HEAD_DIM
BLOCK, SINKS, RESIDUAL = 128, 4, 128
PREFILL = 32768
STEPS = ((1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768))
# Pairs of formats that decode attention is measured for, too; then those of recipes kv2 and kv1.
PAIRS = ("4 bits g128", "4 bits g64", "2 bits g128", "8 bits g128", "float8")
KV2 = "graded 4,0 keys, 2-bit values"
KV1 = "graded 4,2,1,0 keys, 1-bit values"
REPLAYS, LAYERS, FLUSHES = 20, 4, 4


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time the encoding of a prompt and of a decode step on a CUDA device.

    Yields:
        One dictionary per measurement: op, shape, implementation, median_us, baseline (whether it
        is attention), and percent of the attention served.
    """
    place = torch.device(device)
    yield from _prefill(place, repeats)
    yield from _steps(place, repeats)


def _prefill(device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure one prompt."""
    shape = f"prefill 1 x {PREFILL}"
    attention = decode._median_us([_attention(device)], repeats)
    yield _row(shape, "sdpa cudnn bf16, causal", attention, baseline=True)
    prompts = [_random(1, PREFILL, device) for _ in range(2)]
    for name in (*PAIRS, KV2, KV1):
        spec = _spec(name, device)
        median = decode._median_us([_commit(spec, *pair) for pair in prompts], repeats)
        yield _row(shape, f"squeeze {name}", median, served=attention)


def _steps(device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure the block that is full every 128 steps, spread over them."""
    for name in (*PAIRS, KV2):
        flushes = {rows: _flush_us(name, rows, device, repeats) for rows in (1, 8)}
        for rows, length in STEPS:
            served = decode._packed(rows, length, name, device, repeats)["median_us"]
            yield _row(f"decode {rows} x {length}", f"squeeze {name}, attention", served, True)
            spread = flushes[rows] / BLOCK
            yield _row(f"decode {rows} x {length}", f"squeeze {name}", spread, served=served)


def _flush_us(name: str, rows: int, device: torch.device, repeats: int) -> float:
    """Time what a layer does when a block is full: 128 steps, of which the last one fills it."""
    start = SINKS + RESIDUAL
    most = start + BLOCK * (FLUSHES + 2)  # two before the graph
    calls: list[Callable[[], Any]] = []
    for _ in range(LAYERS):
        layer = StaticPackedLayer(_spec(name, device), most)
        pair = _random(rows, start, device)
        layer.update(*pair)
        layer.commit(*pair)
        for buffer in (layer.exact.keys, layer.exact.values):
            buffer.normal_()
        calls += [partial(layer.advance, BLOCK)] * FLUSHES
    return decode._median_us(calls, repeats)


def _commit(spec: LayerSpec, keys: Tensor, values: Tensor) -> Callable[[], Any]:
    """Bind the storing of a prompt by a layer without any."""

    def call() -> None:
        layer = PackedLayer(spec)
        layer.update(keys, values)
        layer.commit(keys, values)

    return call


def _attention(device: torch.device) -> Callable[[], Any]:
    """Bind the prompt's own attention."""
    keys, values = _random(1, PREFILL, device)
    query = torch.randn(1, HEADS, PREFILL, HEAD_DIM, dtype=torch.bfloat16, device=device)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=True
            )

    return call


def _random(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values ``[rows, H_kv, length, D]``, laid out as a projection writes them."""
    shape = (2, rows, length, KV_HEADS, HEAD_DIM)
    keys, values = torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(2, 3)
    return keys, values


def _spec(name: str, device: torch.device) -> LayerSpec:
    """Describe a layer; the keys of recipes that calibrate are centred and rotated."""
    pair = (Graded((4, 2, 1, 0)), Graded((1,))) if name == KV1 else decode.FORMATS[name]
    transforms: tuple[Any, ...] = ()
    if name in (KV1, KV2):
        center = torch.randn(KV_HEADS, HEAD_DIM, device=device)
        basis = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, device=device)).Q
        rotation = {"forward": basis.contiguous(), "backward": basis.mT.contiguous()}
        transforms = ((Center(), {"center": center}), (Klt(), rotation))
    sides = Side(pair[0], {}, transforms), Side(pair[1], {})
    return LayerSpec(*sides, BLOCK, SINKS, RESIDUAL, Implementation.TRITON)


def _row(
    shape: str, name: str, median_us: float, baseline: bool = False, served: float | None = None
) -> dict[str, Any]:
    row = {
        "op": OP,
        "shape": f"{shape}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}",
        "implementation": name,
        "median_us": round(median_us, 3),
        "baseline": baseline,
    }
    return row if served is None else row | {"percent": round(100 * median_us / served, 3)}
