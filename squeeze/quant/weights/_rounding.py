"""Rounding to even steps per group of columns: to the nearest, or with GPTQ's error feedback."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors wait before they reach the columns after them
E4M3 = 448.0  # its largest value
TOP = 8  # exponent under which a row's largest E4M3 scale is kept: grids of GPTQ still grow
TRIES = 8  # dampings, each ten times the one before, until the Hessian has a Cholesky factor


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for: ``(code - zero) * scale``.

    Attributes:
        scale: float32 ``[out, n]``, float16 values, for n groups or n columns.
        zero: float32 ``[out, n]``, whole, 0 to ``levels - 1``.
        levels: Number of codes.
    """

    scale: Tensor
    zero: Tensor
    levels: int

    def encode(self, x: Tensor) -> Tensor:
        """Give the nearest code of every value, float32."""
        return (torch.round(x / self.scale) + self.zero).clamp(0, self.levels - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Give the values of codes."""
        return (codes - self.zero) * self.scale

    def columns(self, group: Tensor) -> Grid:
        """Repeat the groups over the columns that belong to them, int64 ``[in]``."""
        return Grid(self.scale[:, group], self.zero[:, group], self.levels)


def fit_grid(groups: Tensor, bits: int, symmetric: bool, row: Tensor | None = None) -> Grid:
    """Span the values of every group, zero included.

    Without ``row`` none is clipped; scales rounded down to E4M3 clip the largest by up to a step.

    Args:
        groups: float32 ``[out, n, G]``.
        bits: Width of a code.
        symmetric: Zero at the middle code; else at the code where the range puts it.
        row: float32 ``[out]``, see ``row_scales``: scales are E4M3 values times these.
    Returns:
        A grid of ``[out, n]``. Groups of zeros have scale 1, times ``row``.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    levels = 2**bits
    scale = _representable(_steps(low, high, bits, symmetric), row)
    if symmetric:
        return Grid(scale, torch.full_like(scale, levels // 2), levels)
    return Grid(scale, torch.round(-low / scale).clamp(0, levels - 1), levels)


def row_scales(weight: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Choose powers of two under which E4M3 holds the scales of every row's groups.

    A row's largest scale is at most 256 of them, so that others may be 2**17 times smaller. E4M3
    times these is exact in float16.

    Args:
        weight: float32 ``[out, in]``.
    Returns:
        float32 ``[out]``.
    """
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    exponent = _steps(low, high, bits, symmetric).log2().ceil() - TOP
    return torch.exp2(exponent.clamp(-15, 7))  # 2**-9 * 2**-15 and 448 * 2**7 are float16's ends


def _steps(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Give the least even steps that reach from ``low`` to ``high``."""
    middle = 2 ** (bits - 1)
    if symmetric:
        return torch.maximum(high / (middle - 1), -low / middle)
    return (high - low) / (2**bits - 1)


def _representable(scale: Tensor, row: Tensor | None) -> Tensor:
    """Round to what float16 and bfloat16 both hold, kept in float32; 0 becomes 1.

    Both, so that readers which keep scales in the model's dtype see the same weights. With ``row``
    to E4M3 values times it.
    """
    if row is not None:
        own = torch.where(scale > 0, scale / row[:, None], 1.0).clamp(2.0**-9, E4M3)
        return own.to(torch.float8_e4m3fn).float() * row[:, None]
    rounded = scale.clamp(2.0**-24, 65000.0).bfloat16().half().float()
    return torch.where(scale > 0, rounded, 1.0)


def split(x: Tensor, group_size: int) -> Tensor:
    """View ``[out, in]`` as groups ``[out, n, G]``, the last one padded with zeros."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % group_size))
    return x.unflatten(1, (-1, group_size))


def round_nearest(
    weight: Tensor, group_size: int, bits: int, symmetric: bool, row: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """Round every weight to the nearest value of its group's grid.

    Returns:
        codes float32 ``[out, in]``, and the grid of the groups.
    """
    grid = fit_grid(split(weight, group_size), bits, symmetric, row)
    group = torch.arange(weight.shape[1], device=weight.device) // group_size
    return grid.columns(group).encode(weight), grid


def round_gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    by_activation: bool,
    damping: float,
    row: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """Round column by column, letting later columns make up for the errors of earlier ones.

    With ``U`` the upper Cholesky factor of the inverse Hessian, column i's error divided by
    ``U[i, i]`` and multiplied by ``U[i, j]`` is taken off every later column j.

    Args:
        weight: float32 ``[out, in]``.
        hessian: float32 ``[in, in]``, the mean of ``x x^T``.
        group_size: Columns sharing a grid.
        bits: Width of a code.
        symmetric: See ``fit_grid``.
        by_activation: Round columns with large inputs first; grids are then those of the weight
            as it was. Otherwise columns go in order and a group's grid is that of its columns as
            they are when their turn comes.
        damping: Share of the mean diagonal added to the diagonal.
        row: float32 ``[out]``, see ``fit_grid``.
    Returns:
        codes float32 ``[out, in]``, and the grid of the groups.
    """
    count = weight.shape[1]
    diagonal = hessian.diagonal()
    order = torch.arange(count, device=weight.device)
    if by_activation:
        order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    group = (order // group_size).tolist()
    grid = fit_grid(split(weight, group_size), bits, symmetric, row)
    work = weight[:, order].t().contiguous()  # [in, out]: a column is one run of memory
    codes = torch.empty_like(work)
    for start, stop in _blocks(count, count if by_activation else group_size):
        if not by_activation and start % group_size == 0:
            columns = work[start : start + group_size].t().unsqueeze(1)  # [out, 1, G]
            _refit(grid, start // group_size, fit_grid(columns, bits, symmetric, row))
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop):
            own = Grid(grid.scale[:, group[i]], grid.zero[:, group[i]], grid.levels)
            codes[i] = own.encode(work[i])
            errors[i - start] = (work[i] - own.decode(codes[i])) / factor[i, i]
            work[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(weight)
    result[:, order] = codes.t()
    return result, grid


def _blocks(count: int, group_size: int) -> list[tuple[int, int]]:
    """Cut columns into blocks of at most ``BLOCK`` that lie inside groups."""
    starts = [
        start
        for group in range(0, count, group_size)
        for start in range(group, min(group + group_size, count), BLOCK)
    ]
    return list(zip(starts, [*starts[1:], count], strict=True))


def _refit(grid: Grid, group: int, own: Grid) -> None:
    """Give one group the grid ``[out, 1]`` of its columns as they are now."""
    grid.scale[:, group], grid.zero[:, group] = own.scale[:, 0], own.zero[:, 0]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32 ``[in, in]``.

    Channels that were never active have no interaction with others: they are rounded to the
    nearest value and take no part.
    """
    work = hessian.double()
    diagonal = work.diagonal()  # a view
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    diagonal += torch.where(dead, mean, 0.0)
    own = diagonal.clone()
    for attempt in range(TRIES):
        diagonal.copy_(own + mean * damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(work)
        if not failed:
            del work
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    raise ValueError("the Hessian is not positive semidefinite, however much it is damped")
