"""Two bits for the loudest channels of a head, one bit for the spectrum of the others."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels.bits import pack_bytes, unpack_bytes
from squeeze.quant.kv._protected import RUN, Protected, protect, protected_bits, restore
from squeeze.registry import register
from squeeze.types import Tensors

HALF_MAX = torch.finfo(torch.float16).max
STEP = 0.9957  # standard deviations between the four even levels that fit a Gaussian best
Kind = Literal["rfft", "dct", "hadamard"]


@register(source="https://arxiv.org/abs/2503.16257", year=2025)
@dataclass(frozen=True)
class BinarySpectral:
    """Store ``outliers * D`` loud channels at 2 bits and a transform of the others at 1 bit.

    The format works in a basis that ``basis`` moves a head into: loud channels first, then the
    coefficients of a real orthonormal transform over the other channels of each token, which
    spreads what is left of outliers. A group is ``group_size`` tokens of one channel or
    coefficient. Two bits: ``x = code * scale + zero``, four levels 0.9957 standard deviations
    apart around the group's mean. One bit: ``x = sign(x) * mean|x|``.

    Args:
        outliers: Share of the channels at 2 bits; their number divides D.
        transform: Of the other channels.
        group_size: Tokens sharing constants.
        protected: Of so many tokens of every 128, the most salient or those that lose the most,
            the remainders are stored at 4 bits.
    Cost: ``1 + outliers`` bits per value and ``16 * (1 + outliers) / group_size`` for constants;
        0.03 more for every protected token; one ``n x n`` product per token and step,
        ``n = (1 - outliers) * D``.
    Source: Tao et al., 2025, VidKV, https://arxiv.org/abs/2503.16257, section 3.2.
    Differs: loud channels are calibrated per layer and head instead of chosen from the prompt, so
        that a query is moved into the basis once per step; the transform has as many real
        coefficients as channels, where the source's code keeps both halves of a Fourier
        transform; levels follow a group's spread and not its range, which for Gaussian groups of
        128 tokens leaves 0.12 of the variance instead of 0.25.
    """

    outliers: Annotated[float, Gt(0), Lt(1)] = 0.25
    transform: Kind = "dct"
    group_size: Literal[32, 64, 128] = 128
    protected: Protected = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the basis is fitted to."""
        return self.basis.statistics

    @property
    def basis(self) -> Spectrum:
        """The change of basis around the format; the cache applies it after the recipe's own."""
        return Spectrum(self.outliers, self.transform)

    @property
    def block_length(self) -> int:
        """Tokens that must be encoded together."""
        return RUN if self.protected else self.group_size

    def check(self, head_dim: int) -> None:
        """Refuse a share of outliers that is no whole part of the head.

        Raises:
            UnsupportedError: ``outliers * head_dim`` is no integer that divides ``head_dim``.
        """
        count = self.outliers * head_dim
        if count < 1 or count != int(count) or head_dim % int(count):
            allowed = [f"{n / head_dim:g}" for n in range(4, head_dim) if head_dim % n == 0]
            raise UnsupportedError(
                "kv_cache",
                f"outliers {self.outliers} of heads of {head_dim} channels is {count:g} channels",
                ", ".join(allowed),
                "Change outliers",
            )

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Return no parameters; the basis has them."""
        return {}

    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Quantize and pack whole blocks.

        Args:
            x: ``[..., H_kv, L, D]`` in the basis, any float; L a multiple of ``block_length``.
                C = ``outliers * D``, R = ``D - C``.
            parameters: ``salience`` float ``[..., 1 or H_kv, L]``, if it is to decide which
                tokens are protected.
        Returns:
            ``codes`` uint8 ``[..., H_kv, L / 4, C]``; ``signs`` uint8 ``[..., H_kv, L / 8, R]``;
            ``scale`` float16 ``[..., H_kv, L / group_size, D]``; ``zero`` float16 ``[..., H_kv,
            L / group_size, C]``; and what ``protect`` returns.
        """
        groups = self._grouped(x.float().clamp(-HALF_MAX, HALF_MAX))
        loud, rest = groups.split(self._sizes(x.shape[-1]), dim=-1)
        spread = (STEP * loud.std(-2, correction=0)).to(torch.float16)
        zero = (loud.mean(-2) - 1.5 * spread.float()).to(torch.float16)
        step = spread.float().unsqueeze(-2)
        codes = torch.where(step == 0, 0.0, (loud - zero.float().unsqueeze(-2)) / step)
        size = rest.abs().mean(-2).to(torch.float16)
        packed = {
            "codes": pack_bytes(codes.round().clamp(0, 3).nan_to_num(0).flatten(-3, -2), 2),
            "signs": pack_bytes((rest >= 0).flatten(-3, -2), 1),
            "scale": torch.cat([spread, size], dim=-1),
            "zero": zero,
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
            float32 ``[..., H_kv, L, D]`` in the basis.
        """
        values = self._plain(packed)
        return restore(values, packed) if self.protected else values

    def _plain(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Decode as if no token was protected."""
        length = packed["codes"].shape[-2] * 4
        codes = unpack_bytes(packed["codes"], 2, length).float()
        signs = unpack_bytes(packed["signs"], 1, length).float() * 2 - 1
        values = self._grouped(torch.cat([codes, signs], dim=-1))
        values = values * packed["scale"].float().unsqueeze(-2)
        values[..., : codes.shape[-1]] += packed["zero"].float().unsqueeze(-2)
        return values.flatten(-3, -2)

    def bits_per_value(self, head_dim: int) -> float:
        """Count the stored bits per value, constants included."""
        kept = protected_bits(self.protected, head_dim)
        return (1 + self.outliers) * (1 + 16 / self.group_size) + kept

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Count the basis: one int32 per channel of each head."""
        return 4 * heads * head_dim

    def _grouped(self, x: Tensor) -> Tensor:
        """``[..., L, D]`` to ``[..., L / g, g, D]``."""
        return x.unflatten(-2, (-1, self.group_size))

    def _sizes(self, head_dim: int) -> list[int]:
        """Channels at 2 bits and at 1 bit."""
        count = int(self.outliers * head_dim)
        return [count, head_dim - count]


@dataclass(frozen=True)
class Spectrum:
    """An orthonormal basis: the loudest channels first, then a transform of the others.

    A channel is loud when its range over calibration text is among the ``outliers * D`` widest of
    its head; ``order`` lists the loud ones, then the others, each ascending.
    """

    outliers: float
    transform: Kind

    @property
    def statistics(self) -> tuple[str, ...]:
        """``kv_samples``: keys or values of calibration text, float ``[H_kv, N, D]``."""
        return ("kv_samples",)

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys and values."""
        return ("keys", "values")

    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors:
        """Order the channels: ``order``, int32 ``[H_kv, D]``."""
        samples = statistics["kv_samples"].float()
        ranges = samples.amax(1) - samples.amin(1)
        count = int(self.outliers * samples.shape[-1])
        ranked = ranges.argsort(dim=1, descending=True, stable=True)
        loud, rest = ranked[:, :count], ranked[:, count:]
        order = torch.cat([loud.sort(1).values, rest.sort(1).values], dim=1)
        return {"order": order.to(torch.int32)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Move into the basis.

        Args:
            x: ``[..., H_kv, L, D]``, any float dtype.
            parameters: ``order`` ``[H_kv, D]``.
        Returns:
            Same shape, float32 (float64 for float64 input).
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        order = parameters["order"].long().unsqueeze(-2).expand(wide.shape)
        loud, rest = self._split(wide.gather(-1, order))
        return torch.cat([loud, rest @ self._matrix(rest).mT], dim=-1)

    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Move back; shapes and dtype as in ``apply``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        loud, rest = self._split(wide)
        ordered = torch.cat([loud, rest @ self._matrix(rest)], dim=-1)
        order = parameters["order"].long().unsqueeze(-2).expand(wide.shape)
        return torch.empty_like(ordered).scatter_(-1, order, ordered)

    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Move the query ``[B, H, T, D]`` into the basis; its dtype stays, there is no shift."""
        heads = parameters["order"].shape[0]
        grouped = query.unflatten(1, (heads, -1)).flatten(2, 3)
        moved = self.apply(grouped, parameters).to(query.dtype)
        return moved.reshape(query.shape), None

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Separate the loud channels from the others."""
        count = int(self.outliers * x.shape[-1])
        return x[..., :count], x[..., count:]

    def _matrix(self, rest: Tensor) -> Tensor:
        return transform_matrix(self.transform, rest.shape[-1], rest.dtype, rest.device)


@functools.lru_cache(maxsize=16)
def transform_matrix(kind: Kind, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build an orthonormal real transform ``[coefficients, channels]``.

    Args:
        kind: ``dct``: the second kind. ``rfft``: cosines of all frequencies, then minus the sines
            of those that have one. ``hadamard``: blocks of the largest power of two in ``size``.
        size: Channels, and as many coefficients.
        dtype: Of the result.
        device: Likewise.
    """
    place = torch.arange(size, dtype=torch.float64)
    if kind == "hadamard":
        block = torch.ones(1, 1, dtype=torch.float64)
        while size % (2 * len(block)) == 0:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        matrix = torch.block_diag(*[block] * (size // len(block)))
    elif kind == "dct":
        matrix = torch.cos(math.pi * torch.outer(place, place + 0.5) / size)
    else:
        angles = 2 * math.pi * torch.outer(place, place) / size
        matrix = torch.cat([angles[: size // 2 + 1].cos(), -angles[1 : (size + 1) // 2].sin()])
    return (matrix / matrix.norm(dim=1, keepdim=True)).to(device, dtype)
