"""Exact weighted one-dimensional k-means as a shortest path with a fixed number of edges.

A clustering of n sorted values is a path over the n + 1 gaps around them, an edge (i, j) one
cluster. Its gain (M_j - M_i)^2 / (W_j - W_i), from prefix sums of w and w x, is what it takes off
the inertia. Gains obey the inverse Monge condition, so the best path with K edges is also the best
path of any length once every edge costs some penalty, and its length falls as the penalty rises.
For one penalty the path is found by policy iteration; the improvement step is a row-maxima
problem, solved by divide and conquer. Every step is a tensor operation over all problems.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TINY = 1e-300  # divides sums of nothing
CHUNK = 1 << 18  # nodes searched together, so that the working set stays in a processor's cache
EQUAL = 1e-13  # difference of gains, as a share of the variance, that is rounding
TRIALS = 64  # penalties after which neighbouring optima are taken to tie


@dataclass(frozen=True)
class _Search:
    """One row per problem. ``previous[p, j]`` is where the edge into node j starts (the policy).

    ``low`` and ``high`` belong to the longest optimum with too few edges and to the shortest with
    too many found so far; a count of 0 says none.
    """

    weight: Tensor
    moment: Tensor
    previous: Tensor
    penalty: Tensor
    rounds: Tensor
    trials: Tensor
    low_count: Tensor
    low_gain: Tensor
    low_previous: Tensor
    high_count: Tensor
    high_gain: Tensor
    high_previous: Tensor

    def keep(self, rows: Tensor) -> _Search:
        """Drop the other rows."""
        return _Search(**{name: value[rows] for name, value in vars(self).items()})


def partition(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Return the boundaries of the best partitions of sorted values into runs.

    Args:
        values: float64 ``[P, n]``, ascending along the last dimension.
        weights: float64 ``[P, n]``, positive.
        clusters: Number of runs; with fewer distinct values the last runs are empty.
    Returns:
        int64 ``[P, clusters + 1]``: run c holds the values from boundary c up to boundary c + 1.
    Cost: O(n) memory per problem; about ten sweeps of O(n log n) gains, whatever ``clusters`` is.
    """
    size = max(1, CHUNK // values.shape[1])
    parts = zip(values.split(size), weights.split(size), strict=True)
    return torch.cat([_partition(x, w, clusters) for x, w in parts])


def descend(values: Tensor, weights: Tensor, clusters: int, iterations: int) -> Tensor:
    """Cut every sorted row where Lloyd's iterations, with exchanges between them, leave the cuts.

    An exchange joins the two neighbours that lose least by it and splits the run with the largest
    error. It is undone in rows that it does not help.

    Args:
        values: float64 ``[P, n]``, ascending.
        weights: float64 ``[P, n]``, positive.
        clusters: Runs of a row; some may be empty.
        iterations: Means and nearest values, in turn, after every exchange; there are as many
            exchanges as runs.
    Returns:
        int64 ``[P, clusters + 1]``, where runs start; the last column is n.
    """
    rows, count = values.shape
    zero = values.new_zeros(rows, 1)
    centred = values - (weights * values).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    sums = [torch.cat([zero, (weights * centred.pow(power)).cumsum(1)], 1) for power in range(3)]
    # Mass times gap squared is the cube of what a gap adds to a measure of equal errors.
    measure = (weights[:, 1:] * values.diff(dim=1).square()).pow(1 / 3).cumsum(1)
    measure = torch.cat([zero, measure], 1)
    wanted = (torch.arange(clusters, dtype=values.dtype, device=values.device) + 0.5) / clusters
    places = torch.searchsorted(measure, measure[:, -1:] * wanted).clamp(max=count - 1)
    centers, bounds, error = _lloyd(centred, sums, centred.gather(1, places), iterations)
    for _ in range(clusters if clusters > 2 else 0):
        trial = _lloyd(centred, sums, _exchanged(sums, centers, bounds), iterations)
        better = (trial[2] < error)[:, None]
        centers = torch.where(better, trial[0], centers)
        bounds = torch.where(better, trial[1], bounds)
        error = torch.minimum(error, trial[2])
    return bounds


def _lloyd(
    values: Tensor, sums: list[Tensor], centers: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Move centroids to the means of their values; return them, the cuts and each row's error."""
    first = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    bounds = first
    for _ in range(iterations):
        middles = (centers[:, 1:] + centers[:, :-1]) / 2
        found = torch.searchsorted(values, middles)
        bounds = torch.cat([first, found, first + values.shape[1]], 1)
        mass, moment = (x.gather(1, bounds).diff(dim=1) for x in sums[:2])
        means = moment / mass.clamp(min=TINY)
        centers = torch.where(mass > 0, means, centers).cummax(1).values
    return centers, bounds, _errors(sums, bounds).sum(1)


def _errors(sums: list[Tensor], bounds: Tensor) -> Tensor:
    """Squared error of every run around its mean."""
    mass, moment, square = (x.gather(1, bounds).diff(dim=1) for x in sums)
    return (square - moment.square() / mass.clamp(min=TINY)).clamp(min=0)


def _exchanged(sums: list[Tensor], centers: Tensor, bounds: Tensor) -> Tensor:
    """Centroids after joining the cheapest two neighbours and splitting the worst other run."""
    errors = _errors(sums, bounds)
    joined = [_errors(sums, bounds[:, [i, i + 2]]) for i in range(centers.shape[1] - 1)]
    cost = torch.cat(joined, 1) - errors[:, 1:] - errors[:, :-1]
    left = cost.argmin(1, keepdim=True)
    both = torch.cat([left, left + 1], 1)
    worst = errors.scatter(1, both, -1.0).argmax(1, keepdim=True)
    mass, moment = (x.gather(1, bounds).diff(dim=1) for x in sums[:2])
    mean = moment.gather(1, both).sum(1) / mass.gather(1, both).sum(1).clamp(min=TINY)
    spread = (errors / mass.clamp(min=TINY)).sqrt().gather(1, worst)
    middle = centers.gather(1, worst)
    result = centers.scatter(1, left, mean[:, None]).scatter(1, left + 1, middle + spread)
    return result.scatter(1, worst, middle - spread).sort(1).values


def _partition(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Solve one chunk; finished problems leave the search."""
    n = values.shape[1]
    result = torch.full((len(values), clusters + 1), n, device=values.device)
    first = torch.cat([torch.ones_like(values[:, :1], dtype=torch.bool), values.diff() > 0], dim=1)
    few = first.sum(1) <= clusters
    starts = torch.where(first, torch.arange(n, device=values.device), n).sort(dim=1).values
    result[few, : min(n, clusters)] = starts[few, :clusters]
    live = (~few).nonzero().flatten()
    search = _start(values[live], weights[live], clusters)
    while len(live):
        search, done, bounds = _round(search, clusters)
        result[live[done]] = bounds
        live, search = live[~done], search.keep(~done)
    return result


def _start(values: Tensor, weights: Tensor, clusters: int) -> _Search:
    """Scale every problem to zero mean and unit variance; take the first policy by companding."""
    weights = weights / weights.sum(1, keepdim=True)
    values = values - (values * weights).sum(1, keepdim=True)
    values = values / (values.square() * weights).sum(1, keepdim=True).sqrt()
    zero = values.new_zeros(len(values), 1)
    previous = _companding(values, weights, clusters)
    count, gain = torch.zeros_like(previous[:, 0]), zero[:, 0]
    return _Search(
        weight=torch.cat([zero, weights.cumsum(1)], dim=1),
        moment=torch.cat([zero, (values * weights).cumsum(1)], dim=1),
        previous=previous,
        penalty=gain,
        rounds=count,
        trials=count,
        low_count=count,
        low_gain=gain,
        low_previous=previous,
        high_count=count,
        high_gain=gain,
        high_previous=previous,
    )


def _companding(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Start where fine quantization would: code density as the cube root of mass density."""
    spacing = torch.zeros_like(values)
    spacing[:, :-1] += values.diff()
    spacing[:, 1:] += values.diff()
    mass = (weights * spacing.square()).pow(1 / 3)
    place = (mass.cumsum(1) - mass / 2) / mass.sum(1, keepdim=True)
    cell = (place * clusters).floor()
    fresh = torch.cat([torch.ones_like(cell[:, :1], dtype=torch.bool), cell.diff() != 0], dim=1)
    start = torch.where(fresh, torch.arange(cell.shape[1], device=cell.device), 0)
    return torch.cat([torch.zeros_like(start[:, :1]), start.cummax(1).values], dim=1)


def _round(search: _Search, clusters: int) -> tuple[_Search, Tensor, Tensor]:
    """Value the policies, improve them, and move the penalty of those that cannot improve.

    Returns:
        The next state, which rows are done, and the boundaries of those.
    """
    gain, count = _value(search)
    last_gain, last = gain[:, -1], count[:, -1]
    share = last / clusters
    fresh = search.rounds == 0
    early = (search.rounds < 4) & (search.trials == 0)
    guess = torch.where(fresh, 2 * (1 - last_gain).clamp(min=EQUAL) / last, search.penalty)
    moved = guess * share.pow(3).clamp(0.2, 5.0)
    penalty = torch.where(early & ~fresh, moved, guess)
    score = gain - penalty.unsqueeze(1) * count
    best, start = _row_maxima(search.weight, search.moment, score)
    better = best - penalty.unsqueeze(1) > score + EQUAL
    better[:, 0] = False
    stuck = ~better.any(1)
    search = replace(
        search,
        previous=torch.where(better, start, search.previous),
        penalty=penalty,
        rounds=search.rounds + 1,
        trials=search.trials + stuck,
    )
    hit = stuck & (last == clusters)
    line = search.low_gain - penalty * search.low_count
    tied = stuck & ~hit & (search.low_count > 0) & (search.high_count > 0)
    tied &= (last_gain - penalty * last <= line + EQUAL) | (search.trials > TRIALS)
    # Where what one more edge gains is rounding, no penalty leads to as many.
    short = stuck & ~hit & (search.high_count == 0) & (search.trials > TRIALS)
    short &= search.low_count > 0
    done = hit | tied | short
    bounds = torch.empty(len(last), clusters + 1, dtype=torch.int64, device=last.device)
    bounds[hit] = _path(search.previous[hit], clusters)
    bounds[tied] = _splice(search.keep(tied), clusters)
    bounds[short] = _padded(search.keep(short), clusters)
    return _next_penalty(search, stuck, last, last_gain, clusters), done, bounds[done]


def _next_penalty(
    search: _Search, stuck: Tensor, count: Tensor, gain: Tensor, clusters: int
) -> _Search:
    """Record the optima of rows that converged and choose their next trial penalty."""
    fewer, more = stuck & (count < clusters), stuck & (count > clusters)
    state = replace(
        search,
        low_count=torch.where(fewer, count, search.low_count),
        low_gain=torch.where(fewer, gain, search.low_gain),
        low_previous=torch.where(fewer.unsqueeze(1), search.previous, search.low_previous),
        high_count=torch.where(more, count, search.high_count),
        high_gain=torch.where(more, gain, search.high_gain),
        high_previous=torch.where(more.unsqueeze(1), search.previous, search.high_previous),
    )
    slope = (state.high_gain - state.low_gain) / (state.high_count - state.low_count)
    known = (state.low_count > 0) & (state.high_count > 0)
    moved = torch.where(known, slope, search.penalty * (count / clusters).pow(3))
    return replace(state, penalty=torch.where(stuck, moved, search.penalty))


def _value(search: _Search) -> tuple[Tensor, Tensor]:
    """Sum gains and edges from node 0 to every node along the policy, by pointer doubling."""
    start = search.previous
    step = search.moment - search.moment.gather(1, start)
    span = search.weight - search.weight.gather(1, start)
    gain = torch.where(span > 0, step.square() / span, 0.0)
    count = torch.ones_like(start)
    count[:, 0] = 0
    while bool(start.any()):
        gain = gain + gain.gather(1, start)
        count = count + count.gather(1, start)
        start = start.gather(1, start)
    return gain, count


def _row_maxima(weight: Tensor, moment: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Find for every node j the best ``score[i] + gain(i, j)`` over i < j, and that i.

    The best i never falls as j rises, so each stride halves the rows and keeps between the
    answers of its neighbours.
    """
    problems, nodes = score.shape
    best = torch.full_like(score, -torch.inf)
    start = torch.zeros(problems, nodes, dtype=torch.int64, device=score.device)
    offset = torch.arange(problems, device=score.device).unsqueeze(1) * nodes
    stride = 1 << ((nodes - 1).bit_length() - 1)
    while stride:
        rows = torch.arange(stride, nodes, 2 * stride, device=score.device)
        low = start[:, rows - stride]
        right = start[:, (rows + stride).clamp(max=nodes - 1)]
        high = torch.where(rows + stride < nodes, right, rows - 1).minimum(rows - 1)
        width = (high.maximum(low) - low + 1).flatten()
        ends = width.cumsum(0)
        row = torch.repeat_interleave(width)
        shift = (low + offset).flatten() - (ends - width)
        index = torch.arange(len(row), device=score.device) + shift.index_select(0, row)
        value = _edges(weight, moment, (rows + offset).flatten(), row, index)
        value += score.view(-1).index_select(0, index)
        top = torch.segment_reduce(value, "max", lengths=width, unsafe=True)
        hits = (value == top.index_select(0, row)).nonzero().flatten()
        chosen = torch.full_like(width, problems * nodes)
        chosen.scatter_reduce_(0, row[hits], index[hits], "amin")
        best[:, rows] = top.view(problems, -1)
        start[:, rows] = chosen.view(problems, -1) - offset
        stride //= 2
    return best, start


def _edges(weight: Tensor, moment: Tensor, ends: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """Gain of the edges from flat nodes ``index`` to flat nodes ``ends[row]``."""
    weight, moment = weight.view(-1), moment.view(-1)
    step = moment[ends].index_select(0, row) - moment.index_select(0, index)
    span = weight[ends].index_select(0, row) - weight.index_select(0, index)
    return torch.where(span > 0, step.square_().div_(span), 0.0)


def _path(previous: Tensor, edges: int) -> Tensor:
    """Walk the policy back from the last node; returns nodes ``[P, edges + 1]``, ascending."""
    node = torch.full_like(previous[:, 0], previous.shape[1] - 1)
    nodes = [node]
    for _ in range(edges):
        node = previous.gather(1, node.unsqueeze(1)).squeeze(1)
        nodes.append(node)
    return torch.stack(nodes[::-1], dim=1)


def _padded(search: _Search, clusters: int) -> Tensor:
    """Fill the longest optimum found up with empty runs."""
    nodes = search.low_previous.shape[1]
    bounds = torch.full((len(search.low_count), clusters + 1), nodes - 1)
    for row, (low, count) in enumerate(
        zip(search.low_previous, search.low_count.tolist(), strict=True)
    ):
        bounds[row, : count + 1] = _path(low[None], count)[0]
    return bounds.to(search.low_previous.device)


def _splice(search: _Search, clusters: int) -> Tensor:
    """Join the head of the short path to the tail of the long one so that K edges remain.

    Of two optima of one penalty with fewer and more edges, some edge of the short path covers the
    edge of the long path that is ``high_count - K`` places further on; crossing over there makes
    an optimum too.
    """
    bounds = []
    for low, high, low_count, high_count in zip(
        search.low_previous,
        search.high_previous,
        search.low_count.tolist(),
        search.high_count.tolist(),
        strict=True,
    ):
        short, long = _path(low[None], low_count)[0], _path(high[None], high_count)[0]
        skip = high_count - clusters
        tail = long[skip : skip + low_count + 1]
        covers = (short[:-1] <= tail[:-1]) & (tail[1:] <= short[1:])
        cut = int(covers.nonzero()[0, 0])
        bounds.append(torch.cat([short[: cut + 1], long[skip + cut + 1 :]]))
    if not bounds:
        return search.previous.new_empty(0, clusters + 1)
    return torch.stack(bounds)
