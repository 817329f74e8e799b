import numpy
import pytest
import torch

from squeeze import api, swapping
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import UnsupportedError
from squeeze.quant.kv.binary_spectral import BinarySpectral, transform_matrix
from squeeze.types import bytes_of
from tests import tiny
from tests.cache_content import dequantized

KINDS = ["rfft", "dct", "hadamard"]
FORMATS = [BinarySpectral(), BinarySpectral(0.5, "rfft", 32), BinarySpectral(0.125, "hadamard", 64)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind, size):
    return transform_matrix(kind, size, torch.float64, torch.device("cpu"))


def test_textbook():
    # A share of 1/2 of two channels. Over 32 tokens the first is 0 and 2 in turn: mean 1, deviation
    # 1, levels -0.49, 0.50, 1.50 and 2.49. The second is -3 and 1 in turn: mean magnitude 2.
    x = torch.tensor([[0.0, -3.0], [2.0, 1.0]]).repeat(16, 1)[None]
    format = BinarySpectral(0.5, "dct", 32)
    packed = format.encode(x, {})
    assert packed["scale"].flatten().tolist() == pytest.approx([0.9957, 2.0], abs=1e-3)
    assert packed["zero"].item() == pytest.approx(1 - 1.5 * 0.9957, abs=1e-3)
    # Code 0 at even tokens and 3 at odd ones, four tokens of one parity in a byte; signs likewise.
    assert packed["codes"].flatten().tolist() == [0, 255] * 4
    assert packed["signs"].flatten().tolist() == [0, 255] * 2
    expected = torch.tensor([[-0.4936, -2.0], [2.4936, 2.0]])
    torch.testing.assert_close(format.decode(packed, {})[0, :2], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 7, 32, 48, 60, 96])
def test_transforms_are_real_and_orthonormal(kind, size):
    found = matrix(kind, size)
    assert found.shape == (size, size)
    torch.testing.assert_close(found @ found.mT, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [7, 48])
