"""What ``distill`` reads: the calibration text, and what the dense model goes on to write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeeze import processes, tensor_files
from squeeze.errors import RecipeError
from squeeze.evaluation.scoring import carried, encode, forward, scoring, start_tokens
from squeeze.evaluation.suite import calibration_texts
from squeeze.recipe_values import Calibration

PROMPT = 32  # tokens of the calibration text that a continuation starts from
ROOM = 2**30  # bytes of keys and values of continuations written side by side; 16 times on a GPU
MOST = 1024  # continuations; more sequences read them again
STATE = "own_text.safetensors"


def training_tokens(
    model: Any,
    tokenizer: Any,
    settings: Calibration,
    count: int,
    own: float,
    folder: Path | None = None,
) -> Tensor:
    """Draw what training reads: windows of the calibration text and of what the model makes of it.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        settings: Of calibration; training reads other windows than calibration does.
        count: Sequences.
        own: Share of them that the model wrote, each going on from some calibration text.
        folder: Where to keep what the model wrote, for a run that resumes.
    Returns:
        int64 ``[count, settings.length]``.
    Raises:
        RecipeError: the text is too short.
        CheckpointError: what ``folder`` holds cannot be read.
    """
    seed, length = settings.seed + 1, settings.length
    ids = windows(tokenizer, settings, count, length, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, generator=generator) < own
    if not chosen.any():
        return ids
    most = min(MOST, math.ceil(own * count))
    prompts = windows(tokenizer, settings, most, min(PROMPT, length), seed + 1)
    path = folder and folder / STATE
    if path is None:
        written = continued(model, prompts, length, seed)
    else:
        if processes.rank() == 0 and not path.exists():
            tensor_files.write(path, {"ids": continued(model, prompts, length, seed)}, {})
        processes.wait()
        written = tensor_files.read(path)[0]["ids"]
    which = torch.randint(len(written), (int(chosen.sum()),), generator=generator)
    return ids.masked_scatter(chosen[:, None], written[which])


def windows(tokenizer: Any, settings: Calibration, count: int, length: int, seed: int) -> Tensor:
    """Draw windows of the calibration text, each after BOS where there is one.

    The text is tokenized once, so any number of windows costs no more than that.

    Args:
        tokenizer: Of the model.
        settings: Where the text is.
        count: Windows.
        length: Tokens of a window, BOS included.
        seed: Chooses their places.
    Returns:
        int64 ``[count, length]``.
    Raises:
        RecipeError: the text is shorter than a window.
    """
    head = start_tokens(tokenizer)
    body = length - len(head)
    ids = torch.tensor(encode(tokenizer, "\n".join(calibration_texts(settings))))
    if len(ids) < body:
        raise RecipeError(
            "calibration.data",
            f"the text has {len(ids)} tokens",
            f"at least {body}, as calibration.length asks",
            "Give more text, or lower calibration.length",
        )
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(ids) - body + 1, (count,), generator=generator)
    chosen = ids[first[:, None] + torch.arange(body)]
    return torch.cat([torch.tensor(head, dtype=ids.dtype).expand(count, -1), chosen], 1)


def continued(model: Any, prompts: Tensor, length: int, seed: int) -> Tensor:
    """Let a model go on from prompts, drawing from its own distribution.

    Args:
        model: A Hugging Face causal language model.
        prompts: int64 ``[N, P]``.
        length: Tokens of the result, prompts included.
        seed: Of the draws; the result depends on the device too.
    Returns:
        int64 ``[N, length]``, on the CPU.

    Source: Z. Liu et al. 2023, LLM-QAT, https://arxiv.org/abs/2305.17888, section 3.1 (training on
        what the dense model writes).
    Differs: goes on from calibration text, not from one random token.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    parts = []
    with scoring(model):
        for rows in prompts.split(_rows(model, length)):
            parts.append(_continue(model, rows.to(model.device), length, generator).cpu())
    return torch.cat(parts)


def _rows(model: Any, length: int) -> int:
    """Sequences that fit side by side, if every head had its own keys and values of two bytes."""
    config = model.config.get_text_config(decoder=True)
    room = ROOM * (16 if model.device.type == "cuda" else 1)
    return max(1, room // (4 * length * config.num_hidden_layers * config.hidden_size))


def _continue(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Continue the rows of one batch, ``[B, P]`` to ``[B, length]``."""
    result = forward(model, ids, 1, use_cache=True)
    found = [ids]
    for place in range(ids.shape[1], length):
        share = result.logits[:, -1].float().softmax(-1)
        token = torch.multinomial(share, 1, generator=generator)
        found.append(token)
        if place + 1 < length:
            result = forward(model, token, 1, use_cache=True, **carried(result))
    return torch.cat(found, 1)
