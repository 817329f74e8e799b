"""Mixers with int8 activations: equal to a float64 oracle, step by step, restored and reloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import squeeze
from squeeze import api, mixer
from squeeze.calibrate import Stats, calibrate
from squeeze.compress import compress
from squeeze.errors import UnsupportedError
from squeeze.evaluation.scoring import negative_log_likelihood
from squeeze.linear import PackedLinear
from squeeze.swapping import Artifacts, swap
from tests import ssm

KINDS = list(ssm.CONFIGS)


def squeezed(model: Any, recipe: Any = "quamba") -> tuple[Artifacts, Stats]:
    plan = api.plan(recipe, model)
    stats = calibrate(model, ssm.prompt(6, 48, seed=5), set(plan.statistics))
    return compress(model, plan, stats), stats


def hadamard(size: int) -> Tensor:
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return torch.block_diag(*[matrix / power**0.5] * (size // power))


class Oracle:
    """One mixer in float64, token by token, from the definition of the scan."""

    def __init__(self, module: Any) -> None:
        self.module, self.state = module, module.squeeze

    def round(self, name: str, x: Tensor) -> Tensor:
        scale = getattr(self.state, name).double()
        return (x / scale).round().clamp(-127, 127) * scale

    def linear(self, name: str, x: Tensor, bias: bool = True) -> Tensor:
        layer = getattr(self.module, name)
        y = x @ layer.reconstruct().double().T
        return y + layer.bias.double() if bias and layer.bias is not None else y

    def convolve(self, x: Tensor) -> Tensor:
        weight = self.module.conv1d.weight.double()[:, 0]
        padded = functional.pad(x, (0, 0, weight.shape[1] - 1, 0))
        taps = [padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(weight.shape[1])]
        return functional.silu(sum(taps) + self.module.conv1d.bias.double())

    def scan(self, x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Run over channels: x, step ``[B, T, d]``, a ``[d, N]``, b, c ``[B, T, d, N]``."""
        memory, outputs = torch.zeros(x.shape[0], x.shape[2], a.shape[1]).double(), []
        for t in range(x.shape[1]):
            decay = torch.exp(step[:, t, :, None] * a)
            memory = decay * memory + (step[:, t] * x[:, t])[..., None] * b[:, t]
            outputs.append((memory * c[:, t]).sum(-1) + d * x[:, t])
        return torch.stack(outputs, 1)

    def output(self, y: Tensor) -> Tensor:
        return self.linear("out_proj", self.round("rotated_output", y @ hadamard(y.shape[-1])))

    def mamba(self, hidden: Tensor) -> Tensor:
        m = self.module
        x, gate = self.linear("in_proj", self.round("input", hidden)).chunk(2, -1)
        gate = self.round("gate", gate)
        x = self.round("scan_input", self.convolve(self.round("conv_input", x)))
        sizes = [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]
        rank, b, c = self.linear("x_proj", x).split(sizes, -1)
        b, c = (self.round(n, s)[:, :, None].expand(*x.shape, -1) for n, s in (("B", b), ("C", c)))
        step = self.round("step", self.linear("dt_proj", self.round("step_rank", rank), False))
        step = functional.softplus(step + m.dt_proj.bias.double())
        y = self.scan(x, step, -m.A_log.double().exp(), b, c, m.D.double())
        return self.output(y * functional.silu(gate))

    def mamba2(self, hidden: Tensor) -> Tensor:
        m = self.module
        projected = self.linear("in_proj", self.round("input", hidden))
        sizes = [m.intermediate_size, m.conv_dim, m.num_heads]
        gate, x, step = projected.split(sizes, -1)
        gate, step = self.round("gate", gate), self.round("step", step)
        shared = m.n_groups * m.ssm_state_size
        x = self.convolve(self.round("conv_input", x))
        x, b, c = x.split([m.intermediate_size, shared, shared], -1)
        x, width = self.round("scan_input", x), m.intermediate_size // m.n_groups
        b, c = (
            self.round(name, s).unflatten(-1, (m.n_groups, -1)).repeat_interleave(width, 2)
            for name, s in (("B", b), ("C", c))
        )
        step = functional.softplus(step + m.dt_bias.double()).repeat_interleave(m.head_dim, -1)
        a, d = (v.double().repeat_interleave(m.head_dim) for v in (-m.A_log.exp(), m.D))
        y = self.scan(x, step, a[:, None].expand(-1, m.ssm_state_size), b, c, d)
        y = (y * functional.silu(gate)).unflatten(-1, (m.n_groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.variance_epsilon)
        return self.output(y.flatten(-2) * m.norm.weight.double())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_equals_its_float64_oracle(kind: str) -> None:
    model = ssm.model(kind)
    artifacts, _ = squeezed(model)
    hidden = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(3))
    with swap(model, artifacts):
        module = model.backbone.layers[0].mixer
        exact = getattr(Oracle(module), kind)(hidden.double())
        got = module(hidden).double()
    # float32 may put a value that is within rounding of a grid's middle on the other side of it.
    error = (got - exact).abs()
    assert error.median() < 2e-6 * exact.abs().max()
    assert error.norm() < 2e-3 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_our_forward_without_points_is_transformers(kind: str) -> None:
    model, ids = ssm.model(kind), ssm.prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    dense = model(ids, attention_mask=mask)
    steps = [
        model(ids[:, -1:], cache_params=dense.cache_params).logits,
    ]
    for layer in model.backbone.layers:
        mixer.attach(layer.mixer, mixer.MixerState())
    ours = model(ids, attention_mask=mask)
    torch.testing.assert_close(ours.logits, dense.logits, rtol=1e-5, atol=1e-5)
    step = model(ids[:, -1:], cache_params=ours.cache_params).logits
    torch.testing.assert_close(step, steps[0], rtol=1e-5, atol=1e-5)
    for layer in model.backbone.layers:
        mixer.detach(layer.mixer)
    assert torch.equal(model(ids, attention_mask=mask).logits, dense.logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_int8_mixers_stay_near_the_dense_model_step_by_step_and_are_restored(kind: str) -> None:
    model, ids = ssm.model(kind), ssm.prompt(2, 20)
    dense = model(ids).logits
    artifacts, _ = squeezed(model)
    with swap(model, artifacts):
        assert isinstance(model.backbone.layers[1].mixer.out_proj, PackedLinear)
        whole = model(ids).logits
        out = model(ids[:, :13])
        parts = [out.logits]
        for t in range(13, 20):
            out = model(ids[:, t : t + 1], cache_params=out.cache_params)
            parts.append(out.logits)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 23)
    error = (whole - dense).norm() / dense.norm()
    assert error < 0.06
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(model(ids).logits, dense)
    assert not hasattr(model.backbone.layers[0].mixer, "squeeze")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_rotation_spreads_an_outlier_channel_of_the_output(kind: str) -> None:
    model, ids = ssm.model(kind), ssm.prompt(4, 48)
    for layer in model.backbone.layers:
        m = layer.mixer
        if kind == "mamba":
            m.in_proj.weight[m.intermediate_size] *= 60  # the gate of channel 0
        else:
            m.norm.weight[0] = 60
        m.out_proj.weight[:, 0] /= 60
    dense = model(ids).logits
    errors = {}
    for hadamard_ in (True, False):
        rule = {"method": "quamba", "hadamard": hadamard_, "targets": ["mixer"]}
        artifacts, _ = squeezed(model, {"weights": [rule]})
        with swap(model, artifacts):
            errors[hadamard_] = float((model(ids).logits - dense).norm() / dense.norm())
    assert errors[True] < 0.9 * errors[False]


