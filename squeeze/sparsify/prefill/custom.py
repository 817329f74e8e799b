"""A block mask of the user's own, as a Python function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from squeeze.errors import RecipeError
from squeeze.registry import register
from squeeze.sparsify.index import MIN_LENGTH, compact_segments
from squeeze.sparsify.selection import LEAST_BLOCKS, PAIR_BYTES, budget, segments
from squeeze.types import BlockIndex

# Rows, heads, query blocks and key blocks as integers that broadcast, to the blocks that are read.
BlockMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(row: Tensor, head: Tensor, query_block: Tensor, key_block: Tensor) -> Tensor:
    """Read everything up to the query block; the mask that ``custom`` has by default."""
    return key_block <= query_block


@register(source="https://arxiv.org/abs/2412.05496", year=2024)
@dataclass(frozen=True)
class Custom:
    """Read the blocks that a Python function of the user's marks, as FlexAttention's masks do.

    The function is called as mask(row, head, query_block, key_block) with integer tensors of shapes
    [B, 1, 1, 1], [H, 1, 1], [R, 1] and [C] on the device of the queries, for some query blocks at a
    time, and returns bool that broadcasts to [B, H, R, C]. Blocks count from a row's first real
    token. Block 0 and the query block's own are read whatever it returns, later ones never.

    Args:
        mask: ``"package.module:function"``; it is imported, which runs that module. In Python a
            policy takes the function itself, too.
        max_density: Most of its causal blocks that a query block may list, the nearest first; at
            least 16 blocks.
        block_size: Tokens per block of the index.
        min_length: Shorter prompts are attended densely.
    Cost: the function's; 4 bytes per block that ``max_density`` allows.
    Source: Dong et al. 2024, https://arxiv.org/abs/2412.05496, section 3.2 (``mask_mod``).
    Differs: the function marks blocks of tokens, not tokens; it need not be causal.
    """

    mask: str = "squeeze.sparsify.prefill.custom:causal"
    max_density: Annotated[float, Gt(0), Le(1)] = 1.0
    block_size: Literal[64, 128] = 64
    min_length: Annotated[int, Ge(1)] = MIN_LENGTH
    statistics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Import the function, so that a wrong name is known before any work."""
        resolve(self.mask)

    def index(
        self,
        query: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> BlockIndex:
        """Ask the function and list.

        Args:
            query: ``[B, H, T_q, D]``; only its shape is read.
            keys: ``[B, H_kv, T, D]``; likewise.
            starts: Not read: blocks past a row's end are unused.
            scaling: Not read.
            softcap: Not read.
        Returns:
            Blocks per query head.
        Raises:
            RecipeError: the function returned something that is not bool, or does not broadcast.
        """
        (B, H), device, mask = query.shape[:2], query.device, resolve(self.mask)
        N = -(-keys.shape[2] // self.block_size)
        row = torch.arange(B, device=device)[:, None, None, None]
        head = torch.arange(H, device=device)[:, None, None]

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in segments(N, B * H * N * PAIR_BYTES):
                i = torch.arange(rows.start, rows.stop, device=device)[:, None]
                j = torch.arange(rows.stop, device=device)
                wanted = self._checked(mask(row, head, i, j), (B, H, len(rows), rows.stop))
                yield j, self._bounded(wanted, i, j)

        capacity = sum(budget(i, self.max_density) for i in range(N))
        return BlockIndex(self.block_size, *compact_segments(parts(), capacity))

    def _bounded(self, wanted: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Add what is always read and drop what the budget does not hold, farthest first."""
        always = (j == 0) | (j == i)
        wanted = (wanted & (j <= i)) | always
        if self.max_density == 1.0:
            return wanted
        limits = ((i + 1).double() * self.max_density).ceil().clamp(min=LEAST_BLOCKS)
        others = wanted & ~always
        nearer = others.flip(-1).cumsum(-1).flip(-1) + always.sum(-1, keepdim=True)
        return always | (others & (nearer <= limits))

    def _checked(self, found: Any, shape: tuple[int, ...]) -> Tensor:
        sizes = reversed(getattr(found, "shape", ()))
        fits = all(size in (1, whole) for size, whole in zip(sizes, reversed(shape), strict=False))
        if isinstance(found, Tensor) and found.dtype == torch.bool and found.ndim <= 4 and fits:
            return found.expand(shape)
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise RecipeError(
            f"attention.prefill.mask {self.mask!r}",
            f"returned {what}",
            f"bool that broadcasts to {shape}",
            "Compare the integers it is given",
        )


def resolve(mask: str | BlockMask) -> BlockMask:
    """Import what ``"package.module:function"`` names; a function is returned as it is.

    Raises:
        RecipeError: there is no such module or function.
    """
    if callable(mask):
        return mask
    module, _, name = mask.partition(":")
    place, wanted = "attention.prefill.mask", "package.module:function"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise RecipeError(place, f"{mask!r} cannot be imported ({error})", wanted) from error
    if not callable(found):
        raise RecipeError(place, f"{module!r} has no function {name!r}", wanted)
    return found  # type: ignore[no-any-return]
