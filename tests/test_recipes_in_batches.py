"""Every recipe with a packed cache, as it is shipped, on a model with two query heads per KV head:
rows of a padded batch give what each gives alone."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import squeeze
from squeeze import reference
from tests.pico import SETTINGS

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAMES = sorted(
    path.stem
    for path in RECIPES.glob("*.yaml")
    if "kv_cache" in yaml.safe_load(path.read_text(encoding="utf-8"))
)
PROMPT, PAD, NEW = 150, 20, 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A two-layer Llama with heads of 64, whose weights are large enough for attention to count."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("grouped")
    sizes = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(reference.path()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_what_they_are_alone(name, saved):
    model = squeeze.run(name, saved, overrides=SETTINGS, evaluate=False).model
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 8000, (3, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    together = torch.stack(model.generate(ids, attention_mask=mask, **settings).logits)
    for row, start in enumerate((0, PAD, 0)):
        own = ids[row : row + 1, start:]
        settings["attention_mask"] = torch.ones_like(own)
        alone = torch.stack(model.generate(own, **settings).logits)[:, 0]
        assert (together[:, row] - alone).abs().max() < 2e-3 * alone.abs().max()
