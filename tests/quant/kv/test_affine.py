import pytest
import torch

from squeeze.errors import UnsupportedError
from squeeze.quant.kv.affine import Affine
from squeeze.types import bytes_of

FORMATS = [
    Affine(bits, granularity, group, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity, group in (("channel", 64), ("token", 16))
    for symmetric in (False, True)
]


def keys(*shape, seed=0):
    """Gaussian keys of width 2 with channel offsets up to 600, as some models' biases make."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(*shape, generator=generator)
    return x + torch.linspace(-600, 600, shape[-1])


def grouped(format, x):
    """Bring each group's values together in the last dimension."""
    if format.granularity == "channel":
        return x.unflatten(-2, (-1, format.group_size)).transpose(-1, -2)
    return x.unflatten(-1, (-1, format.group_size))


def test_textbook():
    # Four channels, 2 bits: minimum 1 and step 2 give the codes 0 to 3.
    format = Affine(2, "token", 4)
    x = torch.tensor([1.0, 3.0, 5.0, 7.0]).expand(1, 32, 4)
    packed = format.encode(x, {})
    assert packed["zero"].eq(1).all()
    assert packed["scale"].eq(2).all()
    assert packed["scale"].shape == (1, 32, 1)
    # Code k of channel k in all four fields of the eight bytes.
    assert packed["codes"].tolist() == [[[0, 0x55, 0xAA, 0xFF]] * 8]
    assert torch.equal(format.decode(packed, {}), x)


def test_symmetric_textbook():
    # 3 bits, largest magnitude 6: step 2, codes -3 to 3 stored from 1 to 7.
    format = Affine(3, "token", 4, symmetric=True)
    x = torch.tensor([-6.0, 0.0, 2.9, 3.1]).expand(1, 32, 4)
    packed = format.encode(x, {})
    assert set(packed) == {"codes", "scale"}
    assert packed["scale"].eq(2).all()
    assert format.decode(packed, {})[0, 0].tolist() == [-6.0, 0.0, 2.0, 4.0]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_is_at_most_half_a_step(format):
    x = keys(2, 3, 128, 64)
    packed = format.encode(x, {})
    error = grouped(format, (format.decode(packed, {}) - x).abs()).amax(-1)
    step = packed["scale"].float()
    # The rounding of scale and zero to float16 may add 2**-11 of the range.
    assert (error <= step * (0.5 + 2**format.bits * 2**-11)).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_bytes_are_what_bits_per_value_says(format):
    x = keys(2, 3, 128, 64)
    stored = bytes_of(format.encode(x, {}))
    assert 8 * stored == format.bits_per_value(64) * x.numel()
    assert format.constant_bytes(3, 64) == 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantizing_twice_changes_nothing(format):
    # Offsets far beyond the range would move float16's zero: see the class.
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    once = format.decode(format.encode(x, {}), {})
    assert torch.equal(format.decode(format.encode(once, {}), {}), once)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_constants_and_zeros_are_exact(format):
    # A symmetric scale of 3.5 / 7 or 600 / 127 is rounded, zero is not.
    for value in (0.0,) if format.symmetric else (0.0, -3.5, 600.0):
        x = torch.full((1, 2, 64, 32), value)
        assert torch.equal(format.decode(format.encode(x, {}), {}), x)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_more_bits_are_better(granularity, symmetric):
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in (2, 3, 4, 8):
        format = Affine(bits, granularity, 64, symmetric)
        errors.append((format.decode(format.encode(x, {}), {}) - x).pow(2).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_outlier_channel_stays_alone():
    x = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(2))
    x[..., 3] += 600
    channel, token = Affine(4, "channel", 64), Affine(4, "token", 16)
    errors = [(f.decode(f.encode(x, {}), {}) - x).abs().amax() for f in (channel, token)]
    assert errors[0] < 0.5
    assert errors[1] > 1


def test_huge_values_saturate_and_stay_finite():
    x = torch.tensor([-1e30, 0.0, 1.0, 1e30], dtype=torch.bfloat16).expand(1, 64, 4)
    for format in (Affine(2, "token", 4), Affine(8, "token", 4, True), Affine(4, "channel", 32)):
        assert format.decode(format.encode(x, {}), {}).isfinite().all()


def test_several_blocks_share_one_packing_run_and_leading_dimensions_are_kept():
    format = Affine(4, "channel", 32)
    x = keys(3, 2, 5, 96, 8)
    packed = format.encode(x, {})
    assert packed["codes"].shape == (3, 2, 5, 48, 8)
    assert packed["codes"].is_contiguous()
    assert packed["scale"].shape == (3, 2, 5, 3, 8)
    alone = format.encode(x[1, 0, 2:3], {})
    assert torch.equal(alone["codes"][0], packed["codes"][1, 0, 2])


def test_float64_decode_is_the_same_number():
    format = Affine(3, "token", 8)
    packed = format.encode(keys(1, 2, 32, 16), {})
    narrow, wide = format.decode(packed, {}), format.decode(packed, {}, torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    ("format", "size", "words"),
    [
        (Affine(4, "token", 48), 64, ("group_size 48", "16, 32, 64", "heads of 64")),
        (Affine(4, "channel", 48), 64, ("group_size 48", "32, 64, 128, 256", "kv_cache")),
    ],
)
def test_group_that_does_not_fit_is_refused(format, size, words):
    with pytest.raises(UnsupportedError) as caught:
        format.check(size)
    assert all(word in str(caught.value) for word in words)
    format.__class__(4, format.granularity, 32).check(size)
