"""Several linear layers of one input as one product: their rows lie one after another.

The layers keep their own modules, whose tensors become parts of joint ones: nothing is stored
twice, and a state dict is as before. What moves a module apart from the others parts them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.linear import PackedLinear, multiply
from squeeze.types import ClusteredWeight, PackedWeight

ALIGNMENT = 16  # bytes: what kernels read at once
SHARED = ("exponents",)  # per input channel; all else of a packed weight has a row per output


class Joint:
    """The product of one input with several layers.

    Args:
        parts: Linear layers, packed or ``nn.Linear``, of equal inputs.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts: tuple[Any, ...] = tuple(parts)
        self.sizes = [part.out_features for part in self.parts]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map ``[..., in]`` to one ``[..., out]`` per layer: views of one result where joined."""
        first = self.parts[0]
        bias = self._whole("bias") if first.bias is not None else None
        if len(set(map(type, self.parts))) > 1:
            return tuple(part(x) for part in self.parts)
        if isinstance(first, PackedLinear):
            weight = self._weight()
            if weight is None or (first.bias is None) != (bias is None):
                return tuple(part(x) for part in self.parts)
            y = multiply(x, weight, bias, first.implementation)
        else:
            dense = self._whole("weight")
            if dense is None or (first.bias is None) != (bias is None):
                return tuple(part(x) for part in self.parts)
            y = nn.functional.linear(x, dense, bias)
        return y.split(self.sizes, -1)

    @torch.no_grad()
    @torch.inference_mode(False)
    def join(self) -> bool:
        """Lay the layers' tensors one after another, if they agree; say whether any moved."""
        if refusal(self.parts) is not None:
            return False
        moved = False
        for name in _tensors(self.parts[0]):
            if name in SHARED or self._whole(name) is not None:
                continue
            tensors = [getattr(part, name) for part in self.parts]
            whole = torch.cat([tensor.detach() for tensor in tensors])
            for tensor, view in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
                tensor.data = view  # in place: whoever else holds the tensor holds the part
            moved = True
        return moved

    def _weight(self) -> PackedWeight | None:
        """Describe the joint weight, ``None`` where the layers' tensors lie apart."""
        packed: PackedWeight = self.parts[0].packed
        tensors = {}
        for name, own in packed.tensors().items():
            whole = own if name in SHARED else self._whole(name)
            if whole is None:
                return None
            tensors[name] = whole
        fields = dict(vars(packed), shape=(sum(self.sizes), packed.shape[1]), **tensors)
        return type(packed)(**fields)

    def _whole(self, name: str) -> Tensor | None:
        """View what lies one after another in one storage; ``None`` where a layer has it not."""
        tensors: list[Any] = [getattr(part, name, None) for part in self.parts]
        if any(tensor is None for tensor in tensors):
            return None
        first, rows, end = tensors[0], 0, tensors[0].storage_offset()
        for tensor in tensors:
            together = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            if not together or tensor.storage_offset() != end or not tensor.is_contiguous():
                return None
            rows, end = rows + len(tensor), end + tensor.numel()
        shape = (rows, *first.shape[1:])
        return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def refusal(parts: Sequence[Any]) -> str | None:
    """Say why layers cannot share one product, ``None`` if they can."""
    first = parts[0]
    if len({type(part) for part in parts}) > 1:
        return "layers of several kinds"
    if len({part.bias is None for part in parts}) > 1:
        return "some have a bias"
    for name, like in _tensors(first).items():
        for part in parts:
            tensor = _tensors(part).get(name)
            if tensor is None or tensor.shape[1:] != like.shape[1:]:
                return f"{name} differs in shape"
            if tensor.dtype != like.dtype or tensor.device != like.device:
                return f"{name} differs in kind"
            if tensor.is_inference() or tensor.is_meta:
                return f"{name} cannot be moved"
            if name in SHARED:
                if not torch.equal(tensor, like):
                    return f"{name} differs"
            elif tensor.numel() * tensor.element_size() % ALIGNMENT and part is not parts[-1]:
                return f"{name} would not be aligned"
    if set(map(len, map(_tensors, parts))) != {len(_tensors(first))}:
        return "some lack a tensor"
    return _packing(parts) if isinstance(first, PackedLinear) else None


def _packing(parts: Sequence[Any]) -> str | None:
    """Say how packed layers differ in what is no tensor."""
    facts = set()
    for part in parts:
        known = dict(vars(part.packed), shape=part.in_features)
        plain = {n: v for n, v in known.items() if not isinstance(v, Tensor) and v is not None}
        facts.add((part.implementation, *sorted(plain.items())))
    if len(facts) > 1:
        return "they are packed in several ways"
    packed = parts[0].packed
    if isinstance(packed, ClusteredWeight):
        if packed.outlier_values is not None:
            return "outliers are found by row"
        if any(part.out_features % packed.rows for part in parts[:-1]):
            return "codebooks would reach over two layers"
    return None


def _tensors(part: Any) -> dict[str, Tensor]:
    """Name the tensors of a layer, its bias included."""
    tensors = part.packed.tensors() if isinstance(part, PackedLinear) else {"weight": part.weight}
    return tensors if part.bias is None else {**tensors, "bias": part.bias}
