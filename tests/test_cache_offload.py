"""Packed blocks in CPU memory: the same numbers, one layer ahead, encoded once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import squeeze
from squeeze import api
from squeeze import recipe as recipe_module
from squeeze.cache.offload import Prefetcher
from squeeze.errors import RecipeError
from squeeze.plan import Plan
from tests import tiny
from tests.test_cache import RECIPE, squeezed

OFFLOAD = {"kv_cache": {**RECIPE["kv_cache"], "offload": True}}
GREEDY = {"max_new_tokens": 40, "do_sample": False}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("settings", [GREEDY, {**GREEDY, "num_beams": 3}], ids=["greedy", "beam"])
def test_an_offloaded_cache_generates_the_same(name: str, settings: Any) -> None:
    inputs = tiny.prompt(2, 90, pads=(7,))
    ours = squeezed(name, OFFLOAD).model.generate(**inputs, **settings)
    theirs = squeezed(name).model.generate(**inputs, **settings)
    assert torch.equal(ours, theirs)


def test_generate_may_ask_for_offloading_itself() -> None:
    result = squeezed("llama")
    inputs = tiny.prompt(2, 90)
    settings = {**GREEDY, "return_dict_in_generate": True}
    ours = result.model.generate(**inputs, **settings, cache_implementation="offloaded")
    theirs = result.model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.past_key_values.host_nbytes > 0 == theirs.past_key_values.host_nbytes


@torch.no_grad()
def test_each_layer_arrives_once_a_step_and_one_layer_ahead(monkeypatch: Any) -> None:
    result = squeezed("llama", OFFLOAD, num_hidden_layers=3)
    ids = tiny.prompt(1, 100)["input_ids"]
    events: list[tuple[str, int, int]] = []
    copy_in, fetch = Prefetcher._copy, Prefetcher.fetch

    def copying(self: Prefetcher, index: int, slot: int) -> Any:
        events.append(("copy", index, slot))
        return copy_in(self, index, slot)

    def fetching(self: Prefetcher, layer: Any) -> Any:
        events.append(("read", self.layers.index(layer), -1))
        return fetch(self, layer)

    monkeypatch.setattr(Prefetcher, "_copy", copying)
    monkeypatch.setattr(Prefetcher, "fetch", fetching)
    cache = result.model(ids, use_cache=True).past_key_values
    assert not events  # a first call reads nothing back
    for token in ids[0, :2]:
        result.model(token.view(1, 1), past_key_values=cache)
    first = [("read", 0, -1), ("copy", 0, 0), ("copy", 1, 1), ("read", 1, -1), ("copy", 2, 0)]
    first += [("read", 2, -1), ("copy", 0, 1)]
    second = [("read", 0, -1), ("copy", 1, 0), ("read", 1, -1), ("copy", 2, 1), ("read", 2, -1)]
    assert events == [*first, *second, ("copy", 0, 0)]


@torch.no_grad()
def test_every_block_is_encoded_once() -> None:
    result = squeezed("llama", OFFLOAD)
    ids = tiny.prompt(1, 200)["input_ids"]
    cache = result.model(ids[:, :100], use_cache=True).past_key_values
    layer = cache.packed_layers[0]
    first = layer.key_blocks.merged(2)["codes"]
    where = layer.key_blocks.segments[0]["codes"].data_ptr()
    for t in range(100, 200):
        result.model(ids[:, t : t + 1], past_key_values=cache)
    assert layer.blocks == [6]
    assert torch.equal(layer.key_blocks.merged(2)["codes"], first)
    assert layer.key_blocks.segments[0]["codes"].data_ptr() == where


@torch.no_grad()
def test_the_bytes_say_what_lies_where() -> None:
    recipe = {"kv_cache": {**OFFLOAD["kv_cache"], "residual_length": 64}}
    result = squeeze.run(recipe, tiny.model("llama", max_position_embeddings=4096), evaluate=False)
    ids = tiny.prompt(1, 2048)["input_ids"]
    cache = result.model(ids, use_cache=True).past_key_values
    result.model(ids[:, :1], past_key_values=cache)
    plan = api.plan(recipe, tiny.model("llama"), context=2048)
    assert cache.host_nbytes == plan.kv_bytes["packed"]
    padding = cache.prefetcher.nbytes - 2 * plan.kv_bytes["largest_layer"]
    assert 0 <= padding < 2 * 6 * 256  # six components, aligned in each slot
    device = plan.kv_bytes["after"] - plan.kv_bytes["packed"] + 2 * plan.kv_bytes["largest_layer"]
    assert abs(cache.nbytes - cache.host_nbytes - device) <= 0.05 * device
    assert "in CPU memory; the device holds" in plan.table()
    assert "CPU memory" not in api.plan(RECIPE, tiny.model("llama")).table()


@torch.no_grad()
def test_a_copy_of_an_offloaded_cache_goes_its_own_way() -> None:
    result = squeezed("llama", OFFLOAD)
    ids = tiny.prompt(1, 140)["input_ids"]
    cache = result.model(ids, use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    assert other.prefetcher is other.packed_layers[0].prefetcher is not cache.prefetcher
    for token in (5, 6):
        ours = result.model(torch.tensor([[token]]), past_key_values=cache).logits
        theirs = result.model(torch.tensor([[token]]), past_key_values=other).logits
        assert torch.equal(ours, theirs)
    cache.reset()
    assert cache.host_nbytes == 0 and other.get_seq_length() == 142


def test_a_saved_prompt_goes_on_offloaded(tmp_path: Any) -> None:
    plain, moved = squeezed("llama").model, squeezed("llama", OFFLOAD).model
    ids = tiny.prompt(1, 140)["input_ids"]
    with torch.no_grad():
        cache = plain(ids, use_cache=True).past_key_values
        path = squeeze.save_prompt(cache, tmp_path / "p", tokens=ids, model=plain)
        prompt = squeeze.load_prompt(path, moved)
        ours = moved(ids[:, :1], past_key_values=prompt.cache).logits
        theirs = plain(ids[:, :1], past_key_values=cache).logits
    assert torch.equal(ours, theirs)
    assert prompt.cache.host_nbytes > 0


def test_the_recipe_key_is_strict_and_travels_with_the_plan() -> None:
    parsed = recipe_module.load(OFFLOAD)
    assert recipe_module.load(parsed.to_dict()) == parsed and parsed.kv_cache.offload
    plan = api.plan(OFFLOAD, tiny.model("llama"))
    assert Plan.from_dict(plan.to_dict()).offload
    assert recipe_module.schema()["properties"]["kv_cache"]["properties"]["offload"]
    recipe = {"kv_cache": {**RECIPE["kv_cache"], "offload": "cpu"}}
    with pytest.raises(RecipeError, match=r"kv_cache\.offload: got 'cpu'\. Allowed: true or false"):
        squeeze.run(recipe, tiny.model("llama"), evaluate=False)
