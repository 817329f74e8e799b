"""Steps that ``generate`` replays as CUDA graphs, against steps whose kernels are launched."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import squeeze
from squeeze.loading import load_model
from squeeze.step_encode import KEY
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
    """Ask for equal logits as long as the tokens before are, and for equal tokens but in a tie.

    Both round otherwise, as theirs looks at fewer slots, and a stored code may round to the next.
    """
    found, expected = torch.stack(ours.logits, 1), torch.stack(theirs.logits, 1)
    steps = expected.shape[1]
    allowed = 2e-3 * expected.abs().max()
    same = (ours.sequences == theirs.sequences)[:, -steps:]
    agreed = same.long().cumprod(1).sum(1).tolist()
    print(f"tokens that agree: {agreed} of {steps}")
    for row, count in enumerate(agreed):
        until = min(count + 1, steps)
        assert (found[row, :until] - expected[row, :until]).abs().max() <= allowed
        if count < steps:
            best, second = expected[row, count].topk(2).values
            assert best - second <= 2 * allowed
    recordings = ours.past_key_values.recordings
    assert any(step.replay is not None for key, step in recordings.items() if key != KEY)


def test_generate_replays_what_it_would_launch(model: Any) -> None:
    settings = dict(SETTINGS, max_new_tokens=200, min_new_tokens=200)
    ours, theirs = both(model, inputs(2, 500, (60,)), **settings)
    assert_same(ours, theirs)
    # Both rows fill blocks, each in its own time: the first is launched, others are replayed.
    assert model.squeeze_step.encoder.watched
    assert ours.past_key_values.recordings[KEY].replay is not None
    assert [x.blocks for x in ours.past_key_values.layers] == [
        x.blocks for x in theirs.past_key_values.layers
    ]


def test_sampled_tokens_are_those_of_launched_steps(model: Any) -> None:
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 40, "max_new_tokens": 60}
    ours, theirs = both(model, inputs(2, 500, (60,)), **SETTINGS | sampled)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_the_cache_grows_across_buckets(model: Any) -> None:
    settings = dict(SETTINGS, max_new_tokens=200, min_new_tokens=200)
    ours, theirs = both(model, inputs(3, 900, (0, 33, 700)), **settings)
    assert_same(ours, theirs)
    layer = ours.past_key_values.static_layers[0]
    assert layer.capacity == layer.spec.ready(2048) > layer.spec.ready(1024)


def test_prompt_lookup_replays_steps_of_several_tokens(model: Any) -> None:
    given = inputs(1, 40)
    given = {name: x.repeat(1, 8) for name, x in given.items()}
    settings = {"do_sample": False, "max_new_tokens": 60, "prompt_lookup_num_tokens": 3}
    ours, theirs = both(model, given, **settings)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_half_precision_is_verified_and_replayed(model: Any) -> None:
    half = load_model("reference", device="cuda", dtype=torch.bfloat16)
    squeeze.run({key: RECIPE[key] for key in ("kv_cache", "weights")}, half, evaluate=False)
    half.squeeze_step.enabled = True
    ids = inputs(2, 700)["input_ids"]
    cache = half(ids).past_key_values
    for t in range(20):
        half(ids[:, t : t + 1], past_key_values=cache)
    assert half.squeeze_step.verified and cache.get_seq_length() == 720
