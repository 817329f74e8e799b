import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.index import density
from squeeze.sparsify.prefill.strided_shards import StridedShards
from tests.sparsify.policies import check_dense, inputs, lists


@pytest.mark.parametrize(
    ("T", "H", "H_kv", "window", "stride", "dense", "size"),
    [
        (700, 2, 2, 64, 4, 0, 64),
        (1000, 6, 2, 200, 3, 1, 64),
        (641, 8, 2, 129, 8, 0, 64),
        (900, 8, 1, 1, 5, 0, 128),
        (63, 4, 4, 1, 8, 0, 64),
    ],
)
def test_against_the_words(T, H, H_kv, window, stride, dense, size):
    policy = StridedShards(window, stride, dense, size)
    index = policy.index(*inputs(2, H, H_kv, T), torch.tensor([0, 10]), 1.0)
    N, local, step = -(-T // size), -(-window // size), max(1, stride // H_kv)
    for b in range(2):
        for h in range(H):
            g = h // (H // H_kv)
            expected = [
                [
                    j
                    for j in range(i + 1)
                    if i - j < local
                    or j == 0
                    or g >= H_kv - dense
                    or (j + g * step + 1) % stride == 0
                ]
                for i in range(N)
            ]
            assert lists(index, b, h) == expected
            assert sum(map(len, expected)) < index.block_ids.shape[-1]


def test_the_heads_together_read_everything():
    index = StridedShards(64, 4).index(*inputs(1, 8, 4, 1000), None, 1.0)
    for i in range(16):
        assert set().union(*(lists(index, 0, h)[i] for h in range(8))) == set(range(i + 1))


def test_a_full_budget_is_dense():
    check_dense(StridedShards(64, stride=1))
    check_dense(StridedShards(64, 8, dense_heads=2))
    check_dense(StridedShards(10_000))


def test_density_falls_with_the_stride():
    densities = [
        density(
            StridedShards(64, stride).index(*inputs(1, 2, 2, 4096), None, 1.0), torch.tensor([4096])
        ).mean()
        for stride in (1, 2, 4, 8)
    ]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] < 0.2


def test_it_is_registered():
    assert get("prefill", "strided_shards") is StridedShards
