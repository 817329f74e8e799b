"""Corrections of single weights: the kernel against the dense matrix in float64."""

import os

import pytest
import torch

from squeeze.kernels.lut_linear.api import lut_linear, reconstruct
from squeeze.quant.weights.kmeans import KMeans
from squeeze.types import Implementation

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("share", [0.002, 0.09])
def test_kernel_equals_float64(rows, share):
    weight = torch.randn(37, 130) ** 3
    packed = KMeans(bits=3, importance="none", sparse_outliers=share).fit(weight)
    x, bias = torch.randn(2, rows, 200)[..., :130], torch.randn(37)
    expected = x.double() @ reconstruct(packed).double().T + bias.double()
    found = lut_linear(x, packed, bias, implementation=Implementation.TRITON)
    bound = (x.double().abs() @ reconstruct(packed).double().abs().T).max()
    assert (found - expected).abs().max() <= 1e-5 * bound
    plain = lut_linear(x, packed, bias)
    assert (plain - expected).abs().max() <= 1e-5 * bound


@needs_interpreter
def test_a_row_without_corrections_and_a_full_one():
    weight = torch.zeros(8, 40)
    weight[5] = torch.arange(40.0) + 1
    packed = KMeans(bits=1, importance="none", sparse_outliers=0.1).fit(weight)
    assert packed.outlier_offsets.diff()[5] >= 30
    found = lut_linear(torch.eye(40), packed, implementation=Implementation.TRITON)
    torch.testing.assert_close(found, reconstruct(packed).T, rtol=1e-3, atol=1e-3)
