import math
from itertools import pairwise

import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.estimate import block_diagonals, sampled_weights
from squeeze.sparsify.index import density, to_dense_mask
from squeeze.sparsify.prefill.vertical_slash import VerticalSlash


def inputs(B, H, H_kv, T, D=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(B, H, T, D, generator=generator),
        2 * torch.randn(B, H_kv, T, D, generator=generator),
    )


def lists(offsets, ids, b, h):
    ends = offsets[b, h].tolist()
    return [ids[b, h, a:e].tolist() for a, e in pairwise(ends)]


def oracle(policy, query, keys, scaling):
    """Build the token mask of one row and head from the policy's words alone, pair by pair."""
    T, size = query.shape[0], policy.block_size
    N = -(-T // policy.block_size)
    sample = [T - 1 - r for r in range(policy.last_queries)]
    for i in range(policy.passes):
        last = T - 1 - i * policy.stride // policy.passes
        sample += [last - r * policy.stride for r in range(policy.last_queries)]
    column, diagonal = [0.0] * T, [0.0] * N
    for t in (t for t in sample if t >= 0):
        weights = torch.softmax(scaling * (keys[: t + 1].double() @ query[t].double()), 0).tolist()
        for j, weight in enumerate(weights):
            column[j] += weight
            for d in range(N):
                overlap = max(0.0, 1 - abs(t - j - d * size) / size)
                diagonal[d] += weight * overlap
    nearest = 1 + math.ceil((policy.window_size - 1) / size)
    budget = max(math.ceil(policy.slashes / size), nearest)
    ranked = sorted(range(nearest, N), key=lambda d: -diagonal[d])
    distances = {*range(min(nearest, N)), *ranked[: budget - nearest]}
    columns = sorted(range(size, T), key=lambda j: -column[j])[: policy.verticals]
    mask = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        for j in range(t + 1):
            mask[t, j] = t // size - j // size in distances or j < size or j in columns
    return mask


@pytest.mark.parametrize(
    ("T", "verticals", "slashes", "window", "size", "passes"),
    [
        (300, 20, 128, 1, 64, 2),
        (257, 0, 0, 65, 64, 2),
        (290, 7, 200, 66, 64, 0),
        (300, 30, 0, 1, 128, 2),
        (40, 5, 64, 100, 64, 2),
    ],
)
def test_against_the_words(T, verticals, slashes, window, size, passes):
    policy = VerticalSlash(
        verticals,
        slashes,
        window,
        last_queries=16,
        passes=passes,
        stride=9,
        block_size=size,
    )
    query, keys = inputs(1, 2, 1, T, seed=T)
    mask = to_dense_mask(policy.index(query, keys, None, 0.25), T)
    for h in range(2):
        assert torch.equal(mask[0, h], oracle(policy, query[0, h], keys[0, 0], 0.25))


def test_block_diagonals_by_hand():
    # The last of 8 tokens weighs itself 0.5, its neighbour 0.25 and the key 4 before it 0.25. The
    # neighbour's diagonal overlaps block distance 0 by 3/4 and distance 1 by 1/4 in blocks of 4.
    weights = torch.tensor([0, 0, 0, 0.25, 0, 0, 0.25, 0.5]).view(1, 1, 1, 8)
    expected = [0.5 + 0.25 * 0.75, 0.25 + 0.25 * 0.25]
    assert block_diagonals(weights, range(7, 8), 4)[0, 0].tolist() == pytest.approx(expected)


def test_weights_are_the_attention_of_sampled_queries():
    query, keys = inputs(2, 4, 2, 50)
    starts = torch.tensor([0, 46])
    weights = sampled_weights(query, keys, starts, 0.25, 5.0, range(42, 50))
    assert weights.shape == (2, 4, 8, 50)
    scores = 5 * torch.tanh(0.25 * query[0, 3, 45] @ keys[0, 1, :46].T / 5)
    torch.testing.assert_close(weights[0, 3, 3, :46], scores.softmax(0))
    assert not weights[0, 3, 3, 46:].any()
    real = torch.tensor([0.0] * 4 + [1.0] * 4)
    torch.testing.assert_close(weights[1].sum(-1), real.expand(4, 8))
    assert not weights[1, :, :, :46].any()


def test_strided_queries_line_up():
    # Every query of the sample reads only the token 5 before it: distances 1 (3/4) and 2 (1/4).
    rows, weights = range(23, 40, 7), torch.zeros(1, 1, 3, 40)
    for row, token in enumerate(rows):
        weights[0, 0, row, token - 5] = 1.0
    mass = block_diagonals(weights, rows, 4)[0, 0]
    assert mass.tolist() == pytest.approx([0, 2.25, 0.75] + [0] * 7)
    query, keys = inputs(1, 2, 1, 40)
    every = sampled_weights(query, keys, torch.tensor([0]), 0.25, None, range(40))
    some = sampled_weights(query, keys, torch.tensor([0]), 0.25, None, rows)
    torch.testing.assert_close(some, every[:, :, list(rows)])


def test_a_column_that_all_attend_is_read_by_all():
    T, needle = 640, 130
    query, keys = torch.zeros(1, 2, T, 8), torch.zeros(1, 1, T, 8)
    query[..., 0], keys[..., needle, 0] = 4.0, 4.0
    index = VerticalSlash(verticals=1, slashes=0, window_size=1).index(query, keys, None, 1.0)
    for h in range(2):
        columns = lists(index.column_offsets, index.column_ids, 0, h)
        assert columns == [[]] * 3 + [[needle]] * 7


@pytest.mark.parametrize("starts", [None, [0, 100, 299], [299, 0, 17]])
def test_lists_obey_the_contract(starts):
    B, H, T, size = 3, 6, 300, 64
    query, keys = inputs(B, H, 2, T)
    starts = None if starts is None else torch.tensor(starts)
    index = VerticalSlash(40, 128, 1).index(query, keys, starts, 0.25)
    for b in range(B):
        length = T if starts is None else T - int(starts[b])
        for h in range(H):
            blocks = lists(index.block_offsets, index.block_ids, b, h)
            columns = lists(index.column_offsets, index.column_ids, b, h)
            assert index.block_offsets[b, h, -1] <= index.block_ids.shape[-1]
            assert index.column_offsets[b, h, -1] <= index.column_ids.shape[-1]
            for i in range(-(-length // size)):
                assert blocks[i] == sorted(set(blocks[i]))
                assert {0, i} <= set(blocks[i]) <= set(range(i + 1))
                assert columns[i] == sorted(set(columns[i]))
                assert all(c // size < i and c // size not in blocks[i] for c in columns[i])
            assert blocks[-(-length // size) :] == [[]] * (5 - -(-length // size))


def test_a_row_is_the_same_alone_and_padded():
    T, starts = 400, [0, 101, 330, 399]
    policy = VerticalSlash(30, 128, 1, last_queries=32)
    query, keys = inputs(4, 4, 2, T)
    padded = to_dense_mask(policy.index(query, keys, torch.tensor(starts), 0.25), T)
    for b, start in enumerate(starts):
        rest = T - start
        alone = policy.index(query[b : b + 1, :, start:], keys[b : b + 1, :, start:], None, 0.25)
        assert torch.equal(padded[b, :, :rest, :rest], to_dense_mask(alone, rest)[0])


@pytest.mark.parametrize("budgets", [(0, 10_000), (10_000, 0)])
def test_a_full_budget_is_dense(budgets):
    query, keys = inputs(1, 3, 1, 450)
    index = VerticalSlash(*budgets).index(query, keys, None, 0.25)
    assert torch.equal(
        to_dense_mask(index, 450)[0, 0], torch.ones(450, 450, dtype=torch.bool).tril()
    )
    assert density(index, torch.tensor([450])).tolist() == [[1.0] * 3]


def test_more_budget_reads_more():
    query, keys = inputs(1, 2, 2, 1000)
    masks = [
        to_dense_mask(VerticalSlash(budget, budget, 1).index(query, keys, None, 0.25), 1000)
        for budget in (64, 256, 600)
    ]
    for smaller, larger in pairwise(masks):
        assert not (smaller & ~larger).any()
        assert larger.sum() > smaller.sum()


def test_budgets_grow_with_the_root_of_the_length():
    query, keys = inputs(1, 2, 2, 1600)
    policy = {"window_size": 1, "budget_length": 400}
    short = VerticalSlash(100, 128, **policy).index(query[:, :, :400], keys[:, :, :400], None, 0.25)
    same = VerticalSlash(100, 128, 1).index(query[:, :, :400], keys[:, :, :400], None, 0.25)
    assert torch.equal(short.column_ids, same.column_ids)
    assert torch.equal(short.block_ids, same.block_ids)
    long = VerticalSlash(100, 128, **policy).index(query, keys, None, 0.25)
    twice = VerticalSlash(200, 256, 1).index(query, keys, None, 0.25)
    assert torch.equal(long.column_ids, twice.column_ids)
    assert torch.equal(long.block_ids, twice.block_ids)


def test_nothing_waits_for_the_device():
    # Tensors without values: any look at one would raise.
    query, keys = (x.to("meta") for x in inputs(2, 4, 2, 2000))
    starts = torch.zeros(2, dtype=torch.int64, device="meta")
    index = VerticalSlash().index(query, keys, starts, 0.25)
    assert index.column_offsets.shape == index.block_offsets.shape == (2, 4, 33)


def test_it_is_registered():
    assert get("prefill", "vertical_slash") is VerticalSlash
