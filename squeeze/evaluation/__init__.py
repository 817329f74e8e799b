"""Quality, speed and memory of a model, dense or squeezed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from squeeze.errors import RecipeError, nearest
from squeeze.evaluation.needle import needle as _needle
from squeeze.evaluation.perplexity import books_perplexity as _books_perplexity
from squeeze.evaluation.scoring import Progress, check_mode

TASKS = ("books_perplexity", "needle")
__all__ = ["TASKS", "check_tasks", "evaluate"]


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    *,
    mode: str = "decode",
    length: int = 2048,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    batch_size: int | None = None,
    text: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks on a model and return one result for each.

    Our tasks, ``books_perplexity`` and ``needle``, run offline on any causal language model. Any
    other name is looked up in lm-eval, if the ``eval`` extra is installed.

    Where ``torch.distributed`` is initialised, all processes call this with the same model and
    arguments; each answers its share of the requests, and all return the same results.

    Args:
        model: A Hugging Face causal language model, dense or squeezed, on any device.
        tokenizer: Its tokenizer.
        tasks: Names of tasks.
        mode: ``"decode"`` scores over the cache, ``"prefill"`` in one forward. A method that
            changes only cached tokens looks lossless in prefill mode.
        length: Tokens of a window or prompt (our tasks).
        limit: Windows (16 if not given), facts (100) or lm-eval documents (all).
        seed: Of the facts, and of lm-eval's few-shot examples.
        progress: Called with the task's name, items done, and their number (our tasks).
        batch_size: Sequences in one forward.
        text: Texts to use in place of the shipped books (our tasks).

    Returns:
        Per task a JSON-ready mapping with at least ``value``, ``mode``, ``length`` and ``count``.

    Raises:
        RecipeError: an unknown task or mode, or a length that cannot be.
    """
    check_mode(mode)
    theirs = check_tasks(tasks)
    options: dict[str, Any] = {
        "mode": mode,
        "length": length,
        "limit": limit,
        "text": text,
        "progress": progress,
    }
    results: dict[str, dict[str, Any]] = {}
    if theirs:
        from squeeze.evaluation.harness import run_tasks

        results = run_tasks(
            model, tokenizer, theirs, mode=mode, limit=limit, batch_size=batch_size, seed=seed
        )
    for task in tasks:
        if task == "books_perplexity":
            results[task] = _books_perplexity(model, tokenizer, batch_size=batch_size, **options)
        elif task == "needle":
            results[task] = _needle(model, tokenizer, seed=seed, **options)
    return {task: results[task] for task in tasks}


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the tasks that are not ours, which lm-eval would have to run.

    Raises:
        RecipeError: there are such and lm-eval is not installed.
    """
    theirs = [task for task in tasks if task not in TASKS]
    if theirs and importlib.util.find_spec("lm_eval") is None:
        raise _unknown_task(theirs[0])
    return theirs


def _unknown_task(name: str) -> RecipeError:
    """Make the error for a task that is not ours while lm-eval is not installed."""
    extra = "Tasks of lm-eval need the eval extra: pip install 'squeeze-llm[eval]'"
    remedy = f"{nearest(name, TASKS)} {extra}".strip()
    return RecipeError("evaluate.tasks", f"unknown task {name!r}", ", ".join(TASKS), remedy)
