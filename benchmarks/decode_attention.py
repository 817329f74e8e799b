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
from squeeze.types import Implementation, PackedBlocks, Tensors, bytes_of

OP = "decode_attention"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = ((1, 4096), (1, 32768), (1, 131072), (8, 32768))
FORMATS = (
    (Affine(4, "channel", 128), Affine(4, "token", 128)),
    (Affine(4, "channel", 64), Affine(4, "token", 64)),
    (Affine(2, "channel", 64), Affine(2, "token", 64)),
    (Affine(8, "channel", 64), Affine(8, "token", 64)),
)
BLOCK, EXACT = 128, 128
SCALING = HEAD_DIM**-0.5
ROTATED_BYTES, REPLAYS = 256 * 2**20, 20


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
    for formats in FORMATS:
        yield _packed(batch, length, *formats, device, repeats)


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
    batch: int, length: int, keys: Affine, values: Affine, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Measure ours: all but the last 128 tokens packed."""
    blocks = (length - EXACT) // BLOCK
    first = [_random_blocks(format, blocks, batch, device) for format in (keys, values)]
    size = sum(bytes_of(side.segments[0]) for side in first)
    size += 4 * batch * KV_HEADS * EXACT * HEAD_DIM
    copies = [first]
    for _ in range(_copies(size) - 1):
        copies.append([_random_blocks(format, blocks, batch, device) for format in (keys, values)])
    calls = [_call(*pair, blocks, batch, device) for pair in copies]
    name = f"squeeze k{keys.bits} g{keys.group_size} v{values.bits} g{values.group_size}"
    return _row(batch, length, name, size, _median_us(calls, repeats), baseline=False)


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


def _random_blocks(format: Affine, blocks: int, batch: int, device: torch.device) -> PackedBlocks:
    """Fill blocks with random codes, every pattern of which is valid, and small constants."""
    shapes = format.encode(torch.zeros(1, BLOCK, HEAD_DIM), {})
    segment: Tensors = {}
    for name, like in shapes.items():
        shape = (blocks, batch, KV_HEADS, *like.shape[1:])
        if name == "codes":
            full = torch.iinfo(torch.int32)
            segment[name] = torch.randint(
                full.min, full.max, shape, dtype=torch.int32, device=device
            )
        else:
            segment[name] = (torch.rand(shape, device=device) / 2**format.bits).half()
    addresses = {
        name: torch.arange(blocks, device=device) * (x[0].numel() * x.element_size()) + x.data_ptr()
        for name, x in segment.items()
    }
    return PackedBlocks(format, {}, (segment,), BLOCK, addresses)


def _copies(size: int) -> int:
    """Caches to rotate so that none survives in the GPU's cache until it is read again."""
    return max(2, -(-ROTATED_BYTES // size))


def _median_us(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Time the calls as one graph, and return the median of a replay over their number."""
    stream = torch.cuda.Stream()
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
    """Print the time of every launch setting."""
    from squeeze.kernels.decode_attention import tuning

    for formats, (batch, length) in itertools.product(FORMATS, SHAPES[::2]):
        for setting in tuning.CANDIDATES:
            tuning.default = lambda warps, tile, setting=setting: setting
            tuning.WORTH_TUNING = 2**62
            row = _packed(batch, length, *formats, torch.device(device), 5)
            print(*setting, row["shape"], row["implementation"], row["median_us"], flush=True)


if __name__ == "__main__":
    compare_settings()
