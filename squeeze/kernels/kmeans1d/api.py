"""Check the arguments of one-dimensional k-means and turn boundaries into codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.errors import DeviceError
from squeeze.kernels.kmeans1d import reference
from squeeze.kernels.linear_checks import by_triton
from squeeze.types import Implementation

FLOOR = 1e-9  # least weight, as a share of the mean: a value nobody needs still has a place
PLACE = "kernels.kmeans1d"
LONGEST = 65535  # values of a row that the kernel numbers in 16 bits
ITERATIONS = 8  # of a search for a local optimum, between exchanges


def kmeans1d(
    values: Tensor,
    weights: Tensor | None = None,
    *,
    clusters: int,
    exact: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster every row of scalars so that the weighted squared error is the least possible.

    Returns:
        centroids float32 ``[P, clusters]`` ascending, and indices uint8 ``[P, n]``, each value's
        nearest centroid; both on the device of ``values``.

    Everything else is as ``centroids1d`` has it.
    """
    centers = centroids1d(
        values, weights, clusters=clusters, exact=exact, implementation=implementation
    )
    middles = (centers[:, 1:] + centers[:, :-1]) / 2
    return centers.float(), torch.searchsorted(middles, values.double()).to(torch.uint8)


def centroids1d(
    values: Tensor,
    weights: Tensor | None = None,
    *,
    clusters: int,
    exact: bool = True,
    implementation: Implementation | None = None,
) -> Tensor:
    """Find for every row of scalars the centroids whose weighted squared error is the least.

    Minimises ``sum_i w_i (x_i - c(i))^2`` over all sets of ``clusters`` centroids, exactly (up to
    float64 rounding): not a local optimum, and the same on every run. With at most ``clusters``
    distinct values in a row, the row is reproduced and the last centroid is repeated.

    Args:
        values: ``[P, n]``, any floating dtype, finite, not necessarily sorted.
        weights: ``[P, n]``, at least 0; a row whose weights sum to 0 is unweighted. ``None`` is
            unweighted.
        clusters: Number of centroids, 1 to 256.
        exact: ``False`` may stop at a local optimum, a few per cent off: Lloyd's iterations from
            centroids as dense as the cube root of the values, and exchanges. Faster for the
            reference, for those who refine the result; the kernel is exact all the same.
        implementation: ``reference``, in torch, or ``triton``, for rows of at most 65535 values.
            ``None`` is ``triton`` wherever it runs on a GPU, else ``reference``.
    Returns:
        float64 ``[P, clusters]``, ascending, on the device of ``values``.
    Raises:
        ValueError: shapes, number of clusters, negative or non-finite entries, or ``auto``.
        DeviceError: ``triton`` without Triton, a GPU or the interpreter, or on longer rows.
    Cost: memory O(n) per problem in flight. The reference: O(n log n) time per sweep, about ten
        sweeps, whatever the number of clusters. The kernel: about ``35 clusters + n / 40`` gains
        per value; 20 bytes per value for sorting, and at most 1 GiB of scratch memory.
    Source: the objective and its exact solution, H. Wang and M. Song 2011 (Ckmeans.1d.dp), whose
        layers and bounds the kernel has; the penalty search, A. Gronlund et al. 2017,
        https://arxiv.org/abs/1701.07204, and, with the splicing of tied paths, A. Aggarwal,
        B. Schieber, T. Tokuyama 1994. Centroids of a good quantizer by the cube root of the
        density: P. Panter and W. Dite 1951.
    Differs: one penalty is solved by policy iteration over row maxima, which runs as tensor
        operations over all problems, and not by a sequential queue; a layer of the kernel is
        divided once, into blocks, and not recursively. Weights below 1e-9 of a row's mean count as
        that much.
    """
    _check(values, weights, clusters)
    kernel = _choose(implementation, values)
    if not len(values):
        return torch.empty(0, clusters, dtype=torch.float64, device=values.device)
    ranked, order = values.sort(dim=1, stable=True)
    given = None if weights is None else weights.gather(1, order)
    del order
    if kernel:
        from squeeze.kernels.kmeans1d import triton

        return triton.centroids(ranked, given, clusters, FLOOR)
    ranked = ranked.double()
    mass = torch.ones_like(ranked) if given is None else given.double()
    mean = mass.mean(1, keepdim=True)
    mass = torch.where(mean > 0, (mass / mean.clamp(min=1e-300)).clamp(min=FLOOR), 1.0)
    if exact:
        bounds = reference.partition(ranked, mass, clusters)
    else:
        bounds = reference.descend(ranked, mass, clusters, ITERATIONS)
    return _centroids(ranked, mass, bounds)


def _choose(implementation: Implementation | None, values: Tensor) -> bool:
    """Whether the kernel finds the centroids."""
    kernel = by_triton(PLACE, values, implementation)
    if not kernel or values.shape[1] <= LONGEST:
        return kernel
    if implementation is None:
        return False
    received = f"implementation triton for {values.shape[1]} values in a row"
    raise DeviceError(PLACE, received, f"at most {LONGEST}")


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
