"""Recorded steps whose layers are fused on a GPU, against those that run the layers' modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.decode_step import squeeze_model
from squeeze.loading import load_model

pytestmark = pytest.mark.gpu
LAYERS = 8


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = load_model("reference", device="cuda", dtype=torch.bfloat16)
    squeeze_model(loaded)
    return loaded


def tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rows + length)
    return torch.randint(3, 8000, (rows, length), device="cuda", generator=generator)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, prompt: int, fuses: bool, steps: int = 1) -> torch.Tensor:
    """Logits of every step after a prompt, the tokens given; the steps are recorded."""
    model.squeeze_step.enabled, model.squeeze_step.fuses = True, fuses
    cache = model(ids[:, :prompt], logits_to_keep=1).past_key_values
    found = []
    for t in range(prompt, ids.shape[1], steps):
        found.append(model(ids[:, t : t + steps], past_key_values=cache).logits)
    assert any(step.replay is not None for step in cache.recordings.values())
    return torch.cat(found, 1).float()


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 1), (2, 4)])
def test_fused_steps_give_the_logits_of_unfused_ones(model: Any, rows: int, steps: int) -> None:
    ids = tokens(rows, 700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logits(model, ids, 500, True, steps)
    step = model.squeeze_step
    assert step.compared and step.fuses and list(step.fusion.layers) == list(range(LAYERS))
    expected = logits(model, ids, 500, False, steps)
    scale = expected.norm(dim=-1)
    error = ((found - expected).norm(dim=-1) / scale).max()
    # Whoever rounds a stored code the other way differs by more than a rounding.
    print(f"relative error {error:.2e}")
    assert error <= 4 * torch.finfo(torch.bfloat16).eps
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.98


def launches(call: Callable[[], Any]) -> int:
    """Count the kernels that a call runs."""
    with warnings.catch_warnings():
        # torch says so of every profile that does not add up several.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        return sum(event.count for event in seen.key_averages())


@torch.no_grad()
def test_a_fused_layer_is_about_fifteen_launches(model: Any) -> None:
    counts = {}
    for fuses in (True, False):
        ids = tokens(1, 510)
        model.squeeze_step.fuses = fuses
        cache = model(ids[:, :500], logits_to_keep=1).past_key_values
        for t in range(500, 506):
            model(ids[:, t : t + 1], past_key_values=cache)
        counts[fuses] = launches(lambda: model(ids[:, 506:507], past_key_values=cache))  # noqa: B023
    print(f"launches of a step of {LAYERS} layers: {counts}")
    assert counts[True] <= counts[False] - 25 * LAYERS
