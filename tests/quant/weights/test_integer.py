"""Integer weights: sizes, rounding by hand, GPTQ's error feedback, AWQ's scales."""

import itertools

import pytest
import torch

from squeeze.errors import UnsupportedError
from squeeze.kernels.integer_linear.api import reconstruct
from squeeze.quant.weights._rounding import BLOCK, round_gptq
from squeeze.quant.weights.integer import Integer


def matrix(out_features=24, in_features=192, seed=0):
    """A weight and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    mix = torch.randn(in_features, in_features, generator=generator)
    sizes = torch.exp(torch.randn(in_features, generator=generator))
    x = torch.randn(2000, in_features, generator=generator) @ mix * sizes
    return weight, x.T @ x / len(x)


def output_error(weight, hessian, **options):
    method = Integer(**options)
    error = reconstruct(method.fit(weight, {"hessian": hessian})) - weight
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scaling", ["none", "awq"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("shape", "group_size"), [((24, 192), 64), ((13, 100), 32), ((9, 100), 0)])
def test_sizes_are_known_before_fitting(symmetric, scaling, bits, shape, group_size):
    method = Integer(bits=bits, group_size=group_size, symmetric=symmetric, scaling=scaling)
    weight, hessian = matrix(*shape)
    fitted, empty = method.fit(weight, {"hessian": hessian}), method.empty(*shape, "meta")
    assert fitted.effective_bits == method.shape_bits(*shape)
    assert fitted.nbytes == method.shape_bytes(*shape)
    assert fitted.tensors().keys() == empty.tensors().keys()
    for name, real in fitted.tensors().items():
        shell = empty.tensors()[name]
        assert (real.shape, real.dtype) == (shell.shape, shell.dtype)
        assert real.is_contiguous()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4}, 4 + 16 / 128),
        ({"bits": 3, "group_size": 64}, 3 + 16 / 64),
        ({"bits": 4, "group_size": 64, "symmetric": False}, 4 + (16 + 8) / 64),
        ({"bits": 8, "group_size": 0}, 8 + 16 / 4096),
        ({"bits": 4, "scaling": "awq"}, 4 + 16 / 128 + 8 / 512),
        ({"bits": 4, "inputs": "float8"}, 4 + 8 / 128 + 32 / 4096),
    ],
)
def test_effective_bits_by_hand(options, expected):
    assert Integer(**options).shape_bits(512, 4096) == expected


def test_symmetric_rounding_by_hand():
    # 3 bits: codes 0 to 7, zero at 4; the largest magnitudes are 3 steps up and 4 down.
    weight = torch.tensor([[-4.0, 3.0, 0.4, 0.6, -1.5, -2.5, 0.0, 2.0]]).repeat(1, 4) * 0.25
    fitted = Integer(bits=3, group_size=32).fit(weight)
    assert fitted.scale.tolist() == [[0.25]]
    rounded = torch.tensor([[-4.0, 3.0, 0.0, 1.0, -2.0, -2.0, 0.0, 2.0]]).repeat(1, 4) * 0.25
    assert torch.equal(reconstruct(fitted), rounded)


def test_float8_scales_by_hand():
    """Largest 5.0: a step of 5 / 7 = 0.714, under the row's 2**-8 182.9, in E4M3 176: 0.6875."""
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([5.0, -0.7, 0.3, -5.0])
    weight[0, 32] = 2.0**-9 * 7  # its step is 2**-9, which is 0.5 under the row's
    fitted = Integer(bits=4, group_size=32, inputs="float8").fit(weight)
    assert fitted.row_scale.tolist() == [2.0**-8]
    assert fitted.scale.view(torch.float8_e4m3fn).float().tolist() == [[176, 0.5]]
    dense = reconstruct(fitted)
    assert dense[0, :4].tolist() == [7 * 0.6875, -0.6875, 0, -7 * 0.6875]
    assert dense[0, 32] == weight[0, 32]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_float8_scales_cost_little(rounding, order, symmetric):
    weight, hessian = matrix()
    options = {"rounding": rounding, "order": order, "symmetric": symmetric, "group_size": 64}
    plain = output_error(weight, hessian, **options)
    assert output_error(weight, hessian, inputs="float8", **options) < 1.15 * plain


