import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from squeeze import reference


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(reference.path())


@pytest.fixture(scope="session")
def trained():
    """The embedded model in float32, so that modes agree to rounding."""
    return AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32)


@pytest.fixture
def pico():
    """A random model of two layers; small enough to run in every test."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def text():
    return [reference.validation_books()[1]["text"][:40000]]