def test_transforms_are_the_ones_they_are_called(size):
    x = draw(size).double()
    fourier = torch.from_numpy(numpy.fft.rfft(x.numpy(), norm="ortho"))
    found = matrix("rfft", size) @ x
    scale = torch.full((size // 2 + 1,), 2**0.5, dtype=torch.float64)
    scale[0] = 1
    if size % 2 == 0:
        scale[-1] = 1
    torch.testing.assert_close(found[: size // 2 + 1], fourier.real * scale)
    torch.testing.assert_close(found[size // 2 + 1 :], (fourier.imag * scale)[1 : (size + 1) // 2])
    # A cosine of one of the DCT's own frequencies has one coefficient.
    wave = torch.cos(torch.pi * 3 * (torch.arange(size) + 0.5) / size).double()
    spectrum = (matrix("dct", size) @ wave).abs()
    assert spectrum.argmax() == 3
    assert spectrum.sum() - spectrum[3] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_basis_keeps_scores_and_puts_loud_channels_first(kind):
    basis = BinarySpectral(0.25, kind).basis
    samples = draw(2, 200, 64)
    loud = [torch.randperm(64, generator=torch.Generator().manual_seed(h))[:16] for h in (1, 2)]
    for head in (0, 1):
        samples[head, :, loud[head]] *= 20
    fitted = basis.fit({"kv_samples": samples})
    assert fitted["order"].dtype == torch.int32
    for head in (0, 1):
        assert fitted["order"][head, :16].tolist() == sorted(loud[head].tolist())
    keys, query = draw(3, 2, 32, 64, seed=1).double(), draw(3, 6, 4, 64, seed=2).double()
    stored = basis.apply(keys, fitted)
    moved, shift = basis.prepare_query(query, fitted)
    assert shift is None
    wide = lambda x: x.repeat_interleave(3, dim=1).mT  # noqa: E731
    torch.testing.assert_close(moved @ wide(stored), query @ wide(keys))
    torch.testing.assert_close(basis.invert(stored, fitted), keys)
    assert torch.equal(stored[:, 0, :, :16], keys[:, 0][..., loud[0].sort().values])
    assert basis.prepare_query(query.bfloat16(), fitted)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_bytes_are_what_bits_per_value_says(format):
    x = draw(2, 3, 256, 64)
    stored = bytes_of(format.encode(x, {}))
    assert 8 * stored == format.bits_per_value(64) * x.numel()
    order = format.basis.fit({"kv_samples": draw(3, 8, 64)})
    assert format.constant_bytes(3, 64) == bytes_of(order)


def test_effective_bits():
    assert BinarySpectral(0.25).bits_per_value(64) == 1.40625
    assert BinarySpectral(0.5).bits_per_value(64) == 1.6875


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_are_four_levels_or_two(format):
    x = draw(2, 1, 128, 64) * 3 + 1
    restored = format.decode(format.encode(x, {}), {})
    groups = restored.unflatten(-2, (-1, format.group_size))
    count = int(format.outliers * 64)
    for channel in (0, count - 1):
        assert groups[0, 0, 0, :, channel].unique().numel() <= 4
    rest = groups[..., count:]
    assert torch.equal(rest.abs(), rest[..., :1, :].abs().expand_as(rest))
    assert torch.equal(restored[..., count:] >= 0, x[..., count:] >= 0)


def test_error_on_gaussian_groups_is_what_the_docstring_says():
    x = draw(4, 8, 128, 64)
    error = (BinarySpectral(0.5).decode(BinarySpectral(0.5).encode(x, {}), {}) - x).square()
    assert float(error[..., :32].mean()) == pytest.approx(0.12, abs=0.005)
    # The variance that the sign and the mean magnitude leave: 1 - 2 / pi.
    assert float(error[..., 32:].mean()) == pytest.approx(0.363, abs=0.01)


def test_encoding_is_the_same_alone_and_in_a_batch():
    format = BinarySpectral()
    x = draw(3, 2, 5, 256, 16)
    packed = format.encode(x, {})
    shapes = {name: tuple(t.shape[3:]) for name, t in packed.items()}
    assert shapes == {"codes": (64, 4), "signs": (32, 12), "scale": (2, 16), "zero": (2, 4)}
    assert all(tensor.is_contiguous() for tensor in packed.values())
    alone = format.encode(x[1, 0, 2:3], {})
    assert all(torch.equal(alone[name][0], packed[name][1, 0, 2]) for name in packed)


def test_constants_zeros_and_huge_values():
    for format in FORMATS:
        x = torch.zeros(1, 2, 128, 32)
        assert torch.equal(format.decode(format.encode(x, {}), {}), x)
        assert torch.equal(format.decode(format.encode(x - 3.5, {}), {}), x - 3.5)
        assert format.decode(format.encode(x + 1e30, {}), {}).isfinite().all()


def test_share_that_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError) as caught:
        BinarySpectral(0.3).check(64)
    assert all(w in str(caught.value) for w in ("outliers 0.3", "heads of 64", "0.125, 0.25, 0.5"))
    BinarySpectral(0.25).check(80)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_recipe_fits_the_basis_and_the_cache_runs_in_it(side):
    method = {"method": "binary_spectral", "group_size": 32, "outliers": 0.5}
    other = "values" if side == "keys" else "keys"
    recipe = {"kv_cache": {side: method, other: {"bits": 16}, "residual_length": 0}}
    recipe["kv_cache"]["block_length"] = 32
    model = tiny.model("llama")
    plan = api.plan(recipe, model)
    assert plan.statistics == ("kv_samples",)
    assert [name for name, _ in swapping.chain(getattr(plan.kv_cache[0], side))] == [
        "basis",
        "format",
    ]
    ids = tiny.prompt(2, 90)["input_ids"]
    dense = model(ids).past_key_values.layers[0]
    stats = calibrate(model, torch.randint(3, 128, (4, 32)), set(plan.statistics))
    with swapping.swap(model, compress(model, plan, stats)):
        cache = model(ids).past_key_values
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
    stored = dequantized(cache.layers[0])[side == "values"][:, :, 4:68]
    exact = getattr(dense, side)[:, :, 4:68]
    error = (stored - exact).square().sum() / exact.square().sum()
    assert 0.02 < error < 0.4
