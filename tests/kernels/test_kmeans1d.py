"""Exact one-dimensional k-means against a dynamic program that tries every partition."""

import importlib.util
import os
from itertools import pairwise

import pytest
import torch

from squeeze.errors import DeviceError
from squeeze.kernels.kmeans1d.api import centroids1d, kmeans1d
from squeeze.types import Implementation

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in the interpreter",
)
REFERENCE, TRITON = Implementation.REFERENCE, Implementation.TRITON


def least_error(values, weights, clusters):
    """Weighted squared error of the best partition, by the textbook recurrence in O(K n^2)."""
    order = values.argsort()
    x, w = values[order].double(), weights[order].double()
    n = len(x)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n + 1):
            part, mass = x[i:j], w[i:j]
            mean = (part * mass).sum() / mass.sum()
            cost[i, j] = (mass * (part - mean).square()).sum()
    best = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    for _ in range(clusters):
        best = (best[:, None] + cost).min(0).values
    return best[n]


def error(values, weights, centroids, indices):
    chosen = centroids.double().gather(1, indices.long())
    return (weights.double() * (values.double() - chosen).square()).sum(1)


@pytest.mark.parametrize("clusters", [1, 2, 4, 16])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "grid"])
def test_finds_the_global_optimum(kind, clusters):
    generator = torch.Generator().manual_seed(clusters)
    values = torch.randn(4, 27, generator=generator)
    weights = torch.ones(4, 27)
    if kind == "heavy":
        weights = torch.rand(4, 27, generator=generator).pow(4) + 1e-4
    if kind == "ties":
        values = (values * 6).round()
    if kind == "grid":  # every cluster count lies on one line of the penalty search
        values = torch.arange(27.0).expand(4, 27).clone()
    centroids, indices = kmeans1d(values, weights, clusters=clusters)
    found = error(values, weights, centroids, indices)
    for row in range(4):
        if len(values[row].unique()) > clusters:
            best = least_error(values[row], weights[row], clusters)
            torch.testing.assert_close(found[row], best, rtol=1e-6, atol=1e-10)
        else:
            assert found[row] == 0


def test_worked_example():
    centroids, indices = kmeans1d(torch.tensor([[1.0, 9.0, 2.0, 10.0]]), clusters=2)
    assert centroids.tolist() == [[1.5, 9.5]]
    assert indices.tolist() == [[0, 1, 0, 1]]


def test_weights_pull_centroids():
    values, weights = torch.tensor([[0.0, 1.0, 10.0]]), torch.tensor([[3.0, 1.0, 1.0]])
    centroids, _ = kmeans1d(values, weights, clusters=2)
    assert centroids.tolist() == [[0.25, 10.0]]


def test_more_clusters_never_cost_more():
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    weights = torch.ones_like(values)
    errors = [
        error(values, weights, *kmeans1d(values, clusters=clusters)) for clusters in range(1, 40, 3)
    ]
    for fewer, more in pairwise(errors):
        assert (more < fewer).all()


@pytest.mark.parametrize("clusters", [4, 5, 256])
def test_enough_centroids_reproduce_the_values(clusters):
    values = torch.tensor([[0.1, -2.0, 0.1, 3.0, 0.5], [7.0, 7.0, 7.0, 7.0, 7.0]])
    centroids, indices = kmeans1d(values, clusters=clusters)
    assert torch.equal(centroids.gather(1, indices.long()), values)
    assert (centroids.diff() >= 0).all()


def test_weights_of_zero_are_as_none():
    values = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    plain = kmeans1d(values, clusters=4)
    zero = kmeans1d(values, torch.zeros_like(values), clusters=4)
    assert torch.equal(plain[0], zero[0])
    assert torch.equal(plain[1], zero[1])


def test_rows_are_independent_and_order_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    values, weights = (
        torch.randn(5, 60, generator=generator),
        torch.rand(5, 60, generator=generator),
    )
    centroids, indices = kmeans1d(values, weights, clusters=8)
    order = torch.randperm(60, generator=generator)
    alone, places = kmeans1d(values[2:3, order], weights[2:3, order], clusters=8)
    torch.testing.assert_close(alone, centroids[2:3])
    assert torch.equal(places, indices[2:3, order])


