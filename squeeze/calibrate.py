"""Measure what methods ask of calibration text, one decoder layer at a time."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from squeeze import magnitudes, mixer, processes
from squeeze.errors import CheckpointError
from squeeze.layers import Call, Layers, linears
from squeeze.model_info import describe
from squeeze.tensor_files import flatten, read, read_own, unflatten, write

STATISTICS = (
    "fisher",
    "guided_hessian",
    "hessian",
    "input_importance",
    "key_mean",
    "kv_importance",
    "kv_samples",
    "mixer_magnitudes",
    "output_hessian",
)
BACKWARD = {"fisher", "guided_hessian", "output_hessian"}  # need the loss's gradient
MATRICES = {"hessian", *BACKWARD}  # as large as weights, or larger
SAMPLED_TOKENS = 8192  # of every layer, over all samples
OBSERVED = "squeeze_observed"  # our attention function that shows its queries
GROUP = 4  # samples carried through a layer together, and between two saves
PARTIAL = "calibration.partial.safetensors"  # of a process among several: with its number

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stats:
    """What calibration measured.

    Attributes:
        tensors: By statistic, then by module name: ``fisher`` float32 ``[out, in]`` of linear
            layers, as are ``hessian`` ``[in, in]``, ``guided_hessian`` ``[1, in, in]`` and
            ``output_hessian`` ``[out, out]``; of attention modules ``key_mean`` float32
            ``[H_kv, D]``, ``kv_samples`` float16 ``[2, H_kv, N, D]`` and ``kv_importance`` float32
            ``[2, H_kv, D]``, keys first; histograms int64, ``input_importance`` ``[BINS]`` of
            linear layers and ``mixer_magnitudes`` ``[points, BINS]`` of Mamba mixers.
        samples: Sequences that were read.
        tokens: Tokens that were read, over all sequences.
    """

    tensors: dict[str, dict[str, Tensor]]
    samples: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Summarise without tensors: counts, and modules and their shapes by statistic."""
        shapes = {
            statistic: {name: list(tensor.shape) for name, tensor in modules.items()}
            for statistic, modules in self.tensors.items()
        }
        return {"samples": self.samples, "tokens": self.tokens, "statistics": shapes}

    def table(self) -> str:
        """Print one line per statistic."""
        lines = [f"{self.samples} samples, {self.tokens} tokens"]
        for statistic, modules in self.tensors.items():
            values = sum(tensor.numel() for tensor in modules.values())
            lines.append(f"{statistic:<12} {len(modules):>5} modules {values:>14,} values")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        write(path, flatten(self.tensors), {"samples": self.samples, "tokens": self.tokens})

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, about = read(path)
        if not {"samples", "tokens"} <= about.keys():
            raise CheckpointError(str(path), "holds no calibration statistics")
        return cls(unflatten(tensors), about["samples"], about["tokens"])


