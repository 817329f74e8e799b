"""Measure what methods ask of calibration text, one decoder layer at a time."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from squeeze import atomic, magnitudes, mixer
from squeeze.errors import CheckpointError, UnsupportedError
from squeeze.fused import unfuse
from squeeze.model_info import describe

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
SAMPLED_TOKENS = 8192  # of every layer, over all samples
OBSERVED = "squeeze_observed"  # our attention function that shows its queries
GROUP = 4  # samples carried through a layer together, and between two saves
PARTIAL = "calibration.partial.safetensors"

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
        _write(path, _flatten(self.tensors), {"samples": self.samples, "tokens": self.tokens})

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, about = _read(path)
        if not {"samples", "tokens"} <= about.keys():
            raise CheckpointError(str(path), "holds no calibration statistics")
        return cls(_unflatten(tensors), about["samples"], about["tokens"])


def calibrate(
    model: nn.Module,
    tokens: Tensor,
    statistics: set[str],
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    experts: bool = False,
) -> Stats:
    """Run calibration text through the model and collect the statistics.

    Decoder layers are visited one by one, forwards for their inputs and backwards for gradients;
    only the visited layer is copied and differentiated. On a CPU that copy is float32, on other
    devices it has the model's dtype. Accumulators are float32 on the CPU.

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
    run = _Run(model, tokens, statistics, experts)
    done = run.resume(folder) if folder else 0
    training = model.training
    model.eval()
    try:
        while done < len(tokens):
            group = tokens[done : done + GROUP]
            run.group(group, done)
            done += len(group)
            if folder:
                run.save(folder, done)
            if progress:
                progress("calibrate", done, len(tokens))
    finally:
        model.train(training)
    return run.stats()


