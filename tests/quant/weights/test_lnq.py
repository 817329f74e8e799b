"""LNQ: descent in the loss of a layer, exact on tiny cases, better than ignoring correlation."""

import itertools

import pytest
import torch

from squeeze.kernels.index_descent.api import descend, look_up
from squeeze.kernels.lut_linear.api import reconstruct
from squeeze.quant.weights._descent import damped, loss, normal, solve
from squeeze.quant.weights.kmeans import KMeans
from squeeze.quant.weights.lnq import DAMPING, Lnq


def problem(out_features=16, in_features=128, groups=1, seed=0):
    """A weight and the second moments of inputs whose channels share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    mix = torch.randn(groups, in_features, in_features, generator=generator) / in_features**0.5
    decay = torch.logspace(0, -2, in_features)
    x = torch.randn(groups, 4 * in_features, in_features, generator=generator) * decay @ mix
    return weight, x.mT @ x / x.shape[1]


def total(weight, hessian, fitted):
    return float(loss(reconstruct(fitted).float() - weight, damped(hessian, DAMPING)).sum())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("entries", ["float16", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "rows", "row", "tile"])
def test_every_step_lowers_the_loss(granularity, entries, groups):
    weight, hessian = problem(in_features=100, groups=groups)
    hessian = damped(hessian, DAMPING)
    method = Lnq(bits=2, granularity=granularity, entries=entries)
    columns = method.sharing(*weight.shape)[1]
    state = method.start(weight, hessian)
    losses = [loss(state.values(columns) - weight, hessian).sum()]
    for _ in range(3):
        state = method.refit(weight, hessian, state)
        losses.append(loss(state.values(columns) - weight, hessian).sum())
        assert (state.entries.diff(dim=-1) >= 0).all()
        indices = descend(weight, hessian, state.table, state.indices, columns, 1)
        assert loss(look_up(state.table, indices, columns) - weight, hessian).sum() <= losses[
            -1
        ] * (1 + 1e-5)
        state = method.round(weight, hessian, state, 2)
        losses.append(loss(state.values(columns) - weight, hessian).sum())
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_an_index_that_descent_leaves_cannot_be_bettered_alone():
    weight, hessian = problem(4, 12)
    hessian = damped(hessian, DAMPING)
    table = weight.sort(1).values[:, None, 1::3].contiguous()  # [4, 1, 4]
    indices = descend(weight, hessian, table, torch.zeros_like(weight).long(), 12, 100)
    least = loss(look_up(table, indices, 12) - weight, hessian)
    for column, code in itertools.product(range(12), range(4)):
        other = indices.clone()
        other[:, column] = code
        found = loss(look_up(table, other, 12) - weight, hessian)
        assert (found >= least * (1 - 1e-5)).all()


def test_descent_finds_the_best_of_all_codes_without_correlation():
    weight, _ = problem(3, 6)
    hessian = torch.diag(torch.tensor([1.0, 4.0, 2.0, 0.5, 3.0, 1.0]))[None]
    table = torch.tensor([-0.02, 0.01, 0.03]).expand(3, 1, 3)
    found = descend(weight, hessian, table, torch.zeros(3, 6).long(), 6, 2)
    codes = torch.tensor(list(itertools.product(range(3), repeat=6)))
    for row in range(3):
        errors = table[row, 0][codes] - weight[row]
        best = codes[loss(errors, hessian).argmin()]
        assert torch.equal(found[row], best)


def test_codebooks_solve_the_least_squares():
    weight, hessian = problem(1, 10)
    indices = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0, 1, 2]])
    matrix, slope = normal(hessian, -weight @ hessian[0], torch.ones(1), indices, 4, 1)
    entries = solve(matrix, slope)
    member = torch.nn.functional.one_hot(indices[0], 4)[:, :3].float()
    root = torch.linalg.cholesky(hessian[0].double())
    expected = torch.linalg.lstsq(root.T @ member.double(), root.T @ weight[0].double()[:, None])
    torch.testing.assert_close(
        entries[0, :3].double(), expected.solution[:, 0], rtol=1e-4, atol=1e-7
    )
    assert entries[0, 3] == 0  # nobody uses it


def test_by_hand():
    # Two inputs that are always equal: errors cancel, so 1 and 2 may become 1.5 and 1.5.
    hessian = torch.ones(1, 2, 2)
    weight, table = torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.0, 3.0]]])
    found = descend(weight, hessian, table, torch.tensor([[0, 0]]), 2, 2)
    assert float(loss(look_up(table, found, 2) - weight, hessian)) == 0


@pytest.mark.parametrize("bits", [2, 3])
def test_beats_kmeans_when_inputs_are_correlated(bits):
    weight, hessian = problem()
    mass = hessian[0].diagonal().expand_as(weight)
    clustered = total(weight, hessian, KMeans(bits=bits).fit(weight, {"fisher": mass}))
    fitted = total(weight, hessian, Lnq(bits=bits).fit(weight, {"guided_hessian": hessian}))
    assert fitted < 0.6 * clustered


def test_more_bits_lose_less():
    weight, hessian = problem()
    statistics = {"guided_hessian": hessian}
    losses = [total(weight, hessian, Lnq(bits=b).fit(weight, statistics)) for b in range(1, 6)]
    assert losses == sorted(losses, reverse=True)


def test_rows_do_not_depend_on_one_another():
    weight, hessian = problem()
    whole = Lnq(bits=2).fit(weight, {"guided_hessian": hessian})
    half = Lnq(bits=2).fit(weight[4:8], {"guided_hessian": hessian})
    # Sums of other lengths round otherwise, and a tie may break otherwise: the loss is what agrees.
    found = loss(reconstruct(half) - weight[4:8], damped(hessian, DAMPING))
    expected = loss(reconstruct(whole)[4:8] - weight[4:8], damped(hessian, DAMPING))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.0)


def test_groups_of_rows_have_their_own_hessian():
    weight, hessian = problem(groups=4)
    whole = reconstruct(Lnq(bits=2).fit(weight, {"guided_hessian": hessian}))
    mean = damped(hessian, DAMPING).mean(0, keepdim=True)
    blind = reconstruct(Lnq(bits=2).fit(weight, {"guided_hessian": mean}))
    target = damped(hessian, DAMPING)
    assert loss(whole - weight, target).sum() < 0.9 * loss(blind - weight, target).sum()


@pytest.mark.parametrize("granularity", ["row", "tile"])
def test_dead_inputs_and_zero_rows_do_no_harm(granularity):
    weight, hessian = problem()
    hessian[:, 5] = hessian[:, :, 5] = 0
    weight[3] = 0
    method = Lnq(bits=4, granularity=granularity)
    dense = reconstruct(method.fit(weight, {"guided_hessian": hessian}))
    assert dense.isfinite().all()
    assert (dense[:, 5] - weight[:, 5]).abs().max() < 0.03
    assert dense[3].abs().max() < (1e-4 if granularity == "row" else 0.02)


def test_a_hessian_of_zeros_is_clustering_to_a_local_optimum():
    weight, hessian = problem()
    found = reconstruct(Lnq(bits=3).fit(weight, {"guided_hessian": 0 * hessian})) - weight
    expected = reconstruct(KMeans(bits=3, importance="none").fit(weight)) - weight
    assert found.square().sum() <= 1.05 * expected.square().sum()


@pytest.mark.parametrize("granularity", ["row", "rows"])
def test_sweeps_lower_the_loss_of_coupled_rows(granularity):
    weight, hessian = problem(36, 64)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(200, 4, generator=generator) @ torch.randn(4, 36, generator=generator)
    moment = z.T @ z / 200
    losses = []
    for sweeps in (0, 1, 2):
        method = Lnq(bits=2, sweeps=sweeps, granularity=granularity)
        fitted = method.fit(weight, {"guided_hessian": hessian, "output_hessian": moment})
        error = reconstruct(fitted) - weight
        inputs, outputs = damped(hessian, DAMPING)[0], damped(moment[None], 0.5)[0]
        losses.append(float(((outputs @ error @ inputs) * error).sum()))
    assert losses[2] <= losses[1] < 0.97 * losses[0]


def test_statistics_follow_the_options():
    assert Lnq().statistics == ("guided_hessian",)
    assert Lnq(guidance="none", sweeps=1).statistics == ("hessian", "output_hessian")


def test_wrong_statistics_are_errors():
    weight, hessian = problem()
    with pytest.raises(ValueError, match="needs the statistic guided_hessian"):
        Lnq().fit(weight, {})
    with pytest.raises(ValueError, match=r"hessian is \(1, 128, 128\), the weight \(16, 64\)"):
        Lnq().fit(weight[:, :64], {"guided_hessian": hessian})
