"""The packed cache against a cache that stores dequantized values, and its own bookkeeping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

import squeeze
from squeeze import api
from squeeze.cache import PackedCache, PackedLayer
from squeeze.errors import UnsupportedError
from tests import tiny
from tests.cache_content import dequantized

RECIPE = {
    "kv_cache": {
        "keys": {"method": "affine", "bits": 4, "granularity": "channel", "group_size": 32},
        "values": {"method": "affine", "bits": 4, "granularity": "token", "group_size": 16},
        "sink_tokens": 2,
        "residual_length": 5,
        "block_length": 32,
    }
}


class DequantizedLayer(DynamicLayer):
    """What a packed layer stands for, written without blocks, buffers or handles.

    Row by row it holds every real token; before each call it rounds the tokens that are due.
    """

    def __init__(self, spec: Any, pads: list[int]) -> None:
        super().__init__()
        self.spec, self.pads, self.rounded = spec, pads, [0] * len(pads)

    def update(self, key_states, value_states, *args, **kwargs):
        super().update(key_states, value_states)
        keys, values = self.keys.clone(), self.values.clone()
        self._round()
        return keys, values

    def _round(self) -> None:
        spec, total = self.spec, self.keys.shape[2]
        for row, pad in enumerate(self.pads):
            due = (total - pad - spec.sink_tokens - spec.residual_length) // spec.block_length
            while self.rounded[row] < due:
                start = pad + spec.sink_tokens + self.rounded[row] * spec.block_length
                span = slice(start, start + spec.block_length)
                for side, store in ((spec.keys, self.keys), (spec.values, self.values)):
                    x = store[row, :, span]
                    store[row, :, span] = side.decode(side.encode(x)).to(x.dtype)
                self.rounded[row] += 1

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.pads = [self.pads[i] for i in beam_idx.tolist()]
        self.rounded = [self.rounded[i] for i in beam_idx.tolist()]


def squeezed(name: str, recipe: Any = RECIPE, **extra: Any):
    return squeeze.run(recipe, tiny.model(name, **extra), evaluate=False)


def reference_cache(result: Any, batch: int, pads: tuple[int, ...] = ()) -> DynamicCache:
    """A stock cache of the dense model whose full-attention layers round what is due."""
    config = result.model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    states = result.model.squeeze_swap.states
    rows = list(pads) + [0] * (batch - len(pads))
    for i, state in states.items():
        if state.kv is not None:
            cache.layers[i] = DequantizedLayer(state.spec(), rows)
    return cache


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_greedy_generation_equals_the_dequantized_reference(name: str) -> None:
    result = squeezed(name)
    dense = tiny.model(name)
    inputs = tiny.prompt(2, 90, pads=(7,))
    settings = {
        "max_new_tokens": 40,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ours = result.model.generate(**inputs, **settings)
    theirs = dense.generate(**inputs, **settings, past_key_values=reference_cache(result, 2, (7,)))
    packed = [x for x in ours.past_key_values.layers if isinstance(x, PackedLayer)]
    assert packed and all(max(layer.blocks) >= 3 for layer in packed)
    assert torch.equal(ours.sequences, theirs.sequences)
    ours_logits, their_logits = torch.stack(ours.logits), torch.stack(theirs.logits)
    scale = their_logits.abs().max()
    assert (ours_logits - their_logits).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    ],
    ids=["beam", "sample"],
)
def test_beams_and_samples_equal_the_dequantized_reference(name: str, settings: Any) -> None:
    result = squeezed(name)
    dense = tiny.model(name)
    inputs = tiny.prompt(2, 70, pads=(0, 9))
    rows = 2 * settings.get("num_beams", settings.get("num_return_sequences", 1))
    pads = tuple(p for p in (0, 9) for _ in range(rows // 2))
    torch.manual_seed(3)
    ours = result.model.generate(**inputs, max_new_tokens=38, **settings)
    torch.manual_seed(3)
    theirs = dense.generate(
        **inputs, max_new_tokens=38, **settings, past_key_values=reference_cache(result, rows, pads)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "qwen2", "gpt_oss"])
def test_prompt_lookup_equals_the_reference_with_the_same_calls(name: str) -> None:
    result = squeezed(name, {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 16}})
    dense = tiny.model(name)
    ids = tiny.prompt(1, 30)["input_ids"].repeat(1, 4)
    settings = {"max_new_tokens": 60, "do_sample": False, "prompt_lookup_num_tokens": 4}
    ours = result.model.generate(ids, **settings)
    theirs = dense.generate(ids, **settings, past_key_values=reference_cache(result, 1))
    assert torch.equal(ours, theirs)


def test_chunked_prefill_equals_the_reference_with_the_same_calls() -> None:
    result, dense = squeezed("llama"), tiny.model("llama")
    inputs = tiny.prompt(2, 100, pads=(40,))
    settings = {"max_new_tokens": 10, "do_sample": False, "prefill_chunk_size": 32}
    ours = result.model.generate(**inputs, **settings)
    theirs = dense.generate(**inputs, **settings, past_key_values=reference_cache(result, 2, (40,)))
    assert torch.equal(ours, theirs)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    result = squeezed("llama")
    inputs = tiny.prompt(3, 120, pads=(0, 33, 71))
    batch = result.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    for row, pad in enumerate((0, 33, 71)):
        alone = result.model.generate(
            inputs["input_ids"][row : row + 1, pad:], max_new_tokens=40, do_sample=False
        )
        assert torch.equal(alone[0, 120 - pad :], batch[row, 120:])


def test_forward_returns_a_packed_cache_that_the_next_call_takes() -> None:
    result = squeezed("llama")
    ids = tiny.prompt(1, 80)["input_ids"]
    first = result.model(ids, use_cache=True)
    cache = first.past_key_values
    assert isinstance(cache, PackedCache)
    assert cache.get_seq_length() == 80
    second = result.model(ids[:, :1], past_key_values=cache)
    assert second.past_key_values is cache
    assert cache.get_seq_length() == 81


def test_the_current_call_is_exact_and_earlier_calls_are_as_stored() -> None:
    result, dense = squeezed("llama"), tiny.model("llama")
    ids = tiny.prompt(1, 100)["input_ids"]
    assert torch.equal(result.model(ids).logits, dense(ids).logits)
    cache = result.model(ids[:, :70]).past_key_values
    keys, _ = dequantized(cache.layers[0])
    exact = dense(ids[:, :70], use_cache=True).past_key_values.layers[0].keys
    newest = RECIPE["kv_cache"]["residual_length"]
    assert torch.equal(keys[:, :, -newest:], exact[:, :, -newest:])
    assert torch.equal(keys[:, :, :2], exact[:, :, :2])
    assert not torch.equal(keys, exact)
    assert (keys - exact).abs().max() < 0.2 * exact.abs().max()


def test_allocated_bytes_follow_the_plan() -> None:
    recipe = {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 64}}
    model = tiny.model("llama", max_position_embeddings=4096)
    result = squeeze.run(recipe, model, evaluate=False)
    for length in (1024, 2048):
        cache = result.model(tiny.prompt(1, length)["input_ids"]).past_key_values
        planned = api.plan(recipe, tiny.model("llama"), context=length).kv_bytes["after"]
        assert abs(cache.nbytes - planned) <= 0.05 * planned


def test_decoding_grows_in_segments_that_stay_where_they_are() -> None:
    result = squeezed("llama")
    ids = tiny.prompt(1, 400)["input_ids"]
    cache = result.model(ids).past_key_values
    layer = cache.layers[0]
    before = [x.data_ptr() for s in layer.key_blocks.segments for x in s.values()]
    for step in range(300):
        result.model(ids[:, step : step + 1], past_key_values=cache)
    after = [x.data_ptr() for s in layer.key_blocks.segments for x in s.values()]
    assert after[: len(before)] == before
    assert layer.key_blocks.capacity * layer.spec.block_length <= 700 * (1 + 1 / 32)


def test_crop_inside_the_residual_works_and_beyond_it_raises() -> None:
    result = squeezed("llama")
    ids = tiny.prompt(1, 100)["input_ids"]
    cache = result.model(ids).past_key_values
    keys, _ = dequantized(cache.layers[0])
    cache.crop(-5)
    assert cache.get_seq_length() == 95
    assert torch.equal(dequantized(cache.layers[0])[0], keys[:, :, :95])
    with pytest.raises(UnsupportedError, match="reaches into packed blocks"):
        cache.crop(-80)


def test_masks_that_a_cache_cannot_honour_are_refused() -> None:
    result = squeezed("llama")
    inputs = tiny.prompt(2, 40)
    inputs["attention_mask"][0, 20] = 0
    with pytest.raises(UnsupportedError, match="zeros between ones"):
        result.model(**inputs)
    inputs = tiny.prompt(2, 40)
    inputs["attention_mask"][0, 30:] = 0
    cache = result.model(**inputs).past_key_values  # one call alone is fine
    with pytest.raises(UnsupportedError, match="padding_side"):
        result.model(inputs["input_ids"][:, :1], past_key_values=cache)


def test_other_caches_are_refused() -> None:
    result, dense = squeezed("llama"), tiny.model("llama")
    ids = tiny.prompt(1, 40)["input_ids"]
    filled = dense(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="Leave past_key_values"):
        result.model(ids[:, :1], past_key_values=filled)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_one_side_may_stay_lossless(side: str) -> None:
    recipe = {"kv_cache": {**RECIPE["kv_cache"], side: {"bits": 16}}}
    result, dense = squeezed("llama", recipe), tiny.model("llama")
    inputs = tiny.prompt(2, 90, pads=(7,))
    ours = result.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    cache = reference_cache(result, 2, (7,))
    theirs = dense.generate(**inputs, max_new_tokens=40, do_sample=False, past_key_values=cache)
    assert torch.equal(ours, theirs)


def test_transforms_compose_and_change_nothing_at_eight_bits() -> None:
    plain = {"method": "affine", "bits": 8, "granularity": "token", "group_size": 16}
    recipe = {
        "kv_cache": {
            **RECIPE["kv_cache"],
            "keys": {**plain, "transforms": ["hadamard"]},
            "values": {**plain, "transforms": ["hadamard"]},
        }
    }
    result, dense = squeezed("llama", recipe), tiny.model("llama")
    ids = tiny.prompt(1, 100)["input_ids"]
    cache = result.model(ids[:, :90]).past_key_values
    ours = result.model(ids[:, 90:], past_key_values=cache).logits
    stock = dense(ids[:, :90], use_cache=True).past_key_values
    theirs = dense(ids[:, 90:], past_key_values=stock).logits
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
