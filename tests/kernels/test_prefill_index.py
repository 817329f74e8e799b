"""The kernels of a prefill index against a float64 oracle and against PyTorch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeeze.errors import DeviceError, UnsupportedError
from squeeze.kernels.prefill_index.api import (
    add_masses,
    choose_lines,
    list_lines,
    route_chunks,
    sampled_mass,
    select_blocks,
    select_levels,
    weigh_cells,
)
from squeeze.sparsify.index import to_dense_mask
from squeeze.sparsify.prefill.antidiagonal import Antidiagonal
from squeeze.sparsify.prefill.block_topk import BlockTopk
from squeeze.sparsify.prefill.flexprefill import Flexprefill
from squeeze.sparsify.prefill.moba import Moba
from squeeze.sparsify.prefill.pyramid import Pyramid
from squeeze.sparsify.prefill.sale import Sale
from squeeze.sparsify.prefill.sparge import Sparge
from squeeze.sparsify.prefill.vertical_slash import VerticalSlash
from squeeze.types import Implementation

REFERENCE, TRITON = Implementation.REFERENCE, Implementation.TRITON
EPS = torch.finfo(torch.float32).eps


def guarded(*shape, generator, dtype, device):
    """Random values inside a larger tensor of NaN, so that every read outside shows."""
    B, H, T, D = shape
    x = torch.full((B, H, T + 7, D + 5), float("nan"), dtype=dtype, device=device)
    x = x[:, :, 3 : 3 + T, 2 : 2 + D]
    x.copy_(torch.randn(*shape, generator=generator).to(dtype))
    return x


def inputs(shape, dtype, device, pads, seed):
    """Queries and keys ``(B, H, H_kv, T, T_q, D)``, and padding."""
    B, H, H_kv, T, T_q, D = shape
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": dtype, "device": device}
    query, keys = guarded(B, H, T_q, D, **options), guarded(B, H_kv, T, D, **options)
    return query, keys, None if pads is None else torch.tensor(pads, device=device)


def attention(query, keys, scaling, softcap):
    """Scores of one head in float64."""
    scores = scaling * query.double() @ keys.double().mT
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def check(got, reference, oracle):
    """No farther from the oracle than twice the reference, and what summing products may lose."""
    band = 32 * EPS * oracle.abs().max()
    assert torch.isfinite(got).all()
    assert (got - oracle).abs().max() <= 2 * (reference - oracle).abs().max() + band


SAMPLED = [
    # shape, size, passes of (rows, step, back from the end), pads, softcap
    ((2, 3, 1, 300, 300, 32), 64, ((64, 1, 0), (19, 16, 0), (18, 16, 4)), (0, 77), None),
    ((1, 4, 1, 270, 150, 80), 128, ((30, 1, 0), (6, 24, 7)), None, 3.0),
    ((1, 2, 2, 1100, 70, 64), 64, ((70, 1, 0),), None, None),
]


def check_sampled(case, dtype, device, seed):
    shape, size, passes, pads, softcap = case
    (B, H, H_kv, T, T_q, _), scaling = shape, 1.5 * shape[-1] ** -0.5
    query, keys, starts = inputs(shape, dtype, device, pads, seed)
    rows = [range(T - back - (n - 1) * step - 1, T - back, step) for n, step, back in passes]
    call = (query, keys, starts, scaling, softcap, rows, size)
    got, reference = (sampled_mass(*call, implementation=i) for i in (TRITON, REFERENCE))
    blocks = torch.arange(-(-T // size), device=device) * size
    columns = torch.zeros(B, H, T, dtype=torch.float64, device=device)
    diagonals = torch.zeros(B, H, len(blocks), dtype=torch.float64, device=device)
    for b in range(B):
        for h in range(H):
            scores = attention(query[b, h], keys[b, h // (H // H_kv)], scaling, softcap)
            first = pads[b] if pads else 0
            for t in (t for part in rows for t in part if t >= first):
                weights = scores[t - T + T_q, first : t + 1].softmax(-1)
                columns[b, h, first : t + 1] += weights
                offsets = t - torch.arange(first, t + 1, device=device)
                shares = (1 - (offsets[:, None] - blocks).abs() / size).clamp(min=0)
                diagonals[b, h] += weights @ shares.double()
    for mine, torchs, oracle in zip(got, reference, (columns, diagonals), strict=True):
        check(mine, torchs, oracle)


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_mass(case):
    check_sampled(case, torch.float16 if case[-1] is None else torch.float32, "cpu", 1)


CELLS = [
    # shape, size, stride, rows, pads, softcap
    ((1, 4, 2, 2048, 2048, 16), 64, 8, range(32), None, None),
    ((2, 3, 1, 700, 700, 20), 64, 8, range(11), (0, 177), None),
    ((1, 7, 7, 1000, 300, 80), 128, 16, range(5, 8), None, 3.0),
    ((1, 2, 2, 1096, 1096, 64), 64, 4, range(3, 18), None, None),
    ((1, 1, 1, 2100, 900, 16), 64, 32, range(19, 33), None, None),
]


def check_cells(case, dtype, device, seed):
    shape, size, stride, rows, pads, softcap = case
    (B, H, H_kv, T, T_q, D), scaling = shape, 3.0 * shape[-1] ** -0.5
    query, keys, starts = inputs(shape, dtype, device, pads, seed)
    call = (query, keys, starts, stride, size, scaling, softcap, rows)
    got, reference = (weigh_cells(*call, implementation=i) for i in (TRITON, REFERENCE))
    blocks, cells = -(-T // size), size // stride
    oracle = torch.zeros(got.shape, dtype=torch.float64, device=device)
    for b in range(B):
        first = pads[b] if pads else 0
        q, k = torch.zeros(2, H, blocks * size, D, dtype=torch.float64, device=device)
        there = max(0, T - T_q - first)  # position of the first query
        q[:, there : T - first] = query[b, :, there - T + T_q + first :].double()
        k[:, : T - first] = keys[b, :, first:].double().repeat_interleave(H // H_kv, 0)
        q, k = (x.unflatten(1, (-1, stride)) for x in (q, k))
        scores = scaling / stride * torch.einsum("hatd,hctd->hac", q.flip(2), k)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf).softmax(-1)
        a = torch.arange(blocks * cells, device=device)
        weights *= ((a + 1) * stride > there)[:, None] & (a * stride < T - first)[:, None]
        weights = weights.unflatten(2, (-1, cells)).sum(-1).unflatten(1, (-1, cells)).mean(2)
        oracle[b] = weights[:, rows.start : rows.stop, : rows.stop]
    check(got, reference, oracle)


@pytest.mark.parametrize("case", CELLS)
def test_weigh_cells(case):
    check_cells(case, torch.float32 if case[3].start else torch.float16, "cpu", 2)


def lists(shape, capacity, device):
    zeros = [torch.zeros(*shape[:2], n, dtype=torch.int32, device=device) for n in shape[2:]]
    return *zeros, torch.full((*shape[:2], capacity), -7, dtype=torch.int32, device=device)


def selection(B, H, blocks, first, mass, bounded, required, device, seed):
    """Arguments of ``select_blocks``; sums of the weights are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    R = blocks - first
    weights = (torch.rand(B, H, R, blocks, generator=generator) ** 8 * 64).round() / 1024
    # A strided view: the rows of a larger tensor.
    weights = torch.cat((torch.full_like(weights, torch.nan), weights), 2)[:, :, R:]
    later = torch.arange(blocks) > torch.arange(first, blocks)[:, None]
    weights = weights.masked_fill(later, torch.nan)
    limits = torch.randint(2, blocks + 3, (H, R) if bounded else (R,), generator=generator).int()
    mass = 0.1 + 0.9 * torch.rand(H, 1, 1, generator=generator) if mass is None else mass
    floor = torch.rand(B, H, 1, 1, generator=generator) / 50 if bounded else None
    require = torch.rand(B, 1, R, blocks, generator=generator) < 0.2 if required else None
    lengths = torch.tensor([blocks * 64 - 5, *[blocks * 64 - 130] * (B - 1)])
    call = (weights, first, limits, lengths, 64, mass, floor, require)
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in call)


