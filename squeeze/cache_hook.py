"""The hook that hands a squeezed model its packed cache, and tells the cache the padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.attention import LayerState
from squeeze.cache import PackedCache, StaticPackedCache, adopt, make_static
from squeeze.errors import UnsupportedError

# What models call the kinds of their tokens; 0 is text.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


class CacheHook:
    """Forward pre-hook of the decoder: supplies a packed cache and tells it the padding.

    Args:
        config: The decoder's configuration.
        states: Layer index to what the swap attached there.
    """

    def __init__(self, config: Any, states: dict[int, LayerState]) -> None:
        self.config, self.states = config, states
        self.packs = any(state.kv is not None for state in states.values())
        self.asks_types = any(
            (s.kv and s.kv.salience == "token_types") or getattr(s.policy, "asks_types", False)
            for s in states.values()
        )
        self.types: Tensor | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace an absent or empty cache; refuse masks that a packed cache cannot honour."""
        if args:
            names = list(inspect.signature(module.forward).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        if self.packs and not isinstance(cache, PackedCache) and (use_cache or cache is not None):
            cache = kwargs["past_key_values"] = new_cache(self.config, self.states, cache)
        past = cache.get_seq_length() if cache is not None else 0
        pads, right = None, False
        if not (isinstance(cache, StaticPackedCache) and cache.is_recording):
            pads, right = read_padding(kwargs, past)
        if isinstance(cache, PackedCache):
            if past and cache.padded_right:
                raise _mask_error("of an earlier call was padded on the right")
            cache.padded_right = cache.padded_right or right
            if pads is not None:
                cache.set_padding(pads)
            if self.asks_types:
                tokens = kwargs.get("input_ids")
                tokens = kwargs["inputs_embeds"] if tokens is None else tokens
                cache.note_types(self.types, tokens.shape[1])
        for state in self.states.values():
            state.padding, state.types = pads, self.types
            state.past = past if isinstance(past, int) else None
        return (), kwargs

    def read_types(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: see of what kinds the call's tokens are."""
        given = [kwargs[name] for name in TOKEN_TYPES if isinstance(kwargs.get(name), Tensor)]
        self.types = given[0] if given else None


def new_cache(config: Any, states: dict[int, LayerState], cache: Any = None) -> PackedCache:
    """Make an empty cache that stores as the layers' states say, out of ``cache`` where given."""
    specs = {i: state.spec() for i, state in states.items() if state.kv is not None}
    return adopt(cache, config, specs)


def static_cache(model: Any, max_length: int, *, step_tokens: int = 1) -> StaticPackedCache:
    """Make an empty packed cache of fixed shape for a squeezed model.

    Pass it as ``past_key_values`` to ``generate`` or to the model; its ``recording``, ``advance``
    and ``rewind`` serve whoever captures the step in a CUDA graph. It is allocated by the first
    call, for that call's number of rows, and ``reset`` makes it ready for another prompt.

    Args:
        model: Squeezed, with every layer packed.
        max_length: Tokens that fit, padding included.
        step_tokens: Most tokens of a step that may be recorded; more than one is for speculative
            decoding.

    Raises:
        UnsupportedError: the model packs no cache, or keeps layers that it cannot hold.
    """
    states = packing_states(model, "static_cache")
    specs = {i: state.spec() for i, state in states.items() if state.kv is not None}
    return make_static(model.config.get_text_config(decoder=True), specs, max_length, step_tokens)


def packing_states(model: Any, place: str) -> dict[int, LayerState]:
    """Return what the swap attached to a model that packs its cache.

    Raises:
        UnsupportedError: it does not; the message begins with ``place``.
    """
    states: dict[int, LayerState] = getattr(getattr(model, "squeeze_swap", None), "states", {})
    if not any(state.kv is not None for state in states.values()):
        raise UnsupportedError(
            place,
            "this model packs no cache",
            "a model squeezed by a recipe with kv_cache",
            "Run such a recipe, or load its checkpoint",
        )
    return states


def read_padding(kwargs: dict[str, Any], past: int) -> tuple[list[int] | None, bool]:
    """Read the padding of a decoder call off its ``[B, T]`` mask.

    Returns:
        Left padding per row, or ``None`` where nothing new is known, and whether a row is padded
        on the right: harmless within one call, wrong for a cache that goes on.

    Raises:
        UnsupportedError: the mask has another form, or zeros between ones.
    """
    mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if mask is None or (past and tokens is not None and tokens.shape[1] == 1):
        # One more token: what was read at the prompt still holds, and the device is not awaited.
        return None, False
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise _mask_error(f"is {'several masks' if isinstance(mask, dict) else tuple(mask.shape)}")
    real = mask.to("cpu").bool()
    lengths, width = real.sum(1), real.shape[1]
    pads = torch.where(lengths > 0, real.int().argmax(1), width)
    tails = torch.where(lengths > 0, real.flip(1).int().argmax(1), 0)
    if bool((pads + lengths + tails != width).any()):
        raise _mask_error("has zeros between ones")
    return [int(pad) for pad in pads], bool((tails > 0).any())


def _mask_error(what: str) -> UnsupportedError:
    return UnsupportedError(
        "attention_mask",
        f"the mask {what}",
        "a [batch, tokens] mask with padding on the left",
        "Set tokenizer.padding_side = 'left'",
    )
