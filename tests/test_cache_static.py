"""The static cache: the arithmetic of the growing one, in place, in a step that can be recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import squeeze
from squeeze.cache import StaticPackedCache
from squeeze.cache.blocks import BlockStorage
from squeeze.errors import UnsupportedError
from tests import tiny
from tests.cache_content import dequantized
from tests.test_cache import RECIPE, squeezed

FULL = ["llama", "mistral", "qwen3", "phi3", "gpt_neox", "opt", "gpt2", "mixtral"]
LOGITS = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def tensors_of(cache: StaticPackedCache) -> Iterator[Tensor]:
    for layer in cache.static_layers:
        yield from (layer.exact.keys, layer.exact.values)
        yield from (layer.exact.counts.device, layer.block_counts.device)
        for storage in (layer.key_blocks, layer.value_blocks):
            yield from (x for segment in storage.segments for x in segment.values())


def places(cache: StaticPackedCache) -> list[tuple[int, torch.Size]]:
    return [(x.data_ptr(), x.shape) for x in tensors_of(cache)]


@pytest.mark.parametrize("name", FULL)
def test_it_generates_bit_for_bit_what_the_growing_cache_does(name: str) -> None:
    model = squeezed(name).model
    inputs = tiny.prompt(2, 90, pads=(7,))
    theirs = model.generate(**inputs, **LOGITS, max_new_tokens=60)
    cache = squeeze.static_cache(model, 150)
    ours = model.generate(**inputs, **LOGITS, max_new_tokens=60, past_key_values=cache)
    assert ours.past_key_values is cache
    assert cache.static_layers[0].blocks == [4, 4]
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


@torch.no_grad()
def test_no_tensor_moves_or_changes_shape_between_steps() -> None:
    model = squeezed("llama").model
    inputs = tiny.prompt(3, 60, pads=(0, 9, 31))
    cache = squeeze.static_cache(model, 200)
    mask = inputs["attention_mask"]
    model(**inputs, past_key_values=cache)
    before, held = places(cache), cache.nbytes
    for t in range(100):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        model(torch.full((3, 1), 3 + t), attention_mask=mask, past_key_values=cache)
        assert places(cache) == before
    assert cache.static_layers[0].blocks == [4, 4, 3]
    assert cache.nbytes == held
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-4)
    cache.reset()
    assert places(cache) == before and cache.get_seq_length() == 0


class Operators(TorchDispatchMode):
    """Note every operator with the shapes it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        shapes = [str(tuple(x.shape)) for x in flat if isinstance(x, Tensor)]
        self.seen.append((str(func), *shapes))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_recorded_step_asks_the_device_nothing_and_repeats_the_same_operators() -> None:
    model = squeezed("llama").model
    inputs = tiny.prompt(2, 69, pads=(7,))
    cache = squeeze.static_cache(model, 150)
    model(**inputs, past_key_values=cache)
    token, position = torch.full((2, 1), 5), torch.tensor([[62], [69]])
    steps = []
    with cache.recording():
        for _ in range(40):
            with Operators() as operators:
                model(token, position_ids=position, past_key_values=cache)
            steps.append(operators.seen)
            cache.advance()
    assert cache.static_layers[0].blocks == [2, 3]
    assert all(step == steps[0] for step in steps)
    # Reading a number, counting what a mask selects, or bringing host data into the step.
    banned = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_same_size")
    assert not [name for name, *_ in steps[0] if any(word in name for word in banned)]


@torch.no_grad()
def test_a_replayed_trace_generates_what_the_growing_cache_does() -> None:
    model = squeezed("llama").model
    inputs = tiny.prompt(2, 60, pads=(9,))
    expected = model.generate(**inputs, **LOGITS, max_new_tokens=70)
    cache = squeeze.static_cache(model, 140)
    # As generate() numbers them: keys are stored rotated, so equal rows need equal positions.
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, past_key_values=cache).logits[:, -1]
    token, position = logits.argmax(-1, keepdim=True), torch.tensor([[51], [60]])

    def step(token: Tensor, position: Tensor) -> Tensor:
        return model(token, position_ids=position, past_key_values=cache).logits[:, -1]

    with cache.recording():
        step(token, position)  # a warm-up, which must leave no trace
        cache.rewind()
        replay = make_fx(step)(token, position)
    found = [token]
    for t in range(69):
        logits = replay(token, position + t)
        cache.advance()
        assert (logits - expected.logits[t + 1]).abs().max() < 1e-4 * logits.abs().max()
        token = logits.argmax(-1, keepdim=True)
        found.append(token)
    assert cache.static_layers[0].blocks == [3, 3]
    assert torch.equal(torch.cat(found, 1), expected.sequences[:, 60:])


