"""Perplexity of windows of book text, the second half of each scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from squeeze import reference
from squeeze.evaluation.scoring import (
    Progress,
    check_length,
    check_limit,
    check_mode,
    excerpts,
    negative_log_likelihood,
    scoring,
    start_tokens,
)
from squeeze.evaluation.shares import in_shares

DEFAULT_WINDOWS = 16


def books_perplexity(
    model: Any,
    tokenizer: Any,
    *,
    mode: str = "decode",
    length: int = 2048,
    limit: int | None = None,
    batch_size: int | None = None,
    text: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure exp(mean negative log-likelihood) of the second half of each window.

    Windows are spread evenly over the text and each begins with BOS if the tokenizer has one.
    Every scored token has at least ``length // 2`` tokens before it, so what a method does to far
    tokens is felt by all of them. Perplexities of different tokenizers cannot be compared.

    Args:
        model: Any Hugging Face causal language model, dense or squeezed.
        tokenizer: Its tokenizer.
        mode: ``"decode"`` feeds the second half over the cache in chunks of at most 64 tokens;
            ``"prefill"`` is one forward. The scored tokens are the same.
        length: Tokens of a window, BOS included.
        limit: Number of windows, 16 if not given.
        batch_size: Windows in one forward; 4 on CUDA and 1 elsewhere if not given.
        text: Texts to cut windows from; the shipped validation books if not given.
        progress: Called with the task's name, windows done by this process, and their number.

    Returns:
        ``value`` (perplexity), ``mode``, ``length``, ``count`` (windows), ``tokens`` (scored),
        ``nll`` (mean, nats per token), ``window_nll`` (nats per token of each window).

    Raises:
        RecipeError: an unknown mode, or a length that the text or the model cannot hold.
    """
    check_mode(mode)
    check_length(model, length)
    count = check_limit(limit, DEFAULT_WINDOWS)
    texts = [book["text"] for book in reference.validation_books()] if text is None else text
    head = start_tokens(tokenizer)
    windows = excerpts(tokenizer, texts, length - len(head), count)
    ids = torch.tensor([head + window for window in windows])
    step = batch_size or (4 if model.device.type == "cuda" else 1)

    def score(batches: Sequence[Tensor]) -> list[float]:
        found: list[float] = []
        for batch in batches:
            loss, _ = negative_log_likelihood(model, batch.to(model.device), length // 2, mode)
            found += loss.double().mean(1).tolist()
            if progress is not None:
                progress("books_perplexity", len(found), sum(map(len, batches)))
        return found

    with scoring(model):
        losses = in_shares(model, ids.split(step), score)
    mean = sum(losses) / count
    return {
        "value": math.exp(mean),
        "mode": mode,
        "length": length,
        "count": count,
        "tokens": count * (length - length // 2),
        "nll": mean,
        "window_nll": losses,
    }
