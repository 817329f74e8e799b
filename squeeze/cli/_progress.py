"""Progress bars on standard error; standard output belongs to results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Report: TypeAlias = Callable[[str, int, int], None]  # stage, done, total


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report | None]:
    """Give a callable ``(stage, done, total)``: a bar per stage, or a line when not a terminal.

    Args:
        quiet: Show nothing; the callable is then ``None``.
    """
    with no_loading_bars():
        if quiet:
            yield None
        elif not sys.stderr.isatty():
            yield _Lines()
        else:
            columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn()
            with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
                yield _Bars(bars)


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Silence transformers' own bars, which would break ours, and give them back after."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Bars:
    """One rich bar per stage, created when the stage is first heard of."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total)
        self.bars.update(self.tasks[stage], completed=done, total=total)  # type: ignore[arg-type]


class _Lines:
    """One line when a stage is finished, for logs and pipes; stages follow one another."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done < total:
            return
        now = time.perf_counter()
        print(f"{stage}: {total}/{total}, {now - self.started:.1f} s", file=sys.stderr, flush=True)
        self.started = now
