"""What a backward pass of the dense model leaves behind for each decoder layer's turn."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from squeeze import processes
from squeeze.calibrate import BACKWARD, GROUP, observe_gradients, on_gradient
from squeeze.layers import Call, Layers, linears, routed
from squeeze.tensor_files import read, read_own, write

Sums = dict[str, dict[str, Tensor]]
TokenWeights = list[dict[str, Tensor]]


class Guidance:
    """The gradients of the loss, from one pass over the calibration text, on the disk.

    ``guided_hessian`` needs one number per token and linear layer, the mean square of the gradient
    of its output: these are kept, float32 ``[T]`` of every sample. For other statistics, and where
    there are experts, the gradients of the decoder layers' outputs are kept instead, and each layer
    is differentiated once more at its turn, alone.

    Args:
        layers: Of the dense model.
        tokens: int64 ``[N, T]``.
        statistics: What the layers will be asked for.
        folder: Where files lie, one for a few samples; those of a killed run are found again.
        run: Tells runs apart.

    Cost: bytes on the disk, 4 N T for every linear layer, or N T hidden values (float32 on a CPU,
        else the model's dtype) for every decoder layer; memory, the layer inputs of a few samples.
    """

    def __init__(
        self, layers: Layers, tokens: Tensor, statistics: set[str], folder: Path, run: str
    ) -> None:
        self.layers, self.tokens, self.folder, self.run = layers, tokens, folder, run
        self.statistics = BACKWARD & statistics
        self.small = self.statistics <= {"guided_hessian"} and not layers.experts
        own = processes.share(len(tokens))
        self.groups = [own[i : i + GROUP] for i in range(0, len(own), GROUP)]

    def collect(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Differentiate the loss of every sample that no file holds.

        Raises:
            CheckpointError: a file is damaged, or another run's.
        """
        for done, group in enumerate(self.groups if self.statistics else ()):
            path = self._path(group)
            if path.exists():
                read_own(path, self.run, "gradients of a calibration")
            else:
                write(path, self._differentiate(group), {"run": self.run})
            if progress:
                progress("calibrate", done + 1, len(self.groups))

    def of_layer(
        self, index: int, runner: nn.Module, calls: Sequence[Call], inputs: Sequence[Tensor]
    ) -> tuple[Sums, TokenWeights]:
        """Give what gradients tell of one layer.

        Args:
            index: Of the layer.
            runner: A dense copy of it, which may get hooks.
            calls: Its arguments in every sample of this process.
            inputs: Its dense inputs, likewise.

        Returns:
            By statistic and linear module the sums of what depends on gradients, but for the guided
            Hessians of modules that read every token; for these the token weights of every sample,
            by module, float32 ``[T]``.
        """
        kept = self._read(index) if self.statistics else []
        if self.small:
            return {}, kept
        sums: Sums = {name: {} for name in sorted(self.statistics)}
        guided = {name: total for name, total in sums.items() if name == "guided_hessian"}
        other = {name: total for name, total in sums.items() if name not in guided}
        every, apart = linears(runner), routed(runner)
        observe_gradients(every, other)
        observe_gradients({name: every[name] for name in apart}, guided)
        current, weights = _weigh(runner, apart) if guided else {}, []
        grads = [sample["output"] for sample in kept]
        for _ in self.layers.differentiate(runner, calls, inputs, grads):
            weights.append(dict(current))
            current.clear()
        return sums, weights

    def _differentiate(self, group: range) -> dict[str, Tensor]:
        """Carry a few samples forwards and backwards, and name what is kept of them."""
        tokens = self.tokens[group.start : group.stop]
        calls = [self.layers.record(sample, use_cache=False) for sample in tokens]
        inputs: list[list[Tensor]] = []
        for _, _, sweep in self.layers.forward(calls, inputs):
            deque(sweep, maxlen=0)
        kept: dict[str, Tensor] = {}
        for index, runner, steps in self.layers.backward(tokens, inputs, calls):
            current = _weigh(runner, set()) if self.small else {}
            for sample, grad in steps:
                found = current if self.small else {"output": grad}
                kept |= {f"{index}/{sample}/{name}": tensor for name, tensor in found.items()}
                current.clear()
        return kept

    def _read(self, index: int) -> list[dict[str, Tensor]]:
        """Read what was kept of one layer, of every sample."""
        result = []
        for group in self.groups:
            tensors, _ = read(self._path(group), f"{index}/")
            samples: list[dict[str, Tensor]] = [{} for _ in group]
            for key, tensor in tensors.items():
                _, sample, name = key.split("/")
                samples[int(sample)][name] = tensor
            result += samples
        return result

    def _path(self, group: range) -> Path:
        return self.folder / f"gradients-{group.start:06d}.safetensors"


def _weigh(runner: nn.Module, apart: set[str]) -> dict[str, Tensor]:
    """Let linear modules leave the token weights of the sample that is differentiated, ``[T]``."""
    current: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, grad: Tensor) -> None:
        current[name] = grad.flatten(0, -2).float().square().mean(1).cpu()

    for name, linear in linears(runner).items():
        if name not in apart:
            on_gradient(linear, functools.partial(note, name))
    return current
