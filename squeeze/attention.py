"""The attention function that squeezed models run.

transformers calls one function for every attention layer. Ours reads, from the attention module,
what the swap attached to it: the first call over an empty cache goes to the sparse kernel, by the
prefill policy or in eight bits, or to the model's own attention, later calls to the packed cache. A
later part of a long prompt goes to the sparse kernel too, over the decoded cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from squeeze.cache import Handle, LayerSpec, Side
from squeeze.errors import UnsupportedError
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.kernels.block_sparse_attention.sage import Quantize
from squeeze.sparsify.index import density
from squeeze.types import BlockIndex, Implementation, Tensors

# A call of at most this many queries over a filled cache is decode: neither a prefill policy nor
# eight bits act in it.
DECODE_QUERIES = 128
SUPPORTED = ("sdpa", "eager")


@dataclass(frozen=True)
class KVSettings:
    """One layer's share of the plan, as objects: transforms in order, the format last."""

    keys: tuple[tuple[str, Any], ...]
    values: tuple[tuple[str, Any], ...]
    block_length: int
    sink_tokens: int
    residual_length: int
    offload: bool = False
    queries: str | None = None
    salience: str = "error"


def table_name(side: str, stage: str, name: str) -> str:
    """Name the buffer of one fitted tensor: ``keys_center_center``."""
    return f"{side}_{stage}_{name}"


