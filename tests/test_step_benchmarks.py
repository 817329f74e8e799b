"""The benchmarks of the decode step: what they conclude, and how a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_step, step_agreement
from benchmarks import run as runner
from tests.test_fused_layer import Repeats


def test_agreement_is_judged_by_the_reference_of_equal_precision() -> None:
    oracle = torch.tensor([[[4.0, 1.0, 0.0], [2.0, 1.9, 0.0], [0.0, 0.0, 8.0]]])
    same = oracle + torch.tensor([[[0.0, 0.0, 0.25], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    # An error of a quarter allows half, and one rounding of the largest logit.
    found = oracle.clone()
    found[0, 1, 1] += 0.2  # a tie, which may go either way
    row = step_agreement.judged(found, same, oracle, torch.float16)
    assert row["tolerance"] == pytest.approx(0.5 + 8 * 2**-10)
    assert (row["decided"], row["decided_equal"], row["reference_equal"]) == (2, 1.0, 1.0)
    assert row["argmax_equal"] == pytest.approx(2 / 3) and not row["passed"]
    found[0, 1, 1] -= 0.2
    assert step_agreement.judged(found, same, oracle, torch.float16)["passed"]
    found[0, 0, 1] += 4
    row = step_agreement.judged(found, same, oracle, torch.float16)
    assert row["decided_equal"] == 0.5 and not row["passed"]


def test_recorded_and_fused_steps_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    forced, traces = step_agreement.forced, Repeats()

    def recorded(model: Any, *args: Any) -> torch.Tensor:
        if model.squeeze_step.enabled:
            model.squeeze_step.recorder = traces
        return forced(model, *args)

    monkeypatch.setattr(step_agreement, "forced", recorded)
    monkeypatch.setattr(step_agreement, "PROMPT", 270)
    monkeypatch.setattr(step_agreement, "DTYPES", ("float16",))
    few = [{**step_agreement.WEIGHTS[0], "targets": ["k_proj", "v_proj"]}]
    monkeypatch.setattr(step_agreement, "WEIGHTS", few)
    (row,) = step_agreement.run("cpu", 10)
    assert row["implementation"] == "recorded, fused" and row["shape"] == "1x270+10"
    assert row["error"] <= row["tolerance"] and row["passed"]
    assert traces.replayed == 8
    assert step_agreement.bars([row])[0]["met"]


def test_bars_take_the_faster_of_what_is_compared() -> None:
    times = {"squeezed": 4.0, "compiled": 40.0, "eager": 36.0}
    rows = [
        {"implementation": name, "shape": "8x32768", "step_ms": ms, "peak_gb": ms}
        for name, ms in times.items()
    ]
    found = decode_step.bars(rows)
    assert [(bar["wanted"], bar["ratio"], bar["met"]) for bar in found] == [
        (8, 9.0, True),
        (1 / 0.32, 9.0, True),
    ]
    assert decode_step.bars(rows[1:]) == []
    compared = {(name, bar[1]) for bar in decode_step.BARS for name in ("squeezed", *bar[2])}
    assert compared <= set(decode_step.ORDER)


@pytest.mark.parametrize("module", [decode_step, step_agreement])
def test_results_say_which_kernels_and_tests_they_rest_on(module: Any) -> None:
    hashed = runner.kernel_hashes(module.OP)
    for name in module.KERNELS:
        assert f"squeeze/kernels/{name}/api.py" in hashed
    assert all((runner.ROOT / test).is_file() for test in module.TESTS)


def test_a_stopped_run_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def measure(self: Any, variant: str, shape: str, options: Any) -> dict[str, Any]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((variant, shape))
        row = {"implementation": variant, "shape": shape}
        return row | {"step_ms": float(len(asked)), "peak_gb": 1.0}

    monkeypatch.setattr(decode_step.Models, "measure", measure)
    monkeypatch.setattr(runner, "environment", lambda: dict.fromkeys(WHERE))
    monkeypatch.setattr(runner, "run_tests", lambda op, workers: 7)
    assert runner.measure("decode_step", "cpu", tmp_path, only_tests=True)
    monkeypatch.setattr(runner, "run_tests", lambda op, workers: 0)
    for _ in range(3):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            runner.measure("decode_step", "cpu", tmp_path, resume=True)
    result = json.loads((tmp_path / "decode_step.json").read_text())
    found = [(row["implementation"], row["shape"]) for row in result["rows"]]
    assert found == list(decode_step.ORDER[:9])
    assert result["tests_passed"] == 7 and not result["complete"]
    assert result["bars"][0]["ratio"] == 0.5
    # Kernels that changed were not measured, and their tests fail.
    monkeypatch.setattr(runner, "kernel_hashes", lambda op: {})
    assert not runner.measure("decode_step", "cpu", tmp_path, resume=True)


WHERE = ("hardware", "versions", "commit")
