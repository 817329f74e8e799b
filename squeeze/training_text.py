"""What ``distill`` reads: the calibration text, and what the dense model goes on to write."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeeze import processes, tensor_files
from squeeze.echoes import echoed
from squeeze.errors import RecipeError
from squeeze.evaluation.scoring import carried, encode, forward, scoring, start_tokens
from squeeze.evaluation.suite import calibration_texts
from squeeze.recipe_values import Calibration

PROMPT = 32  # tokens of the calibration text that a continuation starts from
PIECE = 512  # tokens of a continuation, at most: a long sequence is put together of several
MOST = 4 * 2**20  # tokens of continuations; training reads them again after that
ROOM = 2**30  # bytes of keys and values of continuations written side by side, on a CPU
SHARE = 3  # on a GPU, the part of its free memory that they may take
STATE = "own_text.safetensors"

Progress = Callable[[str, int, int], None]


def training_tokens(
    model: Any,
    tokenizer: Any,
    settings: Calibration,
    count: int,
    *,
    own: float = 0.0,
    echo: float = 0.0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw what training reads: windows of the calibration text and what the model makes of it.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        settings: Of calibration; training reads other windows than calibration does.
        count: Sequences.
        own: Share of them that the model wrote, each going on from some calibration text.
        echo: Share of them that repeat themselves, see ``squeeze.echoes``.
        folder: Where to keep what the model wrote, for a run that resumes.
        progress: Called as ``progress("own text", tokens written, of how many)``.
    Returns:
        int64 ``[count, settings.length]``.
    Raises:
        RecipeError: the text is too short.
        CheckpointError: what ``folder`` holds cannot be read.
    """
    seed = settings.seed + 1
    ids = windows(tokenizer, settings, count, settings.length, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, generator=generator) < own
    if chosen.any():
        ids[chosen] = _own_text(model, tokenizer, settings, int(chosen.sum()), folder, progress)
    return echoed(ids, echo, encode(tokenizer, "\n"), seed)


def _own_text(
    model: Any,
    tokenizer: Any,
    settings: Calibration,
    count: int,
    folder: Path | None,
    progress: Progress | None,
) -> Tensor:
    """Put sequences together of what the model wrote, int64 ``[count, settings.length]``."""
    head, seed = start_tokens(tokenizer), settings.seed + 2
    body = settings.length - len(head)
    pieces = math.ceil(body / PIECE)
    size = math.ceil(body / pieces)
    rows = max(1, min(count * pieces, MOST // size))
    prompts = windows(tokenizer, settings, rows, len(head) + min(PROMPT, size), seed)
    path, length = folder and folder / STATE, len(head) + size
    if path is None:
        written = continued(model, prompts, length, seed, progress)
    else:
        if processes.rank() == 0 and not path.exists():
            written = continued(model, prompts, length, seed, progress)
            tensor_files.write(path, {"ids": written.int()}, {})
        processes.wait()
        written = tensor_files.read(path)[0]["ids"].long()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    order = order[torch.arange(count * pieces) % rows]
    text = written[order, len(head) :].view(count, -1)[:, :body]
    return torch.cat([torch.tensor(head, dtype=text.dtype).expand(count, -1), text], 1)


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


def continued(
    model: Any, prompts: Tensor, length: int, seed: int, progress: Progress | None = None
) -> Tensor:
    """Let a model go on from prompts, drawing from its own distribution.

    Args:
        model: A Hugging Face causal language model.
        prompts: int64 ``[N, P]``.
        length: Tokens of the result, prompts included.
        seed: Of the draws; the result depends on the device and its free memory too.
        progress: See ``training_tokens``.
    Returns:
        int64 ``[N, length]``, on the CPU.

    Source: Z. Liu et al. 2023, LLM-QAT, https://arxiv.org/abs/2305.17888, section 3.1 (training on
        what the dense model writes).
    Differs: goes on from calibration text, not from one random token.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    parts: list[Tensor] = []
    with scoring(model):
        for rows in prompts.chunk(math.ceil(len(prompts) / _rows(model, length))):
            parts.append(_continue(model, rows.to(model.device), length, generator).cpu())
            if progress:
                done = length * sum(len(part) for part in parts)
                progress("own text", done, length * len(prompts))
    return torch.cat(parts)


def _rows(model: Any, length: int) -> int:
    """Sequences that fit side by side, if every head had its own keys and values of two bytes."""
    config = model.config.get_text_config(decoder=True)
    room = ROOM
    if model.device.type == "cuda":
        room = torch.cuda.mem_get_info(model.device)[0] // SHARE
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
