import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from squeeze.errors import DeviceError, UnsupportedError
from squeeze.kernels.decode_attention import api
from squeeze.quant.kv._raw import RawBlocks
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.float8 import Float8
from squeeze.quant.kv.graded import Graded
from squeeze.types import Implementation, PackedBlocks

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter, without a GPU"
)
HAS_TRITON = importlib.util.find_spec("triton") is not None
BOTH = [Implementation.REFERENCE, pytest.param(Implementation.TRITON, marks=interpreted)]
KEYS4 = Affine(4, "channel", 64)
VALUES4 = Affine(4, "token", 32)


@dataclass(frozen=True)
class Case:
    """One call: formats, shape, and which options are on."""

    keys: object
    values: object
    length: int = 64
    batch: int = 2
    kv_heads: int = 2
    groups: int = 3
    steps: int = 1
    size: int = 64
    blocks: tuple = (3, 1)
    exact: tuple = (21, 5)
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    shifted: bool = False


def guarded(x):
    """Copy ``x`` into the middle of a NaN buffer: non-contiguous, and overruns are visible."""
    shape = [x.shape[0], x.shape[1], x.shape[2] + 3, x.shape[3] + 16]
    buffer = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[:, :, 1 : 1 + x.shape[2], 8 : 8 + x.shape[3]]
    view.copy_(x)
    return view


def packed(format, x, segments=2):
    """Encode ``[N, B, H_kv, L, D]`` into separate segments, the last of them one slot."""
    whole = format.encode(x, {})
    cut = max(1, x.shape[0] - 1) if segments == 2 else x.shape[0]
    parts = [{n: t[:cut].clone() for n, t in whole.items()}]
    if cut < x.shape[0]:
        parts.append({n: t[cut:].clone() for n, t in whole.items()})
    return PackedBlocks(format, {}, tuple(parts), x.shape[-2])


def addresses(blocks):
    """Tabulate where the blocks are, as a cache does."""
    return {
        name: torch.tensor(
            [x[i].data_ptr() for s in blocks.segments for x in [s[name]] for i in range(len(x))],
            device=blocks.segments[0][name].device,
        )
        for name in blocks.segments[0]
    }


def poison(blocks, counts):
    """Overwrite what a row does not own: its codes with ones, its floats with NaN."""
    for row, count in enumerate(counts):
        first = 0
        for segment in blocks.segments:
            size = next(iter(segment.values())).shape[0]
            for x in segment.values():
                x[max(count - first, 0) :, row] = (
                    float("nan") if x.is_floating_point() else 2 ** (8 * x.element_size() - 1) - 1
                )
            first += size


def build(case, seed=0, device="cpu"):
    """Make the arguments of one call; what lies past the counts is NaN."""
    torch.manual_seed(seed)
    n = max(case.blocks)
    stored = (n, case.batch, case.kv_heads, case.length, case.size)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float32).to(case.dtype).to(device)  # noqa: E731
    sides = [None, None]
    if n:
        sides = [packed(f, make(*stored)) for f in (case.keys, case.values)]
        for side in sides:
            poison(side, case.blocks)
    heads = case.kv_heads * case.groups
    queries = [guarded(make(case.batch, heads, case.steps, case.size)) for _ in range(2)]
    exact = [make(case.batch, case.kv_heads, max(case.exact), case.size) for _ in range(2)]
    for x in exact:
        for row, count in enumerate(case.exact):
            x[row, :, max(count, 0) :] = float("nan")
    shift = torch.randn(case.batch, heads, case.steps) if case.shifted else None
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    counts = [ints(case.blocks), ints(case.exact)]
    shift = None if shift is None else shift.to(device)
    exact = [guarded(x) for x in exact]
    return [*queries, shift, *sides, counts[0], *exact, counts[1]]


def call(arguments, case, implementation, **options):
    return api.decode_attention(
        *arguments,
        scaling=case.size**-0.5,
        softcap=case.softcap,
        implementation=implementation,
        **options,
    )


