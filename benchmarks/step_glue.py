"""What stands between the products and the attention of a decode step, beside transformers' own.

Shapes of an 8B Llama: hidden 4096, 32 query and 8 key/value heads of 128, intermediate 14336, one
token per row, bfloat16. The calls of a measurement replay as one CUDA graph, so what is measured is
the time on the GPU, of which most is that between two kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.sparse_gemv import REPLAYS, _median_us
from squeeze.kernels.step_glue.api import add_rms_norm, join_heads, rope_append, silu_mul
from squeeze.types import Implementation

OP = "step_glue"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE, SLOTS = 4096, 32, 8, 128, 14336, 272
ROWS = (1, 8, 32)
CALLS = 40


def run(device: str | torch.device, repeats: int = REPLAYS) -> Iterator[dict[str, Any]]:
    """Time every function and the modules it stands for; a CPU runs the reference on one row.

    Yields:
        One dictionary per case: op, function, rows, implementation, median_us, baseline, speedup.
    """
    place = torch.device(device)
    small = place.type == "cpu"
    ours = Implementation.REFERENCE if small else Implementation.TRITON
    for rows in (1,) if small else ROWS:
        for name, (theirs, own) in _cases(rows, place, ours).items():
            facts = {"op": OP, "function": name, "rows": rows, "dtype": "bfloat16"}
            baseline = _median_us([theirs] * CALLS, place, repeats)
            found = _median_us([own] * CALLS, place, repeats)
            yield facts | {
                "implementation": "transformers", "median_us": baseline, "baseline": True,
                "speedup": 1.0,
            }  # fmt: skip
            yield facts | {
                "implementation": ours.value, "median_us": found, "baseline": False,
                "speedup": baseline / found,
            }  # fmt: skip


def _cases(
    rows: int, device: torch.device, how: Implementation
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Bind every function beside what it replaces."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, residual = random(rows, 1, HIDDEN), random(rows, 1, HIDDEN)
    norm = LlamaRMSNorm(HIDDEN).to(device, torch.bfloat16).requires_grad_(False)
    sizes = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    joint = random(rows, 1, sum(sizes)).split(sizes, -1)
    query, keys, values = (part.unflatten(-1, (-1, HEAD_DIM)) for part in joint)
    cos, sin = random(1, 1, HEAD_DIM), random(1, 1, HEAD_DIM)
    slots = random(rows, KV_HEADS, SLOTS, HEAD_DIM), random(rows, KV_HEADS, SLOTS, HEAD_DIM)
    counts = torch.full((rows,), 200, dtype=torch.int32, device=device)
    gate, up = random(rows, 1, 2 * WIDE).split(WIDE, -1)
    output = torch.randn(rows, HEADS, 1, HEAD_DIM, device=device)

    def append() -> None:
        heads = [part.transpose(1, 2) for part in (query, keys, values)]
        _, turned = apply_rotary_pos_emb(heads[0], heads[1], cos, sin)
        place = counts.long().view(-1, 1) - 1 + torch.arange(1, device=device)
        index = place[:, None, :, None].expand_as(turned)
        slots[0].scatter_(2, index, turned)
        slots[1].scatter_(2, index, heads[2])

    return {
        "add_rms_norm": (
            lambda: norm(residual + x),
            lambda: add_rms_norm(x, norm.weight, 1e-6, residual=residual, implementation=how),
        ),
        "rope_append": (
            append,
            lambda: rope_append(query, keys, values, cos, sin, *slots, counts, implementation=how),
        ),
        "silu_mul": (
            lambda: torch.nn.functional.silu(gate) * up,
            lambda: silu_mul(gate, up, implementation=how),
        ),
        "join_heads": (
            lambda: output.to(torch.bfloat16).transpose(1, 2).contiguous(),
            lambda: join_heads(output, torch.bfloat16, implementation=how),
        ),
    }
