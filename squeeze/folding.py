"""Key scales inside a model's own weights: free at run time, exact, and undone bit for bit.

A transform that fits a table ``folded``, int8 ``[H_kv, D]``, asks that its layer make keys divided
by ``2**folded`` and queries multiplied by it. Both channels of a rotary pair have one exponent, so
RoPE does not notice, and products of powers of two are exact: no logit changes in its last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.errors import UnsupportedError
from squeeze.tensor_parallel import local
from squeeze.types import Tensors

FOLDED = "folded"


def folded_tables(tensors: Mapping[str, Tensor]) -> Tensors:
    """Select the exponents among tables, or among a model's buffers, by dotted buffer name."""
    return {
        name: table
        for name, table in tensors.items()
        if ".squeeze.keys_" in name and name.endswith(f"_{FOLDED}")
    }


def exponents(model: nn.Module, tables: Mapping[str, Tensor]) -> Tensors:
    """Say by which powers of two the parameters of a model are to be multiplied.

    A norm of single heads between projection and RoPE takes the scales, as it would undo those of
    the projection; its one weight serves all heads, and then so does the table's first row.

    Args:
        model: Its attention modules have ``q_proj`` and ``k_proj``.
        tables: What ``folded_tables`` returned.

    Returns:
        Dotted parameter name to int8 ``[n]``, one for each index of the first dimension.
    """
    found = {}
    for name, table in tables.items():
        path = name.partition(".squeeze.")[0]
        attention: Any = model.get_submodule(path)
        heads, size = table.shape
        norms = hasattr(attention, "k_norm")
        for part, sign in (("k", -1), ("q", 1)):
            made = f"{part}_norm" if norms else f"{part}_proj"
            module = getattr(attention, made)
            groups = module.out_features // (heads * size) if made == "q_proj" else 1
            rows = table[:1] if norms else table
            signed = sign * rows[:, None].expand(-1, groups, -1).reshape(-1)
            for kind in ("weight", "bias"):
                if getattr(module, kind, None) is not None:
                    found[f"{path}.{made}.{kind}"] = signed
    return found


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """Multiply the rows of ``x`` ``[n, ...]`` by ``2**exponent``, int8 ``[n]``, in its dtype."""
    power = torch.exp2(exponent.cpu().double()).to(x)
    return x * power.view(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def fold(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Fold exponents into a model's parameters, in place.

    Args:
        model: Dense where ``exponents`` says.
        tables: What ``folded_tables`` returned.

    Raises:
        UnsupportedError: a value underflows, so that the model could not be restored, or the
            scales are another model's; nothing is changed then.
    """
    for parameter, exponent in _parameters(model, tables):
        if not torch.equal(scaled(scaled(parameter, exponent), -exponent), parameter):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedError(
                "kv_cache.keys.transforms.smooth.fold",
                f"weights of the model underflow in {dtype} when scaled",
                "bfloat16, float32",
                "Load the model in bfloat16, or set fold: false",
            )
    for parameter, exponent in _parameters(model, tables):
        parameter.copy_(scaled(parameter, exponent))


@torch.no_grad()
def unfold(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Undo ``fold``."""
    for parameter, exponent in _parameters(model, tables):
        parameter.copy_(scaled(parameter, -exponent))


def _parameters(model: nn.Module, tables: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for name, exponent in exponents(model, tables).items():
        parameter = model.get_parameter(name)
        if len(parameter) != len(exponent):
            raise UnsupportedError(
                f"swap: {name}",
                f"has {len(parameter)} rows",
                f"{len(exponent)}, as the key scales have channels",
                "Use the model that the plan was made for",
            )
        yield local(parameter, exponent, 0)
