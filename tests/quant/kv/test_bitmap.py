import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.errors import UnsupportedError
from squeeze.quant.kv.bitmap import Bitmap
from squeeze.types import bytes_of

SPARSITIES = (0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
FORMATS = [Bitmap(sparsity, bits) for sparsity in SPARSITIES for bits in (4, 16)]


def through(format, x):
    return format.decode(format.encode(x, {}), {})


def groups_of(x, apart):
    """``[..., groups, 16]``, the channels of a group ``apart`` from one another."""
    return x.unflatten(-1, (-1, 16, apart)).transpose(-1, -2).flatten(-3, -2)


def test_textbook():
    # Channels 1, 3, 9 and 12 of 16 are the largest; 14 / 7 is the scale.
    x = torch.ones(16)
    x[1], x[3], x[9], x[12] = 14.0, -4.0, 6.0, -10.0
    format = Bitmap(0.75)
    packed = format.encode(x.expand(1, 32, 16), {})
    assert format.kept == 4
    assert packed["scale"].eq(2).all()
    # Slots 1, 3 and 12 have the first bits of nibbles 1 and 3 and the second of 4; 9 that of 1.
    bits = 0x10 | 0x1000 | 0x20000 | 0x20
    assert packed["bitmap"].tolist() == [[[bits | bits << 2]] * 16]
    # The first half upwards and the second downwards: codes 7, -2, -5, 3, both tokens the same.
    assert packed["codes"].tolist() == [[0x77, 0xEE, 0xBB, 0x33] * 16]
    kept = torch.zeros(16)
    kept[1], kept[3], kept[9], kept[12] = 14.0, -4.0, 6.0, -10.0
    assert torch.equal(format.decode(packed, {}), kept.expand(1, 32, 16))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("size", "apart"), [(16, 1), (64, 4), (80, 1), (96, 2), (128, 8)])
def test_the_largest_of_every_group_survive(format, size, apart):
    x = torch.randn(2, 3, 64, size)
    groups = groups_of(x, apart)
    least = groups.abs().topk(format.kept, dim=-1).values[..., -1:]
    pruned = torch.where(groups.abs() >= least, groups, 0.0)
    decoded = groups_of(through(format, x), apart)
    if format.survivor_bits == 16:
        assert torch.equal(decoded, pruned.half().float())
    else:
        scale = (x.abs().amax(-1) / 7).half().float()[..., None, None]
        assert torch.equal(decoded, (pruned / scale).round().clamp(-7, 7) * scale)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("size", [48, 128])
def test_stored_bytes_are_what_bits_per_value_says(format, size):
    x = torch.randn(2, 3, 64, size)
    assert 8 * bytes_of(format.encode(x, {})) == format.bits_per_value(size) * x.numel()
    assert format.constant_bytes(3, size) == 0


def test_effective_bits_of_the_recipes():
    assert Bitmap(0.7, 4).bits_per_value(128) == 1 + 5 * 4 / 16 + 16 / 128 == 2.375
    assert Bitmap(0.7, 16).bits_per_value(128) == 6
    assert Bitmap(0.5, 16).bits_per_value(64) == 9


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0.5, 8), (0.53125, 8), (0.55, 7), (0.6, 6), (0.7, 5), (0.71875, 5), (0.8, 3), (0.95, 1)],
)
def test_count_is_rounded_with_halves_up(sparsity, kept):
    assert Bitmap(sparsity).kept == kept


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    pairs=st.integers(1, 3),
    groups=st.integers(1, 9),
    sparsity=st.floats(0.5, 0.95),
    bits=st.sampled_from([4, 16]),
    seed=st.integers(0, 99),
)
def test_packing_keeps_every_survivor(lead, pairs, groups, sparsity, bits, seed):
    # Small integers, many of them equal, and 7 in every token: four bits hold them exactly.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-7, 8, (*lead, 32 * pairs, 16 * groups), generator=generator).float()
    x[..., 0] = 7.0
    format = Bitmap(sparsity, bits)
    decoded = through(format, x)
    apart = groups & -groups
    dense, sparse = groups_of(x, apart), groups_of(decoded, apart)
    assert torch.equal(sparse, torch.where(sparse != 0, dense, 0.0))
    # The k largest, in magnitude and order: ties go to the lowest channel.
    expected = dense.abs().sort(dim=-1, descending=True, stable=True)
    chosen = expected.indices[..., : format.kept]
    assert torch.equal(sparse.gather(-1, chosen).abs(), expected.values[..., : format.kept])
    assert torch.equal(sparse.abs().sum(-1), expected.values[..., : format.kept].sum(-1))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_encoding_twice_changes_nothing(format):
    once = through(format, torch.randn(1, 2, 64, 64))
    assert torch.equal(through(format, once), once)


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_heads_and_tokens_are_independent(bits):
    format, x = Bitmap(0.7, bits), torch.randn(3, 2, 4, 64, 64)
    packed = format.encode(x, {})
    alone = format.encode(x[1, 1:, 2:3], {})
    for name, stored in packed.items():
        assert stored.is_contiguous()
        assert torch.equal(stored[1, 1:, 2:3], alone[name])
    changed = x.clone()
    changed[..., 1, :] += 100
    same = torch.arange(64) != 1
    assert torch.equal(through(format, changed)[..., same, :], through(format, x)[..., same, :])


@pytest.mark.parametrize("bits", [4, 16])
def test_zeros_few_values_and_equal_values(bits):
    format = Bitmap(0.7, bits)
    x = torch.zeros(1, 32, 128)
    assert torch.equal(through(format, x), x)
    x[..., 5] = -3.5
    assert torch.equal(through(format, x), x)
    kept = through(format, torch.full((1, 32, 128), 7.0))
    assert kept[..., : 5 * 8].eq(7).all()
    assert kept[..., 5 * 8 :].eq(0).all()


def test_huge_values_saturate_and_nan_is_seen():
    x = torch.randn(1, 32, 64)
    x[0, 3, 7], x[0, 4, 8], x[0, 5, 9] = 1e30, -float("inf"), float("nan")
    for bits in (4, 16):
        decoded = through(Bitmap(0.7, bits), x)
        assert decoded[0, [3, 4], [7, 8]].tolist() == pytest.approx([65504, -65504], rel=2**-10)
        assert decoded[0, 5, 9].isnan()
        seen = torch.arange(32) != 5
        assert decoded[0, seen].isfinite().all()


def test_channels_of_a_group_are_apart():
    # Sixteen large neighbours, as keys have them: interleaved groups keep most of them.
    x = torch.randn(1, 256, 64)
    x[..., 16:32] *= 10
    kept = through(Bitmap(0.7, 16), x)
    # Of sixteen neighbours in one group 5 would survive, which is less than a third.
    assert (kept[..., 16:32] != 0).float().mean() > 0.8


def test_head_of_an_odd_size_is_refused():
    with pytest.raises(UnsupportedError, match=r"heads of 72 channels.*multiple of 16"):
        Bitmap().check(72)
    Bitmap().check(112)
