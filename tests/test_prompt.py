"""Compressed prompts on disk: going on from a file is going on from memory, bit for bit."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import squeeze
from squeeze.errors import CheckpointError, UnsupportedError
from squeeze.prompt import HEADER
from squeeze.prompt_identity import weights_checksum
from tests import tiny
from tests.cache_content import dequantized
from tests.test_cache import RECIPE, squeezed

HYBRIDS = ["llama", "gemma3", "gpt_oss", "qwen3_next"]


def prefilled(name: str = "llama", pads: tuple[int, ...] = (7,), length: int = 90):
    result = squeezed(name)
    inputs = tiny.prompt(2, length, pads=pads)
    with torch.no_grad():
        cache = result.model(**inputs, use_cache=True).past_key_values
    return result.model, cache, inputs


def go_on(model: Any, cache: Any, inputs: Any) -> Any:
    longer = torch.cat([inputs["input_ids"], tiny.prompt(2, 5, seed=9)["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    return model.generate(
        longer,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def header(path: Any) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[HEADER])


@pytest.mark.parametrize("name", HYBRIDS)
def test_going_on_after_loading_equals_going_on_without(name: str, tmp_path: Any) -> None:
    model, cache, inputs = prefilled(name)
    path = squeeze.save_prompt(
        cache, tmp_path / "prompt.safetensors", tokens=inputs["input_ids"], model=model
    )
    prompt = squeeze.load_prompt(path, model, tokens=inputs["input_ids"])
    assert torch.equal(prompt.tokens, inputs["input_ids"])
    assert torch.equal(prompt.attention_mask, inputs["attention_mask"])
    ours, theirs = (go_on(model, x, inputs) for x in (prompt.cache, cache))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert max(prompt.cache.packed_layers[0].blocks) == 3


def test_a_saved_prompt_holds_the_packed_bytes_and_nothing_foreign(tmp_path: Any) -> None:
    model, cache, inputs = prefilled(pads=(40,))
    path = squeeze.save_prompt(cache, tmp_path / "a", tokens=inputs["input_ids"], model=model)
    again = squeeze.save_prompt(cache, tmp_path / "b", tokens=inputs["input_ids"], model=model)
    assert path.read_bytes() == again.read_bytes()
    saved, layer = load_file(path), cache.packed_layers[0]
    assert layer.blocks == [1, 2]
    codes = saved["layers.0.keys.codes"]
    assert torch.equal(codes[:, 1], layer.key_blocks.segments[0]["codes"][:2, 1])
    assert not codes[1, 0].any() and codes[0, 0].any()
    assert path.stat().st_size < 1.1 * cache.nbytes + 16384  # the header names every setting
    assert not list(tmp_path.glob(".*"))


def test_copies_of_a_loaded_prompt_serve_several_continuations(tmp_path: Any) -> None:
    model, cache, inputs = prefilled()
    path = squeeze.save_prompt(cache, tmp_path / "p", tokens=inputs["input_ids"], model=model)
    prompt = squeeze.load_prompt(path, model)
    first, second = (go_on(model, copy.deepcopy(prompt.cache), inputs) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    assert prompt.cache.get_seq_length() == 90


def test_a_generated_sequence_saves_all_that_the_cache_saw(tmp_path: Any) -> None:
    model, _, inputs = prefilled()
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    path = squeeze.save_prompt(
        out.past_key_values, tmp_path / "p", tokens=out.sequences, model=model
    )
    prompt = squeeze.load_prompt(path, model)
    assert torch.equal(prompt.tokens, out.sequences[:, :-1])


def test_a_checkpoint_loads_the_prompts_of_the_run_that_wrote_it(tmp_path: Any) -> None:
    result = squeeze.run(RECIPE, "reference", tmp_path / "out", evaluate=False)
    ids = torch.arange(3, 83).view(1, 80)
    with torch.no_grad():
        cache = result.model(ids, use_cache=True).past_key_values
    path = squeeze.save_prompt(cache, tmp_path / "p", tokens=ids, model=result.model)
    prompt = squeeze.load_prompt(path, squeeze.load(tmp_path / "out"))
    ours, theirs = (dequantized(x.packed_layers[3]) for x in (prompt.cache, cache))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.fixture
def saved(tmp_path: Any):
    model, cache, inputs = prefilled()
    path = squeeze.save_prompt(cache, tmp_path / "p", tokens=inputs["input_ids"], model=model)
    return path, model, inputs["input_ids"]


def test_another_model_is_refused(saved: Any) -> None:
    path, model, _ = saved
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match="another model: its weights differ"):
        squeeze.load_prompt(path, model)
    other = squeeze.run(RECIPE, tiny.model("llama", rms_norm_eps=1e-3), evaluate=False).model
    with pytest.raises(CheckpointError, match=r"configuration differ in rms_norm_eps\. Allowed"):
        squeeze.load_prompt(path, other)


def test_clustered_weights_are_part_of_the_model(tmp_path: Any) -> None:
    weights = [{"method": "kmeans", "importance": "none", "targets": ["self_attn"]}]
    model = squeezed("llama", {**RECIPE, "weights": weights}).model
    ids = tiny.prompt(1, 80)["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    path = squeeze.save_prompt(cache, tmp_path / "p", tokens=ids, model=model)
    assert squeeze.load_prompt(path, model).cache.get_seq_length() == 80
    model.model.layers[0].self_attn.v_proj.codebook[0, 0] += 1
    with pytest.raises(CheckpointError, match="another model: its weights differ"):
        squeeze.load_prompt(path, model)


def test_other_settings_are_refused(saved: Any) -> None:
    path, _, _ = saved
    recipe = {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 6}}
    with pytest.raises(CheckpointError, match="another cache: the settings of its layers differ"):
        squeeze.load_prompt(path, squeezed("llama", recipe).model)
    policy = {"method": "vertical_slash", "min_length": 512}
    with pytest.raises(CheckpointError, match="another prefill policy"):
        squeeze.load_prompt(
            path, squeezed("llama", {**RECIPE, "attention": {"prefill": policy}}).model
        )
    with pytest.raises(UnsupportedError, match="packs no cache"):
        squeeze.load_prompt(path, tiny.model("llama"))


def test_other_tokens_are_refused(saved: Any) -> None:
    path, model, ids = saved
    squeeze.load_prompt(path, model, tokens=torch.cat([ids, ids], 1))
    other = ids.clone()
    other[1, 33] = (other[1, 33] + 1) % 128
    with pytest.raises(CheckpointError, match=f"id {int(ids[1, 33])} in row 1 at 33, got"):
        squeeze.load_prompt(path, model, tokens=other)
    with pytest.raises(CheckpointError, match=r"\[2, 90\] ids, got \[2, 80\]"):
        squeeze.load_prompt(path, model, tokens=ids[:, :80])


def test_damaged_files_are_refused(saved: Any) -> None:
    path, model, _ = saved
    whole, facts = path.read_bytes(), header(path)
    # Copies: load_file's tensors are windows on the file.
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="content is not what its header says"):
        squeeze.load_prompt(path, model)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        squeeze.load_prompt(path, model)
    save_file(tensors, path, metadata={HEADER: json.dumps({**facts, "format_version": 2})})
    with pytest.raises(CheckpointError, match="prompt format 2 is newer"):
        squeeze.load_prompt(path, model)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is not a compressed prompt"):
        squeeze.load_prompt(path, model)
    with pytest.raises(CheckpointError, match="no such file"):
        squeeze.load_prompt(path.with_name("absent"), model)


def test_what_cannot_be_saved_is_refused(saved: Any, tmp_path: Any) -> None:
    path, model, ids = saved
    cache = squeeze.load_prompt(path, model).cache
    with pytest.raises(CheckpointError, match="exists"):
        squeeze.save_prompt(cache, path, tokens=ids, model=model)
    squeeze.save_prompt(cache, path, tokens=ids, model=model, overwrite=True)
    with pytest.raises(UnsupportedError, match=r"got ids of shape \[2, 89\]"):
        squeeze.save_prompt(cache, tmp_path / "q", tokens=ids[:, :-1], model=model)
    stock = tiny.model("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="got a DynamicCache"):
        squeeze.save_prompt(stock, tmp_path / "q", tokens=ids, model=model)
    assert not (tmp_path / "q").exists()


def test_a_checksum_sees_values_order_and_dtype() -> None:
    model = torch.nn.Linear(3, 5)
    sums = {weights_checksum(model)}
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    sums.add(weights_checksum(model))
    with torch.no_grad():
        model.bias[0] = torch.nextafter(model.bias[0], torch.tensor(9.0))
    sums.add(weights_checksum(model))
    sums.add(weights_checksum(model.to(torch.bfloat16)))
    assert len(sums) == 4