def wide(arguments):
    """The same call with every dense float in float64."""
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def textbook(arguments, case):
    """Attention one query at a time over concatenated dense keys, float64."""
    query, stored, shift, keys, values, blocks, exact_keys, exact_values, counts = wide(arguments)
    dense = [
        torch.cat([s.format.decode(p, {}) for p in s.segments]).double() if s else None
        for s in (keys, values)
    ]
    output, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf).double()
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                kv, end = h // case.groups, max(int(counts[b]) - (case.steps - 1 - i), 0)
                scores, v = exact_keys[b, kv, :end] @ query[b, h, i], exact_values[b, kv, :end]
                if keys is not None:
                    k, pv = (x[: blocks[b], b, kv].reshape(-1, case.size) for x in dense)
                    added = 0.0 if shift is None else shift[b, h, i]
                    scores = torch.cat([scores, k @ stored[b, h, i] + added])
                    v = torch.cat([v, pv])
                scores = scores * case.size**-0.5
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                if len(scores):
                    output[b, h, i] = scores.softmax(0) @ v
                    lse[b, h, i] = scores.logsumexp(0)
    return output, lse


REFERENCE_CASES = [
    Case(KEYS4, VALUES4),
    Case(KEYS4, VALUES4, steps=3, softcap=3.0, shifted=True),
    Case(KEYS4, VALUES4, blocks=(0, 0), exact=(5, 2), steps=4),
    Case(KEYS4, VALUES4, blocks=(2, 0), exact=(4, 1), steps=2, groups=1),
]


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_reference_is_softmax_attention_over_decoded_blocks(case):
    arguments = build(case)
    oracle, oracle_lse = textbook(arguments, case)
    output, lse = call(arguments, case, Implementation.REFERENCE)
    assert output.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), oracle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", BOTH)
def test_parts_add_up_to_the_output(implementation):
    case = Case(KEYS4, VALUES4, steps=2, shifted=True)
    arguments = build(case)
    whole, lse = call(arguments, case, implementation)
    first, second, same = call(arguments, case, implementation, split_output=True)
    torch.testing.assert_close(first + second, whole)
    assert torch.equal(lse, same)
    blind = list(arguments)
    blind[7] = torch.zeros_like(arguments[7])
    alone, _ = call(blind, case, implementation)
    torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", BOTH)
def test_outputs_are_rounded_once(implementation):
    case = Case(KEYS4, VALUES4, steps=2)
    arguments = build(case)
    whole, lse = call(arguments, case, implementation)
    rounded, same = call(arguments, case, implementation, output_dtype=torch.float16)
    assert torch.equal(rounded, whole.half()) and torch.equal(same, lse)


@pytest.mark.parametrize("implementation", BOTH)
def test_query_before_the_first_token_gets_zero(implementation):
    case = Case(KEYS4, VALUES4, steps=4, blocks=(1, 0), exact=(6, 2))
    output, lse = call(build(case), case, implementation)
    assert torch.equal(output[1, :, :2], torch.zeros_like(output[1, :, :2]))
    assert lse[1, :, :2].eq(-torch.inf).all()
    assert output.isfinite().all()
    assert lse[0].isfinite().all()
    assert lse[1, :, 2:].isfinite().all()


def magnitude(blocks, count):
    """Largest ``|code * scale| + |zero|`` of the stored values: the terms a kernel adds up."""
    if blocks is None or "scale" not in blocks.segments[0]:
        return 0.0
    if blocks.format.info.name in ("float8", "graded"):
        return float(blocks.format.decode(blocks.segments[0], {})[:count, :1].abs().max())
    first = {name: x[:count, :1].float() for name, x in blocks.segments[0].items()}
    levels = 2**blocks.format.bits - 1
    zero = first.get("zero", torch.zeros(()))
    return float((levels * first["scale"]).abs().max() + zero.abs().max())


