"""What squeeze needs to know of a model, read from its configuration on the meta device.

No weights are loaded, so a 70B model is described in seconds on a laptop. The one place that
knows which architectures hand their keys and values to an attention function we can replace.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from squeeze.errors import CheckpointError, UnsupportedError
from squeeze.families import refusal
from squeeze.fused import fused_shapes
from squeeze.key_biases import KeyBias, find_huge
from squeeze.types import resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Architectures whose layers pass what ``cache.update`` returns straight to the attention function.
PACKABLE = frozenset(
    [
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "llama",
        "mistral",
        "mixtral",
        "opt",
        "phi3",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
    ]
)
# Whose attention adds sink logits that a prefill policy would have to renormalise.
SINK_LOGITS = frozenset({"gpt_oss"})
MLA = frozenset(
    [
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "kimi_k2",
        "longcat_flash",
        "minicpm3",
        "glm_moe_dsa",
        "youtu",
    ]
)
# Mixers whose forward we have (``squeeze.mixer``). That of others may read weights by itself.
MIXERS = ("MambaMixer", "Mamba2Mixer")
NO_KEYS = frozenset(["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma"])


@dataclass(frozen=True)
class AttentionInfo:
    """One decoder layer's attention.

    Attributes:
        layer: Index of the layer.
        module: Dotted name of the attention module.
        kind: ``full_attention``, or ``sliding_``, ``chunked_`` or ``linear_attention``.
        query_heads: H.
        kv_heads: H_kv.
        head_dim: D.
    """

    layer: int
    module: str
    kind: str
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelInfo:
    """A model as its configuration describes it.

    Attributes:
        source: Name or path it was asked for by.
        model_type: Of the text decoder.
        dtype: Of the checkpoint, as ``"bfloat16"``.
        layers: Number of decoder layers.
        attention: One entry per layer that has attention.
        linears: Dotted name to ``(out, in)`` of every ``nn.Linear`` that can be replaced.
        parameter_bytes: Of all parameters, tied ones once, in ``dtype``.
        key_biases: Those that are huge; ``None`` where there are biases and they are not loaded.
        mixers: Dotted names of the Mamba mixers that we know.
        experts: Dotted name of every parameter that holds the matrices of a layer's experts to
            ``(E, out, in)``.
        step_reasons: Of each entry of ``attention``, why a recorded decode step runs its layer as
            it is; empty where it runs fused.
        softcap: Bound of the scores of attention, ``None`` without one.
    """

    source: str
    model_type: str
    dtype: str
    layers: int
    attention: tuple[AttentionInfo, ...]
    linears: dict[str, tuple[int, int]]
    parameter_bytes: int
    key_biases: tuple[KeyBias, ...] | None = ()
    mixers: tuple[str, ...] = ()
    experts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    step_reasons: tuple[str, ...] = ()
    softcap: float | None = None

    @property
    def dtype_bits(self) -> int:
        """Width of one dense value."""
        return resolve_dtype(self.dtype).itemsize * 8

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def locate(model: str | Path) -> str:
    """Turn ``"reference"`` into the embedded model's folder; pass names and paths through."""
    if str(model) == "reference":
        return str(Path(__file__).parent / "reference")
    return str(model)


