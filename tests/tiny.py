"""Two-layer models of many architectures, built from configs: random weights, offline."""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LAYERS = ["sliding_attention", "full_attention"]

# Architecture -> (config class, extra arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16, "layer_types": LAYERS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16, "layer_types": LAYERS}),
    "phi3": ("Phi3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "head_dim": 16}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "head_dim": 16, "sliding_window": 16, "layer_types": LAYERS},
    ),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, **MOE}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            **MOE,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


def config(name: str, **extra: Any) -> Any:
    """Make the configuration of an architecture."""
    cls, own = CONFIGS[name]
    return getattr(transformers, cls)(**{**COMMON, **own, **extra})


def model(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any):
    """Make a model with random weights, large enough that its tokens differ."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(name, **extra), dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made.eval()


def prompt(batch: int = 2, length: int = 100, pads: tuple[int, ...] = (), seed: int = 1):
    """Make token ids and a mask, rows padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
