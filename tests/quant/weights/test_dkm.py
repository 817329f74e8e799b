"""Differentiable k-means: its first and last palette, its attention, its means."""

import pytest
import torch

from squeeze.errors import RecipeError, UnsupportedError
from squeeze.kernels.lut_linear.api import reconstruct
from squeeze.quant.weights.dkm import Dkm


def matrix(out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator) * 0.02


def student_of(weight, **options):
    method = Dkm(start={"method": "kmeans", "importance": "none"}, **options)
    packed = method.fit(weight)
    return method.student(weight, packed), packed


@pytest.mark.parametrize("granularity", ["tensor", "rows", "row", "tile"])
@pytest.mark.parametrize("entries", ["float16", "int8"])
@pytest.mark.parametrize("soft", [False, True])
def test_training_starts_at_the_first_palette(granularity, entries, soft):
    weight = matrix(13, 100)
    student, packed = student_of(weight, bits=3, granularity=granularity, entries=entries)
    if soft:
        student.soften(weight)
    expected = reconstruct(packed)
    torch.testing.assert_close(student.weight(), expected, rtol=1e-6, atol=0)
    stored = student.packed()
    assert torch.equal(reconstruct(stored), expected)
    assert (stored.codebook.float().diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("granularity", ["rows", "row", "tile"])
@pytest.mark.parametrize("entries", ["float16", "int8"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_what_is_trained_is_what_is_stored(granularity, entries, iterations):
    weight = matrix(16, 128)
    student, packed = student_of(
        weight, bits=2, granularity=granularity, entries=entries, iterations=iterations
    )
    student.soften(weight)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (student.weight() * matrix(16, 128, seed=1)).sum().backward()
        optimizer.step()
    stored = reconstruct(student.packed())
    assert not torch.equal(stored, reconstruct(packed))
    torch.testing.assert_close(student.weight(), stored, rtol=1e-5, atol=1e-9)


def test_the_derivative_of_attention_by_hand():
    # Between entries -1 and 1 a weight of 0 attends to both alike and stands for 0. The derivative
    # of what it stands for is 2 / tau times the variance of the entries under the attention.
    weight = torch.tensor([[-1.0, 1.0] * 16])
    student, _ = student_of(weight, bits=1, temperature=0.25)
    student.soften(weight)
    with torch.no_grad():
        student.latent[0, 0] = 0.0
    value = student.weight()
    (slope,) = torch.autograd.grad(value[0, 0], student.latent)
    tau = 0.25 * 2.0**2
    assert slope[0, 0].item() == pytest.approx(2 / tau, rel=0.01)
    assert slope[0, 1:].abs().max() < 0.01


@pytest.mark.parametrize("bits", [2, 4])
def test_the_closed_form_is_the_derivative_of_attention(bits):
    weight = matrix(8, 128)
    student, _ = student_of(weight, bits=bits, temperature=0.3)
    student.soften(weight)
    x = student.latent.detach().bfloat16().double().requires_grad_(True)
    entries = student.entries.detach().double()
    gap = (entries.amax(1) - entries.amin(1)) / (2**bits - 1)
    heat = 0.3 * gap.square()[:, None, None]
    share = torch.softmax(-(x[..., None] - entries[:, None]).square() / heat, -1)
    (share * entries[:, None]).sum().backward()
    (found,) = torch.autograd.grad(student.weight().sum(), student.latent)
    expected = x.grad * student.unit[:, None]
    size = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * size)


def test_iterations_move_entries_to_the_means_of_their_weights():
    weight = torch.tensor([[-1.0] * 16 + [1.0] * 16])
    student, _ = student_of(weight, bits=1, iterations=3, temperature=0.01)
    student.soften(weight)
    with torch.no_grad():
        student.latent[0, 16:24] = 0.5
    values = student.weight().detach()
    assert torch.allclose(values[0, 16:], torch.tensor(0.75), atol=0.01)
    assert torch.allclose(values[0, :16], torch.tensor(-1.0), atol=0.01)


def test_padding_of_tiles_draws_no_mean():
    weight = matrix(9, 70) + 0.05
    student, packed = student_of(weight, bits=2, granularity="tile", iterations=2, temperature=1e-4)
    student.soften(weight)
    torch.testing.assert_close(student.weight(), reconstruct(packed), rtol=0.05, atol=1e-3)


def test_statistics_are_those_of_the_start():
    assert Dkm().statistics == ("fisher",)
    assert Dkm(start={"method": "kmeans", "importance": "none"}).statistics == ()
    assert Dkm(start="lnq").statistics == ("guided_hessian",)


def test_a_straight_derivative_is_one():
    weight = matrix(8, 128)
    student, _ = student_of(weight, bits=2, derivative="straight")
    student.soften(weight)
    (found,) = torch.autograd.grad(student.weight().sum(), student.latent)
    torch.testing.assert_close(found, student.unit[:, None].expand(8, 128))
    with pytest.raises(RecipeError, match="derivative 'straight'"):
        Dkm(derivative="straight", iterations=1).check(64, 256)


@pytest.mark.parametrize(("start", "kind", "words"), [
    ("integer", RecipeError, "got 'integer'.*makes palettes"),
    ("kmean", RecipeError, "unknown method 'kmean'"),
    ({"method": "kmeans", "sparse_outliers": 0.01}, UnsupportedError, "Leave sparse_outliers out"),
])  # fmt: skip
def test_starts_that_are_no_plain_palette_are_refused(start, kind, words):
    with pytest.raises(kind, match=words):
        Dkm(start=start).check(64, 256)
