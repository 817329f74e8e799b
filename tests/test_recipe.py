"""Recipes: every shipped one loads and plans; every mistake is named."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from squeeze import api, recipe, registry
from squeeze.errors import RecipeError, UnsupportedError
from tests import ssm, tiny

STATE_SPACE = {"quamba"}
KV = {"keys": {"method": "affine"}, "values": {"method": "affine"}}


@pytest.mark.parametrize("name", list(recipe.shipped()))
def test_shipped_recipes_load_plan_and_fit_the_schema(name: str) -> None:
    loaded = recipe.load(name)
    assert recipe.load(loaded.to_dict()).to_dict() == loaded.to_dict()
    made = api.plan(name, ssm.model("mamba") if name in STATE_SPACE else "reference")
    assert type(made).from_dict(made.to_dict()) == made
    raw = yaml.safe_load(recipe.shipped()[name].read_text())
    assert next(iter(raw)) == "version"
    jsonschema.validate(raw, recipe.schema())


def test_every_method_has_a_recipe_of_its_name_and_names_are_unique() -> None:
    every = [name for kind in registry.KINDS for name in registry.names(kind)]
    assert len(every) == len(set(every))
    assert set(every) <= set(recipe.shipped())


@pytest.mark.parametrize(("raw", "place", "received", "hint"), [
    ({"wieghts": []}, "recipe: wieghts", "unknown key 'wieghts'", "'weights'"),
    ({"kv_cache": {**KV, "sink_token": 4}}, "kv_cache.sink_token", "unknown key", "'sink_tokens'"),
    ({"kv_cache": {**KV, "keys": {"method": "afine"}}}, "kv_cache.keys.method",
     "unknown method 'afine'", "'affine'"),
    ({"kv_cache": {**KV, "keys": {"method": "affine", "bits": 5}}}, "kv_cache.keys.bits",
     "got 5", "2, 3, 4, 8, or 16 (lossless)"),
    ({"kv_cache": {**KV, "keys": {"method": "affine", "granularity": "chanel"}}},
     "kv_cache.keys.granularity", "got 'chanel'", "'channel'"),
    ({"kv_cache": {**KV, "keys": {"method": "affine", "group": 64}}}, "kv_cache.keys.group",
     "unknown key 'group'", "'group_size'"),
    ({"kv_cache": {**KV, "values": {"method": "affine", "transforms": ["center"]}}},
     "kv_cache.values.transforms", "'center' does not apply to values", "keys"),
    ({"kv_cache": {"keys": {"bits": 16}}}, "kv_cache.values", "is missing", "{bits: 16}"),
    ({"kv_cache": {**KV, "residual_length": -1}}, "kv_cache.residual_length", "got -1", "at least"),
    ({"weights": [{"method": "kmeans", "bits": 9}]}, "weights.0.bits", "got 9", "at most 8"),
    ({"weights": {"method": "kmeans"}}, "weights", "got {", "list of rules"),
    ({"attention": {"prefill": {"method": "vertical_slsh"}}}, "attention.prefill.method",
     "unknown method", "'vertical_slash'"),
    ({"calibration": {"samples": 0}}, "calibration.samples", "got 0", "at least 1"),
    ({"evaluate": {"modes": ["decod"]}}, "evaluate.modes.0", "got 'decod'", "decode"),
    ({"version": 2}, "version", "recipe format 2 is newer", "Upgrade"),
    ({"implementation": "cuda"}, "implementation", "got 'cuda'", "triton"),
])  # fmt: skip
def test_a_mistake_is_named_with_place_value_and_what_is_allowed(
    raw: dict, place: str, received: str, hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(raw)
    message = str(caught.value)
    assert place in message
    assert received in message
    assert hint in message
    assert "\n" not in message


def test_an_unknown_recipe_name_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'kv5'.*kv4.*quickstart.*Did you mean"):
        recipe.load("kv5")


@pytest.mark.parametrize(("text", "words"), [
    ("weights: [", "not YAML"),
    ("version: 1\nversion: 1\n", "twice"),
    ("- 1\n", "holds a list"),
], ids=["syntax", "duplicate", "list"])  # fmt: skip
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        recipe.load(path)
    assert "mine.yaml" in str(caught.value)


def test_overrides_reach_into_mappings_and_lists() -> None:
    loaded = recipe.load("quickstart", ["kv_cache.keys.bits=3", "weights.0.bits=2"])
    assert loaded.kv_cache.keys.method.parameters["bits"] == 3
    assert loaded.weights[0].method.parameters["bits"] == 2
    with pytest.raises(RecipeError, match="path=value"):
        recipe.load("kv4", ["kv_cache.keys.bits"])
    with pytest.raises(RecipeError, match="unknown key 'bitz'"):
        recipe.load("kv4", {"kv_cache.keys.bitz": 3})


def test_layer_overrides_change_those_layers_alone() -> None:
    raw = {"kv_cache": {**KV, "layers": [{"match": [0, -1], "keys": {"bits": 8}}]}}
    raw["kv_cache"]["values"] = {"method": "affine", "group_size": 16}
    raw["kv_cache"]["keys"] = {"method": "affine", "group_size": 16}
    made = api.plan(raw, tiny.model("llama", num_hidden_layers=3))
    assert [row.key_bits for row in made.kv_cache] == [10.0, 6.0, 10.0]
    with pytest.raises(RecipeError, match=r"layer 7 is not in this model.*-3 to 2"):
        api.plan({"kv_cache": {**KV, "layers": [{"match": [7], "keys": {"bits": 8}}]}},
                 tiny.model("llama", num_hidden_layers=3))  # fmt: skip


@pytest.mark.parametrize(("name", "why"), [
    ("DeepseekV3Config", "latent attention"), ("FalconConfig", "AttentionInterface"),
    ("MambaConfig", "state-space"),
])  # fmt: skip
def test_architectures_that_cannot_be_packed_are_refused_with_the_reason(
    name: str, why: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, name)().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=why):
        api.plan("kv4", tmp_path)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"group_size.*16"):
        api.plan("kv4", tiny.model("llama"))


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"weights.0.targets.*matches no linear layer"):
        api.plan({"weights": [{"method": "kmeans", "targets": ["experts"]}]}, "reference")


def test_absent_sections_have_the_dense_width() -> None:
    made = api.plan("dense")
    assert made.effective_bits == {"weights": 16.0, "keys": 16.0, "values": 16.0}
    assert made.lossless
    lossless = {"kv_cache": {"keys": {"bits": 16}, "values": {"bits": 16}},
                "weights": [{"method": "kmeans", "bits": 16}]}  # fmt: skip
    assert api.plan(lossless).lossless


def test_a_large_model_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    import transformers

    transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    made = api.plan("quickstart", tmp_path, context=131072)
    assert len(made.weights) == 560
    assert made.kv_bytes["before"] == 131072 * 80 * 2 * 8 * 128 * 2
    assert made.kv_bytes["after"] < 0.3 * made.kv_bytes["before"]
    assert "70B" not in made.table()
