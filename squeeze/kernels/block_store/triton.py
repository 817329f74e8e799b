"""Store blocks by their addresses: one launch for all components of one side of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

# Words of one program, and the programs of a row that is due: blocks are a few dozen KB per row.
BLOCK = 1024


@triton.jit
def _copy(source, table, slot, start, keep):
    """Copy words to where the table says that a slot starts."""
    target = tl.load(table + slot).to(tl.pointer_type(source.dtype.element_ty)) + start
    tl.store(target, tl.load(source + start, mask=keep), mask=keep)


@triton.jit
def _store(sources, tables, sizes, slots, due, BLOCK: tl.constexpr):
    """Copy BLOCK words of every component of one row, if it is due."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(due + row) != 0:
        slot = tl.load(slots + row)
        for i in tl.static_range(len(sources)):
            _copy(sources[i], tables[i], slot, row * sizes[i] + word, word < sizes[i])


def store_blocks(
    blocks: Mapping[str, Tensor], addresses: Mapping[str, Tensor], slots: Tensor, due: Tensor
) -> None:
    """Launch for components ``[1, B, H_kv, ...]``; see the API."""
    sources = tuple(_words(x) for x in blocks.values())
    sizes = tuple(x.shape[1] for x in sources)
    grid = (triton.cdiv(max(sizes), BLOCK), len(slots))
    tables = tuple(addresses[name] for name in blocks)
    _store[grid](sources, tables, sizes, slots, due.view(torch.uint8), BLOCK=BLOCK, num_warps=4)


def _words(x: Tensor) -> Tensor:
    """View a component as ``[B, words]`` of 4 bytes, or of 1 where these do not come out even."""
    flat = x.reshape(x.shape[1], -1).view(torch.uint8)
    return flat.view(torch.int32) if flat.shape[1] % 4 == 0 else flat
