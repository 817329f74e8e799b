"""Encode the blocks that recorded decode steps fill, by a recording of its own.

Rows fill their blocks in their own time, and each block is a few launches for every layer and side,
which would hold up one step in ``block_length`` for every row. The recording encodes what is due in
any row at the cost of one launch.
"""

from __future__ import annotations

from typing import Any

import torch

from squeeze.cache import StaticPackedCache
from squeeze.cache.due import count_due, encode_due
from squeeze.recorder import Recorder

KEY = "due blocks"  # of the cache's recordings


class Recorded:
    """What repeats the encoding over one cache, as long as everything is where it was."""

    def __init__(self, places: Any) -> None:
        self.places = places
        self.replay: Any = None


class BlockEncoder:
    """Encodes what is due in a cache, recorded from the second time on.

    Attributes:
        records: ``False`` launches the kernels that each row needs.
        watched: Whether it is known that no encoder of the model waits for the device.
    """

    def __init__(self) -> None:
        self.records, self.watched = True, False

    def encode(self, cache: StaticPackedCache, recorder: Recorder) -> str | None:
        """Encode every block that is due by the host's counts.

        Returns:
            Why it will not be recorded from now on, ``None`` if nothing is the matter.
        """
        if not self.records:
            cache.settle()
            return None
        for layer in cache.static_layers:
            layer.make_room()
        places = cache.places()
        held: Recorded | None = cache.recordings.get(KEY)
        reason = None
        if held is None or held.places != places:
            cache.recordings[KEY] = Recorded(places)
            _work(cache)
            reason = None if self.watched else self._watch(cache, recorder)
        else:
            if held.replay is None:
                try:
                    held.replay, _ = recorder.record(lambda: _work(cache))
                except RuntimeError as error:  # what CUDA and torch raise; nothing was encoded
                    cache.settle()
                    return self._refuse(error)
            held.replay()
        for layer in cache.static_layers:
            count_due(layer)
        return reason

    def _watch(self, cache: StaticPackedCache, recorder: Recorder) -> str | None:
        """Do again what is done already, which changes nothing, to see whether it waits."""
        try:
            with recorder.watch():
                _work(cache)
        except RuntimeError as error:
            return self._refuse(error)
        self.watched = True
        return None

    def _refuse(self, error: RuntimeError) -> str:
        self.records = False
        return f"recording how blocks are encoded failed ({str(error).strip().splitlines()[0]})"


def _work(cache: StaticPackedCache) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for layer in cache.static_layers:
            encode_due(layer)
