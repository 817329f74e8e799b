"""Launch of ``gluon.attend``: which calls it takes, and its compile-time facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from squeeze.kernels.decode_attention import tuning
from squeeze.kernels.decode_attention.gluon import attend
from squeeze.kernels.decode_attention.triton import LOG2_E, MAX_SPLITS, Scratch, addresses_of
from squeeze.types import PackedBlocks

HEAD_DIMS = (64, 128, 256)
# Query rows of a KV head: two column tiles of a product; more of them leave no registers.
MAX_ROWS = 16
# Exact slots of one program.
EXACT_SLOTS = 64
REGISTERS = 65536
# Programs for a processor; up to eight of them may have all registers that a thread can name.
# Blocks of many bytes leave room for fewer at a time, and the next start as these end.
SETTINGS = tuple(tuning.Setting(1, 1, programs) for programs in (8, 12, 7, 6))
COMPONENTS = ("codes", "scale", "zero")


def takes(
    query: Tensor,
    exact: Sequence[Tensor],
    keys: PackedBlocks | None,
    values: PackedBlocks | None,
) -> bool:
    """Say whether the kernel reads these blocks for this query.

    It takes half-precision queries of at most 16 rows per KV head, heads of 64, 128 and 256, exact
    slots that lie at multiples of 16 bytes, blocks whose byte rows fill tiles of 16, and

    * keys: affine with 2, 4 or 8 bits, constants per channel for at least half a block or per
      token and head; graded with such a width in its first range and none elsewhere; float8 with
      a scale per token where the GPU converts it (8.9 and later);
    * values: affine with 2, 4 or 8 bits, constants per token and half a head or more; float8.
    """
    if keys is None or values is None or not query.is_cuda:
        return False
    size = query.shape[3]
    even = all(stride % 2 == 0 for stride in query.stride()[:3]) and query.data_ptr() % 4 == 0
    if query.dtype not in (torch.float16, torch.bfloat16) or size not in HEAD_DIMS or not even:
        return False
    if query.shape[1] // exact[0].shape[1] * query.shape[2] > MAX_ROWS:
        return False
    if any(x.data_ptr() % 16 or any(n % 16 for n in x.stride()[:3]) for x in exact):
        return False
    sides = pieces([describe(b.format, b.length, size) for b in (keys, values)])
    # The buffers of codes also take tiles of 16 exact slots.
    if sides is None or any(side[2] % 16 or side[2] * side[6] < 32 * size for side in sides):
        return False
    if any(side[0] == 0 for side in sides) and capability(query) < (8, 9):
        return False
    groups = sides[0][3] // sides[0][6] if sides[0][1] else 1
    split = sides[0][4] == 1 and not sides[1][1] and sides[1][4] <= 2
    return split and groups <= 2


def describe(format: Any, length: int, head_dim: int) -> tuple[int, ...] | None:
    """Facts of one side for the kernel, or ``None`` for a format that it does not read.

    Returns:
        Bits (0 for float8), granularity is channel, byte rows of a piece, its constants of one
        kind, ranges of channels with constants of their own, has zeros, channels that have codes,
        pieces of a block, constants are the block's.
    """
    name = format.info.name
    if name == "float8" and format.scale == "token":
        return (0, 0, length, length, 1, 0, head_dim, 1, 0)
    if name == "graded" and format.live == 1 and format.widths[0] in (2, 4, 8):
        bits, channels, zeros = format.widths[0], head_dim // len(format.widths), 1
        channel = True
    elif name == "affine" and format.bits in (2, 4, 8):
        bits, channels, zeros = format.bits, head_dim, int(not format.symmetric)
        channel = format.granularity == "channel"
    else:
        return None
    rows = length * bits // 8
    if channel:
        count = length // format.group_size * channels
        return (bits, 1, rows, count, 1, zeros, channels, 1, 0)
    parts = channels // format.group_size
    return (bits, 0, rows, length * parts, parts, zeros, channels, 1, 0)


def pieces(sides: Sequence[tuple[int, ...] | None]) -> list[tuple[int, ...]] | None:
    """Cut blocks of whole bytes in two, so that twice as many programs fit a processor.

    Tokens of narrower codes share bytes across a block, which therefore stays in one piece.
    """
    known = [side for side in sides if side is not None]
    if len(known) < len(sides) or any(side[0] in (2, 4) or side[2] % 64 for side in known):
        return None if len(known) < len(sides) else known
    cut: list[tuple[int, ...]] = []
    for bits, channel, rows, count, parts, zeros, channels, _, _ in known:
        shared = int(channel and count == channels)
        count = count if shared else count // 2
        cut.append((bits, channel, rows // 2, count, parts, zeros, channels, 2, shared))
    return cut


def decode_attention(
    query: Tensor,
    packed_query: Tensor,
    shift: Tensor | None,
    keys: PackedBlocks,
    values: PackedBlocks,
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
    """Launch the kernel and the merge; arguments and results as in ``api.decode_attention``."""
    batch, heads, steps, size = query.shape
    kv_heads = exact_keys.shape[1]
    rows = heads // kv_heads * steps
    tile = 8 if rows <= 8 else 16
    sides = pieces([describe(b.format, b.length, size) for b in (keys, values)])
    assert sides is not None
    tables = [_tables(blocks) for blocks in (keys, values)]
    tiles = triton.cdiv(rows, tile)
    exact_splits = triton.cdiv(exact_keys.shape[2], EXACT_SLOTS)
    dense = (query, packed_query, exact_keys, exact_values)
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    overlap = capability(query) >= (9, 0)

    def launch(setting: tuning.Setting) -> tuple[Tensor, ...]:
        slots = processors * setting.programs // (batch * kv_heads * tiles) - exact_splits
        splits = _splits(slots, max_blocks * sides[0][7])
        scratch = Scratch.allocate(query, exact_splits + splits, split_output, output_dtype)
        attend[(exact_splits + splits, batch * kv_heads, tiles)](
            query,
            packed_query,
            scratch.lse if shift is None else shift.contiguous(),
            tables[0],
            tables[1],
            block_counts,
            exact_keys,
            exact_values,
            exact_counts,
            scratch.partial,
            scratch.maxima,
            scratch.totals,
            *(x.stride()[:3] for x in dense),
            scaling * LOG2_E,
            (softcap or 1.0) * LOG2_E,
            kv_heads,
            heads // kv_heads,
            steps,
            exact_splits,
            splits,
            D=size,
            N=tile,
            SLOTS=EXACT_SLOTS,
            HAS_SHIFT=shift is not None,
            HAS_SOFTCAP=softcap is not None,
            OVERLAP=overlap,
            KEYS=sides[0],
            VALUES=sides[1],
            num_warps=1,
            maxnreg=registers(setting.programs),
            **({"launch_pdl": True} if overlap else {}),
        )
        return scratch.merge(exact_splits, overlap)

    key = (query.device, query.dtype, size, tile, shift is None, softcap is None, *sides, batch)
    work = max_blocks * keys.length * batch * kv_heads
    return launch(tuning.choose(key, SETTINGS if tile == 8 else SETTINGS[:1], work, launch))


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds ``x``."""
    return torch.cuda.get_device_capability(x.device)


def registers(programs: int) -> int:
    """Registers of a thread, so that this many programs share a processor: one of two kernels."""
    return 255 if programs <= 8 else REGISTERS // (32 * 12) // 8 * 8


def _tables(blocks: PackedBlocks) -> tuple[Tensor, ...]:
    """Addresses of the blocks' components, in the kernel's order."""
    addresses = addresses_of(blocks)
    return tuple(addresses[name] for name in COMPONENTS if name in addresses)


def _splits(slots: int, blocks: int) -> int:
    """Choose into how many runs a row's blocks are divided, so that all start in one wave."""
    most = max(1, min(slots, blocks, MAX_SPLITS - 8))
    # No more than it takes for the longest run: the others would only be merged.
    return triton.cdiv(blocks, triton.cdiv(blocks, most))
