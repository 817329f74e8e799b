"""Which modules a recipe's targets name."""

from __future__ import annotations

import re
from collections.abc import Iterable


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name equals, contains as a component, or (``re:``) matches a pattern."""
    parts = name.split(".")
    return any(
        re.search(pattern[3:], name)
        if pattern.startswith("re:")
        else pattern == name or pattern in parts or any(p.startswith(pattern) for p in parts)
        for pattern in patterns
    )
