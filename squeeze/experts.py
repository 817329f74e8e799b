"""Mixtures of experts over packed weights: the module that replaces transformers' own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from squeeze.fused import Experts, Index, hollow, matrix, projections, select
from squeeze.linear import PackedBuffers, multiply, reconstruct
from squeeze.types import ExpertWeights, Implementation, PackedWeight

# Slots up to which a GPU is better told nothing than asked which experts were chosen.
FEW_SLOTS = 16


class PackedStack(PackedBuffers):
    """One projection's matrices of all experts, stacked and packed.

    Args:
        weight: What was fitted, or an empty one for loading a checkpoint.
        implementation: ``reference`` or ``triton``, as the plan resolved it.
    """

    def __init__(
        self,
        weight: ExpertWeights,
        implementation: Implementation = Implementation.REFERENCE,
    ) -> None:
        super().__init__()
        self.implementation = Implementation(implementation)
        self.names = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        # Tensors of no size: a description that holds none of the data.
        meta = {name: tensor.to("meta") for name, tensor in weight.tensors().items()}
        self.description = weight.stacked.with_tensors(meta)

    @property
    def packed(self) -> ExpertWeights:
        """The stored weights, as views of the buffers."""
        buffers = {name: self.get_buffer(name) for name in self.names}
        return ExpertWeights(self.description.with_tensors(buffers))

    def weight(self, expert: Index) -> PackedWeight:
        """Select one expert's packed matrix."""
        return self.description.with_tensors(
            {name: select(self.get_buffer(name), expert) for name in self.names}
        )

    def product(self, x: Tensor, bias: Tensor | None, expert: Index) -> Tensor:
        """Map ``[rows, in]`` to ``[rows, out]`` by one expert."""
        return multiply(x, self.weight(expert), bias, self.implementation)

    def reconstruct(self) -> Tensor:
        """Return the dense weights, float32 ``[E, out, in]``."""
        return torch.stack([reconstruct(self.weight(e)) for e in range(self.packed.experts)])

    def extra_repr(self) -> str:
        """Describe the matrices as ``nn.Linear`` does, with their number and effective bits."""
        out_features, in_features = self.description.shape
        packed = self.packed
        return (
            f"experts={packed.experts}, in_features={in_features}, out_features={out_features}, "
            f"bits={self.description.bits}, effective_bits={packed.effective_bits:.2f}, "
            f"implementation={self.implementation.value}"
        )


class PackedExperts(Experts):
    """Experts some or all of whose projections are packed; the others stay dense.

    Args:
        dense: The module of transformers that this takes the place of.
        stacks: By projection.
    """

    def __init__(self, dense: nn.Module, stacks: Mapping[str, PackedStack]) -> None:
        super().__init__(dense)
        for name in self.projections:
            if name in stacks:
                self.add_module(name, stacks[name])
            else:
                kept = dense.get_parameter(name)
                self.register_parameter(name, nn.Parameter(kept.detach(), requires_grad=False))

    def product(self, name: str, x: Tensor, expert: Index) -> Tensor:
        """Multiply ``[rows, in]`` by one expert's matrix and add its bias."""
        held, bias = getattr(self, name), self.bias(name, expert)
        if isinstance(held, PackedStack):
            return held.product(x, bias, expert)
        weight = select(held, expert)
        return functional.linear(x, weight.T if self.own[0].is_transposed else weight, bias)

    def recordable(self, ids: Tensor) -> bool:
        """Whether to compute slot by slot: few of them, or a CUDA graph is being recorded.

        Then each slot's packed tensors are gathered on the device, which nobody waits for.
        """
        return ids.is_cuda and (
            ids.numel() <= FEW_SLOTS or torch.cuda.is_current_stream_capturing()
        )

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """Make the module of transformers again, holding the same values."""
        made = hollow(self.own[0])
        for name, parameter in self.named_parameters(recurse=False):
            made.register_parameter(name, parameter)
        for name in self.projections:
            held = getattr(self, name)
            if isinstance(held, PackedStack):
                weight = held.reconstruct().to(dtype)
                weight = weight.mT.contiguous() if made.is_transposed else weight
                made.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return made


def replace_experts(model: nn.Module, stacks: Mapping[str, PackedStack]) -> dict[str, nn.Module]:
    """Put packed experts in the place of those modules that the stacks belong to.

    Args:
        model: Dense.
        stacks: Dotted name of the fused parameter to what replaces it.

    Returns:
        The replaced modules by name.
    """
    grouped: dict[str, dict[str, PackedStack]] = {}
    for module, stack in stacks.items():
        path, name = split(module)
        grouped.setdefault(path, {})[name] = stack
    replaced = {}
    for path, own in grouped.items():
        replaced[path] = model.get_submodule(path)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedExperts(replaced[path], own))
    return replaced


def keep_names(model: nn.Module) -> None:
    """Let a model with packed experts be saved under its own names.

    transformers would otherwise split what it takes for fused parameters.
    """
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        vars(model)["_weight_conversions"] = []


def split(module: str) -> tuple[str, str]:
    """Split the dotted name of a fused parameter into its module's and its own."""
    path, _, name = module.rpartition(".")
    return path, name


def expert_matrices(model: nn.Module, module: str) -> list[Tensor]:
    """View the matrices ``[out, in]`` of a fused parameter by its dotted name."""
    path, name = split(module)
    dense = model.get_submodule(path)
    return [matrix(dense, name, expert) for expert in range(len(dense.get_parameter(name)))]


def is_fused(model: nn.Module, module: str) -> bool:
    """Whether a dotted name is that of a fused parameter in a dense model."""
    path, name = split(module)
    return name in projections(model.get_submodule(path))
