"""The clustered linear layer by warpgroups, and decoding: division, choice, and the arithmetic."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from launched import absent, asked_about
from ptx import as_bits, as_float, bytes_of, run, signed

from squeeze.kernels.bits import pack
from squeeze.kernels.lut_linear import (
    gluon_assembly,
    gluon_dense,
    gluon_wide_assembly,
    gluon_wide_inputs,
    gluon_wide_layout,
    whole_rows,
    wide_rows,
)
from squeeze.types import ClusteredWeight

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336))
ODD = ((333, 1000), (40, 2304), (1, 128), (128256, 4096), (64, 131072))
FORMS = ((1, 2), (1, 3), (1, 4), (2, 2), (2, 4))  # bytes of an entry, bits


def division(rows, shape, pieces, bits, processors=132):
    """The division of a layer."""
    return wide_rows.divide(rows, shape[0], -(-shape[1] // 32), pieces, bits, processors)


@pytest.mark.parametrize("shape", LAYERS + ODD)
@pytest.mark.parametrize("rows", [5, 8, 9, 16, 17, 64])
def test_a_division_covers_the_weight(shape, rows):
    for pieces, bits in FORMS:
        found = division(rows, shape, pieces, bits)
        steps, tiles = -(-shape[1] // 512), -(-shape[0] // 64)
        assert found.slices * found.steps >= steps > (found.slices - 1) * found.steps
        assert found.programs * found.own >= tiles >= found.programs
        groups, left = divmod(found.warps // 4, found.across)
        assert left == 0
        assert found.own % groups == 0
        assert max(rows, 8) <= found.x_rows < 2 * max(rows, 5)
        # The allocation is rounded up to 256 bytes and holds 512 more.
        assert found.shared_bytes(bits, pieces) + 768 <= 227 * 1024
        assert 8 * found.steps <= 256  # barriers
        # Programs of one warp of the next kernel fit beside.
        assert 65536 - found.registers * found.warps * 32 >= 2048
        assert 1 <= found.depth <= 2 * bits
        assert found.cluster in (1, found.slices)
        assert found.parts * found.cluster == found.slices


@pytest.mark.parametrize("shape", LAYERS)
def test_a_common_layer_takes_one_wave(shape):
    for rows, (pieces, bits) in itertools.product((8, 16, 32, 64), FORMS):
        found = division(rows, shape, pieces, bits)
        assert 64 <= found.programs * found.slices <= 132
        assert found.halves == (2 if bits == 4 and rows * pieces <= 16 else 1)


@pytest.mark.parametrize("shape", LAYERS)
def test_the_tiles_of_a_program_are_as_few_as_they_can_be(shape):
    for pieces, bits in FORMS:
        found = division(16, shape, pieces, bits)
        assert found.programs * found.own < -(-shape[0] // 64) + found.programs * (
            found.warps // 4 // found.across
        )


@pytest.mark.parametrize("shape", [*LAYERS, *ODD, (3072, 3072), (1024, 4096), (4096, 28672)])
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_two_slices_of_programs_of_one_tile_are_a_cluster(shape, rows):
    for pieces, bits in FORMS:
        found = division(rows, shape, pieces, bits)
        if found.cluster > 1:
            assert (found.slices, found.cluster, found.parts) == (2, 2, 1)
            assert (found.own, found.across, found.warps) == (1, 4, 16)
            assert found.programs * found.slices <= 132


@pytest.mark.parametrize(
    ("rows", "shape", "bits"),
    [
        (8, (4096, 4096), 4),
        (16, (4096, 4096), 4),
        (16, (4096, 4096), 3),
        (32, (4096, 4096), 4),
        (8, (4096, 14336), 4),
        (16, (4096, 14336), 4),
    ],
)
def test_clusters_where_they_were_measured_to_take_less_time(rows, shape, bits):
    assert division(rows, shape, 1, bits).cluster == 2


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_no_clusters_where_they_take_longer(rows):
    assert all(division(rows, (14336, 4096), 1, bits).cluster == 1 for bits in (2, 3, 4))
    assert division(rows, (4096, 14336), 1, 3).cluster == 1


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_an_operand_is_described_whatever_the_rank_in_a_cluster(columns, rank):
    at = 226 * 1024 - 16
    assembly = gluon_wide_assembly.describe(columns)
    (found,) = run(assembly, 1, [rank << 24 | at])
    assert found & 0x3FFF == at >> 4
    assert found >> 16 == gluon_wide_layout.column_bytes(columns) // 16


@pytest.mark.parametrize(
    ("rows", "shape", "slices", "across", "warps"),
    [
        (8, (4096, 14336), 2, 4, 16),
        (16, (4096, 4096), 2, 4, 16),
        (16, (14336, 4096), 1, 4, 16),
        (16, (4096, 14336), 2, 4, 16),
        (32, (4096, 4096), 2, 4, 16),
        (32, (4096, 14336), 7, 1, 16),
        (64, (4096, 4096), 4, 2, 8),
        (64, (14336, 4096), 4, 1, 8),
        (64, (4096, 14336), 14, 1, 8),
    ],
)
def test_what_was_measured_to_take_the_least_time_is_chosen(rows, shape, slices, across, warps):
    found = division(rows, shape, 1, 4)
    assert (found.slices, found.across, found.warps) == (slices, across, warps)


@pytest.mark.parametrize("shape", LAYERS)
def test_enough_indices_are_on_their_way(shape):
    for rows, (pieces, bits) in itertools.product((8, 16), FORMS):
        found = division(rows, shape, pieces, bits)
        assert found.warps * found.depth >= wide_rows.UNDER_WAY
        assert found.warps * found.depth >= 12 * bits


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_the_words_of_x_have_places_of_their_own(columns):
    lane = torch.arange(32)
    place = lane // 4 % 4 * gluon_wide_layout.group_bytes(columns) + lane % 4 * 4
    place += lane // 16 * 2 * 32  # a warp's rows are two apart
    assert sorted((place // 4 % 32).tolist()) == list(range(32))
    pairs = [(i // 2 * 4 + i % 2) * 32 for i in range(columns // 4)]
    starts = place[:, None, None] + torch.tensor(pairs)[:, None]
    taken = starts + torch.tensor([gluon_wide_layout.piece_at(i, columns) for i in range(16)])
    step = 4 * gluon_wide_layout.group_bytes(columns)
    assert len(set(taken.flatten().tolist())) == 32 * columns // 4 * 16
    assert int(taken.max()) + 4 <= step
    assert step % 16 == gluon_wide_layout.column_bytes(columns) % 16 == 0
    assert gluon_wide_layout.word_bytes(columns) % 16 == 0


@pytest.mark.parametrize("own", [1, 2, 6])
@pytest.mark.parametrize("across", [1, 2, 4])
@pytest.mark.parametrize("cluster", [1, 4])
def test_nothing_in_shared_memory_overlaps_but_totals_and_x(own, across, cluster):
    warps, bits, depth, steps, columns, pieces = 16, 4, 5, 3, 32, 2
    sizes = (warps, bits, depth, steps, columns, own, pieces)
    shared = (*sizes, across, cluster)
    ring = gluon_wide_layout.ring_bytes(warps, depth)
    step = gluon_wide_layout.step_bytes(columns)
    assert step == 4 * gluon_wide_layout.group_bytes(columns) + columns // 2 * 8
    tables = gluon_wide_layout.tables_at(warps, depth, steps, columns)
    facts = gluon_wide_layout.facts_at(*sizes)
    assert tables == ring + steps * step
    assert facts == tables + own * 64 * pieces * 16
    assert all(place % 16 == 0 for place in (step, ring, tables, facts))
    totals = gluon_wide_layout.totals_at(*shared)
    size = own * across * columns * 128 * (across * cluster > 1)
    sent = gluon_wide_layout.sent_at(*shared)
    end = gluon_wide_layout.shared_bytes(*shared)
    once = own == warps // 4 // across
    assert gluon_wide_layout.reused(warps, steps, columns, own, across, cluster) == once
    assert totals == (ring if once else facts + own * 64 * 8)
    assert sent == facts + own * 64 * 8 + (0 if once else size)
    # Every output of the program's tiles is sent to one of the cluster.
    assert end == sent + (own * 64 * columns // 2 * 4 if cluster > 1 else 0)
    assert not once or totals + size <= tables
    barriers = gluon_wide_layout.barriers_at(end)
    assert end <= barriers < end + 256
    assert barriers % 256 == 0


def test_every_step_of_x_is_copied_to_its_place_with_its_barrier():
    steps, size, at = 3, 16448, 4096
    begun = gluon_wide_assembly.begin_barriers(steps, at, 0)
    assert re.findall(r"add.u32 a, \$1, (\d+);", begun) == ["4096", "4104", "4112"]
    assert begun.count("@p mbarrier.init.shared::cta.b64 [a], 1;") == steps
    assert "expect_tx" not in begun
    begun = gluon_wide_assembly.begin_barriers(0, at, 640)
    assert re.findall(r"add.u32 a, \$1, (\d+);", begun) == ["4344"]
    assert gluon_wide_layout.sent_barrier_at(4096 - 255) == 4344
    # Nothing can arrive before it is expected.
    assert begun.index("init.shared") < begun.index("fence") < begun.index("[a], 640;")
    brought = gluon_wide_assembly.bring(steps, size, at)
    assert "mov.b32 b, global_smem; add.u32 b, b, 4096;" in brought
    copy = (
        "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [a], [s], 16448, [b];"
    )
    expected = "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 16448;"
    moves = "add.u32 a, a, 16448; add.s64 s, s, 16448; add.u32 b, b, 8;"
    assert brought.count(f"{expected} {copy} {moves}") == steps
    assert "add.u32 a, $1, 4096; AGAIN: mbarrier.try_wait.parity" in gluon_wide_assembly.arrived(at)


def test_a_step_takes_the_place_of_another_when_no_warp_reads_that():
    assembly = gluon_wide_assembly.refill(16448)
    parts = ("bar.sync $5, 128;", "fence.proxy.async", "expect_tx", "cp.async.bulk", "mov.b32 $0")
    places = [assembly.index(part) for part in parts]
    assert places == sorted(places)
    assert assembly.count("@p") == 3


def test_x_has_room_for_two_steps_of_each_warpgroup_where_it_is_too_large():
    found = division(16, (4096, 14336), 1, 4)
    assert (found.steps, found.held, found.depth) == (14, 8, 4)
    for shape, rows, (pieces, bits) in itertools.product(LAYERS + ODD, (8, 16, 32, 64), FORMS):
        found = division(rows, shape, pieces, bits)
        if found.held < found.steps:
            assert (found.own, 4 * found.across) == (1, found.warps)
            assert found.held == 2 * found.across
            assert found.depth % bits == 0  # whole steps
        # Barriers of the steps lie before that of what is sent.
        assert 8 * found.held <= gluon_wide_layout.SENT


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("summed", [False, True])
def test_x_becomes_words_of_bytes(dtype, side, summed):
    x = (torch.randn(8, 4) * torch.logspace(-3, 0, 4)).to(dtype)
    half = dtype == torch.float16
    words = (x.view(torch.int32).long() & 0xFFFFFFFF).flatten().tolist()
    (peak,) = run(gluon_wide_inputs.largest(half), 1, [*words, side])
    assert as_float(peak) == x.abs().max()
    inverse = as_bits(32512 / as_float(peak))
    assembly = gluon_wide_inputs.split(half, summed)
    *found, total = run(assembly, 17, [*words, side, inverse])
    # By channel, half of the values, high or low byte: four values.
    high, low = torch.tensor([bytes_of(each) for each in found]).view(4, 2, 2, 4).double().unbind(2)
    whole = (high * 256 + low).flatten(1).T
    assert signed(total) == (whole.sum() if summed else 0)
    scale = x.abs().max().double() / 32512
    assert ((whole * scale - x.double()).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_of_a_pair_of_rows_is_not_finite_if_one_is_not(bad, dtype):
    x = torch.randn(32).to(dtype)
    x[19] = bad
    words = (x.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    (peak,) = run(gluon_wide_inputs.largest(dtype == torch.float16), 1, [*words, 1])
    torch.testing.assert_close(as_float(peak), abs(bad), equal_nan=True)


def test_channels_are_read_by_fours_where_they_lie_so():
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    assert wide_rows._aligned(x)
    assert wide_rows._aligned(torch.zeros(3, 128, dtype=torch.bfloat16)[:, 4:68])
    assert not wide_rows._aligned(torch.zeros(3, 66, dtype=torch.bfloat16)[:, :64])
    assert not wide_rows._aligned(torch.zeros(3, 128, dtype=torch.bfloat16)[:, 2:66])
    assert not wide_rows._aligned(x[:, :62])
    assert wide_rows._aligned(torch.zeros(1, 66, dtype=torch.bfloat16)[:, :64])


def packed(bits=4, shape=(48, 256), columns=None):
    """A weight without memory."""
    groups = (shape[0], 1 if columns is None else shape[1] // columns, 2**bits)
    return ClusteredWeight(
        absent(shape[0], -(-shape[1] // 32) * bits, dtype=torch.int32),
        absent(*groups, dtype=torch.int8), absent(shape[0], dtype=torch.float16),
        bits, shape, 1, columns or shape[1],
    )  # fmt: skip


def test_what_is_decoded_by_rows():
    dense = absent(48, 256, dtype=torch.bfloat16)
    with asked_about(80):
        assert not whole_rows.fits(dense, packed())
    with asked_about(90):
        for bits in (2, 3, 4):
            assert whole_rows.fits(dense, packed(bits))
        assert whole_rows.fits(dense.half(), replace(packed(), rows=8))
        assert not whole_rows.fits(dense.float(), packed())
        assert not whole_rows.fits(dense, packed(5))
        assert not whole_rows.fits(dense, packed(columns=64))
        assert not whole_rows.fits(dense, packed(shape=(48, 128)))
        assert not whole_rows.fits(dense[:, :250], replace(packed(), shape=(48, 250)))
    assert not whole_rows.fits(torch.empty(48, 256, dtype=torch.bfloat16), packed())


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


def without(assembly, kinds):
    """Assembly without the statements of some kinds."""
    body = assembly.strip().removeprefix("{").removesuffix("}")
    return "\n".join(line for line in body.split("\n") if not line.strip().startswith(kinds))


@pytest.mark.parametrize(("bits", "halves"), [(2, 1), (3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("c", range(4))
def test_products_take_the_entries_of_a_plane(bits, halves, pieces, c):
    u = 4
    codes = torch.randint(0, 2**bits, (2, 32 * u))
    entries = torch.randint(-127, 128, (pieces, 2, 2**bits)).tolist()
    entries[0][0][0], entries[0][0][-1] = -127, 127
    planes = (pack(codes, bits).view(2, bits, u).long() & 0xFFFFFFFF).tolist()
    words = [planes[row][c % (4 if bits == 4 else 2)] for row in range(2)]
    if bits == 3:
        words += [planes[row][2] for row in range(2)]
    tables = [table(entries[piece][row], halves) for piece in range(pieces) for row in range(2)]
    # With this many columns there are as many sums as are needed to look at the operands.
    columns = 64 // pieces
    assembly = gluon_wide_assembly.multiply_plane(bits, (c,), pieces, halves, columns, True)
    products = re.findall(r"wgmma.mma_async\S+\s+{[^}]*}, {([^}]*)}, d, (\w);", assembly)
    once = ["q", "p"][:halves] * pieces  # the first product of a piece takes the sums' place
    assert [add for _, add in products] == once + ["p"] * (3 * len(once))
    names = [name for left, _ in products for name in left.split(", ")]
    lines = without(assembly, ("wgmma", "setp", ".reg", "mov.b32 t", "add.u32 t", "mov.b64"))
    count = max(32, len(names))
    if count > 32:
        lines = re.sub(r"\$(\d+)", lambda found: f"${int(found[1]) + (count - 32)}", lines)
    lines += "".join(f"\nmov.b32 ${i}, {name};" for i, name in enumerate(names))
    lines += "".join(f"\nmov.b32 ${i}, 0;" for i in range(len(names), count))
    found = run(lines, count, [*itertools.chain(*words, *tables), 0])
    place = iter(found)
    for j in range(u):
        sums = {}
        for piece in [piece for piece in range(pieces) for _ in range(halves)]:
            left = [bytes_of(next(place)) for _ in range(4)]
            for row, n in itertools.product(range(2), range(8)):
                key = (piece, row, n)
                sums[key] = sums.get(key, halves == 2) + left[row + n // 4 * 2][n % 4]
        for (piece, row, n), total in sums.items():
            assert total == entries[piece][row][codes[row, (4 * n + c) * u + j]]


@pytest.mark.parametrize("entries", ["int8", "float16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding_rounds_entries_as_the_reference(bits, dtype, entries):
    u, c, factor = 8, 2, 0.0123
    codes = torch.randint(0, 2**bits, (1, 32 * u))
    if entries == "int8":
        book = torch.randint(-127, 128, (2**bits,), dtype=torch.int8)
    else:
        book = torch.randn(2**bits).half()
    raw = (book.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    size, low, high = book.itemsize, [], []
    make = gluon_dense.table(size, dtype == torch.float16)
    for i in range(2**bits // 4):
        pair = run(make, 2, [raw[size * i], raw[size * i + size - 1], as_bits(factor)])
        low.append(pair[0])
        high.append(pair[1])
    planes = (pack(codes, bits).view(bits, u).long() & 0xFFFFFFFF).tolist()
    words = planes[c % (4 if bits == 4 else 2)] + (planes[2] if bits == 3 else [])
    assembly = gluon_dense.decode(bits, c, 2 * u)
    stores = re.findall(r"@p st.global.v4.b32 \[\$\d+ \+ (\d+)\], {([^}]*)};", assembly)
    lines = without(assembly, ("@p", "setp", ".reg", "mov.b32 $0"))
    lines = re.sub(r"\$(\d+)", lambda found: f"${int(found[1]) + 31}", lines)
    names = [name for _, numbers in stores for name in numbers.split(", ")]
    lines += "".join(f"\nmov.b32 ${i}, {name};" for i, name in enumerate(names))
    found = run(lines, 32, [*words, *low, *high, 0, 1])
    numbers = torch.tensor(found).to(torch.int32).view(dtype).view(8, 8)
    for n, (place, _) in enumerate(stores):
        column = (4 * n + c) * u
        assert int(place) == 2 * column
        wanted = book[codes[0, column : column + 8]].float() * torch.tensor(factor)
        assert torch.equal(numbers[n], wanted.to(dtype))