def check_selection(B, H, blocks, first, mass, bounded, required, device, seed):
    call = selection(B, H, blocks, first, mass, bounded, required, device, seed)
    got, expected = [], []
    for implementation, found in ((TRITON, got), (REFERENCE, expected)):
        found += lists((B, H, blocks, blocks + 1), blocks * blocks + 1, device)
        select_blocks(
            call[0].nan_to_num(0.0) if implementation is REFERENCE else call[0],
            *call[1:],
            *found,
            implementation=implementation,
        )
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    slots = torch.arange(got[2].shape[-1], device=device)
    unused = slots >= expected[1][..., -1:]
    assert torch.equal(got[2].masked_fill(unused, -7), expected[2].masked_fill(unused, -7))
    assert expected[0][..., first:].amax() > 2


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("mass", [1.0, 0.8, None])
def test_select_blocks(mass, bounded, required):
    check_selection(2, 2, 7, 2, mass, bounded, required, "cpu", 3)


def test_weights_that_no_sum_is_exact_for():
    weights = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(4)) ** 6
    weights /= weights.sum(-1, keepdim=True)
    counts = []
    for mass, implementation in ((0.7 - 1e-6, REFERENCE), (0.7, TRITON), (0.7 + 1e-6, REFERENCE)):
        found = lists((1, 1, 30, 31), 901, "cpu")
        limits, lengths = torch.full((30,), 30, dtype=torch.int32), torch.tensor([1920])
        call = (weights, 0, limits, lengths, 64, mass, None, None, *found)
        select_blocks(*call, implementation=implementation)
        counts.append(found[0])
    assert (counts[0] <= counts[1]).all() and (counts[1] <= counts[2]).all()


