"""Weights measured, fitted and saved one decoder layer after another, in bounded memory.

Of the calibration text only hidden states are held: the inputs of the layer whose turn it is. Its
statistics are measured, its weights fitted and saved, its outputs become the next layer's inputs,
and its copy and its statistics go.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from squeeze import processes
from squeeze.calibrate import MATRICES, Stats, fingerprint
from squeeze.compress import assemble, dense_weights, fit_weights, weight_method
from squeeze.errors import UnsupportedError
from squeeze.expert_fit import note_unrouted
from squeeze.guidance import Guidance
from squeeze.layer_turn import MOMENTS, Turn
from squeeze.layers import Call, Layers
from squeeze.plan import Plan
from squeeze.swapping import Artifacts
from squeeze.tensor_files import flatten, read_own, unflatten, write
from squeeze.types import StoredWeight, Tensors

FILE = "layer-{:05d}.safetensors"

Progress = Callable[[str, int, int], None]


def streamed(plan: Plan) -> set[str]:
    """Name the statistics of a plan that are measured layer by layer.

    Under a bound on mean bits there are none before the choice: it compares all layers.
    """
    if plan.weight_allocation is not None and not plan.weight_allocation.chosen:
        return set()
    return MATRICES & {name for row in plan.weights for name in weight_method(row).statistics}


def shifts(plan: Plan) -> bool:
    """Whether a plan's weights can make up for what packed layers before them changed."""
    return not streamed(plan).isdisjoint(MOMENTS)


def fit_layers(
    model: nn.Module,
    plan: Plan,
    tokens: Tensor,
    tables: Tensors,
    *,
    quantized: bool = False,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, dict[str, StoredWeight]]:
    """Fit the weights of all decoder layers, each with statistics measured at its turn.

    With ``quantized`` inputs a layer is measured behind the packed layers before it, and modules
    of a layer behind the packed modules before them. With inputs x of the dense model and y of the
    packed one, the V of least ``|W x - V y|^2`` over the text is ``W (1 + C H^-1)``, with moments
    ``C = (x - y) y^T`` and ``H = y y^T``, tokens weighted as in the method's statistic; what is
    fitted lies halfway between W and V. Experts keep their dense inputs, and methods that take no
    Hessian their weights; where input scales are searched, the modules of a layer are measured
    together.

    Args:
        model: Dense; unchanged on return.
        plan: What to do.
        tokens: int64 ``[N, T]``, one sample per row. Under an initialised ``torch.distributed``
            each process reads its part of them, and all return the same.
        tables: What ``compress.fit_tables`` returned.
        quantized: See above.
        device: Where layers run and are fitted; by default where the model is.
        folder: Every finished layer is saved here in one step, with a fingerprint of model, plan
            and text; a killed run goes on at the first unfinished one and gives the same bits.
        progress: Called as ``progress(stage, done, total)``, ``"calibrate"`` while gradients are
            gathered and ``"compress"`` after each layer.

    Returns:
        The plan, which notes experts that no token was routed to, and the packed weights on the
        CPU by module name.
    Raises:
        CheckpointError: ``folder`` holds another run's files, or damaged ones.
        UnsupportedError: no decoder layers are found, or there are fewer samples than processes.
    Cost: beside the model one copy of a layer, two when quantized, its statistics and the
        activations of one sample on the device; N T hidden values on the CPU, twice as many when
        quantized; what ``Guidance`` names, on the disk.
    Source: what is fitted behind packed layers, Y. Arai, Y. Ichikawa 2025, Quantization Error
        Propagation, https://arxiv.org/abs/2504.09629.
    Differs: tokens may be weighted by the end loss.
    """
    if len(tokens) < processes.count():
        raise UnsupportedError(
            "calibration.samples", f"{len(tokens)} for {processes.count()} processes"
        )
    training = model.training
    model.eval()
    temporary = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
    try:
        with temporary as place:
            asked = (json.dumps(plan.to_dict(), sort_keys=True), quantized, processes.count())
            name = fingerprint(model, tokens, asked) if folder else ""
            behind = quantized and shifts(plan)
            walk = _Walk(model, plan, tokens, tables, behind, device, Path(place), name)
            return walk.run(folder, progress)
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Done:
    """What a finished layer leaves: packed weights, and the names that each statistic has."""

    weights: dict[str, StoredWeight]
    measured: dict[str, list[str]]


