"""A plan as text for people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squeeze.plan import Plan
    from squeeze.plan_cache import KVPlan
    from squeeze.plan_prefill import PrefillPlan


def fold(names: Iterable[str]) -> list[str]:
    """Write names that differ by a layer number once, with a star in its place."""
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def ranges(layers: list[int]) -> str:
    """Write layer numbers as ``0-3, 7``."""
    parts: list[str] = []
    for layer in sorted(layers):
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and int(last or first) == layer - 1:
            parts[-1] = f"{first}-{layer}"
        else:
            parts.append(str(layer))
    return ", ".join(parts)


def _spell(method: dict[str, Any]) -> str:
    parameters = ", ".join(f"{k} {_plain(v)}" for k, v in method.items() if k != "method")
    return f"{method['method']} ({parameters})" if parameters else method["method"]


def _without_heads(policy: dict[str, Any]) -> dict[str, Any]:
    """Leave budgets of single heads out: layers differ in nothing else."""
    given = {"heads": "each its own"} if policy.get("heads") else {}
    return {key: value for key, value in policy.items() if key != "heads"} | given


def _sides(row: KVPlan) -> str:
    """Spell out the formats of one layer's cache."""
    assert row.keys is not None and row.values is not None
    return f"keys {_spell(row.keys)}; values {_spell(row.values)}"


def _reads(row: PrefillPlan) -> str:
    """Spell out what one layer reads of a prompt, and how precisely."""
    text = _spell(_without_heads(row.policy)) if row.policy else "everything"
    least = f" from {row.quantize_min_length} tokens"
    return f"{text}, in {row.quantize}{least}" if row.quantize else text


def _cosines(plan: Plan) -> Iterable[str]:
    """Say what every layer's worst head keeps in eight bits, once calibration has measured it."""
    found = [
        f"{row.layer} {row.cosine:.5f}" + ("" if row.quantize else " (not taken)")
        for row in plan.prefill
        if row.cosine is not None
    ]
    if found:
        yield f"prefill in eight bits, least cosine of a head by layer: {', '.join(found)}"


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def lines(plan: Plan) -> Iterable[str]:
    """Lay a plan out as text, rows that repeat over layers folded into one."""
    yield (
        f"{plan.model} ({plan.model_type}, {plan.dtype}, {plan.device}): "
        f"statistics {', '.join(plan.statistics) or 'none'}"
    )
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for row in plan.weights:
        key = (
            re.sub(r"\.\d+\.", ".*.", row.module),
            _spell(row.method),
            row.implementation,
            f"{row.effective_bits:.3f}",
        )
        groups.setdefault(key, []).append((row.bytes_before, row.bytes_after))
    packed: dict[str, list[int]] = {}
    for kv in plan.kv_cache:
        if kv.keys and kv.values:
            packed.setdefault(_sides(kv), []).append(kv.layer)
    for kv in plan.kv_cache:
        if kv.keys and kv.values:
            bits = f"{(kv.key_bits + kv.value_bits) / 2:.3f}"
            text = _sides(kv)
            if len(packed) > 1:
                text = f"layers {ranges(packed[text])}: {text}"
            groups.setdefault(
                (re.sub(r"\.\d+\.", ".*.", kv.module) + " cache", text, kv.implementation, bits), []
            ).append((0, 0))
    for item in plan.prefill:
        if item.acts:
            groups.setdefault(
                (
                    re.sub(r"\.\d+\.", ".*.", item.module) + " prefill",
                    _reads(item),
                    item.implementation,
                    "",
                ),
                [],
            ).append((0, 0))
    for inputs in plan.activations:
        name = re.sub(r"\.\d+\.", ".*.", inputs.module) + " inputs"
        key = (name, _spell(inputs.method), inputs.implementation, "")
        groups.setdefault(key, []).append((0, 0))
    rows = [("module", "count", "method", "implementation", "bits", "before", "after")]
    for (module, method, implementation, bits), sizes in groups.items():
        before, after = (sum(s) for s in zip(*sizes, strict=True))
        rows.append(
            (
                module,
                str(len(sizes)),
                method,
                implementation,
                bits,
                size(before) if before else "",
                size(after) if after else "",
            )
        )
    if len(rows) > 1:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row_ in rows:
            yield "  ".join(cell.ljust(w) for cell, w in zip(row_, widths, strict=True)).rstrip()
    else:
        yield "nothing changes: the model stays dense"
    bits_ = plan.effective_bits
    yield (
        f"effective bits: weights {bits_['weights']:.3f}, keys {bits_['keys']:.3f}, "
        f"values {bits_['values']:.3f}"
    )
    yield (
        f"weights: {size(plan.weight_bytes['before'])} -> {size(plan.weight_bytes['after'])}; "
        f"KV cache at {plan.context} tokens x batch {plan.batch}: "
        f"{size(plan.kv_bytes['before'])} -> {size(plan.kv_bytes['after'])} "
        f"(constant tables {size(plan.kv_constant_bytes)})"
    )
    if plan.offload:
        bytes_ = plan.kv_bytes
        staged = 2 * bytes_["largest_layer"]
        yield (
            f"offload: {size(bytes_['packed'])} of it in CPU memory; the device holds "
            f"{size(bytes_['after'] - bytes_['packed'] + staged)}, two layers' blocks included"
        )
    if plan.allocation and not plan.allocation.chosen:
        yield (
            f"bound: keys and values take at most {plan.allocation.mean_bits:.3f} effective bits "
            f"on average; calibration chooses the formats of layers "
            f"{ranges(list(plan.allocation.layers))}, here they have the widest uniform choice"
        )
    weights = plan.weight_allocation
    if weights and not weights.chosen:
        yield (
            f"bound: weights take at most {weights.mean_bits:.3f} effective bits on average; "
            f"calibration chooses the methods of {len(weights.groups)} groups of modules, here "
            "they have the widest uniform choice"
        )
    yield from _cosines(plan)
    yield from _steps(plan)
    yield from (f"note: {note}" for note in plan.notes)


def _steps(plan: Plan) -> Iterable[str]:
    """Say which layers a recorded decode step fuses, why not the others, or why it is launched."""
    dense = [row.layer for row in plan.kv_cache if not row.keys]
    if plan.steps and (plan.offload or dense):
        reason = f"layers {ranges(dense)} keep their own cache"
        reason = "kv_cache.offload is on" if plan.offload else reason
        yield f"decode steps are not recorded: {reason}"
        return
    groups: dict[str, list[int]] = {}
    for row in plan.steps:
        groups.setdefault(row.reason, []).append(row.layer)
    for reason, layers in groups.items():
        how = f"as they are: {reason}" if reason else "fused"
        yield f"recorded decode steps: layers {ranges(layers)} run {how}"


def size(count: float) -> str:
    """Write bytes for people: ``31.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
