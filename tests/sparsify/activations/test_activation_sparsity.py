"""CHESS's thresholds: one bound on the cost of leaving a channel out."""

from __future__ import annotations

import torch

from squeeze import magnitudes
from squeeze.sparsify.activations.activation_sparsity import ActivationSparsity


def test_thresholds_share_one_bound_on_the_cost() -> None:
    weight = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 0.0, 2.0]])  # norms 5, 0, 1, 2
    x = torch.tensor([[0.1, 9.0, 4.0, 1.0]])  # costs 0.5, 0, 4, 2
    counts = magnitudes.count(x * weight.norm(dim=0))
    threshold = ActivationSparsity(sparsity=0.75).fit(weight, {"input_importance": counts})
    torch.testing.assert_close(
        threshold[[0, 2, 3]], torch.tensor([0.4, 2.0, 1.0]), rtol=6e-3, atol=0
    )
    assert threshold[1] == torch.inf
    # Channel 2 alone costs more than the bound, though channel 1 is larger.
    assert (x.abs() > threshold).tolist() == [[False, False, True, False]]


def test_less_sparsity_never_zeroes_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 50, generator=generator), torch.randn(99, 50, generator=generator)
    given = {"input_importance": magnitudes.count(x * weight.norm(dim=0))}
    kept = [
        (x.abs() > ActivationSparsity(share).fit(weight, given)).float().mean()
        for share in (0.2, 0.5, 0.8)
    ]
    for share, live in zip((0.8, 0.5, 0.2), kept, strict=True):
        assert abs(live - share) < 0.01
