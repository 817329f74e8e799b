"""Check the arguments of one-dimensional k-means and turn boundaries into codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels.kmeans1d import reference

FLOOR = 1e-9  # least weight, as a share of the mean: a value nobody needs still has a place
ITERATIONS = 8  # of a search for a local optimum, between exchanges


def kmeans1d(
    values: Tensor, weights: Tensor | None = None, *, clusters: int, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Cluster every row of scalars so that the weighted squared error is the least possible.

    Minimises ``sum_i w_i (x_i - c(i))^2`` over all sets of ``clusters`` centroids, exactly (up to
    float64 rounding): not a local optimum, and the same on every run. With at most ``clusters``
    distinct values in a row, the row is reproduced and the last centroid is repeated.

    Args:
        values: ``[P, n]``, any floating dtype, finite, not necessarily sorted.
        weights: ``[P, n]``, at least 0; a row whose weights sum to 0 is unweighted. ``None`` is
            unweighted.
        clusters: Number of centroids, 1 to 256.
        exact: ``False`` stops at a local optimum, a few per cent off: Lloyd's iterations from
            centroids as dense as the cube root of the values, and exchanges. Faster, for those who
            refine the result.
    Returns:
        centroids float32 ``[P, clusters]`` ascending, and indices uint8 ``[P, n]``, each value's
        nearest centroid; both on the device of ``values``.
    Raises:
        ValueError: shapes, number of clusters, negative or non-finite entries.
    Cost: memory O(n) per problem in flight; time O(n log n) per sweep, about ten sweeps, whatever
        the number of clusters.
    Source: the objective and its exact solution, H. Wang and M. Song 2011 (Ckmeans.1d.dp); the
        penalty search, A. Gronlund et al. 2017, https://arxiv.org/abs/1701.07204, and, with the
        splicing of tied paths, A. Aggarwal, B. Schieber, T. Tokuyama 1994. Centroids of a good
        quantizer by the cube root of the density: P. Panter and W. Dite 1951.
    Differs: one penalty is solved by policy iteration over row maxima, which runs as tensor
        operations over all problems, and not by a sequential queue. Weights below 1e-9 of a
        row's mean count as that much.
    """
    _check(values, weights, clusters)
    if not len(values):
        empty = torch.empty(0, clusters, device=values.device)
        return empty, torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    order = values.argsort(dim=1, stable=True)
    ranked = values.gather(1, order).double()
    mass = torch.ones_like(ranked) if weights is None else weights.gather(1, order).double()
    mean = mass.mean(1, keepdim=True)
    mass = torch.where(mean > 0, (mass / mean.clamp(min=1e-300)).clamp(min=FLOOR), 1.0)
    if exact:
        bounds = reference.partition(ranked, mass, clusters)
    else:
        bounds = reference.descend(ranked, mass, clusters, ITERATIONS)
    centroids = _centroids(ranked, mass, bounds)
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    indices = torch.searchsorted(middles, values.double())
    return centroids.float(), indices.to(torch.uint8)


def _centroids(values: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    """Weighted mean of every run; an empty run repeats the last value."""
    zero = values.new_zeros(len(values), 1)
    anchor = values[:, :1]
    mass = torch.cat([zero, weights.cumsum(1)], dim=1).gather(1, bounds).diff()
    moments = torch.cat([zero, (weights * (values - anchor)).cumsum(1)], dim=1)
    means = anchor + moments.gather(1, bounds).diff() / mass
    lows = values.gather(1, bounds[:, :-1].clamp(max=values.shape[1] - 1))
    highs = values.gather(1, (bounds[:, 1:] - 1).clamp(min=0))
    # A mean of prefix sums may leave its run by rounding; equal values must give that value.
    return torch.where(mass > 0, means.maximum(lows).minimum(highs), values[:, -1:])


def _check(values: Tensor, weights: Tensor | None, clusters: int) -> None:
    """Refuse what the search cannot handle."""
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"values must be [P, n] with n > 0, got {tuple(values.shape)}")
    if not 1 <= clusters <= 256:
        raise ValueError(f"clusters must be 1 to 256, got {clusters}")
    if not bool(values.isfinite().all()):
        raise ValueError("values must be finite")
    if weights is None:
        return
    if weights.shape != values.shape:
        raise ValueError(f"weights are {tuple(weights.shape)}, values {tuple(values.shape)}")
    if not bool(weights.isfinite().all() and (weights >= 0).all()):
        raise ValueError("weights must be finite and at least 0")
