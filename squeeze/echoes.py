"""Sequences whose second half says again what stood in the first: text to train looking back on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPANS = (8, 48)  # tokens of a passage, at least and below
DRAWN = 0.25  # share of echoing sequences in which the passages are tokens drawn at random


def echoed(ids: Tensor, share: float, line: Sequence[int], seed: int) -> Tensor:
    """Fill the second half of a share of sequences with passages of their first half, line by line.

    Prose can be guessed in part. So in some of these sequences lines of tokens drawn from all of
    the text are put into the first half, and only those are said again: what comes next there is
    known by looking back alone.

    Args:
        ids: int64 ``[N, T]``; the first token of a sequence is neither changed nor repeated.
        share: Of sequences, 0 to 1.
        line: Tokens of a line break, which stands before every passage.
        seed: Chooses sequences, passages and drawn tokens.
    Returns:
        int64 ``[N, T]``; a copy where anything echoes. Sequences whose halves are too short for
        two passages stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(ids), generator=generator) < share
    half = ids.shape[1] // 2
    if half < 2 * (SPANS[1] + 2 * len(line)) or not chosen.any():
        return ids
    words, ids = ids[:, 1:].flatten(), ids.clone()
    mark = torch.tensor(line, dtype=ids.dtype)
    for row in (ids[i] for i in chosen.nonzero()[:, 0].tolist()):
        planted: list[Tensor] = []
        if float(torch.rand((), generator=generator)) < DRAWN:
            planted = _plant(row[1:half], words, mark, generator)
        lines: list[Tensor] = []
        while sum(map(len, lines)) < len(row) - half:
            lines += [mark, _passage(row[1:half], planted, generator)]
        row[half:] = torch.cat(lines)[: len(row) - half]
    return ids


def _plant(text: Tensor, words: Tensor, mark: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Overwrite parts of a text with lines of drawn tokens; return what stands in the lines."""
    found: list[Tensor] = []
    place = _draw(0, SPANS[1], generator)
    while True:
        drawn = words[torch.randint(len(words), (_draw(*SPANS, generator),), generator=generator)]
        whole = torch.cat([mark, drawn, mark])
        if place + len(whole) > len(text):
            return found
        text[place : place + len(whole)] = whole
        found.append(drawn)
        place += len(whole) + _draw(0, SPANS[1], generator)


def _passage(text: Tensor, planted: list[Tensor], generator: torch.Generator) -> Tensor:
    """Choose one of the planted lines or, without any, a run of the text."""
    if planted:
        return planted[_draw(0, len(planted), generator)]
    length = _draw(*SPANS, generator)
    first = _draw(0, len(text) - length, generator)
    return text[first : first + length]


def _draw(least: int, below: int, generator: torch.Generator) -> int:
    return int(torch.randint(least, below, (), generator=generator))
