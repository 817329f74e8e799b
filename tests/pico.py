"""A saved model small enough for the command line's tests: random weights, real tokenizer."""

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from squeeze import reference

SETTINGS = {
    "evaluate.tasks": ["books_perplexity"],
    "evaluate.lengths": [128],
    "evaluate.windows": 1,
    "evaluate.sensitivity": False,
    "calibration.samples": 2,
    "calibration.length": 64,
}


def save(folder):
    """Write a two-layer Llama in float32 with the reference tokenizer; return the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(reference.path()).save_pretrained(folder)
    return folder
