"""The clustered linear layer for few rows of x: division, choice, and the assembly's arithmetic."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from launched import absent, asked_about
from ptx import as_bits, as_float, bytes_of, run, signed

from squeeze.kernels.bits import pack
from squeeze.kernels.lut_linear import few_rows, gluon_assembly, gluon_layout
from squeeze.types import ClusteredWeight

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336))
ODD = ((333, 1000), (40, 2304), (1, 128), (128256, 4096), (64, 131072))
FORMS = ((1, 2), (1, 3), (1, 4), (2, 2), (2, 4))  # bytes of an entry, bits


def division(rows, shape, pieces, bits, processors=132):
    """The division of a layer."""
    return few_rows.divide(rows, shape[0], -(-shape[1] // 32), pieces, bits, processors)


@pytest.mark.parametrize("shape", LAYERS + ODD)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16])
def test_a_division_covers_the_weight(shape, rows):
    for pieces, bits in FORMS:
        found = division(rows, shape, pieces, bits)
        steps, tiles = -(-shape[1] // 512), -(-shape[0] // 16)
        assert found.slices * found.steps >= steps > (found.slices - 1) * found.steps
        assert found.programs * found.own >= tiles >= found.programs
        groups, left = divmod(found.warps, found.across)
        assert left == 0
        assert found.own % groups == 0
        assert rows <= found.x_rows < 2 * rows
        assert found.column_tiles * 8 >= 2 * found.x_rows
        # The allocation is rounded up to 256 bytes and holds 256 more.
        assert found.shared_bytes(bits, pieces) + 512 <= 227 * 1024


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_two_programs_of_a_common_layer_fit_a_multiprocessor(shape, rows):
    for pieces, bits in FORMS:
        found = division(rows, shape, pieces, bits)
        assert found.programs * found.slices <= 132
        assert 2 * (found.shared_bytes(bits, pieces) + 512 + 1024) <= 228 * 1024
        assert 2 * found.warps * 32 * found.registers <= 65536
        eight = bits == 4 or (bits == 3 and shape[0] > 4096)
        assert found.warps == (16 if rows == 4 and pieces == 1 and not eight else 8)


@pytest.mark.parametrize(("shape", "work"), [((4096, 4096), 2), ((14336, 4096), 7)])
def test_the_busiest_warp_has_its_share_rounded_up(shape, work):
    found = division(1, shape, 1, 4)
    assert found.slices == 1
    assert found.own * found.across // found.warps * -(-found.steps // found.across) == work
    each = -(-shape[0] // 16 // 132) * (shape[1] // 512)  # steps of a program
    assert work == -(-each // found.warps)


@pytest.mark.parametrize(("rows", "slices", "steps"), [(1, 1, 28), (2, 1, 28), (4, 2, 14)])
def test_long_rows_of_four_bits_are_shared_by_four_of_eight_warps(rows, slices, steps):
    found = division(rows, (4096, 14336), 1, 4)
    assert (found.slices, found.steps, found.across, found.warps) == (slices, steps, 4, 8)
    for bits in (2, 3):
        assert division(4, (4096, 14336), 1, bits).warps == 16
    assert division(2, (4096, 8192), 1, 4).across == 8


@pytest.mark.parametrize(("pieces", "bits"), FORMS)
def test_one_row_takes_eight_warps_that_share_a_tile(pieces, bits):
    for shape, across, late in zip(LAYERS, (8, 8, 4), (True, False, False), strict=True):
        found = division(1, shape, pieces, bits)
        assert (found.slices, found.across, found.warps, found.late) == (1, across, 8, late)


@pytest.mark.parametrize("rows", [2, 4])
def test_where_a_warp_has_few_steps_the_next_kernel_starts_late(rows):
    for bits, warps in ((2, 16), (3, 16), (4, 8)):
        found = division(rows, (4096, 4096), 1, bits)
        assert (found.slices, found.across, found.warps, found.late) == (1, 8, warps, True)
        assert not division(rows, (14336, 4096), 1, bits).late


@pytest.mark.parametrize("bits", [3, 4])
def test_a_few_rows_take_eight_warps_where_a_program_has_many_tiles(bits):
    found = division(4, (14336, 4096), 1, bits)
    assert (found.slices, found.across, found.warps, found.own) == (1, 8, 8, 7)


def test_entries_are_chosen_where_products_are_many():
    halves = {rows: division(rows, (4096, 4096), 1, 4).halves for rows in (1, 4, 8, 9, 16)}
    assert halves == {1: 2, 4: 2, 8: 2, 9: 1, 16: 1}
    assert all(division(1, (4096, 4096), 1, bits).halves == 1 for bits in (2, 3))


def test_shapes_too_wide_for_one_wave_take_more_programs():
    found = division(16, (64, 131072), 1, 4, processors=2)
    assert found.programs * found.slices > 2
    assert found.shared_bytes(4, 1) <= 2 * few_rows.SHARED_BYTES


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_value_group_is_used_once_and_its_planes_are_there(bits):
    order = gluon_layout.order(bits)
    assert sorted(plane for plane, _ in order) == list(range(len(order)))
    seen = set()
    for plane, groups in order:
        seen.add(plane)
        for c in groups:
            assert (c % 2 if bits < 4 else c) in seen
            assert bits != 3 or 2 in seen
    used = [c for _, groups in order for c in groups]
    assert sorted(used) == [0, 1, 2, 3]


def packed(bits=4, shape=(48, 256), columns=None, rows=1):
    """A weight without memory."""
    groups = (-(-shape[0] // rows), 1 if columns is None else shape[1] // columns, 2**bits)
    return ClusteredWeight(
        absent(shape[0], -(-shape[1] // 32) * bits, dtype=torch.int32),
        absent(*groups, dtype=torch.int8), absent(shape[0], dtype=torch.float16),
        bits, shape, rows, columns or shape[1],
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_only_one_capability_is_served(capability):
    x = absent(3, 256, dtype=torch.bfloat16)
    with asked_about(capability):
        assert few_rows.fits(x, packed()) == (capability == 90)


def test_what_fits():
    x = absent(1, 256, dtype=torch.float16)
    with asked_about(90):
        for rows, bits in itertools.product((1, 16), (2, 3, 4)):
            few = absent(rows, 256, dtype=torch.float16)
            assert few_rows.fits(few, packed(bits))
            assert few_rows.fits(few, packed(bits, rows=4))
        assert few_rows.fits(x[:, :250], replace(packed(), shape=(48, 250)))
        assert not few_rows.fits(absent(17, 256, dtype=torch.float16), packed())
        assert not few_rows.fits(absent(0, 256, dtype=torch.float16), packed())
        assert not few_rows.fits(x.float(), packed())
        assert not few_rows.fits(x, packed(columns=64))
        assert not few_rows.fits(absent(1, 192, dtype=torch.float16), packed(shape=(48, 192)))
        for bits in (1, 5, 8):
            assert not few_rows.fits(x, packed(bits))
    assert not few_rows.fits(torch.empty(1, 256, dtype=torch.float16), packed())


def word(numbers):
    """Four bytes as a word, the first lowest."""
    return sum((int(number) & 255) << 8 * i for i, number in enumerate(numbers))


def table(entries, halves):
    """A row's table as the kernel holds it."""
    words = [word(entries[i : i + 4]) for i in range(0, len(entries), 4)]
    if halves == 1:
        return words
    first = run(gluon_assembly.BALANCE.value, 2, [words[0], words[2]])
    second = run(gluon_assembly.BALANCE.value, 2, [words[1], words[3]])
    return [first[0], second[0], first[1], second[1]]


