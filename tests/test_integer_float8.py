"""Integers under E4M3 scales in a model: rounded inputs, checkpoints, export, undoing it."""

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

NEAREST = {"method": "integer", "bits": 4, "group_size": 32, "inputs": "float8"}
GPTQ = NEAREST | {"rounding": "gptq"}
AWQ = NEAREST | {"scaling": "awq", "symmetric": False}


def artifacts(model, *rules):
    """Artifacts of weight rules, calibrated on random tokens."""
    plan = api.plan({"weights": list(rules)}, model, device="cpu")
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(3))
    return compress(model, plan, calibrate(model, tokens, set(plan.statistics)))


@torch.no_grad()
def logits(model):
    return model(tiny.prompt(1, 24)["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("rule", [NEAREST, GPTQ, AWQ], ids=["nearest", "gptq", "awq"])
def test_layers_multiply_what_was_rounded(rule):
    model = tiny.model("llama")
    made = artifacts(model, rule)
    before = logits(model)
    seen = []
    with squeeze.swap(model, made):
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        assert not torch.equal(logits(model), before)
        dense = reconstruct(layer.packed)
    x, y = seen[0]
    codes, scale = round_inputs(x)
    torch.testing.assert_close(y, (codes.float() * scale) @ dense.T)
    assert torch.equal(logits(model), before)


def test_casting_the_model_leaves_scales_as_they_are():
    model = tiny.model("llama")
    made = artifacts(model, NEAREST)
    with squeeze.swap(model, made):
        layer = model.model.layers[0].mlp.down_proj
        before = reconstruct(layer.packed)
        layer.to(torch.bfloat16)
        assert layer.packed.row_scale.dtype == torch.float32
        assert torch.equal(reconstruct(layer.packed), before)


def test_a_checkpoint_loads_to_the_same_logits(tmp_path):
    source, output = tmp_path / "source", tmp_path / "out"
    tiny.model("llama", dtype=torch.bfloat16, vocab_size=8192).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference.path() / name, source)
    result = squeeze.run({"weights": [NEAREST]}, source, output, evaluate=False)
    assert torch.equal(logits(squeeze.load(output)), logits(result.model))


def test_compressed_tensors_reads_the_export_to_the_same_weights(tmp_path):
    model = tiny.model("llama")
    made = artifacts(model, GPTQ)
    with squeeze.swap(model, made):
        export_compressed_tensors(model, made, tmp_path)
        squeezed = logits(model)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    (group,) = config["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    tokens = group["input_activations"]
    assert (tokens["type"], tokens["strategy"], tokens["dynamic"]) == ("float", "token", True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    read = logits(loaded)  # the library decompresses at the first forward
    for name, weight in made.weights.items():
        dense = loaded.get_submodule(name).weight
        assert torch.equal(dense, reconstruct(weight).to(dense.dtype)), name
    error = (read - squeezed).square().mean() / squeezed.square().mean()
    assert error < 0.05


def test_wider_codes_are_refused_while_planning():
    rule = NEAREST | {"bits": 8}
    with pytest.raises(UnsupportedError, match=r"8 bits.*at most 4 bits"):
        api.plan({"weights": [rule]}, tiny.model("llama"), device="cpu")
