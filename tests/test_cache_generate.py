"""What generate() does with a packed cache beyond greedy decoding, and what a model reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import squeeze
from squeeze import api
from squeeze.errors import UnsupportedError
from tests import tiny
from tests.cache_content import dequantized
from tests.test_cache import RECIPE, reference_cache, squeezed

WIDE = {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 16}}
HYBRIDS = {"gemma2": [1], "gemma3": [1], "gpt_oss": [1], "qwen3_next": [1], "llama": [0, 1]}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2", "gpt_oss"])
@pytest.mark.parametrize("draft_too", [False, True], ids=["dense_draft", "squeezed_draft"])
def test_a_draft_model_equals_the_reference_with_the_same_calls(name: str, draft_too: bool) -> None:
    result, dense = squeezed(name, WIDE), tiny.model(name)
    # A draft that agrees often but not always: the same model with one weight matrix perturbed.
    drafts = [tiny.model(name) for _ in range(2)]
    for draft in drafts:
        torch.manual_seed(5)
        with torch.no_grad():
            weight = draft.get_output_embeddings().weight
            weight += 0.3 * weight.std() * torch.randn_like(weight)
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.num_assistant_tokens_schedule = "constant"
    ids = tiny.prompt(1, 80)["input_ids"]
    settings = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    if draft_too:
        drafts = [squeeze.run(WIDE, draft, evaluate=False).model for draft in drafts]
    ours = result.model.generate(ids, **settings, assistant_model=drafts[0])
    theirs = dense.generate(
        ids, **settings, assistant_model=drafts[1], past_key_values=reference_cache(result, 1)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert max(ours.past_key_values.packed_layers[0].blocks) >= 3


@torch.no_grad()
def test_a_crop_past_the_residual_raises_and_changes_nothing() -> None:
    model = squeezed("llama", WIDE).model
    inputs = tiny.prompt(2, 120, pads=(30,))
    cache = model(**inputs, use_cache=True).past_key_values
    layer = cache.packed_layers[0]
    assert (layer.blocks, layer.exact.counts.host) == ([2, 3], [26, 24])
    before = dequantized(layer)
    message = r"dropping 23 tokens reaches into packed blocks\. Allowed: up to 22 tokens now"
    with pytest.raises(UnsupportedError, match=message):
        cache.crop(-23)
    assert all(map(torch.equal, before, dequantized(layer)))
    assert cache.get_seq_length() == 120
    cache.crop(98)  # older transformers say what is to stay
    assert layer.exact.counts.host == layer.exact.counts.device.tolist() == [4, 2]
    step = model(inputs["input_ids"][:, 98:120], past_key_values=cache).logits
    assert step.shape[1] == 22 and layer.blocks == [2, 3]


@torch.no_grad()
def test_rows_may_be_reordered_repeated_and_selected() -> None:
    model = squeezed("llama").model
    inputs = tiny.prompt(3, 110, pads=(0, 20, 70))
    cache = model(**inputs, use_cache=True).past_key_values
    layer = cache.packed_layers[1]
    keys = dequantized(layer)[0]
    for change, order in (
        (lambda: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda: cache.batch_repeat_interleave(2), [2, 2, 0, 0, 0, 0]),
        (lambda: cache.batch_select_indices(torch.tensor([1, 2])), [2, 0]),
    ):
        change()
        assert torch.equal(dequantized(layer)[0], keys[order])
        assert layer.pads == [[0, 20, 70][row] for row in order]
        assert layer.block_counts.device.tolist() == layer.blocks
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    step = model(torch.full((2, 1), 7), attention_mask=mask[[2, 0]], past_key_values=cache)
    fresh = model(**inputs, use_cache=True).past_key_values
    whole = model(torch.full((3, 1), 7), attention_mask=mask, past_key_values=fresh)
    assert torch.allclose(step.logits, whole.logits[[2, 0]], atol=1e-5)


def test_returned_sequences_equal_the_rows_of_a_repeated_batch() -> None:
    model = squeezed("llama").model
    inputs = tiny.prompt(2, 70, pads=(0, 9))
    settings = {"max_new_tokens": 38, "do_sample": True, "top_k": 5}
    torch.manual_seed(3)
    ours = model.generate(**inputs, **settings, num_return_sequences=3)
    torch.manual_seed(3)
    repeated = {name: x.repeat_interleave(3, 0) for name, x in inputs.items()}
    assert torch.equal(ours, model.generate(**repeated, **settings))


def test_returned_beams_equal_the_reference() -> None:
    result, dense = squeezed("llama"), tiny.model("llama")
    inputs = tiny.prompt(2, 70, pads=(0, 9))
    settings = {"max_new_tokens": 38, "do_sample": False, "num_beams": 4, "num_return_sequences": 3}
    ours = result.model.generate(**inputs, **settings)
    cache = reference_cache(result, 8, (0, 0, 0, 0, 9, 9, 9, 9))
    assert torch.equal(ours, dense.generate(**inputs, **settings, past_key_values=cache))


def vision_language() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**tiny.COMMON, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_a_vision_language_model_packs_its_text_decoder(settings: Any) -> None:
    result, dense = squeeze.run(RECIPE, vision_language(), evaluate=False), vision_language()
    inputs = tiny.prompt(2, 90, pads=(7,))
    inputs["input_ids"].clamp_(max=119)  # no image and video tokens
    settings = {"max_new_tokens": 40, "do_sample": False, **settings}
    ours = result.model.generate(**inputs, **settings)
    rows = 2 * settings.get("num_beams", 1)
    cache = reference_cache(result, rows, (7,) * (rows // 2))
    assert torch.equal(ours, dense.generate(**inputs, **settings, past_key_values=cache))


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_a_model_says_which_layers_are_packed(name: str) -> None:
    result = squeezed(name)
    with torch.no_grad():
        cache = result.model(tiny.prompt(1, 40)["input_ids"], use_cache=True).past_key_values
    packed = HYBRIDS[name]
    assert [i for i, layer in enumerate(cache.layers) if layer in cache.packed_layers] == packed
    assert f"{len(packed)} of 2 layers packed: {packed}, 40 tokens" in repr(cache)
    reported = {row["layer"] for row in result.plan.to_dict()["kv_cache"] if row["keys"]}
    assert reported == set(packed)
    kind = {"llama": "", "qwen3_next": "linear"}.get(name, "sliding")
    table = api.plan(RECIPE, tiny.model(name)).table()
    note = f"KV cache of layers 0 stays dense: {kind} attention keeps its own cache"
    assert (note in table) == (packed == [1])
