import pytest
import torch

import squeeze
from squeeze.registry import get
from squeeze.sparsify.index import to_dense_mask
from squeeze.sparsify.prefill.grid import Grid
from tests import tiny
from tests.sparsify.policies import SCALING, check_dense, inputs

T = 1600


def lined(stride, phase, head_dim=8):
    """Queries and keys of one head that likes the keys at ``phase`` of every ``stride``."""
    query, keys = torch.ones(1, 1, T, head_dim), torch.zeros(1, 1, T, head_dim)
    keys[:, :, phase::stride] = 1.0
    return query, keys


@pytest.mark.parametrize(("stride", "phase"), [(256, 37), (512, 500), (1024, 200)])
def test_columns_at_the_stride_and_phase_that_a_head_shows(stride, phase):
    index = Grid(window_size=64).index(*lined(stride, phase), None, 1.0)
    mask = to_dense_mask(index, T)[0, 0]
    columns = torch.arange(phase, T, stride)
    for t in (400, 1000, T - 1):
        assert mask[t, columns[columns <= t]].all()
    # Besides: block 0, the window, and the blocks that its diagonals cross.
    away = T // 64 - 1 - torch.arange(T) // 64
    crossed = ((away * 64) % stride < 64) | (stride - (away * 64) % stride < 64)
    expected = crossed | (away < 2) | (torch.arange(T) < 64)
    expected[columns] = True
    assert torch.equal(mask[-1], expected)


@pytest.mark.parametrize("starts", [None, [0, 131]])
def test_every_diagonal_is_read_where_it_lies(starts):
    # Keys turn with period 256, so that a query likes those at its own distance mod 256.
    angle = torch.arange(T) * (2 * torch.pi / 256)
    x = torch.stack((angle.cos(), angle.sin()), -1)[None, None].expand(2, 1, -1, -1) * 3
    starts = None if starts is None else torch.tensor(starts)
    mask = to_dense_mask(Grid(strides=(192, 256), window_size=64).index(x, x, starts, 1.0), T)
    first = 0 if starts is None else 131
    for t in (800, T - 1 - first):
        assert mask[1, 0, t, torch.arange(t % 256, t + 1, 256)].all()
    assert mask[1, 0, T - 1 - first].float().mean() < 0.75


def test_text_is_read_by_all_and_reads_all():
    query, keys = lined(256, 37 + 320)
    types = torch.ones(1, T, dtype=torch.int64)
    types[:, :320], types[:, 900:910], types[:, -70:] = 0, 0, 0  # text, vision, text, ...
    index = Grid(window_size=64).index(query, keys, None, 1.0, types=types)
    mask = to_dense_mask(index, T)[0, 0]
    assert mask[1200:, :320].all()
    assert mask[1200:, 900:910].all()
    assert torch.equal(mask[-1], torch.ones(T, dtype=torch.bool))
    assert not mask[1200].all()


def test_positions_count_from_the_start_of_a_run():
    types = torch.ones(1, T, dtype=torch.int64)
    types[:, 800:804] = 0
    query, keys = torch.ones(1, 1, T, 8), torch.zeros(1, 1, T, 8)
    columns = torch.cat((torch.arange(100, 800, 256), torch.arange(904, T, 256)))
    keys[:, :, columns] = 1.0
    index = Grid(strides=(192, 256), window_size=64).index(query, keys, None, 1.0, types=types)
    assert to_dense_mask(index, T)[0, 0][-1, columns].all()


def test_at_most_so_much_text():
    types = torch.zeros(1, T, dtype=torch.int64)
    types[:, 1000:] = 1
    policy = Grid(strides=(1024,), window_size=64, max_text=200)
    mask = to_dense_mask(policy.index(*lined(1024, 0), None, 1.0, types=types), T)[0, 0]
    assert mask[1500, :200].all()
    assert mask[1500, 256:960].sum() < 200


def test_the_model_tells_the_kinds_of_its_tokens():
    recipe = {"attention": {"prefill": {"method": "grid", "min_length": 128, "window_size": 64}}}
    model = squeeze.run(recipe, tiny.model("llama"), evaluate=False).model
    ids = tiny.prompt(1, T)["input_ids"]
    types = torch.ones_like(ids)
    model(ids)
    plain = model.squeeze_statistics()["density"][0][0]
    types[:, -1000:] = 0
    model.squeeze_swap.states[0].types = None
    hook = next(iter(model._forward_pre_hooks.values()))
    hook(model, (), {"token_type_ids": types})
    model.model(ids)
    assert model.squeeze_statistics()["density"][0][0] > plain + 0.1


def test_a_full_budget_is_dense():
    check_dense(Grid(window_size=450))
    query, keys = inputs(1, 2, 2, 450)
    text = torch.zeros(1, 450, dtype=torch.int64)
    index = Grid(window_size=1).index(query, keys, None, SCALING, types=text)
    assert torch.equal(to_dense_mask(index, 450)[0, 0], torch.ones(450, 450).tril().bool())


def test_it_is_registered():
    assert get("prefill", "grid") is Grid
