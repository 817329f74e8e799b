"""Low-bit estimates of all scores: the kernels against float64, and against PyTorch bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeeze.kernels.prefill_index import hopper_elements
from squeeze.kernels.prefill_index.api import round_keys, round_queries, weigh_elements
from squeeze.sparsify.index import to_dense_mask
from squeeze.sparsify.prefill.sale import Sale
from squeeze.types import Implementation
from tests.kernels.test_prefill_index import REFERENCE, TRITON, check, hopper_only, inputs

ROUNDED = [
    # H, H_kv, blocks of keys, first, D, size, stride, begins, lengths, softcap, bits
    ((3, 1, 7, 0, 20, 64, 1), (0, 100), (448, 390), None, 4),
    ((4, 2, 5, 3, 80, 128, 1), (400, 400), (640, 601), 3.0, 3),
    ((2, 2, 3, 1, 64, 64, 1), (70, 64), (192, 130), None, 8),
    ((3, 1, 7, 0, 20, 64, 8), (0, 100), (448, 390), None, 4),
    ((4, 2, 5, 3, 80, 128, 4), (400, 400), (640, 601), 3.0, 3),
]


def rounding(case, dtype, device, seed):
    """Arguments of ``round_queries``: queries far from zero, keys too."""
    (H, H_kv, blocks, first, D, size, stride), begins, lengths, softcap, bits = case
    T, T_q = blocks * size, (blocks - first) * size
    query, keys, _ = inputs((2, H, H_kv, T, T_q, D), dtype, device, None, seed)
    query = query.add_(1.5)[:, :, ::stride]
    keys.sub_(0.5)
    mean = query.mean(2, keepdim=True, dtype=torch.float32)
    key_mean = keys.mean(2, keepdim=True, dtype=torch.float32) * (softcap is None)
    begins, lengths = (torch.tensor(x, device=device) for x in (begins, lengths))
    scaling = 2.0 * D**-0.5
    numbers = (size, first, stride, scaling, softcap, bits)
    return query, keys, mean, key_mean, begins, lengths, *numbers


def near(query, keys, key_mean, begins, lengths, size, first, stride, scaling, softcap):
    """ln l_i of every query, in float64."""
    B, H, rows, _ = query.shape
    keys = (keys.double() - key_mean.double()).repeat_interleave(H // keys.shape[1], 1)
    x = scaling * query.double() @ keys.mT
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    i = torch.arange(rows, device=x.device)[:, None] * stride + first * size
    j = torch.arange(keys.shape[2], device=x.device)
    block, own = j // size, i // size
    seen = (j <= i) & ((block == 0) | (block >= own - 1))
    total = x.masked_fill(~seen, -torch.inf).logsumexp(-1)
    real = (i.mT >= begins[:, None]) & (i.mT < lengths[:, None])
    return total, real[:, None].expand(B, H, rows)


def check_rounding(case, dtype, device, seed):
    call = rounding(case, dtype, device, seed)
    got, reference = (round_queries(*call, implementation=i) for i in (TRITON, REFERENCE))
    query, keys, _, *numbers, _ = call
    oracle, real = near(query, keys, *numbers)
    for totals in (got[2], reference[2]):
        assert (totals[~real] == torch.inf).all() and (~real).any()
    check(got[2][real], reference[2][real], oracle[real])
    return [(mine.float(), torchs.float()) for mine, torchs in zip(got, reference, strict=True)]


@pytest.mark.parametrize("case", ROUNDED)
def test_round_queries(case):
    dtype = torch.float16 if case[-1] == 4 else torch.float32
    codes, scales, _ = check_rounding(case, dtype, "cpu", 3)
    assert torch.equal(*codes) and torch.equal(*scales)


KEYED = [
    # B, H, H_kv, T, D, bits
    (2, 4, 1, 130, 20, 4),
    (1, 2, 2, 63, 80, 3),
    (2, 6, 2, 192, 64, 8),
    (1, 7, 1, 1, 128, 2),
]


def check_keys(case, dtype, device, seed, shifted=True):
    """Against PyTorch and, what the mean adds, float64; keys inside a tensor of NaN."""
    B, H, H_kv, T, D, bits = case
    query, keys, _ = inputs((B, H, H_kv, T, T, D), dtype, device, None, seed)
    keys.sub_(0.5)[:, :, T // 3] = 0.0  # as padding has it
    mean = query.mean(2, keepdim=True, dtype=torch.float32) + 1.5
    key_mean = keys.mean(2, keepdim=True, dtype=torch.float32) * shifted
    call = (keys, key_mean, mean, D**-0.5, bits)
    got, reference = (round_keys(*call, implementation=i) for i in (TRITON, REFERENCE))
    exact = (keys.double() - key_mean.double()).repeat_interleave(H // H_kv, 1)
    oracle = (exact @ mean.double().mT * D**-0.5).squeeze(-1)
    assert [x.shape for x in got] == [(B, H_kv, T, D), (B, H_kv, T), (B, H, T)]
    check(got[2], reference[2], oracle)
    return [(mine.float(), torchs.float()) for mine, torchs in zip(got, reference, strict=True)]


@pytest.mark.parametrize("case", KEYED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shifted", [True, False])
def test_round_keys(case, dtype, shifted):
    codes, scales, _ = check_keys(case, dtype, "cpu", 3, shifted)
    assert torch.equal(*codes) and torch.equal(*scales) and codes[0].any() == (case[3] > 1)


WEIGHED = [
    # B, H, H_kv, blocks of keys, first, rows, D, size, stride, bits, softcap
    (1, 4, 2, 9, 0, range(9), 32, 64, 1, 4, None),
    (2, 3, 1, 7, 2, range(3, 7), 20, 64, 1, 3, None),
    (1, 2, 2, 5, 1, range(1, 4), 80, 128, 1, 8, None),
    (2, 1, 1, 6, 0, range(1, 5), 64, 64, 1, 4, 2.0),
    (1, 2, 1, 19, 1, range(1, 19), 32, 64, 8, 4, None),
    (2, 3, 1, 7, 2, range(3, 7), 20, 128, 4, 3, None),
]


def weighing(case, device, seed):
    """Arguments of ``weigh_elements``, some queries hidden."""
    B, H, H_kv, blocks, first, rows, D, size, stride, bits, softcap = case
    generator = torch.Generator().manual_seed(seed)
    queries, tokens, most = (blocks - first) * size // stride, blocks * size, 2 ** (bits - 1) - 1

    def integers(*shape):
        x = torch.randint(-most, most + 1, shape, generator=generator)
        return x.to(device, torch.int8)

    def numbers(*shape):
        return torch.rand(*shape, generator=generator).to(device)

    totals = 3 * numbers(B, H, queries)
    totals[..., -5:] = torch.inf
    return (
        integers(B, H, queries, D), numbers(B, H, queries) / (most * D), totals,
        integers(B, H_kv, tokens, D), numbers(B, H_kv, tokens), numbers(B, H, tokens) - 0.5,
        size, first, stride, softcap, rows,
    )  # fmt: skip


def below(x, rows):
    """What belongs to blocks that a query block may read."""
    own = torch.arange(rows.start, rows.stop, device=x.device)[:, None]
    return x[..., torch.arange(rows.stop, device=x.device) <= own]


@pytest.mark.parametrize("case", WEIGHED)
def test_weigh_elements_bit_for_bit(case):
    call = weighing(case, "cpu", 4)
    got, reference = (
        below(weigh_elements(*call, implementation=i), call[-1]) for i in (TRITON, REFERENCE)
    )
    if case[-1] is None:
        assert torch.equal(got, reference)
    else:
        check_weighing(call)


def check_weighing(call, dtype=torch.int8):
    """Against float64, whatever is added up in one step."""
    codes, scales, totals, key_codes, key_scales, added, size, first, stride, softcap, rows = call
    small = (codes.to(dtype), scales, totals, key_codes, key_scales, added)
    numbers, each = (size, first, stride, softcap, rows), size // stride
    got = weigh_elements(*small, *numbers, implementation=TRITON)
    reference = weigh_elements(*call)
    part = slice((rows.start - first) * each, (rows.stop - first) * each)
    heads, keys = codes.shape[1] // key_codes.shape[1], slice(0, rows.stop * size)
    k = (key_codes.double() * key_scales.double()[..., None])[:, :, keys]
    x = (codes.double() * scales.double()[..., None])[:, :, part]
    x = x @ k.repeat_interleave(heads, 1).mT + added.double()[:, :, None, keys]
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    x = x - totals.double()[:, :, part, None]
    x = x.unflatten(2, (-1, each)).amax(3).unflatten(-1, (-1, size)).amax(-1)
    got, reference, oracle = (below(found, rows) for found in (got, reference, x))
    real = oracle > -torch.inf
    assert torch.equal(real, got > -torch.inf) and real.any()
    check(got[real], reference[real], oracle[real])


@pytest.mark.parametrize(("softcap", "stride"), [(None, 1), (2.0, 1), (None, 8), (2.0, 4)])
def test_a_policy_lists_what_pytorch_lists(softcap, stride):
    query, keys, starts = inputs((2, 4, 2, 900, 700, 16), torch.float32, "cpu", (0, 90), 6)
    policy = Sale(0.2, query_stride=stride, heads=(0.5, 1.0, 2.0, 4.0), max_density=1.0)
    got, expected = (
        policy.index(2 * query, keys, starts, 0.25, softcap, implementation)
        for implementation in (TRITON, REFERENCE)
    )
    mask = to_dense_mask(got, 900)
    assert torch.equal(mask, to_dense_mask(expected, 900))
    assert 0.2 < mask.float().mean() * 2 < 0.9


def test_kernels_compile_and_keep_everything_in_registers():
    script = Path(__file__).with_name("compile_prefill_elements.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for facts in json.loads(done.stdout.splitlines()[-1]):
        assert facts["stack"] <= 96, facts
        assert facts["shared"] <= (227 if facts["kernel"] == "weigh_elements" else 160) * 1024, (
            facts
        )


@pytest.mark.parametrize(
    ("rows", "implementation", "message"),
    [
        (range(6, 8), REFERENCE, r"blocks range\(6, 8\) of 7"),
        (range(1, 5), REFERENCE, r"blocks range\(1, 5\)"),
        (range(3, 7), Implementation.AUTO, "must be resolved"),
    ],
)
def test_calls_that_do_not_fit(rows, implementation, message):
    call = weighing(WEIGHED[1], "cpu", 4)
    with pytest.raises(ValueError, match=message):
        weigh_elements(*call[:-1], rows, implementation=implementation)
    call = rounding(ROUNDED[0], torch.float32, "cpu", 3)
    with pytest.raises(ValueError, match="with means"):
        round_keys(call[1], call[3][:, :, 0], call[2], 1.0, 4, implementation=implementation)
    with pytest.raises(ValueError, match="with keys"):
        round_queries(call[0][:, :, 1:], *call[1:])


LARGE = [
    ((8, 2, 33, 0, 128, 64, 1), (0, 300), (2112, 2000), None, 4),
    ((4, 1, 20, 3, 80, 128, 1), (400, 400), (2560, 2500), 20.0, 4),
    ((2, 2, 30, 1, 64, 64, 1), (70, 64), (1920, 1900), None, 8),
    ((8, 2, 33, 0, 128, 64, 8), (0, 300), (2112, 2000), None, 4),
    ((4, 1, 20, 3, 80, 128, 4), (400, 400), (2560, 2500), 20.0, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_queries_on_a_gpu(case, dtype):
    codes, scales, _ = check_rounding(case, dtype, "cuda", 5)
    # PyTorch multiplies by reciprocals there: an integer changes where one lies halfway.
    check_halves(codes, scales)


def check_halves(codes, scales):
    different = codes[0] != codes[1]
    assert (codes[0] - codes[1]).abs().max() <= 1 and different.float().mean() < 1e-4
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [(1, 32, 8, 4096, 128, 4), (2, 3, 1, 1000, 80, 4), (1, 4, 4, 640, 64, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_keys_on_a_gpu(case, dtype):
    codes, scales, _ = check_keys(case, dtype, "cuda", 5)
    check_halves(codes, scales)


WIDE = [
    (1, 32, 8, 64, 0, range(64), 128, 64, 1, 4, None),
    (2, 3, 1, 33, 2, range(3, 33), 128, 64, 1, 4, None),
    (1, 4, 2, 21, 1, range(1, 20), 80, 128, 1, 3, None),
    (2, 2, 1, 35, 0, range(1, 35), 64, 64, 1, 4, 2.0),
    (1, 7, 7, 19, 5, range(7, 19), 128, 128, 1, 4, 2.0),
    (1, 32, 8, 96, 0, range(96), 128, 64, 8, 4, None),
    (2, 3, 1, 99, 2, range(3, 99), 128, 64, 8, 4, None),
    (1, 4, 2, 41, 1, range(1, 40), 80, 128, 8, 3, 2.0),
    (2, 2, 1, 35, 0, range(1, 35), 64, 64, 4, 4, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*WEIGHED, *WIDE])
def test_weigh_elements_on_a_gpu(case, monkeypatch):
    monkeypatch.setattr(hopper_elements, "takes", lambda codes: False)
    check_weighing(weighing(case, "cuda", 7))


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("case", WIDE)
def test_weigh_elements_on_hopper(case, dtype, monkeypatch):
    launched, launch = [], hopper_elements.weigh_elements
    monkeypatch.setattr(
        hopper_elements, "weigh_elements", lambda *x: launched.append(1) or launch(*x)
    )
    check_weighing(weighing(case, "cuda", 8), dtype)
    assert len(launched) == 1


@pytest.mark.gpu
@hopper_only
def test_products_of_eight_bit_floats_are_exact():
    """The largest sums there are, and small ones left of large ones."""
    codes = torch.full((1, 1, 1024, 128), 7, dtype=torch.int8, device="cuda")
    codes[:, :, 1::2, 1::2] = -7
    codes[:, :, :, 3] = torch.arange(1024, device="cuda") % 15 - 7
    keys = codes.flip(2).contiguous()
    ones, zeros = (torch.full((1, 1, 1024), x, device="cuda") for x in (1.0, 0.0))
    call = (ones, zeros, keys, ones, zeros, 64, 0, 1, None, range(16))
    got = weigh_elements(codes.to(torch.float8_e4m3fn), *call, implementation=TRITON)
    assert torch.equal(below(got, range(16)), below(weigh_elements(codes, *call), range(16)))


@pytest.mark.gpu
@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("stride", [1, 8])
def test_a_policy_lists_on_a_gpu_what_pytorch_lists(stride, compared, monkeypatch):
    if not compared:
        monkeypatch.setattr(hopper_elements, "_on_hopper", lambda x: False)
    query, keys, _ = inputs((1, 8, 2, 4000, 4000, 128), torch.bfloat16, "cuda", None, 6)
    policy = Sale(0.3, query_stride=stride, max_density=1.0)
    got, expected = (
        to_dense_mask(policy.index(query, keys, None, 0.1, None, i), 4000)[..., ::64, ::64]
        for i in (TRITON, REFERENCE)
    )
    # A score at the threshold, or an integer halfway, falls on either side.
    assert (got != expected).float().mean() < 1e-3 * expected.float().mean()
    assert 0.1 < expected.float().mean() * 2 < 0.95
