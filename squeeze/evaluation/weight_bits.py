"""What each module's candidates cost at the end of the model, and the weights chosen by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze.allocate import HELD_OUT
from squeeze.allocate_weights import (
    WEIGHT_CONTEST,
    WEIGHT_LOSS,
    allocate_weights,
    weight_contenders,
)
from squeeze.calibrate import Stats
from squeeze.compress import compress, row_exponents
from squeeze.evaluation.probe import Windows, make_windows
from squeeze.evaluation.scoring import Progress, forward, max_positions, scoring
from squeeze.experts import expert_matrices
from squeeze.folding import scaled
from squeeze.linear import reconstruct, unfolded
from squeeze.plan import Plan, WeightPlan, repack, with_weights
from squeeze.plan_weights import PREDICTORS, with_methods
from squeeze.swapping import Artifacts, swap
from squeeze.types import ExpertWeights, PackedWeight, StoredWeight

STEP = 256  # tokens whose predictions are compared at once


class WeightProbe:
    """Predictions of the dense model on some windows, and how far those of a swapped one are off.

    Make it while the model is dense; measure while it is swapped.

    Args:
        model: A Hugging Face causal language model.
        windows: What to measure on; only the tails' scored tokens count.
    """

    def __init__(self, model: Any, windows: Windows) -> None:
        self.model, self.windows = model, windows
        self.dense = self._logits()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Predictions ``[M, V]`` of every scored token, in the dtype of the model."""
        rows = []
        with scoring(self.model):
            for prompt, tail, scored in zip(*vars(self.windows).values(), strict=True):
                ids = torch.cat((prompt, tail))[None, :-1].to(self.model.device)
                kept = len(tail)
                logits = forward(self.model, ids, kept, use_cache=False).logits[0, -kept:]
                rows.append(logits[scored.to(logits.device)])
        return torch.cat(rows)

    def measure(self) -> tuple[float, float]:
        """Divergence KL(dense || now) and rise of the loss, nats per token; see ``Probe``."""
        targets = self.windows.tails[self.windows.scored].to(self.dense.device)
        after = self._logits()
        divergence, rise = 0.0, 0.0
        parts = (x.split(STEP) for x in (self.dense, after, targets))
        for old, new, target in zip(*parts, strict=True):
            was, now = (x.float().log_softmax(-1) for x in (old, new))
            each = functional.kl_div(now, was, reduction="none", log_target=True)
            divergence += each.sum(-1).double().sum().item()
            rise += (was - now).gather(1, target[:, None]).double().sum().item()
        return divergence / len(targets), rise / len(targets)


def choose_weights(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    stats: Stats,
    text: str,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, Stats, dict[str, StoredWeight]]:
    """Fit every candidate, predict what each costs, choose, and check the choice.

    Args:
        model: Dense; restored afterwards.
        tokenizer: Its tokenizer.
        plan: Has a ``weight_allocation``.
        stats: Holds what the candidates are fitted with, and one of ``PREDICTORS``.
        text: Calibration read none of it; the choice is measured there.
        seed: Draws the facts hidden in it.
        folder: Fitted candidates are saved here, and a killed run finds them again.
        progress: Called as ``progress(stage, done, total)``.

    Returns:
        The final plan, ``stats`` with ``weight_loss`` and ``weight_contest``, and the packed
        weights that the plan asks for.
    """
    allocation = plan.weight_allocation
    assert allocation is not None
    variants = []
    for index, candidate in enumerate(allocation.candidates):
        methods = [candidate] * len(allocation.groups)
        variant = with_weights(plan, with_methods(plan.weights, allocation, methods, repack))
        own = folder and folder / f"candidate{index}"
        variants.append(compress(model, variant, stats, folder=own, progress=progress))
    stats = predict_losses(model, variants, stats)
    contenders = [_assembled(made, variants) for made in weight_contenders(plan, stats)]
    windows = make_windows(tokenizer, text, most=max_positions(model), seed=seed)
    contest = torch.tensor(measure_artifacts(model, windows, contenders))
    tensors = {**stats.tensors, WEIGHT_CONTEST: {HELD_OUT: contest}}
    stats = replace(stats, tensors=tensors)
    final = allocate_weights(plan, stats)
    return final, stats, _assembled(final, variants).weights


