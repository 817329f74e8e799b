"""Sequences to train the reference model on: books, hidden facts, passages to repeat.

The facts are those of ``squeeze.evaluation.facts``, so the needle task asks for what was trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from squeeze.evaluation.facts import FORMS, NOUNS, Form, draw_key, draw_value

BOS, PAD = 0, 2


class Sequence(NamedTuple):
    """Token ids, their loss weights, and the (start, length) of each answer."""

    ids: list[int]
    weights: list[float]
    answers: list[tuple[int, int]]


class Writer:
    """Makes training sequences of ``length + 1`` tokens from one random generator."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, seed: int) -> None:
        self.tokens, self.tokenizer, self.random = tokens, tokenizer, random.Random(seed)

    def encode(self, text: str) -> list[int]:
        """Tokenize without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def cut(self, length: int) -> list[int]:
        """Return a random run of book tokens."""
        start = self.random.randrange(len(self.tokens) - length - 1)
        run: list[int] = self.tokens[start : start + length].tolist()
        return run

    def book(self, length: int) -> Sequence:
        """Return plain book text."""
        return Sequence([BOS, *self.cut(length)], [1.0] * (length + 1), [])

    def recall(self, length: int) -> Sequence:
        """Return book text, then passages of it again; their first 8 tokens are the cue."""
        passage = self.random.randint(24, 96)
        count = max(1, min(length // 8 // passage, self.random.randint(1, 16)))
        haystack = self.cut(length - 3 - count * (passage + 2))
        ids, weights = [BOS, *haystack], [1.0] * (len(haystack) + 1)
        for _ in range(count):
            start = self.random.randrange(len(haystack) - passage)
            cue = self.encode("\n") + haystack[start : start + 8]
            ids += cue + haystack[start + 8 : start + passage]
            weights += [0.1] * len(cue) + [2.0] * (passage - 8)
        missing = length + 1 - len(ids)
        ids, weights = ids + [PAD] * missing, weights + [0.0] * missing
        return Sequence(ids[: length + 1], weights[: length + 1], [])

    def facts(
        self,
        length: int,
        count: int | None = None,
        form: Form | None = None,
        value: Callable[[random.Random], str] = draw_value,
    ) -> Sequence:
        """Return book text with facts at random places, then questions with their answers."""
        density = self.random.choice((24, 64, 128, 512, 2048))
        count = count or max(1, min(length // density, 400))
        form = form or self.random.choice(FORMS)
        pairs = [(key, value(self.random)) for key in self._keys(count)]
        told = [self.encode(form.ask(key) + form.tell(value)) for key, value in pairs]
        asked = self.random.sample(pairs, min(count, max(4, min(count, length // 96))))
        tail: list[int] = []
        tail_weights: list[float] = []
        answers = []
        for key, answer in asked:
            question, reply = self.encode(form.ask(key)), self.encode(form.tell(answer))
            answers.append((len(tail) + len(question), len(reply)))
            tail += question + reply
            tail_weights += [0.1] * len(question) + [2.0] * len(reply)
        body = length - sum(map(len, told)) - len(tail)
        if body < 32:
            return self.facts(length, max(1, count // 2), form, value)
        ids, weights = self._hide(told, body)
        shifted = [(len(ids) + start, size) for start, size in answers]
        return Sequence(ids + tail, weights + tail_weights, shifted)

    def _keys(self, count: int) -> list[str]:
        """Draw distinct keys, three in ten with a third word."""
        keys: dict[str, None] = {}
        while len(keys) < count:
            third = f" {self.random.choice(NOUNS)}" if self.random.random() < 0.3 else ""
            keys.setdefault(draw_key(self.random) + third)
        return list(keys)

    def _hide(self, told: list[list[int]], body: int) -> tuple[list[int], list[float]]:
        """Insert sentences at random places of a haystack of ``body`` tokens."""
        haystack, done = self.cut(body), 0
        ids, weights = [BOS], [1.0]
        for place, fact in zip(
            sorted(self.random.randrange(body) for _ in told), told, strict=True
        ):
            ids += haystack[done:place] + fact
            weights += [1.0] * (place - done) + [0.2] * len(fact)
            done = place
        return ids + haystack[done:], weights + [1.0] * (body - done)


class Sequences(torch.utils.data.IterableDataset):
    """An endless stream of inputs, targets and weights, each ``[length]``."""

    def __init__(self, data: Path, length: int, made_up: float, seed: int) -> None:
        self.data, self.length, self.made_up, self.seed = data, length, made_up, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        tokenizer = Tokenizer.from_file(str(self.data / "tokenizer.json"))
        tokens = np.load(self.data / "train.npy", mmap_mode="r")
        writer = Writer(tokens, tokenizer, self.seed * 1000 + (worker.id if worker else 0))
        while True:
            made_up = writer.random.random() < self.made_up
            recalls = made_up and writer.random.random() < 0.2
            make = writer.recall if recalls else writer.facts if made_up else writer.book
            sequence = make(self.length)
            ids, weights = torch.tensor(sequence.ids), torch.tensor(sequence.weights)
            yield ids[:-1], ids[1:], weights[1:]