@torch.no_grad()
def test_a_percentile_clips_the_scan_input_alone() -> None:
    model = ssm.model("mamba")
    scales = {}
    for percentile in (99.0, 100.0):
        rule = {"method": "quamba", "percentile": percentile, "targets": ["mixer"]}
        artifacts, stats = squeezed(model, {"weights": [rule]})
        scales[percentile] = artifacts.tables
    changed = {n for n, t in scales[99.0].items() if not torch.equal(t, scales[100.0][n])}
    assert changed == {f"backbone.layers.{i}.mixer.squeeze.scan_input" for i in range(2)}
    name = "backbone.layers.0.mixer"
    counts = mixer.by_point(stats.tensors["mixer_magnitudes"][name])["scan_input"]
    assert int(counts.sum()) == 6 * 48 * 96
    assert scales[99.0][f"{name}.squeeze.scan_input"] < scales[100.0][f"{name}.squeeze.scan_input"]


def test_histograms_do_not_depend_on_how_a_run_is_resumed(tmp_path) -> None:
    model, tokens = ssm.model("mamba2"), ssm.prompt(6, 16)
    whole = calibrate(model, tokens, {"mixer_magnitudes", "fisher"})
    stopped = []

    def stop(stage: str, done: int, total: int) -> None:
        stopped.append(done)
        if done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokens, {"mixer_magnitudes", "fisher"}, folder=tmp_path, progress=stop)
    again = calibrate(model, tokens, {"mixer_magnitudes", "fisher"}, folder=tmp_path)
    for statistic, modules in whole.tensors.items():
        for name, tensor in modules.items():
            assert torch.equal(again.tensors[statistic][name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_same_logits_and_dequantizes(kind: str, tmp_path) -> None:
    from squeeze import export

    model, ids = ssm.model(kind), ssm.prompt()
    artifacts, _ = squeezed(model)
    with swap(model, artifacts):
        logits = model(ids).logits
        export.save(model, artifacts, tmp_path)
        export.write_manifest(tmp_path, {"plan": artifacts.plan.to_dict()})
    loaded = squeeze.load(tmp_path, device="cpu")
    assert torch.equal(loaded(ids).logits, logits)
    assert loaded.backbone.layers[0].mixer.squeeze.scan_input.dtype == torch.float32
    read = export.artifacts_of(tmp_path)
    assert all(torch.equal(table, artifacts.tables[n]) for n, table in read.tables.items())
    dense = model(ids).logits
    plain = export.dequantize(loaded)
    assert type(plain.backbone.layers[0].mixer.out_proj) is torch.nn.Linear
    assert (plain(ids).logits - dense).norm() < 0.03 * dense.norm()


def test_any_weight_method_takes_the_projections_of_a_mixer() -> None:
    model, ids = ssm.model("mamba"), ssm.prompt()
    with torch.no_grad():
        dense = model(ids).logits
    recipe = {"weights": [{"method": "kmeans", "bits": 4, "granularity": "tensor"}]}
    plan = api.plan(recipe, model)
    assert {row.module.rpartition(".")[2] for row in plan.weights} == {
        "in_proj", "x_proj", "dt_proj", "out_proj",
    }  # fmt: skip
    artifacts, stats = squeezed(model, recipe)
    assert f"{plan.mixers[0].module}.dt_proj" in stats.tensors["fisher"]
    with torch.no_grad():
        with swap(model, artifacts):
            error = (model(ids).logits - dense).norm() / dense.norm()
        assert 0 < error < 0.3
        assert torch.equal(model(ids).logits, dense)


def test_a_part_of_a_mixer_or_another_model_is_refused() -> None:
    rule = {"method": "quamba", "targets": ["in_proj"]}
    with pytest.raises(UnsupportedError, match=r"whole Mamba mixers, and .*x_proj is left out"):
        api.plan({"weights": [rule]}, ssm.model("mamba"))
    with pytest.raises(UnsupportedError, match=r"MambaMixer or Mamba2Mixer"):
        api.plan({"weights": [{"method": "quamba", "targets": ["mlp"]}]})


def test_rotate_is_an_orthonormal_hadamard_matrix_and_its_own_inverse() -> None:
    for size in (1, 2, 96, 128):
        x = torch.randn(3, size, dtype=torch.float64)
        torch.testing.assert_close(mixer.rotate(x), x @ hadamard(size))
        torch.testing.assert_close(mixer.rotate(mixer.rotate(x)), x)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_state_space_models_are_scored_step_by_step_over_their_state(kind: str) -> None:
    model, ids = ssm.model(kind), ssm.prompt(2, 24)
    one_forward, _ = negative_log_likelihood(model, ids, 10, "prefill")
    steps, _ = negative_log_likelihood(model, ids, 10, "decode")
    torch.testing.assert_close(steps, one_forward, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_models_keep_float32_scales(kind: str) -> None:
    model, ids = ssm.model(kind, torch.bfloat16), ssm.prompt()
    dense = model(ids).logits
    artifacts, _ = squeezed(model)
    with swap(model, artifacts):
        logits = model(ids).logits
    assert logits.dtype == dense.dtype
    assert all(table.dtype == torch.float32 for table in artifacts.tables.values())
    assert (logits - dense).float().norm() < 0.08 * dense.float().norm()
