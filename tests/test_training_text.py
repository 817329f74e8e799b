"""The text that training reads: windows of calibration text, and what the model makes of it."""

import torch

from squeeze import training_text
from squeeze.evaluation.scoring import encode, start_tokens
from squeeze.evaluation.suite import calibration_texts
from squeeze.loading import load_tokenizer
from squeeze.recipe_values import Calibration
from squeeze.training_text import STATE, continued, training_tokens, windows
from tests import tiny

TEXT = Calibration(length=40)


def test_windows_are_runs_of_the_calibration_text():
    tokenizer = load_tokenizer("reference")
    (bos,) = start_tokens(tokenizer)
    found = windows(tokenizer, TEXT, 3, 40, seed=1)
    joined = torch.tensor(encode(tokenizer, "\n".join(calibration_texts(TEXT))))
    runs = joined.unfold(0, 39, 1)
    assert (found[:, 0] == bos).all()
    for row in found:
        assert (runs == row[1:]).all(1).any()
    assert torch.equal(found, windows(tokenizer, TEXT, 3, 40, seed=1))
    assert not torch.equal(found, windows(tokenizer, TEXT, 3, 40, seed=2))


def test_continuations_follow_the_models_distribution():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    prompts = torch.tensor([[3, 9, 4]]).repeat(512, 1)
    found = continued(model, prompts, 5, seed=0)
    assert torch.equal(found[:, :3], prompts)
    assert torch.equal(found, continued(model, prompts, 5, seed=0))
    with torch.no_grad():
        share = model(found[:, :4]).logits.softmax(-1)
    first = torch.bincount(found[:, 3], minlength=share.shape[-1]) / len(found)
    assert (first - share[0, 2]).abs().sum() < 2 * (share.shape[-1] / len(found)) ** 0.5
    likely = share[:, 3].gather(1, found[:, 4:]).log().mean()
    entropy = -(share[:, 3] * share[:, 3].log()).sum(-1).mean()
    assert abs(likely + entropy) < 0.25


def test_a_share_of_the_sequences_is_the_models_own(tmp_path):
    tokenizer, model = load_tokenizer("reference"), tiny.model("llama", vocab_size=8192)
    read = training_tokens(model, tokenizer, TEXT, 20)
    done = []
    mixed = training_tokens(
        model,
        tokenizer,
        TEXT,
        20,
        own=0.4,
        folder=tmp_path,
        progress=lambda *call: done.append(call),
    )
    own = (read != mixed).any(1)
    assert 2 <= int(own.sum()) <= 14
    assert done == [("own text", 40 * int(own.sum()), 40 * int(own.sum()))]
    before = (tmp_path / STATE).read_bytes()
    again = training_tokens(model, tokenizer, TEXT, 20, own=0.4, folder=tmp_path)
    assert torch.equal(mixed, again)
    assert (tmp_path / STATE).read_bytes() == before


def test_long_sequences_are_put_together_and_no_piece_is_read_twice_before_all_are(monkeypatch):
    monkeypatch.setattr(training_text, "PIECE", 20)
    monkeypatch.setattr(training_text, "MOST", 160)
    asked = []

    def numbered(model, prompts, length, seed, progress):
        asked.append((tuple(prompts.shape), length))
        return torch.arange(len(prompts))[:, None].repeat(1, length)

    monkeypatch.setattr(training_text, "continued", numbered)
    found = training_tokens(None, load_tokenizer("reference"), TEXT, 8, own=1.0)
    assert asked == [((8, 21), 21)]
    assert found.shape == (8, 40) and (found[:, 0] == 0).all()
    pieces = torch.stack([found[:, 1], found[:, 39]], 1).flatten()
    assert torch.equal(found[:, 1], found[:, 20])
    assert torch.equal(found[:, 21], found[:, 39])
    assert torch.bincount(pieces).tolist() == [2] * 8


def test_echoes_reach_the_sequences():
    tokenizer, text = load_tokenizer("reference"), Calibration(length=300)
    read = training_tokens(None, tokenizer, text, 6)
    assert not torch.equal(read, training_tokens(None, tokenizer, text, 6, echo=1.0))
