"""A palette with gradients: what ``dkm`` trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze.kernels import bits as packing
from squeeze.quant.weights._palette import Grid, join, representable, split
from squeeze.saved_tensors import SavedTensors
from squeeze.types import ClusteredWeight

# Of the way to its entry that a weight keeps from the border of its cell.
MARGIN = {"attention": 0.05, "straight": 0.3}


class Student(nn.Module):
    """A palette with gradients; ``weight`` is what it stands for, ``packed`` how it is stored.

    Parameters: ``entries`` ``[P, K]`` of P codebooks, in units of ``unit``; ``log_scale``
    ``[out]``, relative; after ``soften`` also ``latent`` ``[P, n]``, the weights that attend.
    """

    indices: Tensor
    inside: Tensor
    unit: Tensor

    def __init__(self, method: Any, dense: Tensor, packed: ClusteredWeight) -> None:
        super().__init__()
        self.method, self.shape = method, packed.shape
        self.rows, self.columns = packed.rows, packed.columns
        indices = split(_indices(packed), self.rows, self.columns)
        self.grid = indices.shape
        self.eight_bits: Grid | None = method.grid
        if packed.scale is not None and self.eight_bits:
            unit = packed.scale.float() * self.eight_bits.limit
            codebook = self.eight_bits.load(packed.codebook).flatten(0, 1) / self.eight_bits.limit
        else:
            codebook = packed.codebook.float().flatten(0, 1)
            peak = codebook.abs().amax().clamp(min=1e-12)
            unit = peak.expand(self.shape[0]).clone()
            codebook = codebook / peak
        self.entries = nn.Parameter(codebook)
        self.log_scale = nn.Parameter(
            torch.zeros_like(unit), requires_grad=packed.scale is not None
        )
        self.latent: nn.Parameter | None = None
        self.register_buffer("unit", unit)
        self.register_buffer("indices", indices.flatten(2).flatten(0, 1))
        inside = split(torch.ones(self.shape, device=dense.device), self.rows, self.columns)
        self.register_buffer("inside", inside.flatten(2).flatten(0, 1).bool(), persistent=False)

    def weight(self, saved: SavedTensors | None = None) -> Tensor:
        """Return the weight, float32 ``[out, in]``, as it will be stored."""
        if self.latent is None:
            entries = _through(self.entries, self._stored_entries())
            values = entries.gather(1, self.indices.long())
        else:
            values = self._attend(self.latent, saved or SavedTensors())
        return join(values.view(self.grid), *self.shape) * self._scale()[:, None]

    @torch.no_grad()
    def soften(self, dense: Tensor) -> None:
        """Free the indices: let weights attend, each from within the cell it is in.

        Args:
            dense: ``[out, in]``; moved so that the mean of a cell's weights is its entry.
        """
        entries, order = self._stored_entries().sort(-1)
        indices = order.argsort(-1).gather(1, self.indices.long())
        self.entries.copy_(self.entries.gather(1, order))
        self.indices = indices.to(torch.uint8)
        units = split(dense.float() / self._scale()[:, None], self.rows, self.columns)
        own = entries.gather(1, indices)
        offset = units.flatten(2).flatten(0, 1) - own
        count = torch.zeros_like(entries).scatter_add_(1, indices, self.inside.float())
        total = torch.zeros_like(entries).scatter_add_(1, indices, offset * self.inside)
        offset = offset - (total / count.clamp(min=1)).gather(1, indices)
        middle = (entries[:, 1:] + entries[:, :-1]) / 2
        edge = entries.new_full((len(entries), 1), 2.0)
        low = torch.cat([-edge, middle], 1).gather(1, indices) - own
        high = torch.cat([middle, edge], 1).gather(1, indices) - own
        kept = 1 - MARGIN[self.method.derivative]
        offset = torch.minimum(torch.maximum(offset, low * kept), high * kept)
        self.latent = nn.Parameter(own + offset)

    @torch.no_grad()
    def packed(self) -> ClusteredWeight:
        """Store the palette, entries ascending."""
        entries, indices = self._stored_entries(), self.indices.long()
        if self.latent is not None:
            x = _through(self.latent, self.latent.bfloat16().float())
            entries = self._round(self._means(x, self.entries)[0])
            indices = _nearest(x, entries)
        entries, order = entries.sort(-1)
        indices = order.argsort(-1).gather(1, indices)
        shape = (self.grid[0], self.grid[1], entries.shape[1])
        indices = join(indices.view(self.grid), *self.shape).to(torch.uint8)
        if self.eight_bits is None:
            return self.method.pack(indices, (entries * self.unit[0]).view(shape).half(), None)
        limit, on_grid = self.eight_bits.limit, self.eight_bits.round
        codebook = self.eight_bits.store(on_grid(entries * limit)).view(shape)
        return self.method.pack(indices, codebook, (self._scale() / limit).half())

    def _attend(self, latent: Tensor, saved: SavedTensors) -> Tensor:
        """Nearest entries; a weight's derivative is that of what it attends to.

        Entries have the derivative of their own members and not of the attention: moving an entry
        also moves the borders of cells, and that part of its gradient is mostly noise.
        """
        x = _through(latent, latent.bfloat16().float())
        if self.method.iterations:
            with saved.rows_of(x.detach().bfloat16()):
                entries, share = self._means(x, self.entries)
                soft = (share @ entries.detach()[..., None])[..., 0]
        else:
            # Nothing of the attention is kept for backward but its derivative in closed form.
            straight = self.method.derivative == "straight"
            entries, soft = self.entries, x if straight else x * self._slope(x.detach())
        entries = _through(entries, self._round(entries.detach()))
        hard = entries.gather(1, _nearest(x.detach(), entries.detach()))
        return hard + (soft - soft.detach())

    def _means(self, x: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to entries, moving them to the means of their weights ``iterations`` times.

        Returns:
            The entries ``[P, K]`` and the attention ``[P, n, K]``.
        """
        heat = self._heat(entries.detach())
        for _ in range(self.method.iterations):
            mass = _attention(x, entries, heat) * self.inside[..., None]
            total = mass.sum(1)
            means = (mass * x[..., None]).sum(1) / total.clamp(min=1e-6)
            entries = torch.where(total > 1e-3, means, entries)
        return entries, _attention(x, entries.detach(), heat)

    @torch.no_grad()
    def _slope(self, x: Tensor) -> Tensor:
        """Derivative of ``sum_j a_j c_j`` by x: ``2 / tau`` times the variance of c under a."""
        heat = self._heat(self.entries)
        share = _attention(x, self.entries, heat)
        moments = share @ torch.stack([self.entries, self.entries.square()], -1)
        variance = moments[..., 1] - moments[..., 0].square()
        return 2 / heat[..., 0] * variance.clamp(min=0)

    def _heat(self, entries: Tensor) -> Tensor:
        """tau, in squares of ``unit``, ``[P, 1, 1]``."""
        gap = (entries.amax(1) - entries.amin(1)) / max(1, entries.shape[1] - 1)
        return (self.method.temperature * gap.square()).clamp(min=1e-12)[:, None, None]

    def _round(self, entries: Tensor) -> Tensor:
        """Round entries in units of ``unit`` to what is stored."""
        if self.eight_bits:
            return self.eight_bits.round(entries * self.eight_bits.limit) / self.eight_bits.limit
        return (entries * self.unit[0]).half().float() / self.unit[0]

    def _stored_entries(self) -> Tensor:
        return self._round(self.entries.detach())

    def _scale(self) -> Tensor:
        """What a row's entries are multiplied by, ``[out]``."""
        scale = self.unit * self.log_scale.exp()
        if self.eight_bits is None:
            return scale
        limit = self.eight_bits.limit
        return _through(scale, representable(scale.detach() / limit) * limit)


def _attention(x: Tensor, entries: Tensor, heat: Tensor) -> Tensor:
    """``softmax_j(-(x - c_j)^2 / heat)``, ``[P, n, K]``."""
    return functional.softmax(-(x[..., None] - entries[:, None]).square() / heat, -1)


def _through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of ``x``."""
    return x + (value - x).detach()


def _nearest(x: Tensor, entries: Tensor) -> Tensor:
    """Index of the entry nearest to each of ``x`` ``[P, n]``, int64; entries in any order."""
    ordered, order = entries.sort(-1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
    return order.gather(1, torch.searchsorted(middles, x.contiguous()))


def _indices(weight: ClusteredWeight) -> Tensor:
    """Unpack the indices, uint8 ``[out, in]``."""
    padded = -(-weight.shape[1] // 32) * 32
    indices = packing.unpack(weight.indices, weight.bits, padded)
    return indices[:, : weight.shape[1]].to(torch.uint8)
