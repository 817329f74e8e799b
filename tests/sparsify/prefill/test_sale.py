import pytest
import torch

from squeeze.kernels.prefill_index.api import rounded
from squeeze.registry import get
from squeeze.sparsify.prefill.sale import Sale
from tests.sparsify.policies import (
    SCALING,
    check_against,
    check_dense,
    choose,
    inputs,
    lists,
)


def low(x, bits):
    """Round every token to symmetric integers times a scale."""
    most = 2 ** (bits - 1) - 1
    rows = []
    for row in x:
        scale = row.abs().max() / most
        rows.append((row / scale).round() * scale)
    return torch.stack(rows)


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words, row by row."""
    size, T = policy.block_size, len(keys)
    keys = keys - keys.mean(0)
    mean = query[:: policy.query_stride].mean(0)
    small_q, small_k = low(query - mean, policy.bits), low(keys, policy.bits)
    estimate = SCALING * (small_q @ small_k.T + mean @ keys.T)
    exact, result = SCALING * query @ keys.T, []
    for i in range(-(-T // size)):
        best = [0.0] * (i + 1)
        for t in range(i * size, min((i + 1) * size, T), policy.query_stride):
            near = [j for j in range(t + 1) if j // size in (0, i - 1, i)]
            total = exact[t, near].logsumexp(0)
            scores = (estimate[t] - total).exp().tolist()
            # What lies after a query, in its own block, has no say in whether that is read.
            best = [max(b, *scores[j * size : (j + 1) * size]) for j, b in enumerate(best)]
        require = [i - 1] if i else []
        result.append(choose(best, policy.max_density, 16, floor=policy.threshold, require=require))
    return result


@pytest.mark.parametrize(
    ("T", "heads", "threshold", "bits", "size", "starts", "stride"),
    [
        (700, (2, 2), 0.2, 4, 64, None, 1),
        (457, (3, 1), 0.05, 3, 64, [0, 100], 1),
        (500, (4, 1), 0.5, 8, 64, [236, 3], 1),
        (890, (8, 1), 0.3, 4, 128, None, 1),
        (40, (1, 1), 0.1, 4, 64, None, 1),
        (700, (2, 2), 0.1, 4, 64, None, 8),
        (457, (3, 1), 0.05, 4, 64, [0, 101], 2),
        (500, (4, 1), 0.3, 8, 64, [235, 3], 8),
        (891, (8, 1), 0.3, 4, 128, None, 4),
    ],
)
def test_against_the_words(T, heads, threshold, bits, size, starts, stride):
    policy = Sale(threshold, bits, stride, block_size=size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_rounding_by_hand():
    x = torch.tensor([[7.0, -3.4, 0.6], [0.0, 0.0, 0.0]])
    codes, scale = rounded(x, 4)
    assert codes.dtype == torch.int8 and codes.tolist() == [[7, -3, 1], [0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


def test_one_heavy_element_keeps_its_block():
    query, keys = torch.ones(1, 1, 1280, 4), torch.zeros(1, 1, 1280, 4)
    keys[:, :, 450] = 4.0  # in block 7; all other keys are alike
    rows = lists(Sale(0.1, 8, max_density=1.0).index(query, keys, None, 1.0), 0, 0)
    assert rows[15] == [0, 7, 14, 15]
    assert rows[6] == [0, 5, 6]


@pytest.mark.parametrize(
    ("before", "everything"), [(256, False), (312, False), (313, True), (319, True), (320, False)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_block_without_a_query_that_estimates_reads_everything(before, everything, padded):
    """Blocks 4 and 5 hold the first query; that of block 4 at 312 is its last to estimate."""
    query, keys = torch.ones(1, 1, 1280 - before, 4), torch.zeros(1, 1, 1280, 4)
    policy = Sale(0.1, 8, query_stride=8, max_density=1.0)
    starts = torch.zeros(1, dtype=torch.int64) if padded else None
    rows = lists(policy.index(query, keys, starts, 1.0), 0, 0)
    own = before // 64
    assert rows[own] == ([0, 1, 2, 3, 4] if everything else [0, own - 1, own])
    assert rows[own + 1] == [0, own, own + 1]


def test_a_budget_of_each_head():
    query, keys = (x / 2 for x in inputs(1, 2, 1, 1500))
    index = Sale(heads=(3.0, 0.0), max_density=1.0).index(query, keys, None, SCALING)
    few, many = (lists(index, 0, h) for h in range(2))
    assert many == [list(range(i + 1)) for i in range(24)]
    assert sum(map(len, few)) < sum(map(len, many)) / 2


def test_a_full_budget_is_dense():
    check_dense(Sale(threshold=0.0, max_density=1.0))


def test_it_is_registered():
    assert get("prefill", "sale") is Sale
