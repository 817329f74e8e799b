"""Integer weights in a model: scales folded into norms, checkpoints, export, undoing it all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import squeeze
from squeeze import api, registry
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import UnsupportedError
from squeeze.evaluation.suite import only
from squeeze.export import artifacts_of
from squeeze.export_compressed import export_compressed_tensors
from squeeze.linear import IntegerLinear, reconstruct
from squeeze.plan_scaling import producer_of, readers
from squeeze.scaling import exponents_of
from tests import tiny

AWQ = {"method": "integer", "bits": 3, "group_size": 32, "symmetric": False, "scaling": "awq"}
GPTQ = {"method": "integer", "bits": 4, "group_size": 32, "rounding": "gptq"}
EVERYTHING = {"targets": ["self_attn", "mlp"]}


def uneven(name="llama", **extra):
    """A model whose inputs to linear layers differ in size by channel, so that scales matter."""
    model = tiny.model(name, **extra)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("v_proj"):
                size = torch.randn(len(module.weight), 1, generator=generator)
                module.weight.mul_(torch.exp(size))
            if "RMSNorm" in type(module).__name__:
                module.weight.mul_(torch.exp(torch.randn(module.weight.shape, generator=generator)))
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model


def artifacts(model, *rules):
    """Artifacts of weight rules, calibrated on random tokens."""
    plan = api.plan({"weights": list(rules)}, model, device="cpu")
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(3))
    return compress(model, plan, calibrate(model, tokens, set(plan.statistics)))


@torch.no_grad()
def logits(model):
    return model(tiny.prompt(1, 24)["input_ids"], use_cache=False).logits


def dense_twin(model, made):
    """Logits of the model with every packed weight written out, its own scales and all."""
    before = {}
    exponents = exponents_of(made.weights)
    for row in made.plan.weights:
        parameter = model.get_submodule(row.module).weight
        before[row.module] = parameter.detach().clone()
        dense = reconstruct(made.weights[row.module])
        if row.producer:
            dense = dense * torch.exp2(-exponents[row.module].float())
        if row.module.endswith("up_proj"):  # its rows were divided on behalf of down_proj
            found = exponents[row.module.replace("up_proj", "down_proj")]
            dense = dense * torch.exp2(found.float())[:, None]
        parameter.data.copy_(dense)
    result = logits(model)
    for name, weight in before.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return result


@pytest.mark.parametrize("rule", [AWQ, GPTQ, {**AWQ, "rounding": "gptq"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_squeezed_model_computes_with_the_packed_weights(family, rule):
    model = uneven(family, mlp_bias=True) if family == "llama" else uneven(family)
    made = artifacts(model, {**rule, **EVERYTHING})
    dense = logits(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = dense_twin(model, made) if rule["method"] and "scaling" in rule else None
    with squeeze.swap(model, made):
        assert isinstance(model.model.layers[0].mlp.up_proj, IntegerLinear)
        squeezed = logits(model)
    if expected is not None:
        torch.testing.assert_close(squeezed, expected, rtol=1e-4, atol=1e-3)
    assert not torch.equal(squeezed, dense)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(logits(model), dense)


def test_scales_of_modules_with_the_same_inputs_are_equal_and_folded():
    model = uneven()
    made = artifacts(model, {**AWQ, **EVERYTHING})
    rows = {row.module: row.producer for row in made.plan.weights}
    layer = "model.layers.1"
    assert rows[f"{layer}.self_attn.k_proj"] == f"{layer}.input_layernorm"
    assert rows[f"{layer}.mlp.gate_proj"] == f"{layer}.post_attention_layernorm"
    assert rows[f"{layer}.mlp.down_proj"] == f"{layer}.mlp.up_proj"
    assert rows[f"{layer}.self_attn.o_proj"] == ""
    for producer in set(rows.values()) - {""}:
        found = [made.weights[name].exponents for name in readers(producer)]
        assert all(torch.equal(found[0], other) for other in found)
        assert all(made.weights[name].folded for name in readers(producer))
    assert any(weight.exponents.any() for weight in made.weights.values())
    norm = model.model.layers[1].input_layernorm.weight
    before = norm.detach().clone()
    with squeeze.swap(model, made):
        found = made.weights[f"{layer}.self_attn.q_proj"].exponents.float()
        assert torch.equal(norm, before * torch.exp2(-found))


@pytest.mark.parametrize(
    ("packed", "watched"),
    [("self_attn.q_proj", "self_attn.k_proj"), ("mlp.down_proj", "mlp.up_proj")],
)
def test_dense_neighbours_take_the_inverse_scales(packed, watched):
    model = uneven()
    made = artifacts(model, {**AWQ, "targets": [packed.split(".")[1]]})
    found = made.weights[f"model.layers.0.{packed}"].exponents.float()
    assert found.any()
    seen = []
    watched_module = model.get_submodule(f"model.layers.0.{watched}")
    watched_module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits(model)
    with squeeze.swap(model, made):
        logits(model)
    # Powers of two change no bit: up_proj's rows are divided, k_proj's columns multiplied back.
    factor = torch.exp2(-found) if watched == "mlp.up_proj" else torch.ones(())
    assert torch.equal(seen[0] * factor, seen[1])


def test_one_layer_can_be_swapped_alone():
    model = uneven()
    part = only(artifacts(model, {**AWQ, **EVERYTHING}), "weights", 0)
    expected, dense = dense_twin(model, part), logits(model)
    with squeeze.swap(model, part):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(logits(model), dense)


def test_models_whose_norms_take_no_scale_keep_it_beside_the_weight():
    model = tiny.model("gemma2")
    made = artifacts(model, {**AWQ, **EVERYTHING})
    assert {row.producer for row in made.plan.weights} == {""}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = dense_twin_plain(model, made)
    with squeeze.swap(model, made):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def dense_twin_plain(model, made):
    """Logits with every packed weight written out, where nothing is folded."""
    before = {n: model.get_submodule(n).weight.detach().clone() for n in made.weights}
    for name, weight in made.weights.items():
        model.get_submodule(name).weight.data.copy_(reconstruct(weight))
    result = logits(model)
    for name, weight in before.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return result


def test_other_methods_beside_it_keep_scales_out_of_the_norm():
    model = uneven()
    kmeans = {"method": "kmeans", "bits": 4, "importance": "none", "targets": ["k_proj"]}
    rules = [{**AWQ, **EVERYTHING}, kmeans]
    plan = api.plan({"weights": rules}, model, device="cpu")
    rows = {row.module.removeprefix("model.layers.0."): row.producer for row in plan.weights}
    assert rows["self_attn.q_proj"] == rows["self_attn.k_proj"] == ""
    assert rows["mlp.down_proj"] == "model.layers.0.mlp.up_proj"
    made = artifacts(model, *rules)
    with squeeze.swap(model, made):
        assert logits(model).isfinite().all()


def test_float16_weights_that_would_underflow_are_refused_and_left_alone():
    model = uneven().half()
    made = artifacts(model, {**AWQ, "targets": ["q_proj", "k_proj", "v_proj"]})
    norm = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm.fill_(2.0**-24)
    before = norm.clone()
    with pytest.raises(UnsupportedError, match=r"underflow in float16.*scaling: none"):
        squeeze.swap(model, made)
    assert torch.equal(norm, before)


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    model = uneven()
    plan = api.plan({"weights": [{**AWQ, **EVERYTHING}]}, model, device="cpu")
    tokens = torch.randint(3, 128, (2, 32), generator=torch.Generator().manual_seed(3))
    stats = calibrate(model, tokens, set(plan.statistics))
    whole = compress(model, plan, stats, folder=tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors"))[::2]:
        path.unlink()
    resumed = compress(model, plan, stats, folder=tmp_path)
    for name, weight in whole.weights.items():
        for part, tensor in weight.tensors().items():
            assert torch.equal(resumed.weights[name].tensors()[part], tensor), (name, part)


def test_names_of_producers_and_readers_agree():
    for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.3.{name}"
        assert module in readers(producer_of(module))
    assert producer_of("model.layers.3.self_attn.o_proj") == ""
    assert producer_of("lm_head") == ""


def test_the_method_is_registered():
    assert registry.info("weights", "integer").year == 2022


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run over a saved bfloat16 model whose scales are partly folded and partly not."""
    import shutil

    from squeeze import reference

    source = tmp_path_factory.mktemp("source")
    uneven("llama", dtype=torch.bfloat16, vocab_size=8192).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference.path() / name, source)
    recipe = {"weights": [{**AWQ, **EVERYTHING}], "calibration": {"samples": 2, "length": 32}}
    output = tmp_path_factory.mktemp("run") / "out"
    return output, squeeze.run(recipe, source, output, evaluate=False), source


