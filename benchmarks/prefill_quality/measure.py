"""One cell of the table: what a prefill recipe keeps of a model's quality, and what it computes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.kv_cache_quality.measure import KEPT, SEED, Settings
from benchmarks.kv_cache_quality.rows import RECIPE, Row
from squeeze import api, recipe, reference
from squeeze.environment import commit
from squeeze.evaluation import evaluate
from squeeze.evaluation.eight_bits import measure_cosines
from squeeze.evaluation.head_budgets import Watcher, watching
from squeeze.evaluation.scoring import encode, forward, scoring, start_tokens
from squeeze.evaluation.suite import prefill_density
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.loading import load_model, load_tokenizer
from squeeze.plan import resolve_device
from squeeze.plan_prefill import PREFILL_COSINES, PrefillPlan
from squeeze.recipe_values import Attention
from squeeze.sparsify.index import density
from squeeze.types import Implementation

# Shape of the timed calls: query heads, key/value heads, head size; bfloat16.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REPEATS = 3


def measure(row: Row, length: int, settings: Settings, threads: int) -> dict[str, Any]:
    """Measure one row at one length.

    Args:
        row: Dense, or a recipe with a prefill policy or eight bits.
        length: Tokens of a window and of a prompt.
        settings: The model and the counts.
        threads: Of the CPU that this process may use.

    Returns:
        ``books_perplexity`` and ``needle`` in prefill mode and ``needle_decode``, the ``KEPT`` part
        of what ``evaluate`` gives; ``density``, by layer and head, of one window; by a policy
        ``recall`` of the attention of its last quarter, likewise; in eight bits ``cosine`` of the
        outputs there, likewise, layers in the model's own precision left out; ``commit``,
        ``versions`` and ``seconds``.
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    start = time.monotonic()
    cell: dict[str, Any] = {}
    plan: tuple[PrefillPlan, ...] = ()
    if row.kind == RECIPE:
        made = api.run(
            dict(row.settings),
            settings.model,
            evaluate=False,
            device=settings.device,
            dtype=settings.dtype,
        )
        model, tokenizer, plan = made.model, made.tokenizer, made.plan.prefill
    else:
        model, tokenizer = _dense(settings), load_tokenizer(settings.model)
    for name, task, mode, count in (
        ("books_perplexity", "books_perplexity", "prefill", settings.windows),
        ("needle", "needle", "prefill", settings.facts),
        ("needle_decode", "needle", "decode", settings.facts),
    ):
        options: dict[str, Any] = {"mode": mode, "length": length, "limit": count}
        found = evaluate(model, tokenizer, [task], seed=SEED, **options)[task]
        cell[name] = {key: found[key] for key in KEPT if key in found}
    wanted = recipe.load({"evaluate": {"lengths": [length]}})
    cell["density"] = _rounded(prefill_density(model, tokenizer, wanted))
    if any(item.policy is not None for item in plan):
        cell["recall"] = _rounded(_recall(_dense(settings), plan, _window(tokenizer, length)))
    if any(item.quantize is not None for item in plan):
        found = measure_cosines(_dense(settings), plan, [_window(tokenizer, length)])
        cell["cosine"] = [x.tolist() for x in found.tensors[PREFILL_COSINES].values()]
    seconds = round(time.monotonic() - start, 1)
    return cell | {"commit": commit(), "versions": {}, "seconds": seconds}


def speed(row: Row, length: int) -> dict[str, float]:
    """Time a recipe's index and the kernel over it, on random normal queries and keys, on a GPU.

    Returns:
        ``index_ms`` and ``kernel_ms``, medians; ``density`` of that index; ``index_mib``, the most
        memory that building it took.
    """
    generator = torch.Generator("cuda").manual_seed(SEED)
    query, keys, values = (
        torch.randn(
            1, heads, length, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16
        )
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    scaling = HEAD_DIM**-0.5
    index: Any = None
    result: dict[str, float] = {}
    made = recipe.load(dict(row.settings)).attention or Attention()
    if made.prefill is not None:
        policy = made.prefill.build()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        options = planned(policy, Implementation.TRITON)
        index = policy.index(query, keys, None, scaling, **options)
        result["index_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        lengths = torch.tensor([length], device="cuda")
        result["density"] = float(density(index, lengths).mean())
        result["index_ms"] = _median(lambda: policy.index(query, keys, None, scaling, **options))

    def attend() -> Tensor:
        return block_sparse_attention(
            query,
            keys,
            values,
            index,
            scaling=scaling,
            quantize=made.quantize,
            implementation=Implementation.TRITON,
        )[0]

    attend()
    return result | {"kernel_ms": _median(attend)}


def planned(policy: Any, implementation: Any) -> dict[str, Any]:
    """Return what ``policy.index`` takes besides, where it has kernels to choose from."""
    asks = getattr(policy, "asks_implementation", False)
    return {"implementation": implementation} if asks else {}


def _median(call: Any) -> float:
    """Time calls on the GPU, milliseconds."""
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return sorted(times)[len(times) // 2]


def _window(tokenizer: Any, length: int) -> list[int]:
    """Return one text of ``length`` tokens of the validation books."""
    ids = start_tokens(tokenizer)
    for book in reference.validation_books():
        ids += encode(tokenizer, book["text"][: 8 * length])
        if len(ids) >= length:
            break
    return ids[:length]


def _dense(settings: Settings) -> Any:
    device = resolve_device(settings.device)
    return load_model(settings.model, device=device, dtype=settings.dtype)


def _recall(model: Any, plan: tuple[PrefillPlan, ...], ids: list[int]) -> list[list[float]]:
    """Return the share of the dense attention that each head's list holds, mean over queries.

    exp(LSE over the list - LSE over everything), on the dense model's queries and keys.
    """
    watched = {
        row.module: _Recall(model, row.module, row.policy, row.implementation)
        for row in plan
        if row.policy is not None
    }
    with scoring(model), watching(model, watched), torch.no_grad():
        forward(model, torch.tensor([ids], device=model.device), keep=1, use_cache=False)
    return [watcher.found for watcher in watched.values()]


class _Recall(Watcher):
    """Measures the recall of the policy as planned."""

    found: list[float]

    def measure(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Keep one text's recall by head."""
        last = query[:, :, -(query.shape[2] // 4) :]
        call: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        call["implementation"] = self.implementation
        index = self.index(query, keys, scaling, softcap)
        listed, every = (
            block_sparse_attention(last, keys, values, which, **call)[1]
            for which in (replace(index, pooled_offsets=None, pooled_ids=None), None)
        )
        self.found = (listed - every).exp().mean(-1)[0].tolist()


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows]