class _Walk:
    """Hidden states on their way through the layers."""

    def __init__(
        self, model: nn.Module, plan: Plan, tokens: Tensor, tables: Tensors, quantized: bool,
        device: torch.device | str | None, place: Path, name: str,
    ) -> None:  # fmt: skip
        self.model, self.plan, self.tokens, self.tables = model, plan, tokens, tables
        self.layers = Layers(model, device, any(row.experts for row in plan.weights))
        self.quantized, self.name = quantized, name
        self.guidance = Guidance(self.layers, tokens, streamed(plan), place, name)
        self.calls: list[list[Call]] = []
        self.dense: list[Tensor] = []
        self.packed: list[Tensor] = []

    def run(
        self, folder: Path | None, progress: Progress | None
    ) -> tuple[Plan, dict[str, StoredWeight]]:
        """Visit the layers up to the last that no file holds."""
        every = range(len(self.layers))
        saved = [processes.from_first(partial(self._load, folder, index)) for index in every]
        if None in saved:
            self.guidance.collect(progress)
            self._begin()
        weights: dict[str, StoredWeight] = {}
        measured: dict[str, dict[str, Tensor]] = {}
        for index, held in enumerate(saved):
            done = self._visit(index, held) if None in saved[index:] else held
            assert done is not None
            if held is None and folder is not None and processes.rank() == 0:
                self._save(folder, index, done)
            weights |= done.weights
            for statistic, names in done.measured.items():
                measured.setdefault(statistic, {}).update(dict.fromkeys(names, torch.empty(0)))
            if progress:
                progress("compress", len(weights), len(self.plan.weights))
        return note_unrouted(self.plan, Stats(measured, *self.tokens.shape)), weights

    @torch.no_grad()
    def _begin(self) -> None:
        """Learn what every layer is called with, and the inputs of the first."""
        for sample in processes.share(len(self.tokens)):
            calls = self.layers.record(self.tokens[sample], use_cache=False)
            self.dense.append(self.layers.widen(calls[0].hidden).cpu())
            first = self.calls[0] if self.calls else calls
            pairs = zip(calls, first, strict=True)
            self.calls.append([mine.sharing(other) for mine, other in pairs])
        self.packed = list(self.dense) if self.quantized else self.dense

    def _visit(self, index: int, done: _Done | None) -> _Done:
        """Fit a layer's weights, if that is to be done, and carry the hidden states through it."""
        calls = [call[index] for call in self.calls]
        turn = Turn(self.layers, index, calls, self.dense, self.packed)
        prefix = self.layers.name(index, "")
        rows = [row for row in self.plan.weights if row.module.startswith(prefix)]
        if done is None:
            done = _Done({}, {})
            if rows:
                turn.guide(self.guidance)
            stages = turn.stages(rows)
            for stage in stages:
                stats, targets = turn.measure(stage, self.tokens, last=stage is stages[-1])
                part = replace(self.plan, weights=tuple(stage))
                found = fit_weights(
                    self.model, part, stats, self.tables,
                    targets=targets, device=self.layers.device,
                )  # fmt: skip
                self._put(turn, part, found)
                done.weights.update(found)
                for statistic, own in stats.tensors.items():
                    done.measured.setdefault(statistic, []).extend(own)
        else:
            self._put(turn, replace(self.plan, weights=tuple(rows)), done.weights)
        turn.carry()
        return done

    def _put(self, turn: Turn, part: Plan, weights: dict[str, StoredWeight]) -> None:
        """Have the packed copy of a layer compute with what packed weights stand for."""
        if not self.quantized:
            return
        moved = {
            module: weight.with_tensors(
                {name: tensor.to(self.layers.device) for name, tensor in weight.tensors().items()}
            )
            for module, weight in weights.items()
        }
        turn.put(dense_weights(self.model, Artifacts(part, moved, self.tables)))

    def _load(self, folder: Path | None, index: int) -> _Done | None:
        """Read a finished layer."""
        path = folder and folder / FILE.format(index)
        if path is None or not path.exists():
            return None
        tensors, about = read_own(path, self.name, "a finished layer of a run")
        rows = {row.module: row for row in self.plan.weights}
        held = unflatten(tensors)
        weights = {module: assemble(rows[module], own) for module, own in held.items()}
        return _Done(weights, about["measured"])

    def _save(self, folder: Path, index: int, done: _Done) -> None:
        """Write a finished layer in one step."""
        tensors = {module: weight.tensors() for module, weight in done.weights.items()}
        about = {"run": self.name, "layer": index, "measured": done.measured}
        write(folder / FILE.format(index), flatten(tensors), about)
