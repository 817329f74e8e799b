"""Decode attention on one GPU: dense baselines and ours over packed caches.

32 query heads and 8 key/value heads of 128, bfloat16, one new token per row. The calls of one
measurement read different copies of the cache, more together than the GPU's own cache holds, and
replay as one CUDA graph, so neither reuse nor launch overhead is in a figure. ``gbytes_per_s``
counts the stored keys and values, scales included, once.

``python -m benchmarks.decode_attention`` compares the launch settings instead.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from squeeze.kernels.decode_attention.api import decode_attention
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.bitmap import Bitmap
from squeeze.quant.kv.float8 import Float8
from squeeze.quant.kv.graded import Graded
from squeeze.quant.kv.product_quantization import ProductQuantization
from squeeze.types import Implementation, PackedBlocks, Tensors, bytes_of

OP = "decode_attention"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = ((1, 4096), (1, 32768), (1, 131072), (8, 32768))
FORMATS: dict[str, tuple[Any, Any]] = {
    "4 bits g128": (Affine(4, "channel", 128), Affine(4, "token", 128)),
    "4 bits g64": (Affine(4, "channel", 64), Affine(4, "token", 64)),
    "2 bits g128": (Affine(2, "channel", 128), Affine(2, "token", 128)),
    "2 bits g64": (Affine(2, "channel", 64), Affine(2, "token", 64)),
    "graded 4,0 keys, 2-bit values": (Graded((4, 0)), Affine(2, "token", 128)),
    "8 bits g128": (Affine(8, "channel", 128), Affine(8, "token", 128)),
    "float8": (Float8(), Float8()),
    "bitmap 70%, 4 bits": (Bitmap(), Bitmap()),
    "product quantization": (ProductQuantization(8, 2), ProductQuantization(8, 2)),
}
BLOCK, EXACT = 128, 128
SCALING = HEAD_DIM**-0.5
ROTATED_BYTES, REPLAYS, SAMPLED = 256 * 2**20, 20, 13


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every implementation at every shape on a CUDA device.

    Yields:
        One dictionary per measurement: op, shape, implementation, median_us, gbytes_per_s,
        baseline (whether it is someone else's dense attention), and speedup over cuDNN.
    """
    place = torch.device(device)
    for batch, length in SHAPES:
        library = None
        for row in _rows(batch, length, place, repeats):
            library = library or row["median_us"]
            yield row | {"speedup": round(library / row["median_us"], 3)}


def _rows(batch: int, length: int, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure one shape, cuDNN first."""
    yield from _dense(batch, length, device, repeats)
    for name in FORMATS:
        yield _packed(batch, length, name, device, repeats)


def _dense(batch: int, length: int, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure torch's two fast backends over a bfloat16 cache."""
    size = 4 * batch * KV_HEADS * length * HEAD_DIM
    copies = [
        torch.randn(
            2, batch, KV_HEADS, length, HEAD_DIM, dtype=torch.bfloat16, device=device
        ).unbind(0)
        for _ in range(_copies(size))
    ]
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)

    def attend(keys: Tensor, values: Tensor, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        calls = [lambda kv=kv, b=backend: attend(*kv, b) for kv in copies]
        name = f"sdpa {backend.name.removesuffix('_ATTENTION').lower()} bf16"
        yield _row(batch, length, name, size, _median_us(calls, repeats), baseline=True)


def _packed(
    batch: int, length: int, name: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Measure ours: all but the last 128 tokens packed."""
    blocks = (length - EXACT) // BLOCK
    formats = FORMATS[name]
    bits = sum(format.bits_per_value(HEAD_DIM) for format in formats) / 2
    first = [_random_blocks(format, blocks, batch, device) for format in formats]
    size = sum(bytes_of(side.segments[0]) for side in first)
    size += 4 * batch * KV_HEADS * EXACT * HEAD_DIM
    copies = [first]
    for _ in range(_copies(size) - 1):
        copies.append([_random_blocks(format, blocks, batch, device) for format in formats])
    calls = [_call(*pair, blocks, batch, device) for pair in copies]
    row = _row(batch, length, f"squeeze {name}", size, _median_us(calls, repeats), baseline=False)
    return row | {"effective_bits": bits}


def _call(
    keys: PackedBlocks, values: PackedBlocks, blocks: int, batch: int, device: torch.device
) -> Callable[[], Any]:
    """Bind one call of the op."""
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
    exact = torch.randn(
        2, batch, KV_HEADS, EXACT, HEAD_DIM, dtype=torch.bfloat16, device=device
    ).unbind(0)
    counts = [torch.full((batch,), n, dtype=torch.int32, device=device) for n in (blocks, EXACT)]

    def call() -> Any:
        return decode_attention(
            query,
            query,
            None,
            keys,
            values,
            counts[0],
            *exact,
            counts[1],
            scaling=SCALING,
            implementation=Implementation.TRITON,
        )

    return call


def _random_blocks(format: Any, blocks: int, batch: int, device: torch.device) -> PackedBlocks:
    """Encode a few blocks of noise, and fill all others with copies of them."""
    parameters = {name: table.to(device) for name, table in _parameters(format).items()}
    noise = torch.randn(SAMPLED, KV_HEADS, BLOCK, HEAD_DIM, device=device)
    few = format.encode(noise, parameters)
    places = torch.arange(blocks * batch, device=device).view(blocks, batch) % SAMPLED
    segment = {name: x[places] for name, x in few.items()}
    addresses = {
        name: torch.arange(blocks, device=device) * (x[0].numel() * x.element_size()) + x.data_ptr()
        for name, x in segment.items()
    }
    return PackedBlocks(format, parameters, (segment,), BLOCK, addresses)


def _parameters(format: Any) -> Tensors:
    """Stand in for the codebooks that calibration would fit."""
    if not format.statistics:
        return {}
    count = HEAD_DIM // format.subvector
    codebook = torch.randn(KV_HEADS, 2**format.bits, count, format.subvector).half()
    return {"codebook": codebook, "root": torch.ones(KV_HEADS, count, format.subvector)}


def _copies(size: int) -> int:
    """Caches to rotate so that none survives in the GPU's cache until it is read again."""
    return max(2, -(-ROTATED_BYTES // size))


def _median_us(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Time the calls as one graph, and return the median of a replay over their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times[3:])


def _row(
    batch: int, length: int, name: str, size: int, median_us: float, baseline: bool
) -> dict[str, Any]:
    return {
        "op": OP,
        "shape": f"{batch} x {length}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}",
        "implementation": name,
        "median_us": round(median_us, 2),
        "gbytes_per_s": round(size / median_us / 1000, 1),
        "baseline": baseline,
    }


def compare_settings(device: str | torch.device = "cuda") -> None:
    """Print the time of every launch setting of the streaming kernel."""
    from squeeze.kernels.decode_attention import streamed, tuning

    for name, (batch, length) in itertools.product(FORMATS, SHAPES):
        for setting in streamed.SETTINGS:
            tuning.choose = lambda *_, setting=setting: setting
            row = _packed(batch, length, name, torch.device(device), 5)
            print(*setting, row["shape"], row["implementation"], row["median_us"], flush=True)


if __name__ == "__main__":
    compare_settings()
