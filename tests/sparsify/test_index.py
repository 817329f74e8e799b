import pytest
import torch

from squeeze.sparsify.index import compact, density, from_masks, to_dense_mask
from squeeze.types import BlockIndex


def lower(blocks, B=1, H=1):
    return torch.ones(blocks, blocks, dtype=torch.bool).tril().expand(B, H, -1, -1)


def random_masks(B, H, T, size, seed):
    generator = torch.Generator().manual_seed(seed)
    N = -(-T // size)
    blocks = (torch.rand(B, H, N, N, generator=generator) < 0.4) & lower(N)
    blocks |= torch.eye(N, dtype=torch.bool)
    blocks[..., 0] = True
    columns = torch.rand(B, H, N, T, generator=generator) < 0.2
    tokens = torch.arange(T)
    columns &= tokens < torch.arange(N)[:, None] * size
    return blocks, columns & ~blocks[..., tokens // size]


def test_compact_packs_what_is_kept_in_order():
    candidates = torch.tensor([[[[3, 5, 9], [4, 6, 8]]]])
    keep = torch.tensor([[[[True, False, True], [False, True, False]]]])
    offsets, ids = compact(candidates, keep, 4)
    assert offsets.tolist() == [[[0, 2, 3]]]
    assert ids[0, 0, :3].tolist() == [3, 9, 6]
    assert offsets.dtype == ids.dtype == torch.int32


@pytest.mark.parametrize("seed", range(3))
def test_masks_survive_the_round_trip(seed):
    size, T = 4, 23
    blocks, columns = random_masks(2, 3, T, size, seed)
    expected = blocks.repeat_interleave(size, -1)[..., :T] | columns
    expected = expected.repeat_interleave(size, -2)[..., :T, :]
    expected = expected & torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(to_dense_mask(from_masks(blocks, columns, size), T), expected)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 640, 1000])
def test_a_full_list_has_density_one(length):
    index = from_masks(lower(16, 1, 2), None, 64)
    assert density(index, torch.tensor([length])).tolist() == [[1.0, 1.0]]


def test_density_counts_rows_times_tiles():
    # 4 blocks of 64; every query block reads block 0 and its diagonal: 1 + 2 + 2 + 2 tiles.
    blocks = torch.eye(4, dtype=torch.bool)[None, None].clone()
    blocks[..., 0] = True
    pairs = 256 * 257 / 2
    share = density(from_masks(blocks, None, 64), torch.tensor([256]))
    assert share.item() == pytest.approx(7 * 64 * 64 / pairs)
    # One column of query block 3 costs a whole tile of 64.
    columns = torch.zeros(1, 1, 4, 256, dtype=torch.bool)
    columns[0, 0, 3, 100] = True
    share = density(from_masks(blocks, columns, 64), torch.tensor([256]))
    assert share.item() == pytest.approx(8 * 64 * 64 / pairs)


def test_density_counts_real_rows_only():
    blocks = torch.eye(8, dtype=torch.bool)[None, None].clone()
    blocks[..., 0] = True
    share = density(from_masks(blocks.expand(2, 1, 8, 8), None, 64), torch.tensor([512, 400]))
    assert share[1].item() == pytest.approx((11 * 64 + 2 * 16) * 64 / (400 * 401 / 2))


def test_an_index_is_data():
    index = from_masks(lower(2), None, 64)
    assert BlockIndex(**vars(index)) == index
