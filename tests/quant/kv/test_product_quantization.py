import math

import pytest
import torch

from squeeze.errors import UnsupportedError
from squeeze.quant.kv.product_quantization import ProductQuantization
from squeeze.types import bytes_of

FORMATS = [ProductQuantization(bits, width) for bits in (4, 5, 7, 8) for width in (2, 4)]


def samples(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(format, heads=2, tokens=300, size=16):
    x = samples(heads, tokens, size)
    return format.fit({"kv_samples": x, "kv_importance": torch.ones(heads, size)})


def relative_error(format, x, importance=None):
    """Weighted squared error of clustering ``[H_kv, N, D]`` on itself, over its variance."""
    weights = torch.ones_like(x[:, 0]) if importance is None else importance
    parameters = format.fit({"kv_samples": x, "kv_importance": weights})
    error = (format.decode(format.encode(x, parameters), parameters) - x).square().mean(1)
    return float((error * weights).sum() / (x.var(1) * weights).sum())


def test_textbook():
    # One head of four channels: sub-vectors (0, 2) and (1, 3), two of sixteen centroids used.
    format = ProductQuantization(4, 2)
    codebook = torch.full((1, 16, 2, 2), 100.0, dtype=torch.float16)
    codebook[0, 3, 0] = torch.tensor([1.0, 2.0])
    codebook[0, 5, 1] = torch.tensor([-1.0, 4.0])
    x = torch.tensor([1.1, -0.9, 1.8, 4.3]).expand(1, 32, 4)
    packed = format.encode(x, {"codebook": codebook, "root": torch.ones(1, 2, 2)})
    assert packed["codes"].tolist() == [[[0x33333333, 0x55555555]] * 4]
    decoded = format.decode(packed, {"codebook": codebook})
    assert decoded[0, 0].tolist() == [1.0, -1.0, 2.0, 4.0]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_name_the_nearest_centroids(format):
    parameters = fitted(format)
    x = samples(3, 2, 64, 16, seed=1)
    decoded = format.decode(format.encode(x, parameters), parameters)
    parts = x.unflatten(-1, (format.subvector, -1)).mT.double()
    table = parameters["codebook"].double()
    distance = (parts.unsqueeze(-3) - table.unsqueeze(1)).norm(dim=-1).amin(-2)
    found = (decoded - x).double().unflatten(-1, (format.subvector, -1)).norm(dim=-2)
    torch.testing.assert_close(found, distance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_shapes_and_bytes_are_what_the_plan_counts(format):
    parameters = fitted(format)
    packed = format.encode(samples(5, 3, 2, 64, 16, seed=1), parameters)
    assert packed["codes"].shape[:3] == (5, 3, 2)
    assert 8 * bytes_of(packed) == 5 * 3 * 2 * 64 * 16 * format.bits_per_value(16)
    assert bytes_of(parameters) == format.constant_bytes(2, 16)
    assert format.bits_per_value(16) == format.bits / format.subvector
    assert format.decode(packed, parameters, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_encoding_does_not_depend_on_the_batch_and_repeats(format):
    parameters = fitted(format)
    x = samples(4, 3, 2, 96, 16, seed=2)
    together = format.encode(x, parameters)["codes"]
    for i in range(4):
        assert torch.equal(format.encode(x[i, 1:2], parameters)["codes"], together[i, 1:2])
    again = format.encode(format.decode({"codes": together}, parameters), parameters)
    torch.testing.assert_close(
        format.decode(again, parameters), format.decode({"codes": together}, parameters)
    )


def test_few_distinct_values_are_exact():
    format = ProductQuantization(4, 2)
    values = torch.randint(-3, 4, (2, 16, 8), generator=torch.Generator().manual_seed(0)).float()
    x = values.repeat_interleave(20, dim=1)
    assert relative_error(format, x) == 0.0


def test_two_channels_of_a_circle_cost_less_than_apart():
    # Sixteen points on a circle: the error of an arc of 1/16. Four levels per channel do worse.
    angle = torch.linspace(0, 2 * math.pi, 4097)[:-1]
    x = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    arc = 2 * math.pi / 16
    error = relative_error(ProductQuantization(4, 2), x)
    # k-means ends in a local optimum; the ideal is arc**2 / 12 over a variance of 1.
    assert arc**2 / 12 * 0.99 < error < arc**2 / 12 * 1.3
    square = ((x * 2).round() / 2).clamp(-0.75, 0.75)
    apart = float((square - x).square().sum(-1).mean())
    assert error < apart / 2


def test_importance_moves_the_error_to_channels_that_count_less():
    x = samples(1, 2000, 4, seed=3)
    format = ProductQuantization(6, 4)
    errors = []
    for weight in (1.0, 100.0):
        importance = torch.tensor([[weight, 1.0, 1.0, 1.0]])
        parameters = format.fit({"kv_samples": x, "kv_importance": importance})
        error = (format.decode(format.encode(x[:, :1984], parameters), parameters)) - x[:, :1984]
        errors.append(error.square().mean(1)[0])
    assert errors[1][0] < errors[0][0] / 2
    assert errors[1][1:].mean() > errors[0][1:].mean()


def test_far_off_channels_keep_the_precision_of_their_codebook():
    # Spread 1 around 600, as some models' biases make: float16 has steps of 0.5 there.
    x = samples(1, 2048, 16, seed=4) + 600
    error = relative_error(ProductQuantization(8, 2), x)
    assert error < 0.5**2 / 12 * 1.5 + 0.02


def test_saturates_and_survives_nan():
    format = ProductQuantization(8, 2)
    parameters = fitted(format)
    x = samples(2, 32, 16, seed=5)
    x[0, 0, 0], x[1, 1, 1] = 1e30, float("nan")
    decoded = format.decode(format.encode(x, parameters), parameters)
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= parameters["codebook"].abs().max()


def test_more_samples_than_memory_are_clustered_in_parts_alike():
    format = ProductQuantization(4, 2)
    x = samples(3, 400, 32, seed=6)
    whole = format.fit({"kv_samples": x, "kv_importance": torch.ones(3, 32)})["codebook"]
    for head in range(3):
        alone = format.fit({"kv_samples": x[head : head + 1], "kv_importance": torch.ones(1, 32)})[
            "codebook"
        ]
        torch.testing.assert_close(alone[0], whole[head])


def test_refuses_a_head_that_does_not_divide():
    with pytest.raises(UnsupportedError, match=r"subvector 4 does not divide heads of 66.*2"):
        ProductQuantization(8, 4).check(66)
    ProductQuantization(8, 2).check(66)
