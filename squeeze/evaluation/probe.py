"""What packing some layers does to the end of a model: one short forward for each answer.

Prompts are prefilled once, by the dense model. Keys and values are attended exactly in the call
that brings them, so every packed cache begins from the same tensors: each trial packs a copy of the
dense cache and scores the continuation over it, as decoding would.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from squeeze.cache import LayerSpec, PackedCache, PackedLayer
from squeeze.evaluation.needle import (
    FACTS_PER_CONTEXT,
    TOKENS_PER_FACT,
    Context,
    assemble,
    make_contexts,
)
from squeeze.evaluation.scoring import forward, scoring, start_tokens

PROMPT_TOKENS = 1024
TEXT_TOKENS = 128  # of each continuation; questions about facts in the prompt follow
WINDOWS = 6


@dataclass(frozen=True)
class Windows:
    """Prompts, and the continuations to score over their cache.

    Attributes:
        prompts: int64 ``[N, T]``: text with facts in it.
        tails: int64 ``[N, n]``: the text goes on, then the facts are asked for and answered.
        scored: bool ``[N, n]``: the text's tokens and those that spell an answer.
    """

    prompts: Tensor
    tails: Tensor
    scored: Tensor


def make_windows(
    tokenizer: Any,
    text: str,
    *,
    count: int = WINDOWS,
    length: int = PROMPT_TOKENS,
    most: int | None = None,
    seed: int = 0,
) -> Windows:
    """Cut windows from a text and hide facts in them.

    Going on with plain text barely needs the details that a coarse cache loses; answering
    questions about them does.

    Args:
        tokenizer: Of the model.
        text: Holds at least ``count * (length + 128)`` tokens.
        count: Number of windows.
        length: Tokens of a prompt; at most half of the model's positions are used.
        most: Positions of the model.
        seed: Draws the facts.

    Raises:
        RecipeError: the text or the model is too short.
    """
    length = length if most is None else min(length, most // 2)
    need = length + TEXT_TOKENS
    facts = count * min(FACTS_PER_CONTEXT, length // TOKENS_PER_FACT)
    contexts = make_contexts(tokenizer, [text], need, facts, seed)
    tails = [_tail(context) for context in contexts]
    shortest = min(map(len, tails))
    if most is not None:
        shortest = min(shortest, most - length)
    cut = torch.tensor([tail[:shortest] for tail in tails])
    head = start_tokens(tokenizer)
    prompts = torch.tensor([assemble(head, context, length) for context in contexts])
    return Windows(prompts, cut[..., 0].contiguous(), cut[..., 1] == 1)


def _tail(context: Context) -> list[tuple[int, int]]:
    """Tokens after the prompt, each with 1 where it is scored."""
    tail = [(token, 1) for token in context.haystack[-TEXT_TOKENS:]]
    for fact in (context.needles[index] for index in context.order):
        tail += [(t, int(fact.answer <= i < fact.end)) for i, t in enumerate(fact.ids)]
    return tail


class Probe:
    """Dense caches of some prompts, and what packing copies of them does to the continuations.

    Make it while the model is dense; measure while the model is swapped with a packed cache.

    Args:
        model: A Hugging Face causal language model.
        windows: What to measure on.
    """

    def __init__(self, model: Any, windows: Windows) -> None:
        self.model = model
        step = 4 if model.device.type == "cuda" else 1
        parts = (x.to(model.device).split(step) for x in vars(windows).values())
        self.parts = []
        with scoring(model):
            for prompts, tails, scored in zip(*parts, strict=True):
                cache = forward(model, prompts, 1, use_cache=True).past_key_values
                logits, targets = self._continue(cache, {}, tails, scored)
                self.parts.append((cache, tails, scored, logits, targets))

    def measure(self, specs: Mapping[int, LayerSpec]) -> tuple[float, float]:
        """Score the continuations over caches whose layers ``specs`` names are packed.

        Returns:
            The divergence KL(dense || packed) of the predictions, which is the rise of the loss to
            expect on text that the dense model writes itself; and the rise of the loss on the
            windows' own text. Both in nats per token, means over the scored tokens. The first has
            far less noise: it needs no luck with the next token.
        """
        divergence, rise, count = 0.0, 0.0, 0
        with scoring(self.model):
            for cache, tails, scored, dense, targets in self.parts:
                logits, _ = self._continue(cache, specs, tails, scored)
                before, after = (x.float().log_softmax(-1) for x in (dense, logits))
                each = functional.kl_div(after, before, reduction="none", log_target=True)
                divergence += each.sum(-1).double().sum().item()
                rise += (before - after).gather(1, targets[:, None]).double().sum().item()
                count += len(targets)
        return divergence / count, rise / count

    def _continue(
        self, cache: Any, specs: Mapping[int, LayerSpec], tails: Tensor, scored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[M, V]`` of the scored tokens but the first of each tail, and the tokens."""
        fed, kept = tails[:, :-1], scored[:, 1:]
        past = packed_copy(cache, specs)
        output = forward(self.model, fed, fed.shape[1], use_cache=True, past_key_values=past)
        return output.logits[kept], tails[:, 1:][kept]


def packed_copy(cache: Any, specs: Mapping[int, LayerSpec]) -> PackedCache:
    """Copy a dense cache with the layers that ``specs`` names packed; the copy may grow."""
    copied = PackedCache()
    copied.layer_class_to_replicate = None
    copied.layers = []
    for index, layer in enumerate(cache.layers):
        if index in specs:
            packed = PackedLayer(specs[index])
            handle, _ = packed.update(layer.keys, layer.values)
            packed.commit(handle.keys, handle.values)
            copied.layers.append(packed)
        else:
            # A dynamic layer grows by making new tensors; other kinds write into theirs.
            plain = type(layer) is DynamicLayer
            copied.layers.append(copy.copy(layer) if plain else copy.deepcopy(layer))
    return copied