def test_float8_scales_reach_over_rows_of_any_size():
    weight, _ = matrix(8, 64)
    for power in (-30, -6, 0, 10):
        size = weight * 2.0**power
        fitted = Integer(group_size=32, inputs="float8").fit(size)
        dense = reconstruct(fitted)
        assert torch.equal(dense.half().float(), dense)
        least = 8 * 2.0**-24  # what the coarsest grid of float16's smallest scale spans
        assert float((dense - size).abs().max()) <= 0.1 * float(size.abs().max()) + least
    assert not reconstruct(Integer(inputs="float8").fit(torch.zeros(3, 64))).any()


def test_float8_inputs_need_codes_that_e4m3_holds():
    with pytest.raises(UnsupportedError, match=r"inputs in float8 and 8 bits.*Set bits: 4"):
        Integer(bits=8, inputs="float8").check(64, 64)


def test_asymmetric_rounding_by_hand():
    # 2 bits: from -0.5 to 1.0 in three steps of 0.5; code 1 stands for zero.
    weight = torch.tensor([[-0.5, 0.0, 0.5, 1.0]]).repeat(1, 8)
    fitted = Integer(bits=2, group_size=32, symmetric=False).fit(weight)
    assert (fitted.scale.tolist(), fitted.zero.tolist()) == ([[0.5]], [[1]])
    assert torch.equal(reconstruct(fitted), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_errors_are_at_most_half_a_step(symmetric):
    weight, _ = matrix()
    fitted = Integer(bits=4, group_size=64, symmetric=symmetric).fit(weight)
    step = fitted.scale.float().repeat_interleave(64, 1)
    # The scale has 8 significant bits, so the range may end half of 1/256 of itself early.
    assert ((reconstruct(fitted) - weight).abs() <= step * (0.5 + 16 / 512)).all()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_on_the_grid_are_reproduced(rounding, symmetric):
    _, hessian = matrix()
    weight = (torch.randint(-8, 8, (6, 192)).float()) * 0.125
    weight[:, ::32], weight[:, 1::32] = -1.0, 0.875
    method = Integer(bits=4, group_size=32, symmetric=symmetric, rounding=rounding)
    assert torch.equal(reconstruct(method.fit(weight, {"hessian": hessian})), weight)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_zero_rows_stay_zero(rounding):
    weight, hessian = matrix()
    weight[4] = 0
    dense = reconstruct(Integer(rounding=rounding).fit(weight, {"hessian": hessian}))
    assert dense.isfinite().all()
    assert not dense[4].any()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("order", ["activation", "given"])
def test_rows_do_not_depend_on_one_another(rounding, order):
    weight, hessian = matrix()
    method = Integer(bits=3, rounding=rounding, order=order)
    whole = reconstruct(method.fit(weight, {"hessian": hessian}))
    half = reconstruct(method.fit(weight[:12], {"hessian": hessian}))
    assert (whole[:12] != half).float().mean() < 0.02  # ties fall by the last bit of a product


def test_each_idea_lowers_the_error_of_the_output():
    weight, hessian = matrix()
    common = {"bits": 3, "group_size": 64}
    nearest = output_error(weight, hessian, **common)
    scaled = output_error(weight, hessian, **common, scaling="awq")
    given = output_error(weight, hessian, **common, rounding="gptq", order="given")
    ordered = output_error(weight, hessian, **common, rounding="gptq")
    both = output_error(weight, hessian, **common, rounding="gptq", scaling="awq")
    assert scaled < 0.95 * nearest
    assert given < 0.8 * nearest
    assert ordered < given
    assert both < ordered


@pytest.mark.parametrize("order", ["activation", "given"])
def test_blocks_change_nothing_but_the_order_of_additions(order, monkeypatch):
    weight, hessian = matrix(8, 3 * BLOCK // 2)
    arguments = (weight, hessian, 64, 4, True, order == "activation", 0.01)
    codes, grid = round_gptq(*arguments)
    monkeypatch.setattr("squeeze.quant.weights._rounding.BLOCK", 1)
    one_by_one, same = round_gptq(*arguments)
    assert (codes != one_by_one).float().mean() < 0.02
    torch.testing.assert_close(grid.scale, same.scale, rtol=0.02, atol=0)


def test_gptq_is_the_sequential_least_squares_solution():
    # After each rounded column the later ones take the values that minimise the damped error.
    weight, hessian = matrix(3, 32)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(32)
    codes, grid = round_gptq(weight, hessian, 32, 3, True, False, 0.01)
    scale, work = grid.scale[:, :1].double(), weight.double().clone()
    for i in range(32):
        code = (torch.round(work[:, i : i + 1] / scale) + 4).clamp(0, 7)
        assert torch.equal(code, codes[:, i : i + 1].double())
        fixed = (code - 4) * scale
        rest = damped[i + 1 :, i + 1 :]
        if i < 31:
            pull = (work[:, i : i + 1] - fixed) * damped[i, i + 1 :]
            work[:, i + 1 :] += torch.linalg.solve(rest, pull.T).T


def test_dead_channels_are_rounded_and_disturb_nothing():
    weight, hessian = matrix()
    dead = torch.tensor([3, 64, 191])
    hessian[dead], hessian[:, dead] = 0, 0
    method = Integer(bits=4, group_size=64, rounding="gptq")
    dense = reconstruct(method.fit(weight, {"hessian": hessian}))
    nearest = reconstruct(Integer(bits=4, group_size=64).fit(weight))
    assert dense.isfinite().all()
    assert torch.equal(dense[:, dead], nearest[:, dead])
    silent = Integer(bits=4, rounding="gptq", scaling="awq")
    everything = silent.fit(weight, {"hessian": torch.zeros_like(hessian)})
    assert torch.equal(reconstruct(everything), reconstruct(Integer(bits=4).fit(weight)))


def test_a_singular_hessian_is_damped_until_it_can_be_inverted():
    weight, _ = matrix()
    x = torch.randn(4, 192)
    method = Integer(bits=4, rounding="gptq", damping=1e-12)
    assert reconstruct(method.fit(weight, {"hessian": x.T @ x / 4})).isfinite().all()


def test_scales_are_shared_and_never_worse_than_none():
    (first, hessian), (second, _) = matrix(16), matrix(8, seed=1)
    method = Integer(bits=3, group_size=64, scaling="awq")
    exponents = method.input_exponents([first, second], hessian)
    assert exponents.dtype == torch.int8
    assert exponents.unique().numel() > 1
    total = {}
    for name, found in (("shared", exponents), ("none", torch.zeros_like(exponents))):
        fitted = [
            reconstruct(method.fit(w, {"hessian": hessian, "exponents": found})) - w
            for w in (first, second)
        ]
        total[name] = sum(float(((e @ hessian) * e).sum()) for e in fitted)
    assert total["shared"] < total["none"]


def test_statistics_are_asked_for_where_they_are_needed():
    for rounding, scaling in itertools.product(("nearest", "gptq"), ("none", "awq")):
        method = Integer(rounding=rounding, scaling=scaling)
        dense = (rounding, scaling) == ("nearest", "none")
        assert method.statistics == (() if dense else ("hessian",))
    with pytest.raises(ValueError, match="rounding gptq, scaling none need a hessian"):
        Integer(rounding="gptq").fit(torch.ones(4, 32))
    with pytest.raises(ValueError, match=r"hessian is \(3, 3\), not \(32, 32\)"):
        Integer(rounding="gptq").fit(torch.ones(4, 32), {"hessian": torch.eye(3)})


def test_refuses_what_saves_nothing():
    with pytest.raises(UnsupportedError, match=r"effective bits.*less than 16"):
        Integer(bits=8).check(64, 9)
