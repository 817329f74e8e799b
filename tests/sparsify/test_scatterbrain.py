import torch

from squeeze import registry
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.sparsify.index import from_masks
from squeeze.sparsify.prefill.streaming import Streaming
from squeeze.sparsify.scatterbrain import scatterbrain_attention
from squeeze.types import Implementation

T, D, SCALING = 200, 16, 0.25


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, T, D), (1, 2, T, D), (1, 2, T, D))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes]


def dense(query, keys, values):
    call = {"scaling": SCALING, "implementation": Implementation.REFERENCE}
    return block_sparse_attention(query, keys, values, None, **call)[0]


def projections(m):
    return torch.randn(m, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_what_is_listed_is_exact():
    query, keys, values = tensors()
    index = from_masks(torch.ones(1, 4, 4, 4, dtype=torch.bool).tril(), None, 64)
    out = scatterbrain_attention(query, keys, values, index, projections(1), SCALING)
    torch.testing.assert_close(out, dense(query, keys, values), rtol=1e-12, atol=1e-12)


def test_features_come_closer_as_they_grow_in_number():
    query, keys, values = tensors()
    index = Streaming(64, 1).index(query, keys, None, SCALING)
    exact = dense(query, keys, values)
    errors = [
        scatterbrain_attention(query, keys, values, index, projections(m), SCALING)
        .sub(exact)[:, :, 128:]
        .norm()
        for m in (4, 64, 1024)
    ]
    call = {"scaling": SCALING, "implementation": Implementation.REFERENCE}
    left_out = block_sparse_attention(query, keys, values, index, **call)[0].sub(exact)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < left_out[:, :, 128:].norm() / 4


def test_later_tokens_change_nothing():
    query, keys, values = tensors()
    index = Streaming(64, 1).index(query, keys, None, SCALING)
    before = scatterbrain_attention(query, keys, values, index, projections(8), SCALING)
    keys[:, :, 150:], values[:, :, 150:] = 2.0, 50.0
    after = scatterbrain_attention(query, keys, values, index, projections(8), SCALING)
    torch.testing.assert_close(before[:, :, :150], after[:, :, :150])


def test_no_recipe_can_ask_for_it():
    assert "scatterbrain" not in registry.names("prefill")
