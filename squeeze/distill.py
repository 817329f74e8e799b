"""Tune packed weights on the dense model's own predictions: artifacts in, better artifacts out."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from squeeze import atomic
from squeeze.compress import weight_method
from squeeze.errors import CheckpointError, RecipeError, UnsupportedError
from squeeze.plan import Plan, WeightPlan
from squeeze.saved_tensors import SavedTensors
from squeeze.stacks import Stack, stacked
from squeeze.swapping import Artifacts, swap

STATE = "distill.safetensors"
EVERY = 20  # steps between two saves
WARM = 0.05  # share of the steps in which learning rates rise
BETAS = (0.9, 0.95)  # decay of the gradient's mean and of its mean square
EPSILON = 1e-10
# Settings that belong to the run and not to one module.
SHARED = (
    "steps", "codebook_steps", "batch", "echo", "own_text", "hidden", "uniquify", "marshal",
    "shard",
)  # fmt: skip

Progress = Callable[[str, int, int], None]


def distilled_rows(plan: Plan) -> list[WeightPlan]:
    """List the rows of a plan whose method is trained after it was fitted.

    Raises:
        RecipeError: rules disagree on a setting that belongs to the whole run.
    """
    rows = [
        row for row in plan.weights if hasattr(weight_method(row), "student") and not row.experts
    ]
    for name in SHARED:
        found = {getattr(weight_method(row), name) for row in rows}
        if len(found) > 1:
            raise RecipeError(
                f"weights: {name}",
                f"rules say {' and '.join(str(value) for value in sorted(found))}",
                "one value, as one training serves all rules",
                f"Give all distilled rules the same {name}",
            )
    return rows


def sequences(plan: Plan) -> int:
    """Count the sequences that training will read."""
    rows = distilled_rows(plan)
    method = weight_method(rows[0]) if rows else None
    return method.steps * method.batch if method else 0


def reading(plan: Plan) -> dict[str, float]:
    """Say what the sequences are made of: ``own`` and ``echo``, shares of them, 0 to 1."""
    rows = distilled_rows(plan)
    method = weight_method(rows[0]) if rows else None
    return {"own": method.own_text, "echo": method.echo} if method else {}


def distill(
    model: Any,
    artifacts: Artifacts,
    tokens: Tensor,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Artifacts:
    """Train what methods such as ``dkm`` fitted; other weights stay as they are.

    The loss is the divergence of the squeezed from the dense model's next-token distribution,
    ``mean KL(dense || squeezed)``, plus ``hidden`` times the relative squared error of the layers'
    outputs. Adam, a short rise of the learning rates and a cosine to zero. The model computes in
    its own dtype, parameters are float32. Other packed weights are in place while training; caches
    and attention are dense.

    Under an initialised ``torch.distributed`` each process trains on its part of every batch.

    Args:
        model: The dense model; unchanged on return.
        artifacts: What ``compress`` returned.
        tokens: int64 ``[steps * batch, T]``, no padding; each sequence is read once.
        folder: Where to save progress; a killed run with the same folder, artifacts and tokens
            resumes there and gives the same bits.
        progress: Called as ``progress("distill", steps done, steps)``.
    Returns:
        Artifacts with the trained weights, on the CPU.
    Raises:
        ValueError: too few tokens, or a batch that the processes cannot share evenly.
        CheckpointError: ``folder`` holds the progress of another run.
        UnsupportedError: sharding is asked for outside ``torch.distributed``.
    Cost: per step a forward of the dense model and a forward and backward of the squeezed one;
        16 bytes per trained weight, and what ``squeeze.saved_tensors`` leaves of 4 K bytes per
        weight and saved tensor.
    """
    if not sequences(artifacts.plan):
        return artifacts
    with training(model, artifacts, tokens) as run:
        done = run.resume(folder) if folder else 0
        while done < run.steps:
            run.step(done)
            done += 1
            if folder and (done % EVERY == 0 or done == run.steps):
                run.save(folder, done)
            if progress:
                progress("distill", done, run.steps)
        return run.artifacts()


@contextmanager
def training(model: Any, artifacts: Artifacts, tokens: Tensor) -> Iterator[Distillation]:
    """Prepare a model for training, and give it back as it was."""
    rows = distilled_rows(artifacts.plan)
    names = {row.module for row in rows}
    others = tuple(
        replace(row, implementation="reference")
        for row in artifacts.plan.weights
        if row.module not in names
    )
    rest = replace(artifacts.plan, weights=others, kv_cache=(), prefill=())
    before = {p: p.requires_grad for p in model.parameters()}
    mode = model.training
    model.eval().requires_grad_(False)
    try:
        with swap(model, replace(artifacts, plan=rest)):
            yield Distillation(model, artifacts, tokens, rows)
    finally:
        model.train(mode)
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


class Distillation:
    """One training in progress: students, their optimizer, and the text."""

    def __init__(
        self, model: Any, artifacts: Artifacts, tokens: Tensor, rows: list[WeightPlan]
    ) -> None:
        self.model, self.source, self.tokens = model, artifacts, tokens
        self.device = next(model.parameters()).device
        method = weight_method(rows[0])
        self.steps, self.batch, self.codebook_steps = (
            method.steps,
            method.batch,
            method.codebook_steps,
        )
        self.hidden = method.hidden
        if len(tokens) < self.steps * self.batch:
            raise ValueError(
                f"{self.steps} steps of {self.batch} need more than {len(tokens)} rows"
            )
        self.ranks = _ranks()
        if self.batch % self.ranks[1]:
            raise ValueError(
                f"a batch of {self.batch} cannot be shared by {self.ranks[1]} processes"
            )
        self.saved = _saved_tensors(method, self.ranks[1])
        # Hooks cost the CPU time per saved tensor, so they are set where they do something.
        asked = method.uniquify or method.marshal or method.shard
        self.hooks: AbstractContextManager[Any] = self.saved if asked else nullcontext()
        self.linears = {row.module: model.get_submodule(row.module) for row in rows}
        self.stacks = [
            Stack(group, artifacts.weights, self.linears)
            for group in stacked(rows, artifacts.weights)
        ]
        self.students = {stack.names[0]: stack.student for stack in self.stacks}
        self.soft = False
        self.losses: list[Tensor] = []
        self.moments: dict[str, dict[str, Tensor]] = {}

    def step(self, number: int) -> None:
        """Take one step of the training."""
        if number >= self.codebook_steps and not self.soft:
            self.soften()
        rank, world = self.ranks
        ids = self.tokens[number * self.batch : (number + 1) * self.batch]
        ids = ids[rank::world].to(self.device)
        with torch.no_grad():
            target = self._outputs(ids)
        with torch.enable_grad(), self.hooks, self._taught():
            loss = self._loss(self._outputs(ids), target)
        loss.backward()  # type: ignore[no-untyped-call]
        self._average()
        self._descend(self.shape(number))
        self.losses.append(loss.detach())

    def shape(self, number: int) -> float:
        """Return what multiplies the learning rates of a step."""
        rise = min(1.0, (number + 1) / max(1.0, WARM * self.steps))
        return rise * (0.5 + 0.5 * math.cos(math.pi * number / self.steps))

    def soften(self) -> None:
        """Let the weights attend to entries and train them too."""
        for stack in self.stacks:
            stack.student.soften(stack.dense(self.linears))
        self.soft = True

    def artifacts(self) -> Artifacts:
        """Return the artifacts with the weights as trained so far."""
        tuned = {name: weight for stack in self.stacks for name, weight in stack.packed()}
        return replace(self.source, weights={**self.source.weights, **tuned})

    def save(self, folder: Path, done: int) -> None:
        """Write parameters and the optimizer's state; one process does."""
        if self.ranks[0]:
            return
        tensors = {}
        for name, student in self.students.items():
            for key, value in student.state_dict().items():
                tensors[f"{name}/{key}"] = value
        for name, moments in self.moments.items():
            for key, value in moments.items():
                tensors[f"{name}/{key}"] = value
        about = {
            "done": done,
            "run": self.fingerprint(),
            "losses": [float(loss) for loss in self.losses],
        }
        with atomic.replacing(folder / STATE) as draft:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, draft, metadata={"squeeze": json.dumps(about)})

    def resume(self, folder: Path) -> int:
        """Read what ``save`` wrote, if anything; return the steps done.

        Raises:
            CheckpointError: it cannot be read, or is of another run.
        """
        path = folder / STATE
        if not path.exists():
            return 0
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                about = json.loads((file.metadata() or {}).get("squeeze", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(path), f"cannot be read ({error})") from error
        if about.get("run") != self.fingerprint():
            raise CheckpointError(
                str(path),
                "progress of a training with other weights, text or settings",
                remedy="Remove the file or choose another folder",
            )
        self._restore(tensors)
        self.losses = [torch.tensor(loss) for loss in about["losses"]]
        return int(about["done"])

    def fingerprint(self) -> str:
        """Tell trainings apart that must not continue one another."""
        digest = hashlib.sha256(self.tokens.cpu().numpy().tobytes())
        for row in self.source.plan.weights:
            digest.update(repr((row.module, sorted(row.method.items()), self.ranks[1])).encode())
            for tensor in self.source.weights[row.module].tensors().values():
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for name, parameter in self.model.named_parameters():
            digest.update(repr((name, parameter.detach().double().sum().item())).encode())
        return digest.hexdigest()

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        if any(name.endswith("/latent") for name in tensors):
            self.soften()
        for name, student in self.students.items():
            state = {key: tensors[f"{name}/{key}"] for key in student.state_dict()}
            student.load_state_dict(state)
            for key, _ in student.named_parameters():
                path = f"{name}/{key}"
                if f"{path}/count" in tensors:
                    kinds = ("mean", "square", "count")
                    self.moments[path] = {kind: tensors[f"{path}/{kind}"] for kind in kinds}

    @torch.no_grad()
    def _descend(self, shape: float) -> None:
        """Move every parameter by Adam; attending weights of a codebook share one mean square.

        Far from the border of its cell such a weight has next to no gradient; a mean square of its
        own would turn that into full steps of noise.
        """
        for name, student in self.students.items():
            for key, parameter in student.named_parameters():
                grad = parameter.grad
                if grad is None:
                    continue
                latent = key == "latent"
                square = grad.square()
                if latent and student.method.derivative == "attention":
                    square = square.mean(1, keepdim=True)
                zero = {"mean": torch.zeros_like(grad), "square": torch.zeros_like(square)}
                state = self.moments.setdefault(f"{name}/{key}", {**zero, "count": torch.zeros(())})
                state["count"] += 1
                state["mean"].lerp_(grad, 1 - BETAS[0])
                state["square"].lerp_(square, 1 - BETAS[1])
                mean = state["mean"] / (1 - BETAS[0] ** float(state["count"]))
                root = (state["square"] / (1 - BETAS[1] ** float(state["count"]))).sqrt()
                method = student.method
                rate = shape * (method.weight_rate if latent else method.entry_rate)
                parameter -= rate * mean / (root + EPSILON)
                parameter.grad = None

    @contextmanager
    def _taught(self) -> Iterator[None]:
        """Let students stand in for the dense weights."""
        for stack in self.stacks:
            for name, weight in stack.weights(self.saved):
                linear = self.linears[name]
                value = weight.to(linear.weight.dtype)
                linear.__dict__["forward"] = functools.partial(_apply, value, linear.bias)
        try:
            yield
        finally:
            for linear in self.linears.values():
                del linear.__dict__["forward"]

    def _outputs(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits ``[B, T, V]`` and, where they count, the outputs of the layers."""
        result = self.model(ids, use_cache=False, output_hidden_states=self.hidden > 0)
        return result.logits, result.hidden_states[1:] if self.hidden else ()

    def _loss(
        self,
        output: tuple[Tensor, tuple[Tensor, ...]],
        target: tuple[Tensor, tuple[Tensor, ...]],
    ) -> Tensor:
        found, wanted = (
            functional.log_softmax(logits, -1, dtype=torch.float32).flatten(0, 1)
            for logits in (output[0], target[0])
        )
        loss = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        for a, b in zip(output[1], target[1], strict=True):
            error = (a.float() - b.float()).square().mean() / b.float().square().mean()
            loss = loss + self.hidden / len(target[1]) * error
        return loss

    def _average(self) -> None:
        """Average gradients over processes."""
        world = self.ranks[1]
        if world > 1:
            for student in self.students.values():
                for parameter in student.parameters():
                    if parameter.grad is not None:
                        torch.distributed.all_reduce(parameter.grad)
                        parameter.grad /= world


def _apply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def _ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _saved_tensors(method: Any, world: int) -> SavedTensors:
    """Choose what is done to tensors saved for backward."""
    if method.shard and world == 1:
        raise UnsupportedError(
            "weights: shard", "there is one process", "torchrun with several", "Set shard: false"
        )
    return SavedTensors(
        unique=method.uniquify,
        device="cpu" if method.marshal else None,
        group=torch.distributed.group.WORLD if method.shard else None,
    )
