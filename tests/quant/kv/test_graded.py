import pytest
import torch

from squeeze.errors import UnsupportedError
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.graded import Graded
from squeeze.types import bytes_of

FORMATS = [
    Graded(),
    Graded((4, 3, 1, 0)),
    Graded((8, 6), 64),
    Graded((7, 5, 4, 3, 2, 1, 0, 0), 32),
    Graded((1,), 256),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def roundtrip(format, x, **settings):
    return format.decode(format.encode(x, {}), {}, **settings)


def test_textbook():
    # Channel 0, 2 bits: 0, 10, ... 10, 0 spans 1 to 9 after the cut, in steps of 8 / 3.
    # Channel 1, 1 bit: half 0 and half 10 is mean 5, deviation 5: levels 5 -+ 6.
    tokens = torch.tensor([0.0, 10.0]).repeat_interleave(16)
    x = tokens[:, None].expand(1, 32, 16)
    packed = Graded((2, 1), 32).encode(x, {})
    assert packed["codes"].shape == (1, 8 + 4, 8)
    assert packed["zero"][0, 0].tolist() == [1.0] * 8 + [-1.0] * 8
    assert packed["scale"][0, 0].tolist() == pytest.approx([8 / 3] * 8 + [12.0] * 8, rel=1e-3)
    restored = Graded((2, 1), 32).decode(packed, {})
    assert restored[0, 0].tolist() == pytest.approx([1.0] * 8 + [-1.0] * 8)
    assert restored[0, 31].tolist() == pytest.approx([9.0] * 8 + [11.0] * 8, rel=1e-3)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_bytes_are_what_bits_per_value_says(format, size):
    x = draw(2, 3, 256, size)
    stored = bytes_of(format.encode(x, {}))
    assert 8 * stored == pytest.approx(format.bits_per_value(size) * x.numel(), abs=1e-6)
    assert format.constant_bytes(3, size) == 0
    format.check(size)


def test_effective_bits():
    assert Graded((4, 3, 1, 0)).bits_per_value(64) == 2 + 3 / 4 / 4
    assert Graded((1,), 256).bits_per_value(128) == 1.125


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_wide_range_is_the_affine_code_of_a_channel(bits):
    x = draw(2, 2, 256, 64)
    ours, affine = Graded((bits,)), Affine(bits, "channel", 128)
    # Both round to the nearest of the same levels, up to where float16 puts the lowest of them.
    band = 2**-10 * x.abs().max() + affine.encode(x, {})["scale"].float().max() / 2
    assert (roundtrip(ours, x) - x).abs().max() <= band
    assert (roundtrip(ours, x) - roundtrip(affine, x)).abs().mean() < 2**-8


def test_more_bits_come_closer():
    x = draw(1, 2, 512, 64)
    errors = [float((roundtrip(Graded((w,)), x) - x).square().mean()) for w in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 1000


def test_ranges_without_bits_are_zero():
    restored = roundtrip(Graded((4, 2, 0, 0)), draw(1, 2, 256, 64))
    assert restored[..., 32:].eq(0).all() and restored[..., :32].ne(0).any()


def test_levels_keep_the_spread_of_what_they_stand_for():
    # The levels of least squared error have a variance below that of the values they replace.
    x = draw(1, 1, 4096, 64)
    for width in (1, 2, 3):
        assert roundtrip(Graded((width,)), x).var() >= x.var()


@pytest.mark.parametrize("value", [0.0, -3.5, 600.0])
def test_constant_channels_are_exact(value):
    for format in FORMATS:
        x = torch.full((1, 256, 64), value)
        live = 64 // len(format.widths) * format.live
        assert roundtrip(format, x)[..., :live].eq(value).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(format):
    x = draw(3, 4, 2, 512, 64)
    together = format.encode(x, {})
    alone = format.encode(x[1:2, 2:3, 1:2, 256:], {})
    for name, tensor in alone.items():
        start = together[name].shape[-2] - tensor.shape[-2]
        if name == "codes":
            continue
        assert torch.equal(tensor, together[name][1:2, 2:3, 1:2, start:])
    assert torch.equal(format.decode(alone, {}), format.decode(together, {})[1:2, 2:3, 1:2, 256:])


def test_extremes_saturate_and_nan_stays():
    x = draw(1, 128, 64)
    x[0, 3, 0], x[0, 4, 1], x[0, 5, 2] = 1e6, -1e6, float("nan")
    restored = roundtrip(Graded(), x)
    assert restored[..., :2].isfinite().all()
    assert restored[..., 2].isnan().all()
    assert restored[..., 3:].isfinite().all()


def test_float64_is_at_least_as_exact():
    x = draw(1, 2, 128, 64)
    exact = roundtrip(Graded(), x, dtype=torch.float64)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), roundtrip(Graded(), x))


@pytest.mark.parametrize(
    ("widths", "size", "text"),
    [
        ((4, 3, 2), 64, "3 widths for heads of 64"),
        ((4,) * 8, 32, "8 widths for heads of 32 channels"),
        ((2, 4), 64, r"widths \[2, 4\]"),
        ((0, 0), 64, "falling, the first above 0"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, size, text):
    with pytest.raises(UnsupportedError, match=text):
        Graded(widths).check(size)
