"""Scatterbrain: sparse attention plus a low-rank remainder. A reference only.

No recipe can ask for it and no kernel computes it: random features are too rough for causal
language models at the sizes where they would save anything (see ``docs/prefill.md``). It is here so
that what an index leaves out can be compared with what features would put in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.sparsify.index import to_dense_mask
from squeeze.types import BlockIndex


def scatterbrain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: BlockIndex,
    projections: Tensor,
    scaling: float,
) -> Tensor:
    """Attend exactly where an index lists, and by random features to every other earlier token.

    out[t] = sum_j a[t, j] v[j] / sum_j a[t, j] over j <= t, with a = exp(scaling q . k) where the
    index lists j and phi(q) . phi(k) elsewhere; phi(x) = exp(W x - |x|^2 / 2) / sqrt(m) for x
    scaled by sqrt(scaling), whose products have exp(scaling q . k) as their mean over W.

    Args:
        query: After RoPE, ``[B, H, T, D]``.
        keys: After RoPE, ``[B, H_kv, T, D]``.
        values: ``[B, H_kv, T, D]``.
        index: Of blocks and columns, without averages.
        projections: W, ``[m, D]``, standard normal.
        scaling: Multiplies the dot products.
    Returns:
        ``[B, H, T, D]``, in float64 where the inputs are, else float32.
    Cost: T^2 values per head, several times: for tests and small texts.
    Source: Chen et al. 2021, https://arxiv.org/abs/2110.15343, section 4 (S + phi(Q) phi(K)^T, the
        sparse part holding the difference from the features'); positive features: Choromanski et
        al. 2020, https://arxiv.org/abs/2009.14794, lemma 1.
    Differs: the index says what is exact, in place of locality-sensitive hashing; causal.
    """
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups, T = query.shape[1] // keys.shape[1], query.shape[2]
    q = query.to(precise) * scaling**0.5
    k = keys.to(precise).repeat_interleave(groups, 1) * scaling**0.5
    v = values.to(precise).repeat_interleave(groups, 1)
    listed = to_dense_mask(index, T).to(query.device)
    later = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    scores = (q @ k.mT).masked_fill(later, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    logs = [x @ projections.to(x).mT - x.square().sum(-1, keepdim=True) / 2 for x in (q, k)]
    highest = [x.amax(-1, keepdim=True) for x in logs]
    phi_q, phi_k = ((x - high).exp() for x, high in zip(logs, highest, strict=True))
    features = (phi_q @ phi_k.mT / len(projections)).log() + highest[0] + highest[1].mT
    weights = (torch.where(listed, scores, features) - top).exp().masked_fill(later, 0.0)
    return (weights / weights.sum(-1, keepdim=True)) @ v
