"""Mixtures of experts as transformers 5 stores them: one 3-D parameter for all experts' matrices.

Any module class that transformers' ``use_experts_implementation`` decorates tells how it stores
them; the loop here computes with its own activation, so that no architecture is spelled out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# transformers' decorator gives these to every instance.
MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
Index: TypeAlias = int | Tensor


def projections(module: nn.Module) -> tuple[str, ...]:
    """Name the fused parameters of a module, first layer first; empty for any other module."""
    held: Any = module
    if not all(hasattr(module, mark) for mark in MARKS) or not hasattr(module, "_apply_gate"):
        return ()
    names = ("gate_up_proj" if held.has_gate else "up_proj", "down_proj")
    biases = tuple(f"{name}_bias" for name in names) if held.has_bias else ()
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {*names, *biases} or any(own[name].ndim != 3 for name in names):
        return ()
    return names


def fused_shapes(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Find every fused parameter: dotted name to experts, outputs and inputs of each."""
    found = {}
    for path, module in model.named_modules():
        for name in projections(module):
            first = matrix(module, name, 0)
            found[f"{path}.{name}"] = (len(getattr(module, name)), *first.shape)
    return found


def matrix(module: nn.Module, name: str, expert: int) -> Tensor:
    """View one expert's weight, ``[out, in]``."""
    held: Any = module
    weight: Tensor = getattr(held, name)[expert]
    return weight.T if held.is_transposed else weight


class Experts(nn.Module):
    """Experts whose products subclasses compute, with all else as in the module they stand for.

    Args:
        dense: The module of transformers; its parameters are not kept, but its biases and what
            else belongs to its computation are.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        held: Any = dense
        self.projections = projections(dense)
        self.num_experts: int = held.num_experts
        self.has_gate: bool = held.has_gate
        for name, bias in dense.named_parameters(recurse=False):
            if name not in self.projections:
                self.register_parameter(name, nn.Parameter(bias.detach(), requires_grad=False))
        if getattr(held, "has_post_expert_norm", False):
            self.post_expert_norm = held.post_expert_norm
        # In a tuple it is no submodule: it lends its methods and holds no parameters.
        self.own = (hollow(dense),)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the outputs of the chosen experts, computing only those.

        Args:
            hidden_states: ``[T, hidden]``.
            top_k_index: int64 ``[T, k]``; experts past the last count nothing.
            top_k_weights: ``[T, k]``.
        Returns:
            ``[T, hidden]``.
        """
        tokens, chosen = top_k_index.shape
        ids = top_k_index.flatten()
        if self.recordable(ids):
            rows = [
                self.expert(hidden_states[i // chosen, None], ids[i, None])
                for i in range(tokens * chosen)
            ]
            outputs = torch.cat(rows) if rows else hidden_states.new_zeros(0, len(hidden_states[0]))
        else:
            outputs = self._grouped(hidden_states, ids, chosen)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    def _grouped(self, hidden_states: Tensor, ids: Tensor, chosen: int) -> Tensor:
        """Compute ``[T k, hidden]`` expert by expert, each once for all of its tokens."""
        outputs = hidden_states.new_zeros(len(ids), hidden_states.shape[1])
        for expert in ids.unique().tolist():
            if expert < self.num_experts:
                places = (ids == expert).nonzero().flatten()
                outputs[places] = self.expert(hidden_states[places // chosen], expert)
        return outputs

    def expert(self, x: Tensor, expert: Index) -> Tensor:
        """Compute one expert on ``[rows, hidden]``."""
        own: Any = self.own[0]
        up, down = self.projections
        hidden = self.product(up, x, expert)
        hidden = own._apply_gate(hidden) if self.has_gate else own.act_fn(hidden)
        output = self.product(down, hidden, expert)
        norm: Callable[[Tensor], Tensor] | None = getattr(self, "post_expert_norm", None)
        return output if norm is None else norm(output)

    def bias(self, name: str, expert: Index) -> Tensor | None:
        """Select the bias ``[out]`` of one expert's projection, where there are biases."""
        biases = getattr(self, f"{name}_bias", None)
        return None if biases is None else select(biases, expert)

    def recordable(self, ids: Tensor) -> bool:
        """Whether to compute slot by slot, which never asks the device who was chosen."""
        return False

    def product(self, name: str, x: Tensor, expert: Index) -> Tensor:
        """Multiply ``[rows, in]`` by one expert's matrix and add its bias."""
        raise NotImplementedError


class UnfusedExperts(Experts):
    """The same experts as ordinary linear layers over views of the fused parameters.

    Whatever observes linear layers observes experts, named ``gate_up_proj.3``.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__(dense)
        for name in self.projections:
            self.add_module(
                name,
                nn.ModuleList(
                    self._linear(matrix(dense, name, expert), self.bias(name, expert))
                    for expert in range(self.num_experts)
                ),
            )

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return linear

    def product(self, name: str, x: Tensor, expert: Index) -> Tensor:
        """Multiply ``[rows, in]`` by one expert's matrix and add its bias."""
        assert isinstance(expert, int)
        module: Any = self.get_submodule(name)
        result: Tensor = module[expert](x)
        return result


def unfuse(model: nn.Module) -> None:
    """Put unfused experts in the place of all fused ones, in place."""
    for path, module in list(model.named_modules()):
        if projections(module):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, UnfusedExperts(module))


def hollow(dense: nn.Module) -> nn.Module:
    """Copy a module without its parameters; submodules are shared."""
    copied = copy.copy(dense)
    vars(copied)["_parameters"] = {}
    vars(copied)["_modules"] = dict(vars(dense)["_modules"])
    return copied


def select(stacked: Tensor, expert: Index) -> Tensor:
    """Take one expert's part of ``[E, ...]``; an index on the device stays there."""
    if isinstance(expert, int):
        return stacked[expert]
    return stacked.index_select(0, expert).squeeze(0)
