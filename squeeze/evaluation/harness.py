"""Adapter to lm-eval: its tasks on our models, scored over the cache when asked.

lm-eval computes log-likelihoods in one forward, where a method that changes only cached tokens
looks lossless. Importing this file needs the ``eval`` extra; nothing else in squeeze does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from squeeze import processes
from squeeze.errors import RecipeError, nearest
from squeeze.evaluation.scoring import check_mode, negative_log_likelihood, scoring
from squeeze.evaluation.shares import in_shares

TASK_FOLDER = Path(__file__).parent / "tasks"
Request = tuple[Any, list[int], list[int]]


class SqueezeLM(HFLM):
    """lm-eval's Hugging Face model, with log-likelihoods in a stated mode.

    ``decode`` prefills the context and feeds the continuation over the cache in chunks of at most
    64 tokens; a rolling window has one token of context, so nearly all of it is fed so. Requests
    of equal lengths share a forward and nothing is padded. ``prefill`` leaves lm-eval's own way.
    Generation goes through the model's ``generate`` in both. Several processes split the requests;
    to lm-eval each is alone.
    """

    def __init__(self, pretrained: Any, mode: str = "decode", **arguments: Any) -> None:
        self.mode = check_mode(mode)
        super().__init__(pretrained=pretrained, **arguments)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations, each process its share."""
        answer = partial(super().loglikelihood, disable_tqdm=disable_tqdm)
        return in_shares(self.model, requests, _unless_empty(answer))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each process its share."""
        answer = partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm)
        return in_shares(self.model, requests, _unless_empty(answer))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate, each process its share."""
        answer = partial(super().generate_until, disable_tqdm=disable_tqdm)
        return in_shares(self.model, requests, _unless_empty(answer))

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations; returns each sum of log-probabilities, and whether it is greedy."""
        if self.mode == "prefill":
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return answers
        found: dict[int, tuple[float, bool]] = {}
        for batch in _batches(requests, self.batch_size):
            for index, answer in zip(
                batch, self._decode([requests[index] for index in batch]), strict=True
            ):
                found[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return [found[index] for index in range(len(requests))]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Generate up to ``max_length``, whatever new-token limit the model was saved with."""
        if self.model.generation_config.max_new_tokens is not None:
            options.setdefault("max_new_tokens", max_length - context.shape[1])
        generated: Tensor = super()._model_generate(context, max_length, stop, **options)
        return generated

    def _decode(self, batch: list[Request]) -> list[tuple[float, bool]]:
        """Score requests of equal lengths over one cache."""
        rows = [(context + target)[-(self.max_length + 1) :] for _, context, target in batch]
        ids = torch.tensor(rows, device=self.device)
        start = ids.shape[1] - len(batch[0][2])
        with scoring(self.model):
            loss, greedy = negative_log_likelihood(self.model, ids, start, "decode")
        return list(zip((-loss.double().sum(1)).tolist(), greedy.all(1).tolist(), strict=True))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    mode: str = "decode",
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    include_path: str | Path = TASK_FOLDER,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks and return each one's first metric and all of them.

    Args:
        model: A Hugging Face causal language model, dense or squeezed.
        tokenizer: Its tokenizer.
        tasks: Names in ``include_path``, or in lm-eval's own collection, which takes about ten
            seconds to index and usually the network to load.
        mode: How log-likelihoods are scored.
        limit: Documents of each task; all if not given.
        batch_size: Requests in one forward, 1 if not given.
        seed: Of everything that lm-eval draws.
        include_path: Folder of task files.

    Returns:
        Per task ``value``, ``metric`` (its name), ``metrics``, ``mode``, ``length`` (the longest
        sequence, in tokens) and ``count`` (documents).

    Raises:
        RecipeError: a task is in neither place.
    """
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            hint = nearest(task, manager.all_tasks)
            known = "books_perplexity, needle, or a task of lm-eval (lm-eval ls tasks)"
            raise RecipeError("evaluate.tasks", f"unknown task {task!r}", known, hint)
    adapter = SqueezeLM(model, mode, tokenizer=tokenizer, batch_size=batch_size or 1)
    output = lm_eval.simple_evaluate(
        model=adapter,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    # lm-eval gives results to one process, all of whose answers are everyone's.
    return processes.from_first(lambda: {task: _result(output, task, adapter) for task in tasks})


def _result(output: Any, task: str, adapter: SqueezeLM) -> dict[str, Any]:
    """Bring lm-eval's output for one task, or group of tasks, into our form."""
    metrics = {
        name.removesuffix(",none"): value
        for name, value in output["results"][task].items()
        if isinstance(value, float) and "_stderr" not in name
    }
    members = output.get("group_subtasks", {}).get(task) or [task]
    counts = [output["n-samples"][name]["effective"] for name in members]
    metric = next(iter(metrics))
    return {
        "value": metrics[metric],
        "metric": metric,
        "metrics": metrics,
        "mode": adapter.mode,
        "length": adapter.max_length,
        "count": sum(counts),
    }


def _unless_empty(answer: Callable[[Any], list[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    """Spare lm-eval a share without requests."""
    return lambda requests: answer(list(requests)) if requests else []


def _batches(requests: list[Request], size: int | str) -> list[list[int]]:
    """Group the indices of requests with equal context and continuation lengths."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (_, context, target) in enumerate(requests):
        groups[len(context), len(target)].append(index)
    step = size if isinstance(size, int) else 1
    return [
        group[first : first + step]
        for group in groups.values()
        for first in range(0, len(group), step)
    ]