def load_config(model: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        CheckpointError: there is no such model, or its configuration is not one.
    """
    from transformers import AutoConfig

    path = locate(model)
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        raise CheckpointError(
            f"model {path!r}",
            "no config.json there",
            "a folder saved by save_pretrained",
            "Check the path",
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"model {str(model)!r}",
            f"cannot be read ({first_line})",
            "'reference', a folder saved by save_pretrained, or a name on the model hub",
            "Check the name, or pass --trust-remote-code if the model needs its own code",
        ) from error


def describe(
    source: str | Path | PreTrainedModel, trust_remote_code: bool = False, dtype: Any = None
) -> ModelInfo:
    """Describe a model by name, path or object, without loading weights.

    Args:
        source: What the user named, or a loaded model.
        trust_remote_code: Passed to transformers.
        dtype: Overrides the checkpoint's own.
    """
    if isinstance(source, nn.Module):
        model: Any = source
        config = model.config
        name = getattr(config, "_name_or_path", "") or type(model).__name__
        chosen = dtype or next(model.parameters()).dtype
    else:
        config = load_config(source, trust_remote_code)
        name = str(source)
        model = empty_model(config, trust_remote_code)
        chosen = dtype or getattr(config, "dtype", None) or torch.float32
    text = config.get_text_config(decoder=True)
    linears = {
        n: (m.out_features, m.in_features)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not _is_read(model, n)
    }
    count = sum(p.numel() for p in model.parameters())
    attention = _attention(model, text)
    return ModelInfo(
        source=name,
        model_type=text.model_type,
        dtype=str(resolve_dtype(chosen)).removeprefix("torch."),
        layers=text.num_hidden_layers,
        attention=attention,
        linears=linears,
        parameter_bytes=count * resolve_dtype(chosen).itemsize,
        key_biases=find_huge(model, attention),
        mixers=tuple(n for n, m in model.named_modules() if type(m).__name__ in MIXERS),
        experts=fused_shapes(model),
        step_reasons=tuple(
            refusal(model.get_submodule(item.module.rpartition(".")[0])) or "" for item in attention
        ),
        softcap=getattr(text, "attn_logit_softcapping", None),
    )


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of a configuration on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedError(
            f"model of type {config.model_type!r}",
            "is not a causal language model",
            "architectures that AutoModelForCausalLM knows",
            "Choose another model",
        ) from error


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether a module's owner reads its weight itself, so that nothing else may stand there."""
    owner, _, last = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    return last == "dt_proj" and kind.endswith("Mixer") and kind not in MIXERS


def _attention(model: nn.Module, text: PreTrainedConfig) -> tuple[AttentionInfo, ...]:
    kinds = layer_kinds(text)
    heads = text.num_attention_heads if hasattr(text, "num_attention_heads") else 0
    found: dict[int, AttentionInfo] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if layer is None or not re.search(r"Attention\d*$|SelfAttention", type(module).__name__):
            continue
        if layer in found or "cross" in name:
            continue
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = (
            getattr(module, "head_dim", None)
            or getattr(module, "head_size", None)
            or getattr(text, "head_dim", None)
            or text.hidden_size // heads
        )
        kind = kinds[layer] if layer < len(kinds) else "full_attention"
        found[layer] = AttentionInfo(layer, name, kind, heads, kv_heads, head_dim)
    return tuple(found[layer] for layer in sorted(found))


def layer_kinds(text: PreTrainedConfig) -> list[str]:
    """Name each layer's kind of attention, from ``layer_types`` or the window it declares."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return list(kinds)
    kind = "full_attention"
    if getattr(text, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * getattr(text, "num_hidden_layers", 0)


def require_packable(info: ModelInfo, section: str) -> None:
    """Refuse, with the reason, an architecture whose attention we cannot replace.

    Raises:
        UnsupportedError: naming the architecture and why its keys and values cannot be packed.
    """
    kind = info.model_type
    if kind in PACKABLE:
        return
    if kind in NO_KEYS or not info.attention:
        why = "it is a state-space model and keeps no keys and values"
    elif kind in MLA:
        why = (
            "its multi-head latent attention caches a latent vector, which is projected again "
            "after the cache, and not keys and values"
        )
    else:
        why = (
            "its attention does not go through transformers' AttentionInterface, or has not been "
            "tried, so it could not read a packed cache"
        )
    raise UnsupportedError(
        section,
        f"a {kind!r} model cannot take it: {why}",
        ", ".join(sorted(PACKABLE)),
        f"Remove {section} from the recipe, or choose another model",
    )
