import pytest
import torch

from squeeze.errors import RecipeError
from squeeze.evaluation import latency as module


def test_medians_and_conditions_are_reported(pico):
    result = module.latency(pico, prompt_tokens=40, decode_tokens=3, batch_size=2, repeats=2)
    assert result["prefill_seconds"] > 0
    assert result["decode_ms_per_token"] > 0
    assert result["kv_bytes"] == 2 * 2 * 2 * 2 * 43 * 8 * 4  # layers, k+v, batch, heads, T, D, fp32
    assert (result["prompt_tokens"], result["decode_tokens"], result["repeats"]) == (40, 3, 2)
    assert (result["batch_size"], result["device"], result["dtype"]) == (2, "cpu", "float32")
    assert result["peak_bytes"] is None


def test_units_and_medians_are_right(pico, monkeypatch):
    """A fake clock: prefill takes 2 s, then 10 s, then 3 s; each step 0.25 s."""
    times = []
    for prefill in (9.0, 2.0, 10.0, 3.0):
        start = times[-1] + 1 if times else 0.0
        times += [start, start + prefill, start + prefill + 0.25, start + prefill + 0.5]
    ticks = iter(times)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    parts = {"weights_ms": 50.0, "attention_ms": 25.0, "kernels_ms": None}
    monkeypatch.setattr(module, "step_shares", lambda *arguments: parts)
    result = module.latency(pico, prompt_tokens=4, decode_tokens=2, repeats=3)
    assert result["prefill_seconds"] == pytest.approx(3.0)
    assert result["decode_ms_per_token"] == pytest.approx(250.0)
    names = ("weights_share", "attention_share", "other_share", "launch_share")
    assert [result[name] for name in names] == [pytest.approx(x) for x in (0.2, 0.1, 0.7)] + [None]


def test_impossible_counts_are_refused(pico):
    with pytest.raises(RecipeError, match=r"1030 tokens\. Allowed: at most 1024"):
        module.latency(pico, prompt_tokens=1000, decode_tokens=30)
    with pytest.raises(RecipeError, match="below 1"):
        module.latency(pico, repeats=0)


@pytest.mark.gpu
def test_events_time_a_cuda_model(pico):
    model = pico.to("cuda", torch.bfloat16)
    result = module.latency(model, prompt_tokens=64, decode_tokens=4)
    assert 0 < result["decode_ms_per_token"] < 1000
    assert result["peak_bytes"] > result["kv_bytes"]