def within_budget(output, lse, arguments, case, band_dtype):
    """Allow twice the reference's error to float64 plus one rounding of the operands' dtype.

    Scales and zeros stay outside the products, so the numbers that are rounded are the terms
    ``code * scale`` and ``zero``, which may be larger than what they add up to; rounding errors of
    a dot product add like a random walk, hence the norm of the query.
    """
    oracle, oracle_lse = textbook(arguments, case)
    reference, reference_lse = call(arguments, case, Implementation.REFERENCE)
    eps = torch.finfo(band_dtype).eps
    norm = arguments[1].double().norm(dim=-1).max() * case.size**-0.5
    score_band = eps * (
        norm * magnitude(arguments[3], 1) + oracle_lse[oracle_lse.isfinite()].abs().max()
    )
    largest = max(float(oracle.abs().max()), magnitude(arguments[4], 1))
    bands = {"output": eps * largest + 2 * score_band * oracle.abs().max(), "lse": score_band}
    for name, got, own, truth in (
        ("output", output, reference, oracle),
        ("lse", lse, reference_lse, oracle_lse),
    ):
        got, own, truth = (x.double().cpu() for x in (got, own, truth))
        seen = oracle_lse.isfinite().cpu()
        assert not got.isnan().any()
        error = (got - truth)[seen].abs()
        budget = 2 * (own - truth)[seen].abs().max() + bands[name]
        where = int(error.argmax())
        message = f"{name}: max {error.max():.3e} mean {error.mean():.3e} at {where}, "
        assert error.max() <= budget, message + f"budget {budget:.3e}, {case}"


KERNEL_CASES = [
    Case(Affine(4, "channel", 64), Affine(4, "token", 64)),
    Case(Affine(4, "channel", 32), Affine(4, "token", 32), length=128, groups=7, kv_heads=1),
    Case(Affine(2, "channel", 64), Affine(2, "token", 16), length=128, groups=1, shifted=True),
    Case(Affine(3, "channel", 32), Affine(3, "token", 64), length=32, groups=4, softcap=2.0),
    Case(Affine(8, "channel", 128), Affine(8, "token", 40), length=128, size=80),
    Case(Affine(2, "token", 128), Affine(8, "channel", 32), size=128, kv_heads=1, steps=2),
    Case(Affine(4, "token", 16), Affine(3, "channel", 32), size=80, kv_heads=1, steps=7),
    Case(Affine(8, "token", 64, True), Affine(2, "token", 32, True), steps=13, shifted=True),
    Case(Affine(3, "channel", 64, True), RawBlocks(), groups=4, steps=2),
    Case(RawBlocks(), Affine(4, "channel", 64, True), size=80, kv_heads=3, groups=1),
    Case(KEYS4, VALUES4, steps=40, exact=(67, 40), kv_heads=1),
    Case(KEYS4, VALUES4, blocks=(0, 0), exact=(9, 3), steps=5),
    Case(KEYS4, VALUES4, blocks=(9, 4), exact=(1, 1), kv_heads=1),
]


@interpreted
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_matches_float64(case):
    arguments = build(case, seed=KERNEL_CASES.index(case))
    output, lse = call(arguments, case, Implementation.TRITON)
    within_budget(output, lse, arguments, case, torch.float32)


@interpreted
def test_kernel_in_half_precision():
    case = Case(KEYS4, VALUES4, dtype=torch.float16, steps=2, shifted=True)
    arguments = build(case)
    output, lse = call(arguments, case, Implementation.TRITON)
    within_budget(output, lse, arguments, case, torch.float16)


