"""The glue of a decode step: as the modules of transformers, and the kernels as near float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from squeeze.errors import DeviceError
from squeeze.kernels.step_glue.api import add_rms_norm, join_heads, rope_append, silu_mul
from squeeze.types import Implementation

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)
TRITON = Implementation.TRITON
# Rows, steps, query heads, key/value heads, head size, slots.
SHAPES = [(1, 1, 4, 1, 64, 40), (3, 2, 3, 3, 80, 17), (2, 3, 7, 1, 128, 33), (1, 5, 8, 2, 20, 9)]


def random(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def guarded(x):
    """Copy into a larger buffer of NaN, with unit channel stride."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 9), torch.nan, dtype=x.dtype)
    inside = buffer[..., 4:-5]
    inside.copy_(x)
    return inside


def layer_case(shape, dtype, seed=0, device="cpu"):
    """One product's queries, keys and values, angles, poisoned slots, counts and norms."""
    rows, steps, heads, kv_heads, size, slots = shape
    generator = torch.Generator().manual_seed(seed)
    joint = guarded(random(generator, rows, steps, (heads + 2 * kv_heads) * size, dtype=dtype))
    parts = joint.split([heads * size, kv_heads * size, kv_heads * size], -1)
    call = {
        **dict(zip(("query", "keys", "values"), parts, strict=True)),
        "cos": random(generator, 1, steps, size, dtype=dtype).expand(rows, -1, -1),
        "sin": random(generator, 1, steps, size, dtype=dtype).expand(rows, -1, -1),
        "exact_keys": torch.full((rows, kv_heads, slots, size), torch.nan, dtype=dtype),
        "exact_values": torch.full((rows, kv_heads, slots, size), torch.nan, dtype=dtype),
        "counts": torch.randint(steps, slots + 1, (rows,), generator=generator).int(),
    }
    call = {name: x.to(device) for name, x in call.items()}
    for name in ("query", "keys", "values"):
        call[name] = call[name].unflatten(-1, (-1, size))
    norms = [random(generator, size, dtype=dtype).to(device) for _ in range(2)]
    return call, {"query_norm": norms[0], "key_norm": norms[1], "eps": 1e-6}


def assert_near(actual, reference, oracle):
    """At most twice the reference's error to float64, plus one rounding of the output."""
    band = torch.finfo(reference.dtype).eps * oracle.abs().max()
    allowed = 2 * (reference.double() - oracle).abs().max() + band
    error = (actual.double() - oracle).abs().max()
    assert error <= allowed, f"{error} > {allowed}"


@torch.no_grad()
def wide(call, norms):
    """Give a case in float64, and what is stored of it as the formulas say."""
    x = {n: t.double() if t.is_floating_point() else t for n, t in call.items()}

    def normed(y, weight):
        return weight.double() * y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    if norms:
        x["query"] = normed(x["query"], norms["query_norm"])
        x["keys"] = normed(x["keys"], norms["key_norm"])
    heads = x["query"].transpose(1, 2), x["keys"].transpose(1, 2)
    query, keys = apply_rotary_pos_emb(*heads, x["cos"], x["sin"])
    return query, keys, x["values"].transpose(1, 2)


def stored(call, name):
    """The slots of a call's tokens ``[B, H_kv, T, D]``; all others must be as they were."""
    buffer, steps = call[name].clone(), call["query"].shape[1]
    ends = call["counts"].tolist()
    found = torch.stack([buffer[b, :, end - steps : end] for b, end in enumerate(ends)])
    for b, end in enumerate(ends):
        buffer[b, :, end - steps : end] = torch.nan
    assert buffer.isnan().all()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_rounds_as_the_modules_do(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = Qwen3RMSNorm(48, eps=1e-5)
    norm.weight.data = random(generator, 48, dtype=dtype)
    x, residual = (random(generator, 2, 3, 48, dtype=dtype) for _ in range(2))
    total, normed = add_rms_norm(x, norm.weight, 1e-5, residual=residual)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, norm(residual + x))
    assert add_rms_norm(x, norm.weight, 1e-5)[0] is x
    call, norms = layer_case(SHAPES[1], dtype)
    query = rope_append(**call, **norms)
    heads = []
    for name in ("query", "key"):
        norm = Qwen3RMSNorm(80, eps=1e-6)
        norm.weight.data = norms[f"{name}_norm"]
        heads.append(norm(call[name if name == "query" else "keys"]).transpose(1, 2))
    expected = apply_rotary_pos_emb(*heads, call["cos"], call["sin"])
    assert torch.equal(query, expected[0]) and query.is_contiguous()
    assert torch.equal(stored(call, "exact_keys"), expected[1])
    assert torch.equal(stored(call, "exact_values"), call["values"].transpose(1, 2))
    gate, up = x, residual
    assert torch.equal(silu_mul(gate, up), torch.nn.functional.silu(gate) * up)
    output = random(generator, 2, 3, 4, 8)
    assert torch.equal(
        join_heads(output, dtype), output.to(dtype).transpose(1, 2).reshape(2, 4, 24)
    )
    single = output[:, :, :1].to(dtype).contiguous()
    joined = join_heads(single, dtype)  # nothing to round or to move
    assert torch.equal(joined, single.reshape(2, 1, 24)) and joined.data_ptr() == single.data_ptr()


