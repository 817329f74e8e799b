import pytest
import torch

from squeeze.quant.kv.float8 import Float8
from squeeze.types import bytes_of

FORMATS = [Float8("token"), Float8("head")]


def draw(*shape, seed=0, width=3.0):
    return width * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_textbook():
    # The largest magnitude, 896, is brought within 448 by the scale 2. What is stored: 448; 27.5,
    # a tie between 26 and 28 that goes to the even fraction; the smallest number 2**-9; half of
    # it, which rounds to zero.
    x = torch.tensor([-896.0, 55.0, 2**-8, 2**-9]).expand(1, 32, 4)
    packed = Float8().encode(x, {})
    assert packed["scale"].eq(2).all()
    assert packed["scale"].shape == (1, 32, 1)
    assert packed["codes"][0, 0].tolist() == [0b1_1111_110, 0b0_1011_110, 0b0_0000_001, 0]
    assert Float8().decode(packed, {})[0, 0].tolist() == [-896.0, 56.0, 2**-8, 0.0]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_is_a_sixteenth_or_half_the_smallest_step(format):
    x = draw(2, 3, 128, 64) * torch.logspace(-4, 3, 64)
    packed = format.encode(x, {})
    scale = packed["scale"].float().repeat_interleave(128 // packed["scale"].shape[-2], dim=-2)
    error = (format.decode(packed, {}) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10)).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_scale_is_a_power_of_two_that_uses_the_range(format):
    x = draw(2, 3, 256, 64) * 10.0 ** torch.arange(-3, 3).view(2, 3, 1, 1)
    packed = format.encode(x, {})
    fraction, _ = torch.frexp(packed["scale"].float())
    assert fraction.eq(0.5).all()
    codes = packed["codes"].view(torch.float8_e4m3fn).float().abs()
    largest = codes.unflatten(-2, (packed["scale"].shape[-2], -1)).amax((-2, -1))
    assert (largest >= 224).all()
    assert (largest <= 448).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_bytes_are_what_bits_per_value_says(format):
    x = draw(2, 3, 256, 64)
    stored = bytes_of(format.encode(x, {}))
    assert 8 * stored == format.bits_per_value(64) * x.numel()
    assert format.constant_bytes(3, 64) == 0


def test_effective_bits():
    assert Float8().bits_per_value(64) == 8.25
    assert Float8().bits_per_value(128) == 8.125
    assert Float8("head").bits_per_value(128) == 8 + 2**-10


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantizing_twice_changes_nothing(format):
    x = draw(2, 1, 128, 64)
    # A scale may halve, when the largest magnitude was rounded down to 224: the numbers stay.
    once = format.decode(format.encode(x, {}), {})
    assert torch.equal(format.decode(format.encode(once, {}), {}), once)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_and_heads_do_not_know_their_neighbours(format):
    x = draw(3, 2, 5, 128, 16)
    packed = format.encode(x, {})
    assert packed["codes"].shape == x.shape
    assert packed["codes"].is_contiguous()
    alone = format.encode(x[1, 0, 2:3], {})
    assert all(torch.equal(alone[name][0], packed[name][1, 0, 2]) for name in packed)


def test_a_scale_per_token_keeps_a_quiet_token_that_one_per_head_loses():
    x = draw(1, 1, 128, 64)
    x[..., 0, :] *= 1e6
    token, head = (f.decode(f.encode(x, {}), {})[..., 1:, :] for f in FORMATS)
    assert (token - x[..., 1:, :]).abs().max() < 1
    assert head.eq(0).all()


def test_zeros_are_exact_and_huge_values_saturate():
    for format in FORMATS:
        zero = torch.zeros(1, 2, 128, 32)
        assert torch.equal(format.decode(format.encode(zero, {}), {}), zero)
        x = torch.tensor([-1e30, 1.0, float("inf"), 0.0]).expand(1, 128, 4)
        restored = format.decode(format.encode(x, {}), {})
        assert restored[0, 0].tolist() == [-448 * 2.0**15, 0.0, 448 * 2.0**15, 0.0]


def test_nan_shows_in_its_whole_group():
    x = draw(1, 1, 128, 16)
    x[0, 0, 5, 3] = float("nan")
    token, head = (f.decode(f.encode(x, {}), {}).isnan() for f in FORMATS)
    assert token[0, 0, 5].all()
    assert token.sum() == 16
    assert head.all()
