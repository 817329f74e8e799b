"""Parts of a decode step: what they time, and how they add up."""

import copy

import pytest
import torch

import squeeze
from squeeze.evaluation import step_shares as module
from squeeze.evaluation.latency import latency
from tests import tiny
from tests.cache_content import dequantized
from tests.test_cache import RECIPE

WEIGHTS = {"weights": [{"method": "kmeans", "importance": "none"}]}


@torch.no_grad()
@pytest.mark.parametrize("recipe", [None, {**RECIPE, **WEIGHTS}])
def test_parts_are_timed_and_the_cache_stays(recipe):
    model = tiny.model("llama")
    if recipe:
        model = squeeze.run(recipe, model, evaluate=False).model
    ids = tiny.prompt(2, 80)["input_ids"]
    cache = model(ids).past_key_values
    before = copy.deepcopy(cache)
    parts = module.step_shares(model, cache, ids[:, :1])
    assert parts["weights_ms"] > 0 and parts["attention_ms"] > 0 and parts["kernels_ms"] is None
    assert cache.get_seq_length() == 80
    if recipe:
        for left, right in zip(cache.packed_layers, before.packed_layers, strict=True):
            assert all(map(torch.equal, dequantized(left), dequantized(right)))


def test_every_linear_layer_and_every_cache_is_read(monkeypatch):
    model = tiny.model("llama")
    cache = model(tiny.prompt(1, 20)["input_ids"]).past_key_values
    results = []
    monkeypatch.setattr(module, "_time", lambda work, device: results.append(work()) or 1.0)
    module.step_shares(model, cache, torch.tensor([[3]]))
    linears, reads = results
    assert len(linears) == 2 * 7 + 1 and linears[-1].shape == (1, 1, 128)
    assert [read.shape for read in reads] == [(1, 4, 1, 16)] * 2


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        (4.0, {"weights": 0.2, "attention": 0.1, "other": 0.1, "launch": 0.6}),
        (None, {"weights": 0.2, "attention": 0.1, "other": 0.7}),
        (20.0, {"weights": 0.2, "attention": 0.1, "other": 0.7, "launch": 0.0}),
        (1.0, {"weights": 0.2, "attention": 0.1, "other": 0.0, "launch": 0.7}),
    ],
)
def test_shares_add_up(kernels, expected):
    parts = {"weights_ms": 2.0, "attention_ms": 1.0, "kernels_ms": kernels}
    found = module.shares(10.0, parts)
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.gpu
def test_launching_dominates_a_small_dense_model_and_not_a_recorded_step():
    model = tiny.model("llama").to("cuda", torch.float16)
    dense = latency(model, prompt_tokens=200, decode_tokens=16)
    squeeze.run(RECIPE, model, evaluate=False)
    squeezed = latency(model, prompt_tokens=200, decode_tokens=16)
    assert dense["launch_share"] > 0.5 > squeezed["weights_share"]
    assert squeezed["decode_ms_per_token"] < dense["decode_ms_per_token"]
