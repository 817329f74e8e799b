"""Data that crosses the borders between packages: what methods produce and kernels read.

Shapes: B batch, H query heads, H_kv key/value heads, T tokens, D head size, L block length in
tokens, N blocks, K codewords. Everything here is data; behaviour lives with its method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]


class Implementation(StrEnum):
    """Which code computes an op. ``auto`` is resolved while planning and never at run time."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"


class KVFormat(Protocol):
    """How keys or values of one layer are stored; knows nothing of models or caches.

    ``x`` is ``[..., H_kv, L, D]`` with ``L`` a multiple of ``block_length``; ``parameters`` holds
    what ``fit`` returned, leading dimension ``H_kv``. A format that works in a basis of its own has
    one more property, ``basis``: a ``Transform`` that the cache applies last, before ``encode``.
    """

    @property
    def statistics(self) -> tuple[str, ...]: ...
    @property
    def block_length(self) -> int: ...
    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors: ...
    def encode(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensors: ...
    def decode(self, packed: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor: ...
    def bits_per_value(self, head_dim: int) -> float: ...
    def constant_bytes(self, heads: int, head_dim: int) -> int: ...
    def check(self, head_dim: int) -> None: ...


class Transform(Protocol):
    """An exact change of basis around a KV format; composes left to right.

    ``apply`` maps ``[..., H_kv, L, D]`` into the stored basis and ``invert`` back.
    ``prepare_query`` maps ``[B, H, T, D]`` queries so that scores with stored keys are right up to
    the returned shift ``[B, H, T]`` (``None`` when there is none), which is added to the dot
    product before scaling.
    """

    @property
    def statistics(self) -> tuple[str, ...]: ...
    @property
    def sides(self) -> tuple[str, ...]: ...
    def fit(self, statistics: Mapping[str, Tensor]) -> Tensors: ...
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor: ...
    def invert(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor: ...
    def prepare_query(
        self, query: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class PackedBlocks:
    """Every packed block of the keys, or of the values, of one layer.

    Attributes:
        format: The format that encoded the blocks; ``format.decode`` is the specification.
        parameters: What ``format.fit`` returned (may be empty).
        segments: In order; each maps a component name to ``[N_i, B, H_kv, ...]``, contiguous.
            Only the first ``block_counts[b]`` blocks of row ``b`` hold data; rows share slots.
        length: Tokens per block, L.
        addresses: Per component, int64 ``[sum N_i]`` device addresses of each block's ``[B, H_kv,
            ...]`` slab, on the tensors' device; ``None`` where no kernel needs them (CPU).
    """

    format: Any
    parameters: Tensors
    segments: tuple[Tensors, ...]
    length: int
    addresses: Tensors | None = None


@dataclass(frozen=True)
class BlockIndex:
    """Which keys each block of queries reads: whole key blocks, single columns, then averages.

    Positions count from each row's first real token. CSR per batch row and head: the block ids of
    query block ``i`` are ``block_ids[b, h, block_offsets[b, h, i] : block_offsets[b, h, i + 1]]``,
    ascending, never above ``i``; likewise columns, which no listed block of that query block
    covers. Unused capacity is undefined. The N query blocks cover all T tokens; where only the last
    of them are queries (a later part of a prompt), the lists of blocks without one are not read.

    Attributes:
        block_size: Rows of a query block and of a key block, in tokens.
        block_offsets: int32 ``[B, H, N + 1]``.
        block_ids: int32 ``[B, H, capacity]``.
        column_offsets: int32 ``[B, H, N + 1]``, or ``None`` when no query block has columns.
        column_ids: int32 ``[B, H, capacity]``, or ``None``.
        pooled_offsets: int32 ``[B, H, N + 1]``, or ``None`` when nothing is read as an average.
        pooled_ids: int32 ``[B, H, capacity]``, or ``None``. An id is a run of 8 averages of m = 2,
            4 or 8 tokens each; run g of m tokens begins at token 8 m g, and its id is g plus the
            ``T // (8 m')`` of all smaller m'. It stands for keys before the query block, in none of
            its other lists, and weighs as many tokens as it averages.
        permutation: int32 ``[B, H, P]`` positions, or ``None`` where keys keep their order. It
            reorders the keys inside each complete segment: to query blocks of later segments, slot
            s of a listed block is position ``permutation[b, h, s]``. A query block reads its own
            segment in order.
        segment_size: Tokens per segment, a multiple of ``block_size``; 0 without a permutation.
    """

    block_size: int
    block_offsets: Tensor
    block_ids: Tensor
    column_offsets: Tensor | None = None
    column_ids: Tensor | None = None
    pooled_offsets: Tensor | None = None
    pooled_ids: Tensor | None = None
    permutation: Tensor | None = None
    segment_size: int = 0


@dataclass(frozen=True)
class ClusteredWeight:
    """A weight matrix as packed codebook indices.

    Attributes:
        indices: int32 ``[out, words]``; the layout is ``squeeze.kernels.bits``'s, along ``in``.
        codebook: ``[out / rows, in / columns, 2**bits]`` (divisions round up), float16, or where
            ``scale`` is given int8, or uint8 that is the bits of E4M3; ascending.
        scale: float16 ``[out]``, multiplies the codebook entries of each row, or ``None``.
        bits: Width of one index, 1 to 8.
        shape: ``(out, in)`` of the dense matrix.
        rows: Output rows sharing one codebook.
        columns: Input columns sharing one codebook.
        outlier_values: float16 ``[n]``, added to single weights, by rows; or ``None``.
        outlier_columns: int16 ``[n]``, the bits of their unsigned column numbers.
        outlier_offsets: int32 ``[out + 1]``: those of row ``o`` begin at its entry ``o``.
        inputs: ``"float8"``: each token's inputs are rounded to E4M3 under a scale of their own.
    """

    indices: Tensor
    codebook: Tensor
    scale: Tensor | None
    bits: int
    shape: tuple[int, int]
    rows: int
    columns: int
    outlier_values: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_offsets: Tensor | None = None
    inputs: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        return bytes_of(self.tensors())

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, codebooks and scales included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def tensors(self) -> Tensors:
        """Name the stored tensors."""
        return _present(
            indices=self.indices,
            codebook=self.codebook,
            scale=self.scale,
            outlier_values=self.outlier_values,
            outlier_columns=self.outlier_columns,
            outlier_offsets=self.outlier_offsets,
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ClusteredWeight:
        """Return the same description over other tensors, named as in ``tensors``."""
        return replace(self, **_present(**tensors))


@dataclass(frozen=True)
class IntegerWeight:
    """A weight matrix as packed integers: ``W[o, i] = (code - zero) * scale * 2**-exponent``.

    Scale and zero belong to row ``o`` and group ``i // group_size``, the exponent to column ``i``.

    Attributes:
        codes: int32 ``[out, groups * group_size * bits / 32]``, each group packed by
            ``squeeze.kernels.bits``, the last one padded.
        scale: float16 ``[out, groups]``; where ``row_scale`` is given uint8, the bits of E4M3.
        zero: uint8 ``[out, groups]``, or ``None`` where it is ``2**(bits - 1)``.
        exponents: int8 ``[in]``, or ``None`` where no column was scaled before rounding.
        bits: Width of one code, 2 to 8.
        group_size: Input columns sharing a scale, a multiple of 32.
        shape: ``(out, in)`` of the dense matrix.
        folded: What makes the inputs divides them by ``2**exponents`` already; then these are
            stored to be undone and are no part of ``W``.
        row_scale: float32 ``[out]``, powers of two that multiply each row's scales; then each
            token's inputs are rounded to E4M3 under a scale of their own. ``None``: neither.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    exponents: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]
    folded: bool = False
    row_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        return bytes_of(self.tensors())

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, scales, zeros and padding included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def tensors(self) -> Tensors:
        """Name the stored tensors."""
        return _present(
            codes=self.codes,
            scale=self.scale,
            zero=self.zero,
            exponents=self.exponents,
            row_scale=self.row_scale,
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> IntegerWeight:
        """Return the same description over other tensors, named as in ``tensors``."""
        return replace(self, **_present(**tensors))


PackedWeight: TypeAlias = ClusteredWeight | IntegerWeight


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one fused parameter of a mixture of experts, all packed alike.

    Attributes:
        stacked: Describes one expert's matrix; its tensors have one more leading dimension, E.
    """

    stacked: PackedWeight

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        return len(next(iter(self.tensors().values())))

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        return bytes_of(self.tensors())

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, all included."""
        out_features, in_features = self.stacked.shape
        return 8 * self.nbytes / (self.experts * out_features * in_features)

    def expert(self, index: int) -> PackedWeight:
        """Select one expert's packed matrix."""
        return self.stacked.with_tensors({n: t[index] for n, t in self.tensors().items()})

    def tensors(self) -> Tensors:
        """Name the stored tensors."""
        return self.stacked.tensors()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        """Return the same description over other tensors, named as in ``tensors``."""
        return ExpertWeights(self.stacked.with_tensors(tensors))


StoredWeight: TypeAlias = PackedWeight | ExpertWeights


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method without building it."""

    kind: str
    name: str
    idea: str
    source: str
    year: int
    cls: type = field(repr=False)


def _present(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Sum the allocated bytes of a mapping of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """Turn ``"bfloat16"`` or ``torch.bfloat16`` into the torch dtype."""
    if isinstance(name, torch.dtype):
        return name
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a torch dtype: {name!r}")
    return dtype
