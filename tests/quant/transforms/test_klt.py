import pytest
import torch

from squeeze.quant.kv.graded import Graded
from squeeze.quant.transforms.klt import Klt


def statistics(heads=2, size=32, tokens=2048, seed=0, dtype=torch.float64):
    """Keys that fill a few directions, and queries that care for some channels more."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, size, size, generator=generator, dtype=dtype)
    fading = torch.logspace(0, -2, size, dtype=dtype)
    samples = torch.randn(heads, tokens, size, generator=generator, dtype=dtype) * fading @ mix
    importance = torch.rand(heads, size, generator=generator, dtype=dtype) * 4 + 0.1
    return {"kv_samples": samples + 3, "kv_importance": importance}


def test_textbook():
    # Keys along (1, 1) with length sqrt 2 and along (1, -1) with length 0.1 sqrt 2; all channels
    # count alike, so the directions are those, the longer first.
    samples = torch.tensor([[[1.0, 1.0], [-1.0, -1.0], [0.1, -0.1], [-0.1, 0.1]]])
    fitted = Klt().fit({"kv_samples": samples, "kv_importance": torch.ones(1, 2)})
    stored = Klt().apply(samples, fitted)
    root = 2**0.5
    expected = torch.tensor([[[root, 0], [-root, 0], [0, 0.1 * root], [0, -0.1 * root]]])
    torch.testing.assert_close(stored.abs(), expected.abs())
    torch.testing.assert_close(Klt().invert(stored, fitted), samples)


def test_scores_are_unchanged_with_grouped_heads():
    measured = statistics()
    fitted = Klt().fit(measured)
    generator = torch.Generator().manual_seed(1)
    keys = measured["kv_samples"][None, :, :64].float()
    query = torch.randn(1, 6, 4, 32, generator=generator)
    moved, shift = Klt().prepare_query(query, fitted)
    assert shift is None and moved.shape == query.shape and moved.dtype == query.dtype
    scores = query @ keys.repeat_interleave(3, dim=1).mT
    rotated = moved @ Klt().apply(keys, fitted).repeat_interleave(3, dim=1).mT
    torch.testing.assert_close(rotated, scores, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(Klt().invert(Klt().apply(keys, fitted), fitted), keys)


@pytest.mark.parametrize("heads", [2, 6])
def test_rows_of_a_batch_are_moved_as_they_are_alone(heads):
    fitted = Klt().fit(statistics())
    query = torch.randn(3, heads, 5, 32, generator=torch.Generator().manual_seed(2))
    moved, _ = Klt().prepare_query(query, fitted)
    alone = [Klt().prepare_query(row[None], fitted)[0] for row in query]
    torch.testing.assert_close(moved, torch.cat(alone))


def test_stored_channels_are_uncorrelated_and_fall():
    measured = statistics()
    stored = Klt().apply(measured["kv_samples"], Klt().fit(measured))
    centred = stored - stored.mean(1, keepdim=True)
    covariance = centred.mT @ centred / stored.shape[1]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    assert (variance.diff(dim=-1) <= 1e-6).all()
    off = covariance - torch.diag_embed(variance)
    assert off.abs().max() < 1e-5 * variance.max()


def test_queries_weigh_every_stored_channel_alike():
    measured = statistics()
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(1, 2, 4096, 32, generator=generator, dtype=torch.float64)
    queries = queries * measured["kv_importance"].sqrt()[None, :, None]
    moved, _ = Klt().prepare_query(queries, Klt().fit(measured))
    squares = moved.square().mean(2)
    assert (squares.amax(-1) / squares.amin(-1)).max() < 1.25
    # A common factor of all queries says nothing about the channels.
    louder = Klt().fit({**measured, "kv_importance": 100 * measured["kv_importance"]})
    torch.testing.assert_close(louder, Klt().fit(measured))


def test_silent_and_constant_channels_keep_the_basis_invertible():
    measured = statistics()
    measured["kv_importance"][:, :5] = 0
    measured["kv_samples"][:, :, 7] = 600
    fitted = Klt().fit(measured)
    keys = measured["kv_samples"][:, :64].float()
    restored = Klt().invert(Klt().apply(keys, fitted), fitted)
    assert (restored - keys).abs().max() < 1e-3
    nothing = Klt().fit({**measured, "kv_importance": torch.zeros(2, 32)})
    assert all(table.isfinite().all() for table in nothing.values())


def test_graded_scores_are_closer_in_the_basis():
    measured = statistics(size=64)
    fitted = Klt().fit(measured)
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(1, 2, 256, 64, generator=generator, dtype=torch.float64)
    queries = queries * measured["kv_importance"].sqrt()[None, :, None]
    keys = measured["kv_samples"][:, :128].float()
    keys = keys - keys.mean(1, keepdim=True)

    def error(stored):
        return (queries[0] @ (stored - keys).double().mT).square().mean()

    uniform, graded = Graded((2,)), Graded((4, 3, 1, 0))
    plain = uniform.decode(uniform.encode(keys, {}), {})
    rotated = graded.decode(graded.encode(Klt().apply(keys, fitted), {}), {})
    assert graded.bits_per_value(64) < uniform.bits_per_value(64)
    assert error(Klt().invert(rotated, fitted)) < error(plain) / 4
