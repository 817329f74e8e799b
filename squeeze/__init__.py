"""Post-training compression for Hugging Face language models.

    import squeeze
    result = squeeze.run("quickstart", output="out")
    model = squeeze.load("out")

Importing registers our quantizer with transformers, so that ``from_pretrained`` reads squeezed
checkpoints, and does nothing else; everything below is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from squeeze.errors import SqueezeError
from squeeze.quantizer import register as _register

if TYPE_CHECKING:
    from squeeze.api import Result, evaluate, load, load_tokenizer, run
    from squeeze.cache_hook import static_cache
    from squeeze.prompt import load_prompt, save_prompt
    from squeeze.swapping import Artifacts, swap

__version__ = "0.1.0"
__all__ = [
    "Artifacts",
    "Result",
    "SqueezeError",
    "evaluate",
    "load",
    "load_prompt",
    "load_tokenizer",
    "run",
    "save_prompt",
    "static_cache",
    "swap",
]

_register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'squeeze' has no attribute {name!r}")
    from squeeze import api

    return getattr(api, name)
