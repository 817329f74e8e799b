import pytest

from squeeze.registry import get
from squeeze.sparsify.prefill.retrieval_heads import RetrievalHeads
from squeeze.sparsify.prefill.streaming import Streaming
from tests.sparsify.policies import SCALING, check_dense, check_earlier_blocks_stay, inputs, lists


@pytest.mark.parametrize("size", [64, 128])
def test_heads_are_streaming_or_whole(size):
    query, keys = inputs(2, 6, 2, 1200)
    policy = RetrievalHeads(
        sink_tokens=100, window_size=300, block_size=size, heads=(0, 1, 0, 0, 1, 0)
    )
    index = policy.index(query, keys, None, SCALING)
    streaming = Streaming(100, 300, size).index(query, keys, None, SCALING)
    N = -(-1200 // size)
    for h, kind in enumerate(policy.heads):
        whole = [list(range(i + 1)) for i in range(N)]
        assert lists(index, 1, h) == (whole if kind else lists(streaming, 1, h))


def test_all_stream_and_memory_follows():
    query, keys = inputs(1, 2, 2, 6400)
    index = RetrievalHeads(0.0, 64, 128).index(query, keys, None, SCALING)
    assert lists(index, 0, 1) == lists(Streaming(64, 128).index(query, keys, None, 1.0), 0, 1)
    assert index.block_ids.shape[-1] <= 100 * 5 + 1


def test_a_wrong_number_of_heads_is_refused():
    query, keys = inputs(1, 2, 2, 100)
    with pytest.raises(ValueError, match="3 budgets for 2 query heads"):
        RetrievalHeads(heads=(1, 0, 1)).index(query, keys, None, SCALING)


def test_lists_do_not_look_at_the_text():
    check_earlier_blocks_stay(RetrievalHeads(window_size=128, heads=(0, 1, 1, 0)))


def test_without_calibration_it_is_dense():
    check_dense(RetrievalHeads())


def test_it_is_registered():
    assert get("prefill", "retrieval_heads") is RetrievalHeads
