"""Teacher-forced scoring, over the cache or in one forward: the measuring instrument of all tasks.

A method that changes only cached keys and values looks lossless when everything is scored in one
forward, because the current call's keys and values are attended exactly. So each task states its
mode: ``decode`` prefills the first part and feeds the rest in chunks over the cache; ``prefill``
runs one forward. Both score the same tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.errors import RecipeError, nearest

MODES = ("prefill", "decode")
CHUNK_TOKENS = 64
Progress = Callable[[str, int, int], None]


def check_mode(mode: str) -> str:
    """Return ``mode`` if it is one of ``MODES``.

    Raises:
        RecipeError: it is not; the message lists both.
    """
    if mode not in MODES:
        hint = nearest(mode, MODES)
        raise RecipeError("evaluate.mode", f"unknown mode {mode!r}", ", ".join(MODES), hint)
    return mode


def check_length(model: nn.Module, length: int, least: int = 16) -> None:
    """Refuse a length that the model's positions or the task cannot hold.

    Raises:
        RecipeError: ``length`` is outside ``least`` to the model's maximum.
    """
    most = max_positions(model)
    if length < least or (most is not None and length > most):
        allowed = f"{least} to {most} tokens" if most else f"at least {least} tokens"
        raise RecipeError("evaluate.length", f"{length} tokens", allowed)


def check_limit(limit: int | None, default: int, most: int | None = None) -> int:
    """Return how many items to measure: ``limit``, or ``default`` if not given.

    Raises:
        RecipeError: ``limit`` is outside 1 to ``most``.
    """
    count = default if limit is None else limit
    if count < 1 or (most is not None and count > most):
        allowed = f"1 to {most}" if most else "at least 1"
        raise RecipeError("evaluate.limit", str(count), allowed)
    return count


def max_positions(model: Any) -> int | None:
    """Return the longest sequence the model's configuration states, in tokens, if it does."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Turn text into token ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def start_tokens(tokenizer: Any) -> list[int]:
    """Return ``[BOS]``, or nothing for a tokenizer that has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def excerpts(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> list[list[int]]:
    """Cut ``count`` runs of ``length`` tokens, spread evenly over the joined texts.

    The texts are divided into ``count`` equal parts and each part gives its first tokens, so the
    excerpts never overlap and only what is needed is tokenized.

    Raises:
        RecipeError: a part is too short; the message says how many tokens it has.
    """
    joined = "\n".join(texts)
    found = []
    for index in range(count):
        first, last = index * len(joined) // count, (index + 1) * len(joined) // count
        ids = encode(tokenizer, joined[first : min(last, first + 8 * length)])
        if len(ids) < length:
            ids = encode(tokenizer, joined[first:last])
        if len(ids) < length:
            raise RecipeError(
                "evaluate.length",
                f"{count} excerpts of {length} tokens, but part {index + 1} of the text has "
                f"{len(ids)}",
                remedy="Lower the length or the limit, or give more text",
            )
        found.append(ids[:length])
    return found


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Run the model in inference behaviour and without gradients; put its flag back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def supplied_cache(model: nn.Module, make: Callable[[], Any]) -> Iterator[None]:
    """Let every sequence that would start transformers' own cache start one of ``make`` instead.

    Args:
        model: Any Hugging Face causal language model.
        make: Returns a new, empty cache; called at each forward that begins one.
    """

    def supply(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("use_cache") and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = make()
        return args, kwargs

    hook = model.register_forward_pre_hook(supply, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def carried(output: Any) -> dict[str, Any]:
    """Return what a forward hands to the next one, by the name of the argument."""
    name = "cache_params" if "cache_params" in output else "past_key_values"
    return {name: output[name]}


def continuation_logits(
    model: Any, ids: Tensor, start: int, mode: str, chunk: int = CHUNK_TOKENS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits that predict ``ids[:, start:]``, with those tokens, in order.

    Args:
        model: Any Hugging Face causal language model.
        ids: Token ids without padding, ``[B, T]``, int64, on the model's device.
        start: First predicted position, 1 to ``T - 1``.
        mode: ``"prefill"`` for one forward without a cache; ``"decode"`` to prefill
            ``ids[:, :start]`` and feed the rest over the cache.
        chunk: Tokens fed, or logits yielded, at once.

    Returns:
        Pairs of logits ``[B, n, V]`` in the model's dtype and targets ``[B, n]``; ``n`` sums to
        ``T - start``.
    """
    if mode == "prefill":
        logits = forward(model, ids[:, :-1], keep=ids.shape[1] - start, use_cache=False).logits
        for first in range(start, ids.shape[1], chunk):
            targets = ids[:, first : first + chunk]
            yield logits[:, first - start : first - start + targets.shape[1]], targets
        return
    output = forward(model, ids[:, :start], keep=1, use_cache=True)
    yield output.logits, ids[:, start : start + 1]
    if "cache_params" in carried(output):
        chunk = 1  # a scan of several tokens may start from nothing
    for first in range(start, ids.shape[1] - 1, chunk):
        fed = ids[:, first : min(first + chunk, ids.shape[1] - 1)]
        output = forward(model, fed, fed.shape[1], use_cache=True, **carried(output))
        yield output.logits, ids[:, first + 1 : first + 1 + fed.shape[1]]


def negative_log_likelihood(
    model: Any, ids: Tensor, start: int, mode: str, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Score ``ids[:, start:]`` given everything before each token.

    Returns:
        The negative log-likelihood of each token in nats, float32 ``[B, T - start]``, and whether
        it is the model's most probable token, bool ``[B, T - start]``.
    """
    losses, greedy = [], []
    for logits, targets in continuation_logits(model, ids, start, mode, chunk):
        flat = logits.flatten(0, 1).float()
        loss = nn.functional.cross_entropy(flat, targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape))
        greedy.append(logits.argmax(-1) == targets)
    return torch.cat(losses, 1), torch.cat(greedy, 1)


def forward(model: Any, ids: Tensor, keep: int, **arguments: Any) -> Any:
    """Call the model for the last ``keep`` logits, computing no others where it can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = keep
    output = model(input_ids=ids, **arguments)
    output.logits = output.logits[:, -keep:]
    return output
