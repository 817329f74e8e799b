import math

import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.estimate import Span
from squeeze.sparsify.prefill.flexprefill import Flexprefill, root_divergence
from squeeze.sparsify.selection import mass_floor
from tests.sparsify.policies import SCALING, check_against, check_dense, choose, inputs, lists


def cover(weights, mass, least, size):
    """Return the fewest, or the least allowed number of, heaviest positions that hold ``mass``."""
    taken, held = [], 0.0
    for rank, j in enumerate(sorted(range(len(weights)), key=lambda j: -weights[j])):
        if held < mass * sum(weights) or rank * size < least:
            taken.append(j)
        held += weights[j]
    return taken


def histogram_floor(maps, mass):
    """Find the floor of the pooled map by adding up the blocks of one bin after another."""
    weights = [w for row in maps for w in row]
    for edge in range(1, 1024):
        if sum(w for w in weights if w > 2 ** (-edge / 32)) >= mass * sum(weights):
            return 2 ** (-edge / 32)
    return 0.0


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words."""
    T, size = len(query), policy.block_size
    query, keys = query.double(), keys.double()
    q, k = ([x[a : a + size].mean(0) for a in range(0, T, size)] for x in (query, keys))
    N = len(k)
    last = range(max(0, T - size), T)
    lines, diagonals = [0.0] * N, [0.0] * N
    for t in last:
        for j, weight in enumerate((SCALING * keys[: t + 1] @ query[t]).softmax(0).tolist()):
            lines[j // size] += weight / len(last)
            for d in range(N):
                diagonals[d] += weight * max(0.0, 1 - abs(t - j - d * size) / size)
    mean = query[last.start :].mean(0)
    expected = torch.stack([SCALING * mean @ k[j] for j in range(N)]).softmax(0).tolist()
    middle = [(a + b) / 2 for a, b in zip(lines, expected, strict=True)]
    divergence = sum(
        x * math.log(x / m) / 2
        for p in (lines, expected)
        for x, m in zip(p, middle, strict=True)
        if x > 0
    )
    trusted = math.sqrt(max(0.0, divergence)) < policy.threshold
    mass = 0.0 if trusted else policy.mass
    vertical, slash = (cover(x, mass, policy.min_budget, size) for x in (lines, diagonals))
    maps = [
        torch.stack([SCALING * q[i] @ k[j] for j in range(i + 1)]).softmax(0).tolist()
        for i in range(N)
    ]
    floor = histogram_floor(maps, policy.mass) if trusted else math.inf
    return [
        choose(
            row,
            policy.max_density,
            floor=floor,
            require=[j for j in range(i + 1) if j in vertical or i - j in slash],
        )
        for i, row in enumerate(maps)
    ]


@pytest.mark.parametrize(
    ("T", "heads", "mass", "threshold", "least", "size", "starts"),
    [
        (600, (2, 2), 0.6, 0.0, 0, 64, None),
        (600, (2, 2), 0.6, 1.0, 0, 64, None),
        (557, (3, 1), 0.7, 0.5, 64, 64, [0, 100]),
        (400, (4, 1), 0.55, 1.0, 100, 64, [336, 3, 390]),
        (690, (8, 1), 0.6, 0.4, 0, 128, None),
        (40, (1, 1), 0.5, 0.1, 0, 64, None),
    ],
)
def test_against_the_words(T, heads, mass, threshold, least, size, starts):
    policy = Flexprefill(mass, threshold, least, block_size=size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_both_kinds_of_heads_occur():
    # Head 0 attends the same everywhere and is trusted; head 1's queries cancel in the mean.
    query, keys = torch.zeros(1, 2, 640, 4), torch.zeros(1, 1, 640, 4)
    keys[:, :, 192:256, 0] = 1.0
    query[:, 1, ::2, 0], query[:, 1, 1::2, 0] = 20.0, -20.0
    index = Flexprefill(0.95, 0.1, 0).index(query, keys, None, 1.0)
    assert lists(index, 0, 0)[9] == list(range(10))
    assert 3 in lists(index, 0, 1)[9]
    lines_only = Flexprefill(0.3, 0.1, 0).index(query, keys, None, 1.0)
    assert lists(lines_only, 0, 1)[9] == [0, 3, 9]


def test_divergence_by_hand():
    half = torch.tensor([0.5, 0.5, 0.0])
    assert root_divergence(half, half).item() == 0
    apart = root_divergence(torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))
    assert apart.item() == pytest.approx(math.sqrt(math.log(2)))


def test_the_floor_holds_the_mass_and_little_more():
    generator = torch.Generator().manual_seed(0)
    N, lengths = 40, torch.tensor([40 * 64, 30 * 64 - 5])
    maps = torch.randn(2, 3, N, N, generator=generator).mul(3)
    maps = maps.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    starts, begins = N * 64 - lengths, torch.zeros_like(lengths)
    span = Span(64, N, 0, starts, lengths, begins, N * 64, 0)
    floor = mass_floor(lambda rows: maps[:, :, rows.start : rows.stop, : rows.stop], span, 3, 0.8)
    for b, blocks in enumerate((40, 30)):
        for h in range(3):
            weights = maps[b, h, :blocks]
            assert weights[weights >= floor[b, h]].sum() >= 0.8 * blocks
            assert weights[weights >= floor[b, h] * 2 ** (1 / 32)].sum() < 0.8 * blocks


def test_more_mass_reads_more():
    query, keys = inputs(1, 2, 2, 1000)
    for threshold in (0.0, 1.0):
        few, many = (
            Flexprefill(mass, threshold).index(query, keys, None, SCALING) for mass in (0.5, 0.8)
        )
        for h in range(2):
            pairs = list(zip(lists(few, 0, h), lists(many, 0, h), strict=True))
            assert all(set(a) <= set(b) for a, b in pairs)


def test_a_full_budget_is_dense():
    check_dense(Flexprefill(mass=1.0, threshold=0.0, max_density=1.0))
    check_dense(Flexprefill(mass=1.0, threshold=1.0, max_density=1.0))


def test_it_is_registered():
    assert get("prefill", "flexprefill") is Flexprefill
