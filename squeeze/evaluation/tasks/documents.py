"""Documents of the lm-eval tasks beside this file, made from the shipped books.

lm-eval tasks know no tokenizer, so lengths here are in characters, four to a nominal token; the
tasks of the same names in ``squeeze.evaluation`` count tokens and are the exact ones.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

from squeeze import reference
from squeeze.evaluation.facts import FORMS, draw_facts

CHARACTERS_PER_TOKEN = 4
FACTS_PER_PROMPT = 8


def books(length: int = 2048, count: int = 16, **_: Any) -> dict[str, Any]:
    """Make ``count`` passages of about ``length`` tokens, spread evenly over the books.

    Args:
        length: Size of a passage, in tokens of four characters.
        count: Number of passages.

    Returns:
        A split ``test`` of documents ``{"text"}``.
    """
    return _split([{"text": passage} for passage in _passages(length, count)])


def needles(length: int = 2048, count: int = 100, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Make ``count`` prompts that hold facts and end with the question for one of them.

    The questions for the others, answered, come before it and show what is asked.

    Args:
        length: Size of a prompt, in tokens of four characters.
        count: Number of prompts.
        seed: Draws keys and values.

    Returns:
        A split ``test`` of documents ``{"prompt", "answer", "value"}``; ``answer`` is what follows
        the prompt, up to the end of the value.
    """
    generator = random.Random(seed)
    documents = []
    for index, passage in enumerate(_passages(length, count)):
        form = FORMS[index % len(FORMS)]
        facts = draw_facts(generator, FACTS_PER_PROMPT)
        told = [form.ask(key) + form.tell(value) for key, value in facts]
        parts = len(told) + 1
        cuts = [len(passage) * place // parts for place in range(parts + 1)]
        # Stripped, so that no newlines meet and merge into another token.
        pieces = [passage[first:last].strip() for first, last in pairwise(cuts)]
        body = "".join(piece + fact for piece, fact in zip(pieces, [*told, ""], strict=True))
        asked = index % len(facts)
        shown = "".join(told[:asked] + told[asked + 1 :])
        key, value = facts[asked]
        answer = form.tell(value)
        answer = answer[: answer.index(value) + len(value)]
        documents.append({"prompt": body + shown + form.ask(key), "answer": answer, "value": value})
    return _split(documents)


def _passages(length: int, count: int) -> list[str]:
    """Cut passages of ``length`` nominal tokens, spread evenly over the books."""
    joined = "\n".join(book["text"] for book in reference.validation_books())
    size = CHARACTERS_PER_TOKEN * length
    starts = [index * (len(joined) - size) // count for index in range(count)]
    return [joined[start : start + size] for start in starts]


def _split(documents: list[dict[str, str]]) -> dict[str, Any]:
    """Wrap documents as the split that the task files name."""
    import datasets

    return {"test": datasets.Dataset.from_list(documents)}
