"""Which norm or linear layer makes the inputs of a linear layer, and who else reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Any)

# Norms that multiply by their weight, followed by nothing but these; the gate times ``up_proj``.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def readers(producer: str) -> list[str]:
    """Name the modules that read what ``producer`` makes."""
    found = next(name for name in READERS if producer.endswith(f".{name}"))
    layer = producer.removesuffix(found)
    return [f"{layer}{name}" for name in READERS[found]]


def producer_of(module: str) -> str:
    """Name the module whose outputs ``module`` reads, or ``""`` where nothing can be scaled."""
    for producer, names in READERS.items():
        for name in names:
            if module.endswith(f".{name}"):
                return module.removesuffix(name) + producer
    return ""


def with_producers(rows: Iterable[Row], scaling: Sequence[str], model_type: str) -> tuple[Row, ...]:
    """Give rows whose inputs are scaled the module that takes the inverse scales.

    Those whose neighbours are packed otherwise, from the same inputs, keep the scales themselves.

    Args:
        rows: ``WeightPlan`` of every packed module.
        scaling: Modules whose method scales their inputs.
        model_type: Of the model.
    """
    rows = tuple(rows)
    if model_type not in FAMILIES:
        return rows
    methods = {row.module: row.method for row in rows}
    result = []
    for row in rows:
        producer = producer_of(row.module) if row.module in scaling else ""
        neighbours = readers(producer) if producer else []
        if producer and all(methods.get(name, row.method) == row.method for name in neighbours):
            row = replace(row, producer=producer)
        result.append(row)
    return tuple(result)
