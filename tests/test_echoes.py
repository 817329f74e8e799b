"""Sequences that say again what they said: lines, passages of the first half, drawn tokens."""

import pytest
import torch

from squeeze import echoes
from squeeze.echoes import echoed

LINE = 9999
TEXT = torch.arange(2400).view(6, 400) * 4


def lines(row):
    """Cut a tensor of tokens where lines break."""
    parts, part = [], []
    for token in row.tolist():
        if token == LINE:
            parts.append(part)
            part = []
        else:
            part.append(token)
    return [part for part in [*parts, part] if part]


def is_run(part, whole):
    text = ",".join(map(str, whole))
    return f",{','.join(map(str, part))}," in f",{text},"


@pytest.mark.parametrize("drawn", [0.0, 1.0], ids=["text", "drawn"])
def test_the_second_half_is_lines_of_the_first(drawn, monkeypatch):
    monkeypatch.setattr(echoes, "DRAWN", drawn)
    found = echoed(TEXT, 1.0, [LINE], 3)
    assert torch.equal(found[:, 0], TEXT[:, 0])
    for row, before in zip(found, TEXT, strict=True):
        first, second = row[:200], row[200:]
        assert torch.equal(first, before[:200]) == (drawn == 0.0)
        said = lines(second)
        assert len(said) >= 4
        assert all(is_run(part, first[1:].tolist()) for part in said)
        if drawn:
            told = [tuple(part) for part in lines(first)]
            assert all(tuple(part) in told for part in said[:-1])
            assert not any(is_run(part, before.tolist()) for part in said[:-1])


def test_a_share_echoes_and_the_input_stays():
    text = torch.arange(40000).view(100, 400)
    before = text.clone()
    found = echoed(text, 0.4, [LINE], 0)
    assert torch.equal(text, before)
    assert 25 <= int((found != text).any(1).sum()) <= 55
    assert torch.equal(found, echoed(text, 0.4, [LINE], 0))
    assert not torch.equal(found, echoed(text, 0.4, [LINE], 1))


@pytest.mark.parametrize(("ids", "share"), [(TEXT, 0.0), (TEXT[:, :199], 1.0)])
def test_nothing_echoes_without_a_share_or_room(ids, share):
    assert echoed(ids, share, [LINE], 0) is ids
