"""Launch of ``gluon_codebook.attend``: which calls it takes, and how they are divided."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from squeeze.kernels.decode_attention import gluon_codebook
from squeeze.kernels.decode_attention.triton import (
    LOG2_E,
    Scratch,
    _attend,
    addresses_of,
    constants,
    describe_side,
)
from squeeze.types import PackedBlocks

HEAD_DIM, BITS, SUBVECTOR = 128, 8, 2
UNIT = 64  # tokens that a warp reads at a time
WARPS = 8
ROWS = 4  # query rows of a program
MAX_ROWS = 16  # of a KV head
MAX_COLUMNS = 256  # results of one query row
# Both codebooks of a head; whatever else stood in shared memory would move them.
SHARED_BYTES = 2 * 2**BITS * HEAD_DIM * 2
# Reading the codebooks costs a program about as much as this many units of each of its warps.
START_UNITS = 4


def takes(
    query: Tensor, kv_heads: int, keys: PackedBlocks | None, values: PackedBlocks | None
) -> bool:
    """Say whether the kernel reads these blocks for this query.

    It takes half-precision queries of at most 16 rows per KV head, heads of 128, keys and values of
    256 centroids for every two channels, blocks of whole 64 tokens, and a GPU whose programs may
    hold 128 KiB of shared memory.
    """
    if keys is None or values is None or not query.is_cuda or query.shape[3] != HEAD_DIM:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if query.shape[1] // kv_heads * query.shape[2] > MAX_ROWS:
        return False
    device: Any = torch.cuda.get_device_properties(query.device)
    return device.shared_memory_per_block_optin > SHARED_BYTES and all(map(_reads, (keys, values)))


def _reads(blocks: PackedBlocks) -> bool:
    """Say whether one side has the format and block length that the kernel was written for."""
    form: Any = blocks.format
    return (
        form.info.name == "product_quantization"
        and (form.bits, form.subvector) == (BITS, SUBVECTOR)
        and blocks.length % UNIT == 0
    )


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
) -> tuple[Tensor, ...]:
    """Launch the kernel, the one for exact slots, and the merge; as ``api.decode_attention``."""
    batch, heads, steps, _ = query.shape
    kv_heads = exact_keys.shape[1]
    rows = heads // kv_heads * steps
    slabs, tiles = batch * kv_heads, triton.cdiv(rows, ROWS)
    per_block = keys.length // UNIT
    overlap = torch.cuda.get_device_capability(query.device) >= (9, 0)
    splits = _splits(query.device, slabs * tiles, max_blocks * per_block)
    columns = 1 + splits * WARPS
    scratch = Scratch.allocate(query, columns, split_output)
    added = scratch.lse if shift is None else shift.contiguous()
    base_2 = (scaling * LOG2_E, (softcap or 1.0) * LOG2_E)
    numbers = (kv_heads, heads // kv_heads, steps)
    _exact(query, exact_keys, exact_values, exact_counts, scratch, base_2, numbers, softcap)
    compiled = gluon_codebook.attend[(splits, slabs, tiles)](
        packed_query,
        added,
        addresses_of(keys)["codes"],
        addresses_of(values)["codes"],
        keys.parameters["codebook"],
        values.parameters["codebook"],
        block_counts,
        scratch.partial,
        scratch.maxima,
        scratch.totals,
        packed_query.stride()[:3],
        *base_2,
        *numbers,
        splits,
        columns,
        W=WARPS,
        PER_BLOCK=per_block,
        HAS_SHIFT=shift is not None,
        HAS_SOFTCAP=softcap is not None,
        OVERLAP=overlap,
        num_warps=WARPS,
    )
    assert compiled.metadata.shared == SHARED_BYTES
    return scratch.merge(1, overlap)


def _exact(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scratch: Scratch,
    base_2: tuple[float, float],
    numbers: tuple[int, int, int],
    softcap: float | None,
) -> None:
    """Attend to the exact slots: one program per KV head fills the first column."""
    kv_heads, groups, steps = numbers
    size = query.shape[3]
    tile = max(8, triton.next_power_of_2(groups * steps))
    nothing = describe_side(None, 32, size)._replace(tables=(counts,))
    options = constants(
        nothing,
        nothing,
        size=size,
        tile=tile,
        packed=False,
        shifted=False,
        capped=softcap is not None,
    )
    _attend[(1, query.shape[0] * kv_heads, 1)](
        query,
        query,
        scratch.lse,
        nothing.tables,
        nothing.tables,
        counts,
        keys,
        values,
        counts,
        scratch.partial,
        scratch.maxima,
        scratch.totals,
        *(x.stride()[:3] for x in (query, query, keys, values)),
        *base_2,
        *numbers,
        scratch.partial.shape[1] - 1,
        **options,
        num_warps=4,
        num_stages=2,
    )


def _splits(device: torch.device, programs: int, units: int) -> int:
    """Choose into how many runs a row's units are divided: the fewest rounds of all programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = max(1, min(triton.cdiv(units, WARPS), MAX_COLUMNS // WARPS))

    def rounds(splits: int) -> int:
        steps = triton.cdiv(triton.cdiv(units, splits), WARPS) + START_UNITS
        return int(triton.cdiv(programs * splits, processors) * steps)

    return min(range(1, most + 1), key=rounds)
