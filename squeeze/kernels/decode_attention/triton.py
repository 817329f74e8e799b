"""Split-KV decode attention in Triton: one pass over packed blocks and exact slots, one merge.

A program owns the query rows of one KV head (the group's heads times the current tokens, packed
into one tile) and a run of blocks, or the exact slots (split 0). Blocks are reached through tables
of addresses, so segments of the cache need not be adjacent. How a block is read comes from
``tiles/<format>.py``.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeeze.kernels.decode_attention import tuning
from squeeze.kernels.decode_attention.product import multiply, multiply_add
from squeeze.types import PackedBlocks

LOG2_E = math.log2(math.e)
INTERPRETED_PROGRAMS = 12
# A split shorter than this costs more to start and merge than it saves.
TOKENS_PER_SPLIT = 128
MAX_SPLITS = 256
# Two stages of keys and values of this many tokens leave room for eight programs on a processor.
EXACT_TOKENS = 32


class Side(NamedTuple):
    """What the kernel is given of the packed keys or values."""

    tables: tuple[Tensor, ...]
    module: ModuleType
    meta: tuple[int, ...]
    parts: tuple[int, int, int]
    warps: int
    sizes: tuple[tuple[int, int], ...] = ()  # see ``_prefetch``


@triton.jit
def _prefetch_component(address, SIZE: tl.constexpr, LINES: tl.constexpr):
    """Ask for SIZE bytes to be brought into the GPU's cache, a line per thread."""
    lines = tl.arange(0, LINES) % ((SIZE + 127) // 128)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [address + lines * 128],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch(tables, block, slab, SIZES: tl.constexpr):
    """Prefetch one head's part of a block; SIZES has (bytes, power of two of lines) pairs."""
    COUNT: tl.constexpr = len(SIZES)
    for i in tl.static_range(0, COUNT):
        address = tl.load(tables[i] + block) + slab * SIZES[i][0]
        _prefetch_component(address, SIZES[i][0], SIZES[i][1])


@triton.jit
def _soft_cap(scores, cap):
    """``cap * tanh(scores / cap)`` of base-2 scores and cap; stays finite for any score."""
    return cap - 2.0 * cap / (tl.exp2(scores * (2.0 * 1.4426950408889634 / cap)) + 1.0)


@triton.jit
def _weigh(scores, maximum, total):
    """One step of the base-2 online softmax: weights, decay of what was summed, new state."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(maximum - finite)
    return weights, decay, new, total * decay + tl.sum(weights, 1)


@triton.jit
def _query_parts(query, offsets, valid, PARTS: tl.constexpr):
    """Load the query rows as a tuple of channel ranges ``[M, width]``, zero outside."""
    channel = tl.arange(0, PARTS[2])
    mask = valid[:, None] & (channel < PARTS[1])[None, :]
    COUNT: tl.constexpr = PARTS[0]
    result = ()
    for part in tl.static_range(0, COUNT):
        columns = channel + part * PARTS[1]
        tile = tl.load(query + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
        result = result + (tile,)
    return result


@triton.jit
def _store_parts(partial, row, valid, output, PARTS: tl.constexpr, STRIDE, D: tl.constexpr):
    """Store a tuple of channel ranges into the partial outputs ``[rows, splits, D]``."""
    channel = tl.arange(0, PARTS[2])
    COUNT: tl.constexpr = PARTS[0]
    mask = valid[:, None] & (channel < PARTS[1])[None, :]
    for part in tl.static_range(0, COUNT):
        columns = channel + part * PARTS[1]
        tl.store(partial + row[:, None] * (STRIDE * D) + columns[None, :], output[part], mask=mask)


@triton.jit
def _rows(slab, kv_heads, groups, steps, M: tl.constexpr):
    """Of the tile's rows: batch row, KV head, query head, step, row of the scratch, is valid."""
    index = tl.program_id(2) * M + tl.arange(0, M)
    head = slab % kv_heads
    heads = head * groups + index // steps
    row = slab * (groups * steps) + index
    return slab // kv_heads, head, heads, index % steps, row, index < groups * steps


@triton.jit
def _exact(
    query,
    exact_keys,
    exact_values,
    exact_counts,
    partial,
    strides,
    key_strides,
    value_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    splits,
    D: tl.constexpr,
    M: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Walk the exact slots in tiles of EXACT tokens, causal among the current ones."""
    WIDTH: tl.constexpr = PARTS[2]
    slab = tl.program_id(1).to(tl.int64)
    batch, head, heads, step, row, valid = _rows(slab, kv_heads, groups, steps, M)
    offsets = batch * strides[0] + heads * strides[1] + step * strides[2]
    tile = _query_parts(query, offsets, valid, PARTS)[0]
    count = tl.load(exact_counts + batch)
    limits = count - (steps - 1 - step)
    keys = exact_keys + batch * key_strides[0] + head * key_strides[1]
    values = exact_values + batch * value_strides[0] + head * value_strides[1]
    channel = tl.arange(0, WIDTH)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.zeros((M, WIDTH), tl.float32)
    for start in tl.range(0, count, EXACT, num_stages=2):
        slot = start + tl.arange(0, EXACT)
        mask = (slot < count)[:, None] & (channel < D)[None, :]
        places = slot[:, None].to(tl.int64) * key_strides[2] + channel[None, :]
        loaded = tl.load(keys + places, mask=mask, other=0.0)
        scores = multiply(tile, tl.trans(loaded)) * scaling
        if HAS_SOFTCAP:
            scores = _soft_cap(scores, softcap)
        visible = slot[None, :] < limits[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        weights, decay, maximum, total = _weigh(scores, maximum, total)
        places = slot[:, None].to(tl.int64) * value_strides[2] + channel[None, :]
        loaded = tl.load(values + places, mask=mask, other=0.0)
        output *= decay[:, None]
        output = multiply_add(weights.to(loaded.dtype), loaded, output)
    _store_parts(partial, row, valid, (output,), PARTS, splits + 1, D)
    return maximum, total


@triton.jit
def _packed(
    query,
    shift,
    key_tables,
    value_tables,
    block_counts,
    partial,
    strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    splits,
    D: tl.constexpr,
    M: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_SCORE: tl.constexpr,
    KEY_META: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_ACCUMULATE: tl.constexpr,
    VALUE_META: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    KEY_SIZES: tl.constexpr,
    VALUE_SIZES: tl.constexpr,
):
    """Walk this split's share of the row's packed blocks, one block of L tokens at a time."""
    COUNT: tl.constexpr = VALUE_PARTS[0]
    WIDTH: tl.constexpr = VALUE_PARTS[2]
    dtype: tl.constexpr = query.dtype.element_ty
    split = tl.program_id(0)
    slab = tl.program_id(1).to(tl.int64)
    batch, _, heads, step, row, valid = _rows(slab, kv_heads, groups, steps, M)
    offsets = batch * strides[0] + heads * strides[1] + step * strides[2]
    tiles = _query_parts(query, offsets, valid, KEY_PARTS)
    count = tl.load(block_counts + batch)
    share = tl.cdiv(count, splits)
    first = (split - 1) * share
    last = tl.minimum(first + share, count)
    if HAS_SHIFT:
        added = tl.load(shift + row, mask=valid, other=0.0)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = ()
    for _ in tl.static_range(0, COUNT):
        output = output + (tl.zeros((M, WIDTH), tl.float32),)
    for block in range(first, last):
        if block + 1 < last:
            _prefetch(key_tables, block + 1, slab, KEY_SIZES)
            _prefetch(value_tables, block + 1, slab, VALUE_SIZES)
        scores = KEY_SCORE(key_tables, block, slab, tiles, KEY_META)
        if HAS_SHIFT:
            scores += added[:, None]
        scores *= scaling
        if HAS_SOFTCAP:
            scores = _soft_cap(scores, softcap)
        weights, decay, maximum, total = _weigh(scores, maximum, total)
        decayed = ()
        for part in tl.static_range(0, COUNT):
            decayed = decayed + (output[part] * decay[:, None],)
        output = VALUE_ACCUMULATE(value_tables, block, slab, weights, decayed, dtype, VALUE_META)
    _store_parts(partial, row, valid, output, VALUE_PARTS, splits + 1, D)
    return maximum, total


@triton.jit(do_not_specialize=["splits"])
def _attend(
    query,
    packed_query,
    shift,
    key_tables,
    value_tables,
    block_counts,
    exact_keys,
    exact_values,
    exact_counts,
    partial,
    maxima,
    totals,
    query_strides,
    packed_query_strides,
    key_strides,
    value_strides,
    scaling,
    softcap,
    kv_heads,
    groups,
    steps,
    splits,
    D: tl.constexpr,
    M: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_SCORE: tl.constexpr,
    KEY_META: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_ACCUMULATE: tl.constexpr,
    VALUE_META: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    KEY_SIZES: tl.constexpr,
    VALUE_SIZES: tl.constexpr,
    DENSE_PARTS: tl.constexpr,
):
    """Online softmax over one split: ``o = sum 2**(s - m) v``, ``l = sum 2**(s - m)``, ``m``.

    Split 0 walks the exact slots, the others share the row's packed blocks evenly. Query
    tile ``[M, D]``, scores ``[M, L]`` and output stay in registers; products take operands of the
    query's dtype and add up in float32, as do m and l.
    """
    split = tl.program_id(0)
    slab = tl.program_id(1).to(tl.int64)
    row, valid = _rows(slab, kv_heads, groups, steps, M)[4:]
    partial += split * D
    maximum = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    if split == 0:
        maximum, total = _exact(
            query,
            exact_keys,
            exact_values,
            exact_counts,
            partial,
            query_strides,
            key_strides,
            value_strides,
            scaling,
            softcap,
            kv_heads,
            groups,
            steps,
            splits,
            D,
            M,
            EXACT,
            HAS_SOFTCAP,
            DENSE_PARTS,
        )
    elif PACKED:
        maximum, total = _packed(
            packed_query,
            shift,
            key_tables,
            value_tables,
            block_counts,
            partial,
            packed_query_strides,
            scaling,
            softcap,
            kv_heads,
            groups,
            steps,
            splits,
            D,
            M,
            HAS_SHIFT,
            HAS_SOFTCAP,
            KEY_SCORE,
            KEY_META,
            KEY_PARTS,
            VALUE_ACCUMULATE,
            VALUE_META,
            VALUE_PARTS,
            KEY_SIZES,
            VALUE_SIZES,
        )
    tl.store(maxima + row * (splits + 1) + split, maximum, mask=valid)
    tl.store(totals + row * (splits + 1) + split, total, mask=valid)


@triton.jit(do_not_specialize=["columns"])
def _merge(
    partial,
    maxima,
    totals,
    packed_output,
    exact_output,
    lse,
    exact_splits,
    columns,
    D: tl.constexpr,
    ALL: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_OUTPUT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Combine one row's splits: ``o = sum o_i 2**(m_i - m) / sum l_i 2**(m_i - m)``.

    A program takes WIDTH channels of one row and all splits at once, in float32; the first
    ``exact_splits`` of a row's ``columns`` splits are exact slots.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, ALL)
    there = part < columns
    places = row * columns + part
    if OVERLAP:
        # Launched while the splits still ran: wait for them, and let the next kernel do the same.
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.load(
        partial + places[:, None] * D + channel[None, :],
        mask=there[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    local = tl.load(maxima + places, mask=there, other=float("-inf"))
    sums = tl.load(totals + places, mask=there, other=0.0)
    maximum = tl.max(local, 0)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2(local - finite)
    total = tl.sum(sums * weights, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    weights /= divisor
    target = row * D + channel
    if SPLIT_OUTPUT:
        exact = tl.where(part < exact_splits, weights, 0.0)
        packed = tl.where(part < exact_splits, 0.0, weights)
        exact = tl.sum(tile * exact[:, None], 0)
        tl.store(exact_output + target, exact, mask=channel < D)
        tl.store(packed_output + target, tl.sum(tile * packed[:, None], 0), mask=channel < D)
    else:
        tl.store(packed_output + target, tl.sum(tile * weights[:, None], 0), mask=channel < D)
    if tl.program_id(1) == 0:
        logarithm = (finite + tl.log2(divisor)) * 0.6931471805599453
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), logarithm))


def decode_attention(
    query: Tensor,
    packed_query: Tensor,
    shift: Tensor | None,
    keys: PackedBlocks | None,
    values: PackedBlocks | None,
    block_counts: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    exact_counts: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    max_blocks: int,
    split_output: bool,
    output_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Launch both kernels; arguments and results as in ``api.decode_attention``.

    Nothing is read back from the device: the grid follows from ``max_blocks``, and rows with fewer
    blocks share theirs among the same programs. The first long call of a kind times the launch
    settings, unless a CUDA graph is being recorded.

    Raises:
        ValueError: a dtype, stride or block length that the kernel does not take.
    Cost: scratch of ``4 * (D + 2) * (splits + 1)`` bytes per query row.
    """
    _check([query, packed_query, exact_keys, exact_values], shift)
    size, kv_heads = query.shape[3], exact_keys.shape[1]
    rows = query.shape[1] // kv_heads * query.shape[2]
    widest = 16 if query.dtype == torch.float32 else 64
    tile = min(widest, max(8, triton.next_power_of_2(rows)))
    sides = [_side(blocks, exact_counts, size) for blocks in (keys, values)]
    options = constants(
        *sides,
        size=size,
        tile=tile,
        packed=keys is not None and max_blocks > 0,
        shifted=shift is not None,
        capped=softcap is not None,
    )
    tokens = 0 if keys is None else max_blocks * keys.length
    dense = (query, packed_query, shift, exact_keys, exact_values)
    counts = (block_counts, exact_counts)

    def launch(setting: tuning.Setting) -> tuple[Tensor, ...]:
        return _launch(
            dense,
            counts,
            sides,
            options,
            scaling,
            softcap,
            tokens,
            setting,
            (split_output, output_dtype),
        )

    settings = tuning.candidates(max(side.warps for side in sides), tile)
    if not query.is_cuda or not options["PACKED"]:
        return launch(settings[0])
    facts = [(side.module.__name__, side.meta) for side in sides]
    key = (query.device, query.dtype, size, tile, shift is None, softcap is None, *facts)
    work = tokens * query.shape[0] * kv_heads
    return launch(tuning.choose(key, settings, work, launch))


class Scratch(NamedTuple):
    """Where splits leave their results, and where these are merged to.

    Attributes:
        partial: float32 ``[rows, splits, D]``, rows in the order ``[B, H_kv, G, T_q]``.
        maxima: float32 ``[rows, splits]``, base-2.
        totals: As ``maxima``.
        outputs: ``[1 or 2, B, H, T_q, D]``: packed and exact part, or both together.
        lse: float32 ``[B, H, T_q]``.
    """

    partial: Tensor
    maxima: Tensor
    totals: Tensor
    outputs: Tensor
    lse: Tensor

    @classmethod
    def allocate(
        cls, query: Tensor, splits: int, split_output: bool, dtype: torch.dtype = torch.float32
    ) -> Scratch:
        """Reserve memory for a call's splits."""
        batch, heads, steps, size = query.shape
        shape = (batch * heads * steps, splits)
        partial = query.new_empty(*shape, size, dtype=torch.float32)
        maxima, totals = query.new_empty(2, *shape, dtype=torch.float32)
        outputs = query.new_empty(2 if split_output else 1, *query.shape, dtype=dtype)
        lse = query.new_empty(batch, heads, steps, dtype=torch.float32)
        return cls(partial, maxima, totals, outputs, lse)

    def merge(self, exact_splits: int, overlap: bool = False) -> tuple[Tensor, ...]:
        """Combine the splits, of which the first ``exact_splits`` are exact slots.

        With ``overlap`` the launch does not wait for the kernel before it, which must allow that.
        """
        rows, splits, size = self.partial.shape
        width = min(16, triton.next_power_of_2(size))
        _merge[(rows, triton.cdiv(size, width))](
            self.partial,
            self.maxima,
            self.totals,
            self.outputs[0],
            self.outputs[-1],
            self.lse,
            exact_splits,
            splits,
            D=size,
            ALL=triton.next_power_of_2(splits),
            WIDTH=width,
            SPLIT_OUTPUT=self.outputs.shape[0] == 2,
            OVERLAP=overlap,
            num_warps=4,
            **({"launch_pdl": True} if overlap else {}),
        )
        return (*self.outputs.unbind(0), self.lse)


def _launch(
    dense: tuple[Any, ...],
    counts: tuple[Tensor, Tensor],
    sides: list[Side],
    options: dict[str, Any],
    scaling: float,
    softcap: float | None,
    tokens: int,
    setting: tuning.Setting,
    results: tuple[bool, torch.dtype],
) -> tuple[Tensor, ...]:
    """Allocate scratch and results, and run both kernels under one setting."""
    query, packed_query, shift, exact_keys, exact_values = dense
    batch, heads, steps, _ = query.shape
    kv_heads = exact_keys.shape[1]
    rows = heads // kv_heads * steps
    tiles = triton.cdiv(rows, options["M"])
    splits = _splits(query.device, batch * kv_heads * tiles, tokens, setting.programs)
    scratch = Scratch.allocate(query, splits + 1, *results)
    _attend[(splits + 1, batch * kv_heads, tiles)](
        query,
        packed_query,
        scratch.lse if shift is None else shift.contiguous(),
        sides[0].tables,
        sides[1].tables,
        counts[0],
        exact_keys,
        exact_values,
        counts[1],
        scratch.partial,
        scratch.maxima,
        scratch.totals,
        *(x.stride()[:3] for x in (query, packed_query, exact_keys, exact_values)),
        scaling * LOG2_E,
        (softcap or 1.0) * LOG2_E,
        kv_heads,
        heads // kv_heads,
        steps,
        splits,
        **options,
        num_warps=setting.warps,
        num_stages=setting.stages,
    )
    return scratch.merge(1)


def _tiles(name: str) -> ModuleType:
    """Import the tile functions of a format."""
    return importlib.import_module(f"squeeze.kernels.decode_attention.tiles.{name}")


def describe_side(format: Any, length: int, size: int) -> Side:
    """Find the tile functions and compile-time facts of a format; no tables yet."""
    module = _tiles("raw" if format is None else format.info.name)
    meta = module.describe(format, length, size)
    return Side((), module, meta, module.parts(format, size), module.warps(format))


def constants(
    keys: Side, values: Side, *, size: int, tile: int, packed: bool, shifted: bool, capped: bool
) -> dict[str, Any]:
    """Name the kernel's compile-time arguments."""
    return {
        "D": size,
        "M": tile,
        "PACKED": packed,
        "EXACT": EXACT_TOKENS,
        "HAS_SHIFT": shifted,
        "HAS_SOFTCAP": capped,
        "KEY_SCORE": keys.module.score,
        "KEY_META": keys.meta,
        "KEY_PARTS": keys.parts,
        "VALUE_ACCUMULATE": values.module.accumulate,
        "VALUE_META": values.meta,
        "VALUE_PARTS": values.parts,
        "KEY_SIZES": keys.sizes,
        "VALUE_SIZES": values.sizes,
        "DENSE_PARTS": _tiles("raw").parts(None, size),
    }


def _side(blocks: PackedBlocks | None, unused: Tensor, size: int) -> Side:
    """Describe one side and collect its tables; a stand-in when nothing is packed."""
    if blocks is None:
        return describe_side(None, 32, size)._replace(tables=(unused,))
    side = describe_side(blocks.format, blocks.length, size)
    addresses = addresses_of(blocks)
    tables = [addresses[name] for name in side.module.COMPONENTS if name in addresses]
    tables += [blocks.parameters[name] for name in side.module.PARAMETERS]
    # Parameters hold one part per KV head, which their tile functions need to find theirs.
    heads = tuple(blocks.parameters[name].shape[0] for name in side.module.PARAMETERS[:1])
    sizes: tuple[tuple[int, int], ...] = ()
    if unused.is_cuda:
        parts = [blocks.segments[0][n][0, 0, 0] for n in side.module.COMPONENTS if n in addresses]
        sizes = tuple((x.nbytes, triton.next_power_of_2(-(-x.nbytes // 128))) for x in parts)
    return side._replace(tables=tuple(tables), meta=side.meta + heads, sizes=sizes)


def addresses_of(blocks: PackedBlocks) -> dict[str, Tensor]:
    """Where every block of every component starts, tabulated now if the cache did not."""
    if blocks.addresses is not None:
        return blocks.addresses
    tables: dict[str, list[Tensor]] = {}
    for segment in blocks.segments:
        for name, x in segment.items():
            places = torch.arange(x.shape[0], device=x.device) * (x.stride(0) * x.element_size())
            tables.setdefault(name, []).append(places + x.data_ptr())
    return {name: torch.cat(parts) for name, parts in tables.items()}


def _splits(device: torch.device, programs: int, tokens: int, per_processor: int) -> int:
    """Choose into how many runs a row's packed tokens are divided; 0 without any."""
    wanted = INTERPRETED_PROGRAMS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = processors * per_processor
    longest = triton.cdiv(tokens, TOKENS_PER_SPLIT)
    # The exact slots take one program too; one too many would run alone, after all others.
    return min(max(wanted // programs - 1, 1), longest, MAX_SPLITS)


def _check(dense: list[Tensor], shift: Tensor | None) -> None:
    """Raise ValueError for what the kernel would misread."""
    dtype: Any = dense[0].dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel takes float16, bfloat16 and float32 queries, not {dtype}")
    if any(x.dtype != dtype for x in dense):
        raise ValueError(f"dtypes differ: {[x.dtype for x in dense]}")
    if any(x.stride(-1) != 1 for x in dense):
        raise ValueError("channels of queries, exact keys and exact values must be adjacent")
    if shift is not None and shift.dtype != torch.float32:
        raise ValueError(f"shift must be float32, not {shift.dtype}")