COMPILED = [
    ("tiny:80", "tiny:90", "merge:80", "merge:90"),
    ("streamed_four:90", "streamed_two:80"),
    pytest.param(
        ("streamed_wide:90", "streamed_two:90", "streamed_eight:90"), marks=pytest.mark.slow
    ),
    pytest.param(("short:100", "default:80", "default:90", "default:100"), marks=pytest.mark.slow),
    pytest.param(
        ("wide:90", "two:90", "three:90", "eight:90", "swapped:90", "raw:90"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("names", COMPILED)
def test_kernel_compiles_without_a_gpu(names):
    script = Path(__file__).with_name("compile_decode_attention.py")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(api.__file__).parents[3])
    command = [sys.executable, str(script), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f"{result['case']}:{result['capability']}" for result in results] == list(names)
    # Bytes spilled by a thread; 64 registers' worth would stand in the inner loop.
    assert all(result["stack"] < 256 for result in results), results


def test_choice_of_implementation_is_explicit(monkeypatch):
    case = Case(KEYS4, VALUES4)
    arguments = build(case)
    with pytest.raises(ValueError, match="auto"):
        call(arguments, case, Implementation.AUTO)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DeviceError, match=r"device cpu.*CUDA device.*implementation: reference"):
        call(arguments, case, Implementation.TRITON)


def test_format_without_tile_functions_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    stranger = SimpleNamespace(info=SimpleNamespace(name="stranger"))
    with pytest.raises(UnsupportedError, match=r"'stranger'.*tiles"):
        api.require_triton(torch.device("cpu"), stranger)
    assert api.has_tiles("affine")
    assert api.has_tiles("raw")
    assert not api.has_tiles("stranger")


def test_contradicting_shapes_are_refused():
    case = Case(KEYS4, VALUES4)
    arguments = build(case)
    with pytest.raises(ValueError, match="packed_query"):
        call([arguments[0], arguments[1][..., :32], *arguments[2:]], case, Implementation.REFERENCE)
    with pytest.raises(ValueError, match="together"):
        call([*arguments[:4], None, *arguments[5:]], case, Implementation.REFERENCE)
    other = build(Case(KEYS4, VALUES4, blocks=(5, 5)))
    with pytest.raises(ValueError, match="blocks of 64"):
        call([*arguments[:4], other[4], *arguments[5:]], case, Implementation.REFERENCE)


def test_importing_the_api_loads_no_kernel():
    code = (
        "import sys, squeeze.kernels.decode_attention.api;"
        "assert not any(n.startswith('squeeze') and 'triton' in n for n in sys.modules);"
        "assert 'squeeze.kernels.decode_attention.tiles.affine' not in sys.modules"
    )
    root = str(Path(api.__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("implementation", BOTH)
def test_max_blocks_bounds_what_is_read(implementation):
    case = Case(KEYS4, VALUES4, blocks=(1, 1))
    arguments = build(Case(KEYS4, VALUES4, blocks=(3, 1)))
    arguments[5] = torch.tensor([1, 1], dtype=torch.int32)
    bounded, _ = call(arguments, case, implementation, max_blocks=1)
    whole, _ = call(arguments, case, implementation)
    torch.testing.assert_close(bounded, whole)


GPU_CASES = [
    Case(k, v, length=length, size=size, groups=groups, steps=steps, dtype=torch.bfloat16,
         blocks=(11, 4), exact=(130, 64), shifted=bool(groups % 2))
    for k, v, length, size in (
        (Affine(4, "channel", 64), Affine(4, "token", 64), 128, 128),
        (Affine(4, "channel", 128), Affine(4, "token", 128), 128, 128),
        (Affine(2, "channel", 32), Affine(2, "token", 64), 64, 64),
        (Affine(3, "token", 40), Affine(3, "channel", 128), 128, 80),
        (Affine(8, "channel", 64), Affine(8, "token", 32, True), 128, 128),
        (RawBlocks(), Affine(4, "token", 64), 64, 128),
        (Affine(4, "channel", 64), RawBlocks(), 64, 128),
    )
    for groups, steps in ((1, 1), (4, 1), (7, 1), (3, 16))
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=range(len(GPU_CASES)))
def test_kernel_on_the_gpu_matches_float64(case):
    arguments = build(case, seed=GPU_CASES.index(case), device="cuda")
    output, lse = call(arguments, case, Implementation.TRITON)
    within_budget(output, lse, arguments, case, torch.bfloat16)


STREAMED_CASES = [
    Case(k, v, length=length, size=size, groups=groups, steps=steps, dtype=torch.bfloat16,
         blocks=(11, 4), exact=(130, 64), shifted=bool(groups % 2),
         softcap=3.0 if groups == 8 else None)
    for k, v, length, size in (
        (Affine(4, "channel", 64), Affine(4, "token", 64), 128, 128),
        (Affine(4, "channel", 128), Affine(4, "token", 128, True), 128, 128),
        (Affine(2, "channel", 64), Affine(2, "token", 64), 128, 64),
        (Affine(8, "channel", 64, True), Affine(8, "token", 128), 128, 128),
        (Affine(8, "token", 64), Affine(2, "token", 32), 128, 64),
        (Affine(4, "token", 256), Affine(4, "token", 128), 64, 256),
        (Affine(2, "channel", 128), Affine(4, "token", 64), 256, 64),
        (Float8(), Float8(), 128, 128),
        (Graded((4, 0)), Affine(2, "token", 64), 128, 128),
        (Graded((4, 0)), Affine(4, "token", 64), 128, 64),
    )
    for groups, steps in ((1, 1), (3, 2), (4, 1), (7, 1), (8, 2))
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", STREAMED_CASES, ids=range(len(STREAMED_CASES)))
def test_streaming_kernel_matches_float64(case):
    from squeeze.kernels.decode_attention import streamed

    arguments = build(case, seed=STREAMED_CASES.index(case), device="cuda")
    assert streamed.takes(arguments[1], arguments[6:8], arguments[3], arguments[4])
    output, lse = call(arguments, case, Implementation.TRITON)
    within_budget(output, lse, arguments, case, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 2])
def test_every_launch_setting_matches_float64(bits, monkeypatch):
    from squeeze.kernels.decode_attention import streamed, tuning

    formats = Affine(bits, "channel", 64), Affine(bits, "token", 64)
    first = Case(*formats, length=128, size=128, groups=4, blocks=(11, 4), dtype=torch.bfloat16)
    portable = replace(first, keys=Affine(bits, "channel", 32))
    for case, settings in ((first, streamed.SETTINGS), (portable, tuning.candidates(2, 8))):
        arguments = build(case, device="cuda")
        for setting in settings:
            monkeypatch.setattr(tuning, "choose", lambda *_, setting=setting: setting)
            output, lse = call(arguments, case, Implementation.TRITON)
            within_budget(output, lse, arguments, case, torch.bfloat16)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_settings_are_timed_once_and_only_for_long_calls(monkeypatch):
    from squeeze.kernels.decode_attention import tuning

    listed = tuning.candidates(1, 8)
    assert tuning.default(1, 8) == listed[0]
    assert 1 < len(listed) <= 12
    timed = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_time", lambda call, option: timed.append(option) or -len(timed))
    long = tuning.WORTH_TUNING
    assert tuning.choose("kind", listed, long - 1, None) == listed[0]
    assert not timed
    assert tuning.choose("kind", listed, long, None) == listed[-1]
    assert tuning.choose("kind", listed, long, None) == listed[-1]
    assert timed == listed


@pytest.mark.gpu
def test_launch_needs_no_synchronisation():
    case = GPU_CASES[0]
    arguments = build(case, device="cuda")
    for side in (3, 4):
        arguments[side] = replace(arguments[side], addresses=addresses(arguments[side]))
    eager = call(arguments, case, Implementation.TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(arguments, case, Implementation.TRITON)
    graph.replay()
    assert torch.equal(captured[0], eager[0])
    assert torch.equal(captured[1], eager[1])
