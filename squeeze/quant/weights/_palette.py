"""What palette methods share: who shares a codebook, sizes, packing, and weighted k-means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels import bits as packing
from squeeze.kernels.kmeans1d.api import centroids1d
from squeeze.types import ClusteredWeight

STEPS = 48  # candidate scales per codebook, down to 70% of the largest
REFITS = 3  # rounds of scale, entries and indices against one another
WORKING = 2**25  # weights clustered together: some 100 bytes each are in flight


@dataclass(frozen=True)
class Grid:
    """Numbers that 8 bits hold, which a scale per output row multiplies.

    Attributes:
        dtype: What they are stored in; uint8 stands for the bits of E4M3.
        limit: The largest.
    """

    dtype: torch.dtype
    limit: int

    def round(self, entries: Tensor) -> Tensor:
        """Round to the nearest of them, kept in float32."""
        inside = entries.clamp(-self.limit, self.limit)
        if self.dtype == torch.int8:
            return inside.round()
        return inside.to(torch.float8_e4m3fn).float() + 0.0  # no negative zero

    def store(self, entries: Tensor) -> Tensor:
        """Store what ``round`` returned."""
        if self.dtype == torch.int8:
            return entries.to(torch.int8)
        return entries.to(torch.float8_e4m3fn).view(torch.uint8)

    def load(self, stored: Tensor) -> Tensor:
        """Undo ``store``, to float32."""
        wide = stored if self.dtype == torch.int8 else stored.view(torch.float8_e4m3fn)
        return wide.float()


GRIDS = {"int8": Grid(torch.int8, 127), "float8": Grid(torch.uint8, 448)}


@dataclass(frozen=True)
class Palette:
    """Indices into codebooks of ``2**bits`` entries, packed densely: 3 bits cost 3 bits.

    Attributes:
        bits: Width of an index.
        granularity: What shares a codebook: the tensor, a block of output rows, a row, or a tile
            of 8 rows by 64 columns.
        rows_per_codebook: Rows of a block when granularity is ``rows``.
        entries: ``float16`` entries, or ``int8`` or ``float8`` (E4M3) entries times a float16 scale
            per output row.
        inputs: ``float8`` rounds the inputs of each token to E4M3 under a scale of its own, so that
            float8 tensor cores multiply them by ``float8`` entries; ``None`` leaves them.
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 4
    granularity: Literal["tensor", "rows", "row", "tile"] = "row"
    rows_per_codebook: Annotated[int, Field(ge=1)] = 8
    entries: Literal["float16", "int8", "float8"] = "int8"
    inputs: Literal["float8"] | None = None

    @property
    def grid(self) -> Grid | None:
        """What entries are rounded to where rows have a scale; ``None`` for ``float16``."""
        return GRIDS.get(self.entries)

    def cluster(
        self, dense: Tensor, mass: Tensor, exact: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Minimise the weighted squared error by k-means.

        Args:
            dense: float32 ``[out, in]``.
            mass: What an error of each weight counts, float32 ``[out, in]``, at least 0.
            exact: Whether the centroids are the best there are, or a start for something better.
        Returns:
            indices uint8 ``[out, in]``, codebooks ``[G, B, 2**bits]`` as stored, and the scales
            float16 ``[out]``, or ``None``.
        """
        out_features, in_features = dense.shape
        rows, columns = self.sharing(out_features, in_features)
        height = max(1, WORKING // (rows * in_features)) * rows
        parts = zip(dense.split(height), mass.split(height), strict=True)
        found = [
            self._fit_blocks(split(x, rows, columns), split(m, rows, columns), exact)
            for x, m in parts
        ]
        indices, codebook, scale = (list(each) for each in zip(*found, strict=True))
        joined = join(torch.cat(indices), out_features, in_features)
        if self.grid is None:
            return joined, torch.cat(codebook), None
        whole = torch.cat([x[:, 0].flatten() for x in scale])
        return joined, torch.cat(codebook), whole[:out_features].contiguous()

    def _fit_blocks(
        self, values: Tensor, mass: Tensor, exact: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fit blocks ``[G, B, rows, columns]``; without a grid the scales are empty."""
        if self.grid is None:
            return *_fit_plain(values, mass, 2**self.bits, exact), values.new_empty(0, 1)
        return _fit_scaled(values, mass, 2**self.bits, exact, self.grid)

    def pack(self, indices: Tensor, codebook: Tensor, scale: Tensor | None) -> ClusteredWeight:
        """Store what ``cluster`` returned."""
        shape = (indices.shape[0], indices.shape[1])
        padded = torch.nn.functional.pad(indices, (0, -shape[1] % 32))
        return ClusteredWeight(
            packing.pack(padded, self.bits),
            codebook.contiguous(),
            scale,
            self.bits,
            shape,
            *self.sharing(*shape),
            inputs=self.inputs,
        )

    def empty(
        self, out_features: int, in_features: int, device: torch.device | str
    ) -> ClusteredWeight:
        """Allocate a packed weight of these parameters with undefined contents."""
        rows, columns = self.sharing(out_features, in_features)
        words = packing.words(-(-in_features // 32) * 32, self.bits)
        groups = (-(-out_features // rows), -(-in_features // columns))
        scaled = self.grid is not None
        entries = self.grid.dtype if self.grid else torch.float16
        return ClusteredWeight(
            torch.empty(out_features, words, dtype=torch.int32, device=device),
            torch.empty(*groups, 2**self.bits, dtype=entries, device=device),
            torch.empty(out_features, dtype=torch.float16, device=device) if scaled else None,
            self.bits,
            (out_features, in_features),
            rows,
            columns,
            inputs=self.inputs,
        )

    def shape_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a matrix of this shape will take, all tensors included."""
        return self.empty(out_features, in_features, "meta").nbytes

    def shape_bits(self, out_features: int, in_features: int) -> float:
        """Effective bits per weight of a matrix of this shape."""
        return self.empty(out_features, in_features, "meta").effective_bits

    def check(self, out_features: int, in_features: int) -> None:
        """Refuse shapes on which this would not save anything.

        Raises:
            UnsupportedError: codebooks and indices take 16 bits per weight or more; or inputs are
                rounded to E4M3 and entries are not.
        """
        if self.inputs and self.entries != "float8":
            raise UnsupportedError(
                f"{type(self).__name__.lower()}: inputs",
                f"inputs in {self.inputs} and entries in {self.entries}",
                "entries in float8",
                "Set entries: float8 too, or leave inputs out",
            )
        effective = self.shape_bits(out_features, in_features)
        if effective >= 16:
            raise UnsupportedError(
                f"{type(self).__name__.lower()} on a [{out_features}, {in_features}] weight",
                f"{effective:.1f} effective bits per weight, codebooks included",
                "less than 16",
                "Choose fewer bits or a coarser granularity, or ignore this module",
            )

    def sharing(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns that share one codebook."""
        return {
            "tensor": (out_features, in_features),
            "rows": (min(self.rows_per_codebook, out_features), in_features),
            "row": (1, in_features),
            "tile": (8, 64),
        }[self.granularity]


def split(x: Tensor, rows: int, columns: int) -> Tensor:
    """View ``[out, in]`` as blocks ``[G, B, rows, columns]``, zero-padded at the far edges."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return x.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)


def join(blocks: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo ``split``."""
    return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:out_features, :in_features]


def _cluster(values: Tensor, mass: Tensor, clusters: int, exact: bool) -> Tensor:
    """Centroids of every block: ``[G, B, rows, columns]`` to ``[G, B, clusters]``."""
    flat, weights = values.flatten(2).flatten(0, 1), mass.flatten(2).flatten(0, 1)
    found = centroids1d(flat, weights, clusters=clusters, exact=exact)
    return found.float().view(*values.shape[:2], clusters)


def _assign(values: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest entry of each block's ascending codebook, uint8, like ``values``."""
    middles = ((codebook[..., 1:] + codebook[..., :-1]) / 2).contiguous()
    found = torch.searchsorted(middles, values.flatten(2).contiguous())
    return found.view(values.shape).to(torch.uint8)


def _fit_plain(values: Tensor, mass: Tensor, clusters: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Cluster the weights themselves; entries are the centroids in float16."""
    codebook = _cluster(values, mass, clusters, exact).half()
    return _assign(values, codebook.float()), codebook


def _fit_scaled(
    values: Tensor, mass: Tensor, clusters: int, exact: bool, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster rows in units of their scale, round the entries, then refit all three in turn.

    Returns:
        indices uint8 ``[G, B, rows, columns]``, entries ``[G, B, K]`` as stored, and the scale
        float16 ``[G, B, rows]``, equal for all B (a row has one scale).
    """
    scale = representable(values.abs().amax(dim=(1, 3)) / grid.limit)[:, None, :, None]
    units = mass * scale.square()
    centroids = _cluster(values / scale, units, clusters, exact)
    indices = _assign(values / scale, centroids)
    factor = _best_factor(centroids, _per_code(units, indices, clusters), grid)
    scale = representable(scale * factor[:, :, None, None])
    entries = grid.round(centroids / factor[..., None])
    indices = _assign(values / scale, entries)
    best = _error(values, mass, scale, entries, indices)
    for _ in range(REFITS):
        decoded = _decode(entries, indices)
        ratio = (mass * values * decoded).sum((1, 3), keepdim=True)
        power = (mass * decoded.square()).sum((1, 3), keepdim=True)
        trial_scale = representable(torch.where(ratio > 0, ratio / power, scale))
        units = mass * trial_scale.square()
        weight = _per_code(units, indices, clusters)
        moment = _per_code(units * values / trial_scale, indices, clusters)
        trial = torch.where(weight > 0, moment / weight, entries)
        trial = grid.round(trial).sort(-1).values
        trial_indices = _assign(values / trial_scale, trial)
        error = _error(values, mass, trial_scale, trial, trial_indices)
        better = (error < best)[:, None, None]
        best = torch.minimum(error, best)
        entries = torch.where(better, trial, entries)
        scale = torch.where(better[..., None], trial_scale, scale)
        indices = torch.where(better[..., None], trial_indices, indices)
    return indices, grid.store(entries), scale[..., 0].expand(-1, 1, -1).half()


def _best_factor(centroids: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """Factor on the scales under which rounding the centroids costs least, ``[G, 1]``.

    Centroids are in units of the scale, at most the grid's limit; one factor serves all blocks of
    the rows.
    """
    peak = centroids.abs().amax((1, 2)).clamp(min=1e-6) / grid.limit
    best = torch.full_like(peak, torch.inf)
    result = peak.clone()
    for share in torch.linspace(1.0, 1 / 0.7, STEPS).tolist():
        factor = peak * share
        near = grid.round(centroids / factor[:, None, None]) * factor[:, None, None]
        error = (weight * (centroids - near).square()).sum((1, 2))
        result = torch.where(error < best, factor, result)
        best = torch.minimum(error, best)
    return result[:, None]


def _per_code(x: Tensor, indices: Tensor, clusters: int) -> Tensor:
    """Sum ``x`` over the values of each entry: ``[G, B, K]``."""
    if x.device.type == "cuda":  # adding there in no fixed order would make no two fits alike
        parts = [(x * (indices == code)).sum((2, 3)) for code in range(clusters)]
        return torch.stack(parts, 2)
    sums = x.new_zeros(*x.shape[:2], clusters)
    return sums.scatter_add_(2, indices.flatten(2).long(), x.flatten(2))


def _decode(entries: Tensor, indices: Tensor) -> Tensor:
    """Look entries up."""
    return entries.gather(2, indices.flatten(2).long()).view(indices.shape)


def _error(values: Tensor, mass: Tensor, scale: Tensor, entries: Tensor, indices: Tensor) -> Tensor:
    """Weighted squared error of every row of blocks, ``[G]``."""
    return (mass * (values - scale * _decode(entries, indices)).square()).sum((1, 2, 3))


def representable(scale: Tensor) -> Tensor:
    """Round to what float16 and bfloat16 both hold, at least 2**-24, kept in float32.

    Both, so that formats which keep scales in the model's dtype carry the same weights.
    """
    return scale.clamp(2.0**-24, 65000.0).bfloat16().half().float()
