"""Launch of ``gluon_codebook.attend``: which calls it takes, and how they are divided."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from squeeze.kernels.decode_attention import gluon_codebook
from squeeze.kernels.decode_attention.triton import LOG2_E, Scratch, _check, addresses_of
from squeeze.types import PackedBlocks

HEAD_DIM, BITS, SUBVECTOR = 128, 8, 2
UNITS = (64, 32)  # tokens that a warp reads at a time
WARPS = 8
REGISTERS = 240  # of a thread; left to itself, the compiler saves some and spills others
ROWS = 4  # query rows of a program
MAX_ROWS = 16  # of a KV head
MAX_COLUMNS = 256  # results of one query row
# Both codebooks of a head, a unit of keys and values of each warp, barriers; whatever else stood in
# shared memory would move them.
SHARED_BYTES = 2 * 2**BITS * HEAD_DIM * 2 + WARPS * UNITS[0] * HEAD_DIM + 2**15
# What starting a program costs, and attending to exact slots, beside a unit of 64 tokens of each of
# a program's warps.
START, EXACT = 1.2, 0.8


def takes(
    query: Tensor, kv_heads: int, keys: PackedBlocks | None, values: PackedBlocks | None
) -> bool:
    """Say whether the kernel reads these blocks for this query.

    It takes half-precision queries of at most 16 rows per KV head, heads of 128, keys and values of
    256 centroids for every two channels, blocks of whole 64 tokens, and a GPU that copies in bulk
    and whose programs may hold 224 KiB of shared memory.
    """
    if keys is None or values is None or not query.is_cuda or query.shape[3] != HEAD_DIM:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if query.shape[1] // kv_heads * query.shape[2] > MAX_ROWS:
        return False
    device: Any = torch.cuda.get_device_properties(query.device)
    if device.major < 9 or device.shared_memory_per_block_optin < SHARED_BYTES:
        return False
    return all(map(_reads, (keys, values)))


def _reads(blocks: PackedBlocks) -> bool:
    """Say whether one side has the format and block length that the kernel was written for."""
    form: Any = blocks.format
    return (
        form.info.name == "product_quantization"
        and (form.bits, form.subvector) == (BITS, SUBVECTOR)
        and blocks.length % UNITS[0] == 0
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
    output_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Launch the kernel and the merge; arguments and results as in ``api.decode_attention``."""
    _check([query, packed_query, exact_keys, exact_values], shift)
    batch, heads, steps, _ = query.shape
    kv_heads = exact_keys.shape[1]
    rows = heads // kv_heads * steps
    slabs, tiles = batch * kv_heads, triton.cdiv(rows, ROWS)
    tokens = max_blocks * keys.length
    unit, splits = _division(query.device, slabs, tiles, tokens)
    columns = 1 + splits  # the exact slots first
    scratch = Scratch.allocate(query, columns, split_output, output_dtype)
    compiled = gluon_codebook.attend[(slabs, splits * tiles + 1)](
        query,
        packed_query,
        scratch.lse if shift is None else shift.contiguous(),
        addresses_of(keys)["codes"],
        addresses_of(values)["codes"],
        keys.parameters["codebook"],
        values.parameters["codebook"],
        block_counts,
        exact_keys,
        exact_values,
        exact_counts,
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
        columns,
        W=WARPS,
        TOKENS=unit,
        PER_BLOCK=keys.length // unit,
        HAS_SHIFT=shift is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=WARPS,
        maxnreg=REGISTERS,
        launch_pdl=True,
    )
    assert compiled.metadata.shared == SHARED_BYTES
    return scratch.merge(1, overlap=True)


def _division(device: torch.device, slabs: int, tiles: int, tokens: int) -> tuple[int, int]:
    """Choose tokens of a unit, and into how many runs a row is divided: the least time of all.

    The programs of exact slots come last. They cost nothing where processors are left over for
    them while the others work.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def time(choice: tuple[int, int]) -> float:
        unit, splits = choice
        rounds = triton.cdiv(triton.cdiv(triton.cdiv(tokens, unit), splits), WARPS)
        program = rounds * unit / UNITS[0] + START
        waves = triton.cdiv(slabs * tiles * splits, processors)
        spare = waves * processors - slabs * tiles * splits
        return waves * program + (EXACT if slabs * EXACT > spare * program else 0.0)

    most = max(1, min(triton.cdiv(tokens, UNITS[-1] * WARPS), MAX_COLUMNS - 1))
    return min(itertools.product(UNITS, range(1, most + 1)), key=time)
