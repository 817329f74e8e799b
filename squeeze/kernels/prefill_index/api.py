"""Estimate what attention weighs, select, and list it: what prefill policies are made of.

Nothing waits for the device. Positions count from each row's first real token, tokens from the
first of the batch, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squeeze.errors import UnsupportedError
from squeeze.kernels.linear_checks import require_triton
from squeeze.kernels.prefill_index import reference, reference_elements, reference_estimates
from squeeze.kernels.prefill_index.reference_elements import rounded as rounded
from squeeze.types import Implementation

OP = "prefill_index"
# A row of weights is held in registers.
MOST_BLOCKS = 32768
# The gates of a query are held in registers of one warp.
MOST_CHUNKS = 1024
# A share counts as reached a little earlier: what float32 rounds, or divides inexactly, does not
# decide where a row's weights add up to just that share.
REACHED = 1 - 2.0**-20


@torch.no_grad()
def sampled_mass(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    scaling: float,
    softcap: float | None,
    rows: Sequence[range],
    size: int,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> tuple[Tensor, Tensor]:
    """Sum the attention of sampled queries by key and by block diagonal.

    With a = softmax(scaling * q[i] . k[j]) over j <= i: columns[j] = sum_i a[i, j], and
    diagonals[d] = sum_ij a[i, j] * max(0, 1 - |i - j - d * size| / size).

    Args:
        query: After RoPE, ``[B, H, T_q, D]``, of the last T_q tokens.
        keys: After RoPE, ``[B, H_kv, T, D]``; head h reads key head h // (H / H_kv).
        starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
        scaling: Multiplies the dot products.
        softcap: Bound of the scores, or ``None``.
        rows: Tokens whose queries are read, ascending, each among the last T_q.
        size: Tokens per block.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        Columns by token, float32 ``[B, H, T]``, and diagonals, ``[B, H, ceil(T / size)]``. Queries
        and keys of padding have no part in them.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: two products of the sampled queries and the keys; 12 bytes of scratch memory per sampled
        query and block of keys (``reference``: about 12 per sampled query and key).
    """
    _check(query, keys, starts)
    T, T_q = keys.shape[2], query.shape[2]
    if not rows or any(len(part) < 1 or part[0] < T - T_q or part[-1] >= T for part in rows):
        raise ValueError(f"{OP}: sampled tokens {rows} must be among {T - T_q} to {T - 1}")
    if _by_triton(query, implementation):
        from squeeze.kernels.prefill_index import sampled

        return sampled.sampled_mass(query, keys, starts, scaling, softcap, rows, size)
    return reference_estimates.sampled_mass(query, keys, starts, scaling, softcap, rows, size)


@torch.no_grad()
def weigh_cells(
    query: Tensor,
    keys: Tensor,
    starts: Tensor | None,
    stride: int,
    size: int,
    scaling: float,
    softcap: float | None,
    rows: range,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Weigh the blocks of keys for query blocks ``rows`` by antidiagonals of cells.

    Cell a holds positions a S to a S + S - 1, S = ``stride``. score[a, c] = scaling / S * sum_t
    q[a S + S - 1 - t] . k[c S + t], tokens that are not there counting as 0; softmax over c <= a; a
    block weighs the sum over its cells of keys, averaged over all size / S cells of queries, of
    which those without a query count as 0.

    Args:
        query, keys, starts, scaling, softcap, implementation: As for ``sampled_mass``.
        stride: Tokens per cell; a power of two of at least 4.
        size: Tokens per block, a multiple of ``stride``.
        rows: Query blocks, by position.
    Returns:
        float32 ``[B, H, len(rows), rows.stop]``; a full block's weights sum to 1 over the blocks up
        to its own, and are 0 after it.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: T^2 / (2 S) products of head size per head and all rows.
    """
    _check(query, keys, starts)
    if (
        stride < 2
        or stride & (stride - 1)
        or size % stride
        or rows.stop * size > keys.shape[2] + size
    ):
        raise ValueError(f"{OP}: blocks {rows} of {size} tokens in cells of {stride}")
    call = (query, keys, starts, stride, size, scaling, softcap, rows)
    if _by_triton(query, implementation):
        from squeeze.kernels.prefill_index import cells

        return cells.weigh_cells(*call)
    return reference_estimates.weigh_cells(*call)


