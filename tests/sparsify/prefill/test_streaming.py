import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify.index import density, to_dense_mask
from squeeze.sparsify.prefill.streaming import Streaming


def inputs(B, H, H_kv, T, D=16):
    return torch.zeros(B, H, T, D), torch.zeros(B, H_kv, T, D)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 400])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (1, 64), (65, 65), (64, 130), (500, 500)])
@pytest.mark.parametrize("size", [64, 128])
def test_sinks_and_window_are_kept(T, sinks, window, size):
    policy = Streaming(sink_tokens=sinks, window_size=window, block_size=size)
    mask = to_dense_mask(policy.index(*inputs(2, 2, 1, T), None, 1.0), T)
    query, key = torch.arange(T)[:, None], torch.arange(T)
    wanted = (key <= query) & ((key < sinks) | (key > query - window))
    assert not (wanted & ~mask).any()
    outside = (key >= -(-max(sinks, 1) // size) * size) & (key <= query - window - 2 * size)
    assert not (mask & (outside | (key > query))).any()


def test_by_hand():
    index = Streaming(sink_tokens=1, window_size=65).index(*inputs(1, 1, 1, 5 * 64), None, 1.0)
    lists = [
        index.block_ids[0, 0, a:b].tolist()
        for a, b in zip(index.block_offsets[0, 0], index.block_offsets[0, 0, 1:], strict=False)
    ]
    assert lists == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert index.column_ids is None


def test_padding_changes_nothing():
    policy, T, pad = Streaming(window_size=100), 300, 90
    padded = policy.index(*inputs(2, 1, 1, T), torch.tensor([0, pad]), 1.0)
    alone = policy.index(*inputs(1, 1, 1, T - pad), None, 1.0)
    rest = T - pad
    expected = to_dense_mask(alone, rest)[0]
    assert torch.equal(to_dense_mask(padded, T)[1, :, :rest, :rest], expected)


def test_a_window_of_everything_is_dense():
    index = Streaming(window_size=4096).index(*inputs(1, 3, 1, 700), None, 1.0)
    assert density(index, torch.tensor([700])).tolist() == [[1.0] * 3]


def test_it_is_registered_and_needs_no_values():
    assert get("prefill", "streaming") is Streaming
    query, keys = (x.to("meta") for x in inputs(1, 4, 2, 3000))
    assert Streaming().index(query, keys, None, 1.0).block_offsets.shape == (1, 4, 48)
