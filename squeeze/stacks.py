"""Weights that are trained as one: rows of several modules, on top of one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from squeeze.compress import weight_method
from squeeze.plan import WeightPlan
from squeeze.saved_tensors import SavedTensors
from squeeze.types import ClusteredWeight


def stacked(rows: list[WeightPlan], weights: Mapping[str, Any]) -> list[list[WeightPlan]]:
    """Group modules of equal settings and inputs whose codebooks end where a module does.

    A model of many small layers then takes a few large operations per step where it would take
    many small ones. Entries without row scales share a unit and stay by themselves.
    """
    groups: dict[Any, list[WeightPlan]] = {}
    for row in rows:
        weight: ClusteredWeight = weights[row.module]
        shared = weight.rows >= weight.shape[0] or weight.shape[0] % weight.rows
        alone = row.module if shared or weight.scale is None else None
        key = (repr(sorted(row.method.items())), weight.shape[1], weight.rows, alone)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


class Stack:
    """Modules with one student; ``names`` from top to bottom."""

    def __init__(
        self, rows: list[WeightPlan], weights: Mapping[str, Any], linears: Mapping[str, Any]
    ) -> None:
        self.names = [row.module for row in rows]
        self.packs: list[ClusteredWeight] = [weights[name] for name in self.names]
        self.heights = [weight.shape[0] for weight in self.packs]
        dense = self.dense(linears)
        whole = _joined(self.packs, dense.device)
        self.student = weight_method(rows[0]).student(dense, whole).to(dense.device)

    def dense(self, linears: Mapping[str, Any]) -> Tensor:
        """Return the dense weights, ``[sum of out, in]``."""
        return torch.cat([linears[name].weight.detach() for name in self.names])

    def weights(self, saved: SavedTensors) -> Iterator[tuple[str, Tensor]]:
        """Yield every module's weight as trained so far, ``[out, in]``, with gradients."""
        yield from zip(self.names, self.student.weight(saved).split(self.heights), strict=True)

    def packed(self) -> Iterator[tuple[str, ClusteredWeight]]:
        """Yield every module's weight as it is stored, on the CPU."""
        whole = self.student.packed().tensors()
        count = sum(self.heights)
        first = 0
        for name, pack, height in zip(self.names, self.packs, self.heights, strict=True):
            tensors = {}
            for key, tensor in whole.items():
                start, length = (n * len(tensor) // count for n in (first, height))
                tensors[key] = tensor[start : start + length].cpu().clone()
            yield name, pack.with_tensors(tensors)
            first += height


def _joined(packs: list[ClusteredWeight], device: torch.device) -> ClusteredWeight:
    """Put packed weights on top of one another."""
    columns = [pack.tensors() for pack in packs]
    joined = {key: torch.cat([part[key] for part in columns]).to(device) for key in columns[0]}
    height = sum(pack.shape[0] for pack in packs)
    shape = (height, packs[0].shape[1])
    return replace(packs[0].with_tensors(joined), shape=shape)
