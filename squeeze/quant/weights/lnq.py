"""Palettes whose entries and indices minimise the error of a layer's output, not of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from squeeze.kernels.index_descent.api import descend, look_up
from squeeze.quant.weights._descent import (
    damped,
    loss,
    normal,
    round_entries,
    solve,
    times,
)
from squeeze.quant.weights._outliers import SparsePalette
from squeeze.quant.weights._palette import representable
from squeeze.registry import register
from squeeze.types import ClusteredWeight

DAMPING = 0.01  # share of the mean curvature added to every column's
COUPLING = 0.5  # share of the mean curvature added to every row's
PARTS = 16  # rows far apart that move together while all others are held


@register(source="https://arxiv.org/abs/2505.07004", year=2025)
@dataclass(frozen=True)
class Lnq(SparsePalette):
    """Alternate closed-form codebooks and coordinate descent over indices (LNQ, GuidedQuant).

    Minimises ``sum_j (q_j - w_j)^T H (q_j - w_j)`` over rows j. H is the second moment of the
    layer's inputs or, guided by the end loss, that moment with each token weighted by the squared
    loss gradient of the outputs, one H for each group of rows.

    Attributes:
        bits, granularity, rows_per_codebook, entries, inputs: See ``Palette``.
        sparse_outliers: See ``SparsePalette``.
        guidance: Weight tokens by the end ``loss``, or ``none``.
        rounds: Alternations of codebooks and indices.
        cycles: Passes over the columns in each.
        sweeps: Passes over the rows after that, in which the errors of other rows count too, by
            the second moment G of the output gradients: ``tr(G E H E^T)`` falls (YAQA's loss).

    Source: J. Kim et al. 2025, GuidedQuant, https://arxiv.org/abs/2505.07004, section 3.2
        (grouped guided Hessians) and section 4 (LNQ); the loss of sweeps, A. Tseng et al. 2025,
        YAQA, https://arxiv.org/abs/2505.22988.
    Differs: starts at a local optimum of k-means weighted by the diagonal of H, so no Fisher
        diagonal is needed and little time (from the exact one, layers lose 0.3 to 2% less);
        codebooks of tiles, blocks of rows or whole tensors, by descent over runs of columns; 8-bit
        entries with a row scale, fitted in the same loss; a step that rounding makes worse is not
        taken, so descent is monotone in what is stored; damping is a hundredth of the mean;
        rows are coupled by descent over sets of rows and not by feedback through a factor of G.
    """

    guidance: Literal["loss", "none"] = "loss"
    rounds: Annotated[int, Field(ge=1)] = 3
    cycles: Annotated[int, Field(ge=1)] = 4
    sweeps: Annotated[int, Field(ge=0)] = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """``guided_hessian``, float ``[S, in, in]``, or ``hessian``, float ``[in, in]``.

        With sweeps ``output_hessian`` too, float ``[out, out]``.
        """
        inputs = "guided_hessian" if self.guidance == "loss" else "hessian"
        return (inputs, "output_hessian") if self.sweeps else (inputs,)

    def fit(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> ClusteredWeight:
        """Choose codebooks, scales and indices of one weight matrix.

        Args:
            weight: ``[out, in]``, any floating dtype, finite.
            statistics: The Hessian; S divides out, and rows stand in S groups in order.
        Returns:
            The packed weight, on the device of ``weight``.
        Raises:
            ValueError: the statistic is missing or of another shape.
            UnsupportedError: see ``check``.
        Cost: per round about 2 out in^2 (cycles + 2^bits + 3) operations; memory in^2 S and a few
            times out in.
        """
        self.check(weight.shape[0], weight.shape[1])
        dense = weight.detach().float()
        hessian = damped(self._hessian(dense, statistics), DAMPING)
        mass = self._diagonal(dense, hessian)
        return self.spare(lambda rest: self._fit(rest, hessian, statistics), dense, mass)

    def _fit(
        self, dense: Tensor, hessian: Tensor, statistics: Mapping[str, Tensor]
    ) -> ClusteredWeight:
        """Fit a float32 weight to a damped Hessian ``[S, in, in]``."""
        state = self.start(dense, hessian)
        for _ in range(self.rounds):
            state = self.round(dense, hessian, state, self.cycles)
        if self.sweeps:
            coupling = damped(statistics["output_hessian"].to(dense)[None], COUPLING)[0]
            inputs = hessian.mean(0, keepdim=True)
            for _ in range(self.sweeps):
                state = self.sweep(dense, inputs, coupling, state)
        return self.pack(
            state.indices.to(torch.uint8),
            self.grid.store(state.entries) if self.grid else state.entries.half(),
            state.scale.half() if self.grid else None,
        )

    def _diagonal(self, dense: Tensor, hessian: Tensor) -> Tensor:
        """What an error of each weight costs by itself, ``[out, in]``."""
        height = len(dense) // len(hessian)
        return hessian.diagonal(dim1=1, dim2=2).repeat_interleave(height, 0)

    def start(self, dense: Tensor, hessian: Tensor) -> _State:
        """Cluster by the diagonal of the Hessian, as well as a start has to."""
        mass = self._diagonal(dense, hessian)
        indices, entries, scale = self.cluster(dense, mass, exact=False)
        entries = self.grid.load(entries) if self.grid else entries.float()
        scale = dense.new_ones(len(dense)) if scale is None else scale.float()
        rows = self.sharing(dense.shape[0], dense.shape[1])[0]
        return _State(entries, scale, indices.long(), rows)

    def round(self, dense: Tensor, hessian: Tensor, state: _State, cycles: int) -> _State:
        """Fit entries to indices, then indices to entries."""
        columns = self.sharing(dense.shape[0], dense.shape[1])[1]
        state = self.refit(dense, hessian, state)
        indices = descend(dense, hessian, state.table, state.indices, columns, cycles)
        return replace(state, indices=indices)

    def sweep(self, dense: Tensor, hessian: Tensor, coupling: Tensor, state: _State) -> _State:
        """Lower ``tr(G E H E^T)``, one set of rows after another.

        With the others held, the loss of one row is that of an independent row with another
        target, ``w_j - sum_(k != j) G_jk E_k / G_jj``. Rows of a set move together as if nothing
        coupled them; a set that loses by it stays.

        Args:
            dense: float32 ``[out, in]``.
            hessian: Damped H, ``[1, in, in]``.
            coupling: Damped G, ``[out, out]``.
            state: Where to start.
        """
        columns = self.sharing(dense.shape[0], dense.shape[1])[1]
        error = state.values(columns) - dense
        for first in range(min(PARTS, len(state.entries))):
            chosen = torch.arange(first, len(state.entries), PARTS, device=dense.device)
            rows, old = state.take(chosen)
            own = coupling.diagonal()[rows, None]
            target = dense[rows] + error[rows] - coupling[rows] @ error / own
            new = self.round(target, hessian, old, 2)
            change = new.values(columns) - old.values(columns)
            slope = 2 * coupling[rows] @ error + coupling[rows][:, rows] @ change
            if (times(change, hessian) * slope).sum() < 0:
                state = state.put(chosen, rows, new)
                error[rows] += change
        return state

    def refit(self, dense: Tensor, hessian: Tensor, state: _State) -> _State:
        """Fit entries and scales to the indices; codebooks that would lose by it stay.

        Args:
            dense: float32 ``[out, in]``.
            hessian: Damped, ``[S, in, in]``.
            state: Where to start.
        """
        columns = self.sharing(dense.shape[0], dense.shape[1])[1]
        entries, matrices = self._solve(dense, hessian, state, columns)
        trial = self._round(entries, matrices, state)
        if self.grid:
            values = trial.values(columns)
            power = times(values, hessian)
            ratio = (power * dense).sum(1) / (power * values).sum(1).clamp(min=1e-30)
            better = representable(trial.scale * ratio)
            trial = replace(trial, scale=torch.where(ratio > 0, better, trial.scale))
        gain = loss(state.values(columns) - dense, hessian) - loss(
            trial.values(columns) - dense, hessian
        )
        kept = state.per_codebook(gain) < 0
        return trial.where(~kept, state).ascending(columns)

    def _hessian(self, dense: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Check the statistic and bring it to ``[S, in, in]``."""
        name = self.statistics[0]
        if name not in statistics:
            raise ValueError(f"guidance {self.guidance!r} needs the statistic {name}")
        found = statistics[name].to(dense)
        found = found[None] if found.ndim == 2 else found
        size = dense.shape[1]
        if found.shape[1:] != (size, size) or len(dense) % len(found):
            raise ValueError(f"{name} is {tuple(found.shape)}, the weight {tuple(dense.shape)}")
        return found

    def _solve(
        self, dense: Tensor, hessian: Tensor, state: _State, columns: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Solve for the entries of one run of columns after another, without rounding.

        Returns:
            entries ``[G, B, K]`` and, of every run, the curvature ``[G, K, K]``.
        """
        entries, matrices = state.entries.clone(), []
        gradient = times(state.values(columns) - dense, hessian)
        for run in range(entries.shape[1]):
            part = slice(run * columns, (run + 1) * columns)
            indices = state.indices[:, part]
            matrix, slope = normal(
                hessian[:, part, part], gradient[:, part], state.scale, indices,
                entries.shape[2], state.rows,
            )  # fmt: skip
            step = solve(matrix, slope)
            entries[:, run] += step
            matrices.append(matrix)
            if run + 1 < entries.shape[1]:
                change = state.spread(step).gather(1, indices) * state.scale[:, None]
                gradient += times(change, hessian[:, part])
        return entries, matrices

    def _round(self, entries: Tensor, matrices: list[Tensor], state: _State) -> _State:
        """Round solved entries to what is stored, the largest to the end of the 8-bit range."""
        if self.grid is None:
            return replace(state, entries=entries.half().float())
        peak = entries.abs().amax((1, 2)).clamp(min=1e-6) / self.grid.limit
        units = entries / peak[:, None, None]
        rounding = self.grid.round
        runs = [round_entries(units[:, b], matrix, rounding) for b, matrix in enumerate(matrices)]
        scale = representable(state.scale * state.spread(peak))
        return replace(state, entries=torch.stack(runs, 1), scale=scale)


@dataclass(frozen=True)
class _State:
    """A clustering in progress.

    Attributes:
        entries: float32 ``[G, B, K]``, in units of the rows' scales.
        scale: float32 ``[out]``.
        indices: int64 ``[out, in]``.
        rows: Rows sharing a codebook.
    """

    entries: Tensor
    scale: Tensor
    indices: Tensor
    rows: int

    @property
    def table(self) -> Tensor:
        """What every index of a row stands for, ``[out, B, K]``."""
        return self.spread(self.entries) * self.scale[:, None, None]

    def values(self, columns: int) -> Tensor:
        """The weights that are stored, ``[out, in]``."""
        return look_up(self.table, self.indices, columns)

    def spread(self, x: Tensor) -> Tensor:
        """Repeat what codebooks have, ``[G, ...]``, for their rows, ``[out, ...]``."""
        return x.repeat_interleave(self.rows, 0)[: len(self.indices)]

    def per_codebook(self, x: Tensor) -> Tensor:
        """Sum what rows have, ``[out]``, over those sharing a codebook, ``[G]``."""
        padded = torch.nn.functional.pad(x, (0, -len(x) % self.rows))
        return padded.view(-1, self.rows).sum(1)

    def take(self, codebooks: Tensor) -> tuple[Tensor, _State]:
        """Select codebooks, int64 ``[m]``, ascending; return their rows too."""
        rows = codebooks[:, None] * self.rows + torch.arange(self.rows, device=codebooks.device)
        rows = rows[rows < len(self.indices)]
        part = _State(self.entries[codebooks], self.scale[rows], self.indices[rows], self.rows)
        return rows, part

    def put(self, codebooks: Tensor, rows: Tensor, part: _State) -> _State:
        """Return a copy with what ``take`` selected replaced."""
        return replace(
            self,
            entries=self.entries.index_copy(0, codebooks, part.entries),
            scale=self.scale.index_copy(0, rows, part.scale),
            indices=self.indices.index_copy(0, rows, part.indices),
        )

    def where(self, chosen: Tensor, other: _State) -> _State:
        """Take chosen codebooks ``[G]`` with their scales, and the others of ``other``."""
        return replace(
            self,
            entries=torch.where(chosen[:, None, None], self.entries, other.entries),
            scale=torch.where(self.spread(chosen), self.scale, other.scale),
        )

    def ascending(self, columns: int) -> _State:
        """Sort the entries and rename the indices."""
        entries, order = self.entries.sort(stable=True)
        names = self.spread(order.argsort(-1))
        return replace(self, entries=entries, indices=look_up(names, self.indices, columns))
