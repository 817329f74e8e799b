import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from squeeze.errors import RecipeError
from squeeze.evaluation import facts
from squeeze.evaluation.needle import assemble, make_contexts, make_needle, needle


@pytest.mark.parametrize(("mode", "limit"), [("decode", 24), ("prefill", 4)])
def test_the_dense_reference_model_finds_the_facts(trained, tokenizer, mode, limit):
    result = needle(trained, tokenizer, mode=mode, length=512, limit=limit)
    assert result["value"] >= 0.95
    assert result["count"] == len(result["correct"]) == len(result["depth"]) == limit


def test_a_model_that_cannot_look_back_finds_nothing(trained, tokenizer):
    class Forgetful(torch.nn.Module):
        config, device = trained.config, trained.device

        def forward(self, input_ids, use_cache):
            output = trained(input_ids=input_ids[:, -8:], use_cache=False)
            pad = output.logits.new_zeros(1, max(0, input_ids.shape[1] - 8), 8192)
            output.logits = torch.cat([pad, output.logits], 1)
            return output

    result = needle(Forgetful(), tokenizer, mode="prefill", length=512, limit=6)
    assert result["value"] == 0


@pytest.mark.parametrize("form", facts.FORMS)
def test_answer_tokens_spell_the_value_and_follow_the_question(tokenizer, form):
    for value in ("90210", "kind bear", "x7qq01zz"):
        fact = make_needle(tokenizer, form, "red fox", value, 0.5)
        assert tokenizer.decode(fact.ids[: fact.answer]) == form.ask("red fox")
        assert tokenizer.decode(fact.ids[fact.answer : fact.end]).strip(' "') == value
        assert tokenizer.decode(fact.ids) == form.ask("red fox") + form.tell(value)


def test_a_tokenizer_that_merges_across_the_border_loses_no_part_of_the_value():
    class Pairs:
        """Two characters to a token, so the border falls inside one."""

        def __call__(self, text, **_):
            pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
            return {"input_ids": [int.from_bytes(p.ljust(2, "\0").encode(), "big") for p in pairs]}

        def decode(self, ids):
            return b"".join(i.to_bytes(2, "big") for i in ids).decode().replace("\0", "")

    tokenizer, form = Pairs(), facts.FORMS[0]
    for key in ("odd fox", "red fox", "sly cat"):
        fact = make_needle(tokenizer, form, key, "12345", 0.5)
        assert "12345" in tokenizer.decode(fact.ids[fact.answer : fact.end])
        assert "1" not in tokenizer.decode(fact.ids[: fact.answer])


def test_contexts_are_deterministic_with_unique_keys_even_depths_and_turning_forms(tokenizer, text):
    first = make_contexts(tokenizer, text, 320, 12, seed=3)
    assert first == make_contexts(tokenizer, text, 320, 12, seed=3)
    assert first != make_contexts(tokenizer, text, 320, 12, seed=4)
    assert [len(context.needles) for context in first] == [4, 4, 4]
    depths = sorted(fact.depth for context in first for fact in context.needles)
    assert depths == pytest.approx([(place + 0.5) / 12 for place in range(12)])
    forms = [tokenizer.decode(context.needles[0].ids)[:8] for context in first]
    assert [form[:2] for form in forms] == ["\nT", "\nR", '\n"']
    everything = [[*context.needles, *context.examples] for context in first]
    keys = {tuple(fact.ids[: fact.answer]) for facts in everything for fact in facts}
    assert len(keys) == 12 + 3 * 6


def test_prompts_have_exactly_the_length_and_hold_every_fact(tokenizer, text):
    (context,) = make_contexts(tokenizer, text, 320, 4, seed=0)
    ids = assemble([0], context, 300)
    assert (len(ids), ids[0]) == (300, 0)
    spelled = tokenizer.decode(ids)
    assert all(spelled.count(tokenizer.decode(fact.ids)) == 1 for fact in context.needles)
    assert all(spelled.count(tokenizer.decode(fact.ids)) == 2 for fact in context.examples)
    assert spelled.endswith(tokenizer.decode(context.examples[-1].ids))
    with pytest.raises(RecipeError, match="cannot hold 10 facts"):
        assemble([0], context, 30)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_questions_never_pass_learned_positions(tokenizer, text, mode):
    config = GPT2Config(vocab_size=8192, n_positions=512, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    result = needle(model, tokenizer, mode=mode, length=512, limit=4, text=text)
    assert (result["count"], result["value"]) == (4, 0)


def test_values_follow_the_stated_mixture():
    generator = random.Random(0)
    values = [facts.draw_value(generator) for _ in range(4000)]
    digits = [value for value in values if value.isdigit() and len(value) < 8]
    words = [value for value in values if " " in value]
    assert {len(value) for value in digits} == {4, 5, 6, 7}
    assert abs(len(digits) / 4000 - 0.6) < 0.03
    assert abs(len(words) / 4000 - 0.2) < 0.03


def test_more_facts_than_keys_are_refused(pico, tokenizer, text):
    with pytest.raises(RecipeError, match=f"limit: 100000. Allowed: 1 to {facts.MAX_FACTS // 2}"):
        needle(pico, tokenizer, length=512, limit=100000, text=text)
