"""Affine codes: the uniform quantizer with a scale and a minimum, per channel or per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels.bits import pack_bytes, unpack_bytes
from squeeze.registry import register
from squeeze.types import Tensors

HALF_MAX = torch.finfo(torch.float16).max
CHANNEL_GROUPS = (32, 64, 128, 256)


@register(source="https://arxiv.org/abs/2402.02750", year=2024)
@dataclass(frozen=True)
class Affine:
    """Round to ``2**bits`` even steps between a group's minimum and maximum.

    ``x = code * scale + zero``. A group is ``group_size`` consecutive tokens of one channel
    (granularity channel, for keys: their outliers live in channels) or ``group_size`` consecutive
    channels of one token (granularity token, for values). A constant group is stored exactly when
    float16 holds its value (symmetric: only zero is exact). Quantizing again changes nothing while
    a step is wider than float16's spacing at the minimum. NaN makes its whole group NaN; values
    past float16 saturate.

    Args:
        bits: Width of one code.
        granularity: Over what a scale is shared.
        group_size: Values sharing one scale. Channel: 32, 64, 128 or 256 tokens. Token: divides D.
        symmetric: Store no zero; codes are centred on ``2**(bits-1)`` and the scale is the largest
            magnitude over ``2**(bits-1) - 1``, so 2 bits hold -1, 0 and 1 times that magnitude.
    Cost: ``bits`` per value, and 16 (symmetric) or 32 bits per group.
    Source: Liu et al., 2024, KIVI, https://arxiv.org/abs/2402.02750, section 3; the constants per
        token and head follow LMDeploy, https://arxiv.org/abs/2508.15601.
    Differs: zero is rounded down to float16 and scale to nearest before the codes are computed, so
        no value of a far-off channel is clipped by the rounding; whole blocks of tokens are
        encoded at once, and packed along tokens.
    """

    bits: Literal[2, 3, 4, 8] = 4
    granularity: Literal["channel", "token"] = "token"
    group_size: Annotated[int, Ge(1)] = 64
    symmetric: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """No calibration."""
        return ()

    @property
    def block_length(self) -> int:
        """Tokens that must be encoded together: a channel's group, or one packing run of 32."""
        return self.group_size if self.granularity == "channel" else 32

    def check(self, head_dim: int) -> None:
        """Refuse a group that does not fit the head.

        Raises:
            UnsupportedError: the group size is not a token count that packs (channel) or does not
                divide ``head_dim`` (token).
        """
        if self.granularity == "channel" and self.group_size not in CHANNEL_GROUPS:
            allowed = ", ".join(map(str, CHANNEL_GROUPS)) + " tokens with granularity channel"
            raise UnsupportedError(
                "kv_cache", f"group_size {self.group_size}", allowed, "Change group_size"
            )
        if self.granularity == "token" and head_dim % self.group_size:
            fitting = [n for n in range(16, head_dim + 1) if head_dim % n == 0]
            raise UnsupportedError(
                "kv_cache",
                f"group_size {self.group_size} does not divide heads of {head_dim} channels",
                ", ".join(map(str, fitting)),
                "Change group_size",
            )

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Quantize and pack whole blocks.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype; L a multiple of ``block_length``.
            parameters: Empty.
        Returns:
            ``codes`` uint8 ``[..., H_kv, bits * L / 8, D]``, packed along tokens in one run;
            ``scale`` and, unless symmetric, ``zero`` float16 ``[..., H_kv, L / group_size, D]``
            (channel) or ``[..., H_kv, L, D / group_size]`` (token).
        """
        groups = self._grouped(x.float().clamp(-HALF_MAX, HALF_MAX))
        dim = self._group_dim
        if self.symmetric:
            zero = None
            scale = _divided(groups.abs().amax(dim), 2 ** (self.bits - 1) - 1)
            offset = groups
        else:
            zero = _round_down(groups.amin(dim))
            scale = _divided(groups.amax(dim) - zero.float(), 2**self.bits - 1)
            offset = groups - zero.float().unsqueeze(dim)
        step = scale.float().unsqueeze(dim)
        codes = torch.where(step == 0, 0.0, offset / step).round()
        if self.symmetric:
            codes = codes + 2 ** (self.bits - 1)
        codes = codes.clamp(0, 2**self.bits - 1).to(torch.uint8).reshape(x.shape)
        packed = pack_bytes(codes, self.bits)
        constants = {"scale": scale} if zero is None else {"scale": scale, "zero": zero}
        return {"codes": packed, **constants}

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
        length = packed["codes"].shape[-2] * 8 // self.bits
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes = unpack_bytes(packed["codes"], self.bits, length)
        values = self._grouped(codes.to(wide))
        if self.symmetric:
            values -= 2 ** (self.bits - 1)
        values *= packed["scale"].to(wide).unsqueeze(self._group_dim)
        if not self.symmetric:
            values += packed["zero"].to(wide).unsqueeze(self._group_dim)
        return values.reshape(codes.shape).to(dtype)

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value, scales and zeros included."""
        return self.bits + (16 if self.symmetric else 32) / self.group_size

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Nothing is stored beside the blocks."""
        return 0

    @property
    def _group_dim(self) -> int:
        """Dimension of the members of a group in what ``_grouped`` returns."""
        return -2 if self.granularity == "channel" else -1

    def _grouped(self, x: Tensor) -> Tensor:
        """``[..., L, D]`` to ``[..., L / g, g, D]`` (channel) or ``[..., L, D / g, g]`` (token)."""
        return x.unflatten(-2 if self.granularity == "channel" else -1, (-1, self.group_size))


def _divided(x: Tensor, divisor: int) -> Tensor:
    """Return float16 ``x / divisor``, the same on every device.

    CUDA divides by a number of the host by multiplying with its rounded inverse.
    """
    return (x / torch.full_like(x, divisor)).to(torch.float16)


def _round_down(x: Tensor) -> Tensor:
    """Round float32 to the largest float16 that is not above it."""
    nearest = x.to(torch.float16)
    # Half a unit in the last place is at most 2**-11 of the value, or 2**-25 among subnormals.
    lower = (x - x.abs() * 2**-11 - 2**-25).clamp(min=-HALF_MAX).to(torch.float16)
    return torch.where(nearest.float() > x, lower, nearest)