@pytest.mark.parametrize(("bits", "halves"), [(2, 1), (3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("c", range(4))
def test_a_look_up_gives_the_entries_of_eight_values_of_two_rows(bits, halves, c):
    u = 4
    codes = torch.randint(0, 2**bits, (2, 32 * u))
    entries = torch.randint(-127, 128, (2, 2**bits)).tolist()
    entries[0][0], entries[0][-1] = -127, 127
    planes = pack(codes, bits).view(2, bits, u).tolist()
    tables = [table(row, halves) for row in entries]
    for j in range(u):
        words = [[planes[row][c % (4 if bits == 4 else 2)][j] & 0xFFFFFFFF] for row in range(2)]
        if bits == 3:
            for row in range(2):
                words[row].append(planes[row][2][j] & 0xFFFFFFFF)
        assembly = gluon_assembly.lookup(bits, c, halves)
        found = run(assembly, 4 * halves, [*words[0], *words[1], *tables[0], *tables[1]])
        for row, n in itertools.product(range(2), range(8)):
            register, byte = row + n // 4 * 2, n % 4
            parts = [bytes_of(found[register + 4 * half])[byte] for half in range(halves)]
            wanted = entries[row][codes[row, (4 * n + c) * u + j]]
            assert sum(parts) + (halves == 2) == wanted


def test_every_pair_of_entries_is_balanced():
    for low in range(-127, 128):
        for start in range(-127, 128, 4):
            highs = [min(start + i, 127) for i in range(4)]
            a, b = map(
                bytes_of, run(gluon_assembly.BALANCE.value, 2, [word([low] * 4), word(highs)])
            )
            for i, high in enumerate(highs):
                assert a[i] - (b[i] < 0) == low - 1
                assert b[i] - (a[i] < 0) == high - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_becomes_two_bytes(dtype):
    x = (torch.randn(16) * torch.logspace(-3, 0, 16)).to(dtype)
    half = dtype == torch.float16
    words = (x.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    (peak,) = run(gluon_assembly.largest(half), 1, words)
    assert as_float(peak) == x.abs().max()
    *found, total = run(gluon_assembly.split(half), 9, [*words, as_bits(32512 / as_float(peak))])
    high, low = torch.tensor([bytes_of(each) for each in found]).view(2, 16).double()
    whole = high * 256 + low
    assert signed(total) == whole.sum()
    # The first numbers of the words, then the second ones.
    scale = x.abs().max().double() / 32512
    wanted = torch.cat([x[0::2], x[1::2]]).double()
    assert ((whole * scale - wanted).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_number_is_not_finite_if_one_is_not(bad, dtype):
    x = torch.randn(16).to(dtype)
    x[11] = bad
    words = (x.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    peak = as_float(run(gluon_assembly.largest(dtype == torch.float16), 1, words)[0])
    torch.testing.assert_close(peak, abs(bad), equal_nan=True)
