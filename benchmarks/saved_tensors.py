"""Bytes that differentiable k-means holds between forward and backward, by device of eDKM.

    python benchmarks/saved_tensors.py --rows 1024 --columns 4096 --bits 3

The first row is autograd alone. Marshaling moves bytes from the accelerator to the CPU, so both are
counted; ``copied each`` is what moving every saved tensor for itself would take there. Sharding is
counted for one of ``--processes``, as the index it would keep.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from squeeze.quant.weights.dkm import Dkm
from squeeze.saved_tensors import SavedTensors

MIB = 1 << 20


class Part:
    """One process of a group that never meets the others: enough to count what it holds."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def size(self) -> int:
        """Count the processes."""
        return self.processes

    def rank(self) -> int:
        """Return this one's number."""
        return 0


def held(student: Any, saved: SavedTensors) -> float:
    """Run a forward and count what is held for its backward, in MiB."""
    with saved:
        weight = student.weight(saved)
    result = saved.nbytes / MIB
    assert weight.requires_grad
    return result


def copied_each(student: Any) -> float:
    """Count the bytes of every saved tensor, shared or not, in MiB."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight = student.weight()
    assert weight.requires_grad
    return sum(sizes) / MIB


def main() -> None:
    """Print one line per combination of devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--granularity", default="tensor")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--processes", type=int, default=8)
    chosen = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(chosen.rows, chosen.columns, generator=generator) * 0.02
    method = Dkm(
        bits=chosen.bits, granularity=chosen.granularity, iterations=chosen.iterations,
        start={"method": "kmeans", "importance": "none"},
    )  # fmt: skip
    student = method.student(weight, method.fit(weight))
    student.soften(weight)
    plain = held(student, SavedTensors())
    shape = f"{chosen.rows} x {chosen.columns}, {chosen.bits} bits, {chosen.granularity}"
    print(f"{shape}, {chosen.iterations} iterations; copied each {copied_each(student):.1f} MiB")
    for name, options in {
        "autograd alone": {},
        "uniquify": {"unique": True},
        "marshal": {"device": "cpu"},
        "uniquify, marshal": {"unique": True, "device": "cpu"},
        "uniquify, shard": {"unique": True, "group": Part(chosen.processes)},
        "all three": {"unique": True, "device": "cpu", "group": Part(chosen.processes)},
    }.items():
        size = held(student, SavedTensors(**options))
        place = "CPU" if "device" in options else "accelerator"
        print(f"{name:<20} {size:>9.1f} MiB on the {place:<11} {plain / size:>6.1f}x less")


if __name__ == "__main__":
    main()
