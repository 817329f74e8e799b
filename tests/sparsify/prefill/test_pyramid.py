import math
from itertools import pairwise

import pytest
import torch

from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.registry import get
from squeeze.sparsify.index import density
from squeeze.sparsify.prefill.pyramid import Pyramid
from squeeze.types import Implementation
from tests.sparsify.policies import SCALING, check_dense, check_earlier_blocks_stay, inputs, lists


def weights(policy, query, keys):
    """Weigh the blocks of one head as the words of ``antidiagonal`` say."""
    T, S, size = len(query), policy.stride, policy.block_size
    cells, each = -(-T // S), size // policy.stride

    def cell(x, a):
        rows = x[a * S : (a + 1) * S].double()
        return torch.cat((rows, rows.new_zeros(S - len(rows), x.shape[1])))

    result = []
    for i in range(-(-T // size)):
        blocks = [0.0] * (i + 1)
        for a in range(i * each, min((i + 1) * each, cells)):
            backwards = cell(query, a).flip(0)
            logits = [SCALING / S * float((backwards * cell(keys, c)).sum()) for c in range(a + 1)]
            for c, weight in enumerate(torch.tensor(logits).softmax(0).tolist()):
                blocks[c // each] += weight
        result.append(blocks)
    return result


def levels(policy, blocks):
    """Return, from the weights of blocks 0..i, the level 0..4 of each; 4 is skipped."""
    i, total = len(blocks) - 1, sum(blocks)
    order = sorted(range(i + 1), key=lambda j: (j not in (0, i), -blocks[j], -j))
    found, level, held, count = {}, 0, 0.0, 0
    masses = (policy.full, policy.half, policy.quarter, policy.eighth)
    limits = [max(16, math.ceil(policy.max_density * (i + 1)))]
    limits += [math.ceil(policy.max_averaged * (i + 1))] * 3
    for rank, j in enumerate(order):
        while level < 4 and (
            count == limits[level]
            or (rank >= 2 and masses[level] < 1 and held >= masses[level] * total)
        ):
            level, count = level + 1, 0
        found[j] = level
        held, count = held + blocks[j], count + 1
    return found


def averaged(index, T, b, h):
    """Return, per query block of one head, the level of each block of keys read as averages."""
    result, size = [], index.block_size
    for a, e in pairwise(index.pooled_offsets[b, h].tolist()):
        tokens = {}
        for run in index.pooled_ids[b, h, a:e].tolist():
            level = 1
            while run >= T // (8 << level):
                run, level = run - T // (8 << level), level + 1
            tokens.setdefault((run * (8 << level) // size, level), []).append(run * (8 << level))
        for (block, level), firsts in tokens.items():
            assert firsts == list(range(block * size, (block + 1) * size, 8 << level))
        result.append(dict(tokens.keys()))
    return result


@pytest.mark.parametrize(
    ("T", "heads", "masses", "averaged_share", "size", "stride", "starts"),
    [
        (2000, (2, 2), (0.3, 0.5, 0.7, 0.9), 1.0, 64, 16, None),
        (1930, (3, 1), (0.6, 0.5, 0.7, 1.0), 0.3, 64, 32, [0, 333]),
        (1500, (4, 1), (0.4, 0.6, 0.6, 0.8), 0.1, 64, 32, [1436, 3]),
        (3000, (8, 1), (0.9, 0.95, 0.98, 1.0), 0.2, 128, 32, None),
        (40, (1, 1), (0.1, 0.2, 0.3, 0.4), 0.3, 64, 8, None),
    ],
)
def test_against_the_words(T, heads, masses, averaged_share, size, stride, starts):
    policy = Pyramid(*masses, 0.2, averaged_share, stride, size)
    (H, H_kv), rows = heads, starts or [0]
    query, keys = inputs(len(rows), H, H_kv, T, D=4, seed=T)
    pads = None if starts is None else torch.tensor(starts)
    index = policy.index(query, keys, pads, SCALING)
    for b, first in enumerate(rows):
        for h in range(0, H, 3):
            exact, pooled = lists(index, b, h), averaged(index, T, b, h)
            blocks = weights(policy, query[b, h, first:], keys[b, h // (H // H_kv), first:])
            for i, row in enumerate(blocks):
                level = levels(policy, row)
                assert exact[i] == sorted(j for j in level if level[j] == 0)
                assert pooled[i] == {j: x for j, x in level.items() if 0 < x < 4}
            assert not any(exact[len(blocks) :]) and not any(pooled[len(blocks) :])


def test_averages_of_equal_keys_are_exact():
    # Within a block keys and values do not change, so that an average loses nothing.
    T = 64 * 40
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, T, 16, generator=generator).double()
    keys, values = (
        torch.randn(1, 1, 40, 16, generator=generator).double().repeat_interleave(64, 2)
        for _ in range(2)
    )
    index = Pyramid(0.2, 0.5, 0.8, 1.0, max_averaged=1.0).index(query, keys, None, SCALING)
    assert density(index, torch.tensor([T])).max() < 0.75
    for actual, expected in zip(
        *(
            block_sparse_attention(
                query, keys, values, listed, scaling=SCALING,
                implementation=Implementation.REFERENCE,
            )
            for listed in (index, None)
        ),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_density_counts_averages_as_keys():
    query, keys = torch.zeros(1, 1, 64 * 64, 4), torch.zeros(1, 1, 64 * 64, 4)
    index = Pyramid(0.25, 0.5, 0.75, 1.0).index(query, keys, None, SCALING)
    computed = 0
    for i, row in enumerate(averaged(index, 64 * 64, 0, 0)):
        keys = sum(64 >> level for level in row.values())
        computed += 64 * (len(lists(index, 0, 0)[i]) * 64 + math.ceil(keys / 64) * 64)
        # All blocks weigh alike, so that each level gets a quarter of them.
        assert all(abs(list(row.values()).count(h) - (i + 1) / 4) <= 2 for h in (1, 2, 3))
    expected = computed / (4096 * 4097 / 2)
    assert density(index, torch.tensor([4096])).item() == pytest.approx(expected)


def test_a_full_budget_is_dense():
    check_dense(Pyramid(full=1.0, max_density=1.0))


def test_later_blocks_do_not_change_earlier_lists():
    policy = Pyramid(0.3, 0.4, 0.6, 0.8)
    check_earlier_blocks_stay(policy, T=1700, cut=1600)


def test_averages_end_before_the_query_block():
    T = 2000
    index = Pyramid(0.3, 0.5, 0.7, 1.0).index(*inputs(1, 2, 1, T), None, SCALING)
    pooled = averaged(index, T, 0, 0)
    assert all(block < i for i, row in enumerate(pooled) for block in row)
    assert any(pooled)


def test_it_is_registered():
    assert get("prefill", "pyramid") is Pyramid
