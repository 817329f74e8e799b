import math

import pytest
import torch

from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.registry import get
from squeeze.sparsify.index import to_dense_mask
from squeeze.sparsify.prefill.permuted import Permuted
from squeeze.types import Implementation
from tests.sparsify.policies import SCALING, check_against, check_dense, choose, inputs, lists


def order_of(policy, query, keys):
    """Sort the positions of every complete segment by what the last queries give them."""
    T, n = len(keys), min(len(query), policy.block_size)
    scores = SCALING * query[-n:].double() @ keys.double().T
    visible = torch.arange(T) <= torch.arange(T - n, T)[:, None]
    mass = scores.masked_fill(~visible, -torch.inf).softmax(-1).sum(0).tolist()
    mass[0] = math.inf
    size, result = policy.segment_size, []
    for first in range(0, T // size * size, size):
        result += sorted(range(first, first + size), key=lambda j: (-mass[j], j))
    return result


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words."""
    size, per_segment = policy.block_size, policy.segment_size // policy.block_size
    query, keys = query.double(), keys.double()
    order, result = order_of(policy, query, keys), []
    for i in range(-(-len(keys) // size)):
        q, own = query[i * size : (i + 1) * size].mean(0), i // per_segment * per_segment
        means = [keys[order[j * size : (j + 1) * size]].mean(0) for j in range(own)]
        weights = torch.stack([SCALING * q @ k for k in means]).softmax(0).tolist() if own else []
        weights += [0.0] * (i + 1 - own)
        require = range(own, i + 1)
        result.append(choose(weights, policy.max_density, 16, policy.mass, require=require))
    return result


@pytest.mark.parametrize(
    ("T", "heads", "mass", "segment", "size", "starts"),
    [
        (700, (2, 2), 0.5, 128, 64, None),
        (657, (3, 1), 0.7, 256, 64, [0, 100]),
        (600, (4, 1), 0.4, 128, 128, [136, 3]),
        (890, (8, 1), 0.9, 256, 128, None),
        (40, (1, 1), 0.5, 256, 64, None),
    ],
)
def test_against_the_words(T, heads, mass, segment, size, starts):
    policy = Permuted(mass, segment, block_size=size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_the_order_is_that_of_the_last_queries():
    T, policy = 600, Permuted(segment_size=128)
    query, keys = inputs(2, 4, 2, T)
    starts = torch.tensor([0, 90])
    index = policy.index(query, keys, starts, SCALING)
    for b, start in enumerate(starts.tolist()):
        for h in range(4):
            expected = order_of(policy, query[b, h, start:], keys[b, h // 2, start:])
            assert index.permutation[b, h, : len(expected)].tolist() == expected
    assert index.permutation.shape == (2, 4, 512)
    assert index.segment_size == 128


def test_heavy_keys_share_a_block():
    # One heavy key in each block of a segment of 256; sorted, one block holds all four.
    T, heavy = 1280, [20, 90, 150, 255]
    query, keys = torch.ones(1, 1, T, 4), torch.zeros(1, 1, T, 4)
    keys[:, :, heavy] = 20.0
    index = Permuted(mass=0.5, max_density=1.0).index(query, keys, None, 1.0)
    assert set(heavy) < set(index.permutation[0, 0, :64].tolist())
    expected = [sorted({0, *range(i // 4 * 4, i + 1)}) for i in range(12, 20)]
    assert lists(index, 0, 0)[12:] == expected
    mask = to_dense_mask(index, T)[0, 0]
    assert mask[-1, heavy].all()
    assert mask[-1, :256].sum() == 64


def test_causality_with_random_orders():
    # Later tokens reorder keys, but no query may read one that comes after it.
    query, keys = inputs(1, 4, 2, 900)
    mask = to_dense_mask(Permuted(0.5, 128).index(query, keys, None, SCALING), 900)
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_a_full_budget_is_dense():
    check_dense(Permuted(mass=1.0, segment_size=128, max_density=1.0))


def test_attention_equals_that_over_the_mask():
    T, policy = 500, Permuted(0.5, 128, max_density=0.3)
    query, keys = inputs(1, 4, 2, T)
    index = policy.index(query, keys, None, SCALING)
    out, _ = block_sparse_attention(
        query, keys, keys, index, scaling=SCALING, implementation=Implementation.REFERENCE
    )
    scores = SCALING * query @ keys.repeat_interleave(2, 1).mT
    weights = scores.masked_fill(~to_dense_mask(index, T), -torch.inf).softmax(-1)
    expected = weights @ keys.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_it_is_registered():
    assert get("prefill", "permuted") is Permuted
