import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from squeeze.errors import RecipeError
from squeeze.evaluation import scoring


@pytest.mark.parametrize("mode", scoring.MODES)
@pytest.mark.parametrize(("start", "chunk"), [(1, 64), (7, 4), (18, 5), (19, 8)])
def test_both_modes_score_the_tokens_from_start_as_one_full_forward_does(pico, mode, start, chunk):
    ids = torch.randint(8192, (3, 20), generator=torch.Generator().manual_seed(start))
    with scoring.scoring(pico):
        loss, greedy = scoring.negative_log_likelihood(pico, ids, start, mode, chunk)
        logits = pico(ids).logits[:, start - 1 : -1]
    expected = functional.cross_entropy(logits.transpose(1, 2), ids[:, start:], reduction="none")
    torch.testing.assert_close(loss, expected)
    assert greedy.tolist() == (logits.argmax(-1) == ids[:, start:]).tolist()


def test_decode_feeds_at_most_a_chunk_over_the_cache(pico):
    fed = []
    pico.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(
            (kwargs["input_ids"].shape[1], "past_key_values" in kwargs)
        ),
        with_kwargs=True,
    )
    ids = torch.zeros(1, 30, dtype=torch.int64)
    with scoring.scoring(pico):
        scoring.negative_log_likelihood(pico, ids, 10, "decode", 8)
    assert fed == [(10, False), (8, True), (8, True), (3, True)]


def test_a_model_without_logits_to_keep_is_scored_alike(pico):
    ids = torch.arange(12)[None]

    class Plain(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return pico(input_ids=input_ids, use_cache=use_cache)

    with scoring.scoring(pico):
        ours, _ = scoring.negative_log_likelihood(Plain(), ids, 5, "prefill")
        theirs, _ = scoring.negative_log_likelihood(pico, ids, 5, "prefill")
    torch.testing.assert_close(ours, theirs)


def test_scoring_puts_the_training_flag_back_and_needs_no_gradients(pico):
    pico.train()
    with scoring.scoring(pico):
        assert not pico.training
        assert not pico(torch.zeros(1, 2, dtype=torch.int64)).logits.requires_grad
    assert pico.training


def test_excerpts_are_distinct_evenly_spread_and_of_exact_length(tokenizer):
    texts = ["".join(f" {number}" for number in range(part, part + 500)) for part in (1000, 5000)]
    found = scoring.excerpts(tokenizer, texts, 20, 4)
    assert [len(ids) for ids in found] == [20] * 4
    starts = [int(tokenizer.decode(ids).split()[1]) for ids in found]
    assert starts == sorted(starts)
    assert [start // 10 * 10 for start in starts] == [1000, 1250, 5000, 5250]


def test_too_little_text_is_refused_with_what_there_is(tokenizer):
    with pytest.raises(RecipeError, match=r"2 excerpts of 50 tokens, but part 1 of the text has"):
        scoring.excerpts(tokenizer, ["a short text " * 4], 50, 2)


@pytest.mark.parametrize("length", [4, 1025])
def test_lengths_outside_the_model_are_refused(pico, length):
    with pytest.raises(RecipeError, match=f"length: {length} tokens. Allowed: 16 to 1024 tokens"):
        scoring.check_length(pico, length)


def test_an_unknown_mode_lists_both():
    with pytest.raises(RecipeError, match=r"'decoed'. Allowed: prefill, decode. Did you mean"):
        scoring.check_mode("decoed")


def test_limits_are_positive_and_bounded():
    assert scoring.check_limit(None, 16) == 16
    assert scoring.check_limit(3, 16, 3) == 3
    with pytest.raises(RecipeError, match=r"limit: 0. Allowed: at least 1"):
        scoring.check_limit(0, 16)
    with pytest.raises(RecipeError, match=r"limit: 9. Allowed: 1 to 8"):
        scoring.check_limit(9, 16, 8)


def test_a_supplied_cache_is_new_for_every_sequence_and_gone_after(pico):
    made = []

    class Forgetful(DynamicCache):
        def __init__(self):
            super().__init__()
            made.append(self)

    ids = torch.zeros(1, 30, dtype=torch.int64)
    with scoring.scoring(pico), scoring.supplied_cache(pico, Forgetful):
        for _ in range(2):
            scoring.negative_log_likelihood(pico, ids, 10, "decode", 8)
        scoring.negative_log_likelihood(pico, ids, 10, "prefill")
    assert [cache.get_seq_length() for cache in made] == [29, 29]
    pico(ids, use_cache=True)
    assert len(made) == 2
