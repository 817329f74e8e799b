"""Graded codes: per-channel uniform codes whose width falls along the channels of a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le, Len
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels.bits import pack_bytes, unpack_bytes
from squeeze.registry import register
from squeeze.types import Tensors

HALF_MAX = torch.finfo(torch.float16).max
LEAST_CHANNELS = 8
# Where the outermost of four levels stand, as a share of the half range, and of two levels, in
# standard deviations. On Gaussian groups the least squared error is near 0.6 and 0.8; but it is
# reached by shrinking what is stored towards its mean, and retrieval suffers more from that.
REACH = 0.8
DEVIATIONS = 1.2


@register(source="https://arxiv.org/abs/2502.15304", year=2025)
@dataclass(frozen=True)
class Graded:
    """Give the first channels of a head more bits than the last, with a scale per channel.

    The head is cut into as many equal ranges of channels as there are widths; ``x = code * scale +
    zero`` in a range, and 0 where the width is 0. Behind the transform ``klt``, whose directions
    come by falling variance, this is what rate-distortion theory asks for; compose keys with
    ``center`` before it, so that a channel without bits loses no mean. With one width it is a
    per-channel uniform code of 1 to 8 bits.

    Levels of 3 bits and more span the group's minimum to maximum; those of 2 bits span 0.8 of that
    around its middle; those of 1 bit stand 1.2 standard deviations about the mean. A constant
    group is stored exactly when float16 holds its value. Values past float16 saturate.

    Args:
        widths: Bits of each range of channels, falling, 0 to 8: 1, 2, 4 or 8 ranges.
        group_size: Tokens sharing a channel's scale and zero.
    Cost: the mean width per value, and 32 bits per group of every channel that has bits.
    Source: Hong et al., 2025, SVDq, https://arxiv.org/abs/2502.15304: more bits for the latent
        channels of larger singular values, none for the last.
    Differs: groups of tokens instead of a whole prompt, since blocks are encoded as they come;
        levels of 1 and 2 bits stand further out than the least squared error asks.
    """

    widths: Annotated[tuple[Annotated[int, Ge(0), Le(8)], ...], Len(1, 8)] = (4, 3, 2, 1)
    group_size: Literal[32, 64, 128, 256] = 128

    @property
    def statistics(self) -> tuple[str, ...]:
        """No calibration."""
        return ()

    @property
    def block_length(self) -> int:
        """Tokens that must be encoded together: a channel's group."""
        return self.group_size

    @property
    def live(self) -> int:
        """Ranges that have bits."""
        return sum(width > 0 for width in self.widths)

    def check(self, head_dim: int) -> None:
        """Refuse widths that do not fit the head.

        Raises:
            UnsupportedError: the widths rise, are all zero, or cut the head unevenly.
        """
        count = len(self.widths)
        if count not in (1, 2, 4, 8) or head_dim % count or head_dim // count < LEAST_CHANNELS:
            fitting = [
                str(n) for n in (1, 2, 4, 8) if not head_dim % n and head_dim // n >= LEAST_CHANNELS
            ]
            raise UnsupportedError(
                "kv_cache",
                f"{count} widths for heads of {head_dim} channels",
                f"{', '.join(fitting)} widths",
                "Change widths",
            )
        if not self.live or any(a < b for a, b in pairwise(self.widths)):
            raise UnsupportedError(
                "kv_cache", f"widths {list(self.widths)}", "falling, the first above 0"
            )

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Quantize and pack whole blocks.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype; L a multiple of ``group_size``. R ranges of
                C channels, E of them with bits.
            parameters: Empty.
        Returns:
            ``codes`` uint8 ``[..., H_kv, sum(widths) * L / 8, C]``: the ranges' rows one after
            another, each packed along tokens in one run; ``scale`` and ``zero`` float16
            ``[..., H_kv, L / group_size, E * C]``.
        """
        groups = x.float().clamp(-HALF_MAX, HALF_MAX).unflatten(-2, (-1, self.group_size))
        codes, scales, zeros = [], [], []
        for part, width in zip(groups.chunk(len(self.widths), -1), self.widths, strict=True):
            if not width:
                continue
            low, high = _ends(part, width)
            zero = low.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
            # CUDA divides by a number of the host by multiplying with its rounded inverse.
            scale = ((high - low) / torch.full_like(low, 2**width - 1)).to(torch.float16)
            step = scale.float().unsqueeze(-2)
            offset = part - zero.float().unsqueeze(-2)
            code = torch.where(step == 0, 0.0, offset / step).round().clamp(0, 2**width - 1)
            codes.append(pack_bytes(code.nan_to_num(0).to(torch.uint8).flatten(-3, -2), width))
            scales.append(scale)
            zeros.append(zero)
        return {
            "codes": torch.cat(codes, -2),
            "scale": torch.cat(scales, -1),
            "zero": torch.cat(zeros, -1),
        }

    def decode(
        self,
        packed: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Undo ``encode`` up to rounding.

        Args:
            packed: What ``encode`` returned, with any leading dimensions.
            parameters: Empty.
            dtype: Of the result; the arithmetic is float32, or float64 when that is asked for.
        Returns:
            ``[..., H_kv, L, D]``.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        length = packed["codes"].shape[-2] * 8 // sum(self.widths)
        rows = [width * length // 8 for width in self.widths[: self.live]]
        parts = [
            unpack_bytes(part, width, length)
            for part, width in zip(packed["codes"].split(rows, -2), self.widths, strict=False)
        ]
        codes = torch.cat(parts, -1).to(wide).unflatten(-2, (-1, self.group_size))
        values = codes * packed["scale"].to(wide).unsqueeze(-2)
        values = (values + packed["zero"].to(wide).unsqueeze(-2)).flatten(-3, -2)
        missing = (len(self.widths) - self.live) * packed["codes"].shape[-1]
        return torch.nn.functional.pad(values, (0, missing)).to(dtype)

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value, scales and zeros included."""
        return (sum(self.widths) + 32 * self.live / self.group_size) / len(self.widths)

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Nothing is stored beside the blocks."""
        return 0


def _ends(groups: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest level of groups ``[..., g, C]``, each ``[..., C]``."""
    if width == 1:
        # Sums in float64: the result does not depend on the order in which a device adds.
        variance, mean = torch.var_mean(groups.double(), -2, correction=0)
        reach = DEVIATIONS * variance.sqrt()
        return (mean - reach).float(), (mean + reach).float()
    low, high = groups.amin(-2), groups.amax(-2)
    cut = (high - low) * ((1 - REACH) / 2 if width == 2 else 0.0)
    return low + cut, high - cut