@torch.no_grad()
def round_keys(
    keys: Tensor,
    key_mean: Tensor,
    mean: Tensor,
    scaling: float,
    bits: int,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round keys less their mean to few bits, and sum what the queries' mean adds to their scores.

    Args:
        keys: ``[B, H_kv, T, D]``.
        key_mean: Taken off the keys, float32 ``[B, H_kv, 1, D]``.
        mean: Of the queries, float32 ``[B, H, 1, D]``.
        scaling: Multiplies the dot products.
        bits: Of the integers, 2 to 8.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        Integers shaped as ``keys``, int8 or, where that multiplies faster, float8_e4m3fn; the scale
        of each, float32 ``[B, H_kv, T]``; and scaling * mean . (key - key_mean), ``[B, H, T]``.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: ``triton``: one pass over the keys.
    """
    B, H_kv, _, D = keys.shape
    H = mean.shape[1]
    if key_mean.shape != (B, H_kv, 1, D) or mean.shape != (B, H, 1, D) or H % H_kv:
        raise ValueError(f"{OP}: keys {tuple(keys.shape)} with means {tuple(mean.shape)}")
    call = (keys, key_mean, mean, scaling, bits)
    if _by_triton(keys, implementation):
        from squeeze.kernels.prefill_index import key_elements

        return key_elements.round_keys(*call)
    return reference_elements.round_keys(*call)


@torch.no_grad()
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
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round queries to few bits, and sum the exact scores of the keys near them.

    Args:
        query: By position, from block ``first`` on, whole blocks, of each the first query and
            every ``stride``-th after it, ``[B, H, n * size / stride, D]``.
        keys: By position, whole blocks, ``[B, H_kv, N * size, D]``.
        mean: Taken off the queries that are rounded, float32 ``[B, H, 1, D]``.
        key_mean: Taken off the keys, float32 ``[B, H_kv, 1, D]``.
        begins: Position of each row's first query, int64 ``[B]``.
        lengths: Real tokens of each row, int64 ``[B]``.
        size: Tokens per block.
        first: Block that holds the first query.
        stride: Tokens from one query to the next; 1, 2, 4 or 8.
        scaling, softcap, implementation: As for ``sampled_mass``.
        bits: Of the integers, 2 to 8.
    Returns:
        Integers shaped as ``query``, int8 or, where that multiplies faster, float8_e4m3fn; the
        scale of each times ``scaling``, float32 ``[B, H, n * size / stride]``; and ln l_i, l_i the
        sum of exp(score) over block 0, the own one up to the query and the one before, likewise,
        infinite where there is no query.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    """
    fits = stride in (1, 2, 4, 8) and query.shape[2] * stride % size == 0
    if not fits or keys.shape[2] < query.shape[2] * stride + first * size:
        raise ValueError(f"{OP}: queries {tuple(query.shape)} with keys {tuple(keys.shape)}")
    numbers = (begins, lengths, size, first, stride, scaling, softcap, bits)
    call = (query, keys, mean, key_mean, *numbers)
    if _by_triton(query, implementation):
        from squeeze.kernels.prefill_index import elements

        return elements.round_queries(*call)
    return reference_elements.round_queries(*call)


@torch.no_grad()
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
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Find the largest relative score of each pair of blocks by a low-bit estimate of all.

    With s_ij = scales_i * key_scales_j * (codes_i . key_codes_j) + added_j, the sum of products
    exact: max over the queries i of a block and the keys j of another of s_ij - totals_i, s_ij
    bounded by ``softcap`` before.

    Args:
        codes, scales, totals: What ``round_queries`` returned.
        key_codes, key_scales, added: What ``round_keys`` returned of N * size tokens.
        size, first, stride, softcap, implementation: As for ``round_queries``.
        rows: Query blocks, by position.
    Returns:
        float32 ``[B, H, len(rows), rows.stop]``; undefined after a query block's own, where it also
        counts keys after the query.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: T^2 / (2 stride) eight-bit products of head size per head and all rows; nothing kept but
        what is returned (``reference``: float32 products, by parts of 256 MiB).
    """
    queries = codes.shape[2] * stride // size + first
    if rows.start < first or rows.stop > queries or key_codes.shape[2] < rows.stop * size:
        raise ValueError(f"{OP}: blocks {rows} of {queries} and keys {tuple(key_codes.shape)}")
    numbers = (size, first, stride, softcap, rows)
    call = (codes, scales, totals, key_codes, key_scales, added, *numbers)
    if _by_triton(scales, implementation):
        from squeeze.kernels.prefill_index import elements

        return elements.weigh_elements(*call)
    return reference_elements.weigh_elements(*call)


@torch.no_grad()
def select_blocks(
    weights: Tensor,
    first: int,
    limits: Tensor,
    lengths: Tensor,
    size: int,
    mass: float | Tensor,
    floor: Tensor | None,
    require: Tensor | None,
    counts: Tensor,
    offsets: Tensor,
    ids: Tensor,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> None:
    """List the blocks of most weight for query blocks ``first`` to ``first + R - 1``, in place.

    A query block takes block 0 and its own, then what ``require`` marks, then the others by
    falling weight, the nearer of two equals first, until what it took weighs ``mass`` of its row,
    or weights fall below ``floor``, or it has as many as its limit.

    Args:
        weights: float32 ``[B, H, R, C]`` in 0..1, C > first + R - 1; what lies after a query
            block's own is ignored.
        first: Query block of the first row.
        limits: Most blocks of each row, int32 ``[R]`` or ``[H, R]``.
        lengths: Real tokens of each batch row, int64 ``[B]``; blocks past them list nothing.
        size: Tokens per block.
        mass: Share of a row's weight to reach, one number or float32 ``[H, 1, 1]``; 1 takes
            everything within the limit. It counts as reached at 1 - 2^-20 of it.
        floor: Smallest weight to take, float32 ``[B, H, 1, 1]``, or ``None``.
        require: Marks blocks to take first, bool, broadcastable to ``weights``, or ``None``.
        counts: int32 ``[B, H, N]``, written for these rows.
        offsets: int32 ``[B, H, N + 1]``; read at ``first``, written after it for these rows.
        ids: int32 ``[B, H, capacity]``; the rows' ids, ascending, go behind those before them. The
            last slot is undefined.
        implementation: ``auto`` belongs to the plan and is refused here.
    Raises:
        ValueError: dtypes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
        UnsupportedError: ``triton`` with rows of more than 32768 blocks.
    """
    dtypes = [weights.dtype, *(x.dtype for x in (limits, counts, offsets, ids))]
    if (
        dtypes != [torch.float32] + 4 * [torch.int32]
        or weights.shape[-1] < first + weights.shape[2]
    ):
        raise ValueError(f"{OP}: need float32 weights and int32 lists, got {dtypes}")
    mass = _reached(mass)
    call = (weights, first, limits, lengths, size, mass, floor, require, counts, offsets, ids)
    if _by_triton(weights, implementation):
        _check_width(weights)
        from squeeze.kernels.prefill_index import selection

        return selection.select_blocks(*call)
    return reference.select_blocks(*call)


@torch.no_grad()
def select_levels(
    weights: Tensor,
    first: int,
    limits: Tensor,
    lengths: Tensor,
    size: int,
    tokens: int,
    masses: Sequence[float | Tensor],
    exact: Sequence[Tensor],
    averaged: Sequence[Tensor],
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> None:
    """List blocks to read exactly and as averages of 2, 4 and 8 tokens, in place.

    A query block orders the blocks that it may read: block 0 and its own, then by falling weight,
    the nearer of two equals first. Each of the four levels goes on from where the one before ended
    until ``masses`` of the row's weight is read, or it has as many blocks as its limit; the first
    has at least two. What is left is skipped.

    Args:
        weights, first, lengths, size: As for ``select_blocks``; ``size`` is a multiple of 64.
        limits: Most blocks of each level and row, int32 ``[4, R]``.
        tokens: Of the keys, T, by which averages are numbered (``BlockIndex``).
        masses: Share of a row's weight read when a level ends; 1 reads all. The first one number or
            float32 ``[H, 1, 1]``. They count as reached at 1 - 2^-20 of them.
        exact: Counts, offsets and ids of blocks, written as ``select_blocks`` does.
        averaged: The same of runs of averages, by level, ascending.
        implementation: ``auto`` belongs to the plan and is refused here.
    Raises:
        ValueError: dtypes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
        UnsupportedError: ``triton`` with rows of more than 32768 blocks.
    """
    dtypes = [weights.dtype, *(x.dtype for x in (limits, *exact, *averaged))]
    if (
        dtypes != [torch.float32] + 7 * [torch.int32]
        or weights.shape[-1] < first + weights.shape[2]
        or size % 64
    ):
        raise ValueError(f"{OP}: need float32 weights and int32 lists, got {dtypes}")
    masses = [_reached(mass) for mass in masses]
    call = (weights, first, limits, lengths, size, tokens, masses, exact, averaged)
    if _by_triton(weights, implementation):
        _check_width(weights)
        from squeeze.kernels.prefill_index import levels

        return levels.select_levels(*call)
    return reference.select_levels(*call)


@torch.no_grad()
def route_chunks(
    query: Tensor,
    means: Tensor,
    real: Tensor,
    number: float | Tensor,
    most: int,
    chunk_size: int,
    size: int,
    first: int,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> Tensor:
    """Route queries to the earlier chunks of the largest gate q . mean; count them by query block.

    Args:
        query: Consecutive queries by position, ``[B, H, R * size, D]``.
        means: Mean key of each chunk, float32 ``[B, H_kv, C, D]``, as many as concern the queries.
        real: Marks the queries that there are, bool ``[B, R * size]``.
        number: Chunks of each query, one number or float32 ``[H, 1, 1]``; fractions round up.
        most: The most that any head has.
        chunk_size: Tokens per chunk, a multiple of ``size``.
        size: Queries per block.
        first: Position of the first query, a multiple of ``size``.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        Share of a block's queries that were routed to each chunk, float32 ``[B, H, R, C]``; of
        equal gates any.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
        UnsupportedError: ``triton`` with more than 1024 chunks.
    Cost: ``triton``: three products of queries and means in the queries' precision, 256 MiB of
        gates at a time; ``reference``: 4 bytes per query and chunk.
    """
    if query.shape[2] != real.shape[-1] or query.shape[2] % size or chunk_size % size:
        raise ValueError(f"{OP}: queries {tuple(query.shape)} in blocks of {size} of {chunk_size}")
    call = (query, means, real, number, most, chunk_size, size, first)
    if _by_triton(query, implementation):
        if means.shape[2] > MOST_CHUNKS:
            raise UnsupportedError(OP, f"{means.shape[2]} chunks", f"at most {MOST_CHUNKS}")
        from squeeze.kernels.prefill_index import routing

        return routing.route_chunks(*call)
    return reference_estimates.route_chunks(*call)


@torch.no_grad()
def add_masses(
    weights: Tensor,
    octave: int,
    unit: float,
    held: Tensor,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> None:
    """Add each head's weights to bins by their size; the first begins at 1 and goes downwards.

    held[floor(-octave * log2(w))] += floor(unit * w), the bin clamped to those there are. A weight
    at the edge of two bins belongs to either.

    Args:
        weights: float32 ``[B, H, R, C]``, 0 to 1.
        octave: Bins by which a weight halves.
        unit: Integer that stands for the weight 1.
        held: int64 ``[B, H, bins]``, added to in place.
        implementation: ``auto`` belongs to the plan and is refused here.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    Cost: ``triton``: reads the weights once; ``reference``: 20 bytes per weight.
    """
    if weights.shape[:2] != held.shape[:2] or held.dtype != torch.int64:
        raise ValueError(f"{OP}: weights {tuple(weights.shape)} in bins {tuple(held.shape)}")
    call = (weights, octave, unit, held)
    if _by_triton(weights, implementation):
        from squeeze.kernels.prefill_index import masses

        return masses.add_masses(*call)
    return reference.add_masses(*call)


@torch.no_grad()
def choose_lines(
    columns: Tensor,
    diagonals: Tensor,
    starts: Tensor | None,
    size: int,
    nearest: int,
    verticals: int | Tensor,
    slashes: int | Tensor,
    most: tuple[int, int],
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> tuple[Tensor, Tensor]:
    """Choose the heaviest columns outside block 0, and block diagonals; of equals the first ones.

    Args:
        columns: Mass of each token's column, float32 ``[B, H, T]``, not negative.
        diagonals: Mass of each block diagonal, float32 ``[B, H, ceil(T / size)]``, not negative.
        starts: int64 ``[B]``, left-padding tokens of each row, or ``None``.
        size: Tokens per block.
        nearest: Block diagonals from distance 0 on that are always chosen; at least 1.
        verticals: Columns to choose, one number or int32 ``[H]``.
        slashes: Block diagonals to choose, the nearest ones included, likewise.
        most: The most that any head chooses of either; what is more is left out.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        Positions of columns, int32 ``[B, H, most[0]]``, ascending, T fills up; and distances in
        blocks, int32 ``[B, H, most[1]]``, descending, ceil(T / size) fills up. Nothing is chosen
        past a row's end.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    """
    if columns.shape[:2] != diagonals.shape[:2] or diagonals.shape[-1] != -(
        -columns.shape[-1] // size
    ):
        raise ValueError(f"{OP}: columns {columns.shape} with diagonals {diagonals.shape}")
    call = (columns, diagonals, starts, size, nearest, verticals, slashes, most)
    if _by_triton(columns, implementation):
        from squeeze.kernels.prefill_index import choice

        return choice.choose_lines(*call)
    return reference.choose_lines(*call)


@torch.no_grad()
def list_lines(
    columns: Tensor,
    distances: Tensor,
    lengths: Tensor,
    size: int,
    blocks: int,
    first: int,
    *,
    implementation: Implementation = Implementation.REFERENCE,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """List, for every query block, block diagonals and the columns outside them.

    Args:
        columns: Positions of columns, integers ``[B, H, V]``, ascending, none in block 0; what is
            not before the last block begins fills up.
        distances: Of block diagonals in blocks, integers ``[B, H, S]``, descending, 0 among them;
            ``blocks`` fills up.
        lengths: Real tokens of each row, int64 ``[B]``; blocks past them list nothing.
        size: Tokens per block.
        blocks: Query blocks, N.
        first: Query block to begin with; those before it list nothing.
        implementation: ``auto`` belongs to the plan and is refused here.
    Returns:
        Offsets int32 ``[B, H, N + 1]`` and ids int32 of blocks, block 0 always among them, and the
        same of columns, as ``BlockIndex`` has them, or twice ``None`` where V is 0.
    Raises:
        ValueError: shapes that do not fit, or ``auto``.
        DeviceError: ``triton`` without Triton, or with tensors it cannot run on.
    """
    if columns.shape[:2] != distances.shape[:2] or distances.shape[-1] < 1:
        raise ValueError(f"{OP}: columns {columns.shape} with distances {distances.shape}")
    call = (columns, distances, lengths, size, blocks, first)
    if _by_triton(lengths.float(), implementation):
        from squeeze.kernels.prefill_index import lines

        return lines.list_lines(*call)
    return reference.list_lines(*call)


def _reached(mass: float | Tensor) -> float | Tensor:
    """Return the share from which on ``mass`` counts as reached."""
    if isinstance(mass, Tensor):
        return torch.where(mass < 1.0, REACHED * mass, mass)
    return REACHED * mass if mass < 1.0 else mass


def _check_width(weights: Tensor) -> None:
    if weights.shape[-1] > MOST_BLOCKS:
        raise UnsupportedError(OP, f"{weights.shape[-1]} blocks", f"at most {MOST_BLOCKS}")


def _by_triton(x: Tensor, implementation: Implementation) -> bool:
    if implementation is Implementation.AUTO:
        raise ValueError(f"{OP}: implementation must be resolved before the call")
    if implementation is Implementation.TRITON:
        require_triton(OP, x)
    return implementation is Implementation.TRITON


def _check(query: Tensor, keys: Tensor, starts: Tensor | None) -> None:
    (B, H, T_q, D), (H_kv, T) = query.shape, keys.shape[1:3]
    if keys.shape != (B, H_kv, T, D) or H % H_kv or T_q > T or query.dtype != keys.dtype:
        raise ValueError(f"{OP}: queries {tuple(query.shape)} with keys {tuple(keys.shape)}")
    if starts is not None and (starts.shape != (B,) or starts.dtype != torch.int64):
        raise ValueError(f"{OP}: starts must be int64 [{B}], got {starts.dtype} {starts.shape}")
