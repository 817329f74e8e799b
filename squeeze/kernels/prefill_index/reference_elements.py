"""What the kernels of a prefill index compute, in PyTorch: low-bit estimates of all scores."""

from __future__ import annotations

import torch
from torch import Tensor

from squeeze.kernels.prefill_index.reference import later
from squeeze.kernels.prefill_index.reference_estimates import scores

# Bytes that estimated scores, and what they are made from, may take at a time.
SCRATCH_BYTES = 1 << 28
ELEMENT_BYTES = 12


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each token of ``x [..., D]`` to symmetric integers of ``bits``, int8, and its scale."""
    scale = x.abs().amax(-1) / (2 ** (bits - 1) - 1)
    codes = x / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return codes.round().to(torch.int8), scale


def round_keys(
    keys: Tensor, key_mean: Tensor, mean: Tensor, scaling: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round keys and multiply them by the queries' mean; as ``api.round_keys`` has it."""
    k = keys.float() - key_mean
    grouped = mean.reshape(*k.shape[:2], -1, k.shape[-1]) * scaling
    codes, scales = rounded(k, bits)
    return codes, scales, (grouped @ k.mT).flatten(1, 2)


def round_queries(
    query: Tensor,
    keys: Tensor,
    mean: Tensor,
    key_mean: Tensor,
    begins: Tensor,
    lengths: Tensor,
    size: int,
    first: int,
    stride: int,
    scaling: float,
    softcap: float | None,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round queries and sum near scores; as ``api.round_queries`` has it."""
    each = size // stride
    blocks, found = query.shape[2] // each, []
    row_bytes = query.shape[:2].numel() * each * (3 * size + query.shape[3]) * ELEMENT_BYTES
    step = max(1, SCRATCH_BYTES // row_bytes)
    for start in range(0, blocks, step):
        rows = range(start, min(start + step, blocks))
        q = query[:, :, rows.start * each : rows.stop * each].float()
        codes, scale = rounded(q - mean, bits)
        total = _nearby(q * scaling, keys, key_mean, size, first + start, stride, softcap)
        begin, end = (first + start) * size, (first + rows.stop) * size
        place = torch.arange(begin, end, stride, device=q.device)
        real = (place >= begins[:, None]) & (place < lengths[:, None])  # [B, R * each]
        found.append((codes, scale * scaling, total.masked_fill(~real[:, None], torch.inf)))
    codes, scale, total = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return codes, scale, total


def _nearby(
    q: Tensor,
    keys: Tensor,
    key_mean: Tensor,
    size: int,
    first: int,
    stride: int,
    softcap: float | None,
) -> Tensor:
    """Return ln l_i over block 0, the own and the one before, ``[B, H, R * size / stride]``."""
    (B, _, rows, D), H_kv = q.shape, keys.shape[1]
    own = torch.arange(first, first + rows * stride // size, device=q.device)
    blocks = torch.stack((torch.zeros_like(own), own - 1, own), 1)  # [R, 3]
    dropped = torch.stack((own < 1, own < 2, own < 0), 1)  # listed twice, or before block 0
    near = keys.unflatten(2, (-1, size))[:, :, blocks.clamp(min=0)].flatten(3, 4).float()
    near = near - key_mean[:, :, None]  # [B, H_kv, R, 3 * size, D]
    grouped = q.view(B, H_kv, -1, len(own), size // stride, D).transpose(2, 3)
    logits = grouped.flatten(3, 4) @ near.mT  # [B, H_kv, R, G * size / stride, 3 * size]
    logits = logits.unflatten(3, (-1, size // stride)).unflatten(-1, (3, size))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = later(range(size), size, q.device)[::stride]
    logits[..., 2, :].masked_fill_(future, -torch.inf)
    logits.masked_fill_(dropped[:, None, None, :, None], -torch.inf)
    total = logits.flatten(-2).logsumexp(-1)  # [B, H_kv, R, G, size / stride]
    return total.transpose(2, 3).reshape(B, -1, rows)


def weigh_elements(
    codes: Tensor,
    scales: Tensor,
    totals: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    added: Tensor,
    size: int,
    first: int,
    stride: int,
    softcap: float | None,
    rows: range,
) -> Tensor:
    """Find the largest relative score of each block; as ``api.weigh_elements`` has it."""
    each = size // stride
    part = slice((rows.start - first) * each, (rows.stop - first) * each)
    low, scales, totals = codes[:, :, part], scales[:, :, part, None], totals[:, :, part, None]
    heads, found = low.shape[1] // key_codes.shape[1], []
    step = max(1, SCRATCH_BYTES // (low.shape[:3].numel() * size * ELEMENT_BYTES))
    for start in range(0, rows.stop, step):
        keys = slice(start * size, min(start + step, rows.stop) * size)
        x = scores(low, key_codes[:, :, keys], 1.0, None)  # integers below 2^24: exact
        x.mul_(key_scales[:, :, None, keys].repeat_interleave(heads, 1)).mul_(scales)
        x = x.add_(added[:, :, None, keys]).unflatten(-1, (-1, size)).amax(-1)
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        found.append((x - totals).unflatten(2, (-1, each)).amax(3))  # [B, H, R, C]
    return torch.cat(found, -1)
