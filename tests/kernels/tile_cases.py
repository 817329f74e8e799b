"""What the tests of every format's tile functions share: calls with poisoned memory, and a budget.

A kernel rounds its operands to the model's dtype once more than the format did. The budget follows
from that: one rounding of every term of the dot products, in float64 from the decoded blocks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeeze.kernels.decode_attention import api
from squeeze.types import Implementation, PackedBlocks
from tests.kernels.test_decode_attention import Case, call, guarded, textbook

__all__ = ["Case", "check", "compiled", "interpreted"]

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter, without a GPU"
)


def blocks(format, x, counts):
    """Encode ``[N, B, H_kv, L, D]`` in two segments; what a row does not own is poison."""
    whole = format.encode(x, {})
    for tensor in whole.values():
        for row, count in enumerate(counts):
            tensor[count:, row] = float("nan") if tensor.is_floating_point() else 255
    cut = max(1, x.shape[0] - 1)
    parts = [{n: t[a:b].clone() for n, t in whole.items()} for a, b in ((0, cut), (cut, None))]
    filled = tuple(part for part in parts if len(next(iter(part.values()))))
    return PackedBlocks(format, getattr(format, "parameters", {}), filled, x.shape[-2])


def build(case, seed, device):
    """Make the arguments of one call; slots past the counts hold NaN."""
    torch.manual_seed(seed)
    make = lambda *shape: torch.randn(*shape).to(device)  # noqa: E731
    stored = (max(case.blocks), case.batch, case.kv_heads, case.length, case.size)
    dense = (case.batch, case.kv_heads, max(case.exact), case.size)
    queries = (case.batch, case.kv_heads * case.groups, case.steps, case.size)
    sides = [
        blocks(f, (3 * make(*stored)).to(case.dtype), case.blocks) for f in (case.keys, case.values)
    ]
    exact = [make(*dense).to(case.dtype) for _ in range(2)]
    for x in exact:
        for row, count in enumerate(case.exact):
            x[row, :, count:] = float("nan")
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    return [
        *(guarded(make(*queries).to(case.dtype)) for _ in range(2)),
        make(*queries[:3]) if case.shifted else None,
        *sides,
        ints(case.blocks),
        *(guarded(x) for x in exact),
        ints(case.exact),
    ]


def terms(arguments, case):
    """Largest sum of magnitudes of a score's terms, and largest stored value."""
    largest, query = [], arguments[1].double().abs()
    for side in arguments[3:5]:
        first = {name: x[:1] for name, x in side.segments[0].items()}
        largest.append(side.format.decode(first, {}).double().abs().nan_to_num(0))
    rows = query.amax((1, 2))[:, None, None, :, None]
    scores = (largest[0] @ rows).max() * case.size**-0.5
    return float(scores), float(largest[1].max())


def check(case, seed=0, device="cpu"):
    """Compare the kernel with float64 attention over the decoded blocks."""
    arguments = build(case, seed, device)
    got = call(arguments, case, Implementation.TRITON)
    own = call(arguments, case, Implementation.REFERENCE)
    truth = textbook(arguments, case)
    eps = torch.finfo(case.dtype).eps
    score, value = terms(arguments, case)
    score = eps * (score + float(truth[1].abs().max()))
    bands = (eps * value + 2 * score * value, score)
    for name, kernel, reference, oracle, band in zip(
        ("output", "lse"), got, own, truth, bands, strict=True
    ):
        assert not kernel.isnan().any(), name
        kernel, reference, oracle = (x.double().cpu() for x in (kernel, reference, oracle))
        error = (kernel - oracle).abs()
        budget = 2 * (reference - oracle).abs().max() + band
        where = int(error.argmax())
        text = f"{name}: max {error.max():.3e} mean {error.mean():.3e} at {where} seed {seed}, "
        assert error.max() <= budget, text + f"budget {budget:.3e}, {case}"


def compiled(*names):
    """Compile cases of ``compile_tiles.py`` and check that no thread spills in the inner loop."""
    script = Path(__file__).with_name("compile_tiles.py")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(api.__file__).parents[3])
    command = [sys.executable, str(script), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["case"] for result in results] == list(names)
    # Bytes of stack; 64 registers' worth would stand in the inner loop.
    assert all(result["stack"] < 256 for result in results), results
