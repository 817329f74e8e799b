"""Saved tensors in fewer bytes: gradients keep every bit, alone and over two processes."""

import functools
import gc

import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

from squeeze.quant.weights.dkm import Dkm
from squeeze.saved_tensors import SavedTensors


def student(rows=32):
    weight = torch.randn(32, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    method = Dkm(
        bits=2, granularity="rows", rows_per_codebook=rows, iterations=1,
        start={"method": "kmeans", "importance": "none"},
    )  # fmt: skip
    made = method.student(weight, method.fit(weight))
    made.soften(weight)
    return made


def gradients(saved, made):
    """Gradients of a loss of all weights, and the bytes held between forward and backward."""
    goal = torch.randn(32, 2048, generator=torch.Generator().manual_seed(1))
    with saved:
        loss = (made.weight(saved) * goal).square().sum()
    held = saved.nbytes
    return torch.autograd.grad(loss, (made.latent, made.entries, made.log_scale)), held


@pytest.mark.parametrize("options", [
    {"unique": True}, {"device": "cpu"}, {"unique": True, "device": "cpu"},
], ids=["unique", "marshal", "both"])  # fmt: skip
def test_gradients_keep_every_bit(options):
    made = student()
    expected, plain = gradients(SavedTensors(), made)
    found, held = gradients(SavedTensors(**options), made)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert held < (0.5 if "unique" in options else 1.0001) * plain


def test_a_table_that_saves_nothing_is_not_made():
    made = student(rows=1)
    _, plain = gradients(SavedTensors(), made)
    _, held = gradients(SavedTensors(unique=True), made)
    assert held <= 1.05 * plain


def test_a_storage_is_copied_once_however_many_views_are_saved():
    saved = SavedTensors(device="cpu", smallest=0)
    x = torch.randn(64, 64, requires_grad=True)
    with saved:
        y = x.exp()  # saves its result, and so do the products
        loss = (y * y.T).sum() + (y[3:] * y[3:]).sum() + y.flatten().square().sum()
    assert saved.nbytes == 64 * 64 * 4
    loss.backward()
    e = x.detach().exp()
    expected = 2 * e * e.T + 2 * e * e
    expected[3:] += 2 * e[3:] * e[3:]
    torch.testing.assert_close(x.grad, expected)


def test_a_storage_changed_in_place_is_copied_again():
    saved = SavedTensors(device="cpu", smallest=0)
    x = torch.ones(64, requires_grad=True)
    buffer = torch.full((64,), 2.0)
    with saved:
        first = x * buffer
        buffer += 1
        second = x * buffer
    # The copy of the first product was made before the change.
    (first + second).sum().backward()
    assert torch.equal(x.grad, torch.full((64,), 5.0))


def test_nothing_is_held_after_backward():
    saved = SavedTensors(unique=True, device="cpu")
    found, _ = gradients(saved, student())
    del found
    gc.collect()
    assert saved.nbytes == 0


def check_shards(rank, path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    made = student()
    expected, plain = gradients(SavedTensors(unique=True), made)
    sharded = SavedTensors(unique=True, group=distributed.group.WORLD)
    found, held = gradients(sharded, made)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert held < plain - 0.9 * made.latent.numel()  # of two bytes an index one is left
    distributed.destroy_process_group()


def test_two_processes_hold_half_of_the_index_each(tmp_path):
    meet = functools.partial(check_shards, path=tmp_path / "meeting")
    start_processes(meet, nprocs=2, start_method="fork")
