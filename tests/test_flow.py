"""The whole flow: run, export, load, resume; and what happens to damaged checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import squeeze
from squeeze import api, reference
from squeeze.errors import CheckpointError, DeviceError, SqueezeError
from tests import tiny

RECIPE = {
    "weights": [{"method": "kmeans", "bits": 3}],
    "kv_cache": {
        "keys": {"method": "affine", "group_size": 16, "transforms": ["center"]},
        "values": {"method": "affine", "group_size": 16, "transforms": ["hadamard"]},
        "residual_length": 8,
        "block_length": 32,
    },
    "calibration": {"samples": 4, "length": 32},
}


DAMAGES = ["truncated", "tampered", "missing", "no-manifest", "no-json", "newer", "mismatch"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama with the reference model's tokenizer, saved in bfloat16."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny.model("llama", dtype=torch.bfloat16, vocab_size=8192)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference.path() / name, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    result = squeeze.run(RECIPE, source, output, evaluate=False)
    return output, result


def logits(model) -> torch.Tensor:
    ids = tiny.prompt(1, 90)["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    return model(ids[:, :20], past_key_values=cache).logits


def test_export_then_load_is_bit_identical(checkpoint) -> None:
    output, result = checkpoint
    expected = logits(result.model)
    assert torch.equal(logits(squeeze.load(output)), expected)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(logits(loaded), expected)
    assert loaded.dtype == torch.bfloat16


def test_a_loaded_model_saves_again_to_the_same_bits(checkpoint, tmp_path: Path) -> None:
    output, result = checkpoint
    squeeze.load(output).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(result.model))


def test_artifacts_come_back_bit_for_bit(checkpoint) -> None:
    from squeeze.export import artifacts_of

    output, result = checkpoint
    read = artifacts_of(output)
    assert read.plan == result.artifacts.plan
    for name, weight in result.artifacts.weights.items():
        for part in ("indices", "codebook", "scale"):
            assert torch.equal(getattr(read.weights[name], part), getattr(weight, part))
    assert read.tables.keys() == result.artifacts.tables.keys()
    for name, table in result.artifacts.tables.items():
        assert torch.equal(read.tables[name], table)


def test_dequantize_gives_a_dense_model_with_the_same_weights(checkpoint) -> None:
    output, result = checkpoint
    ids = tiny.prompt(1, 30)["input_ids"]
    expected = result.model(ids, use_cache=False).logits
    dense = squeeze.load(output).dequantize()
    assert isinstance(dense.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert torch.equal(dense(ids, use_cache=False).logits, expected)


def test_the_manifest_says_where_everything_came_from(checkpoint, source: Path) -> None:
    output, _ = checkpoint
    manifest = json.loads((output / "squeeze.json").read_text())
    assert manifest["source"] == str(source)
    assert manifest["recipe"]["weights"][0]["method"] == "kmeans"
    assert manifest["environment"]["versions"]["torch"]
    assert set(manifest["files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-1000]), "bytes"),
    (lambda f: flip(f / "model.safetensors"), "its content is not what squeeze.json says"),
    (lambda f: (f / "model.safetensors").unlink(), "is missing"),
    (lambda f: (f / "squeeze.json").unlink(), r"no squeeze\.json"),
    (lambda f: (f / "squeeze.json").write_text("{"), "is not a manifest"),
    (lambda f: newer(f), "newer than this squeeze"),
    (lambda f: other_plan(f), "plans in config.json and squeeze.json differ"),
], ids=DAMAGES)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path: Path, damage, words: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint[0], folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        squeeze.load(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def newer(folder: Path) -> None:
    manifest = json.loads((folder / "squeeze.json").read_text())
    (folder / "squeeze.json").write_text(json.dumps({**manifest, "format_version": 99}))


def other_plan(folder: Path) -> None:
    manifest = json.loads((folder / "squeeze.json").read_text())
    manifest["plan"]["sink_tokens"] = 77
    (folder / "squeeze.json").write_text(json.dumps(manifest))


def test_a_finished_folder_is_refused_without_overwrite_before_any_work(checkpoint, source):
    output, _ = checkpoint
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"is not empty.*--overwrite"):
        squeeze.run(RECIPE, source, output)
    assert time.monotonic() - started < 1


def test_overwrite_replaces_a_run_and_nothing_else(source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    squeeze.run({}, source, output, evaluate=False)
    squeeze.run({}, source, output, evaluate=False, overwrite=True)
    assert squeeze.load(output) is not None
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("all I have")
    with pytest.raises(CheckpointError, match="did not write"):
        squeeze.run({}, source, foreign, evaluate=False, overwrite=True)
    assert (foreign / "thesis.txt").exists()


@pytest.mark.parametrize("seconds", [4.0, 7.0, 9.0])
def test_a_killed_run_leaves_no_output_and_running_again_finishes(
    source: Path, tmp_path: Path, seconds: float, checkpoint
) -> None:
    output = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    code = f"import squeeze; squeeze.run({str(recipe)!r}, {str(source)!r}, {str(output)!r}, evaluate=False)"  # noqa: E501
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # Killed between the output's appearance and the removal of the work, it leaves the latter.
    finished = output.exists()
    if not finished:
        squeeze.run(recipe, source, output, evaluate=False)
    assert torch.equal(logits(squeeze.load(output)), logits(checkpoint[1].model))
    assert finished or not list(tmp_path.glob(".*.partial"))


def test_work_of_another_recipe_is_discarded(source: Path, tmp_path: Path, checkpoint) -> None:
    output = tmp_path / "out"
    work = tmp_path / ".out.partial"
    (work / "weights").mkdir(parents=True)
    (work / "key.json").write_text("{}")
    (work / "weights" / "stale.safetensors").write_bytes(b"stale")
    squeeze.run(RECIPE, source, output, evaluate=False)
    assert torch.equal(logits(squeeze.load(output)), logits(checkpoint[1].model))


def test_compressed_tensors_reads_the_export_to_the_same_weights(checkpoint, tmp_path) -> None:
    output, result = checkpoint
    target = api.export(output, "compressed-tensors", tmp_path / "ct")
    ids = tiny.prompt(1, 30)["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    from squeeze.kernels.lut_linear.reference import reconstruct

    loaded(ids)  # the library decompresses at the first forward
    for name, weight in result.artifacts.weights.items():
        dense = loaded.get_submodule(name).weight
        assert torch.equal(dense, reconstruct(weight).to(dense.dtype))


def test_missing_models_and_tokenizers_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model '/nowhere'.*no config.json"):
        squeeze.run("kv4", "/nowhere")
    bare = tmp_path / "bare"
    tiny.model("llama").save_pretrained(bare)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        squeeze.run({}, bare)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        squeeze.run({}, broken, evaluate=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match=r"torch sees no GPU.*Leave --device out"):
        squeeze.run("kv4", device="cuda")
    with pytest.raises(DeviceError, match="got 'gpu'"):
        squeeze.run("kv4", device="gpu")


def test_every_error_is_ours() -> None:
    assert issubclass(CheckpointError, SqueezeError)
    assert squeeze.SqueezeError is SqueezeError


def test_submodules_do_not_shadow_the_public_functions() -> None:
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(squeeze.__path__, "squeeze."):
        if not module.name.endswith((".triton", ".harness", ".documents")) and (
            ".tiles" not in module.name
        ):
            importlib.import_module(module.name)
    assert callable(squeeze.run)
    assert callable(squeeze.load)
    assert callable(squeeze.swap)
    assert callable(squeeze.evaluate)
