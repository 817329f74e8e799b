"""Histograms of magnitudes give quantiles within their bins, and add up."""

from __future__ import annotations

import torch

from squeeze import magnitudes


def test_quantiles_are_within_a_bin() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    counts = magnitudes.count(x)
    for share in (0.1, 0.5, 0.9, 0.999):
        exact = float(x.abs().quantile(share))
        assert abs(float(magnitudes.quantile(counts, share)) / exact - 1) < 0.006
    top = float(magnitudes.quantile(counts, 1.0))
    assert float(x.abs().max()) <= top <= float(x.abs().max()) * 1.0055


def test_counts_add_up_and_take_zeros_and_extremes() -> None:
    x = torch.tensor([0.0, 0.0, -3.0, 2.0**-40, 2.0**40])
    assert torch.equal(magnitudes.count(x), magnitudes.count(x[:2]) + magnitudes.count(x[2:]))
    counts = magnitudes.count(x)
    assert int(counts.sum()) == 5
    assert float(magnitudes.quantile(counts, 0.5)) == 0
    assert float(magnitudes.quantile(counts, 1.0)) == 2.0**magnitudes.HIGHEST
    assert float(magnitudes.quantile(torch.zeros_like(counts), 0.5)) == 0
    rows = torch.stack([counts, magnitudes.count(torch.ones(4))])
    assert magnitudes.quantile(rows, 1.0).shape == (2,)
