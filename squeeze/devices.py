"""Models spread over devices by accelerate's ``device_map``: what each part of one stands on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from squeeze.attention import LayerState
from squeeze.errors import UnsupportedError


class OnDevice:
    """Two hooks of a module that make its GPU the current one while the module runs.

    accelerate brings a module's inputs to its device and no more; Triton launches kernels on the
    device that is current.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: list[int] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Note the current device, and change it."""
        self.before.append(torch.cuda.current_device())
        torch.cuda.set_device(self.device)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Change it back, also after an error."""
        torch.cuda.set_device(self.before.pop())


def stand_on_devices(model: Any) -> list[Any]:
    """Give the parts of a model that is spread over several GPUs the hooks of ``OnDevice``.

    Returns:
        Handles of the hooks, none where there is one GPU or no ``device_map``.
    """
    places = {
        name: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        for name, place in (getattr(model, "hf_device_map", None) or {}).items()
        if place != "disk"
    }
    on_gpu = {name: place for name, place in places.items() if place.type == "cuda"}
    if len(set(on_gpu.values())) < 2:
        return []
    handles = []
    for name, place in on_gpu.items():
        module, hook = model.get_submodule(name), OnDevice(place)
        handles.append(module.register_forward_pre_hook(hook.enter))
        handles.append(module.register_forward_hook(hook.leave, always_call=True))
    return handles


def device_of(model: nn.Module, name: str) -> torch.device:
    """Return the device of a module, the model's if it holds nothing itself."""
    own = next(model.get_submodule(name).parameters(), None)
    return (next(model.parameters()) if own is None else own).device


def require_in_place(model: nn.Module) -> None:
    """Refuse to change a model parts of which accelerate keeps elsewhere between calls.

    Raises:
        UnsupportedError: naming a parameter that is not on its device.
    """
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away and len(away) < sum(1 for _ in model.parameters()):
        raise UnsupportedError(
            "device_map",
            f"{away[0]} is offloaded to the CPU or the disk",
            "a device_map of GPUs",
            "Squeeze the model where it fits, save it, and load that: it is smaller",
        )


def require_tables(model: nn.Module) -> None:
    """Refuse a loaded model whose fitted tables accelerate takes away between calls.

    Raises:
        UnsupportedError: naming one of them.
    """
    for name, module in model.named_modules():
        if isinstance(module, LayerState) and any(b.is_meta for b in module.buffers()):
            raise UnsupportedError(
                f"device_map: {name}",
                "tables of the packed cache are offloaded",
                "offload_buffers=False",
                "Leave offload_buffers out; kv_cache.offload moves the cache itself",
            )
