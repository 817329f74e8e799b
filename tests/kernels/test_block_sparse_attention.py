import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from squeeze.errors import DeviceError, UnsupportedError
from squeeze.kernels.block_sparse_attention import api
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.sparsify.index import compact, from_masks, to_dense_mask
from squeeze.sparsify.prefill.vertical_slash import VerticalSlash
from squeeze.types import Implementation

REFERENCE, TRITON = Implementation.REFERENCE, Implementation.TRITON
triton_only = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs CUDA or Triton's interpreter",
)


def guarded(generator, B, H, T, D, dtype, device="cpu"):
    """Return a strided ``[B, H, T, D]`` view whose surroundings are NaN."""
    buffer = torch.full((B, T + 5, H + 1, D + 8), torch.nan)
    view = buffer[:, 2 : T + 2, :H, 3 : D + 3]
    view.copy_(torch.randn(B, T, H, D, generator=generator))
    buffer = buffer.to(device, dtype)
    return buffer[:, 2 : T + 2, :H, 3 : D + 3].transpose(1, 2)


def random_index(generator, B, H, T, size, pooled=False):
    """List random blocks and columns, and nothing at all for some blocks of queries.

    With ``pooled``, every query block but the first also reads random runs of averages.
    """
    N, tokens = -(-T // size), torch.arange(T)
    blocks = torch.rand(B, H, N, N, generator=generator) < 0.5
    blocks &= torch.ones(N, N, dtype=torch.bool).tril()
    columns = torch.rand(B, H, N, T, generator=generator) < 0.3
    columns &= tokens < (torch.arange(N)[:, None] + 1) * size
    columns &= ~blocks[..., tokens // size]
    some = torch.rand(B, H, N, 1, generator=generator) < 0.8
    index = from_masks(blocks & some, columns & some, size)
    if not pooled:
        return index
    counts = torch.tensor([T // 16, T // 32, T // 64])
    total = int(counts.sum())
    chosen = torch.rand(B, H, N, total, generator=generator) < 0.4
    level = torch.repeat_interleave(torch.arange(1, 4), counts)
    ends = (torch.arange(total) - (counts.cumsum(0) - counts)[level - 1] + 1) << (level + 3)
    chosen &= ends <= torch.arange(N)[:, None] * size
    offsets, ids = compact(torch.arange(total), chosen, total * N)
    return replace(index, pooled_offsets=offsets, pooled_ids=ids)


def permuted(generator, index, T, segment):
    """Shuffle the keys inside each complete segment, head by head."""
    B, H = index.block_offsets.shape[:2]
    order = torch.rand(B, H, T // segment, segment, generator=generator).argsort(-1)
    order = order + torch.arange(T // segment)[:, None] * segment
    return replace(index, permutation=order.flatten(-2).int(), segment_size=segment)


def with_averages(index, b, h, k, v):
    """Return, for one head, each query block's averaged keys, values and ln of their counts."""
    T, result = len(k), []
    first = {1: 0, 2: T // 16, 3: T // 16 + T // 32}
    for a, e in pairwise(index.pooled_offsets[b, h].tolist()):
        rows = []
        for number in index.pooled_ids[b, h, a:e].tolist():
            level = 1 + (number >= first[2]) + (number >= first[3])
            start = number - first[level] << level + 3
            for first_token in range(start, start + (8 << level), 1 << level):
                tokens = slice(first_token, first_token + (1 << level))
                rows.append((k[tokens].mean(0), v[tokens].mean(0), math.log(1 << level)))
        result.append(rows)
    return result


def oracle(query, keys, values, index, starts, scaling, softcap):
    """Attend in float64 over the token mask, keys repeated, one row at a time."""
    before = keys.shape[2] - query.shape[2]
    if before:
        whole = torch.nn.functional.pad(query, (0, 0, before, 0))
        results = oracle(whole, keys, values, index, starts, scaling, softcap)
        return tuple(result[:, :, before:] for result in results)
    (B, H, T, D), groups = query.shape, query.shape[1] // keys.shape[1]
    query, keys, values = (x.cpu().double() for x in (query, keys, values))
    mask = torch.ones(B, H, T, T, dtype=torch.bool).tril()
    if index is not None:
        mask = to_dense_mask(index, T)
    out, lse = torch.zeros(B, H, T, D).double(), torch.full((B, H, T), -torch.inf).double()
    for b in range(B):
        start = 0 if starts is None else int(starts[b])
        q = query[b, :, start:]
        k, v = (x[b, :, start:].repeat_interleave(groups, 0) for x in (keys, values))
        scores = scaling * q @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask[b, :, : T - start, : T - start], -torch.inf)
        lse[b, :, start:] = scores.logsumexp(-1)
        out[b, :, start:] = scores.softmax(-1).nan_to_num(0.0) @ v
        if index is None or index.pooled_ids is None:
            continue
        for h in range(H):
            # Averages count from the row's first real token, over a text of T positions.
            k_h, v_h = (torch.nn.functional.pad(x[h], (0, 0, 0, start)) for x in (k, v))
            for i, rows in enumerate(with_averages(index, b, h, k_h, v_h)):
                queries = slice(start + i * index.block_size, start + (i + 1) * index.block_size)
                if not rows or queries.start >= T:
                    continue
                means, contents = (torch.stack([row[x] for row in rows]) for x in (0, 1))
                more = scaling * query[b, h, queries] @ means.T
                more = more if softcap is None else softcap * torch.tanh(more / softcap)
                more += torch.tensor([row[2] for row in rows], dtype=torch.float64)
                both = torch.cat((lse[b, h, queries, None], more), -1)
                parts = both.softmax(-1)
                out[b, h, queries] = parts[:, :1] * out[b, h, queries] + parts[:, 1:] @ contents
                lse[b, h, queries] = both.logsumexp(-1)
    return out, lse


def assert_within_budget(actual, reference, expected, dtype, what):
    """Allow twice the reference's error to the oracle and one rounding of the largest value."""
    assert torch.equal(actual.isinf().cpu(), expected.isinf()), what
    finite = ~expected.isinf()
    expected = expected.where(finite, 0.0)
    error, allowed = (
        (x.cpu().double().where(finite, 0.0) - expected).abs() for x in (actual, reference)
    )
    budget = 2 * allowed.max() + torch.finfo(dtype).eps * expected.abs().max()
    worst = error.argmax().item()
    assert error.max() <= budget, (
        f"{what}: error {error.max():.3e} (mean {error.mean():.3e}) over budget {budget:.3e} "
        f"at {worst} of {tuple(error.shape)}"
    )


def compare(
    seed,
    B,
    H,
    H_kv,
    T,
    D,
    dtype,
    size,
    starts=None,
    softcap=None,
    device="cpu",
    *,
    pooled=False,
    queries=None,
    segments=None,
    quantize=None,
    columns=True,
):
    generator = torch.Generator().manual_seed(seed)
    inputs = [guarded(generator, B, heads, T, D, dtype, device) for heads in (H, H_kv, H_kv)]
    inputs[0] = inputs[0][:, :, T - (queries or T) :]
    index = None if size is None else random_index(generator, B, H, T, size, pooled)
    if segments:
        index = permuted(generator, index, T, segments * size)
    if index is not None and not columns:
        index = replace(index, column_offsets=None, column_ids=None)
    starts = None if starts is None else torch.tensor(starts)
    expected = oracle(*inputs, index, starts, D**-0.5, softcap)
    if index is not None:
        moved = {k: x.to(device) for k, x in vars(index).items() if isinstance(x, torch.Tensor)}
        index = replace(index, **moved)
    starts = None if starts is None else starts.to(device)
    results = [
        block_sparse_attention(
            *inputs, index, starts=starts, scaling=D**-0.5, softcap=softcap, quantize=quantize,
            implementation=choice,
        )
        for choice in (TRITON, REFERENCE)
    ]  # fmt: skip
    what = f"seed {seed}, T {T}, heads {H}/{H_kv}, D {D}, {dtype}, blocks of {size}"
    assert results[0][0].dtype == dtype
    assert results[0][1].dtype == torch.float32
    assert_within_budget(results[0][0], results[1][0], expected[0], dtype, what)
    assert_within_budget(results[0][1], results[1][1], expected[1], torch.float32, what + ", lse")
    if quantize:  # both round the same keys, values and queries, weights from different maxima
        close = torch.nn.functional.cosine_similarity(
            *(result[0].cpu().double().flatten() for result in results), dim=0
        )
        assert close > 0.9995, f"{what}: cosine {close:.6f}"


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what is allocated without values with NaN."""
    empty = torch.empty

    def poison(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poison)


def choices():
    return [REFERENCE, pytest.param(TRITON, marks=triton_only)]


CASES = [  # seed, B, H, H_kv, T, D, dtype, block size, starts, softcap
    (0, 1, 1, 1, 1, 64, torch.float32, 64, None, None),
    (1, 2, 3, 1, 2, 64, torch.float16, None, None, None),
    (2, 1, 4, 1, 63, 80, torch.float16, 64, None, None),
    (3, 2, 2, 2, 64, 64, torch.float32, 128, None, None),
    (4, 1, 7, 1, 65, 128, torch.float16, 64, None, None),
    (5, 3, 3, 1, 111, 64, torch.float32, 64, [0, 50, 110], None),
    (6, 2, 2, 1, 140, 96, torch.float16, 64, [70, 0], 4.0),
    (7, 2, 1, 1, 290, 80, torch.float32, 128, [7, 160], None),
    (8, 2, 1, 1, 260, 64, torch.float32, None, [0, 131], 8.0),
    (9, 1, 1, 1, 1000, 64, torch.float16, 64, None, None),
    (10, 1, 1, 1, 130, 256, torch.float16, 64, None, None),
    (11, 1, 1, 1, 130, 128, torch.bfloat16, 64, None, None),
]


@triton_only
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case[0]}")
def test_triton_against_reference(case, poisoned):
    compare(*case)


@triton_only
@pytest.mark.parametrize("case", [CASES[i] for i in (3, 4, 5, 6, 7)], ids=lambda c: f"seed{c[0]}")
def test_triton_reads_averages(case, poisoned):
    compare(*case, pooled=True)


@triton_only
@pytest.mark.parametrize(
    ("case", "segments"), [(4, 1), (5, 1), (7, 1), (9, 3)], ids=lambda value: str(value)
)
def test_triton_reads_reordered_keys(case, segments, poisoned):
    compare(*CASES[case], segments=segments)


LATER = [  # case, queries, pooled, segments
    (1, 1, False, None),
    (4, 3, False, None),
    (5, 61, False, 1),
    (6, 70, True, None),
    (7, 200, True, 1),
    (8, 140, False, None),
    (9, 150, False, 2),
]


@triton_only
@pytest.mark.parametrize(("case", "queries", "pooled", "segments"), LATER)
def test_triton_attends_a_later_part(case, queries, pooled, segments, poisoned):
    compare(*CASES[case], queries=queries, pooled=pooled, segments=segments)


@triton_only
@pytest.mark.parametrize("quantize", ["int8", "float8"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (1, {}),
        (2, {"queries": 3}),
        (5, {"segments": 1}),
        (7, {"pooled": True, "queries": 200}),
        (9, {}),
    ],
)
def test_triton_in_eight_bits(case, options, quantize, poisoned):
    compare(*CASES[case], quantize=quantize, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [None, 64, 128])
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("quantize", ["int8", "float8"])
def test_eight_bits_on_a_gpu(D, size, quantize, poisoned):
    compare(D, 2, 8, 2, 1000, D, torch.bfloat16, size, [0, 333], None, "cuda", quantize=quantize)
    compare(D + 1, 1, 7, 1, 65, D, torch.float16, size, None, None, "cuda", quantize=quantize)
    variants = ({"queries": 700}, {"columns": False}, {"segments": 2}, {"pooled": True})
    for options in variants if size else ():
        compare(
            D, 2, 8, 2, 1000, D, torch.bfloat16, size, [0, 333], None, "cuda", quantize=quantize,
            **options,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("size", [None, 64, 128])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_on_a_gpu(D, size, dtype, poisoned):
    compare(D, 2, 8, 2, 1000, D, dtype, size, [0, 333], None, "cuda")
    compare(D + 1, 1, 7, 1, 65, D, dtype, size, None, 5.0, "cuda")
    compare(D + 2, 2, 8, 2, 1000, D, dtype, size, [0, 333], None, "cuda", queries=700)
    compare(D + 4, 1, 7, 1, 2300, D, dtype, size, None, None, "cuda", columns=False)
    if size:
        compare(D + 3, 1, 7, 1, 1000, D, dtype, size, None, None, "cuda", segments=2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "columns"), [(None, False), (64, False), (128, False), (64, True), (128, True)]
)
@pytest.mark.parametrize("quantize", [None, "int8", "float8"])
def test_both_kernels_agree_on_a_gpu(quantize, size, columns, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    from squeeze.kernels.block_sparse_attention import hopper

    generator = torch.Generator().manual_seed(21)
    q, k, v = (guarded(generator, 2, h, 1500, 128, torch.bfloat16, "cuda") for h in (8, 2, 2))
    index = None if size is None else random_index(generator, 2, 8, 1500, size)
    if index is not None:
        index = replace(
            index, **{n: x.cuda() for n, x in vars(index).items() if torch.is_tensor(x)}
        )
        if not columns:
            index = replace(index, column_offsets=None, column_ids=None)
    assert hopper.takes(q, index, None, quantize)

    def call():
        return block_sparse_attention(
            q, k, v, index, scaling=128**-0.5, quantize=quantize, implementation=TRITON
        )

    ours = call()
    monkeypatch.setattr(hopper, "takes", lambda *arguments: False)
    plain = call()
    close = torch.nn.functional.cosine_similarity(
        ours[0].double().flatten(), plain[0].double().flatten(), 0
    )
    assert close > (0.9995 if quantize else 0.99999)
    assert torch.equal(ours[1].isinf(), plain[1].isinf())


def test_hopper_copies_what_it_cannot_address():
    pytest.importorskip("triton")
    from squeeze.kernels.block_sparse_attention import hopper

    def strided(*strides):
        shape = (1, 2, 4, 128)
        return torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")

    fine = strided(1024, 128, 256, 1)
    assert hopper._aligned(fine) is fine
    # Channels apart, rows off pieces of 16 bytes, and rows whose offsets take more than 32 bits.
    for bad in (strided(1024, 512, 1, 4), strided(1024, 128, 260, 1), strided(0, 128, 1 << 29, 1)):
        assert hopper._aligned(bad).stride() == (1024, 512, 128, 1)


def test_hopper_covers_what_was_compared():
    pytest.importorskip("triton")
    from squeeze.kernels.block_sparse_attention.hopper import covers

    generator = torch.Generator().manual_seed(0)

    def heads(index, to):
        return [D for D in (64, 80, 128, 256) if covers(D, index, to)]

    assert heads(None, None) == [64, 128]
    assert heads(None, "int8") == heads(None, "float8") == [128]
    for size in (64, 128):
        index = random_index(generator, 1, 1, 300, size, pooled=True)
        averages = replace(index, column_offsets=None, column_ids=None)
        blocks = replace(averages, pooled_offsets=None, pooled_ids=None)
        columns = replace(index, pooled_offsets=None, pooled_ids=None)
        ordered = permuted(generator, blocks, 300, size)
        for to in (None, "int8", "float8"):
            assert heads(blocks, to) == heads(columns, to) == [128]
            for other in (index, averages, ordered):
                assert heads(other, to) == []


@pytest.mark.gpu
def test_policy_and_kernel_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, 2000, 64, generator=generator) for heads in (6, 2, 2)
    )
    starts = torch.tensor([0, 700])
    expected = block_sparse_attention(
        query, keys, values, VerticalSlash(200, 256, 64).index(query, keys, starts, 0.125),
        starts=starts, scaling=0.125, implementation=REFERENCE,
    )  # fmt: skip
    query, keys, values, starts = (x.cuda() for x in (query, keys, values, starts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        index = VerticalSlash(200, 256, 64).index(query, keys, starts, 0.125)
        out, lse = block_sparse_attention(
            query, keys, values, index, starts=starts, scaling=0.125, implementation=TRITON
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.cpu(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "pooled"), [(None, False), (64, False), (128, False), (64, True), (128, True)]
)
@pytest.mark.parametrize("T", [1, 65, 300])
def test_reference_against_the_oracle(size, pooled, T):
    generator = torch.Generator().manual_seed(T)
    inputs = [guarded(generator, 2, heads, T, 16, torch.float64) for heads in (6, 2, 2)]
    index = None if size is None else random_index(generator, 2, 6, T, size, pooled)
    starts = torch.tensor([0, T // 3])
    out, lse = block_sparse_attention(
        *inputs, index, starts=starts, scaling=0.25, softcap=3.0, implementation=REFERENCE
    )
    expected = oracle(*inputs, index, starts, 0.25, 3.0)
    torch.testing.assert_close(out, expected[0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(lse, expected[1], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("queries", [1, 70, 200])
@pytest.mark.parametrize(("size", "pooled"), [(None, False), (64, True), (128, False)])
def test_reference_of_a_later_part_against_the_oracle(size, pooled, queries):
    generator, T, starts = torch.Generator().manual_seed(queries), 300, torch.tensor([0, 131])
    inputs = [guarded(generator, 2, heads, T, 16, torch.float64) for heads in (6, 2, 2)]
    inputs[0] = inputs[0][:, :, T - queries :]
    index = None if size is None else random_index(generator, 2, 6, T, size, pooled)
    if size:
        index = permuted(generator, index, T, size)
    out, lse = block_sparse_attention(
        *inputs, index, starts=starts, scaling=0.25, implementation=REFERENCE
    )
    expected = oracle(*inputs, index, starts, 0.25, None)
    torch.testing.assert_close(out, expected[0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(lse, expected[1], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("quantize", ["int8", "float8"])
@pytest.mark.parametrize("size", [None, 64, 128])
def test_eight_bits_stay_close(quantize, size):
    generator, T, starts = torch.Generator().manual_seed(8), 700, torch.tensor([0, 131])
    q, k, v = (torch.randn(2, heads, T, 64, generator=generator) for heads in (6, 2, 2))
    k += 8 * torch.randn(2, 2, 1, 64, generator=generator)  # what smoothing takes away
    index = None if size is None else random_index(generator, 2, 6, T, size)
    expected = oracle(q, k, v, index, starts, 0.125, None)
    out, lse = block_sparse_attention(
        q, k, v, index, starts=starts, scaling=0.125, quantize=quantize, implementation=REFERENCE
    )
    close = torch.nn.functional.cosine_similarity(out.flatten(), expected[0].float().flatten(), 0)
    assert 0.999 <= close < 1
    finite = ~expected[1].isinf()
    assert torch.equal(finite, ~lse.isinf())
    assert (lse - expected[1])[finite].abs().max() < 0.2


@pytest.mark.parametrize("implementation", choices())
def test_eight_bits_of_codes_are_exact(implementation):
    """Scores whose operands are codes already and one key's weight of 1: nothing is lost."""
    T = 130
    q, k, v = torch.zeros(1, 1, T, 64), torch.zeros(1, 1, T, 64), torch.zeros(1, 1, T, 64)
    q[..., 0], q[..., 1] = 127.0, 0.0
    k[0, 0, 0, 0], k[0, 0, 1, 0] = 127.0, -127.0  # their mean is 0
    v[0, 0, 0] = torch.arange(64).remainder(8) - 3.5
    out, lse = block_sparse_attention(
        q, k, v, None, scaling=0.01, quantize="int8", implementation=implementation
    )
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out), atol=2e-6, rtol=0.0)
    torch.testing.assert_close(lse, torch.full((1, 1, T), 161.29), atol=1e-4, rtol=0.0)


def test_eight_bits_refuse_a_bound_of_the_scores():
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(UnsupportedError, match="eight-bit products under a bound"):
        block_sparse_attention(
            x, x, x, None, scaling=1.0, softcap=3.0, quantize="int8", implementation=REFERENCE
        )


@pytest.mark.parametrize("implementation", choices())
def test_later_tokens_change_nothing(implementation):
    generator, T, cut = torch.Generator().manual_seed(3), 150, 100
    inputs = [torch.randn(1, heads, T, 64, generator=generator) for heads in (2, 1, 1)]
    indices = [random_index(generator, 1, 2, T, 64, pooled) for pooled in (False, True)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, cut:] = 100.0
    for listed in (*indices, None):
        before, after = (
            block_sparse_attention(*x, listed, scaling=0.125, implementation=implementation)[0]
            for x in (inputs, changed)
        )
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


@pytest.mark.parametrize("implementation", choices())
def test_a_full_budget_equals_dense(implementation):
    generator, T = torch.Generator().manual_seed(4), 200
    inputs = [torch.randn(1, heads, T, 64, generator=generator) for heads in (2, 1, 1)]
    dense = oracle(*inputs, None, None, 0.125, None)
    for policy in (VerticalSlash(0, T), VerticalSlash(T, 0, 1)):
        index = policy.index(*inputs[:2], None, 0.125)
        out, lse = block_sparse_attention(
            *inputs, index, scaling=0.125, implementation=implementation
        )
        torch.testing.assert_close(out.double(), dense[0], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse.double(), dense[1], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("implementation", choices())
def test_a_padded_batch_equals_its_rows(implementation):
    generator, T, starts = torch.Generator().manual_seed(5), 150, [0, 60]
    inputs = [torch.randn(2, heads, T, 64, generator=generator) for heads in (2, 1, 1)]
    policy, rows = VerticalSlash(20, 64, 1), torch.tensor(starts)
    index = policy.index(*inputs[:2], rows, 0.125)
    out, lse = block_sparse_attention(
        *inputs, index, starts=rows, scaling=0.125, implementation=implementation
    )
    for b, start in enumerate(starts):
        alone = [x[b : b + 1, :, start:] for x in inputs]
        index = policy.index(*alone[:2], None, 0.125)
        single = block_sparse_attention(*alone, index, scaling=0.125, implementation=implementation)
        torch.testing.assert_close(out[b : b + 1, :, start:], single[0], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse[b : b + 1, :, start:], single[1], atol=2e-6, rtol=2e-6)
        assert not out[b, :, :start].any()
        assert (lse[b, :, :start] == -torch.inf).all()


def test_an_explicit_request_never_degrades(monkeypatch):
    x = torch.zeros(1, 1, 4, 16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match=r"'triton' for tensors on cpu.*Allowed: a CUDA"):
        block_sparse_attention(x, x, x, None, scaling=1.0, implementation=TRITON)
    with pytest.raises(ValueError, match="resolved before"):
        block_sparse_attention(x, x, x, None, scaling=1.0, implementation=Implementation.AUTO)


def test_what_triton_lacks_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"torch\.float64\. Allowed: float16, bfloat16"):
        block_sparse_attention(x, x, x, None, scaling=1.0, implementation=TRITON)
    x = torch.zeros(1, 1, 4, 512)
    with pytest.raises(UnsupportedError, match=r"head size 512\. Allowed: at most 256"):
        block_sparse_attention(x, x, x, None, scaling=1.0, implementation=TRITON)


def test_shapes_that_do_not_fit_are_refused():
    x, y = torch.zeros(1, 3, 4, 16), torch.zeros(1, 2, 4, 16)
    index = from_masks(torch.ones(1, 1, 1, 1, dtype=torch.bool), None, 64)
    wrong = replace(index, permutation=index.block_ids, segment_size=96)
    for arguments, message in [
        ((x, y, y, None), "H_kv"),
        ((x, x, x.half(), None), "share a dtype"),
        ((x, x, x, index), r"offsets must be \(1, 3, 2\)"),
        ((x, x[:, :, :3], x[:, :, :3], None), "T_q"),
        ((x[:, :1], x[:, :1], x[:, :1], wrong), "whole segments"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(*arguments, scaling=1.0, implementation=REFERENCE)
    with pytest.raises(ValueError, match="starts must be int64"):
        block_sparse_attention(
            x, x, x, None, starts=torch.zeros(2), scaling=1.0, implementation=REFERENCE
        )


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from squeeze.kernels.block_sparse_attention import triton as kernel

for arch, D, rows, listed, pooled, segment, to in json.loads(sys.argv[1]):
    options = kernel.launch_options(rows, triton.next_power_of_2(D), 2, arch, pooled, bool(to))
    constants = dict(
        H=32, GROUPS=4, D=D, SOFTCAP=0.0, LOG2_E=kernel.LOG2_E, HAS_STARTS=True, LISTED=listed,
        COLUMNS=listed, POOLED=pooled, SEGMENT=segment, RUN=8, UPCAST=False, BLOCK_M=rows,
        SMALL=bool(to), INT8=to == "int8", LIFT=8.0 if to else 0.0, INTERPRETED=False,
        BLOCK_N=options.pop("BLOCK_N"), BLOCK_D=triton.next_power_of_2(D), q_d=1, k_d=1, v_d=1,
    )
    types = dict(query="*bf16", keys="*bf16", values="*bf16", out="*bf16", lse="*fp32",
                 starts="*i64", scale="fp32")
    names, lists = kernel._attention.arg_names, ("block_offsets", "block_ids", "column_offsets",
                                                 "column_ids")
    averages = ("pooled_offsets", "pooled_ids", "pooled_keys", "pooled_values")
    for name in (*lists, *averages):
        if pooled or listed and name in lists:
            types[name] = "*bf16" if name in averages[2:] else "*i32"
        else:
            constants[name] = None
    codes = dict(key_codes="*i8" if to == "int8" else "*fp8e4nv", value_codes="*fp8e4nv",
                 key_scales="*fp32", key_means="*fp32", value_scales="*fp32")
    (types if to else constants).update(codes if to else dict.fromkeys(codes))
    (types if segment else constants)["permutation"] = "*i32" if segment else None
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n][0] == "*" or n[:2] in ("q_", "k_", "v_") and n not in constants}
    compiled = triton.compile(
        ASTSource(kernel._attention, signature, {(names.index(n),): v for n, v in
                                                 constants.items()}, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    stack = int(re.search(r"STACK:(\\d+)", text).group(1))
    print(json.dumps([arch, D, rows, stack, compiled.metadata.shared]))
"""
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}


def test_the_kernel_compiles_without_spills():
    pytest.importorskip("triton")
    cases = [
        (90, 128, 64, True, False, 0, None), (90, 128, 128, False, False, 0, None),
        (80, 128, 64, True, False, 0, None), (100, 128, 64, True, False, 0, None),
        (90, 128, 64, True, True, 0, None), (90, 128, 64, True, False, 256, None),
        (90, 128, 64, True, False, 0, "int8"), (89, 128, 64, True, False, 0, "float8"),
        (90, 128, 64, True, True, 0, "float8"),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(cases)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    for arch, _, _, stack, shared in results:
        assert stack == 0, results
        assert shared <= SHARED_BYTES[arch], results


@pytest.mark.parametrize(
    ("rows", "listed", "columns", "to"),
    [(128, False, False, "int8"), (64, True, True, None)],
)
def test_the_hopper_kernel_compiles(rows, listed, columns, to):
    pytest.importorskip("triton")
    program = Path(__file__).with_name("compile_block_sparse_attention.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(api.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, program, json.dumps([rows, listed, columns, to])],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stack"] == 0, found
    assert found["shared"] <= SHARED_BYTES[90] // (2 if rows == 64 else 1)
    assert found["products"] > 0
