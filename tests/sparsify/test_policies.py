"""What every registered prefill policy obeys."""

import math

import pytest
import torch

from squeeze import registry
from squeeze.sparsify.index import to_dense_mask
from tests.sparsify.policies import SCALING, inputs, lists

NAMES = registry.names("prefill")


@pytest.mark.parametrize("starts", [None, [0, 101, 399, 330]])
@pytest.mark.parametrize("name", NAMES)
def test_lists_ascend_up_to_the_diagonal(name, starts):
    T, policy = 400, registry.get("prefill", name)()
    query, keys = inputs(4, 6, 2, T)
    index = policy.index(query, keys, None if starts is None else torch.tensor(starts), SCALING)
    for b in range(4):
        blocks = math.ceil((T - (starts[b] if starts else 0)) / index.block_size)
        for h in range(6):
            assert index.block_offsets[b, h, -1] <= index.block_ids.shape[-1]
            rows = lists(index, b, h)
            for i, row in enumerate(rows[:blocks]):
                assert row == sorted(set(row))
                assert {0, i} <= set(row) <= set(range(i + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_alone_and_padded(name):
    T, starts = 1500, [0, 701, 1499]
    policy = registry.get("prefill", name)()
    query, keys = inputs(3, 4, 2, T)
    padded = policy.index(query, keys, torch.tensor(starts), SCALING)
    for b, start in enumerate(starts):
        alone = policy.index(query[b : b + 1, :, start:], keys[b : b + 1, :, start:], None, SCALING)
        rest = -(-(T - start) // alone.block_size)
        for h in range(4):
            assert lists(padded, b, h)[:rest] == lists(alone, 0, h)
            if alone.column_offsets is not None:
                a, b_ = alone.column_offsets[0, h], padded.column_offsets[b, h, : rest + 1]
                assert torch.equal(a, b_)
                assert torch.equal(
                    alone.column_ids[0, h, : a[-1]], padded.column_ids[b, h, : b_[-1]]
                )


@pytest.mark.parametrize("name", NAMES)
def test_query_heads_share_keys_as_if_they_were_repeated(name):
    policy = registry.get("prefill", name)()
    query, keys = inputs(1, 8, 2, 300)
    shared = policy.index(query, keys, None, SCALING)
    repeated = policy.index(query, keys.repeat_interleave(4, 1), None, SCALING)
    assert torch.equal(to_dense_mask(shared, 300), to_dense_mask(repeated, 300))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    # Tensors without values: any look at one would raise.
    query, keys = (x.to("meta") for x in inputs(2, 4, 2, 2000))
    starts = torch.zeros(2, dtype=torch.int64, device="meta")
    index = registry.get("prefill", name)().index(query, keys, starts, SCALING)
    assert index.block_offsets.shape == (2, 4, -(-2000 // index.block_size) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_segments_do_not_show(name, monkeypatch):
    policy = registry.get("prefill", name)()
    query, keys = inputs(1, 4, 2, 1500)
    whole = policy.index(query, keys, None, SCALING)
    monkeypatch.setattr("squeeze.sparsify.selection.SCRATCH_BYTES", 1)
    pieces = policy.index(query, keys, None, SCALING)
    for h in range(4):
        assert lists(whole, 0, h) == lists(pieces, 0, h)


CAPPED = [name for name in NAMES if hasattr(registry.get("prefill", name), "max_tokens")]


@pytest.mark.parametrize("name", CAPPED)
def test_no_list_is_longer_than_the_bound(name):
    # Settings that ask for everything, so that only the bound holds lists back.
    most = {"share": 1.0} if name == "block_topk" else {"max_density": 1.0}
    most |= {"moba": {"top_k": 99}, "sale": {"threshold": 0.0}}.get(name, {})
    mass = {"antidiagonal": "threshold", "pyramid": "full"}.get(name, "mass")
    policy = registry.get("prefill", name)
    most |= {mass: 1.0} if hasattr(policy, mass) else {}
    query, keys = inputs(1, 2, 1, 3000)
    index = policy(max_tokens=30 * 64, **most).index(query, keys, None, SCALING)
    assert [len(row) for row in lists(index, 0, 1)] == [min(i, 30) for i in range(1, 48)]


@pytest.mark.parametrize("name", [name for name in CAPPED if name != "block_topk"])
def test_the_last_budget_of_a_ladder_is_dense(name):
    policy = registry.get("prefill", name)
    heads = (policy.ladder[0], policy.ladder[-1])
    query, keys = inputs(1, 2, 1, 3000)
    index = policy(max_density=1.0, heads=heads).index(query, keys, None, SCALING)
    assert lists(index, 0, 1) == [list(range(i + 1)) for i in range(47)]
