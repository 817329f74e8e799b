"""Recorded and fused decode steps against the reference implementation, token by token.

The embedded model with 4-bit weights and the cache of recipe ``kv4`` reads a prompt, then ``STEPS``
tokens of a book that none of it was trained on, one a step, whatever it would have said itself. The
oracle has the same packed weights and cache, computes in float32 by the reference implementations
and launches everything.

A step may be as wrong as twice the worst step of the reference implementation in the dtype of the
model, plus one rounding of the largest logit: ``tolerance``. Where the oracle's two best tokens are
further apart than twice that, both must agree on the best one; of all steps 99% must. How often the
reference in the model's dtype agrees with the oracle stands beside it (``reference_equal``): where
that is less, bfloat16 itself decides steps, and the row in float16 tells what the kernels do.

Run from the repository root: ``python -m benchmarks.run step_agreement``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import squeeze
from squeeze import reference
from squeeze.attention import LayerState
from squeeze.evaluation.scoring import excerpts, start_tokens
from squeeze.linear import PackedLinear
from squeeze.loading import load_model, load_tokenizer
from squeeze.recipe import load
from squeeze.step_encode import KEY
from squeeze.types import Implementation, resolve_dtype

OP = "step_agreement"
TESTS = ("tests/test_fused_layer_gpu.py",)
KERNELS = ("block_store", "decode_attention", "kv_encode", "lut_linear", "step_glue")
PROMPT, STEPS = 1024, 512
DTYPES = ("float16", "bfloat16")
WEIGHTS = [{"method": "kmeans", "bits": 4, "importance": "none"}]
LEAST_EQUAL = 0.99


def run(device: str | torch.device, repeats: int = STEPS) -> Iterator[dict[str, Any]]:
    """Compare ``repeats`` steps in every dtype.

    Yields:
        One dictionary per dtype: op, shape, implementation, what ``judged`` finds, and how many
        steps were replayed.
    """
    place, steps = str(device), max(8, repeats)
    ids = tokens(PROMPT + steps).to(place)
    recipe = {"weights": WEIGHTS, "kv_cache": load("kv4").to_dict()["kv_cache"]}
    exact = load_model("reference", device=place, dtype=torch.float32)
    result = squeeze.run(recipe, exact, evaluate=False)
    oracle = forced(as_reference(exact), ids, PROMPT)
    for name in DTYPES:
        dtype = resolve_dtype(name)
        ours, same = (load_model("reference", device=place, dtype=dtype) for _ in range(2))
        for model in (ours, same):
            squeeze.swap(model, result.artifacts, keep_dense=False)
        found = forced(ours, ids, PROMPT)
        yield {
            "op": OP,
            "shape": f"{len(ids)}x{PROMPT}+{steps}",
            "implementation": "recorded, fused" if ours.squeeze_step.compared else "launched",
            "dtype": name,
            **judged(found, forced(as_reference(same), ids, PROMPT), oracle, dtype),
        }


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of every dtype whether steps agree as they must."""
    wanted = f"equal where decided, and at least {LEAST_EQUAL:.0%} of all steps"
    return [{"bar": row["dtype"], "wanted": wanted, "met": row["passed"]} for row in rows]


def tokens(length: int) -> Tensor:
    """Take so many tokens of the validation books, int64 ``[1, length]``."""
    tokenizer = load_tokenizer("reference")
    start = start_tokens(tokenizer)
    texts = [book["text"] for book in reference.validation_books()]
    (excerpt,) = excerpts(tokenizer, texts, length - len(start), 1)
    return torch.tensor([start + excerpt])


def as_reference(model: Any) -> Any:
    """Let the reference implementations compute, launched."""
    for module in model.modules():
        if isinstance(module, PackedLinear | LayerState):
            module.implementation = Implementation.REFERENCE
    model.squeeze_step.enabled = False
    return model


@torch.no_grad()
def forced(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits of every step after the prompt, the tokens given: float32 ``[B, steps, V]``."""
    cache = model(ids[:, :prompt], logits_to_keep=1).past_key_values
    found = [
        model(ids[:, t : t + 1], past_key_values=cache).logits.float()
        for t in range(prompt, ids.shape[1])
    ]
    if model.squeeze_step.enabled and model.squeeze_step.recorder is not None:
        recordings = cache.recordings.items()
        assert any(step.replay is not None for key, step in recordings if key != KEY)
    return torch.cat(found, 1)


def judged(found: Tensor, same: Tensor, oracle: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Judge logits ``[B, steps, V]`` by the oracle's and by the reference's of equal precision.

    Returns:
        ``steps``; ``argmax_equal``, the share of them; ``tolerance`` and ``error``, of a logit;
        ``decided``, the steps where the oracle's margin exceeds twice the tolerance, and
        ``decided_equal``, the share of these; ``reference_equal`` and ``reference_error``, of the
        reference in this dtype; ``passed``.
    """
    errors = [(x - oracle).abs().amax(-1) for x in (found, same)]
    band = torch.finfo(dtype).eps * float(oracle.abs().max())
    tolerance = 2 * float(errors[1].max()) + band
    best = oracle.topk(2, -1)
    decided = best.values[..., 0] - best.values[..., 1] > 2 * tolerance
    equal, reference_equal = (x.argmax(-1) == best.indices[..., 0] for x in (found, same))
    share = float(equal.float().mean())
    sure = float(equal[decided].float().mean()) if decided.any() else 1.0
    return {
        "steps": equal.numel(),
        "argmax_equal": share,
        "tolerance": tolerance,
        "error": float(errors[0].max()),
        "decided": int(decided.sum()),
        "decided_equal": sure,
        "reference_equal": float(reference_equal.float().mean()),
        "reference_error": float(errors[1].max()),
        "passed": share >= LEAST_EQUAL and sure == 1.0,
    }