@dataclass(frozen=True)
class _Call:
    """The arguments one decoder layer was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The layer's input, ``[1, T, hidden]``."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call the layer with another input, floating arguments in its dtype."""
        args = [_cast(value, hidden.dtype) for value in self.args[1:]]
        kwargs = {name: _cast(value, hidden.dtype) for name, value in self.kwargs.items()}
        if self.args:
            args.insert(0, hidden)
        else:
            kwargs["hidden_states"] = hidden
        output = layer(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Recorded(Exception):  # noqa: N818
    """Every decoder layer's arguments are known; the rest of the forward is not needed."""


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
            _add(self.sums, layer_idx, key_states.double().sum(dim=(0, 2)))
        if self.active and self.kept is not None:
            both = [x[0, :, self.kept.to(x.device)] for x in (key_states, value_states)]
            self.samples.setdefault(layer_idx, []).append(_half(torch.stack(both)))
        return key_states, value_states


class _Run:
    """Accumulators of one calibration, and the passes that feed them."""

    def __init__(
        self, model: nn.Module, tokens: Tensor, statistics: set[str], experts: bool
    ) -> None:
        self.model, self.tokens, self.experts = model, tokens, experts
        self.path, self.layers = _decoder_layers(model)
        self.attention = {info.layer: info.module for info in describe(model).attention}  # type: ignore[arg-type]
        self.sums: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(statistics)}
        self.device = next(model.parameters()).device

    def group(self, tokens: Tensor, first: int) -> None:
        """Add a few samples, the one at index ``first`` and those after it."""
        keys = _Seen(self._kept() if "kv_samples" in self.sums else None)
        calls = [self._record(sample, i, keys) for i, sample in enumerate(tokens, first)]
        inputs = [[_widen(call[0].hidden) for call in calls]]
        for index, layer in enumerate(self.layers):
            runner = self._copy(layer)
            if "kv_importance" in self.sums:
                self._watch(runner)
            seen: dict[str, Tensor] = {}
            if "hessian" in self.sums:
                _observe_inputs(runner, seen)
            counts: dict[str, Tensor] = {}
            if "input_importance" in self.sums:
                _count_inputs(runner, counts)
            observers = _observe_mixers(runner) if "mixer_magnitudes" in self.sums else {}
            with torch.no_grad():
                pairs = zip(inputs[-1], calls, strict=True)
                inputs.append([call[index].run(runner, hidden) for hidden, call in pairs])
            self._collect("hessian", index, seen)
            self._collect("input_importance", index, counts)
            self._collect("mixer_magnitudes", index, {n: o.counts for n, o in observers.items()})
        keys.active = False
        for index, total in keys.sums.items() if "key_mean" in self.sums else ():
            _add(self.sums["key_mean"], self.attention[index], total.cpu())
        for index, parts in keys.samples.items():
            self._append("kv_samples", self.attention[index], torch.cat(parts, dim=2))
        if BACKWARD & self.sums.keys():
            self._backward(tokens, inputs, calls)

    def _copy(self, layer: nn.Module) -> nn.Module:
        """Copy one layer, with its experts as linear layers where they are to be measured."""
        runner = _copy(layer)
        if self.experts:
            unfuse(runner)
        return runner

    def _collect(self, statistic: str, index: int, seen: dict[str, Tensor]) -> None:
        """Add what a few samples gave of one layer's linear modules, by name inside the layer."""
        for name, total in seen.items():
            _add(self.sums[statistic], f"{self.path}.{index}.{name}", total.cpu())

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
        return {"position_ids": torch.arange(start, start + length, device=self.device)[None]}

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
        _add(self.sums["kv_importance"], name, torch.stack([squares, tokens]).cpu())

    def _record(self, sample: Tensor, index: int, cache: DynamicCache) -> list[_Call]:
        """Learn the arguments of every decoder layer, without running any."""
        calls: list[_Call] = []

        def stand_in(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(_Call(args, kwargs))
            if len(calls) == len(self.layers):
                raise _Recorded
            return calls[-1].hidden

        try:
            with _replaced(self.layers, stand_in), torch.no_grad():
                self.model(
                    sample[None].to(self.device),
                    # A state that the first pass leaves behind would start the second.
                    **({"past_key_values": cache} if self.attention else {}),
                    use_cache=bool(self.attention),
                    **self._positions(index),
                )
        except _Recorded:
            return calls
        raise UnsupportedError(self.path, f"{len(calls)} of {len(self.layers)} layers were called")

    def _backward(
        self, tokens: Tensor, inputs: list[list[Tensor]], calls: list[list[_Call]]
    ) -> None:
        """Backpropagate each sample's loss through one layer at a time, from the last."""
        pairs = zip(tokens, inputs.pop(), strict=True)
        grads = [self._loss_grad(sample, hidden) for sample, hidden in pairs]
        for index in reversed(range(len(self.layers))):
            runner = self._copy(self.layers[index])
            linears = _linears(runner) if "fisher" in self.sums else {}
            for linear in linears.values():
                linear.weight.requires_grad_(True)
            seen: dict[str, dict[str, Tensor]] = {
                name: {} for name in ("guided_hessian", "output_hessian") if name in self.sums
            }
            _observe_gradients(runner, seen)
            for sample, source in enumerate(inputs.pop()):
                hidden = source.detach().requires_grad_(True)
                calls[sample][index].run(runner, hidden).backward(grads[sample])
                assert hidden.grad is not None
                grads[sample] = hidden.grad
                for name, linear in linears.items():
                    if linear.weight.grad is not None:
                        square = linear.weight.grad.float().square().cpu()
                        _add(self.sums["fisher"], f"{self.path}.{index}.{name}", square)
                        linear.weight.grad = None
            for statistic, sums in seen.items():
                self._collect(statistic, index, sums)

    def _loss_grad(self, sample: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of the summed next-token loss with respect to the last layer's output."""
        hidden = hidden.detach().requires_grad_(True)
        narrow = hidden.to(next(self.model.parameters()).dtype)

        def stand_in(*args: Any, **kwargs: Any) -> Tensor:
            return narrow

        ids = sample[None].to(self.device)
        with _replaced(self.layers, stand_in), torch.enable_grad():
            logits = self.model(ids, use_cache=False).logits[0, :-1].float()
            loss = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            return torch.autograd.grad(loss, hidden)[0]

    def fingerprint(self) -> str:
        """Tell runs apart that must not continue one another."""
        digest = hashlib.sha256(self.tokens.cpu().numpy().tobytes())
        asked = (sorted(self.sums), GROUP, tuple(self.tokens.shape), self.experts)
        digest.update(repr(asked).encode())
        for name, parameter in self.model.named_parameters():
            total = parameter.detach().double().sum().item()
            digest.update(repr((name, tuple(parameter.shape), total)).encode())
        return digest.hexdigest()

    def save(self, folder: Path, done: int) -> None:
        """Write the accumulators and how many samples they hold."""
        _write(folder / PARTIAL, _flatten(self.sums), {"done": done, "run": self.run_id})

    def resume(self, folder: Path) -> int:
        """Read the accumulators of a killed run; return how many samples they hold."""
        self.run_id = self.fingerprint()
        if not (folder / PARTIAL).exists():
            return 0
        tensors, about = _read(folder / PARTIAL)
        if about.get("run") != self.run_id:
            raise CheckpointError(
                str(folder / PARTIAL),
                "progress of a calibration with another model, text or statistics",
                remedy="Remove the file or choose another folder",
            )
        self.sums |= _unflatten(tensors)
        return int(about["done"])

    def stats(self) -> Stats:
        """Turn sums into means."""
        samples, count = len(self.tokens), self.tokens.numel()
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


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Find the linear modules of a layer by name."""
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def _observe_inputs(layer: nn.Module, sums: dict[str, Tensor]) -> None:
    """Sum ``x x^T`` over the tokens that each linear module of a copied layer will read."""

    def observe(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        _add(sums, name, x.T @ x)

    for name, linear in _linears(layer).items():
        linear.register_forward_pre_hook(functools.partial(observe, name))


def _count_inputs(layer: nn.Module, sums: dict[str, Tensor]) -> None:
    """Count the magnitudes of inputs times column norms, ``[BINS]`` for each linear module."""

    def observe(name: str, norms: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _add(sums, name, magnitudes.count(args[0] * norms))

    for name, linear in _linears(layer).items():
        norms = linear.weight.detach().float().norm(dim=0)
        linear.register_forward_pre_hook(functools.partial(observe, name, norms))


def _observe_mixers(layer: nn.Module) -> dict[str, mixer.Observer]:
    """Let the mixers of a copied layer count what they compute."""
    found = {name: mixer.Observer() for name, m in layer.named_modules() if mixer.is_known(m)}
    for name, observer in found.items():
        mixer.attach(layer.get_submodule(name), observer)
    return found


def _observe_gradients(layer: nn.Module, sums: dict[str, dict[str, Tensor]]) -> None:
    """Sum products of inputs and output gradients during the backward passes of a copied layer.

    ``guided_hessian`` sums ``mean(g^2) x x^T``, ``[1, in, in]``; ``output_hessian`` sums
    ``g g^T``, ``[out, out]``.
    """

    def gradient(name: str, x: Tensor, grad: Tensor) -> None:
        g = grad.flatten(0, -2).float()
        if "guided_hessian" in sums:
            y = x.flatten(0, -2).float() * g.square().mean(1, keepdim=True).sqrt()
            _add(sums["guided_hessian"], name, (y.T @ y)[None])
        if "output_hessian" in sums:
            _add(sums["output_hessian"], name, g.T @ g)

    def observe(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(gradient, name, args[0].detach()))

    for name, linear in _linears(layer).items() if sums else ():
        linear.register_forward_hook(functools.partial(observe, name))


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


def _decoder_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Find the longest module list whose members hold attention or mixers with a layer index."""
    best: tuple[str, list[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best[1]):
            indexed = (any(hasattr(m, "layer_idx") for m in layer.modules()) for layer in module)
            if all(indexed):
                best = (name, list(module))
    if not best[1]:
        raise UnsupportedError(
            type(model).__name__, "no list of decoder layers was found",
            "decoder-only models whose attention modules carry layer_idx",
        )  # fmt: skip
    return best


@contextmanager
def _replaced(layers: list[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let another function stand in for every layer's forward."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if old is not None:
                layer.__dict__["forward"] = old


def _copy(layer: nn.Module) -> nn.Module:
    """Copy one layer without gradients, in the dtype to compute in."""
    runner = copy.deepcopy(layer).requires_grad_(False)
    for module in [m for m in runner.modules() if mixer.is_known(m)]:
        mixer.attach(module, mixer.MixerState())  # calls every linear layer, so that hooks see it
    return runner.float() if next(runner.parameters()).device.type == "cpu" else runner


def _widen(hidden: Tensor) -> Tensor:
    """Half-precision products are slow on a CPU; compute in float32 there."""
    return hidden.float() if hidden.device.type == "cpu" else hidden


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating tensors, in tuples too, and leave anything else."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def _add(sums: dict[Any, Tensor], name: Any, value: Tensor) -> None:
    """Add to a named sum, in place."""
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


def _flatten(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join statistic and module name with a slash."""
    return {f"{s}/{name}": t for s, modules in tensors.items() for name, t in modules.items()}


def _unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo ``_flatten``."""
    result: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        statistic, name = key.split("/", 1)
        result.setdefault(statistic, {})[name] = tensor
    return result


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and facts about them in one step."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic.replacing(path) as draft:
        save_file(contiguous, draft, metadata={"squeeze": json.dumps(dict(about))})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and the facts beside them."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("squeeze", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})") from error
