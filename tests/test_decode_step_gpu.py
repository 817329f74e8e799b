"""Steps that ``generate`` replays as CUDA graphs, against steps whose kernels are launched."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import squeeze
from squeeze.loading import load_model
from tests.test_gpu import RECIPE

pytestmark = pytest.mark.gpu
SETTINGS = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = load_model("reference", device="cuda", dtype=torch.float32)
    recipe = {key: RECIPE[key] for key in ("kv_cache", "weights")}
    return squeeze.run(recipe, loaded, evaluate=False).model


def inputs(rows: int, length: int, pads: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + length)
    ids = torch.randint(3, 8000, (rows, length), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, given: Any, **settings: Any) -> tuple[Any, Any]:
    results = []
    for enabled in (True, False):
        model.squeeze_step.enabled = enabled
        torch.manual_seed(0)
        start = time.perf_counter()
        results.append(model.generate(**given, **settings))
        torch.cuda.synchronize()
        print(f"recorded {enabled}: {time.perf_counter() - start:.2f} s")
    model.squeeze_step.enabled = True
    return results[0], results[1]


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    found, expected = torch.stack(ours.logits), torch.stack(theirs.logits)
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()
    assert any(step.replay is not None for step in ours.past_key_values.recordings.values())


@pytest.mark.parametrize("sampled", [False, True])
def test_generate_replays_what_it_would_launch(model: Any, sampled: bool) -> None:
    settings = dict(SETTINGS, max_new_tokens=300, min_new_tokens=300)
    if sampled:
        settings |= {"do_sample": True, "temperature": 0.8, "top_k": 40}
    assert_same(*both(model, inputs(2, 500, (60,)), **settings))


def test_the_cache_grows_across_buckets(model: Any) -> None:
    settings = dict(SETTINGS, max_new_tokens=1400, min_new_tokens=1400)
    ours, theirs = both(model, inputs(3, 900, (0, 33, 700)), **settings)
    assert_same(ours, theirs)
    assert ours.past_key_values.static_layers[0].capacity >= 15


def test_prompt_lookup_replays_steps_of_several_tokens(model: Any) -> None:
    given = inputs(1, 40)
    given = {name: x.repeat(1, 8) for name, x in given.items()}
    settings = {"do_sample": False, "max_new_tokens": 200, "prompt_lookup_num_tokens": 6}
    ours, theirs = both(model, given, **settings)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_half_precision_is_verified_and_replayed(model: Any) -> None:
    half = load_model("reference", device="cuda", dtype=torch.bfloat16)
    squeeze.run({key: RECIPE[key] for key in ("kv_cache", "weights")}, half, evaluate=False)
    ids = inputs(2, 700)["input_ids"]
    cache = half(ids).past_key_values
    for t in range(20):
        half(ids[:, t : t + 1], past_key_values=cache)
    assert half.squeeze_step.verified and cache.get_seq_length() == 720
