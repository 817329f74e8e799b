"""Measure what every head reads, and loses, at each budget of a prefill policy's ladder."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from squeeze import registry
from squeeze.allocate_prefill import allocate_prefill
from squeeze.attention import dense_attention
from squeeze.calibrate import Stats
from squeeze.errors import CheckpointError, RecipeError
from squeeze.evaluation.scoring import (
    Progress,
    encode,
    forward,
    max_positions,
    scoring,
    start_tokens,
)
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.plan import Plan
from squeeze.plan_prefill import PREFILL_CURVES
from squeeze.sparsify.index import density
from squeeze.types import BlockIndex, Implementation

SAMPLES = 2
# Of each sample, whose queries are compared; every second of these tokens is quoted.
COMPARED = 4
QUOTED_TOKENS = (24, 96)
FILE = "prefill_curves.safetensors"
PREFIX = "squeeze_budgets_"  # of our attention function's name, before the model's own


def choose_budgets(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    texts: Sequence[str],
    mean_density: float,
    length: int,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Measure the heads' curves on calibration text and spread the density over them.

    Args:
        model: Dense; unchanged on return.
        tokenizer: Its tokenizer.
        plan: With a prefill policy that has a ladder.
        texts: Of calibration.
        mean_density: Bound on the mean over heads and layers.
        length: Tokens of a sample; what the model's positions hold, if they hold less.
        seed: Draws places in the text.
        folder: The finished curves are saved here and found again by a resumed run.
        progress: Called as ``progress("budgets", samples done, samples)``.

    Raises:
        RecipeError: there is not enough text.
    """

    def measure() -> Stats:
        tokens = min(length, max_positions(model) or length)
        rows = quoting_samples(tokenizer, texts, tokens, SAMPLES, seed)
        return measure_curves(model, plan, rows, progress=progress)

    path = folder / FILE if folder else None
    return settle(path, measure, lambda stats: allocate_prefill(plan, stats, mean_density))


def settle(
    path: Path | None, measure: Callable[[], Stats], decide: Callable[[Stats], Plan]
) -> Plan:
    """Decide by what is measured, or by what an earlier run measured and saved at ``path``."""
    if path is not None and path.is_file():
        try:
            return decide(Stats.load(path))
        except CheckpointError:
            path.unlink()  # written by a run that was killed before the rename was durable
    stats = measure()
    if path is not None:
        stats.save(path)
    return decide(stats)


