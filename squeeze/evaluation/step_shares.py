"""What the time of a decode step is spent on: weights, attention, and launching.

Each part runs alone, over the same cache, recorded where the device can replay it, so that neither
waiting for the host nor the other parts are in its time.
"""

from __future__ import annotations

import copy
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from squeeze.cache import PackedLayer, StaticPackedCache
from squeeze.evaluation.scoring import forward
from squeeze.fused import Experts, projections
from squeeze.linear import PackedLinear
from squeeze.recorder import CudaGraphs

PARTS = ("weights", "attention", "other", "launch")
SAMPLES = 5
REPLAYS = 10


@torch.no_grad()
def step_shares(model: Any, cache: Any, token: Tensor) -> dict[str, float | None]:
    """Time the parts of a step over a filled cache, which stays as it is.

    Args:
        model: Any Hugging Face causal language model, dense or squeezed.
        cache: What its calls returned; full-attention layers alone count as attention.
        token: int64 ``[B, 1]``.

    Returns:
        Milliseconds: ``weights_ms`` of all linear layers and experts, ``attention_ms`` of all
        queries over what is stored, ``kernels_ms`` of the whole step once nothing is launched one
        by one. The last is ``None`` where a step cannot be recorded, as on a CPU.
    """
    device = token.device
    rows = len(token)
    products = _products(model, rows, device)
    reads = _reads(model, cache, rows)
    return {
        "weights_ms": _time(lambda: [product() for product in products], device),
        "attention_ms": _time(lambda: [read() for read in reads], device),
        "kernels_ms": _kernels(model, cache, token),
    }


def _products(model: Any, rows: int, device: torch.device) -> list[Callable[[], Any]]:
    """List calls of every linear layer and mixture of experts with one token per row."""
    text = model.config.get_text_config(decoder=True)
    chosen = getattr(text, "num_experts_per_tok", 1)
    products: list[Callable[[], Any]] = []
    for module in model.modules():
        if isinstance(module, Experts) or projections(module):
            x = torch.randn(rows, text.hidden_size, dtype=model.dtype, device=device)
            index = torch.arange(rows * chosen, device=device).view(rows, -1) % module.num_experts
            weights = torch.full_like(index, 1 / chosen, dtype=model.dtype)
            products.append(functools.partial(module, x, index, weights))
        elif isinstance(module, nn.Linear | PackedLinear):
            x = torch.randn(rows, 1, module.in_features, dtype=model.dtype, device=device)
            products.append(functools.partial(module, x))
    return products


def _reads(model: Any, cache: Any, rows: int) -> list[Callable[[], Any]]:
    """List, for every layer that stores keys, attention of one query per row over them."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)  # none in state-space models
    reads: list[Callable[[], Any]] = []
    for layer in cache.layers:
        packed = isinstance(layer, PackedLayer)
        keys = layer.exact.keys if packed else getattr(layer, "keys", None)
        if keys is None:
            continue
        query = keys.new_empty(rows, heads, 1, keys.shape[-1]).normal_()
        reads.append(_packed_read(layer, query) if packed else _dense_read(layer, query))
    return reads


def _packed_read(layer: PackedLayer, query: Tensor) -> Callable[[], Any]:
    exact, scaling = layer.exact, query.shape[-1] ** -0.5
    return lambda: layer.read(query, exact.keys, exact.values, scaling, None)


def _dense_read(layer: Any, query: Tensor) -> Callable[[], Any]:
    grouped = query.shape[1] != layer.keys.shape[1]
    return lambda: scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=grouped)


def _kernels(model: Any, cache: Any, token: Tensor) -> float | None:
    """Milliseconds of a step's kernels, replayed without the host; ``None`` if that cannot be."""
    if token.device.type != "cuda":
        return None
    twin = copy.deepcopy(cache)
    names = inspect.signature(model.forward).parameters
    argument = "cache_params" if "cache_params" in names else "past_key_values"

    def step() -> Any:
        context = twin.on_device() if isinstance(twin, StaticPackedCache) else nullcontext()
        with context:
            return forward(model, token, keep=1, use_cache=True, **{argument: twin})

    def restart() -> None:
        # A recorded step goes on counting, which only so many slots can take.
        if isinstance(twin, StaticPackedCache):
            twin.rewind()

    recorder = CudaGraphs()
    try:
        step()
        with recorder.watch():
            step()
        # The recorded step reads these, and a cache that grows lets them go.
        read = [vars(layer).copy() for layer in twin.layers]
        replay, _ = recorder.record(step)
        found = _milliseconds(replay, token.device, REPLAYS, restart)
    except RuntimeError:  # what torch raises where the step waits for the device
        return None
    del read
    return found


def _time(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of some work, replayed where it can be recorded."""
    work()
    if device.type != "cuda":
        return _milliseconds(work, device, 1)
    recorder = CudaGraphs()
    with recorder.watch():
        work()
    replay, _ = recorder.record(work)
    return _milliseconds(replay, device, REPLAYS)


def _milliseconds(
    work: Callable[[], Any],
    device: torch.device,
    repeats: int,
    restart: Callable[[], None] = lambda: None,
) -> float:
    """Median milliseconds of one run of ``work`` among samples of ``repeats`` runs."""
    times: list[float] = []
    for _ in range(SAMPLES):
        restart()
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        times.append(1000 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(step_ms: float, parts: dict[str, float | None]) -> dict[str, float]:
    """Turn the parts of a step of ``step_ms`` into shares of it that add up to one.

    Where the kernels' time is known, ``launch`` is the rest of the step; elsewhere it cannot be
    told from ``other``.
    """
    weights, attention = parts["weights_ms"] or 0.0, parts["attention_ms"] or 0.0
    kernels = parts["kernels_ms"]
    known = weights + attention
    busy = step_ms if kernels is None else min(step_ms, max(kernels, known))
    scale = min(1.0, busy / known) if known else 1.0
    times: Sequence[tuple[str, float]] = (
        ("weights", weights * scale),
        ("attention", attention * scale),
        ("other", busy - known * scale),
        ("launch", step_ms - busy),
    )
    return {name: value / step_ms for name, value in times if name != "launch" or kernels}
