"""Estimating, selecting and listing what a sparse prefill reads, on one GPU, against dense cuDNN.

32 query heads and 8 key/value heads of 128, bfloat16, causal, one row of random queries and keys.
``index_us`` is the policy's own index, all of it; ``kernel_us`` the attention over it (of
``vertical_slash``, whose budgets do not depend on the data; what the others list of noise says
nothing); ``of_dense`` the index's share of cuDNN's time, ``speedup`` cuDNN's time by both.
``reference`` rows are the same policy's index in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.block_sparse_attention import median_us
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.registry import get
from squeeze.sparsify.index import density
from squeeze.types import Implementation

OP = "prefill_index"
TESTS = ("tests/kernels/test_prefill_index.py", "tests/kernels/test_prefill_elements.py")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LENGTHS = (8192, 16384, 32768, 65536, 131072)
POLICIES: dict[str, dict[str, Any]] = {
    "vertical_slash": {},
    "antidiagonal": {},
    "antidiagonal stride 16": {"stride": 16},
    "block_topk": {},
    "sparge": {},
    "flexprefill": {},
    "pyramid": {},
    "permuted": {},
    "moba": {},
    "retrieval_heads": {},
    "sale": {},
}
REFERENCE = ("vertical_slash", "antidiagonal")
REFERENCE_LENGTH = 32768
REPEATS = 5
SCALING = HEAD_DIM**-0.5
# Length, figure of vertical_slash, what it must reach.
SPEEDUPS = ((16384, 1.0), (32768, 1.3), (131072, 3.0))
SHARE, FROM = 0.1, 65536


def run(
    device: str | torch.device, repeats: int = REPEATS, done: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Time every policy at every length on a CUDA device.

    Yields:
        One dictionary per measurement; times in microseconds, scratch memory in MiB.
    """
    known = {(row["implementation"], row["length"]) for row in done}
    for length in LENGTHS:
        yield from _length(length, torch.device(device), repeats, known)


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how far the rows at hand meet the bars."""
    found = {(row["implementation"], row["length"]): row for row in rows}
    result = []
    for length, wanted in SPEEDUPS:
        row = found.get(("vertical_slash", length))
        if row is not None:
            bar = {"bar": f"vertical_slash {length} against cuDNN", "wanted": wanted}
            result.append({**bar, "ratio": row["speedup"], "met": row["speedup"] >= wanted})
    for (name, length), row in found.items():
        if length >= FROM and "of_dense" in row and "reference" not in name:
            bar = {"bar": f"index of {name} {length} by cuDNN's time", "wanted": SHARE}
            result.append({**bar, "ratio": row["of_dense"], "met": row["of_dense"] <= SHARE})
    return result


def _length(
    length: int, device: torch.device, repeats: int, known: set[tuple[str, int]]
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(length)
    query, keys, values = (
        torch.randn(
            1, heads, length, HEAD_DIM, dtype=torch.bfloat16, device=device, generator=generator
        )
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=True
            )

    shape = {"op": OP, "length": length, "shape": f"1x{HEADS}/{KV_HEADS}x{length}x{HEAD_DIM}"}
    library = median_us(dense, min(repeats, 3))
    yield {
        **shape,
        "implementation": "sdpa cudnn",
        "kernel_us": round(library, 1),
        "baseline": True,
    }
    for name, policy, implementation in _policies(length):
        if (name, length) in known:
            continue

        def make(policy: Any = policy, chosen: Implementation = implementation) -> Any:
            asked = (chosen,) if getattr(policy, "asks_implementation", False) else ()
            return policy.index(query, keys, None, SCALING, None, *asked)

        index, scratch = _peak(make, device)
        time = median_us(make, repeats, warm_up=1)
        row = {
            **shape,
            "implementation": name,
            "index_us": round(time, 1),
            "of_dense": round(time / library, 4),
            "scratch_mib": scratch,
            "baseline": False,
        }
        if name == "vertical_slash":

            def attend(index: Any = index) -> Any:
                return block_sparse_attention(
                    query,
                    keys,
                    values,
                    index,
                    scaling=SCALING,
                    implementation=Implementation.TRITON,
                )

            row["density"] = round(density(index, torch.tensor([length])).mean().item(), 4)
            row["kernel_us"] = round(median_us(attend, repeats, warm_up=1), 1)
            whole = median_us(lambda: attend(make()), repeats, warm_up=1)
            row |= {"whole_us": round(whole, 1), "speedup": round(library / whole, 3)}
        del index
        yield row


def _policies(length: int) -> Iterator[tuple[str, Any, Implementation]]:
    """Name the policies to time at one length."""
    for name, settings in POLICIES.items():
        policy = get("prefill", name.split()[0])(**settings)
        yield name, policy, Implementation.TRITON
        if name in REFERENCE and length == REFERENCE_LENGTH:
            yield f"{name} reference", policy, Implementation.REFERENCE


def _peak(make: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Make an index; return it and the memory that making it takes, itself included, in MiB."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    index = make()
    return index, round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
