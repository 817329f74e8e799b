import pytest
import torch

from squeeze.sparsify import selection
from squeeze.sparsify.index import compact, compact_segments
from squeeze.sparsify.selection import budget, list_blocks
from tests.sparsify.policies import choose, lists


@pytest.mark.parametrize("most", [0, 50, 81])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 1 / 3, 0.7, 1.0])
def test_every_row_fits_the_budget_that_memory_was_taken_for(share, most):
    # The budget is computed on the host for the memory and on the device for the choice.
    N = 211

    def even(rows):
        return torch.full((1, 1, len(rows), rows.stop), 1 / N)

    index = list_blocks(even, torch.tensor([N * 64]), 64, N, heads=1, share=share, most=most)
    counts = [len(row) for row in lists(index, 0, 0)]
    assert counts == [budget(i, share, most=most) for i in range(N)]
    assert index.block_ids.shape[-1] == sum(counts) + 1


def test_a_share_is_bounded_on_both_sides():
    assert [budget(n - 1, 0.5, 30, most=100) for n in (20, 50, 100, 400)] == [20, 30, 50, 100]
    assert budget(399, 0.5, 30) == 200
    assert budget(399, 0.5, 150, most=100) == 150


@pytest.mark.parametrize(("mass", "floor"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.03), (0.8, 0.02)])
def test_the_choice_in_words(mass, floor):
    N, generator = 40, torch.Generator().manual_seed(0)
    maps = torch.randn(2, 2, N, N, generator=generator).mul(2)
    maps = maps.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    needed = torch.rand(2, 2, N, N, generator=generator) < 0.1
    index = list_blocks(
        lambda rows: maps[:, :, rows.start : rows.stop, : rows.stop],
        torch.tensor([N * 64, 17 * 64 + 1]), 64, N,
        heads=2, share=0.3, least=4, mass=mass, floor=torch.tensor(floor),
        require=lambda rows: needed[:, :, rows.start : rows.stop, : rows.stop],
    )  # fmt: skip
    for b, real in enumerate((N, 18)):
        for h in range(2):
            rows = lists(index, b, h)
            for i in range(real):
                require = needed[b, h, i, : i + 1].nonzero().flatten().tolist()
                weights = maps[b, h, i, : i + 1].tolist()
                assert rows[i] == choose(weights, 0.3, 4, mass, floor, require)
            assert not any(rows[real:])


def test_by_hand():
    weights = torch.tensor([0.05, 0.5, 0.1, 0.25, 0.1])
    index = list_blocks(
        lambda rows: weights.expand(1, 1, 5, 5), torch.tensor([320]), 64, 5, heads=1, mass=0.6
    )
    # Block 0 and the diagonal hold 0.15, block 1 brings 0.65.
    assert lists(index, 0, 0)[4] == [0, 1, 4]


def test_segments_pack_as_a_whole():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 3, 9, 12, generator=generator) < 0.4
    ids = torch.arange(12)
    pieces = [(ids, keep[:, :, :2]), (ids[:7], keep[:, :, 2:5, :7]), (ids, keep[:, :, 5:])]
    keep[:, :, 2:5, 7:] = False
    for whole, parts in zip(compact(ids, keep, 108), compact_segments(pieces, 108), strict=True):
        assert torch.equal(whole[..., :-1], parts[..., :-1])
        assert whole.dtype == parts.dtype == torch.int32


@pytest.mark.parametrize(("blocks", "first", "pairs"), [(100, 0, 1500), (37, 30, 40), (9, 0, 1)])
def test_a_triangle_is_split_by_what_its_parts_take(monkeypatch, blocks, first, pairs):
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 12 * pairs)
    parts = list(selection.triangle(blocks, 12, first))
    assert [row for part in parts for row in part] == list(range(first, blocks))
    assert all(len(part) == 1 or len(part) * part.stop <= pairs for part in parts)
    # Only the first part may take much less than there is room for.
    assert all((len(part) + 1) * part.stop > pairs for part in parts[1:])
