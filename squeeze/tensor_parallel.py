"""Squeezed models under transformers' tensor parallelism: every process holds a part of each layer.

transformers' plan (``tp_plan="auto"``) says of which linear layers a process holds a run of rows
and of which a run of columns; those that are packed are cut alike. Where the keys' projection is
cut by rows, a process has whole heads: its cache holds these, and its fitted tables are theirs.

Source: M. Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3 (a run
of columns follows a run of rows, with one sum over processes for both).
Differs: parts are cut from packed weights, so that what they stand for does not change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from squeeze.attention import LayerState
from squeeze.errors import UnsupportedError
from squeeze.experts import PackedExperts
from squeeze.linear import PackedLinear
from squeeze.plan import Plan, build_method
from squeeze.types import PackedWeight
from squeeze.weight_shards import columns_of, refuse_columns, rows_of

# Styles of transformers' plans for linear layers: whether rows are cut, and whether the output, or
# the input, of the whole layer is what its neighbours know.
STYLES = {
    "colwise": (True, False),
    "colwise_gather_output": (True, True),
    "colwise_rep": (True, True),
    "rowwise": (False, False),
    "rowwise_split_input": (False, True),
    "rowwise_rep": (False, True),
}
WHOLE = (None, "replicate")
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
REMEDY = "Start another number of processes, or load the model whole"


@dataclass(frozen=True)
class Processes:
    """The processes that share a model.

    Attributes:
        rank: Of this one.
        size: How many there are.
        group: Through which they talk.
    """

    rank: int
    size: int
    group: Any

    def share(self, count: int) -> slice:
        """Return the run of ``count`` heads, rows or columns that is this process's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


@dataclass(frozen=True)
class Part:
    """What one linear layer of a process computes of the whole layer.

    Attributes:
        processes: Among which the layer is cut.
        by_rows: Rows are cut, and outputs are parts; else columns are, and outputs are summands.
        whole: The layer gives, or takes, all features.
    """

    processes: Processes
    by_rows: bool
    whole: bool

    def cut(self, weight: PackedWeight) -> PackedWeight:
        """Cut this process's part out of a weight."""
        cutter = rows_of if self.by_rows else columns_of
        return cutter(weight, self.processes.rank, self.processes.size)

    def cut_bias(self, bias: Tensor | None) -> Tensor | None:
        """Cut this process's part out of a bias, whole or cut already."""
        if isinstance(bias, DTensor):
            return bias.to_local().detach()
        if bias is None or not self.by_rows:
            return bias
        return bias.detach()[self.processes.share(len(bias))].clone()

    def __call__(self, linear: PackedLinear, x: Tensor) -> Tensor:
        """Compute the layer's output together with the other processes."""
        group = self.processes.group
        if self.by_rows:
            y = linear.product(x, linear.bias)
            if not self.whole:
                return y
            parts = [torch.empty_like(y) for _ in range(self.processes.size)]
            distributed.all_gather(parts, y.detach().contiguous(), group=group)
            return torch.cat(parts, -1)
        if self.whole:
            x = x[..., self.processes.share(x.shape[-1])]
        y = linear.product(x, None).contiguous()
        distributed.all_reduce(y.detach(), group=group)
        return y if linear.bias is None else y + linear.bias


def processes_of(model: Any) -> Processes | None:
    """Return the processes that share a model, ``None`` if it is whole."""
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return None
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return Processes(mesh.get_local_rank(), size, mesh.get_group())


def require_whole(model: Any, place: str, remedy: str) -> None:
    """Refuse a model of which this process holds a part.

    Raises:
        UnsupportedError: it does.
    """
    if (shared := processes_of(model)) is not None:
        raise UnsupportedError(
            place,
            f"the model is split over {shared.size} processes by tensor parallelism",
            "a whole model",
            remedy,
        )


def check_model(model: Any, plan: Plan) -> None:
    """Refuse what cannot be split over the processes that share a model.

    Raises:
        UnsupportedError: as ``check`` does; never if the model is whole.
    """
    if (shared := processes_of(model)) is not None:
        check(plan, model.tp_plan or {}, shared.size)


