"""Quamba's own parts: int8 rows and scales from histograms."""

from __future__ import annotations

import torch

from squeeze import magnitudes
from squeeze.linear import reconstruct
from squeeze.quant.weights.quamba import Quamba


def test_rows_are_rounded_to_127_steps_of_their_own() -> None:
    weight = torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0], [1.27, -1.27, 0.011]])
    packed = Quamba().fit(weight)
    expected = torch.tensor([[127.0, -64.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(reconstruct(packed)[:2], expected)
    step = float(torch.tensor(0.01).half())
    assert torch.allclose(reconstruct(packed)[2], torch.tensor([127.0, -127.0, 1.0]) * step)
    assert packed.scale.dtype == torch.float16


def test_the_error_is_at_most_half_a_step_and_bytes_are_counted() -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    packed = Quamba().fit(weight)
    error = (reconstruct(packed) - weight).abs()
    # A scale rounded down to float16 leaves the largest value up to 127 * 2**-11 steps outside.
    assert (error <= (0.5 + 127 / 2048) * packed.scale.float()).all()
    assert packed.nbytes == Quamba().shape_bytes(40, 100) == 40 * 128 + 40 * 2


def test_scales_are_the_maximum_but_for_the_scan_input() -> None:
    values = torch.cat([torch.full((99_990,), 1.0), torch.full((10,), 100.0)])
    counts = magnitudes.count(values)
    points = {"input": counts, "scan_input": counts, "output": counts, "rotated_output": counts}
    scales = Quamba(percentile=99.9).fit_mixer(points)
    assert set(scales) == {"input", "scan_input", "rotated_output"}
    assert abs(float(scales["input"]) * 127 / 100 - 1) < 0.006
    assert abs(float(scales["scan_input"]) * 127 - 1) < 0.006
    kept = Quamba(percentile=99.995).fit_mixer(points)
    assert abs(float(kept["scan_input"]) * 127 / 100 - 1) < 0.006
    assert "output" in Quamba(hadamard=False).fit_mixer(points)
