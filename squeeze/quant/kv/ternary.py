"""Ternary codes: every value is minus, zero or plus its group's scale, five values in a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional

from squeeze.errors import UnsupportedError
from squeeze.quant.kv._protected import Protected, protect, protected_bits, restore
from squeeze.registry import register
from squeeze.types import Tensors

HALF_MAX = torch.finfo(torch.float16).max
RUN = 128  # tokens packed together
ROWS = RUN // 5  # bytes of a channel: row r holds the tokens r, r + ROWS, ... r + 4 ROWS
TAIL = RUN % 5  # the last tokens of a run, packed as one string over all channels
GROUPS = (32, 64, 128)


@register(source="https://arxiv.org/abs/2503.16257", year=2025)
@dataclass(frozen=True)
class Ternary:
    """Keep signs of the larger values and drop the smaller: 1.6 bits per value and a scale.

    ``x = code * scale`` with ``code = sign(x)`` where ``|x| > threshold * mean|x|`` and 0
    elsewhere; ``scale`` is the mean magnitude of what was kept. A group is ``group_size`` tokens
    of one channel (granularity channel) or ``group_size`` channels of one token. Assumes groups
    around zero: compose keys with ``center``. Quantizing again changes nothing but remainders.

    Five codes ``c`` make the number ``n = sum (c_i + 1) 3**(4 - i)``, stored as the byte
    ``ceil(n * 256 / 243)``; then ``c_i + 1`` is ``((byte * 3**i mod 256) * 3) >> 8``.

    Args:
        granularity: Over what a scale is shared.
        group_size: Values sharing one scale. Channel: 32, 64 or 128 tokens. Token: divides D, from
            16 up.
        threshold: Share of a group's mean magnitude below which a value becomes zero.
        protected: Of so many tokens of every 128, the most salient or those that lose the most,
            the remainders are stored at 4 bits.
    Cost: 1.6 bits per value (1.6006 for 128 tokens of 64 channels), and 16 bits per group; 0.03
        more for every protected token.
    Source: Tao et al., 2025, VidKV, https://arxiv.org/abs/2503.16257, section 3.3; the byte is
        that of llama.cpp's TQ1_0, https://github.com/ggml-org/llama.cpp/pull/8151.
    Differs: the scale is the mean of the kept values and not of all, and the threshold 0.75 and
        not 0.5. On Gaussian groups of 128 this leaves 0.188 of the variance where the source
        leaves 0.261 and the best ternary code 0.187. Codes are packed dense, not in 2-bit fields.
        The source protects a fifth of all vision tokens by 2-bit codes instead of ternary ones.
    """

    granularity: Literal["channel", "token"] = "channel"
    group_size: Annotated[int, Ge(1)] = 128
    threshold: Annotated[float, Gt(0), Le(1)] = 0.75
    protected: Protected = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """No calibration."""
        return ()

    @property
    def block_length(self) -> int:
        """Tokens that must be encoded together: one packing run."""
        return RUN

    def check(self, head_dim: int) -> None:
        """Refuse a group that does not fit.

        Raises:
            UnsupportedError: the group size is not 32, 64 or 128 tokens (channel), or no divisor
                of ``head_dim`` from 16 up (token).
        """
        sizes = [n for n in range(16, head_dim + 1) if head_dim % n == 0]
        allowed = GROUPS if self.granularity == "channel" else sizes
        if self.group_size not in allowed:
            raise UnsupportedError(
                "kv_cache",
                f"group_size {self.group_size} with granularity {self.granularity} "
                f"and heads of {head_dim} channels",
                ", ".join(map(str, allowed)),
                "Change group_size",
            )

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Quantize and pack whole blocks.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype; L a multiple of 128.
            parameters: ``salience`` float ``[..., 1 or H_kv, L]``, if it is to decide which
                tokens are protected.
        Returns:
            ``codes`` uint8 ``[..., H_kv, L / 128, 25, D]`` and ``tail`` uint8 ``[..., H_kv,
            L / 128, ceil(3 D / 5)]``; ``scale`` float16 ``[..., H_kv, L / group_size, D]``
            (channel) or ``[..., H_kv, L, D / group_size]`` (token); and what ``protect`` returns.
        """
        groups = self._grouped(x.float().clamp(-HALF_MAX, HALF_MAX))
        dim = self._group_dim
        size = groups.abs()
        kept = size > self.threshold * size.mean(dim, keepdim=True)
        scale = (size * kept).sum(dim) / kept.sum(dim).clamp(min=1)
        trits = (groups.sign() * kept).reshape(x.shape).to(torch.int32) + 1
        runs = trits.unflatten(-2, (-1, RUN))
        fields = runs[..., : 5 * ROWS, :].unflatten(-2, (5, ROWS))
        tail = runs[..., 5 * ROWS :, :].flatten(-2)
        tail = functional.pad(tail, (0, -tail.shape[-1] % 5)).unflatten(-1, (5, -1))
        packed = {
            "codes": _join(fields.movedim(-3, 0)),
            "tail": _join(tail.movedim(-2, 0)),
            "scale": scale.to(torch.float16),
        }
        if self.protected:
            plain = self._plain(packed)
            packed |= protect(x, plain, self.protected, parameters.get("salience"))
        return packed

    def decode(self, packed: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Undo ``encode`` up to rounding.

        Args:
            packed: What ``encode`` returned, with any leading dimensions.
            parameters: Empty.
        Returns:
            float32 ``[..., H_kv, L, D]``.
        """
        values = self._plain(packed)
        return restore(values, packed) if self.protected else values

    def _plain(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Decode as if no token was protected."""
        size = packed["codes"].shape[-1]
        main = _split(packed["codes"]).movedim(0, -3).flatten(-3, -2)
        tail = _split(packed["tail"]).movedim(0, -2).flatten(-2)[..., : TAIL * size]
        codes = torch.cat([main, tail.unflatten(-1, (TAIL, size))], dim=-2).flatten(-3, -2)
        values = self._grouped(codes.float() - 1)
        scale = packed["scale"].float().unsqueeze(self._group_dim)
        return (values * scale).reshape(codes.shape)

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value, scales included."""
        stored = ROWS * head_dim + -(-TAIL * head_dim // 5)
        kept = protected_bits(self.protected, head_dim)
        return 8 * stored / (RUN * head_dim) + 16 / self.group_size + kept

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


def _join(digits: Tensor) -> Tensor:
    """Turn five base-3 digits ``[5, ...]``, the first the highest, into bytes ``[...]``."""
    number = digits[0]
    for digit in digits[1:]:
        number = number * 3 + digit
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _split(packed: Tensor) -> Tensor:
    """Undo ``_join``, uint8 ``[5, ...]``."""
    wide = packed.to(torch.int32)
    digits = [((wide * 3**i & 255) * 3) >> 8 for i in range(5)]
    return torch.stack(digits).to(torch.uint8)
