import math

import pytest
import torch

from squeeze.evaluation.perplexity import books_perplexity


def test_the_reference_model_reads_english(trained, tokenizer):
    result = books_perplexity(trained, tokenizer, length=512, limit=3)
    assert 20 < result["value"] < 60
    assert (result["mode"], result["length"], result["count"]) == ("decode", 512, 3)
    assert result["tokens"] == 3 * 256


def test_a_dense_model_scores_the_same_in_both_modes_and_any_batch(pico, tokenizer, text):
    results = [
        books_perplexity(
            pico, tokenizer, mode=mode, length=131, limit=3, batch_size=batch_size, text=text
        )
        for mode, batch_size in (("decode", 1), ("decode", 2), ("prefill", 3))
    ]
    for result in results:
        assert result["window_nll"] == pytest.approx(results[0]["window_nll"], rel=1e-5)
        assert result["value"] == pytest.approx(math.exp(sum(result["window_nll"]) / 3))
        assert result["tokens"] == 3 * 66


def test_windows_start_with_bos_and_only_the_second_half_is_scored(pico, tokenizer, text):
    seen = []
    pico.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["input_ids"], kwargs["logits_to_keep"])),
        with_kwargs=True,
    )
    books_perplexity(pico, tokenizer, mode="prefill", length=64, limit=2, text=text)
    assert [(ids.shape, ids[0, 0].item(), keep) for ids, keep in seen] == [((1, 63), 0, 32)] * 2
    assert not torch.equal(seen[0][0], seen[1][0])


def test_a_uniform_model_has_the_vocabulary_as_perplexity(pico, tokenizer, text):
    torch.nn.init.zeros_(pico.lm_head.weight)
    result = books_perplexity(pico, tokenizer, length=64, limit=1, text=text)
    assert result["value"] == pytest.approx(8192, rel=1e-4)


def test_progress_counts_windows(pico, tokenizer, text):
    calls = []
    books_perplexity(
        pico,
        tokenizer,
        length=32,
        limit=3,
        batch_size=2,
        text=text,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("books_perplexity", 2, 3), ("books_perplexity", 3, 3)]
