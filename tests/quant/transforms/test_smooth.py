import pytest
import torch

from squeeze.errors import RecipeError
from squeeze.quant.kv.affine import Affine
from squeeze.quant.transforms.smooth import FLOOR, Smooth
from squeeze.recipe import load

SETTINGS = [Smooth(), Smooth(1.0), Smooth(1.0, pairs=True), Smooth(0.7, pairs=True, outliers=3)]


def samples(heads=2, size=16, count=64):
    generator = torch.Generator().manual_seed(0)
    loud = torch.logspace(-1, 1.5, size)[torch.randperm(size, generator=generator)]
    return torch.randn(heads, count, size, generator=generator) * loud


def rotate(x, angle):
    """Turn every pair (i, i + D / 2) by its own angle, as RoPE does."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)


def test_textbook():
    # Largest magnitudes 8 and 2, geometric mean 4: factors 2 and 1/2.
    keys = torch.tensor([[[8.0, 1.0], [-4.0, -2.0]]])
    fitted = Smooth(1.0).fit({"kv_samples": keys})
    torch.testing.assert_close(fitted["factor"], torch.tensor([[2.0, 0.5]]))
    stored = Smooth().apply(keys, fitted)
    query, shift = Smooth().prepare_query(torch.tensor([[[[3.0, 4.0]]]]), fitted)
    torch.testing.assert_close(stored, torch.tensor([[[4.0, 2.0], [-2.0, -4.0]]]))
    torch.testing.assert_close(query.flatten(), torch.tensor([6.0, 2.0]))
    assert shift is None
    # 3 * 8 + 4 * 1 = 6 * 4 + 2 * 2
    assert (query.flatten() * stored[0, 0]).sum().item() == pytest.approx(28)


@pytest.mark.parametrize("method", SETTINGS, ids=str)
def test_scores_are_unchanged_with_grouped_heads(method):
    generator = torch.Generator().manual_seed(1)
    fitted = {n: t.double() for n, t in method.fit({"kv_samples": samples()}).items()}
    keys = torch.randn(3, 2, 32, 16, generator=generator, dtype=torch.float64)
    query = torch.randn(3, 6, 4, 16, generator=generator, dtype=torch.float64)
    stored = method.apply(keys, fitted)
    scaled, _ = method.prepare_query(query, fitted)
    wide = lambda x: x.repeat_interleave(3, dim=1).mT  # noqa: E731
    torch.testing.assert_close(scaled @ wide(stored), query @ wide(keys))
    torch.testing.assert_close(method.invert(stored, fitted), keys)


def test_full_strength_makes_channels_equally_loud_and_none_leaves_them():
    keys = samples()
    full = Smooth(1.0).fit({"kv_samples": keys})
    loud = Smooth().apply(keys, full).abs().amax(1)
    torch.testing.assert_close(loud, loud[:, :1].expand_as(loud))
    none = Smooth(0.0).fit({"kv_samples": keys})
    assert torch.equal(none["factor"], torch.ones(2, 16))


def test_pair_factors_commute_with_rotation():
    keys, method = samples(), Smooth(1.0, pairs=True)
    angle = torch.rand(64, 8, generator=torch.Generator().manual_seed(2)) * 7
    fitted = method.fit({"kv_samples": keys})
    turned = method.fit({"kv_samples": rotate(keys, angle)})
    torch.testing.assert_close(fitted["factor"], turned["factor"])
    before = rotate(method.apply(keys, fitted), angle)
    torch.testing.assert_close(before, method.apply(rotate(keys, angle), fitted))
    alone = Smooth(1.0).fit({"kv_samples": keys})["factor"]
    assert (alone[:, :8] - alone[:, 8:]).abs().max() > 0.1


def test_outliers_and_their_partners_get_factors_of_their_own():
    keys = samples(1)
    keys[0, 7, 3] = 1000.0
    together = Smooth(1.0, pairs=True).fit({"kv_samples": keys})["factor"][0]
    apart = Smooth(1.0, pairs=True, outliers=1).fit({"kv_samples": keys})["factor"][0]
    assert together[3] == together[11]
    assert apart[3] > 10 * apart[11]
    others = [i for i in range(16) if i not in (3, 11)]
    ratio = (apart / together)[others]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_silent_channels_are_not_blown_up():
    keys = samples()
    keys[..., 5] = 0
    factor = Smooth(1.0).fit({"kv_samples": keys})["factor"]
    torch.testing.assert_close(factor[:, 5], factor.amax(1) * FLOOR)
    silent = Smooth(1.0).fit({"kv_samples": torch.zeros(1, 4, 8)})["factor"]
    assert torch.equal(silent, torch.ones(1, 8))


def test_loud_channels_cost_a_per_token_format_less():
    keys = samples(count=256)[None]
    query = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(3))
    method, format = Smooth(), Affine(4, "token", 16)
    fitted = method.fit({"kv_samples": keys[0]})

    def error(restored):
        return float(((restored - keys) @ query.mT).square().mean())

    smoothed = format.decode(format.encode(method.apply(keys, fitted), {}), {})
    plain = format.decode(format.encode(keys, {}), {})
    assert error(method.invert(smoothed, fitted)) < error(plain) / 2


def test_dtypes():
    fitted = Smooth().fit({"kv_samples": samples().half()})
    assert fitted["factor"].dtype == torch.float32
    assert Smooth().apply(torch.randn(1, 2, 4, 16).bfloat16(), fitted).dtype == torch.float32
    query = torch.randn(1, 4, 1, 16).bfloat16()
    assert Smooth().prepare_query(query, fitted)[0].dtype == torch.bfloat16


def side(transforms):
    keys = {"method": "affine", "transforms": transforms}
    return {"kv_cache": {"keys": keys, "values": {"bits": 16}}}


def test_recipes_give_a_transform_its_parameters():
    entry = {"method": "smooth", "strength": 0.25}
    recipe = load(side(["center", entry]))
    assert recipe.kv_cache.keys.transforms == ("center", entry)
    assert load(recipe.to_dict()).kv_cache == recipe.kv_cache


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ([{"method": "smooth", "strength": 2}], ("transforms.strength", "got 2", "at most 1")),
        ([{"method": "smooth", "strenth": 1}], ("'strenth'", "Did you mean 'strength'?")),
        ([{"method": "smoth"}], ("unknown method 'smoth'", "Did you mean 'smooth'?")),
        ([{"strength": 1}], ("transforms.method", "is missing", "center, hadamard")),
        (["smooth", {"method": "smooth"}], ("'smooth' is named twice", "each transform once")),
    ],
)
def test_mistakes_in_a_transform_are_named(transforms, words):
    with pytest.raises(RecipeError) as caught:
        load(side(transforms))
    assert all(word in str(caught.value) for word in ("kv_cache.keys", *words)), caught.value
