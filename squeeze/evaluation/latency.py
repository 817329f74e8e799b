"""Time of prefill and of one decode step, measured and not modelled."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from squeeze.errors import RecipeError
from squeeze.evaluation.memory import kv_bytes, peak_bytes, reset_peak
from squeeze.evaluation.scoring import carried, forward, max_positions, scoring
from squeeze.evaluation.step_shares import PARTS, shares, step_shares


class _Clock:
    """Marks on the device's own time line: CUDA events there, ``perf_counter`` elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note the present, in stream order."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Wait for the device and return the times between neighbouring marks."""
        pairs = list(pairwise(self.marks))
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def latency(
    model: Any,
    *,
    prompt_tokens: int = 2048,
    decode_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure prefill and greedy decoding of random prompts, after one warm-up round.

    Args:
        model: Any Hugging Face causal language model, dense or squeezed.
        prompt_tokens: Length of the prompt.
        decode_tokens: Steps after it, one token each.
        batch_size: Prompts at once.
        repeats: Timed rounds; the medians are over all of them.
        seed: Of the prompt.

    Returns:
        ``prefill_seconds`` and ``decode_ms_per_token`` (medians; a token of each prompt in the
        batch per step), ``kv_bytes`` (of the cache at the end), ``peak_bytes`` (CUDA only, else
        ``None``), ``weights_share``, ``attention_share``, ``other_share`` and ``launch_share`` of a
        decode step (the last ``None`` where it cannot be told from other), and the conditions: the
        arguments, ``device``, ``dtype``, ``threads``.

    Raises:
        RecipeError: prompt and steps pass the model's maximum length, or a count is below one.
    """
    _check(model, prompt_tokens, decode_tokens, batch_size, repeats)
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(vocabulary, shape, generator=generator).to(device)
    prefill: list[float] = []
    decode: list[float] = []
    with scoring(model):
        _round(model, prompt, decode_tokens)
        reset_peak(device)
        for _ in range(repeats):
            cache = None  # before the next one is made
            seconds, cache = _round(model, prompt, decode_tokens)
            prefill.append(seconds[0])
            decode += seconds[1:]
        held, peak = kv_bytes(cache), peak_bytes(device)
        step_ms = 1000 * statistics.median(decode)
        parts = shares(step_ms, step_shares(model, cache, prompt[:, -1:]))
    return {
        "prefill_seconds": statistics.median(prefill),
        "decode_ms_per_token": step_ms,
        **{f"{part}_share": parts.get(part) for part in PARTS},
        "kv_bytes": held,
        "peak_bytes": peak,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _round(model: Any, prompt: Tensor, decode_tokens: int) -> tuple[list[float], Any]:
    """Prefill, then decode; return the seconds of each and the cache."""
    clock = _Clock(prompt.device)
    clock.mark()
    output = forward(model, prompt, keep=1, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    clock.mark()
    for _ in range(decode_tokens):
        output = forward(model, token, keep=1, use_cache=True, **carried(output))
        token = output.logits[:, -1:].argmax(-1)
        clock.mark()
    (cache,) = carried(output).values()
    return clock.seconds(), cache


def _check(
    model: Any, prompt_tokens: int, decode_tokens: int, batch_size: int, repeats: int
) -> None:
    """Refuse counts that cannot be measured."""
    if min(prompt_tokens, decode_tokens, batch_size, repeats) < 1:
        raise RecipeError("latency", "a count below 1", "positive counts")
    most, total = max_positions(model), prompt_tokens + decode_tokens
    if most is not None and total > most:
        raise RecipeError("latency", f"{total} tokens", f"at most {most} for this model")
