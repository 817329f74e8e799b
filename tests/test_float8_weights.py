"""Palettes of E4M3 entries in a model: rounded inputs, checkpoints, export, undoing it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import squeeze
from squeeze import api, reference
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import UnsupportedError
from squeeze.export_compressed import export_compressed_tensors
from squeeze.kernels.float8_linear.reference import round_inputs
from squeeze.linear import reconstruct
from tests import tiny

FLOAT8 = {"entries": "float8", "inputs": "float8"}
RULES = {
    "kmeans": {"method": "kmeans", "bits": 4, "importance": "none", **FLOAT8},
    "lnq": {"method": "lnq", "bits": 3, "guidance": "none", **FLOAT8},
    "entries": {"method": "lnq", "bits": 4, "guidance": "none", "entries": "float8"},
}


def artifacts(model, *rules):
    """Artifacts of weight rules, calibrated on random tokens."""
    plan = api.plan({"weights": list(rules)}, model, device="cpu")
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(3))
    return compress(model, plan, calibrate(model, tokens, set(plan.statistics)))


@torch.no_grad()
def logits(model):
    return model(tiny.prompt(1, 24)["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("name", RULES)
def test_layers_multiply_what_was_rounded(name):
    model = tiny.model("llama")
    made = artifacts(model, RULES[name])
    before = logits(model)
    seen = []
    with squeeze.swap(model, made):
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        assert not torch.equal(logits(model), before)
        dense = reconstruct(layer.packed)
    x, y = seen[0]
    if RULES[name].get("inputs"):
        codes, scale = round_inputs(x)
        x = codes.float() * scale
    torch.testing.assert_close(y, x @ dense.T)
    assert torch.equal(logits(model), before)


def test_a_checkpoint_loads_to_the_same_logits(tmp_path):
    source, output = tmp_path / "source", tmp_path / "out"
    tiny.model("llama", dtype=torch.bfloat16, vocab_size=8192).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference.path() / name, source)
    result = squeeze.run({"weights": [RULES["kmeans"]]}, source, output, evaluate=False)
    assert torch.equal(logits(squeeze.load(output)), logits(result.model))


@pytest.mark.parametrize("names", [["kmeans"], ["entries"], ["kmeans", "entries"]])
def test_compressed_tensors_reads_the_export_to_the_same_weights(names, tmp_path):
    model = tiny.model("llama")
    rules = [dict(RULES[name]) for name in names]
    if len(rules) > 1:
        rules[1]["targets"] = ["mlp"]
    made = artifacts(model, *rules)
    with squeeze.swap(model, made):
        export_compressed_tensors(model, made, tmp_path)
        squeezed = logits(model)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    groups = config["config_groups"].values()
    assert [("input_activations" in group) for group in groups] == [
        "inputs" in RULES[name] for name in names
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    read = logits(loaded)  # the library decompresses at the first forward
    for name, weight in made.weights.items():
        dense = loaded.get_submodule(name).weight
        assert torch.equal(dense, reconstruct(weight).to(dense.dtype)), name
    error = (read - squeezed).square().mean() / squeezed.square().mean()
    assert error < (0.05 if "kmeans" in names else 1e-6)


def test_rounded_inputs_need_entries_that_tensor_cores_take():
    model = tiny.model("llama")
    rule = {"method": "kmeans", "importance": "none", "inputs": "float8"}
    with pytest.raises(UnsupportedError, match=r"entries in int8.*entries: float8"):
        api.plan({"weights": [rule]}, model, device="cpu")
