import pytest
import torch

from squeeze.quant.kv.affine import Affine
from squeeze.quant.transforms.hadamard import Hadamard


def rotate(x):
    return Hadamard().apply(x, {})


def test_textbook():
    # Four channels: rows of the matrix are + + + +, + - + -, + + - -, + - - +, all times 1/2.
    assert rotate(torch.tensor([[4.0, 0.0, 0.0, 0.0]])).tolist() == [[2.0, 2.0, 2.0, 2.0]]
    assert rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[5.0, -1.0, -2.0, 0.0]]


@pytest.mark.parametrize(("size", "block"), [(64, 64), (128, 128), (80, 16), (96, 32), (33, 1)])
def test_rotation_is_orthonormal_and_its_own_inverse(size, block):
    matrix = rotate(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.mT)
    assert int((matrix[0] != 0).sum()) == block
    assert (matrix[matrix != 0].abs() - block**-0.5).abs().max() < 1e-12


def test_scores_and_outputs_are_unchanged():
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, keys, values = make(2, 2, 3, 80), make(2, 2, 32, 80), make(2, 2, 32, 80)
    rotated, shift = Hadamard().prepare_query(query, {})
    assert shift is None
    torch.testing.assert_close(rotated @ rotate(keys).mT, query @ keys.mT)
    weights = (query @ keys.mT).softmax(-1)
    output = Hadamard().invert(weights @ rotate(values), {})
    torch.testing.assert_close(output, weights @ values)


def test_dtypes():
    x = torch.randn(1, 1, 2, 64, dtype=torch.bfloat16)
    assert rotate(x).dtype == torch.float32
    assert Hadamard().prepare_query(x, {})[0].dtype == torch.bfloat16


def test_outlier_channel_is_spread():
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    x[..., 5] += 40
    format = Affine(4, "token", 64)
    direct = format.decode(format.encode(x, {}), {}) - x
    turned = rotate(format.decode(format.encode(rotate(x), {}), {})) - x
    assert turned.pow(2).mean() < direct.pow(2).mean() / 3
