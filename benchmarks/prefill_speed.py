"""Prefill of a whole 8B-shaped Llama on one GPU: transformers' own attention, and squeezed.

32 layers, 32 query and 8 key/value heads of 128, bfloat16, random weights, one prompt of random
tokens over an empty DynamicCache, logits of the last token. The squeezed rows swap one prefill
policy in with its default settings; the weights and the cache stay. ``seconds`` is the median of
whole calls, the device awaited; ``ratio`` its share of the baseline's at that length.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from squeeze import api
from squeeze.compress import compress
from squeeze.swapping import swap

OP = "prefill_speed"
TESTS = (
    "tests/kernels/test_prefill_index.py",
    "tests/kernels/test_prefill_elements.py",
    "tests/kernels/test_block_sparse_attention.py",
)
KERNELS = ("prefill_index", "block_sparse_attention")
LENGTHS = (32768, 131072)
POLICIES = ("vertical_slash", "block_topk")  # their budgets do not depend on what is attended to
REPEATS = 3
BARS = ((32768, 0.8), (131072, 0.5))


def run(
    device: str | torch.device, repeats: int = REPEATS, done: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Time the model at every length, dense first.

    Yields:
        One dictionary per implementation and length.
    """
    model = dense_model(torch.device(device))
    known = {(row["implementation"], row["length"]): row for row in done}
    for length in LENGTHS:
        dense = known.get(("sdpa", length)) or _row(model, None, length, repeats)
        if ("sdpa", length) not in known:
            yield dense
        for policy in POLICIES:
            if (policy, length) not in known:
                row = _row(model, policy, length, repeats)
                yield row | {"ratio": round(row["seconds"] / dense["seconds"], 4)}


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how far the rows at hand meet the bars: the best policy's share of dense."""
    result = []
    for length, wanted in BARS:
        ratios = [row["ratio"] for row in rows if row["length"] == length and "ratio" in row]
        if ratios:
            bar = {"bar": f"prefill of {length} by sdpa's time", "wanted": wanted}
            result.append({**bar, "ratio": min(ratios), "met": min(ratios) <= wanted})
    return result


def dense_model(device: torch.device, layers: int = 32) -> LlamaForCausalLM:
    """Build the dense model with random weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=max(LENGTHS),
        rope_theta=500000.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def _row(model: Any, policy: str | None, length: int, repeats: int) -> dict[str, Any]:
    """Time one implementation at one length; the first call, which compiles, is reported apart."""
    device = model.device
    generator = torch.Generator(device).manual_seed(length)
    tokens = torch.randint(0, 128256, (1, length), device=device, generator=generator)

    def call() -> None:
        with torch.inference_mode():
            model(tokens, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    with _swapped(model, policy, length):
        first, densities = _seconds(call), _densities(model)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        times = [_seconds(call) for _ in range(repeats if length < 65536 else 1)]
    return {
        "op": OP,
        "implementation": policy or "sdpa",
        "length": length,
        "seconds": round(statistics.median(times), 4),
        "first_seconds": round(first, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2),
        "density": densities,
        "baseline": policy is None,
    }


def _swapped(model: Any, policy: str | None, length: int) -> Any:
    """Swap a policy in for a while."""
    if policy is None:
        return nullcontext()
    asked = {"attention": {"prefill": {"method": policy}}}
    plan = api.plan(asked, model, device=str(model.device), context=length)
    return swap(model, compress(model, plan, None))


def _seconds(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _densities(model: Any) -> float | None:
    """Return the mean density over layers and heads of the last call."""
    states = getattr(getattr(model, "squeeze_swap", None), "states", None)
    found = [state.density for state in states.values()] if states else []
    known = [density.mean() for density in found if density is not None]
    return round(torch.stack(known).mean().item(), 4) if known else None