def calibrate(
    model: nn.Module,
    tokens: Tensor,
    statistics: set[str],
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    experts: bool = False,
    device: torch.device | str | None = None,
) -> Stats:
    """Run calibration text through the model and collect the statistics.

    Decoder layers are visited one by one, forwards for their inputs and backwards for gradients;
    only the visited layer is copied and differentiated. On a CPU that copy is float32, on other
    devices it has the model's dtype. Accumulators are float32 on the CPU. Under an initialised
    ``torch.distributed`` each process reads its part of the samples, and all get what all measured.

    ``fisher`` is, per linear layer of a decoder layer, the squared gradient of the summed
    next-token loss with respect to the weight, averaged over samples. Of such a layer with inputs x
    and outputs whose gradient is g, ``hessian`` is the mean over tokens of ``x x^T``,
    ``guided_hessian`` that of ``x x^T`` times the mean square of g over outputs, and
    ``output_hessian`` that of ``g g^T``. ``input_importance`` counts the magnitudes of the inputs,
    each times the norm of the weight's column that it meets, and ``mixer_magnitudes`` those of
    every activation of a Mamba mixer. ``key_mean`` is the mean over
    tokens of the keys that attention sees, after RoPE. ``kv_samples`` are the keys and values of
    evenly spaced tokens, 8192 over all samples (rounded up to the same number in each, or all there
    are), the samples spread over the positions that the model has. ``kv_importance`` is what an
    error of a channel counts: of keys the mean square of the queries that read the head, after
    RoPE; of values 1.

    Args:
        model: A decoder-only Hugging Face causal language model; unchanged on return.
        tokens: int64 ``[N, T]``, one sample per row, no padding.
        statistics: Any of ``STATISTICS``; empty returns at once.
        folder: Where to save progress after every few samples. A killed run with the same folder,
            model and tokens resumes there and gives the same bits.
        progress: Called as ``progress("calibrate", samples done, samples)``.
        experts: Measure the fused experts of mixtures too, each as a linear layer over the tokens
            routed to it, named ``<parameter>.<number>``; missing where there were none.
        device: Where layers run; by default where the model is.
    Returns:
        The statistics, on the CPU.
    Raises:
        ValueError: unknown statistic, or tokens of another shape.
        UnsupportedError: no list of decoder layers is found in the model.
        CheckpointError: ``folder`` holds the progress of another run.
    Cost: the model, one more layer with its activations, the layer inputs of a few samples
        (4 N_layers T hidden values), and the statistics.
    Source: the squared gradients of S. Kim et al. 2023, SqueezeLLM,
        https://arxiv.org/abs/2306.07629, section 4.1; the guided Hessian of J. Kim et al. 2025,
        GuidedQuant, https://arxiv.org/abs/2505.07004, section 3.2; the moment of output gradients
        of A. Tseng et al. 2025, YAQA, https://arxiv.org/abs/2505.22988.
    Differs: gradients are recomputed layer by layer from saved layer inputs; one guided Hessian
        serves all rows of a layer.
    """
    unknown = statistics - set(STATISTICS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}, known: {', '.join(STATISTICS)}")
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [N, T] with T > 1, got {tuple(tokens.shape)}")
    if not statistics:
        return Stats({}, 0, 0)
    run = _Run(model, tokens, statistics, experts, device)
    own = processes.share(len(tokens))
    done = run.resume(folder) if folder else 0
    training = model.training
    model.eval()
    try:
        while done < len(own):
            group = own[done : done + GROUP]
            run.group(tokens[group.start : group.stop], group.start)
            done += len(group)
            if folder:
                run.save(folder, done)
            if progress:
                progress("calibrate", done, len(own))
    finally:
        model.train(training)
    return run.stats()


