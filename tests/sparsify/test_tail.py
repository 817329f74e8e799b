"""The last queries of each row read everything, the others what the policy listed."""

import pytest
import torch

from squeeze import registry
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.sparsify.index import density, from_masks, to_dense_mask
from squeeze.sparsify.tail import dense_tail
from squeeze.types import Implementation
from tests.sparsify.policies import SCALING, inputs, lists

POLICIES = {name: registry.get("prefill", name) for name in registry.names("prefill")}
NAMES = [name for name, policy in POLICIES.items() if hasattr(policy, "dense_queries")]


def test_by_hand():
    diagonal = torch.eye(5, dtype=torch.bool).expand(1, 1, 5, 5)
    index = from_masks(diagonal, None, 64)
    # Of 300 tokens the last 44 stand in block 4, the 20 before them in block 3.
    assert lists(dense_tail(index, torch.tensor([300]), 44), 0, 0) == [
        [0], [1], [2], [3], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert lists(dense_tail(index, torch.tensor([300]), 45), 0, 0) == [
        [0], [1], [2], [0, 1, 2, 3], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert dense_tail(index, torch.tensor([300]), 0) is index


@pytest.mark.parametrize("tokens", [1, 64, 65, 1000])
@pytest.mark.parametrize("starts", [None, [0, 101, 399, 330]])
@pytest.mark.parametrize("name", NAMES)
def test_rows_before_the_tail_stay_and_those_of_it_are_whole(name, starts, tokens):
    T = 400
    query, keys = inputs(4, 6, 2, T)
    pads = None if starts is None else torch.tensor(starts)
    policy = registry.get("prefill", name)
    before = policy().index(query, keys, pads, SCALING)
    after = policy(dense_queries=tokens).index(query, keys, pads, SCALING)
    for b in range(4):
        length = T - (starts[b] if starts else 0)
        first, blocks = max(0, length - tokens) // 64, -(-length // 64)
        for h in range(6):
            ours, theirs = lists(after, b, h), lists(before, b, h)
            assert ours[:first] == theirs[:first]
            assert ours[first:blocks] == [list(range(i + 1)) for i in range(first, blocks)]
            assert not any(ours[blocks:])
            assert after.block_offsets[b, h, -1] < after.block_ids.shape[-1]
    mask, old = to_dense_mask(after, T), to_dense_mask(before, T)
    length = T - (starts[1] if starts else 0)
    first = max(0, length - tokens) // 64 * 64
    assert torch.equal(mask[1, :, :first], old[1, :, :first])
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(mask[1, 0, first:length, :length], causal[first:length, :length])


@pytest.mark.parametrize("name", NAMES)
def test_a_later_part_ends_densely_too(name):
    T, T_q, starts = 1500, 400, torch.tensor([0, 250])
    policy = registry.get("prefill", name)(dense_queries=64)
    query, keys = inputs(2, 4, 2, T)
    part = query[:, :, T - T_q :]
    index = policy.index(part, keys, starts, SCALING)
    call = {"starts": starts, "scaling": SCALING, "implementation": Implementation.REFERENCE}
    ours, _ = block_sparse_attention(part, keys, keys, index, **call)
    dense, _ = block_sparse_attention(part, keys, keys, None, **call)
    torch.testing.assert_close(ours[:, :, -64:], dense[:, :, -64:], rtol=1e-5, atol=1e-5)
    lengths, begins = torch.tensor([1500, 1250]), torch.tensor([1100, 850])
    plain = registry.get("prefill", name)().index(part, keys, starts, SCALING)
    assert (density(index, lengths, begins) >= density(plain, lengths, begins)).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    query, keys = (x.to("meta") for x in inputs(2, 4, 2, 2000))
    starts = torch.zeros(2, dtype=torch.int64, device="meta")
    policy = registry.get("prefill", name)(dense_queries=100)
    index = policy.index(query, keys, starts, SCALING)
    assert index.block_offsets.shape == (2, 4, -(-2000 // index.block_size) + 1)