def test_half_precision_duplicates():
    values = torch.randn(2, 3000, generator=torch.Generator().manual_seed(3)).bfloat16()
    centroids, indices = kmeans1d(values, clusters=16)
    assert centroids.dtype == torch.float32
    assert indices.dtype == torch.uint8
    nearest = (values.float()[..., None] - centroids[:, None]).abs().min(-1).values
    chosen = (values.float() - centroids.gather(1, indices.long())).abs()
    torch.testing.assert_close(chosen, nearest)


def test_gains_lost_in_rounding_do_not_keep_the_search_going():
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.randn(3, 40, generator=generator), torch.ones(3, 40)
    weights[:, ::2] = 1e-9
    centroids, indices = kmeans1d(values, weights, clusters=39)
    assert (centroids.diff() >= 0).all()
    assert (error(values, weights, centroids, indices) < 1e-9).all()


def test_no_problems():
    centroids, indices = kmeans1d(torch.empty(0, 7), clusters=4)
    assert centroids.shape == (0, 4)
    assert indices.shape == (0, 7)


@pytest.mark.parametrize(
    ("values", "weights", "clusters", "message"),
    [
        (torch.ones(3), None, 2, "must be"),
        (torch.ones(1, 3), None, 257, "1 to 256"),
        (torch.tensor([[1.0, float("nan")]]), None, 2, "finite"),
        (torch.ones(1, 3), torch.ones(1, 2), 2, "weights are"),
        (torch.ones(1, 3), -torch.ones(1, 3), 2, "at least 0"),
    ],
)
def test_refuses(values, weights, clusters, message):
    with pytest.raises(ValueError, match=message):
        kmeans1d(values, weights, clusters=clusters)


@pytest.mark.parametrize("clusters", [2, 4, 8, 16])
def test_a_local_optimum_is_near_the_best(clusters):
    generator = torch.Generator().manual_seed(clusters)
    values = torch.randn(20, 400, generator=generator) ** 3  # heavy tails
    weights = torch.rand(20, 400, generator=generator) ** 4
    best = error(values, weights, *kmeans1d(values, weights, clusters=clusters))
    found = kmeans1d(values, weights, clusters=clusters, exact=False)
    assert (found[0].diff(dim=1) >= 0).all()
    ratio = error(values, weights, *found).sum() / best.sum()
    assert 1 - 1e-6 < ratio < 1.1
    twice = kmeans1d(values, weights, clusters=clusters, exact=False)
    assert torch.equal(found[0], twice[0]) and torch.equal(found[1], twice[1])


@pytest.mark.parametrize("values", [[[3.0, 3.0, 3.0]], [[1.0, 2.0]], [[5.0]]])
def test_a_local_optimum_of_few_values_has_a_centroid_for_them(values):
    x = torch.tensor(values)
    centroids, indices = kmeans1d(x, clusters=4, exact=False)
    assert centroids.isfinite().all()
    assert (centroids.gather(1, indices.long()) - x).abs().max() <= x.max() - x.min()


KINDS = ("normal", "heavy", "ties", "grid", "light")


