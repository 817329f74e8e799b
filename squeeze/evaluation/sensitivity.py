"""How much each layer, squeezed alone, costs at the end of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from squeeze.evaluation.perplexity import books_perplexity
from squeeze.evaluation.scoring import Progress

Layer = TypeVar("Layer")


def layer_sensitivity(
    model: Any,
    tokenizer: Any,
    apply: Callable[[Layer], AbstractContextManager[Any]],
    layers: Iterable[Layer],
    *,
    mode: str = "decode",
    length: int = 512,
    limit: int = 4,
    text: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[Layer, float]:
    """Measure the rise of the loss when one layer at a time is squeezed.

    The loss at the end of the model is what counts: a layer may be reconstructed badly and not be
    missed, or reconstructed well and be missed.

    Args:
        model: Any Hugging Face causal language model, dense.
        tokenizer: Its tokenizer.
        apply: Returns a context manager inside which exactly that layer is squeezed.
        layers: What to pass to ``apply``, one after another; numbers or names.
        mode: As in ``books_perplexity``.
        length: Tokens of a window.
        limit: Number of windows.
        text: Texts to cut windows from; the shipped validation books if not given.
        progress: Called with ``"sensitivity"``, layers done, and their number.

    Returns:
        For each layer the rise of the mean negative log-likelihood, nats per token; negative where
        squeezing happened to help.
    """
    chosen = list(layers)

    def loss() -> float:
        result = books_perplexity(
            model, tokenizer, mode=mode, length=length, limit=limit, text=text
        )
        nll: float = result["nll"]
        return nll

    dense = loss()
    rises = {}
    for done, layer in enumerate(chosen, 1):
        with apply(layer):
            rises[layer] = loss() - dense
        if progress is not None:
            progress("sensitivity", done, len(chosen))
    return rises
