"""Prefill attention on one GPU: dense baselines, ours dense, random lists, `vertical_slash`.

32 query heads and 8 key/value heads of 128, bfloat16, causal, one row. ``tflops`` counts only the
pairs computed (density times the causal half, two products of 2 * D each); the time of
`vertical_slash` includes estimating and building its index, that of eight bits rounding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.kernels.block_sparse_attention.sage import Quantize
from squeeze.sparsify.index import compact, density
from squeeze.sparsify.prefill.vertical_slash import VerticalSlash
from squeeze.types import BlockIndex, Implementation

OP = "block_sparse_attention"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DENSE, SPARSE = (8192, 32768, 131072), (16384, 32768, 131072)
REPEATS = 9
SCALING = HEAD_DIM**-0.5
KEPT = 0.1


def run(device: str | torch.device, repeats: int = REPEATS) -> Iterator[dict[str, Any]]:
    """Time every implementation at every length on a CUDA device.

    Yields:
        One dictionary per measurement: op, shape, implementation, median_us, tflops, density,
        baseline (whether it is someone else's dense attention), and speedup over cuDNN.
    """
    for length in sorted({*DENSE, *SPARSE}):
        library = None
        for name, call, share, baseline in _cases(length, torch.device(device)):
            row = _row(length, name, call, share, baseline, repeats)
            library = library or row["median_us"]
            yield row | {"speedup": round(library / row["median_us"], 3)}


def _cases(
    length: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Any], float, bool]]:
    """Name the implementations to time at one length, cuDNN first."""
    generator = torch.Generator(device).manual_seed(length)
    query, keys, values = (
        torch.randn(
            1, heads, length, HEAD_DIM, dtype=torch.bfloat16, device=device, generator=generator
        )
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query, keys, values, is_causal=True, enable_gqa=True
                )

        return call

    def ours(index: BlockIndex | None, to: Quantize | None = None) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            query, keys, values, index, scaling=SCALING, quantize=to,
            implementation=Implementation.TRITON,
        )  # fmt: skip

    def whole(make: Callable[[], BlockIndex]) -> tuple[Tensor, Tensor]:
        return ours(make())

    yield "sdpa cudnn", sdpa(SDPBackend.CUDNN_ATTENTION), 1.0, True
    if length in DENSE:
        yield "sdpa flash", sdpa(SDPBackend.FLASH_ATTENTION), 1.0, True
        yield "triton dense", lambda: ours(None), 1.0, False
        yield "triton dense int8", lambda: ours(None, "int8"), 1.0, False
        yield "triton dense float8", lambda: ours(None, "float8"), 1.0, False
    if length in SPARSE:
        tokens = torch.tensor([length])
        for size in (64, 128):
            policy = VerticalSlash(block_size=size)
            make = partial(policy.index, query, keys, None, SCALING, None, Implementation.TRITON)
            listed = make()
            share = density(listed, tokens).mean().item()
            name = f"vertical_slash {size}"
            yield f"{name} index", make, 0.0, False
            yield f"triton {name}", partial(ours, listed), share, False
            yield f"{name} index + triton", partial(whole, make), share, False
        blocks = random_blocks(length, 128, device, generator)
        kept = density(blocks, tokens).mean().item()
        yield "triton random 128-blocks", lambda: ours(blocks), kept, False
        yield "triton random 128-blocks int8", lambda: ours(blocks, "int8"), kept, False
        for size in (64, 128):
            both = with_columns(length, size, device, generator)
            read = density(both, tokens).mean().item()
            name = f"triton random {size}-blocks, columns"
            yield name, partial(ours, both), read, False
            yield f"{name} int8", partial(ours, both, "int8"), read, False


def random_blocks(
    length: int, size: int, device: torch.device, generator: torch.Generator
) -> BlockIndex:
    """Keep each causal block with probability ``KEPT``, block 0 and the diagonal always."""
    N = length // size
    ids = torch.arange(N, device=device)
    keep = torch.rand(1, HEADS, N, N, device=device, generator=generator) < KEPT
    keep = (keep & (ids <= ids[:, None])) | (ids == ids[:, None]) | (ids == 0)
    most = int(keep.flatten(-2).sum(-1).max())
    return BlockIndex(size, *compact(ids, keep, most))


def with_columns(
    length: int, size: int, device: torch.device, generator: torch.Generator
) -> BlockIndex:
    """List blocks as ``random_blocks`` does and, outside them, about 1 column in 80."""
    index = random_blocks(length, size, device, generator)
    N = length // size
    blocks = torch.arange(N, device=device)
    counts, ids = [], []
    for h in range(HEADS):
        listed = torch.zeros(N, N, dtype=torch.bool, device=device)
        begins, kept = index.block_offsets[0, h].long(), index.block_ids[0, h].long()
        rows = blocks.repeat_interleave(begins.diff())
        listed[rows, kept[: len(rows)]] = True
        free = (~listed & (blocks < blocks[:, None])).repeat_interleave(size, 1)  # [N, T]
        free &= torch.rand(free.shape, device=device, generator=generator) < KEPT / 8
        counts.append(free.sum(-1))
        ids.append(free.nonzero()[:, 1].int())
    offsets = torch.stack(counts).cumsum(-1)
    offsets = torch.cat((torch.zeros_like(offsets[:, :1]), offsets), -1).int()
    columns = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return replace(index, column_offsets=offsets[None], column_ids=columns[None])


def _row(
    length: int, name: str, call: Callable[[], Any], share: float, baseline: bool, repeats: int
) -> dict[str, Any]:
    microseconds = median_us(call, repeats)
    pairs = share * length * (length + 1) / 2
    return {
        "op": OP,
        "shape": f"1x{HEADS}/{KV_HEADS}x{length}x{HEAD_DIM} bfloat16 causal",
        "implementation": name,
        "median_us": round(microseconds, 1),
        "tflops": round(4 * HEADS * HEAD_DIM * pairs / microseconds / 1e6, 1),
        "density": round(share, 4),
        "baseline": baseline,
    }


def median_us(call: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
    """Return the median time of a call in microseconds, by CUDA events."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)
