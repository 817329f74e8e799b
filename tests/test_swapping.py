"""The one mutation: what it changes, and that it leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import squeeze
from squeeze import api
from squeeze.attention import LayerState
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import UnsupportedError
from squeeze.linear import ClusteredLinear
from tests import tiny

RECIPE = {
    "weights": [{"method": "kmeans", "bits": 4, "importance": "none"}],
    "kv_cache": {
        "keys": {"method": "affine", "group_size": 16, "transforms": ["center"]},
        "values": {"method": "affine", "group_size": 16},
        "sink_tokens": 2,
        "residual_length": 8,
        "block_length": 32,
    },
    "attention": {"prefill": {"method": "streaming", "window_size": 64, "min_length": 128}},
}


def artifacts(model: nn.Module, recipe=RECIPE):
    plan = api.plan(recipe, model)
    stats = calibrate(model, tiny.prompt(2, 64)["input_ids"], set(plan.statistics), folder=None)
    return compress(model, plan, stats)


def test_swap_then_restore_is_bit_identical(llama) -> None:
    ids = tiny.prompt(2, 200)["input_ids"]
    before, state = llama(ids).logits, copy.deepcopy(llama.state_dict())
    names = {name for name, _ in llama.named_modules()}
    attributes = set(vars(llama))
    with squeeze.swap(llama, artifacts(llama)) as model:
        assert model is llama
        assert not torch.equal(model(ids).logits, before)
        assert any(isinstance(m, ClusteredLinear) for m in model.modules())
    assert torch.equal(llama(ids).logits, before)
    assert {name for name, _ in llama.named_modules()} == names
    assert set(vars(llama)) == attributes
    assert all(torch.equal(llama.state_dict()[k], v) for k, v in state.items())
    assert type(llama(ids).past_key_values).__name__ == "DynamicCache"
    assert llama.config._attn_implementation == "sdpa"


def test_swap_is_also_a_plain_function(llama) -> None:
    ids = tiny.prompt(1, 40)["input_ids"]
    before = llama(ids).logits
    done = squeeze.swap(llama, artifacts(llama))
    assert llama.squeeze_swap is done
    done.restore()
    assert torch.equal(llama(ids).logits, before)


def test_dense_weights_are_freed_on_request(llama) -> None:
    made = artifacts(llama)
    done = squeeze.swap(llama, made, keep_dense=False)
    linears = [n for n, m in llama.named_modules() if isinstance(m, nn.Linear)]
    assert linears == ["lm_head"]
    assert not done.modules
    with pytest.raises(UnsupportedError, match="were freed"):
        done.restore()


def test_a_squeezed_model_is_not_squeezed_again(llama) -> None:
    made = artifacts(llama)
    with squeeze.swap(llama, made), pytest.raises(UnsupportedError, match="already"):
        squeeze.swap(llama, made)


def test_another_model_is_refused_and_left_as_it_was(llama) -> None:
    made = artifacts(llama)
    other = tiny.model("llama", intermediate_size=80)
    ids = tiny.prompt(1, 40)["input_ids"]
    before = other(ids).logits
    with pytest.raises(UnsupportedError, match=r"an nn\.Linear of 96 x 64"):
        squeeze.swap(other, made)
    assert torch.equal(other(ids).logits, before)
    assert not any(isinstance(m, LayerState | ClusteredLinear) for m in other.modules())


@pytest.mark.parametrize("recipe", [
    {},
    {"kv_cache": {"keys": {"bits": 16}, "values": {"bits": 16}}},
    {"weights": [{"method": "kmeans", "bits": 16}]},
], ids=["dense", "kv16", "weights16"])  # fmt: skip
def test_lossless_settings_are_bit_identical_through_the_whole_flow(recipe, llama, tmp_path):
    inputs = tiny.prompt(2, 60, pads=(5,))
    before = llama(**inputs).logits
    tokens = llama.generate(**inputs, max_new_tokens=8, do_sample=False)
    result = squeeze.run(recipe, tiny.model("llama"), evaluate=False)
    assert torch.equal(result.model(**inputs).logits, before)
    assert torch.equal(result.model.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)


def test_statistics_tell_the_density_of_the_last_forward(llama) -> None:
    squeeze.swap(llama, artifacts(llama))
    ids = tiny.prompt(1, 1024)["input_ids"]
    llama(ids)
    density = llama.squeeze_statistics()["density"]
    assert len(density) == 2
    assert all(len(heads) == 4 for heads in density)
    assert all(0.1 < d < 0.4 for heads in density for d in heads)
    llama(ids[:, :100])  # shorter than min_length
    assert llama.squeeze_statistics()["density"] == [[1.0] * 4] * 2


def test_decode_never_enters_the_prefill_policy(llama) -> None:
    squeeze.swap(llama, artifacts(llama))
    ids = tiny.prompt(1, 400)["input_ids"]
    cache = llama(ids[:, :256]).past_key_values
    llama(ids[:, 256:384], past_key_values=cache)
    assert llama.squeeze_statistics()["density"] == [[1.0] * 4] * 2


def test_prefill_policy_honours_left_padding(llama) -> None:
    recipe = {"attention": RECIPE["attention"]}
    squeeze.swap(llama, artifacts(llama, recipe))
    inputs = tiny.prompt(2, 400, pads=(0, 150))
    batch = llama(**inputs).logits
    alone = llama(inputs["input_ids"][1:, 150:]).logits
    assert torch.allclose(batch[1, 150:], alone[0], atol=1e-4)


def test_an_architecture_that_reads_what_update_returns_fails_the_self_test(llama) -> None:
    attention = llama.model.layers[0].self_attn
    original = attention.forward

    def doubled(*args, **kwargs):
        output, weights = original(*args, **kwargs)
        return output * (2.0 if hasattr(attention, "squeeze") else 1.0), weights

    attention.forward = doubled
    with pytest.raises(UnsupportedError, match="self-test"):
        squeeze.swap(llama, artifacts(llama))
    assert not hasattr(attention, "squeeze")