class _Seen(DynamicCache):
    """A cache that keeps some tokens: it sums the keys of all and hands everything back."""

    def __init__(self, kept: Tensor | None) -> None:
        super().__init__()
        self.active = True
        self.kept = kept
        self.sums: dict[int, Tensor] = {}
        self.samples: dict[int, list[Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add ``[1, H_kv, T, D]`` keys to the layer's sum, and keep chosen tokens."""
        if self.active:
            add(self.sums, layer_idx, key_states.double().sum(dim=(0, 2)))
        if self.active and self.kept is not None:
            both = [x[0, :, self.kept.to(x.device)] for x in (key_states, value_states)]
            self.samples.setdefault(layer_idx, []).append(_half(torch.stack(both)))
        return key_states, value_states


class _Run:
    """Accumulators of one calibration, and the passes that feed them."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        statistics: set[str],
        experts: bool,
        device: torch.device | str | None,
    ) -> None:
        self.model, self.tokens = model, tokens
        self.layers = Layers(model, device, experts)
        self.attention = {info.layer: info.module for info in describe(model).attention}  # type: ignore[arg-type]
        self.sums: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(statistics)}

    def group(self, tokens: Tensor, first: int) -> None:
        """Add a few samples, the one at index ``first`` and those after it."""
        keys = _Seen(self._kept() if "kv_samples" in self.sums else None)
        calls = [self._record(sample, i, keys) for i, sample in enumerate(tokens, first)]
        inputs: list[list[Tensor]] = []
        for index, runner, sweep in self.layers.forward(calls, inputs):
            if "kv_importance" in self.sums:
                self._watch(runner)
            seen: dict[str, Tensor] = {}
            if "hessian" in self.sums:
                _observe_inputs(runner, seen)
            counts: dict[str, Tensor] = {}
            if "input_importance" in self.sums:
                _count_inputs(runner, counts)
            observers = _observe_mixers(runner) if "mixer_magnitudes" in self.sums else {}
            deque(sweep, maxlen=0)
            self._collect("hessian", index, seen)
            self._collect("input_importance", index, counts)
            self._collect("mixer_magnitudes", index, {n: o.counts for n, o in observers.items()})
        keys.active = False
        for index, total in keys.sums.items() if "key_mean" in self.sums else ():
            add(self.sums["key_mean"], self.attention[index], total.cpu())
        for index, parts in keys.samples.items():
            self._append("kv_samples", self.attention[index], torch.cat(parts, dim=2))
        if BACKWARD & self.sums.keys():
            self._backward(tokens, inputs, calls)

    def _collect(self, statistic: str, index: int, seen: dict[str, Tensor]) -> None:
        """Add what a few samples gave of one layer's linear modules, by name inside the layer."""
        for name, total in seen.items():
            add(self.sums[statistic], self.layers.name(index, name), total.cpu())

    def _record(self, sample: Tensor, index: int, cache: DynamicCache) -> list[Call]:
        """Learn the arguments of every decoder layer."""
        # A state that the first pass leaves behind would start the second.
        held = {"past_key_values": cache} if self.attention else {}
        positions = self._positions(index)
        return self.layers.record(sample, use_cache=bool(held), **held, **positions)

    def _positions(self, index: int) -> dict[str, Tensor]:
        """Spread the samples over all positions: RoPE takes keys elsewhere late in a context.

        Attention sees differences of positions alone, so the text means the same anywhere.
        """
        model: Any = self.model
        config = model.config.get_text_config(decoder=True)
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
        if "kv_samples" not in self.sums or not rotary:
            return {}
        samples, length = self.tokens.shape
        free = max(0, config.max_position_embeddings - length)
        start = free * index // max(1, samples - 1)
        return {"position_ids": torch.arange(start, start + length, device=self.layers.home)[None]}

    def _kept(self) -> Tensor:
        """Choose the tokens of a sample that are kept, int64 ``[n]``, evenly spaced."""
        samples, length = self.tokens.shape
        count = min(length, -(-SAMPLED_TOKENS // samples))
        return (torch.arange(count) * 2 + 1) * length // (2 * count)

    def _append(self, statistic: str, name: str, value: Tensor) -> None:
        """Add tokens ``[2, H_kv, n, D]`` to those of earlier groups."""
        before = self.sums[statistic].get(name)
        parts = [value.cpu()] if before is None else [before, value.cpu()]
        self.sums[statistic][name] = torch.cat(parts, dim=2)

    def _watch(self, runner: nn.Module) -> None:
        """Let the attention of a copied layer show the queries it is called with."""
        AttentionInterface.register(OBSERVED, _observed)
        modules: list[Any] = list(runner.modules())
        watched = [m for m in modules if getattr(m, "layer_idx", None) in self.attention]
        watched = [m for m in watched if hasattr(getattr(m, "config", 0), "_attn_implementation")]
        for module in watched:
            module.squeeze_dense = module.config._attn_implementation
            module.squeeze_observe = functools.partial(
                self._observe, self.attention[module.layer_idx]
            )
        for module in watched:
            module.config._attn_implementation = OBSERVED

    def _observe(self, name: str, query: Tensor, key: Tensor) -> None:
        """Add the squares of queries ``[1, H, T, D]`` that read keys ``[1, H_kv, T, D]``."""
        squares = query.double().square().sum(dim=(0, 2)).unflatten(0, (key.shape[1], -1)).mean(1)
        tokens = torch.full_like(squares, query.shape[2])
        add(self.sums["kv_importance"], name, torch.stack([squares, tokens]).cpu())

    def _backward(
        self, tokens: Tensor, inputs: list[list[Tensor]], calls: list[list[Call]]
    ) -> None:
        """Add what the gradients of a few samples give."""
        for index, runner, sweep in self.layers.backward(tokens, inputs, calls):
            seen: dict[str, dict[str, Tensor]] = {n: {} for n in BACKWARD & self.sums.keys()}
            observe_gradients(linears(runner), seen)
            deque(sweep, maxlen=0)
            for statistic, sums in seen.items():
                self._collect(statistic, index, sums)

    def save(self, folder: Path, done: int) -> None:
        """Write the accumulators and how many samples they hold."""
        write(self._partial(folder), flatten(self.sums), {"done": done, "run": self.run_id})

    def resume(self, folder: Path) -> int:
        """Read the accumulators of a killed run; return how many samples they hold."""
        asked = (sorted(self.sums), GROUP, self.layers.experts, processes.count())
        self.run_id = fingerprint(self.model, self.tokens, asked)
        path = self._partial(folder)
        if not path.exists():
            return 0
        tensors, about = read_own(path, self.run_id, "progress of a calibration")
        self.sums |= unflatten(tensors)
        return int(about["done"])

    def _partial(self, folder: Path) -> Path:
        return folder / (f"{processes.rank()}.{PARTIAL}" if processes.count() > 1 else PARTIAL)

    def stats(self) -> Stats:
        """Turn sums into means."""
        samples, count = len(self.tokens), self.tokens.numel()
        kept = processes.append({n: s for n, s in self.sums.items() if n == "kv_samples"}, dim=2)
        self.sums = processes.add_up({n: s for n, s in self.sums.items() if n not in kept}) | kept
        divisor = {"fisher": samples, "key_mean": count, "kv_importance": count}
        divisor |= dict.fromkeys(("hessian", "guided_hessian", "output_hessian"), count)
        means = {
            statistic: {name: (total / divisor[statistic]).float() for name, total in sums.items()}
            for statistic, sums in self.sums.items()
            if statistic in divisor
        }
        for statistic in {"kv_samples", "input_importance", "mixer_magnitudes"} & self.sums.keys():
            means[statistic] = self.sums[statistic]
        return Stats(means, samples, count)


def fingerprint(model: nn.Module, tokens: Tensor, asked: object) -> str:
    """Tell runs apart that must not continue one another."""
    digest = hashlib.sha256(tokens.cpu().numpy().tobytes())
    digest.update(repr((tuple(tokens.shape), asked)).encode())
    for name, parameter in model.named_parameters():
        total = parameter.detach().double().sum().item()
        digest.update(repr((name, tuple(parameter.shape), total)).encode())
    return digest.hexdigest()


def _observe_inputs(layer: nn.Module, sums: dict[str, Tensor]) -> None:
    """Sum ``x x^T`` over the tokens that each linear module of a copied layer will read."""

    def observe(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        add(sums, name, x.T @ x)

    for name, linear in linears(layer).items():
        linear.register_forward_pre_hook(functools.partial(observe, name))


def _count_inputs(layer: nn.Module, sums: dict[str, Tensor]) -> None:
    """Count the magnitudes of inputs times column norms, ``[BINS]`` for each linear module."""

    def observe(name: str, norms: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(sums, name, magnitudes.count(args[0] * norms))

    for name, linear in linears(layer).items():
        norms = linear.weight.detach().float().norm(dim=0)
        linear.register_forward_pre_hook(functools.partial(observe, name, norms))


def _observe_mixers(layer: nn.Module) -> dict[str, mixer.Observer]:
    """Let the mixers of a copied layer count what they compute."""
    found = {name: mixer.Observer() for name, m in layer.named_modules() if mixer.is_known(m)}
    for name, observer in found.items():
        mixer.attach(layer.get_submodule(name), observer)
    return found


def observe_gradients(linears: Mapping[str, nn.Linear], sums: dict[str, dict[str, Tensor]]) -> None:
    """Sum products of inputs and output gradients during the backward passes of linear modules.

    Of the statistics that ``sums`` names, ``fisher`` sums ``(g x^T)^2`` over calls, ``[out, in]``,
    ``guided_hessian`` ``mean(g^2) x x^T`` over tokens, ``[1, in, in]``, and ``output_hessian``
    ``g g^T``, ``[out, out]``.
    """

    def gradient(name: str, x: Tensor, grad: Tensor) -> None:
        g, x = grad.flatten(0, -2).float(), x.flatten(0, -2).float()
        if "fisher" in sums:
            add(sums["fisher"], name, (g.T @ x).square())
        if "guided_hessian" in sums:
            y = x * g.square().mean(1, keepdim=True).sqrt()
            add(sums["guided_hessian"], name, (y.T @ y)[None])
        if "output_hessian" in sums:
            add(sums["output_hessian"], name, g.T @ g)

    for name, linear in linears.items() if sums else ():
        on_gradient(linear, functools.partial(gradient, name))


def on_gradient(linear: nn.Module, act: Callable[[Tensor, Tensor], None]) -> None:
    """Call ``act`` with the input of a linear module and the gradient of its output, after each."""

    def observe(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(act, args[0].detach()))

    linear.register_forward_hook(observe)


def _observed(
    module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Show the queries to whoever watches the module, then attend as the model itself would."""
    observe: Any = module.squeeze_observe
    observe(query.detach(), key)
    dense: Any = module.squeeze_dense
    if dense == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[dense]
    return function(module, query, key, *args, **kwargs)  # type: ignore[no-any-return]


def _half(x: Tensor) -> Tensor:
    """Round to float16; larger values saturate."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).to(torch.float16)


def add(sums: dict[Any, Tensor], name: Any, value: Tensor) -> None:
    """Add to a named sum, in place."""
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