def check_norm(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(shape[-1])
    x, residual = (random(generator, *shape, dtype=dtype, scale=3).to(device) for _ in range(2))
    weight = random(generator, shape[-1], dtype=dtype).to(device)
    for added in (residual, None):
        total, normed = add_rms_norm(x, weight, 1e-5, residual=added, implementation=TRITON)
        _, reference = add_rms_norm(x, weight, 1e-5, residual=added)
        oracle = (x if added is None else x + added).double()
        assert torch.equal(total.double(), oracle)
        oracle = weight.double() * oracle / (oracle.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_near(normed, reference, oracle)


def check_rope(shape, dtype, normalised, device="cpu"):
    call, norms = layer_case(shape, dtype, device=device)
    norms = norms if normalised else {}
    oracle = wide(call, norms)
    results = []
    for implementation in (Implementation.REFERENCE, TRITON):
        for name in ("exact_keys", "exact_values"):
            call[name].fill_(torch.nan)
        query = rope_append(**call, **norms, implementation=implementation)
        results.append((query, stored(call, "exact_keys"), stored(call, "exact_values")))
    for reference, actual, exact in zip(*results, oracle, strict=True):
        assert_near(actual, reference, exact)


def check_rest(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    both = guarded(random(generator, 2, 3, 2 * 517, dtype=dtype, scale=4)).to(device)
    gate, up = both.split(517, -1)
    oracle = torch.nn.functional.silu(gate.double()) * up.double()
    assert_near(silu_mul(gate, up, implementation=TRITON), silu_mul(gate, up), oracle)
    output = random(generator, 2, 3, 4, 20).to(device)
    actual = join_heads(output, dtype, implementation=TRITON)
    assert_near(actual, join_heads(output, dtype), output.transpose(1, 2).flatten(2).double())


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 80), (5, 1, 1000)])
def test_the_norm_is_as_near_float64_as_the_reference(shape, dtype):
    check_norm(shape, dtype)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_as_near_float64_and_stores_in_its_slots_alone(shape, normalised, dtype):
    check_rope(shape, dtype, normalised)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gate_and_the_heads_are_as_near_float64_as_the_reference(dtype):
    check_rest(dtype)


@needs_interpreter
def test_slots_outside_of_the_buffer_are_not_written():
    call, _ = layer_case((2, 2, 2, 1, 16, 8), torch.float32)
    call["counts"] = torch.tensor([1, 9], dtype=torch.int32)
    rope_append(**call, implementation=TRITON)
    written = call["exact_keys"].isfinite().all(-1).squeeze(1)
    assert written.tolist() == [[True] + 7 * [False], 7 * [False] + [True]]


def test_a_row_is_as_it_is_alone():
    call, norms = layer_case((3, 2, 3, 3, 80, 17), torch.float32)
    together = rope_append(**call, **norms)
    for row in range(3):
        one = {name: x[row : row + 1].clone() for name, x in call.items()}
        assert torch.equal(rope_append(**one, **norms)[0], together[row])


def test_kernels_compile_and_keep_everything_in_registers():
    script = Path(__file__).with_name("compile_step_glue.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for facts in json.loads(done.stdout.splitlines()[-1]):
        assert facts["stack"] == 0 and facts["registers"] <= 64, facts
        assert facts["overlaps"] == (facts["capability"] >= 90), facts


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 8)
    with pytest.raises(DeviceError, match=r"step_glue.*device cpu.*CUDA device.*reference"):
        silu_mul(x, x, implementation=TRITON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.randn(1, 1, 2, 64)}, "keys is"),
        ({"cos": torch.randn(1, 1, 32)}, "cos is"),
        ({"sin": torch.randn(1, 1, 64).half()}, "sin is torch.float16"),
        ({"counts": torch.zeros(1).long()}, r"counts torch\.int64"),
        ({"values": torch.randn(1, 1, 1, 128)[..., ::2]}, "adjacent"),
        ({"query_norm": torch.randn(3)}, "norm"),
        ({"implementation": Implementation.AUTO}, "while planning"),
    ],
)
def test_a_call_that_contradicts_itself_is_refused(change, message):
    call, _ = layer_case(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match=message):
        rope_append(**(call | change))


@pytest.mark.parametrize("residual", [torch.randn(2, 7), torch.randn(2, 8).half()])
def test_what_does_not_fit_a_norm_is_refused(residual):
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, weight, 1e-5, residual=residual)
    with pytest.raises(ValueError, match="weight"):
        add_rms_norm(x, weight.half(), 1e-5)
    with pytest.raises(ValueError, match="gate"):
        silu_mul(x, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_on_a_gpu(dtype):
    for shape in ((1, 1, 4096), (8, 1, 5120), (2, 3, 80)):
        check_norm(shape, dtype, "cuda")
    for shape in (*SHAPES, (8, 1, 32, 8, 128, 272)):
        for normalised in (False, True):
            check_rope(shape, dtype, normalised, "cuda")
    check_rest(dtype, "cuda")


@pytest.mark.gpu
def test_kernels_in_a_chain_wait_for_one_another():
    x = torch.randn(1, 1, 4096, dtype=torch.bfloat16, device="cuda")
    weight = torch.rand(4096, dtype=torch.bfloat16, device="cuda") * 0.1 + 0.9

    def chain(implementation):
        hidden, normed = x, x
        for _ in range(40):
            hidden, normed = add_rms_norm(
                normed, weight, 1e-5, residual=hidden, implementation=implementation
            )
            normed = silu_mul(normed, normed, implementation=implementation)
        return hidden

    chain(TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(TRITON)
    first = []
    for _ in range(20):
        graph.replay()
        first.append(found.clone())
    assert all(torch.equal(first[0], other) for other in first[1:])
    expected = chain(Implementation.REFERENCE).float()
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()
