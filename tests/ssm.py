"""Two-layer state-space models built from configs: random weights, offline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# 96 inner channels: three Hadamard blocks of 32.
CONFIGS: dict[str, Any] = {
    "mamba": lambda: MambaConfig(**COMMON, state_size=8, time_step_rank=24),
    "mamba2": lambda: Mamba2Config(
        **COMMON, state_size=8, num_heads=6, head_dim=16, n_groups=2, chunk_size=16
    ),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Make a model with random weights, large enough that its tokens differ."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(1.5)
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made.eval()


def prompt(batch: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    """Make token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, length), generator=generator)