def quoting_samples(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int
) -> list[list[int]]:
    """Cut samples whose last eighth quotes passages from anywhere before the last quarter.

    Retrieval from far back is what estimates miss, and plain text hardly asks for it.

    Raises:
        RecipeError: there is not enough text.
    """
    generator, head, joined = random.Random(seed), start_tokens(tokenizer), "\n".join(texts)
    pause, rows = encode(tokenizer, "\n")[-1:], []
    for _ in range(count):
        first = generator.randrange(max(1, len(joined) - 8 * length))
        ids = encode(tokenizer, joined[first : first + 8 * length])
        early, natural = length - length // COMPARED, length - length // (2 * COMPARED)
        if len(ids) < natural:
            raise RecipeError(
                "calibration.data",
                f"a sample has {len(ids)} tokens",
                f"at least {natural}, as attention.length asks",
                "Give more text, or lower attention.length",
            )
        row = [*head, *ids][:natural]
        while len(row) < length:
            size = min(generator.randrange(*QUOTED_TOKENS), early // 2)
            place = generator.randrange(early - size)
            row += pause + ids[place : place + size]
        rows.append(row[:length])
    return rows


def measure_curves(
    model: Any, plan: Plan, rows: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> Stats:
    """Run samples densely and apply every budget of the policy's ladder beside it.

    The loss of a head is the mean over the compared queries of the squared error that the budget
    makes of what the head adds to the residual stream, over the square of that stream.

    Returns:
        ``prefill_curves``: of each module with a policy float32 ``[H, C, 2]``, density and loss.
    Cost: per layer and sample one dense attention and one sparse attention and index per budget, on
        a quarter of the queries.
    """
    watched = {
        row.module: Watcher(model, row.module, row.policy, row.implementation)
        for row in plan.prefill
        if row.policy is not None
    }
    with scoring(model), watching(model, watched), torch.no_grad():
        for done, row in enumerate(rows, 1):
            forward(model, torch.tensor([row], device=model.device), keep=1, use_cache=False)
            if progress is not None:
                progress("budgets", done, len(rows))
    curves = {name: watcher.total / len(rows) for name, watcher in watched.items()}
    return Stats({PREFILL_CURVES: curves}, len(rows), sum(map(len, rows)))


class Watcher:
    """One attention layer: its policy, if any, at every budget, and the sums of what they did."""

    def __init__(
        self, model: Any, name: str, policy: dict[str, Any] | None, implementation: str
    ) -> None:
        self.policy: Any = None
        if policy is not None:
            parameters = {key: value for key, value in policy.items() if key != "method"}
            self.policy = registry.get("prefill", policy["method"])(**parameters)
        self.implementation = Implementation(implementation)
        self.module: nn.Module = model.get_submodule(name)
        self.layer: nn.Module = model.get_submodule(name.rpartition(".")[0])
        self.stream = torch.empty(0)  # squares of the residual stream, [T]
        self.total = torch.zeros(())

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder layer: note how large its input is."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.stream = hidden[0].float().square().sum(-1)

    def index(
        self, query: Tensor, keys: Tensor, scaling: float, softcap: float | None
    ) -> BlockIndex:
        """Return what the policy lists for one text."""
        asks = getattr(self.policy, "asks_implementation", False)
        extra = {"implementation": self.implementation} if asks else {}
        return self.policy.index(query, keys, None, scaling, softcap, **extra)  # type: ignore[no-any-return]

    def measure(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Add one sample's densities and losses at every budget, ``[H, C, 2]``."""
        T, H = query.shape[2], query.shape[1]
        last = query[:, :, T - T // COMPARED :]
        call: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        call["implementation"] = self.implementation
        dense, _ = block_sparse_attention(last, keys, values, None, **call)
        gram = output_gram(self.module, H, query.shape[3]).to(query.device)
        weight = 1 / self.stream[T - T // COMPARED :].clamp(min=torch.finfo(torch.float32).tiny)
        lengths, points = torch.tensor([T], device=query.device), []
        for budget in self.policy.ladder:
            policy = replace(self.policy, heads=(budget,) * H)
            index = policy.index(query, keys, None, scaling, softcap)
            output, _ = block_sparse_attention(last, keys, values, index, **call)
            error = (output.float() - dense.float())[0]  # [H, rows, D]
            loss = ((error @ gram) * error).sum(-1).clamp(min=0) @ weight / len(weight)
            points.append(torch.stack((density(index, lengths)[0].float(), loss), -1))
        self.total = self.total + torch.stack(points, 1).cpu()


def output_gram(module: nn.Module, heads: int, head_dim: int) -> Tensor:
    """Return W_h^T W_h of each head's part of the output projection, float32 ``[H, D, D]``.

    The projection is the last linear child that takes all heads; where there is none, heads count
    as they are.
    """
    size, found = heads * head_dim, None
    for child in module.children():
        if isinstance(child, nn.Linear) and child.in_features == size:
            found = child.weight.T
        if isinstance(child, Conv1D) and child.weight.shape[0] == size:
            found = child.weight
    if found is None:
        return torch.eye(head_dim).expand(heads, -1, -1)
    parts = found.float().unflatten(0, (heads, head_dim))  # [H, D, hidden]
    return parts @ parts.mT


@contextmanager
def watching(model: Any, watched: dict[str, Watcher]) -> Iterator[None]:
    """Let the watchers see every attention call; the model computes as before."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    name = PREFIX + before
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    with ExitStack() as stack:
        for watcher in watched.values():
            hook = watcher.layer.register_forward_pre_hook(watcher.hear, with_kwargs=True)
            stack.callback(hook.remove)
            watcher.module.__dict__["squeeze_watcher"] = watcher
            stack.callback(watcher.module.__dict__.pop, "squeeze_watcher")
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(name)
        yield


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend as the model itself would, beside what the layer's watcher measures."""
    watcher = module.__dict__.get("squeeze_watcher")
    if watcher is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        watcher.measure(query, key, value, scale, softcap)
    extra = {} if softcap is None else {"softcap": softcap}
    function = dense_attention(module, module.config._attn_implementation.removeprefix(PREFIX))
    return function(module, query, key, value, mask, scaling=scaling, **extra, **kwargs)
