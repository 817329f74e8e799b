"""Kernels read parts of packed weights, whose codebooks and groups may be smaller."""

import pytest
import torch

from squeeze.kernels.float8_linear.reference import rounded_inputs
from squeeze.linear import multiply, reconstruct
from squeeze.types import Implementation
from squeeze.weight_shards import columns_of, rows_of
from tests.test_weight_shards import WEIGHTS


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_kernels_take_parts(name, size):
    weight = WEIGHTS[name]()
    for part in (rows_of(weight, 1, size), columns_of(weight, 1, size)):
        x = torch.randn(1, part.shape[1])
        found = multiply(x, part, None, Implementation.TRITON)
        if getattr(weight, "row_scale", None) is not None:
            x = rounded_inputs(x)
        expected = x.double() @ reconstruct(part).double().T
        size_of_sums = x.abs().double() @ reconstruct(part).abs().double().T
        assert ((found - expected).abs() <= 1e-3 * size_of_sums).all()
