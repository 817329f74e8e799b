"""Float8 codes: E4M3 numbers under a power-of-two scale per token, or per head and block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from squeeze.registry import register
from squeeze.types import Tensors

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
HEAD_TOKENS = 128  # tokens under one scale of granularity head
SMALLEST_POWER, LARGEST_POWER = -24, 15  # of two, in float16


@register(source="https://arxiv.org/abs/2209.05433", year=2022)
@dataclass(frozen=True)
class Float8:
    """Store E4M3 floats: a relative error of at most 1/16, whatever a value's channel.

    ``x = code * scale``. The scale is the smallest power of two that brings the group's largest
    magnitude within 448, so it adds no rounding of its own and quantizing again changes nothing.
    Magnitudes below ``2**-6 * scale`` are subnormal: their error is at most ``2**-10 * scale``.
    The cast saturates. NaN makes its whole group NaN.

    Args:
        scale: Over what a scale is shared: one token of a head, or 128 tokens of a head.
    Cost: 8 bits per value, and 16 bits per ``D`` (token) or ``128 * D`` (head) values.
    Source: Micikevicius et al., 2022, FP8 Formats for Deep Learning,
        https://arxiv.org/abs/2209.05433, sections 3 and 4; scales per head as in vLLM's cache.
    Differs: scales are taken from the tokens at hand instead of a checkpoint, and are powers of
        two: eight bits of floating point gain nothing from a finer one.
    """

    scale: Literal["token", "head"] = "token"

    @property
    def statistics(self) -> tuple[str, ...]:
        """No calibration."""
        return ()

    @property
    def block_length(self) -> int:
        """Tokens that must be encoded together: those of one scale, or what a kernel reads."""
        return HEAD_TOKENS if self.scale == "head" else 32

    def check(self, head_dim: int) -> None:
        """Accept every head size."""

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Scale and cast whole blocks.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype; L a multiple of ``block_length``.
            parameters: Empty.
        Returns:
            ``codes`` uint8 ``[..., H_kv, L, D]``, the bits of E4M3 numbers; ``scale`` float16
            ``[..., H_kv, L, 1]`` (token) or ``[..., H_kv, L / 128, 1]`` (head).
        """
        groups = x.float().unflatten(-2, (-1, self._tokens))
        scale = _power_of_two(groups.abs().amax((-2, -1)))
        codes = (groups / scale[..., None, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {
            "codes": codes.view(torch.uint8).reshape(x.shape).contiguous(),
            "scale": scale.to(torch.float16).unsqueeze(-1),
        }

    def decode(self, packed: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Undo ``encode`` up to rounding.

        Args:
            packed: What ``encode`` returned, with any leading dimensions.
            parameters: Empty.
        Returns:
            float32 ``[..., H_kv, L, D]``.
        """
        values = packed["codes"].view(torch.float8_e4m3fn).float()
        return values * packed["scale"].float().repeat_interleave(self._tokens, dim=-2)

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value, scales included."""
        return 8 + 16 / (self._tokens * head_dim)

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Nothing is stored beside the blocks."""
        return 0

    @property
    def _tokens(self) -> int:
        """Tokens sharing one scale."""
        return HEAD_TOKENS if self.scale == "head" else 1


def _power_of_two(largest: Tensor) -> Tensor:
    """Smallest power of two in float16 that ``largest / 448`` does not exceed; NaN stays."""
    fraction, exponent = torch.frexp(largest / LARGEST)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    exponent = torch.where(largest.isinf(), LARGEST_POWER, exponent)
    power = torch.exp2(exponent.clamp(SMALLEST_POWER, LARGEST_POWER).float())
    return torch.where(largest.isnan(), largest, power)