def check(plan: Plan, styles: Mapping[str, str], size: int) -> None:
    """Refuse what cannot be split over processes.

    Args:
        plan: Of the squeezed model.
        styles: transformers' plan for the model, ``*`` for the numbers of layers.
        size: How many processes there are.

    Raises:
        UnsupportedError: a layer that cannot be cut; the message says which and why.
    """
    if not styles:
        _refuse(plan.model_type, "transformers has no tensor parallel plan for it", "others")
    for row in plan.weights:
        style = style_of(styles, row.module)
        inside = style_of(styles, row.module.rpartition(".")[0])
        if row.experts and (style, inside) != (None, None):
            _refuse(row.module, "packed experts", "dense experts, or packed linear layers")
        if row.experts or style in WHOLE:
            continue
        if style not in STYLES:
            _refuse(row.module, f"style {style!r} of the tensor parallel plan", ", ".join(STYLES))
        if STYLES[style][0]:
            reason = f"{row.shape[0]} rows for {size} processes" if row.shape[0] % size else None
        else:
            weight = build_method(row.method).empty(*row.shape, torch.device("meta"))
            reason = refuse_columns(weight, size)
        if reason:
            _refuse(row.module, reason, "a number of processes that cuts whole groups of 32")
    for layer in plan.kv_cache:
        if layer.keys and cuts_heads(styles, layer.module) and layer.kv_heads % size:
            received = f"{layer.kv_heads} key heads for {size} processes"
            _refuse(layer.module, received, "a number of processes that divides them")
    for name, found in (("activations", plan.activations), ("mixers", plan.mixers)):
        if found:
            _refuse(found[0].module, f"the recipe has {name}", "weights, kv_cache, attention")


def _refuse(module: str, received: str, allowed: str) -> None:
    raise UnsupportedError(f"tensor parallel: {module}", received, allowed, REMEDY)


def style_of(styles: Mapping[str, str], module: str) -> str | None:
    """Return the style of a module in transformers' plan, ``None`` if it has none."""
    return styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", module))


def cuts_heads(styles: Mapping[str, str], attention: str) -> bool:
    """Whether each process computes some heads of an attention module."""
    found = [style_of(styles, f"{attention}.{name}") for name in KEY_PROJECTIONS]
    return "colwise" in found


def part_of(model: Any, module: str) -> Part | None:
    """Return what this process holds of a linear layer, ``None`` if that is all of it."""
    shared, style = processes_of(model), style_of(model.tp_plan or {}, module)
    if shared is None or style in WHOLE:
        return None
    return Part(shared, *STYLES[style])


def split_linear(model: Any, module: str, whole: PackedLinear) -> PackedLinear:
    """Return this process's part of a packed layer, ``whole`` itself if that is all of it.

    Args:
        model: The whole model.
        module: Where the layer stands in it, or is going to.
        whole: With all rows and columns; its bias may be cut by transformers.
    """
    part = part_of(model, module)
    if part is None:
        return whole
    bias = part.cut_bias(whole.bias)
    dtype = torch.float32 if bias is None else bias.dtype
    made = PackedLinear.from_weight(part.cut(whole.packed), bias, dtype, whole.implementation)
    made.part = part
    return made


def split_state(model: Any, attention: str, state: LayerState) -> None:
    """Leave only this process's heads in what the swap attached to an attention module.

    Raises:
        UnsupportedError: a table does not belong to heads.
    """
    shared = processes_of(model)
    if shared is None or not cuts_heads(model.tp_plan or {}, attention):
        return
    for name, table in state.named_buffers(recurse=False):
        if len(table) % shared.size:
            _refuse(f"{attention}.squeeze.{name}", f"{len(table)} heads", "one table a head")
        state.register_buffer(name, table[shared.share(len(table))].clone())
    budgets = getattr(state.policy, "heads", ())
    if budgets:
        state.policy = replace(state.policy, heads=budgets[shared.share(len(budgets))])


def split_loaded(model: Any, plan: Plan) -> None:
    """Leave this process's parts in a squeezed model that was loaded whole into every process.

    Dense layers were cut by transformers while they were read.

    Raises:
        UnsupportedError: a layer cannot be cut.
    """
    check_model(model, plan)
    if processes_of(model) is None:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            _refuse(name, "packed experts", "dense experts, or packed linear layers")
        if isinstance(module, PackedLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, split_linear(model, name, module))
        if isinstance(module, LayerState):
            split_state(model, name.removesuffix(".squeeze"), module)


def local(parameter: Tensor, exponents: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Pair this process's part of a parameter with that of numbers along one of its dimensions.

    Args:
        parameter: Whole, or cut by transformers.
        exponents: ``[n]``, as long as the whole parameter is along ``dim``.
        dim: Dimension that they run along.
    """
    if not isinstance(parameter, DTensor):
        return parameter, exponents
    mesh, (placement,) = parameter.device_mesh, parameter.placements
    if placement.is_shard(dim):
        shared = Processes(mesh.get_local_rank(), mesh.size(), mesh.get_group())
        exponents = exponents[shared.share(len(exponents))]
    return parameter.to_local(), exponents
