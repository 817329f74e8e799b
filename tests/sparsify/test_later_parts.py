"""Policies over the later part of a prompt: fewer queries than keys."""

import math
from itertools import pairwise

import pytest
import torch

from squeeze import registry
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.sparsify.index import density
from squeeze.types import Implementation
from tests.sparsify.policies import SCALING, inputs, lists

NAMES = registry.names("prefill")
# What these list for a query block depends on its own queries and on keys alone.
LOCAL = (
    "antidiagonal", "block_topk", "custom", "moba", "pyramid", "retrieval_heads", "streaming",
    "strided_shards",
)  # fmt: skip


def every_list(index, b, h, T):
    """Return the blocks, columns and averages (level, run) of each query block of one head."""
    seconds = (T // 16, T // 16 + T // 32)  # where runs of averages of 4 and of 8 tokens begin
    result = [lists(index, b, h)]
    if index.column_offsets is not None:
        ends = index.column_offsets[b, h].tolist()
        result.append([index.column_ids[b, h, a:e].tolist() for a, e in pairwise(ends)])
    if index.pooled_offsets is not None:
        ends = index.pooled_offsets[b, h].tolist()
        rows = [index.pooled_ids[b, h, a:e].tolist() for a, e in pairwise(ends)]
        level = [[sum(n >= first for first in seconds) for n in row] for row in rows]
        starts = (0, *seconds)
        result.append(
            [
                [(at, n - starts[at]) for n, at in zip(*row, strict=True)]
                for row in zip(rows, level, strict=True)
            ]
        )
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("T", "T_q"), [(1500, 700), (1500, 732), (200, 130)])
def test_query_blocks_without_a_query_list_nothing_that_counts(name, T, T_q):
    policy = registry.get("prefill", name)()
    query, keys = inputs(2, 4, 2, T)
    index = policy.index(query[:, :, T - T_q :], keys, None, SCALING)
    assert index.block_offsets.shape == (2, 4, math.ceil(T / 64) + 1)
    assert index.block_offsets[0, 0, -1] <= index.block_ids.shape[-1]
    for i, row in enumerate(lists(index, 1, 3)):
        if (i + 1) * 64 > T - T_q:
            assert row == sorted(set(row))
            assert {0, i} <= set(row) <= set(range(i + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_alone_and_padded(name):
    T, T_q, starts = 1500, 400, [0, 701, 1250]
    policy = registry.get("prefill", name)()
    query, keys = inputs(3, 4, 2, T)
    query = query[:, :, T - T_q :]
    padded = policy.index(query, keys, torch.tensor(starts), SCALING)
    for b, start in enumerate(starts):
        real = min(T_q, T - start)
        alone = policy.index(
            query[b : b + 1, :, T_q - real :], keys[b : b + 1, :, start:], None, SCALING
        )
        blocks = range((T - start - real) // 64, -(-(T - start) // 64))
        for h in range(4):
            pairs = zip(
                every_list(padded, b, h, T), every_list(alone, 0, h, T - start), strict=True
            )
            for whole, single in pairs:
                assert [whole[i] for i in blocks] == [single[i] for i in blocks]


@pytest.mark.parametrize("name", LOCAL)
def test_parts_equal_the_whole_where_lists_are_local(name):
    T, policy = 1100, registry.get("prefill", name)()
    query, keys = inputs(1, 6, 2, T)
    whole = policy.index(query, keys, None, SCALING)
    for first, end in ((0, 320), (320, 1024), (1024, 1100)):
        part = policy.index(query[:, :, first:end], keys[:, :, :end], None, SCALING)
        for h in range(6):
            blocks = range(first // 64, -(-end // 64))
            pairs = zip(every_list(whole, 0, h, T), every_list(part, 0, h, end), strict=True)
            for theirs, ours in pairs:
                assert [theirs[i] for i in blocks] == [ours[i] for i in blocks]


def test_density_of_parts_adds_up():
    policy = registry.get("prefill", "antidiagonal")(threshold=0.6)
    query, keys = inputs(1, 4, 2, 2000)
    whole = density(policy.index(query, keys, None, SCALING), torch.tensor([2000]))
    total = torch.zeros(1, 4).double()
    for first, end in ((0, 640), (640, 1984), (1984, 2000)):
        part = policy.index(query[:, :, first:end], keys[:, :, :end], None, SCALING)
        share = density(part, torch.tensor([end]), torch.tensor([first]))
        total += share * (end * (end + 1) - first * (first + 1)) / (2000 * 2001)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_takes_them(name):
    T, T_q, starts = 700, 333, torch.tensor([0, 250])
    policy = registry.get("prefill", name)()
    query, keys = inputs(2, 4, 2, T)
    index = policy.index(query[:, :, -T_q:], keys, starts, SCALING)
    call = {"starts": starts, "scaling": SCALING, "implementation": Implementation.REFERENCE}
    part, _ = block_sparse_attention(query[:, :, -T_q:], keys, keys, index, **call)
    whole, _ = block_sparse_attention(query, keys, keys, index, **call)
    torch.testing.assert_close(part, whole[:, :, -T_q:], rtol=1e-5, atol=1e-5)
