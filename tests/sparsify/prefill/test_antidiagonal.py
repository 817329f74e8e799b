import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.prefill.antidiagonal import Antidiagonal
from tests.sparsify.policies import (
    SCALING,
    check_against,
    check_dense,
    check_earlier_blocks_stay,
    choose,
    lists,
)


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words, token pair by token pair."""
    T, S, size = len(query), policy.stride, policy.block_size
    cells, each = -(-T // S), size // policy.stride

    def dot(t, j):
        return float(query[t].double() @ keys[j].double()) if max(t, j) < T else 0.0

    result = []
    for i in range(-(-T // size)):
        blocks = [0.0] * (i + 1)
        for a in range(i * each, min((i + 1) * each, cells)):
            logits = [
                SCALING / S * sum(dot(a * S + S - 1 - t, c * S + t) for t in range(S))
                for c in range(a + 1)
            ]
            for c, weight in enumerate(torch.tensor(logits).softmax(0).tolist()):
                blocks[c // each] += weight
        result.append(choose(blocks, share=policy.max_density, mass=policy.threshold))
    return result


@pytest.mark.parametrize(
    ("T", "heads", "threshold", "stride", "size", "starts"),
    [
        (300, (2, 2), 0.7, 16, 64, None),
        (257, (3, 1), 0.8, 32, 64, [0, 100]),
        (200, (4, 1), 0.5, 16, 64, [136, 3]),
        (290, (8, 1), 0.6, 32, 128, None),
        (40, (1, 1), 0.9, 8, 64, None),
    ],
)
def test_against_the_words(T, heads, threshold, stride, size, starts):
    policy = Antidiagonal(threshold=threshold, stride=stride, block_size=size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_the_budget_bounds_every_row():
    # Equal keys: nothing stands out, so that only the budget ends a list.
    query, keys = torch.ones(1, 1, 64 * 64, 4), torch.ones(1, 1, 64 * 64, 4)
    index = Antidiagonal(threshold=0.99, max_density=0.4).index(query, keys, None, 1.0)
    counts = [len(row) for row in lists(index, 0, 0)]
    assert counts == [min(i + 1, max(16, -(-2 * (i + 1) // 5))) for i in range(64)]
    assert index.block_ids.shape[-1] == sum(counts) + 1


def test_a_vertical_line_and_a_diagonal_are_both_met():
    # Key 200 is weighed by all; head 1 weighs the key 255 before each query.
    T = 1024
    query, keys = torch.zeros(1, 2, T, 64), torch.zeros(1, 2, T, 64)
    query[:, 0, :, 0], keys[:, 0, 200, 0] = 300.0, 1.0
    angles = torch.outer(torch.arange(T), torch.arange(1, 33) / 10)
    keys[:, 1] = torch.cat((angles.cos(), angles.sin()), -1)
    shifted = angles - 255 * torch.arange(1, 33) / 10
    query[:, 1] = 4 * torch.cat((shifted.cos(), shifted.sin()), -1)
    policy = Antidiagonal(threshold=0.5, max_density=0.01, stride=8)
    index = policy.index(query, keys, None, 1.0)
    assert all(3 in row for row in lists(index, 0, 0)[4:])
    assert all(i - 4 in row for i, row in enumerate(lists(index, 0, 1)) if i >= 4)


def test_a_full_budget_is_dense():
    check_dense(Antidiagonal(threshold=1.0, max_density=1.0))


def test_later_blocks_do_not_change_earlier_lists():
    check_earlier_blocks_stay(Antidiagonal(threshold=0.6))


def test_it_is_registered():
    assert get("prefill", "antidiagonal") is Antidiagonal