@pytest.mark.parametrize("implementation", [TRITON, REFERENCE])
@pytest.mark.parametrize("each", [0.1, 1 / 30, 1 / 70, 3 / 49])
def test_a_share_that_a_row_just_reaches_takes_no_more(each, implementation):
    found = lists((1, 1, 20, 21), 401, "cpu")
    limits, lengths = torch.full((20,), 20, dtype=torch.int32), torch.tensor([1280])
    weights = torch.full((1, 1, 20, 20), each)
    mass = torch.tensor([[[0.8]]]) if each > 0.05 else 0.8
    call = (weights, 0, limits, lengths, 64, mass, None, None, *found)
    select_blocks(*call, implementation=implementation)
    for number in (5, 10, 15, 20):
        assert found[0][0, 0, number - 1] == 4 * number // 5


def check_levels(B, H, blocks, first, size, per_head, device, seed):
    call = selection(B, H, blocks, first, None if per_head else 0.3, False, False, device, seed)
    weights, _, _, lengths, _, full = call[:6]
    weights[:, -1, 1] = 0.0  # a row that weighs nothing
    own = torch.arange(first, blocks, device=device) + 1
    limits = torch.stack((own.clamp(max=blocks // 2 + 2), *3 * [own // 4])).int()
    masses, each = (
        (full, 0.5, 0.55, 0.9 if per_head else 1.0),
        sum((size // 8) >> h for h in (1, 2, 3)),
    )
    tokens = blocks * size - 5
    got, expected = [], []
    for implementation, found in ((TRITON, got), (REFERENCE, expected)):
        for capacity in (blocks * blocks, blocks * blocks * each):
            found.append(lists((B, H, blocks, blocks + 1), capacity + 1, device))
        select_levels(
            weights.nan_to_num(0.0) if implementation is REFERENCE else weights,
            first, limits, lengths * size // 64, size, tokens, masses, *found,
            implementation=implementation,
        )  # fmt: skip
    for mine, torchs in zip(got, expected, strict=True):
        assert torch.equal(mine[0], torchs[0]) and torch.equal(mine[1], torchs[1])
        slots = torch.arange(mine[2].shape[-1], device=device)
        unused = slots >= torchs[1][..., -1:]
        assert torch.equal(mine[2].masked_fill(unused, -7), torchs[2].masked_fill(unused, -7))
        assert torchs[0][..., first:].amax() > 2


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_select_levels(size, per_head):
    check_levels(2, 2, 19, 2, size, per_head, "cpu", 3)


CHOICES = [
    # tokens, padding of each row, size, nearest, columns, diagonals, most of them
    (700, (0, 177), 64, 2, 120, 4, (120, 4)),
    (1000, None, 128, 1, (3, 400), (0, 5), (250, 5)),
    (300, (290, 0), 64, 3, 250, 9, (300, 5)),
    (500, None, 64, 1, 0, 0, (0, 1)),
]


def check_choice(case, device, seed):
    T, pads, size, nearest, verticals, slashes, most = case
    B, generator = 2 if pads else 1, torch.Generator().manual_seed(seed)
    # Few values, so that there are equals, zeros among them.
    columns = (torch.rand(B, 2, T, generator=generator) ** 4 * 16).round() / 8
    diagonals = (torch.rand(B, 2, -(-T // size), generator=generator) * 8).round() / 8
    starts = torch.tensor(pads, device=device) if pads else None
    numbers = [
        torch.tensor(n, dtype=torch.int32, device=device) if isinstance(n, tuple) else n
        for n in (verticals, slashes)
    ]
    call = (columns.to(device), diagonals.to(device), starts, size, nearest, *numbers, most)
    got, expected = (choose_lines(*call, implementation=i) for i in (TRITON, REFERENCE))
    for mine, torchs, count in zip(got, expected, most, strict=True):
        assert mine.shape == (B, 2, count) and mine.dtype == torch.int32
        assert torch.equal(mine, torchs)
    assert (expected[1][..., -1] == 0).all()


@pytest.mark.parametrize("case", CHOICES)
def test_choose_lines(case):
    check_choice(case, "cpu", 6)


def test_a_choice_of_more_masses_than_a_program_holds(monkeypatch):
    from squeeze.kernels.prefill_index import choice

    monkeypatch.setattr(choice, "WHOLE", 1024)
    check_choice((2500, (0, 1300), 64, 2, 700, 4, (700, 4)), "cpu", 7)


ROUTES = [
    # shape of queries and keys, chunk, size, chunks of each query, first query
    ((2, 2, 1, 2048, 256, 40), 128, 64, 4, 1792),
    ((1, 3, 1, 3000, 256, 20), 128, 128, (0.0, 7.5, 30.0), 2688),
    ((1, 2, 2, 640, 640, 16), 256, 64, 9, 0),
    ((1, 1, 1, 76800, 128, 16), 128, 64, 5, 76672),
]


def check_routes(case, dtype, device, seed):
    (B, H, H_kv, T, T_q, D), chunk, size, number, first = case
    query, keys, _ = inputs((B, H, H_kv, T, T_q, D), dtype, device, None, seed)
    means = keys.float().unflatten(2, (-1, 8)).mean(3)[:, :, : -(-(first + T_q) // chunk)]
    means = means.contiguous()
    real = torch.arange(T_q, device=device) < torch.full((B, 1), T_q - 70, device=device)
    numbers = number if isinstance(number, tuple) else (float(number),) * H
    given = number
    if isinstance(number, tuple):
        given = torch.tensor(number, device=device)[:, None, None]
    call = (query, means, real, given, math.ceil(max(numbers)), chunk, size, first)
    gates = query.double() @ means.double().repeat_interleave(H // H_kv, 1).mT
    own = torch.arange(first, first + T_q, device=device)[:, None] // chunk
    gates.masked_fill_(torch.arange(means.shape[2], device=device) >= own, -torch.inf)
    ranked = gates.sort(dim=-1, descending=True)
    rank = torch.arange(means.shape[2], device=device)
    most = torch.tensor(numbers, device=device).ceil()[:, None, None]
    taken = (rank < most) & (rank < own) & real[:, None, :, None]
    expected = torch.zeros_like(gates).scatter_(-1, ranked.indices, taken.double())
    expected = expected.unflatten(2, (-1, size)).sum(3) / size
    # A query of which the last gate taken and the next one are as good as equal may take either.
    last = (most.long() - 1).clamp(0, len(rank) - 1).expand(B, H, T_q, 1)
    following = ranked.values.gather(-1, (last + 1).clamp(max=len(rank) - 1))
    gap = (ranked.values.gather(-1, last) - following).squeeze(-1)
    close = (gap < 1e-4).unflatten(2, (-1, size)).sum(3, keepdim=True) / size
    for implementation in (TRITON, REFERENCE):
        got = route_chunks(*call, implementation=implementation)
        assert got.shape == expected.shape and got.dtype == torch.float32
        assert ((got - expected).abs() <= close).all()
        assert torch.equal(got.sum(-1), expected.sum(-1).float())
    assert expected.any() and close.mean() < 0.1


@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_chunks(case, dtype):
    check_routes(case, dtype, "cpu", 21)


@pytest.mark.parametrize("implementation", [TRITON, REFERENCE])
def test_queries_are_routed_to_no_more_than_their_number_of_equal_chunks(implementation):
    query, means = torch.ones(1, 1, 64, 16), torch.ones(1, 1, 9, 16)
    means[:, :, 5] = 2.0
    real = torch.ones(1, 64, dtype=torch.bool)
    call = (query, means, real, 3, 3, 64, 64, 8 * 64)
    votes = route_chunks(*call, implementation=implementation)[0, 0, 0]
    assert votes[5] == 1.0 and votes[8] == 0.0 and votes.sum() == 3.0


def check_masses(shape, device, seed):
    """Weights within bins, beside zeros, ones and what is too small to count."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(0, 600, shape, generator=generator)
    inside = 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    weights = torch.exp2(-(bins + inside) / 32).float()
    weights.view(-1)[::5], weights.view(-1)[1::7], weights.view(-1)[2::11] = 0.0, 1.0, 2.0**-45
    weights = weights.to(device).transpose(1, 2)  # not contiguous
    held = [torch.ones(*weights.shape[:2], 512, dtype=torch.int64, device=device) for _ in range(2)]
    for found, implementation in zip(held, (TRITON, REFERENCE), strict=True):
        add_masses(weights, 32, 2.0**40, found, implementation=implementation)
    assert torch.equal(*held) and (held[0][..., -1] > 1).all()
    expected = 512 + (weights.double() * 2.0**40).long().sum((2, 3))
    assert torch.equal(held[0].sum(-1), expected)


@pytest.mark.parametrize("shape", [(2, 3, 3, 1001), (1, 70, 2, 64)])
def test_add_masses(shape):
    check_masses(shape, "cpu", 8)
    weights = torch.ones(shape)
    for held, implementation in (
        (torch.zeros(*shape[:2], 8), TRITON),
        (torch.zeros(*shape[:2], 8, dtype=torch.int64), Implementation.AUTO),
    ):
        with pytest.raises(ValueError, match="prefill_index"):
            add_masses(weights, 32, 1.0, held, implementation=implementation)


LINES = [
    # B, H, tokens of each row, columns, diagonals, size, first
    (2, 2, (700, 523), 120, 4, 64, 0),
    (1, 2, (640,), 380, 2, 64, 6),
    (1, 3, (1000,), 0, 3, 128, 0),
]


def check_lines(case, device, seed):
    B, H, tokens, V, S, size, first = case
    T = max(tokens)
    blocks, generator = -(-T // size), torch.Generator().manual_seed(seed)
    lengths = torch.tensor(tokens)
    ranks = torch.rand(B, H, T, generator=generator)
    ranks[..., :size] = -1
    columns = ranks.masked_fill(torch.arange(T) >= lengths[:, None, None], -1.0).topk(V)
    columns = columns.indices.masked_fill(columns.values < 0, T).sort().values
    ranks = torch.rand(B, H, blocks, generator=generator)
    ranks[..., 0] = 2
    distances = ranks.topk(S).indices.sort(descending=True).values
    distances[:, 0, 0] = blocks  # one that is not used
    call = (columns.to(device), distances.to(device), lengths.to(device), size, blocks, first)
    got, expected = (list_lines(*call, implementation=i) for i in (TRITON, REFERENCE))
    assert [x is None for x in (*got, *expected)] == 2 * [False, False, V == 0, V == 0]
    got, expected = ([x for x in lists if x is not None] for lists in (got, expected))
    for mine, torchs in zip(got[::2], expected[::2], strict=True):
        assert torch.equal(mine, torchs) and mine.dtype == torch.int32
    for offsets, mine, torchs in zip(expected[::2], got[1::2], expected[1::2], strict=True):
        for b in range(B):
            for h in range(H):
                end = int(offsets[b, h, -1])
                assert end > 0 and torch.equal(mine[b, h, :end], torchs[b, h, :end])


@pytest.mark.parametrize("case", LINES)
def test_list_lines(case):
    check_lines(case, "cpu", 5)


@pytest.mark.parametrize(
    "policy",
    [
        VerticalSlash(40, 128, 80),
        Antidiagonal(0.6, heads=(0.4, 0.7)),
        Flexprefill(0.5, 0.2),
        Sparge(0.6, 0.1),
        BlockTopk(256, heads=(0.1, 0.6)),
    ],
)
def test_policies_list_what_pytorch_lists(policy):
    query, keys, starts = inputs((2, 2, 1, 470, 470, 16), torch.float32, "cpu", (0, 90), 6)
    query, keys = 2 * query, 2 * keys
    got, expected = (
        policy.index(query, keys, starts, 0.25, None, implementation)
        for implementation in (TRITON, REFERENCE)
    )
    assert torch.equal(to_dense_mask(got, 470), to_dense_mask(expected, 470))


def test_a_policy_routes_as_pytorch_routes():
    query, keys, starts = inputs((2, 2, 1, 900, 160, 16), torch.float32, "cpu", (0, 90), 6)
    for policy in (Moba(3, max_density=0.3), Moba(heads=(2.5, 40), chunk_size=256)):
        got, expected = (
            policy.index(query, keys, starts, 0.25, None, implementation)
            for implementation in (TRITON, REFERENCE)
        )
        assert torch.equal(to_dense_mask(got, 900), to_dense_mask(expected, 900))


def test_chunks_beyond_the_registers():
    query, means = torch.ones(1, 1, 64, 16), torch.ones(1, 1, 1025, 16)
    call = (query, means, torch.ones(1, 64, dtype=torch.bool), 3, 3, 64, 64, 1024 * 64)
    with pytest.raises(UnsupportedError, match=r"prefill_index.*1025 chunks.*at most 1024"):
        route_chunks(*call, implementation=TRITON)
    assert route_chunks(*call).sum() == 3


def test_a_policy_averages_what_pytorch_averages():
    query, keys, starts = inputs((2, 2, 1, 1500, 1500, 16), torch.float32, "cpu", (0, 90), 6)
    query, keys = 2 * query, 2 * keys
    policy = Pyramid(0.2, 0.4, 0.5, 0.8, max_averaged=0.5, heads=(0.2, 0.6))
    got, expected = (
        policy.index(query, keys, starts, 0.25, None, implementation)
        for implementation in (TRITON, REFERENCE)
    )
    assert torch.equal(to_dense_mask(got, 1500), to_dense_mask(expected, 1500))
    assert torch.equal(got.pooled_offsets, expected.pooled_offsets)
    used = torch.arange(got.pooled_ids.shape[-1]) < got.pooled_offsets[..., -1:]
    assert used.sum() > 50
    assert torch.equal(got.pooled_ids[used], expected.pooled_ids[used])


def test_kernels_compile_and_keep_everything_in_registers():
    script = Path(__file__).with_name("compile_prefill_index.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for facts in json.loads(done.stdout.splitlines()[-1]):
        assert facts["stack"] <= 96, facts
        # The kernel for Hopper has a multiprocessor to itself.
        assert facts["shared"] <= (227 if facts["kernel"] == "weigh" else 160) * 1024, facts


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 1, 64, 16)
    with pytest.raises(DeviceError, match=r"prefill_index.*device cpu.*CUDA device.*reference"):
        sampled_mass(x, x, None, 1.0, None, [range(64)], 64, implementation=TRITON)


@pytest.mark.parametrize(
    ("rows", "implementation", "message"),
    [
        ([range(60, 65)], REFERENCE, "must be among"),
        ([], REFERENCE, "must be among"),
        ([range(64)], Implementation.AUTO, "must be resolved"),
    ],
)
def test_calls_that_do_not_fit(rows, implementation, message):
    x = torch.randn(1, 1, 64, 16)
    with pytest.raises(ValueError, match=message):
        sampled_mass(x, x, None, 1.0, None, rows, 64, implementation=implementation)
    with pytest.raises(ValueError, match="cells of 48"):
        weigh_cells(x, x, None, 48, 64, 1.0, None, range(1))


MANY = ((64, 1, 0), (64, 16, 0), (64, 16, 4), (64, 16, 8), (64, 16, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SAMPLED, ((1, 8, 2, 4096, 4096, 128), 64, MANY, None, None)])
def test_sampled_mass_on_a_gpu(case):
    check_sampled(case, torch.bfloat16, "cuda", 11)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *CELLS,
        ((1, 32, 8, 8192, 8192, 128), 64, 8, range(128), None, None),
        ((1, 8, 2, 8192, 8192, 128), 128, 16, range(10, 64), None, None),
    ],
)
def test_weigh_cells_on_a_gpu(case):
    check_cells(case, torch.bfloat16, "cuda", 12)


ON_HOPPER = [
    # Every number of cells to a block; ends inside a cell, padding, earlier keys.
    ((1, 32, 8, 8192, 8192, 128), 64, 8, range(128), None, None),
    ((2, 3, 1, 1999, 1999, 64), 64, 8, range(32), (0, 177), None),
    ((1, 7, 7, 3001, 1300, 128), 128, 16, range(13, 24), None, None),
    ((1, 2, 2, 2096, 2096, 80), 64, 4, range(3, 33), None, None),
    ((1, 1, 1, 2100, 900, 128), 64, 32, range(19, 33), None, None),
    ((2, 4, 1, 2500, 2500, 128), 64, 16, range(40), (3, 1000), None),
    ((1, 2, 1, 2600, 2600, 128), 128, 4, range(21), None, None),
]


hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs Hopper",
)


@pytest.fixture
def on_hopper(monkeypatch):
    """Count the launches of the kernel for Hopper."""
    from squeeze.kernels.prefill_index import hopper

    launched, launch = [], hopper.weigh_cells
    monkeypatch.setattr(hopper, "weigh_cells", lambda *x: launched.append(1) or launch(*x))
    return launched


def test_hopper_covers_what_was_compared():
    from squeeze.kernels.prefill_index.hopper import covers

    assert {D for D in range(257) if covers(D)} == {case[0][-1] for case in ON_HOPPER}


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("case", ON_HOPPER)
def test_weigh_cells_on_hopper(case, on_hopper):
    check_cells(case, torch.bfloat16, "cuda", 12)
    check_cells(case, torch.float16, "cuda", 16)
    assert len(on_hopper) == 2


@pytest.mark.gpu
@hopper_only
def test_cells_of_any_strides_on_hopper(on_hopper):
    query, keys = (
        torch.randn(2, T, H, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for T, H in ((3000, 4), (5000, 2))
    )
    call = (None, 8, 64, 0.1, None, range(31, 79))
    found = [
        weigh_cells(*x, *call, implementation=TRITON)
        for x in ((query, keys), (query.contiguous(), keys.contiguous()))
    ]
    assert torch.equal(*found) and found[0].sum() > 300 and len(on_hopper) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [40, 700, 2048])
@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("mass", [1.0, 0.8, None])
def test_select_blocks_on_a_gpu(mass, required, blocks):
    for bounded in (False, True):
        check_selection(2, 2, blocks, blocks // 2, mass, bounded, required, "cuda", 13)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [40, 700, 2048])
@pytest.mark.parametrize("per_head", [False, True])
def test_select_levels_on_a_gpu(per_head, blocks):
    for size in (64, 128):
        check_levels(2, 2, blocks, blocks // 2, size, per_head, "cuda", 17)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *ROUTES,
        ((1, 8, 2, 65536, 4096, 128), 128, 64, 7, 61440),
        ((1, 4, 2, 16384, 1024, 80), 128, 64, 40, 15360),
        ((1, 2, 1, 131072, 1024, 128), 256, 128, 7, 130048),
        ((1, 8, 2, 131072, 1024, 128), 128, 64, 7, 130048),
        ((1, 2, 1, 24576, 512, 64), 128, 64, 12, 24064),
    ],
)
def test_route_chunks_on_a_gpu(case):
    check_routes(case, torch.bfloat16, "cuda", 22)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *CHOICES,
        (16384, None, 64, 3, 3000, 25, (3000, 25)),
        (100000, (99, 3), 64, 3, (3000, 7), (25, 1), (2500, 25)),
    ],
)
def test_choose_lines_on_a_gpu(case):
    check_choice(case, "cuda", 18)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*LINES, (1, 8, (32768,), 3000, 25, 64, 0)])
def test_list_lines_on_a_gpu(case):
    check_lines(case, "cuda", 14)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device():
    query, keys, _ = inputs((1, 8, 2, 4096, 4096, 64), torch.bfloat16, "cuda", None, 15)
    policies = (VerticalSlash(), Antidiagonal(), BlockTopk(), Sparge(), Flexprefill(), Pyramid())
    for policy in (*policies, Moba(), Sale()):
        policy.index(query, keys, None, 0.125, None, TRITON)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            index = policy.index(query, keys, None, 0.125, None, TRITON)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(index.block_offsets[0, 0, -1]) > 64
