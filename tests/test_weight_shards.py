"""Parts of packed weights: the values of the whole, wherever the cut falls."""

from dataclasses import replace

import pytest
import torch

from squeeze.kernels import bits
from squeeze.linear import reconstruct
from squeeze.types import ClusteredWeight, IntegerWeight
from squeeze.weight_shards import columns_of, refuse_columns, rows_of


def clustered(out, size, width, rows, columns, scale=False, outliers=0):
    padded = -(-size // 32) * 32
    codes = torch.randint(2**width, (out, padded))
    book = torch.randn(-(-out // rows), -(-size // columns), 2**width)
    extra = {}
    if outliers:
        mask = torch.zeros(out, size, dtype=torch.bool).flatten()
        mask[torch.randperm(out * size)[:outliers]] = True
        mask = mask.view(out, size)
        column = mask.nonzero()[:, 1]
        extra = {
            "outlier_values": torch.randn(outliers).half(),
            "outlier_columns": column.to(torch.int16),
            "outlier_offsets": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int(),
        }
    book = (book * 20).to(torch.int8) if scale else book.half()
    return ClusteredWeight(
        bits.pack(codes, width),
        book.sort(-1).values,
        torch.rand(out).half() if scale else None,
        width,
        (out, size),
        rows,
        columns,
        **extra,
    )


def integers(out, size, width, group, zero=True, exponents=True):
    groups = -(-size // group)
    codes = bits.pack(torch.randint(2**width, (out, groups, group)), width)
    return IntegerWeight(
        codes.flatten(1),
        torch.rand(out, groups).half(),
        torch.randint(2**width, (out, groups)).to(torch.uint8) if zero else None,
        torch.randint(-3, 4, (size,)).to(torch.int8) if exponents else None,
        width,
        group,
        (out, size),
    )


def float8_integers(out, size, group):
    weight = integers(out, size, 4, group)
    scale = torch.randint(1, 120, weight.scale.shape).to(torch.uint8)  # the bits of E4M3
    row = torch.exp2(torch.randint(-15, -8, (out,)).float())
    return replace(weight, scale=scale, row_scale=row)


WEIGHTS = {
    "a codebook a row": lambda: clustered(24, 96, 4, 1, 96),
    "one codebook": lambda: clustered(24, 96, 3, 64, 128),
    "runs across the cut": lambda: clustered(24, 96, 2, 8, 36),
    "scales and outliers": lambda: clustered(24, 192, 4, 1, 192, scale=True, outliers=40),
    "odd columns": lambda: clustered(12, 90, 5, 4, 90, outliers=1),
    "integers under E4M3 scales": lambda: float8_integers(24, 192, 64),
    "integers by row": lambda: integers(24, 96, 4, 96),
    "integers in groups": lambda: integers(24, 192, 3, 32, zero=False),
    "groups across the cut": lambda: integers(24, 192, 4, 128),
    "padded groups": lambda: integers(12, 90, 8, 96, exponents=False),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_parts_are_the_whole(name, size):
    weight = WEIGHTS[name]()
    dense = reconstruct(weight)
    rows = [reconstruct(rows_of(weight, i, size)) for i in range(size)]
    assert torch.equal(torch.cat(rows), dense)
    assert refuse_columns(weight, size) is None
    columns = [reconstruct(columns_of(weight, i, size)) for i in range(size)]
    assert torch.equal(torch.cat(columns, 1), dense)


def test_parts_together_are_as_large_as_the_whole():
    weight = clustered(64, 256, 4, 1, 256, outliers=100)
    parts = [rows_of(weight, i, 2) for i in range(2)]
    assert sum(part.nbytes for part in parts) == weight.nbytes + 4  # one more offset
    plain = integers(64, 256, 4, 64, exponents=False)
    assert sum(columns_of(plain, i, 2).nbytes for i in range(2)) == plain.nbytes
    kept = parts[0].indices.untyped_storage()
    assert kept.nbytes() == parts[0].indices.numel() * 4


def test_a_part_without_outliers_stores_none():
    weight = clustered(8, 64, 4, 1, 64, outliers=1)
    found = [rows_of(weight, i, 8).outlier_values for i in range(8)]
    assert sum(values is not None for values in found) == 1


def test_what_cannot_be_cut_says_why():
    assert refuse_columns(clustered(8, 64, 4, 1, 64), 3) == "64 columns for 3 processes"
    reason = refuse_columns(integers(8, 192, 4, 64), 4)
    assert reason == (
        "groups of 64 columns with one scale, which 4 processes would cut every 48 columns"
    )
