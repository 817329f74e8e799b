"""One decoder layer's turn: the moments of its inputs, what to fit, and its outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from squeeze import processes
from squeeze.calibrate import Stats, add
from squeeze.compress import weight_method
from squeeze.errors import UnsupportedError
from squeeze.guidance import Guidance, Sums, TokenWeights
from squeeze.layers import Call, Layers, linears, routed
from squeeze.plan import WeightPlan
from squeeze.types import Tensors

MOMENTS = ("guided_hessian", "hessian")  # of inputs, best first
DAMPING = 0.01  # share of the mean curvature added to every column's where targets move
SHARE = 0.5  # of the way to the best target: all of it fits the calibration text too closely


class Turn:
    """A layer with the hidden states of all samples before it.

    Args:
        layers: Of the dense model.
        index: Of the layer.
        calls: Its arguments in every sample of this process.
        dense: Its inputs in the dense model, ``[1, T, hidden]`` on the CPU; ``carry`` replaces
            them.
        packed: Its inputs behind packed layers, likewise; the same list where these do not count.
    """

    def __init__(
        self, layers: Layers, index: int, calls: Sequence[Call],
        dense: list[Tensor], packed: list[Tensor],
    ) -> None:  # fmt: skip
        self.layers, self.index, self.calls = layers, index, calls
        self.inputs = [dense] if packed is dense else [dense, packed]
        self.runners = [layers.copy(index) for _ in self.inputs]
        self.quantized = len(self.inputs) > 1
        self.sums: Sums = {}
        self.weights: TokenWeights = []
        self.finished = False  # whether dense outputs have taken the place of dense inputs

    def guide(self, guidance: Guidance) -> None:
        """Learn what gradients tell of this layer."""
        sums, self.weights = guidance.of_layer(
            self.index, self.runners[0], self.calls, self.inputs[0]
        )
        self.sums = processes.add_up(sums)

    @torch.no_grad()
    def stages(self, rows: Sequence[WeightPlan]) -> list[list[WeightPlan]]:
        """Divide rows so that what a module reads is known when its stage comes.

        Modules that read one tensor go together. Behind dense modules all do, and so do those whose
        input scales are searched, as one's scale is another's.
        """
        scaled = any(getattr(weight_method(row), "scales_inputs", False) for row in rows)
        if not self.quantized or scaled:
            return [list(rows)] if rows else []
        left = {self._inside(row): row for row in rows}
        found: list[list[WeightPlan]] = []
        last: Tensor | None = None
        for name, x in self._read(0, 0, left.keys() - routed(self.runners[0])).items():
            if x is not last:
                found.append([])
            found[-1].append(left.pop(name))
            last = x
        return [*found, list(left.values())] if left else found

    @torch.no_grad()
    def measure(
        self, rows: Sequence[WeightPlan], tokens: Tensor, last: bool = False
    ) -> tuple[Stats, Tensors]:
        """Collect the statistics of some rows, and what to fit for them.

        Args:
            rows: Of this layer.
            tokens: Of all processes, to count.
            last: Whether no other rows follow, so that the dense layer may run to its end.

        Returns:
            Statistics, and by module the weights to fit, float32 ``[out, in]``, on the device.
        """
        wanted: dict[str, list[str]] = {}
        owners = {self._inside(row): weight_method(row).statistics for row in rows}
        for name in linears(self.runners[0]):
            owner = name if name in owners else name.rpartition(".")[0]
            if owner in owners:
                wanted[name] = [kind for kind in MOMENTS if kind in owners[owner]]
        moments, crossed = self._moments(wanted, last)
        tensors: Sums = {}
        for statistic, sums in [*self.sums.items(), *moments.items()]:
            count = len(tokens) if statistic == "fisher" else tokens.numel()
            own = {n: (total / count).float() for n, total in sums.items() if n in wanted}
            tensors.setdefault(statistic, {}).update(own)
        targets = {}
        for name, kinds in wanted.items():
            if name not in routed(self.runners[0]):
                linear: Any = self.runners[0].get_submodule(name)
                targets[name] = linear.weight.float()
                if kinds and name in crossed[kinds[0]]:
                    hessian, moment = moments[kinds[0]][name], crossed[kinds[0]][name]
                    targets[name] = _moved(targets[name], hessian.view_as(moment), moment)
        stats = {s: {self._name(n): t for n, t in own.items()} for s, own in tensors.items()}
        named = {self._name(name): target for name, target in targets.items()}
        return Stats(stats, *tokens.shape), named

    def put(self, weights: Tensors) -> None:
        """Give modules of the packed copy other weights, named as in the model."""
        for name, weight in weights.items():
            linear: Any = self.runners[-1].get_submodule(name.removeprefix(self._name("")))
            linear.weight.copy_(weight)

    @torch.no_grad()
    def carry(self) -> None:
        """Replace the inputs of all samples by the layer's outputs."""
        for which, (runner, inputs) in enumerate(zip(self.runners, self.inputs, strict=True)):
            for sample, call in enumerate(() if self.finished and which == 0 else self.calls):
                inputs[sample] = call.run(runner, self.layers.widen(inputs[sample])).cpu()

    def _name(self, inside: str) -> str:
        return self.layers.name(self.index, inside)

    def _inside(self, row: WeightPlan) -> str:
        return row.module.removeprefix(self._name(""))

    def _moments(self, wanted: Mapping[str, Sequence[str]], last: bool) -> tuple[Sums, Sums]:
        """Sum ``w y y^T``, and where inputs differ ``w (x - y) y^T``, over the tokens of modules.

        Args:
            wanted: Module to the kinds of moments: with token weights w or without.
            last: Whether dense outputs may take the place of dense inputs.

        Returns:
            Both by kind and module, added up over processes.
        """
        moments: Sums = {kind: {} for kind in MOMENTS}
        crossed: Sums = {kind: {} for kind in MOMENTS}
        apart = routed(self.runners[0])
        # What gradients told of experts is whole already.
        kinds = {
            name: [kind for kind in own if name not in apart or kind == "hessian"]
            for name, own in wanted.items()
        }
        names = {name for name, own in kinds.items() if own}
        for sample in range(len(self.calls) if names else 0):
            reads = [
                self._read(which, sample, names, finish=last and which == 0)
                for which in range(len(self.runners))
            ]
            for name, found in reads[0].items():
                x = found.flatten(0, -2).float()
                moved = self.quantized and name not in apart
                y = reads[1][name].flatten(0, -2).float() if moved else x
                for kind in kinds[name]:
                    root = self._root(sample, name, len(y)) if kind == "guided_hessian" else 1.0
                    z = y * root
                    add(moments[kind], name, z.T @ z)
                    if moved:
                        add(crossed[kind], name, ((x - y) * root).T @ z)
        self.finished = last and bool(names)
        moments, crossed = processes.add_up(moments), processes.add_up(crossed)
        guided = moments["guided_hessian"]
        moments["guided_hessian"] = {name: total[None] for name, total in guided.items()}
        return moments, crossed

    def _root(self, sample: int, name: str, tokens: int) -> Tensor:
        """Return the roots of a module's token weights, ``[T, 1]`` on the device."""
        found = self.weights[sample].get(name)
        if found is None or len(found) != tokens:
            raise UnsupportedError(
                f"calibration: {self._name(name)}",
                "reads other tokens than the decoder layer",
                "modules that read every token, or fused experts",
                "Leave it out, or use a method that needs no guided Hessian",
            )
        return found.to(self.layers.device).sqrt()[:, None]

    def _read(
        self, which: int, sample: int, names: Collection[str], finish: bool = False
    ) -> Tensors:
        """Run one copy of the layer on a sample until all these modules were called.

        To ``finish`` is to run it to its end and to put its output in place of its input.

        Returns:
            Module to its input, in the order of the calls.
        """
        seen: Tensors = {}
        left = set(names)

        def observe(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            left.discard(name)
            if not left and not finish:
                raise _Enough

        modules = [(name, self.runners[which].get_submodule(name)) for name in names]
        handles = [m.register_forward_pre_hook(partial(observe, name)) for name, m in modules]
        try:
            hidden = self.layers.widen(self.inputs[which][sample])
            output = self.calls[sample].run(self.runners[which], hidden)
            if finish:
                self.inputs[which][sample] = output.cpu()
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen


class _Enough(Exception):  # noqa: N818
    """All inputs were seen; the rest of the layer need not run."""


def _moved(weight: Tensor, hessian: Tensor, crossed: Tensor) -> Tensor:
    """Move a weight towards the matrix whose products with y come closest to its own with x.

    Args:
        weight: W, ``[out, in]``.
        hessian: Sum of ``y y^T``.
        crossed: Sum of ``(x - y) y^T``.
    """
    ridge = DAMPING * hessian.diagonal().mean()
    if ridge <= 0:
        return weight
    damped = hessian.double() + ridge * torch.eye(len(hessian), device=hessian.device)
    shift = torch.linalg.solve(damped, (weight @ crossed).double().mT).mT
    return weight + SHARE * shift.float()
