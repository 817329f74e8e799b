"""What the tests of prefill policies share: inputs, plain selection in words, and the contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.sparsify.index import density, to_dense_mask
from squeeze.types import BlockIndex, Implementation

SCALING = 0.25


def inputs(B: int, H: int, H_kv: int, T: int, D: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(B, H, T, D, generator=generator),
        2 * torch.randn(B, H_kv, T, D, generator=generator),
    )


def lists(index: BlockIndex, b: int, h: int) -> list[list[int]]:
    """Return the blocks that each query block of one head lists."""
    ids = index.block_ids[b, h]
    return [ids[a:e].tolist() for a, e in pairwise(index.block_offsets[b, h].tolist())]


def choose(
    weights: Sequence[float],
    share: float = 1.0,
    least: int = 16,
    mass: float = 1.0,
    floor: float = 0.0,
    require: Sequence[int] = (),
) -> list[int]:
    """Select, as the policies' words say, from the weights of blocks 0..i for query block i."""
    i = len(weights) - 1
    budget = min(i + 1, max(least, math.ceil(share * (i + 1))))
    always = {0, i}
    order = sorted(
        range(i + 1),
        key=lambda j: (j not in always, j not in require, -weights[j], -j),
    )
    taken, weight = [], 0.0
    for j in order[:budget]:
        enough = mass < 1 and weight >= mass * sum(weights)
        if j in always or j in require or not (enough or weights[j] < floor):
            taken.append(j)
        weight += weights[j]
    return sorted(taken)


def check_against(
    policy: Any,
    oracle: Callable[[Any, Tensor, Tensor], list[list[int]]],
    *,
    T: int,
    heads: tuple[int, int],
    starts: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Compare every head's lists with those of ``oracle(policy, q [T, D], k [T, D])``."""
    H, H_kv = heads
    B = 1 if starts is None else len(starts)
    query, keys = inputs(B, H, H_kv, T, seed=seed)
    pads = None if starts is None else torch.tensor(starts)
    index = policy.index(query, keys, pads, SCALING)
    for b in range(B):
        first = 0 if starts is None else starts[b]
        for h in range(H):
            expected = oracle(policy, query[b, h, first:], keys[b, h // (H // H_kv), first:])
            actual = lists(index, b, h)
            assert actual[: len(expected)] == expected, (b, h)
            assert not any(actual[len(expected) :]), (b, h)


def check_dense(policy: Any, T: int = 450) -> None:
    """Check that a full budget reads every earlier key and attends as the dense kernel does."""
    query, keys = inputs(2, 4, 2, T)
    starts = torch.tensor([0, 70])
    index = policy.index(query, keys, starts, SCALING)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(to_dense_mask(index, T)[0], causal.expand(4, T, T))
    assert density(index, T - starts).tolist() == [[1.0] * 4] * 2
    values = torch.randn(2, 2, T, 16, generator=torch.Generator().manual_seed(1))
    double = [x.double() for x in (query, keys, values)]
    sparse, dense = (
        block_sparse_attention(
            *double, listed, starts=starts, scaling=SCALING, implementation=Implementation.REFERENCE
        )
        for listed in (index, None)
    )
    torch.testing.assert_close(sparse[0], dense[0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(sparse[1], dense[1], atol=1e-13, rtol=1e-13)


def check_earlier_blocks_stay(policy: Any, T: int = 500, cut: int = 320) -> None:
    """Check that tokens from ``cut`` on leave the lists of the query blocks before them alone."""
    query, keys = inputs(1, 4, 2, T)
    before = policy.index(query, keys, None, SCALING)
    query[:, :, cut:], keys[:, :, cut:] = 9.0, -9.0
    after = policy.index(query, keys, None, SCALING)
    blocks = cut // policy.block_size
    for h in range(4):
        assert lists(before, 0, h)[:blocks] == lists(after, 0, h)[:blocks]
