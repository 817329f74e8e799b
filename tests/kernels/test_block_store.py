"""Storing the blocks of rows that are due: the reference against a loop, the kernel against it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeeze.cache.blocks import BlockStorage
from squeeze.errors import DeviceError
from squeeze.kernels.block_store.api import store_blocks
from squeeze.types import Implementation

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)
SIZES = (3, 1, 4)  # slots of the segments
COMPONENTS = {
    "codes": ((3, 5, 7), torch.uint8),  # rows of an odd number of bytes
    "wide": ((2, 600, 2), torch.float32),  # of several programs
    "scale": ((3, 2), torch.float16),
    "number": ((), torch.int64),
}


def random(generator, *shape, dtype):
    return torch.randint(0, 250, shape, generator=generator).to(dtype)


def case(rows, seed=0, device="cpu"):
    """Filled segments with a table that has room to spare, and a block of every row."""
    generator = torch.Generator().manual_seed(seed)
    storage = BlockStorage(addressed=True)
    storage.reserve_addresses(sum(SIZES) + 5)
    for size in SIZES:
        like = {
            name: random(generator, size, rows, *shape, dtype=dtype).to(device)
            for name, (shape, dtype) in COMPONENTS.items()
        }
        storage.grow(storage.capacity + size, like)
        for name, x in storage.segments[-1].items():
            x.copy_(like[name])
    blocks = {
        name: random(generator, 1, rows, *shape, dtype=dtype).to(device)
        for name, (shape, dtype) in COMPONENTS.items()
    }
    due = torch.rand(rows, generator=generator) < 0.6
    slots = torch.randint(0, sum(SIZES), (rows,), generator=generator)
    slots[~due] = 10**6  # of nothing
    return storage, blocks, slots.int().to(device), due.to(device)


def stored(case, implementation):
    storage, blocks, slots, due = case
    store_blocks(
        blocks, storage.segments, storage.addresses, slots, due, implementation=implementation
    )
    return storage.merged(sum(SIZES))


def by_loop(case):
    storage, blocks, slots, due = case
    expected = storage.merged(sum(SIZES))
    for row in range(len(slots)):
        if due[row]:
            for name, x in expected.items():
                x[slots[row], row] = blocks[name][0, row].cpu()
    return expected


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "implementation",
    [Implementation.REFERENCE, pytest.param(Implementation.TRITON, marks=needs_interpreter)],
)
def test_due_rows_are_stored_and_nothing_else_changes(rows, implementation):
    changed = 0
    for seed in range(4):
        before = case(rows, seed)[0].merged(sum(SIZES))
        expected = by_loop(case(rows, seed))
        found = stored(case(rows, seed), implementation)
        assert all(torch.equal(found[name], expected[name]) for name in COMPONENTS)
        changed += not torch.equal(before["wide"], expected["wide"])
    assert changed


@pytest.mark.gpu
def test_due_rows_are_stored_on_a_gpu():
    for seed in range(8):
        expected = by_loop(case(6, seed, "cuda"))
        found = stored(case(6, seed, "cuda"), Implementation.TRITON)
        assert all(torch.equal(found[name], expected[name]) for name in COMPONENTS)


def test_what_does_not_fit_is_refused(monkeypatch):
    storage, blocks, slots, due = case(2)
    with pytest.raises(ValueError, match="auto"):
        stored((storage, blocks, slots, due), Implementation.AUTO)
    with pytest.raises(ValueError, match="due"):
        stored((storage, blocks, slots, due[:1]), Implementation.REFERENCE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="device cpu"):
        stored((storage, blocks, slots, due), Implementation.TRITON)
    storage.addresses = None
    with pytest.raises(ValueError, match="addresses"):
        stored((storage, blocks, slots, due), Implementation.TRITON)


def test_the_kernel_compiles_for_gpus_without_spilling():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_block_store.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {x["capability"] for x in found} == {80, 90}
    assert not any(x["stack"] for x in found), found
