"""The errors a user can cause, each one paragraph: place, received, allowed, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SqueezeError(Exception):
    """A mistake of the user's; the command line prints it without a traceback and exits with 2.

    Args:
        place: Where: a file and path inside it, an option, a module.
        received: What was found there.
        allowed: What could stand there instead.
        remedy: What to do about it.
    """

    def __init__(self, place: str, received: str, allowed: str = "", remedy: str = "") -> None:
        self.place, self.received, self.allowed, self.remedy = place, received, allowed, remedy
        parts = [f"{place}: {received.rstrip('.')}."]
        if allowed:
            parts.append(f"Allowed: {allowed.rstrip('.')}.")
        if remedy:
            parts.append(remedy if remedy.endswith("?") else f"{remedy.rstrip('.')}.")
        super().__init__(" ".join(parts))

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        """Let the error travel between processes."""
        return type(self), (self.place, self.received, self.allowed, self.remedy)


class RecipeError(SqueezeError):
    """A recipe or an option holds a name or value that cannot be."""


class UnsupportedError(SqueezeError):
    """The recipe is well-formed, but this model, device or call cannot run it."""


class CheckpointError(SqueezeError):
    """Files on disk are missing, damaged, or of another version."""


class DeviceError(SqueezeError):
    """The hardware or an optional package that was asked for is not here."""


class SqueezeWarning(UserWarning):
    """What was asked for works, but slower than it could; said once."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""
