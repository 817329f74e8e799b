"""Protected tokens of the coarse formats: what is stored of them, where, and at what cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.errors import RecipeError
from squeeze.quant.kv._protected import protect, protected_bits, restore
from squeeze.quant.kv.binary_spectral import BinarySpectral
from squeeze.quant.kv.ternary import Ternary
from squeeze.recipe import load
from squeeze.types import bytes_of

FORMATS = [
    Ternary(protected=4),
    Ternary("token", 16, protected=16),
    BinarySpectral(protected=2),
    BinarySpectral(0.5, group_size=32, protected=8),
]


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_textbook():
    x = torch.zeros(1, 128, 2)
    x[0, 5], x[0, 100] = torch.tensor([15.0, -15.0]), torch.tensor([3.0, 7.5])
    packed = protect(x, torch.zeros_like(x), 2, None)
    assert packed["kept_at"].tolist() == [[[5, 100]]]
    assert packed["kept_scale"].tolist() == [[[2.0, 1.0]]]
    # 15 = 7.5 * 2 is code 15, -15 code 0; 3 lies between codes 10 and 11, 7.5 is code 15.
    assert packed["kept"].tolist() == [[[[15 | 10 << 4, 0 | 15 << 4]]]]
    found = restore(torch.zeros_like(x), packed)
    assert found[0, 5].tolist() == [15.0, -15.0]
    assert found[0, 100].tolist() == [2.5, 7.5]
    assert found.count_nonzero() == 4


@settings(max_examples=30, deadline=None)
@given(
    runs=st.integers(1, 2),
    count=st.sampled_from([2, 4, 10, 16]),
    size=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 99),
    magnitude=st.sampled_from([1e-6, 1.0, 1e5]),
)
def test_remainders_come_back_within_half_a_step(runs, count, size, seed, magnitude):
    lost = sample(3, 128 * runs, size, seed=seed) * magnitude
    salience = sample(3, 128 * runs, seed=seed + 1)
    packed = protect(lost, torch.zeros_like(lost), count, salience)
    found = restore(torch.zeros_like(lost), packed)
    top = salience.unflatten(-1, (runs, 128)).topk(count).indices.sort(-1).values
    assert torch.equal(packed["kept_at"].long(), top)
    chosen = torch.zeros(3, runs, 128, dtype=torch.bool).scatter(-1, top, True).flatten(1)
    assert (found[~chosen] == 0).all()
    error = (found - lost)[chosen].abs().amax(-1)
    step = lost[chosen].abs().amax(-1) / 7.5
    rounding = 2**-10 * step * 7.5 + 2**-24 * 7.5  # of the scale in float16
    saturated = step > 65504
    assert ((error <= step / 2 + rounding) | saturated).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_protected_tokens_are_closer_and_the_others_unchanged(format):
    x, salience = sample(2, 3, 256, 64), sample(2, 3, 256, seed=1)
    plain = type(format)(**{**vars(format), "protected": 0})
    found = format.decode(format.encode(x, {"salience": salience}), {})
    before = plain.decode(plain.encode(x, {}), {})
    top = salience.unflatten(-1, (2, 128)).topk(format.protected).indices
    chosen = torch.zeros(2, 3, 2, 128, dtype=torch.bool).scatter(-1, top, True).flatten(2)
    assert torch.equal(found[~chosen], before[~chosen])
    better = (found - x)[chosen].square().mean()
    assert better < 0.05 * (before - x)[chosen].square().mean()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_of_equally_salient_tokens_the_worst_are_protected(format):
    x = sample(2, 128, 64)
    x[:, 77] *= 20
    x[:, 3] *= 10
    assert {3, 77} <= set(format.encode(x, {})["kept_at"][0, 0].tolist())
    salience = torch.zeros(1, 128)
    salience[:, 100:] = 1  # of all leading dimensions
    x[1, 120] *= 5
    found = format.encode(x, {"salience": salience})["kept_at"]
    assert (found >= 100).all()
    assert 120 in found[1]


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("format", FORMATS[:1] + FORMATS[2:], ids=str)
def test_stored_bytes_are_those_that_are_counted(format, size):
    format.check(size)
    x = sample(3, 2, 256, size)
    stored = 8 * bytes_of(format.encode(x, {})) / x.numel()
    assert stored == pytest.approx(format.bits_per_value(size), rel=1e-9)
    extra = protected_bits(format.protected, size)
    plain = type(format)(**{**vars(format), "protected": 0})
    assert format.bits_per_value(size) == pytest.approx(plain.bits_per_value(size) + extra)
    assert protected_bits(4, 128) == pytest.approx(4 * (64 + 3) * 8 / (128 * 128))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_batches_and_blocks_do_not_matter(format):
    x, salience = sample(2, 3, 384, 64), sample(2, 3, 384, seed=1)
    whole = format.decode(format.encode(x, {"salience": salience}), {})
    for i in range(3):
        part = slice(128 * i, 128 * (i + 1))
        one = format.encode(x[1:, :, part], {"salience": salience[1:, :, part]})
        assert torch.equal(format.decode(one, {}), whole[1:, :, part])


def test_a_slot_without_a_block_decodes_to_something():
    packed = FORMATS[0].encode(sample(1, 128, 64), {})
    packed["kept_at"].fill_(255)
    assert FORMATS[0].decode(packed, {}).shape == (1, 128, 64)


def test_block_lengths_hold_whole_runs():
    assert [format.block_length for format in FORMATS] == [128, 128, 128, 128]


@pytest.mark.parametrize("count", [-2, 3, 18, 2.0])
def test_counts_that_do_not_fit_are_refused(count):
    keys = {"method": "ternary", "protected": count}
    with pytest.raises(RecipeError, match=r"protected.*at least 0 and at most 16 and a multiple"):
        load({"kv_cache": {"keys": keys, "values": {"bits": 16}}})
