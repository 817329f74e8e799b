"""The clustering weight method: sizes, exactness, importance and 8-bit entries."""

import pytest
import torch

from squeeze.errors import UnsupportedError
from squeeze.kernels.lut_linear.api import reconstruct
from squeeze.quant.weights.kmeans import KMeans


def matrix(out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    importance = torch.rand(out_features, in_features, generator=generator).pow(4)
    return weight, importance


def loss(weight, importance, method):
    error = reconstruct(method.fit(weight, {"fisher": importance})) - weight
    return float((importance * error.square()).sum())


@pytest.mark.parametrize("granularity", ["tensor", "rows", "row", "tile"])
@pytest.mark.parametrize("entries", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(16, 128), (13, 100)])
def test_sizes_are_known_before_fitting(granularity, entries, shape):
    method = KMeans(bits=3, granularity=granularity, entries=entries)
    weight, importance = matrix(*shape)
    fitted, empty = method.fit(weight, {"fisher": importance}), method.empty(*shape, "meta")
    assert fitted.effective_bits == method.shape_bits(*shape)
    assert fitted.nbytes == method.shape_bytes(*shape)
    for name in ("indices", "codebook", "scale"):
        real, shell = getattr(fitted, name), getattr(empty, name)
        assert (real is None) == (shell is None)
        if real is not None:
            assert (real.shape, real.dtype) == (shell.shape, shell.dtype)
            assert real.is_contiguous()
    assert (fitted.codebook.diff(dim=-1) >= 0).all()


def test_effective_bits_by_hand():
    # 128 x 3 bits of indices, 8 entries of 8 bits and a scale of 16 bits for each row of 128.
    assert KMeans(bits=3).shape_bits(16, 128) == (128 * 3 + 8 * 8 + 16) / 128


@pytest.mark.parametrize("entries", ["float16", "int8"])
def test_more_bits_lose_less(entries):
    weight, importance = matrix(16, 192)
    losses = [
        loss(weight, importance, KMeans(bits=bits, entries=entries, granularity="rows"))
        for bits in range(1, 7)
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("granularity", ["rows", "row", "tile"])
@pytest.mark.parametrize("entries", ["float16", "int8"])
def test_rows_clustered_in_parts_are_as_together(granularity, entries, monkeypatch):
    weight, importance = matrix(29, 100)
    method = KMeans(bits=3, granularity=granularity, rows_per_codebook=3, entries=entries)
    whole = method.fit(weight, {"fisher": importance})
    monkeypatch.setattr("squeeze.quant.weights._palette.WORKING", 1000)
    parts = method.fit(weight, {"fisher": importance})
    assert torch.equal(whole.indices, parts.indices)
    assert torch.equal(whole.codebook, parts.codebook)
    if entries == "int8":
        assert torch.equal(whole.scale, parts.scale)


def test_importance_is_respected():
    weight, importance = matrix(16, 192)
    weighted = loss(weight, importance, KMeans(bits=2))
    plain = loss(weight, importance, KMeans(bits=2, importance="none"))
    assert weighted < 0.95 * plain


def test_finer_granularity_loses_less():
    weight, importance = matrix(16, 192)
    losses = [
        loss(weight, importance, KMeans(bits=2, granularity=granularity))
        for granularity in ("tensor", "row")
    ]
    assert losses == sorted(losses, reverse=True)


def test_eight_bit_entries_cost_little_accuracy():
    weight, importance = matrix(16, 192)
    exact = loss(weight, importance, KMeans(bits=4, entries="float16"))
    rounded = loss(weight, importance, KMeans(bits=4, entries="int8"))
    assert rounded < 1.05 * exact


@pytest.mark.parametrize("entries", ["float16", "int8"])
def test_few_values_are_reproduced(entries):
    weight = torch.tensor([-1.0, 0.0, 0.5, 1.0]).repeat(3, 16)
    if entries == "int8":
        weight = torch.tensor([-127.0, 0.0, 64.0, 127.0]).repeat(3, 16)
    fitted = KMeans(bits=2, entries=entries, importance="none").fit(weight)
    assert torch.equal(reconstruct(fitted), weight)


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile"])
def test_zero_rows_stay_zero(granularity):
    weight, importance = matrix(9, 128)
    weight[4] = 0
    dense = reconstruct(KMeans(bits=4, granularity=granularity).fit(weight, {"fisher": importance}))
    assert dense.isfinite().all()
    assert dense[4].abs().max() < 1e-4


def test_fit_does_not_depend_on_other_rows():
    weight, importance = matrix(8, 96)
    whole = reconstruct(KMeans(bits=3).fit(weight, {"fisher": importance}))
    half = reconstruct(KMeans(bits=3).fit(weight[:4], {"fisher": importance[:4]}))
    torch.testing.assert_close(whole[:4], half, rtol=2e-2, atol=1e-5)


def test_statistics_follow_importance():
    assert KMeans().statistics == ("fisher",)
    assert KMeans(importance="none").statistics == ()


def test_missing_importance_is_an_error():
    with pytest.raises(ValueError, match="needs its statistic"):
        KMeans().fit(torch.ones(4, 32))


def test_refuses_what_saves_nothing():
    with pytest.raises(UnsupportedError, match=r"effective bits.*less than 16"):
        KMeans(bits=8, entries="float16").check(64, 256)
