"""Small inputs are left out in decode alone, by thresholds that follow the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import squeeze
from squeeze import api, export
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import RecipeError, UnsupportedError
from squeeze.sparse_inputs import InputState, Phase, attach, detach
from squeeze.swapping import Artifacts, swap
from squeeze.types import Implementation
from tests import ssm, tiny

HALF = {"activations": [{"method": "activation_sparsity", "sparsity": 0.5}]}
LAYERS = ("q_proj", "o_proj", "down_proj")


def tokens(count: int, length: int, seed: int = 5) -> torch.Tensor:
    return tiny.prompt(count, length, seed=seed)["input_ids"]


def squeezed(model: Any, recipe: Any = HALF) -> Artifacts:
    plan = api.plan(recipe, model)
    stats = calibrate(model, tokens(6, 64), set(plan.statistics))
    return compress(model, plan, stats)


def continued(model: Any, ids: torch.Tensor, start: int, chunk: int) -> torch.Tensor:
    """Logits after ``start`` tokens, the rest fed ``chunk`` at a time over the cache."""
    out = model(ids[:, :start], use_cache=True)
    parts = []
    for t in range(start, ids.shape[1], chunk):
        out = model(ids[:, t : t + chunk], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def test_the_share_of_zeroed_inputs_is_the_recipes_and_follows_column_norms() -> None:
    model = tiny.model("llama")
    artifacts = squeezed(model)
    plan = artifacts.plan
    assert {r.module.rpartition(".")[2] for r in plan.activations} == set(LAYERS)
    assert plan.statistics == ("input_importance",)
    assert not plan.lossless
    seen: dict[str, list[float]] = {}

    def look(name: str) -> Any:
        threshold = artifacts.tables[f"{name}.squeeze.threshold"]

        def hook(module: Any, args: Any) -> None:
            seen.setdefault(name, []).append(float((args[0].abs() <= threshold).float().mean()))

        return hook

    hooks = [
        model.get_submodule(row.module).register_forward_pre_hook(look(row.module))
        for row in plan.activations
    ]
    model(tokens(6, 64))  # what calibration saw
    for hook in hooks:
        hook.remove()
    assert all(abs(shares[0] - 0.5) < 0.01 for shares in seen.values())
    for row in plan.activations:
        cost = artifacts.tables[f"{row.module}.squeeze.threshold"] * model.get_submodule(
            row.module
        ).weight.norm(dim=0)
        torch.testing.assert_close(cost, cost[:1].expand_as(cost))


@torch.no_grad()
def test_the_prompt_is_dense_and_decode_is_what_zeroed_inputs_give() -> None:
    model, ids = tiny.model("llama"), tokens(2, 40, seed=1)
    dense, dense_step = model(ids).logits, continued(model, ids, 30, 1)
    artifacts = squeezed(model)
    with swap(model, artifacts):
        assert torch.equal(model(ids).logits, dense)
        sparse = continued(model, ids, 30, 1)
        together = continued(model, ids, 30, 10)
    assert torch.equal(continued(model, ids, 30, 1), dense_step)
    torch.testing.assert_close(together, sparse, rtol=1e-4, atol=1e-4)
    hooks = []
    for row in artifacts.plan.activations:
        threshold = artifacts.tables[f"{row.module}.squeeze.threshold"]

        def zero(module: Any, args: Any, threshold: torch.Tensor = threshold) -> Any:
            # Steps alone have one token here.
            x = args[0]
            return (torch.where(x.abs() > threshold, x, 0),) if x.shape[1] == 1 else args

        hooks.append(model.get_submodule(row.module).register_forward_pre_hook(zero))
    torch.testing.assert_close(continued(model, ids, 30, 1), sparse, rtol=1e-5, atol=1e-5)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(sparse, dense_step, atol=1e-3)


@torch.no_grad()
def test_everything_is_undone_and_generate_works_in_batches() -> None:
    model = tiny.model("qwen2")
    batch = tiny.prompt(2, 24, pads=(0, 7))
    dense = model.generate(**batch, max_new_tokens=6, do_sample=False)
    artifacts = squeezed(model)
    names = {name for name, _ in model.named_buffers()}
    with swap(model, artifacts):
        sparse = model.generate(**batch, max_new_tokens=6, do_sample=False)
        alone = model.generate(batch["input_ids"][1:, 7:], max_new_tokens=6, do_sample=False)
    assert sparse.shape == dense.shape
    assert torch.equal(sparse[1, -6:], alone[0, -6:])
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), dense)
    assert {name for name, _ in model.named_buffers()} == names
    assert all(module.__dict__.get("forward") is None for module in model.modules())


@torch.no_grad()
def test_it_composes_with_packed_weights_and_a_packed_cache() -> None:
    model, ids = tiny.model("llama"), tokens(1, 60, seed=1)
    weights = {"weights": [{"method": "kmeans", "bits": 4, "importance": "none"}]}
    cache = {
        "kv_cache": {
            "keys": {"method": "float8"},
            "values": {"method": "float8"},
            "residual_length": 8,
            "block_length": 32,
        }
    }
    both = squeezed(model, weights | cache | HALF)
    assert "weights read whole" in " ".join(both.plan.notes)
    with swap(model, both):
        got = continued(model, ids, 40, 1)
        for row in both.plan.activations:
            linear = model.get_submodule(row.module)
            linear.squeeze.threshold.zero_()
        loose = continued(model, ids, 40, 1)
    with swap(model, squeezed(model, weights | cache)):
        packed = continued(model, ids, 40, 1)
    torch.testing.assert_close(loose, packed)
    assert not torch.allclose(got, packed, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_gives_the_same_steps_and_dequantizes(packed: bool, tmp_path) -> None:
    model, ids = tiny.model("llama"), tokens(1, 40, seed=1)
    dense = continued(model, ids, 30, 1)
    weights = {"weights": [{"method": "kmeans", "bits": 4, "importance": "none"}]}
    artifacts = squeezed(model, HALF | (weights if packed else {}))
    with swap(model, artifacts):
        steps = continued(model, ids, 30, 1)
        export.save(model, artifacts, tmp_path)
        export.write_manifest(tmp_path, {"plan": artifacts.plan.to_dict()})
    loaded = squeeze.load(tmp_path, device="cpu")
    assert torch.equal(continued(loaded, ids, 30, 1), steps)
    plain = export.dequantize(loaded)
    error = (continued(plain, ids, 30, 1) - dense).norm() / dense.norm()
    assert error < 0.3 if packed else error == 0


def test_the_weight_lies_as_the_kernel_reads_it_and_goes_back() -> None:
    linear = torch.nn.Linear(6, 10).requires_grad_(False)
    before = linear.weight.clone()
    attach(linear, InputState(torch.zeros(6), Phase(), Implementation.TRITON))
    assert linear.weight.stride() == (1, 10)
    assert torch.equal(linear.weight, before)
    assert torch.equal(linear.half().squeeze.threshold, torch.zeros(6))
    linear.float()
    detach(linear)
    assert linear.weight.is_contiguous()


def test_what_cannot_be_sparse_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no attention cache"):
        api.plan(HALF, ssm.model("mamba"))
    rule = {"method": "activation_sparsity", "targets": ["nothing"]}
    with pytest.raises(RecipeError, match=r"activations\.0\.targets.*matches no linear layer"):
        api.plan({"activations": [rule]})
    with pytest.raises(RecipeError, match="above 0"):
        api.plan({"activations": [{"method": "activation_sparsity", "sparsity": 0.0}]})
    with pytest.raises(RecipeError, match=r"activations\.0\.method: is missing"):
        api.plan({"activations": [{"bits": 16}]})
    scaled = {"weights": [{"method": "integer", "bits": 4, "scaling": "awq"}]}
    with pytest.raises(UnsupportedError, match="are scaled for its packed weight"):
        api.plan(scaled | HALF)
