"""Bitmaps of the largest magnitudes of each token, and the survivors packed without gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.registry import register
from squeeze.types import Tensors

HALF_MAX = torch.finfo(torch.float16).max
GROUP = 16  # channels that share a budget
# Survivors of a group that are stored, and read, together: a count is a sum of these, in order.
PIECES = (4, 4, 2, 1)


@register(source="https://arxiv.org/abs/2505.22913", year=2025)
@dataclass(frozen=True)
class Bitmap:
    """Keep the largest magnitudes of every token and head, a fixed number of them.

    A bitmap says which channels survive; survivors lie packed, and everything has a constant
    stride. Of every group of 16 channels ``k = floor(16 * (1 - sparsity) + 1/2)`` survive; among
    equal magnitudes the lowest channel wins. Pruned values are zero. Four-bit survivors are
    ``code * scale``, code -7 to 7, with one scale per token and head: the largest magnitude over
    7. NaN survives, and makes all four-bit survivors of its token NaN; values past float16
    saturate.

    The 16 channels of a group are S apart, S the largest power of two that divides D / 16 (8 for
    128 channels, 4 for 64), because channels of keys that are large together are neighbours.

    Args:
        sparsity: Share of the values that are dropped; rounded as above to a multiple of 1/16.
        survivor_bits: Width of a survivor; 16 is float16. (``bits: 16`` would mean that nothing is
            compressed.)
    Cost: per value 1 bit and ``k / 16 * survivor_bits``, and with four bits 16 / D.
    Source: Joo et al., 2025, Mustafar, https://arxiv.org/abs/2505.22913: per-token magnitude
        pruning of keys and values; a bitmap and packed survivors.
    Differs: exactly k survive and not all that reach a threshold, so that no offsets are stored;
        k is counted per group and not per vector, so that a survivor is found by arithmetic on one
        word (4 windows of 2048 tokens, 64 channels, float16 survivors: perplexity +0.1% at 70%,
        -0.1% at 50%; groups of neighbours would cost 4%); four-bit survivors.
    """

    sparsity: Annotated[float, Ge(0.5), Le(0.95)] = 0.7
    survivor_bits: Literal[4, 16] = 4

    @property
    def statistics(self) -> tuple[str, ...]:
        """No calibration."""
        return ()

    @property
    def block_length(self) -> int:
        """Tokens are independent; two are packed together, and a kernel reads 32."""
        return 32

    @property
    def kept(self) -> int:
        """Survivors of a group, 1 to 8."""
        # 16 * (1 - 0.7) is below 4.8, and a tie must not depend on such an error.
        return max(1, int(GROUP * (1 - self.sparsity) + 0.5 + 1e-9))

    @property
    def planes(self) -> int:
        """Bytes that two tokens take for every survivor: both codes, or both halves of each."""
        return 1 if self.survivor_bits == 4 else 4

    def check(self, head_dim: int) -> None:
        """Refuse a head that is not a whole number of groups.

        Raises:
            UnsupportedError: 16 does not divide ``head_dim``.
        """
        if head_dim % GROUP:
            raise UnsupportedError(
                "kv_cache",
                f"method bitmap on heads of {head_dim} channels",
                f"heads of a multiple of {GROUP} channels",
                "Use another method",
            )

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Prune and pack whole blocks.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype; L a multiple of 32.
            parameters: Empty.
        Returns:
            ``bitmap`` int32 ``[..., H_kv, L / 2, D / 16]``: bit ``4 * (slot % 8) + slot // 8`` of
            a pair's first token, two bits higher of its second. ``codes`` uint8
            ``[..., H_kv, planes * k * L / 2 * D / 16]``: planes of pieces ``[L / 2, D / 16, size]``
            of 4, 4, 2 and 1 survivors. With four bits a byte is the first token's code and, in the
            high nibble, the second's; else planes are the low bytes and the high bytes of the
            first, then of the second. With four bits ``scale``, float16 ``[..., H_kv, L]``.
        """
        groups = _to_groups(x.float().clamp(-HALF_MAX, HALF_MAX))
        largest = groups.abs().sort(dim=-1, descending=True, stable=True).indices[..., : self.kept]
        alive = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, largest, True)
        order = _order(x.device)
        survivors = groups.gather(-1, order[order[largest].sort(dim=-1).values])
        bitmap = _pack_bits(alive)
        if self.survivor_bits == 16:
            halves = survivors.to(torch.float16).view(torch.uint8).unflatten(-1, (-1, 2))
            return {"bitmap": bitmap, "codes": self._pack(halves.unflatten(-4, (-1, 2)))}
        scale = (groups.abs().amax((-2, -1)) / 7).to(torch.float16)
        step = scale.float()[..., None, None]
        codes = torch.where(step == 0, 0.0, survivors / step).round().clamp(-7, 7)
        codes = (codes.nan_to_num(0.0).to(torch.int32) & 15).unflatten(-3, (-1, 2))
        both = (codes[..., 0, :, :] | codes[..., 1, :, :] << 4).to(torch.uint8)
        packed = self._pack(both.unsqueeze(-3).unsqueeze(-1))
        return {"bitmap": bitmap, "codes": packed, "scale": scale}

    def decode(self, packed: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Undo ``encode`` up to pruning and rounding.

        Args:
            packed: What ``encode`` returned, with any leading dimensions.
            parameters: Empty.
        Returns:
            float32 ``[..., H_kv, L, D]``.
        """
        alive = _unpack_bits(packed["bitmap"])
        order = _order(alive.device)
        rank = (alive[..., order].cumsum(-1)[..., order] - 1).clamp(0, self.kept - 1)
        survivors = self._survivors(packed, alive.shape)
        return _from_groups(torch.where(alive, survivors.gather(-1, rank), 0.0))

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value: bitmap, survivors and scale."""
        scale = 16 / head_dim if self.survivor_bits == 4 else 0
        return 1 + self.kept * self.survivor_bits / GROUP + scale

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Nothing is stored beside the blocks."""
        return 0

    @property
    def _sizes(self) -> list[int]:
        """Sizes of the pieces that make up ``kept``."""
        sizes: list[int] = []
        for size in PIECES:
            if sum(sizes) + size <= self.kept:
                sizes.append(size)
        return sizes

    def _pack(self, survivors: Tensor) -> Tensor:
        """Bytes ``[..., L / 2, tokens, groups, k, bytes]`` to planes of pieces, flat."""
        planes = survivors.movedim((-4, -1), (-5, -4)).flatten(-5, -4)
        pieces = [piece.flatten(-3) for piece in planes.split(self._sizes, dim=-1)]
        return torch.cat(pieces, -1).flatten(-2)

    def _survivors(self, packed: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Float32 survivors ``[..., L, groups, k]`` of slots ``shape = [..., L, groups, 16]``."""
        pairs, groups = shape[-3] // 2, shape[-2]
        planes = packed["codes"].unflatten(-1, (self.planes, -1))
        pieces = planes.split([pairs * groups * size for size in self._sizes], dim=-1)
        parts = [
            piece.unflatten(-1, (pairs, groups, size))
            for piece, size in zip(pieces, self._sizes, strict=True)
        ]
        survivors = torch.cat(parts, -1)  # [..., planes, L / 2, groups, k]
        if self.survivor_bits == 16:
            halves = survivors.unflatten(-4, (2, 2)).movedim((-5, -4), (-4, -1)).contiguous()
            return halves.view(torch.float16).flatten(-5, -4).squeeze(-1).float()
        survivors = survivors.squeeze(-4)
        codes = torch.stack((survivors & 15, survivors >> 4), -3).flatten(-4, -3)
        # From two's complement of four bits.
        return ((codes ^ 8).float() - 8) * packed["scale"].float()[..., None, None]


def _to_groups(x: Tensor) -> Tensor:
    """``[..., D]`` to ``[..., D / 16, 16]``."""
    groups = x.shape[-1] // GROUP
    return x.unflatten(-1, (-1, GROUP, groups & -groups)).transpose(-1, -2).flatten(-3, -2)


def _from_groups(x: Tensor) -> Tensor:
    """``[..., D / 16, 16]`` to ``[..., D]``."""
    groups = x.shape[-2]
    return x.unflatten(-2, (-1, groups & -groups)).transpose(-1, -2).flatten(-3)


def _order(device: torch.device) -> Tensor:
    """Slots in the order of survivors, 0 to 7 and 15 to 8; its own inverse, int64 ``[16]``.

    As the count is fixed, a survivor's place then follows from the bits below it in its own half.
    """
    slot = torch.arange(GROUP, device=device)
    return torch.where(slot < GROUP // 2, slot, 23 - slot)


def _bits(device: torch.device) -> Tensor:
    """Bit of every slot of both tokens of a pair, int32 ``[2, 1, 16]``."""
    slot = torch.arange(GROUP, device=device, dtype=torch.int32)
    bit = 4 * (slot % 8) + slot // 8
    return torch.stack((bit, bit + 2)).unsqueeze(1)


def _pack_bits(slots: Tensor) -> Tensor:
    """Bool ``[..., L, D / 16, 16]`` to int32 ``[..., L / 2, D / 16]``."""
    bits = slots.unflatten(-3, (-1, 2)).to(torch.int32) << _bits(slots.device)
    return bits.sum((-3, -1), dtype=torch.int32)


def _unpack_bits(bitmap: Tensor) -> Tensor:
    """Int32 ``[..., L / 2, D / 16]`` to bool ``[..., L, D / 16, 16]``."""
    bits = bitmap[..., None, :, None] >> _bits(bitmap.device)
    return (bits & 1).bool().flatten(-4, -3)