def predict_losses(model: nn.Module, variants: Sequence[Artifacts], stats: Stats) -> Stats:
    """Predict what every module costs at the end of the model in each variant.

    The prediction is the expected square of what the module's errors add to the loss to first
    order, up to a factor that all modules share: with errors E, ``tr(E H E^T)`` over the guided
    Hessian, or the sum of squared errors times the Fisher diagonal.

    Args:
        model: Dense.
        variants: Of one set of modules.
        stats: Holds ``guided_hessian`` or ``fisher``; modules that it leaves out cost nothing.

    Returns:
        ``stats`` with ``weight_loss`` of every module, float32 ``[C]``, by variant.
    """
    allocation = variants[0].plan.weight_allocation
    assert allocation is not None
    losses = {}
    rows = {row.module: row for row in variants[0].plan.weights}
    scales = [row_exponents(model, made) for made in variants]
    for name in (name for group in allocation.groups for name in group):
        dense = _matrices(model, rows[name])
        found = torch.zeros(len(variants))
        for index, made in enumerate(variants):
            for part, matrix, weight in zip(
                *_parts(rows[name], dense, made.weights[name]), strict=True
            ):
                values = reconstruct(unfolded(weight)).to(matrix.device)
                fold = scales[index].get(f"{name}.weight")
                values = values if fold is None else scaled(values, -fold)
                found[index] += _predicted(stats, part, values - matrix.float())
        losses[name] = found
    return replace(stats, tensors={**stats.tensors, WEIGHT_LOSS: losses})


def measure_artifacts(
    model: Any, windows: Windows, contenders: Sequence[Artifacts]
) -> list[tuple[float, float]]:
    """Measure each contender's weights as a whole; see ``WeightProbe.measure``."""
    probe = WeightProbe(model, windows)
    found = []
    for made in contenders:
        # Key scales belong to the weights and stay; the cache itself is not measured here.
        plan = replace(made.plan, kv_cache=(), prefill=(), activations=())
        with swap(model, replace(made, plan=plan)):
            found.append(probe.measure())
    return found


def _assembled(plan: Plan, variants: Sequence[Artifacts]) -> Artifacts:
    """Take each module of a plan from the variant that was fitted with its method."""
    methods = [{row.module: row.method for row in made.plan.weights} for made in variants]
    weights = {}
    for row in plan.weights:
        fitted = zip(variants, methods, strict=True)
        source = next(made for made, own in fitted if own[row.module] == row.method)
        weights[row.module] = source.weights[row.module]
    return Artifacts(plan, weights, variants[0].tables)


def _matrices(model: nn.Module, row: WeightPlan) -> list[Tensor]:
    """View the dense matrices of a row of the plan."""
    if row.experts:
        return expert_matrices(model, row.module)
    module: Any = model.get_submodule(row.module)
    return [module.weight.detach()]


def _parts(
    row: WeightPlan, dense: list[Tensor], weight: StoredWeight
) -> tuple[list[str], list[Tensor], list[PackedWeight]]:
    """List statistic names, dense matrices and packed ones of a row."""
    if isinstance(weight, ExpertWeights):
        names = [f"{row.module}.{expert}" for expert in range(row.experts)]
        return names, dense, [weight.expert(expert) for expert in range(row.experts)]
    return [row.module], dense, [weight]


def _predicted(stats: Stats, name: str, errors: Tensor) -> Tensor:
    """Predict the cost of errors ``[out, in]``, a scalar on the CPU."""
    statistic = next((s for s in PREDICTORS if name in stats.tensors.get(s, {})), None)
    if statistic is None:
        return torch.zeros(())
    measured = stats.tensors[statistic][name].to(errors)
    if statistic == "fisher":
        return (measured * errors.square()).sum().cpu()
    blocks = errors.tensor_split(len(measured))
    return sum(((e @ h) * e).sum() for e, h in zip(blocks, measured, strict=True)).cpu()  # type: ignore[union-attr]