class LayerState(nn.Module):
    """What the swap attaches to one attention module.

    Tables that the KV formats were fitted with are buffers, so that checkpoints carry them and
    ``model.to`` moves them.

    Args:
        dense: Name of the model's own attention implementation.
        kv: How its cache stores, or ``None`` to keep transformers' own.
        policy: Prefill policy, or ``None``.
        implementation: What computes packed and sparse attention.
        tables: Buffers, named by ``table_name``.
        quantize: Eight bits that prefill is multiplied in, over the policy's list or over
            everything, or ``None``.
        quantize_min_length: Tokens from which it is.
    """

    def __init__(
        self,
        dense: str,
        kv: KVSettings | None = None,
        policy: Any = None,
        implementation: str = "reference",
        tables: Tensors | None = None,
        quantize: Quantize | None = None,
        quantize_min_length: int = 0,
    ) -> None:
        super().__init__()
        self.quantize, self.quantize_min_length = quantize, quantize_min_length
        self.dense, self.kv, self.policy = dense, kv, policy
        self.implementation = Implementation(implementation)
        self.padding: list[int] | None = None  # left padding of the rows of the running call
        self.past: int | None = 0  # tokens before the running call, None where the device knows
        self.types: Tensor | None = None  # of the running call's tokens, 0 for text
        self.density: Tensor | None = None  # per query head in the last forward, None = dense
        for name, table in (tables or {}).items():
            self.register_buffer(name, table)

    def spec(self) -> LayerSpec:
        """Say how this layer's cache stores, with the tables where they are now."""
        assert self.kv is not None
        kv = self.kv
        return LayerSpec(
            self._side("keys", kv.keys),
            self._side("values", kv.values),
            kv.block_length,
            kv.sink_tokens,
            kv.residual_length,
            self.implementation,
            kv.offload,
            kv.queries,
            kv.salience,
        )

    def _side(self, side: str, chain: tuple[tuple[str, Any], ...]) -> Side:
        parts = []
        for stage, method in chain:
            prefix = table_name(side, stage, "")
            tables = {
                n.removeprefix(prefix): b for n, b in self.named_buffers() if n.startswith(prefix)
            }
            parts.append((method, tables))
        return Side(parts[-1][0], parts[-1][1], tuple(parts[:-1]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerState:
        # Tables keep their dtype: ``model.to(torch.float16)`` must not round them.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self


def name_for(dense: str) -> str:
    """Name of our attention function around the model's own implementation ``dense``."""
    return f"squeeze_{dense}"


def register(dense: str) -> str:
    """Register the attention function and the mask function for ``dense``; return their name.

    The mask keeps the model's own form. Without one of the same name transformers would drop the
    padding mask silently.

    Raises:
        UnsupportedError: the model runs an implementation that cannot be wrapped.
    """
    if dense not in SUPPORTED:
        raise UnsupportedError(
            "attn_implementation",
            f"the model was loaded with {dense!r}",
            ", ".join(SUPPORTED),
            "Load it with attn_implementation='sdpa'",
        )
    name = name_for(dense)
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[dense])
    return name


def dense_attention(module: nn.Module, dense: str) -> Callable[..., tuple[Tensor, Any]]:
    """Return the attention function the model would run without us."""
    if dense == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[dense]  # type: ignore[no-any-return]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend over a packed cache, by a prefill policy, or as the model itself would.

    Args:
        module: The attention layer; ``module.squeeze`` holds its ``LayerState``.
        query: ``[B, H, T_q, D]``, after RoPE.
        key: ``[B, H_kv, T, D]``, or the handle of a packed layer.
        value: Likewise.
        attention_mask: As the model's own implementation takes it.
        scaling: Multiplies the dot products; default ``D ** -0.5``.
        softcap: Bound of the scores.
        s_aux: Logits of learned sinks, ``[H]``.

    Returns:
        Output ``[B, T_q, H, D]`` in the query's dtype, and ``None``.
    """
    state: LayerState = module.squeeze  # type: ignore[assignment]
    state.density = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handle):
        layer, keys, values = key
        if layer.total > 0:
            if _kernel_acts(state, query, layer.total + query.shape[2]):

                def sparse(whole_keys: Tensor, whole_values: Tensor) -> Tensor:
                    types, pads = layer.types, layer.pads
                    call = (query, whole_keys, whole_values, scale, softcap)
                    return _sparse(state, *call, pads, types)

                output = layer.attend_decoded(query, keys, values, scale, softcap, sparse)
                return output.to(query.dtype).transpose(1, 2).contiguous(), None
            output, lse = layer.attend(query, keys, values, scale, softcap)
            if s_aux is not None:
                output = output * torch.sigmoid(lse - s_aux.float().view(1, -1, 1)).unsqueeze(-1)
            return output.to(query.dtype).transpose(1, 2).contiguous(), None
    else:
        layer, keys, values = None, key, value  # type: ignore[assignment]
    if (
        state.past is not None
        and keys.shape[2] == state.past + query.shape[2]  # not a cache with room to fill
        and _kernel_acts(state, query, keys.shape[2])
    ):
        call = (query, keys, values, scale, softcap)
        output = _sparse(state, *call, state.padding, state.types)
        result: tuple[Tensor, Any] = (output.transpose(1, 2).contiguous(), None)
    else:
        extra: dict[str, Any] = {"softcap": softcap} if softcap is not None else {}
        extra |= {"s_aux": s_aux} if s_aux is not None else {}
        function = dense_attention(module, state.dense)
        result = function(
            module, query, keys, values, attention_mask, scaling=scaling, **extra, **kwargs
        )
    if layer is not None:
        layer.commit(keys, values, query, scale, softcap)
    return result


def _kernel_acts(state: LayerState, query: Tensor, length: int) -> bool:
    """Whether a call is prefill, of a length from which the policy or eight bits serve."""
    is_prefill = query.shape[2] > DECODE_QUERIES
    return is_prefill and (_policy_acts(state, length) or _rounding(state, length) is not None)


def _policy_acts(state: LayerState, length: int) -> bool:
    return state.policy is not None and length >= state.policy.min_length


def _rounding(state: LayerState, length: int) -> Quantize | None:
    return state.quantize if length >= state.quantize_min_length else None


def _sparse(
    state: LayerState,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None,
    pads: list[int] | None,
    types: Tensor | None,
) -> Tensor:
    batch, length, before = query.shape[0], keys.shape[2], keys.shape[2] - query.shape[2]
    starts = torch.tensor(pads, device=query.device) if pads and any(pads) else None
    index: BlockIndex | None = None
    if _policy_acts(state, length):
        extra: dict[str, Any] = {}
        if getattr(state.policy, "asks_types", False) and types is not None:
            extra = {"types": types} if types.shape[1] == length else {}
        if getattr(state.policy, "asks_implementation", False):
            extra["implementation"] = state.implementation
        index = state.policy.index(query, keys, starts, scaling, softcap, **extra)
        lengths = torch.full((batch,), length, device=query.device)
        begins = torch.full((batch,), before, device=query.device)
        if starts is not None:
            lengths = (lengths - starts).clamp(min=1)
            begins = torch.minimum((begins - starts).clamp(min=0), lengths - 1)
        state.density = density(index, lengths, begins).mean(0)
    output, _ = block_sparse_attention(
        query,
        keys,
        values,
        index,
        starts=starts,
        scaling=scaling,
        softcap=softcap,
        quantize=_rounding(state, length),
        implementation=state.implementation,
    )
    return output
