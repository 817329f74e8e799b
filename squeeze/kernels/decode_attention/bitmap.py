"""Launch of ``gluon_bitmap.attend``: which calls it takes, and how they are divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from squeeze.kernels.decode_attention import streamed, tuning
from squeeze.kernels.decode_attention.gluon_bitmap import SHARED_BYTES, attend
from squeeze.kernels.decode_attention.triton import LOG2_E, Scratch, addresses_of
from squeeze.types import PackedBlocks

HEAD_DIM = 128
UNIT = 64  # tokens that a program reads at a time
ROWS = 4  # query rows of a program
MAX_ROWS = 8  # of a KV head; more of them would read the blocks more often than it pays
# Survivors of a group that are loaded as one number or two.
KEPT = (4, 5, 6, 8)
# Exact slots of one program.
EXACT_SLOTS = 32
# Programs for a processor; up to eight of them may have all registers that a thread can name.
SETTINGS = tuple(tuning.Setting(1, 1, programs) for programs in (12, 8))
COMPONENTS = ("bitmap", "codes", "scale")


def takes(
    query: Tensor,
    exact: Sequence[Tensor],
    keys: PackedBlocks | None,
    values: PackedBlocks | None,
) -> bool:
    """Say whether the kernel reads these blocks for this query.

    It takes half-precision queries of at most 8 rows per KV head, heads of 128, four-bit survivors,
    4, 5, 6 or 8 of a group, blocks of whole 64 tokens, and exact slots that lie at multiples of 16
    bytes.
    """
    if keys is None or values is None or not query.is_cuda or query.shape[3] != HEAD_DIM:
        return False
    even = all(stride % 2 == 0 for stride in query.stride()[:3]) and query.data_ptr() % 4 == 0
    if query.dtype not in (torch.float16, torch.bfloat16) or not even:
        return False
    if query.shape[1] // exact[0].shape[1] * query.shape[2] > MAX_ROWS:
        return False
    if any(x.data_ptr() % 16 or any(n % 16 for n in x.stride()[:3]) for x in exact):
        return False
    return streamed.capability(query) >= (8, 0) and _reads(keys) and _reads(values)


def _reads(blocks: PackedBlocks) -> bool:
    """Say whether one side has a format and a block length that the kernel was written for."""
    form: Any = blocks.format
    if form.info.name != "bitmap" or form.survivor_bits != 4:
        return False
    return form.kept in KEPT and blocks.length % UNIT == 0


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
    batch, heads, steps, _ = query.shape
    kv_heads = exact_keys.shape[1]
    tiles = triton.cdiv(heads // kv_heads * steps, ROWS)
    tables = [_tables(blocks) for blocks in (keys, values)]
    forms: list[Any] = [keys.format, values.format]
    per_block = keys.length // UNIT
    exact_splits = triton.cdiv(exact_keys.shape[2], EXACT_SLOTS)
    dense = (query, packed_query, exact_keys, exact_values)
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    overlap = streamed.capability(query) >= (9, 0)

    def launch(setting: tuning.Setting) -> tuple[Tensor, ...]:
        slots = processors * setting.programs // (batch * kv_heads * tiles) - exact_splits
        splits = streamed._splits(slots, max_blocks * per_block)
        scratch = Scratch.allocate(query, exact_splits + splits, split_output, output_dtype)
        compiled = attend[(exact_splits + splits, batch * kv_heads, tiles)](
            query,
            packed_query,
            scratch.lse if shift is None else shift.contiguous(),
            *tables,
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
            SLOTS=EXACT_SLOTS,
            PER_BLOCK=per_block,
            KEY_FAR=forms[0].kept - 4,
            VALUE_FAR=forms[1].kept - 4,
            HAS_SHIFT=shift is not None,
            HAS_SOFTCAP=softcap is not None,
            OVERLAP=overlap,
            num_warps=1,
            maxnreg=streamed.registers(setting.programs),
        )
        # Units are copied to the beginning of shared memory, where nothing else may stand.
        assert compiled.metadata.shared == SHARED_BYTES.value
        return scratch.merge(exact_splits, overlap)

    kept = tuple(form.kept for form in forms)
    key = ("bitmap", query.device, query.dtype, tiles, shift is None, softcap is None, kept, batch)
    work = max_blocks * keys.length * batch * kv_heads
    return launch(tuning.choose(key, SETTINGS, work, launch))


def _tables(blocks: PackedBlocks) -> tuple[Tensor, ...]:
    """Addresses of the blocks' components, in the kernel's order."""
    addresses = addresses_of(blocks)
    return tuple(addresses[name] for name in COMPONENTS)
