"""Launch settings of decode attention: a short list, pruned by shape, timed once per call kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton.testing


class Setting(NamedTuple):
    """Warps of a program, stages of its loads, and programs that share a processor."""

    warps: int
    stages: int
    programs: int


CANDIDATES = (
    Setting(1, 1, 8),
    Setting(1, 3, 8),
    Setting(1, 1, 16),
    Setting(2, 1, 4),
    Setting(2, 3, 4),
    Setting(2, 3, 8),
    Setting(4, 1, 4),
    Setting(4, 3, 4),
)
# Below this many tokens times KV heads the launch costs more than any setting saves.
WORTH_TUNING = 2**14
# Milliseconds of replays per sample; triton takes ten samples.
SAMPLE_MS = 2

_chosen: dict[Hashable, Setting] = {}


def candidates(warps: int, tile: int) -> list[Setting]:
    """List the settings worth timing, the untimed choice first.

    Args:
        warps: What the formats ask for; one more step is tried, as it halves the registers needed.
        tile: Query rows of a program.
    """
    first = default(warps, tile)
    fitting = [s for s in CANDIDATES if first.warps <= s.warps <= max(2, first.warps)]
    return sorted(fitting, key=lambda setting: setting != first)


def default(warps: int, tile: int) -> Setting:
    """Return the choice for short calls, tests, the interpreter and recorded graphs."""
    if tile > 16:
        return Setting(4, 3, 4)
    return Setting(1, 1, 8) if tile < 16 and warps == 1 else Setting(2, 3, 4)


def choose(
    key: Hashable, options: Sequence[Setting], work: int, call: Callable[[Setting], Any]
) -> Setting:
    """Return the fastest setting of ``call``, timing all options at the first call of a kind.

    Args:
        key: What the compiled kernel depends on.
        options: What to choose from, the untimed choice first.
        work: Packed tokens times KV heads; sizes within a factor of four share a choice.
        call: Launches everything under a setting; it may be repeated.
    Returns:
        A setting. While a CUDA graph is recorded nothing is timed: an unknown kind of call gets
        the default, so warm up before recording.
    """
    kind = (key, work.bit_length() // 2)
    if kind in _chosen:
        return _chosen[kind]
    if work < WORTH_TUNING or len(options) == 1 or torch.cuda.is_current_stream_capturing():
        return options[0]
    times = {option: _time(call, option) for option in options}
    _chosen[kind] = min(times, key=times.__getitem__)
    return _chosen[kind]


def _time(call: Callable[[Setting], Any], setting: Setting) -> float:
    """Milliseconds of one call, launch overhead excluded; infinite when it does not fit."""
    # The timing runs on a stream of its own, which knows nothing of what this one has queued.
    torch.cuda.current_stream().synchronize()
    try:
        return triton.testing.do_bench_cudagraph(lambda: call(setting), rep=SAMPLE_MS)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
