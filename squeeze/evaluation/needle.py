"""Retrieval of facts hidden in book text: the task on which careless compression collapses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from squeeze import reference
from squeeze.errors import RecipeError
from squeeze.evaluation.facts import FORMS, MAX_FACTS, Form, draw_facts
from squeeze.evaluation.scoring import (
    Progress,
    check_length,
    check_limit,
    check_mode,
    encode,
    excerpts,
    max_positions,
    negative_log_likelihood,
    scoring,
    start_tokens,
)
from squeeze.evaluation.shares import in_shares

DEFAULT_FACTS = 100
FACTS_PER_CONTEXT = 25
TOKENS_PER_FACT = 80  # About a quarter of a short context is facts.
EXAMPLES = 6
QUESTION_CHUNK_TOKENS = 8


@dataclass(frozen=True)
class Needle:
    """One fact as tokens.

    Attributes:
        ids: The whole sentence; ``ids[:answer]`` is the question.
        answer: Index of the first token of the answer.
        end: One past the last token that spells the value.
        depth: Where in the haystack the sentence stands, 0 to 1.
    """

    ids: list[int]
    answer: int
    end: int
    depth: float


@dataclass(frozen=True)
class Context:
    """Book text and the facts to hide in it.

    Attributes:
        haystack: Book text, longer than needed.
        needles: The facts to ask for, by rising depth.
        examples: More facts; the prompt ends with their questions, answered.
        order: The order in which to ask for the needles.
    """

    haystack: list[int]
    needles: list[Needle]
    examples: list[Needle]
    order: list[int]


def needle(
    model: Any,
    tokenizer: Any,
    *,
    mode: str = "decode",
    length: int = 2048,
    limit: int | None = None,
    seed: int = 0,
    text: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the share of facts whose value the model gives back exactly.

    Each context holds up to 25 facts of one form, the forms taking turns, at evenly spread depths,
    and 6 more whose questions end the prompt, answered, to show what is asked; without them the
    first answers measure whether a model has understood, not whether it remembers.
    A value counts when every token that spells it is the most probable one given the true tokens
    before it; the first error ends a greedy decoding too, so this equals exact match of greedy
    decoding at the cost of a few forwards.

    Args:
        model: Any Hugging Face causal language model, dense or squeezed.
        tokenizer: Its tokenizer.
        mode: ``"decode"``: the context is prefilled once and all its questions follow, in random
            order, over the cache in chunks of at most 8 tokens. ``"prefill"``: one forward per
            fact, over a prompt that ends with its question, and the answer.
        length: Tokens of the prompt. What is scored comes after it; the prompt gives way only
            where the model's positions end.
        limit: Number of facts, 100 if not given.
        seed: Draws keys, values and the order of questions.
        text: Texts to hide the facts in; the shipped validation books if not given.
        progress: Called with the task's name, facts done by this process, and their number.

    Returns:
        ``value`` (share of facts, 0 to 1), ``mode``, ``length``, ``count`` (facts), ``contexts``,
        ``correct`` (one bool per fact) and ``depth`` (of each, 0 to 1).

    Raises:
        RecipeError: an unknown mode, or a length that the text or the model cannot hold.
    """
    check_mode(mode)
    check_length(model, length, least=4 * TOKENS_PER_FACT)
    count = check_limit(limit, DEFAULT_FACTS, MAX_FACTS // 2)
    texts = [book["text"] for book in reference.validation_books()] if text is None else text
    contexts = make_contexts(tokenizer, texts, length, count, seed)
    head = start_tokens(tokenizer)
    ask = _ask_over_cache if mode == "decode" else _ask_in_one_forward

    def mark(own: Sequence[Context]) -> list[bool]:
        found: list[bool] = []
        for context in own:
            found += ask(model, head, context, length)
            if progress is not None:
                progress("needle", len(found), sum(len(each.needles) for each in own))
        return found

    with scoring(model):
        correct = in_shares(model, contexts, mark)
    return {
        "value": sum(correct) / count,
        "mode": mode,
        "length": length,
        "count": count,
        "contexts": len(contexts),
        "correct": correct,
        "depth": [needle.depth for context in contexts for needle in context.needles],
    }


def make_contexts(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int
) -> list[Context]:
    """Draw ``count`` facts and divide them over contexts of ``length`` tokens."""
    generator = random.Random(seed)
    size = min(FACTS_PER_CONTEXT, length // TOKENS_PER_FACT)
    sizes = [min(size, count - first) for first in range(0, count, size)]
    facts = iter(draw_facts(generator, count + EXAMPLES * len(sizes)))
    contexts = []
    for index, haystack in enumerate(excerpts(tokenizer, texts, length, len(sizes))):
        form, shift = FORMS[index % len(FORMS)], (index + 0.5) / len(sizes)
        needles, examples = (
            [
                make_needle(tokenizer, form, *next(facts), depth=(place + shift) / number)
                for place in range(number)
            ]
            for number in (sizes[index], EXAMPLES)
        )
        order = generator.sample(range(len(needles)), len(needles))
        contexts.append(Context(haystack, needles, examples, order))
    return contexts


def make_needle(tokenizer: Any, form: Form, key: str, value: str, depth: float) -> Needle:
    """Tokenize one fact and find its answer.

    Question and answer are tokenized together, since a tokenizer may merge across their border;
    the answer begins where the tokens stop agreeing with those of the question alone.
    """
    ids = encode(tokenizer, form.ask(key) + form.tell(value))
    answer = 0
    for ours, question in zip(ids, encode(tokenizer, form.ask(key)), strict=False):
        if ours != question:
            break
        answer += 1
    end = answer + 1
    while end < len(ids) and value not in tokenizer.decode(ids[answer:end]):
        end += 1
    return Needle(ids, answer, end, depth)


def assemble(head: list[int], context: Context, length: int) -> list[int]:
    """Return ``length`` tokens: ``head``, the haystack with its facts, the answered examples.

    Raises:
        RecipeError: these leave no room for the haystack.
    """
    told = sorted([*context.needles, *context.examples], key=lambda fact: fact.depth)
    shown = _joined(context.examples)
    body = length - len(head) - len(shown) - sum(len(fact.ids) for fact in told)
    if body < 0:
        received = f"{length} tokens cannot hold {len(told)} facts; {-body} tokens are missing"
        raise RecipeError("evaluate.length", received, remedy="Raise the length")
    ids, done = list(head), 0
    for fact in told:
        cut = int(fact.depth * body)
        ids += context.haystack[done:cut] + fact.ids
        done = cut
    return ids + context.haystack[done:body] + shown


def _ask_over_cache(model: Any, head: list[int], context: Context, length: int) -> list[bool]:
    """Prefill the context, feed every question with its answer, and mark each fact."""
    tail = _joined([context.needles[index] for index in context.order])
    start = min(length, (max_positions(model) or length + len(tail)) - len(tail))
    ids = assemble(head, context, start) + tail
    matches = _greedy_matches(model, ids, start, "decode")
    correct, offset = {}, 0
    for index in context.order:
        fact = context.needles[index]
        correct[index] = all(matches[offset + fact.answer : offset + fact.end])
        offset += len(fact.ids)
    return [correct[index] for index in range(len(context.needles))]


def _ask_in_one_forward(model: Any, head: list[int], context: Context, length: int) -> list[bool]:
    """Run one forward per fact, over a prompt that ends with its question."""
    correct = []
    for fact in context.needles:
        answer = fact.end - fact.answer
        start = min(length, (max_positions(model) or length + answer) - answer)
        ids = assemble(head, context, start - fact.answer) + fact.ids[: fact.end]
        correct.append(all(_greedy_matches(model, ids, start, "prefill")))
    return correct


def _joined(needles: Sequence[Needle]) -> list[int]:
    """Put sentences one after another."""
    return [token for fact in needles for token in fact.ids]


def _greedy_matches(model: Any, ids: list[int], start: int, mode: str) -> list[bool]:
    """Say of each token from ``start`` on whether it is the most probable one."""
    batch = torch.tensor([ids], device=model.device)
    _, greedy = negative_log_likelihood(model, batch, start, mode, QUESTION_CHUNK_TOKENS)
    matches: list[bool] = greedy[0].tolist()
    return matches