def test_export_then_load_is_bit_identical(checkpoint):
    output, result, source = checkpoint
    expected = logits(result.model)
    loaded = squeeze.load(output)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded.dequantize()), expected)
    read = artifacts_of(output)
    assert read.plan == result.artifacts.plan
    for name, weight in result.artifacts.weights.items():
        assert read.weights[name].folded == weight.folded
        for part, tensor in weight.tensors().items():
            assert torch.equal(read.weights[name].tensors()[part], tensor)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(source)
    with squeeze.swap(again, read):
        assert torch.equal(logits(again), expected)


def test_scales_that_nothing_takes_are_not_exported(checkpoint, tmp_path):
    output, result, _ = checkpoint
    assert result.artifacts.weights["model.layers.0.self_attn.o_proj"].exponents.any()
    with pytest.raises(UnsupportedError, match=r"o_proj.*inputs are scaled"):
        api.export(output, "compressed-tensors", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


SCHEMES = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": False},
    {"bits": 3, "group_size": 0},
    {"bits": 8, "group_size": 0},
    {"bits": 5, "group_size": 32},
]


def decompressed(folder):
    """Every compressed module of a folder, by the library's own decompressors alone."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    stored = load_file(folder / "model.safetensors")
    result = {}
    for name in {key.rpartition(".")[0] for key in stored if key.endswith(".weight_scale")}:
        groups = parsed.config_groups.values()
        own = [group for group in groups if name in group.targets]
        scheme = own[0] if own else next(g for g in groups if "Linear" in g.targets)
        prefix = f"{name}."
        parts = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        library = BaseCompressor.get_value_from_registry(scheme.format)
        result[name] = library.decompress(parts, scheme)["weight"]
    return result


def exported(model, made, folder):
    """Export a swapped model and read it by the library."""
    with squeeze.swap(model, made):
        export_compressed_tensors(model, made, folder)
    return decompressed(folder)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_decompresses_the_export_to_the_same_weights(scheme, tmp_path):
    model = uneven(dtype=torch.bfloat16)
    made = artifacts(model, {"method": "integer", **scheme, **EVERYTHING})
    found = exported(model, made, tmp_path)
    assert found.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        assert torch.equal(found[name], reconstruct(weight).to(found[name].dtype)), name
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert found[name].dtype == torch.bfloat16


def test_folded_scales_palettes_and_several_widths_travel_together(tmp_path):
    model = uneven(dtype=torch.bfloat16)
    kmeans = {"method": "kmeans", "bits": 3, "importance": "none"}
    made = artifacts(
        model,
        {**AWQ, "symmetric": True, "targets": ["q_proj", "k_proj", "v_proj", "mlp"]},
        {**kmeans, "targets": ["o_proj"]},
    )
    with squeeze.swap(model, made):
        expected = logits(model)
        export_compressed_tensors(model, made, tmp_path)
    for name, weight in decompressed(tmp_path).items():
        own = reconstruct(made.weights[name])
        assert torch.equal(weight, own.to(weight.dtype)), name
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits(loaded), expected)


def test_what_the_format_cannot_say_is_refused(tmp_path):
    model = uneven()
    ragged = artifacts(model, {"method": "integer", "group_size": 64, "targets": ["down_proj"]})
    with pytest.raises(UnsupportedError, match="rows of 96 end in a part of a group of 64"):
        exported(model, ragged, tmp_path)
    kmeans = {"method": "kmeans", "importance": "none", "entries": "float16"}
    with pytest.raises(UnsupportedError, match=r"codebook entries are torch.float16"):
        exported(model, artifacts(model, {**kmeans, "targets": ["o_proj"]}), tmp_path)
    assert not list(tmp_path.iterdir())
