"""The embedded reference model and its texts, so that everything runs offline.

The folder is an ordinary Hugging Face checkpoint: ``from_pretrained(path())`` loads it. Nothing is
read when this package is imported. ``README.md`` beside this file says what the model can do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def path() -> Path:
    """Return the folder that holds the model, its configuration and its tokenizer."""
    return _FOLDER


def validation_books() -> list[dict[str, str]]:
    """Read the books that were kept out of training, for perplexity and haystacks.

    Returns:
        One ``{"title", "author", "text"}`` per book; one paragraph per line.
    """
    books: list[dict[str, str]] = _read("validation_books.json")
    return books


def calibration_passages() -> list[str]:
    """Read passages of the training books, for calibration only."""
    passages: list[str] = _read("calibration_passages.json")
    return passages


def _read(name: str) -> Any:
    return json.loads((_FOLDER / "data" / name).read_text(encoding="utf-8"))