@torch.no_grad()
def test_steps_of_several_tokens_may_be_recorded_and_cropped() -> None:
    model = squeezed("llama", {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 16}}).model
    ids = tiny.prompt(2, 200)["input_ids"]
    cache = squeeze.static_cache(model, 200, step_tokens=4)
    grown = model(ids[:, :60], use_cache=True).past_key_values
    model(ids[:, :60], past_key_values=cache)
    before = places(cache)
    for start in range(60, 150, 3):
        now = ids[:, start : start + 4]
        expected = model(now, past_key_values=grown).logits
        with cache.recording():
            ours = model(
                now, position_ids=torch.arange(start, start + 4)[None], past_key_values=cache
            ).logits
        model(now, past_key_values=cache)  # leaving the context forgot the step
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
        cache.crop(-1)
        grown.crop(-1)
    assert places(cache) == before
    for ours, theirs in zip(cache.static_layers, grown.packed_layers, strict=True):
        assert ours.blocks == theirs.blocks == [4, 4]
        assert all(map(torch.allclose, dequantized(ours), dequantized(theirs)))


@torch.no_grad()
def test_reset_serves_another_prompt_and_a_copy_goes_its_own_way(tmp_path: Any) -> None:
    model = squeezed("llama").model
    first, second = (tiny.prompt(2, 80, seed=seed)["input_ids"] for seed in (1, 2))
    cache = squeeze.static_cache(model, 120)
    model(first, past_key_values=cache)
    other = copy.deepcopy(cache)
    cache.reset()
    ours = model(second, past_key_values=cache), model(second[:, :1], past_key_values=cache)
    new = model(second, use_cache=True).past_key_values
    assert torch.equal(ours[1].logits, model(second[:, :1], past_key_values=new).logits)
    path = squeeze.save_prompt(other, tmp_path / "p", tokens=first, model=model)
    empty = squeeze.static_cache(model, 120)
    loaded = squeeze.load_prompt(path, model, into=empty).cache
    assert loaded is empty
    step = {"input_ids": first[:, :1]}
    assert torch.equal(
        model(**step, past_key_values=loaded).logits, model(**step, past_key_values=other).logits
    )
    with pytest.raises(UnsupportedError, match="holds 81 tokens"):
        squeeze.load_prompt(path, model, into=loaded)


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    model = squeezed("llama").model
    ids = tiny.prompt(2, 50)["input_ids"]
    cache = squeeze.static_cache(model, 50)
    with pytest.raises(UnsupportedError, match="the cache is empty"), cache.recording():
        pass
    model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="50 tokens and 1 more do not fit"):
        model(ids[:, :1], past_key_values=cache)
    cache.crop(-5)
    with pytest.raises(UnsupportedError, match=r"got 1 rows\. Allowed: 2"):
        model(ids[:1, :1], past_key_values=cache)
    with (
        pytest.raises(UnsupportedError, match="a call of 2 tokens"),
        cache.recording(),
    ):
        model(ids[:, :2], position_ids=torch.arange(45, 47)[None], past_key_values=cache)
    with pytest.raises(UnsupportedError, match="cannot go from 2 rows to 4"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedError, match=r"layers \[0\] keep their own cache"):
        squeeze.static_cache(squeezed("gemma3").model, 50)
    offload = {"kv_cache": {**RECIPE["kv_cache"], "offload": True}}
    with pytest.raises(UnsupportedError, match=r"kv_cache\.offload is on"):
        squeeze.static_cache(squeezed("llama", offload).model, 50)
    with pytest.raises(UnsupportedError, match="max_length: got 0"):
        squeeze.static_cache(model, 0)
    with pytest.raises(UnsupportedError, match="packs no cache"):
        squeeze.static_cache(tiny.model("llama"), 50)


def test_tables_of_addresses_stay_where_they_are_while_blocks_are_added() -> None:
    storage = BlockStorage(addressed=True)
    storage.grow(1, {"codes": torch.zeros(1, 2, 3)})
    storage.reserve_addresses(40)
    assert storage.addresses is not None
    table = storage.addresses["codes"]
    assert table.shape == (40,)
    for blocks in range(2, 41):
        storage.grow(blocks, storage.segments[0])
        assert storage.addresses["codes"] is table
        starts = [x["codes"].data_ptr() + i * 24 for x, _, n in storage.spans() for i in range(n)]
        assert table[:blocks].tolist() == starts
    storage.grow(41, storage.segments[0])
    assert torch.equal(storage.addresses["codes"][:40], table)
    assert copy.deepcopy(storage).reach == 40
