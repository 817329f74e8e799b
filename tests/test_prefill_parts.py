"""Prefill policies over the parts of a prompt, and over a cache that packed the earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import squeeze
from squeeze import registry
from tests import tiny
from tests.test_cache import RECIPE as CACHE
from tests.test_cache import DequantizedLayer

NAMES = registry.names("prefill")
PARTS = (1300, 1700, 1702, 2000)  # the third is decode


SMALL = {"vertical_slash": {"verticals": 300, "slashes": 256}}


def squeezed(policy: dict[str, Any], packed: bool) -> Any:
    recipe: dict[str, Any] = {"attention": {"prefill": {"min_length": 128, **policy}}}
    recipe |= CACHE if packed else {}
    return squeeze.run(recipe, tiny.model("llama"), evaluate=False).model


def in_parts(model: Any, inputs: Any, cache: Any) -> tuple[torch.Tensor, list[float]]:
    """Run the parts over one cache; return the logits and each part's mean density."""
    logits, densities, first = [], [], 0
    for end in PARTS:
        ids, mask = inputs["input_ids"][:, first:end], inputs["attention_mask"][:, :end]
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, first = out.past_key_values, end
        logits.append(out.logits)
        rows = model.squeeze_statistics()["density"]
        densities.append(sum(map(sum, rows)) / sum(map(len, rows)))
    return torch.cat(logits, 1), densities


@pytest.mark.parametrize("name", NAMES)
def test_parts_over_a_packed_cache_equal_the_reference_with_the_same_calls(name: str) -> None:
    inputs, pads = tiny.prompt(2, PARTS[-1], pads=(0, 130)), [0, 130]
    ours = squeezed({"method": name, **SMALL.get(name, {})}, packed=True)
    logits, densities = in_parts(ours, inputs, None)
    theirs = squeezed({"method": name, **SMALL.get(name, {})}, packed=False)
    cache = DynamicCache(config=theirs.config)
    for i, state in ours.squeeze_swap.states.items():
        cache.layers[i] = DequantizedLayer(state.spec(), pads)
    expected, same = in_parts(theirs, inputs, cache)
    for row, pad in enumerate(pads):
        error = (logits[row, pad:] - expected[row, pad:]).abs().max()
        assert error <= 1e-4 * expected.abs().max()
    assert densities == pytest.approx(same, abs=1e-9)
    assert densities[2] == 1.0
    assert name in ("custom", "retrieval_heads") or densities[3] < 1.0


def test_a_full_mask_over_a_packed_cache_is_what_the_cache_attends() -> None:
    inputs = tiny.prompt(2, PARTS[-1], pads=(0, 130))
    policy = {"method": "custom"}
    logits, _ = in_parts(squeezed(policy, packed=True), inputs, None)
    dense = squeeze.run(CACHE, tiny.model("llama"), evaluate=False).model
    expected, _ = in_parts(dense, inputs, None)
    assert (logits[0] - expected[0]).abs().max() <= 1e-4 * expected.abs().max()
    assert (logits[1, 130:] - expected[1, 130:]).abs().max() <= 1e-4 * expected.abs().max()


def test_parts_equal_the_whole_where_lists_are_local() -> None:
    inputs = tiny.prompt(1, 860)
    model = squeezed({"method": "streaming", "window_size": 128}, packed=False)
    cache, logits, first = None, [], 0
    for end in (320, 640, 860):
        out = model(inputs["input_ids"][:, first:end], past_key_values=cache, use_cache=True)
        cache, first = out.past_key_values, end
        logits.append(out.logits)
    assert model.squeeze_statistics()["density"][0][0] < 0.6
    whole = model(inputs["input_ids"]).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_cache_with_room_to_fill_stays_dense() -> None:
    model = squeezed({"method": "streaming", "window_size": 64}, packed=False)
    ids = tiny.prompt(1, 400)["input_ids"]
    static = model.generate(ids, max_new_tokens=2, cache_implementation="static", do_sample=False)
    dense = tiny.model("llama").generate(
        ids, max_new_tokens=2, cache_implementation="static", do_sample=False
    )
    assert torch.equal(static, dense)
