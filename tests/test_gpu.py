"""The whole flow on a GPU: Triton against the reference implementation, through a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import squeeze
from squeeze import api
from squeeze.attention import LayerState
from squeeze.linear import ClusteredLinear
from squeeze.loading import load_model
from squeeze.types import Implementation
from tests import tiny

pytestmark = pytest.mark.gpu
RECIPE = {
    "weights": [{"method": "kmeans", "importance": "none", "targets": ["down_proj"]}],
    "kv_cache": {
        "keys": {"method": "affine", "granularity": "channel", "transforms": ["hadamard"]},
        "values": {"method": "affine", "transforms": ["hadamard"]},
    },
    "attention": {"prefill": {"method": "vertical_slash", "min_length": 1024}},
}


def choose(model, implementation: Implementation) -> None:
    for module in model.modules():
        if isinstance(module, ClusteredLinear | LayerState):
            module.implementation = implementation


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    cache = model(ids[:, :1500], use_cache=True).past_key_values
    parts = [model(ids[:, 1500:1564], past_key_values=cache).logits]
    parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(1564, 1580)]
    return torch.cat(parts, 1).float()


@pytest.mark.parametrize("sections", [["kv_cache"], ["weights"], ["attention"], list(RECIPE)])
def test_triton_agrees_with_the_reference_implementation(sections: list[str]) -> None:
    recipe = {key: RECIPE[key] for key in sections}
    result = squeeze.run(recipe, "reference", device="cuda", evaluate=False)
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(3, 8000, (2, 1600), device="cuda", generator=generator)
    triton = logits(result.model, ids)
    choose(result.model, Implementation.REFERENCE)
    reference = logits(result.model, ids)
    exact = squeeze.run(recipe, load_model("reference", device="cuda", dtype=torch.float32),
                        evaluate=False)  # fmt: skip
    choose(exact.model, Implementation.REFERENCE)
    oracle = logits(exact.model, ids)
    scale = oracle.abs().max()
    error = (triton - oracle).abs().mean()
    allowed = 2 * (reference - oracle).abs().mean() + 2**-8 * 0.01 * scale
    print(f"{sections}: triton {error:.4g}, reference {(reference - oracle).abs().mean():.4g}")
    assert error <= allowed


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone() -> None:
    model = load_model("reference", device="cuda", dtype=torch.float32)
    squeeze.run({key: RECIPE[key] for key in ("kv_cache", "weights")}, model, evaluate=False)
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(3, 8000, (2, 720), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :300] = 0
    # As generate() numbers them: keys are stored rotated, so equal rows need equal positions.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(
        ids[:, :700], attention_mask=mask[:, :700], position_ids=positions[:, :700]
    ).past_key_values
    alone = model(ids[1:, 300:700]).past_key_values
    for t in range(700, 720):
        now = slice(t, t + 1)
        both = model(ids[:, now], attention_mask=mask[:, : t + 1], position_ids=positions[:, now],
                     past_key_values=cache)  # fmt: skip
        single = model(ids[1:, now], past_key_values=alone)
        difference = (both.logits[1] - single.logits[0]).abs().max()
        assert difference <= 2e-3 * single.logits.abs().max()


@torch.no_grad()
def test_a_captured_step_of_a_static_cache_replays_to_what_the_growing_cache_gives() -> None:
    model = load_model("reference", device="cuda", dtype=torch.float32)
    squeeze.run({"kv_cache": RECIPE["kv_cache"]}, model, evaluate=False)
    generator = torch.Generator("cuda").manual_seed(2)
    ids = torch.randint(3, 8000, (2, 500), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    settings = {"max_new_tokens": 300, "min_new_tokens": 300, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, attention_mask=mask, **settings)
    cache = squeeze.static_cache(model, 800)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    token, place = expected.sequences[:, 500:501].clone(), mask.sum(1, keepdim=True)

    def step() -> torch.Tensor:
        return model(token, position_ids=place, past_key_values=cache).logits[:, -1]

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with cache.recording():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
                cache.rewind()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits = step()
    for t in range(1, 300):
        graph.replay()
        cache.advance()
        error = (logits - expected.logits[t]).abs().max()
        assert error <= 2e-3 * expected.logits[t].abs().max(), f"step {t}"
        token.copy_(expected.sequences[:, 500 + t : 501 + t])
        place += 1
    assert cache.static_layers[0].blocks == [5, 4]
    assert cache.static_layers[0].block_counts.device.tolist() == [5, 4]


@torch.no_grad()
def test_an_offloaded_cache_decodes_the_same_and_holds_two_layers_on_the_device() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    ids = torch.randint(3, 8000, (2, 1200), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    found = []
    for offload in (False, True):
        recipe = {"kv_cache": {**RECIPE["kv_cache"], "offload": offload}}
        model = squeeze.run(recipe, "reference", device="cuda", evaluate=False).model
        model.squeeze_step.enabled = False  # offloaded steps are launched; so are those beside them
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=300, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append(out)
    plain, moved = (out.past_key_values for out in found)
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(torch.stack(found[0].logits), torch.stack(found[1].logits))
    blocks = moved.packed_layers[0].key_blocks
    assert blocks.segments[0]["codes"].is_pinned() and blocks.addresses is None
    assert moved.nbytes - moved.host_nbytes < 0.6 * plain.nbytes


def test_the_peak_follows_the_plan_at_131072_tokens() -> None:
    """The shape of an 8B model's cache; what a forward needs besides is measured without one."""
    count = 131072
    shape = {"num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny.model("llama", head_dim=128, max_position_embeddings=2 * count, **shape)
    model = model.to(device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(3, 100, (1, count), device="cuda")
    planned = api.plan("kv4", model, context=count).kv_bytes["after"]
    result = squeeze.run("kv4", model, evaluate=False)
    forward = {"input_ids": ids, "logits_to_keep": 1}
    with torch.no_grad():
        result.model(**forward, use_cache=False)  # compiles
        without = peak_bytes(lambda: result.model(**forward, use_cache=False))
        cache: list[Any] = []
        prefill = peak_bytes(
            lambda: cache.append(result.model(**forward, use_cache=True).past_key_values)
        )
        before = torch.cuda.memory_allocated()
        step = peak_bytes(lambda: result.model(ids[:, :1], past_key_values=cache[0]))
    print(f"plan {planned}, prefill {prefill - without}, step {step - before}")
    assert cache[0].nbytes == pytest.approx(planned, rel=0.01)
    assert prefill - without <= 1.05 * planned
    assert step - before <= 0.05 * planned


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes allocated while ``call`` runs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
