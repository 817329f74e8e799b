import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.index import to_dense_mask
from squeeze.sparsify.prefill.moba import Moba
from tests.sparsify.policies import (
    SCALING,
    check_against,
    check_dense,
    check_earlier_blocks_stay,
    choose,
    inputs,
    lists,
)


def routes(policy, query, keys):
    """Return the chunks before its own that each token of one head chooses."""
    chunk = policy.chunk_size
    means = [keys[a : a + chunk].double().mean(0) for a in range(0, len(keys), chunk)]
    return [
        sorted(range(t // chunk), key=lambda c: -float(q.double() @ means[c]))[: policy.top_k - 1]
        for t, q in enumerate(query)
    ]


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words."""
    size, per_chunk = policy.block_size, policy.chunk_size // policy.block_size
    chosen, result = routes(policy, query, keys), []
    for i in range(-(-len(query) // size)):
        votes = [0.0] * (i + 1)
        for chunks in chosen[i * size : (i + 1) * size]:
            for j in range(i + 1):
                votes[j] += (j // per_chunk in chunks) / size
        own = [j for j in range(i + 1) if j // per_chunk == i // per_chunk]
        result.append(choose(votes, share=policy.max_density, floor=0.5 / size, require=own))
    return result


@pytest.mark.parametrize(
    ("T", "heads", "top_k", "chunk", "size", "density", "starts"),
    [
        (700, (2, 2), 2, 128, 64, 1.0, None),
        (657, (3, 1), 3, 128, 64, 1.0, [0, 100]),
        (1500, (4, 1), 3, 128, 64, 0.01, [1436, 3]),
        (1100, (8, 1), 2, 256, 128, 1.0, None),
        (40, (1, 1), 1, 128, 64, 0.5, None),
    ],
)
def test_against_the_words(T, heads, top_k, chunk, size, density, starts):
    policy = Moba(top_k, chunk, density, size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_every_query_reads_what_it_was_routed_to():
    T, policy = 700, Moba(top_k=2, max_density=1.0)
    query, keys = inputs(1, 2, 1, T)
    mask = to_dense_mask(policy.index(query, keys, None, SCALING), T)
    for h in range(2):
        for t, chunks in enumerate(routes(policy, query[0, h], keys[0, 0])):
            wanted = torch.zeros(T, dtype=torch.bool)
            for c in [*chunks, t // 128]:
                wanted[c * 128 : (c + 1) * 128] = True
            assert mask[0, h, t, : t + 1][wanted[: t + 1]].all()


def test_one_query_brings_in_a_chunk():
    # Chunk 1 points along channel 0 and only token 700 asks for it; the others ask for chunk 2.
    query, keys = torch.zeros(1, 1, 768, 4), torch.zeros(1, 1, 768, 4)
    keys[:, :, 128:256, 0], keys[:, :, 256:384, 1] = 1.0, 1.0
    query[..., 1], query[:, :, 700] = 1.0, torch.tensor([1.0, 0, 0, 0])
    rows = lists(Moba(top_k=2, max_density=1.0).index(query, keys, None, 1.0), 0, 0)
    assert rows[9] == [0, 4, 5, 8, 9]
    assert rows[10] == [0, 2, 3, 4, 5, 10]


def test_a_full_budget_is_dense():
    check_dense(Moba(top_k=100, max_density=1.0))


def test_each_head_has_its_number_of_chunks():
    query, keys = inputs(1, 4, 2, 1200)
    policy = {"max_density": 1.0}
    index = Moba(heads=(1, 3, 2, 5), **policy).index(query, keys, None, SCALING)
    for h, top_k in enumerate((1, 3, 2, 5)):
        alone = Moba(top_k=top_k, **policy).index(query, keys, None, SCALING)
        assert lists(index, 0, h) == lists(alone, 0, h)


def test_later_blocks_do_not_change_earlier_lists():
    check_earlier_blocks_stay(Moba(top_k=2))


def test_it_is_registered():
    assert get("prefill", "moba") is Moba