def rows_of(kind, rows, n, seed=0):
    """Values and weights: heavy tails, ties, equal steps, or weights of 1e-9 of the mean."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, n, generator=generator)
    weights = torch.rand(rows, n, generator=generator)
    if kind == "heavy":
        values, weights = values**3, weights**4
    if kind == "ties":
        values = (values * 4).round()
    if kind == "grid":
        values, weights = torch.arange(float(n)).expand(rows, n).clone(), torch.ones(rows, n)
    if kind == "light":
        weights = torch.where(weights < 0.5, 1e-9, 1.0)
    return values, weights


def objective(values, weights, centroids):
    """Weighted squared error to the nearest centroid, float64."""
    middles = ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()
    nearest = centroids.gather(1, torch.searchsorted(middles, values.double()))
    return (weights.double() * (values.double() - nearest).square()).sum(1)


def assert_as_good(values, weights, clusters, found):
    """At most a rounding worse than the reference, and exact where values are few."""
    expected = centroids1d(values, weights, clusters=clusters, implementation=REFERENCE)
    best, ours = objective(values, weights, expected), objective(values, weights, found)
    scale = (weights.double() * (values.double() - values.double().mean(1, True)).square()).sum(1)
    assert (found.diff(dim=1) >= 0).all()
    assert (ours <= best * (1 + 1e-12) + 1e-13 * scale).all(), (ours - best).max()
    few = torch.tensor([len(row.unique()) <= clusters for row in values])
    assert torch.equal(found[few].float(), expected[few].float())


@needs_interpreter
@pytest.mark.parametrize(
    ("kind", "n", "clusters"),
    [
        ("normal", 27, 4),
        ("normal", 65, 3),
        ("heavy", 100, 4),
        ("ties", 97, 5),
        ("grid", 64, 4),
        ("light", 40, 4),
        ("normal", 33, 1),
        ("heavy", 33, 2),
        ("normal", 12, 11),
        ("normal", 5, 8),
        ("normal", 1, 3),
        ("ties", 130, 64),
    ],
)
def test_the_kernel_finds_the_optimum(kind, n, clusters):
    values, weights = rows_of(kind, 2, n)
    found = centroids1d(values, weights, clusters=clusters, implementation=TRITON)
    assert found.dtype == torch.float64
    assert_as_good(values, weights, clusters, found)
    for row in range(2 if clusters < n < 70 else 0):
        best = least_error(values[row], weights[row].clamp(min=1e-9), clusters)
        error = objective(values[row : row + 1], weights[row : row + 1], found[row : row + 1])
        torch.testing.assert_close(error[0], best, rtol=1e-9, atol=1e-12)


@needs_interpreter
def test_the_kernel_keeps_to_its_rows():
    buffer = torch.full((5, 71), torch.nan)
    values, weights = buffer[1:4, 3:50], buffer.clone()[1:4, 3:50]
    fresh, mass = rows_of("heavy", 3, 47)
    values.copy_(fresh)
    weights.copy_(mass)
    weights[1] = 0.0
    values[2] = 3.5
    found = centroids1d(values, weights, clusters=4, implementation=TRITON)
    assert found[2].tolist() == [3.5] * 4
    plain = centroids1d(values[1:2], clusters=4, implementation=TRITON)
    torch.testing.assert_close(found[1:2], plain, rtol=1e-14, atol=1e-14)
    alone = centroids1d(fresh[:1].double(), mass[:1].double(), clusters=4, implementation=TRITON)
    assert torch.equal(found[:1], alone)


@needs_triton
def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="device cpu"):
        centroids1d(torch.ones(1, 3), clusters=2, implementation=TRITON)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(DeviceError, match="at most 65535"):
        centroids1d(torch.ones(1, 65536), clusters=2, implementation=TRITON)
    with pytest.raises(ValueError, match="auto"):
        centroids1d(torch.ones(1, 3), clusters=2, implementation=Implementation.AUTO)


@needs_triton
def test_the_compiled_kernel_keeps_everything_in_registers(compiled):
    every = compiled("compile_kmeans1d.py", "90")
    assert len(every) == 3
    for facts in every:
        assert facts["stack"] == 0 and facts["registers"] <= 128, facts  # 16 programs


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "clusters"),
    [(1, 2), (31, 4), (33, 3), (777, 2), (1000, 1), (1001, 16), (4096, 8), (14336, 16), (300, 64)],
)
def test_the_kernel_on_a_gpu_finds_the_optimum(kind, n, clusters):
    values, weights = rows_of(kind, 5, n, seed=n)
    found = centroids1d(values.cuda(), weights.cuda(), clusters=clusters)
    assert_as_good(values, weights, clusters, found.cpu())


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_repeats_itself_whatever_else_is_in_flight():
    values, weights = (x.cuda() for x in rows_of("heavy", 3000, 700))
    found = centroids1d(values, weights, clusters=8)
    assert torch.equal(found, centroids1d(values, weights, clusters=8))
    few = centroids1d(values[2500:2503], weights[2500:2503], clusters=8)
    assert torch.equal(found[2500:2503], few)
    half = centroids1d(values[:9].bfloat16(), clusters=8)
    assert_as_good(values[:9].bfloat16().cpu(), torch.ones(9, 700), 8, half.cpu())


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_numbers_nodes_past_32767():
    values, weights = rows_of("normal", 2, 65535)
    found = centroids1d(values.cuda(), weights.cuda(), clusters=4)
    assert_as_good(values, weights, 4, found.cpu())
