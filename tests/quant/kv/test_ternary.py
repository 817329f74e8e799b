import itertools

import pytest
import torch

from squeeze.errors import UnsupportedError
from squeeze.quant.kv.ternary import Ternary, _join, _split
from squeeze.types import bytes_of

FORMATS = [Ternary("channel", 128), Ternary("channel", 32), Ternary("token", 16)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_textbook():
    # Magnitudes 4, 1, 2, 1 have mean 2; those above 1.5 are kept and their mean is 3.
    x = torch.tensor([-4.0, 1.0, 2.0, -1.0]).expand(1, 128, 4)
    packed = Ternary("token", 4).encode(x, {})
    assert packed["scale"].eq(3).all()
    assert Ternary("token", 4).decode(packed, {})[0, 0].tolist() == [-3.0, 0.0, 3.0, 0.0]
    # Channel 0: digits 00000, number 0. Channel 1: 11111 = 121, byte ceil(121 * 256 / 243) = 128.
    # Channel 2: 22222 = 242, byte ceil(254.9) = 255.
    assert packed["codes"][0, 0, 0].tolist() == [0, 128, 255, 128]
    # The tail is the string 0121 0121 0121: 12 digits in 3 bytes, digit i of byte j at 3 i + j.
    assert packed["tail"].shape == (1, 1, 3)


def test_every_five_digits_survive_their_byte():
    digits = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.int32).T
    packed = _join(digits)
    assert packed.unique().numel() == 3**5
    assert torch.equal(_split(packed).int(), digits)


def test_effective_bits():
    # 128 tokens of 64 channels: 8192 values in 1639 bytes, 1.6006 bits each, and a scale per 128.
    packed = Ternary().encode(draw(1, 128, 64), {})
    assert packed["codes"].numel() + packed["tail"].numel() == 1639
    assert Ternary().bits_per_value(64) == pytest.approx(1.7256, abs=1e-4)
    assert Ternary("token", 64).bits_per_value(64) == pytest.approx(1.8506, abs=1e-4)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_bytes_are_what_bits_per_value_says(format, size):
    x = draw(2, 3, 256, size)
    stored = bytes_of(format.encode(x, {}))
    assert 8 * stored == pytest.approx(format.bits_per_value(size) * x.numel(), abs=1e-6)
    assert format.constant_bytes(3, size) == 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_value_is_minus_zero_or_plus_its_scale(format):
    x = draw(2, 2, 256, 64)
    packed = format.encode(x, {})
    dim = -2 if format.granularity == "channel" else -1
    scale = packed["scale"].float().repeat_interleave(format.group_size, dim)
    restored = format.decode(packed, {})
    assert ((restored == 0) | (restored.abs() == scale)).all()
    assert torch.equal(restored.sign(), x.sign() * (restored != 0))
    # What was dropped is smaller than what was kept of its group.
    group = lambda y: y.unflatten(dim, (-1, format.group_size))  # noqa: E731
    dim = dim if dim == -1 else -2
    kept = group(x.abs().masked_fill(restored == 0, torch.inf)).amin(dim)
    dropped = group(x.abs().masked_fill(restored != 0, 0)).amax(dim)
    assert (dropped < kept).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantizing_twice_changes_nothing(format):
    once = format.decode(format.encode(draw(2, 1, 128, 64), {}), {})
    assert torch.equal(format.decode(format.encode(once, {}), {}), once)


def test_error_on_gaussian_groups_is_what_the_docstring_says():
    x = draw(4, 16, 128, 64)

    def error(restored):
        return float((restored - x).square().mean() / x.square().mean())

    format = Ternary()
    assert error(format.decode(format.encode(x, {}), {})) == pytest.approx(0.188, abs=0.003)
    size = x.abs().mean(-2, keepdim=True)
    assert error(x.sign() * (x.abs() > 0.5 * size) * size) == pytest.approx(0.261, abs=0.003)


def test_zeros_constants_and_huge_values():
    for format in FORMATS:
        zero = torch.zeros(1, 2, 128, 32)
        assert torch.equal(format.decode(format.encode(zero, {}), {}), zero)
        assert torch.equal(format.decode(format.encode(zero - 3.5, {}), {}), zero - 3.5)
        assert format.decode(format.encode(zero + 1e30, {}), {}).isfinite().all()


def test_leading_dimensions_and_neighbours():
    format = Ternary()
    x = draw(3, 2, 5, 256, 8)
    packed = format.encode(x, {})
    shapes = {name: tuple(t.shape[3:]) for name, t in packed.items()}
    assert shapes == {"codes": (2, 25, 8), "tail": (2, 5), "scale": (2, 8)}
    assert all(tensor.is_contiguous() for tensor in packed.values())
    alone = format.encode(x[1, 0, 2:3], {})
    assert all(torch.equal(alone[name][0], packed[name][1, 0, 2]) for name in packed)


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (Ternary("token", 48), ("group_size 48", "16, 32, 64", "heads of 64")),
        (Ternary("channel", 256), ("group_size 256", "32, 64, 128", "granularity channel")),
    ],
)
def test_group_that_does_not_fit_is_refused(format, words):
    with pytest.raises(UnsupportedError) as caught:
        format.check(64)
    assert all(word in str(caught.value) for word in words)
    Ternary(format.granularity, 32).check(64)
