import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.prefill.block_topk import BlockTopk
from tests.sparsify.policies import (
    SCALING,
    check_against,
    check_dense,
    check_earlier_blocks_stay,
    choose,
    inputs,
    lists,
)


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words."""
    size = policy.block_size
    firsts = range(0, len(query), size)
    q, k = ([x[a : a + size].double().mean(0) for a in firsts] for x in (query, keys))
    return [
        choose(
            torch.stack([SCALING * q[i] @ k[j] for j in range(i + 1)]).softmax(0).tolist(),
            share=policy.share,
            least=max(2, -(-policy.budget // size)),
        )
        for i in range(len(q))
    ]


@pytest.mark.parametrize(
    ("T", "heads", "budget", "share", "size", "starts"),
    [
        (700, (2, 2), 200, 0.0, 64, None),
        (657, (3, 1), 0, 0.5, 64, [0, 100]),
        (500, (4, 1), 193, 0.0, 64, [436, 3]),
        (890, (8, 1), 300, 0.6, 128, None),
        (40, (1, 1), 9, 0.0, 64, None),
    ],
)
def test_against_the_words(T, heads, budget, share, size, starts):
    policy = BlockTopk(budget=budget, share=share, block_size=size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_a_block_that_one_block_of_queries_asks_for():
    # Keys of block 2 point along channel 0, so do the queries of block 6 alone.
    query, keys = torch.zeros(1, 1, 512, 8), torch.zeros(1, 1, 512, 8)
    keys[:, :, 128:192, 0], query[:, :, 384:448, 0] = 1.0, 5.0
    index = BlockTopk(budget=3 * 64).index(query, keys, None, 1.0)
    assert lists(index, 0, 0)[6] == [0, 2, 6]
    # Others weigh all alike and take the nearest.
    assert lists(index, 0, 0)[7] == [0, 6, 7]


def test_more_budget_reads_more():
    query, keys = inputs(1, 2, 2, 1000)
    small, large = (
        BlockTopk(budget=budget).index(query, keys, None, SCALING) for budget in (256, 512)
    )
    for h in range(2):
        for few, many in zip(lists(small, 0, h), lists(large, 0, h), strict=True):
            assert set(few) <= set(many)
            assert len(many) == min(8, many[-1] + 1)


def test_the_index_grows_with_the_selection():
    sizes = []
    for T in (4096, 8192):
        query, keys = (x.to("meta") for x in inputs(1, 2, 1, T))
        sizes.append(BlockTopk(budget=512).index(query, keys, None, 1.0).block_ids.shape[-1])
    assert sizes == [1 + 36 + 56 * 8, 1 + 36 + 120 * 8]


@pytest.mark.parametrize("share", BlockTopk.ladder)
def test_shares_of_heads_fit_the_memory_taken_for_them(share):
    # In float32 0.18 * 50 is above 9, and a tenth block has no place.
    T = 8192
    query, keys = inputs(1, 2, 1, T, D=2)
    index = BlockTopk(budget=256, heads=(share, share)).index(query, keys, None, SCALING)
    alone = BlockTopk(budget=256, share=share).index(query, keys, None, SCALING)
    assert lists(index, 0, 1) == lists(alone, 0, 1)
    assert torch.equal(index.block_offsets, alone.block_offsets)
    assert index.block_offsets[0, 0, -1] < index.block_ids.shape[-1]


def test_a_full_budget_is_dense():
    check_dense(BlockTopk(budget=100_000))
    check_dense(BlockTopk(budget=0, share=1.0))


def test_later_blocks_do_not_change_earlier_lists():
    check_earlier_blocks_stay(BlockTopk(budget=192))


def test_it_is_registered():
    assert get("prefill", "block_topk") is BlockTopk
