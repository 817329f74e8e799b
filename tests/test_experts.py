"""Mixtures of experts: packed, computed by the model's own rules, saved, restored."""

import pytest
import torch
from torch import nn

import squeeze
from squeeze import api, export
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.expert_fit import note_unrouted
from squeeze.experts import PackedExperts, PackedStack, expert_matrices
from squeeze.fused import fused_shapes, unfuse
from squeeze.loading import load_model
from tests import tiny

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
RECIPE = {"weights": [{"method": "kmeans", "bits": 4, "importance": "none"}]}


def made(model, recipe=RECIPE, tokens=None):
    plan = api.plan(recipe, model)
    tokens = tiny.prompt(2, 64)["input_ids"] if tokens is None else tokens
    stats = calibrate(model, tokens, set(plan.statistics), experts=True)
    return compress(model, note_unrouted(plan, stats), stats)


def with_reconstructed(model, artifacts):
    """The dense model over the values that packed weights stand for."""
    with squeeze.swap(model, artifacts):
        stacks = {n: m.reconstruct() for n, m in model.named_modules() if hasattr(m, "reconstruct")}
    with torch.no_grad():
        for name, weight in stacks.items():
            if name in fused_shapes(model):
                for expert, matrix in enumerate(expert_matrices(model, name)):
                    matrix.copy_(weight[expert])
            else:
                model.get_submodule(name).weight.copy_(weight)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_lists_experts_with_their_bytes(family):
    model = tiny.model(family)
    plan = api.plan(RECIPE, model)
    rows = {row.module: row for row in plan.weights if row.experts}
    assert len(rows) == 4
    assert not any("experts" in note for note in plan.notes)
    fused = {n: p for n, p in model.named_parameters() if p.ndim == 3}
    assert rows.keys() == fused.keys()
    for name, row in rows.items():
        assert row.bytes_before == 4 * fused[name].numel()
    artifacts = made(model)
    for row in plan.weights:
        assert artifacts.weights[row.module].nbytes == row.bytes_after
        assert artifacts.weights[row.module].effective_bits == pytest.approx(row.effective_bits)
    assert type(plan).from_dict(plan.to_dict()) == plan
    assert plan.effective_bits["weights"] < 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["row", "tile"])
def test_logits_equal_those_of_dense_experts_with_the_same_values(family, granularity):
    model, ids = tiny.model(family), tiny.prompt(2, 40)["input_ids"]
    before = model(ids).logits.detach()
    recipe = {"weights": [{**RECIPE["weights"][0], "granularity": granularity, "bits": 3}]}
    artifacts = made(model, recipe)
    with squeeze.swap(model, artifacts):
        assert sum(isinstance(m, PackedExperts) for m in model.modules()) == 2
        assert not [n for n, p in model.named_parameters() if p.ndim == 3]
        packed = model(ids).logits
        single = model(ids[:1, :5]).logits
    assert torch.equal(model(ids).logits, before)
    dense = with_reconstructed(model, artifacts)
    expected = dense(ids).logits.detach()
    scale = float(expected.abs().max())
    assert (packed - before).abs().max() > 1e-3 * scale
    torch.testing.assert_close(packed, expected, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(single, packed[:1, :5], rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_slot_by_slot_is_the_same(family, monkeypatch):
    model, ids = tiny.model(family), tiny.prompt(1, 6)["input_ids"]
    with squeeze.swap(model, made(model)):
        grouped = model(ids).logits
        monkeypatch.setattr(PackedExperts, "recordable", lambda self, ids: True)
        torch.testing.assert_close(model(ids).logits, grouped, rtol=1e-5, atol=1e-5)


def test_only_hit_experts_are_computed(monkeypatch):
    model = tiny.model("mixtral", num_local_experts=8)
    seen = []
    product = PackedStack.product

    def counted(self, x, bias, expert):
        seen.append((expert, len(x)))
        return product(self, x, bias, expert)

    monkeypatch.setattr(PackedStack, "product", counted)
    with squeeze.swap(model, made(model)):
        model(tiny.prompt(1, 1)["input_ids"])
    assert len(seen) == 2 * 2 * 2  # layers, chosen experts, projections
    assert all(rows == 1 for _, rows in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_are_the_same_experts(family):
    model, ids = tiny.model(family), tiny.prompt(2, 40)["input_ids"]
    before = model(ids).logits.detach()
    unfuse(model)
    assert not [n for n, p in model.named_parameters() if p.ndim == 3]
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_of_experts_is_the_squared_gradient_of_their_part(family):
    model, tokens = tiny.model(family), torch.randint(3, 128, (3, 12))
    stats = calibrate(model, tokens, {"fisher"}, experts=True)
    for name, (experts, *_) in fused_shapes(model).items():
        parameter = model.get_parameter(name)
        total = torch.zeros_like(parameter)
        for sample in tokens:
            logits = model(sample[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, sample[1:], reduction="sum")
            total += torch.autograd.grad(loss, parameter)[0].square()
        for expert in range(experts):
            expected = total[expert] / len(tokens)
            expected = expected.T if family == "gpt_oss" else expected
            found = stats.tensors["fisher"].get(f"{name}.{expert}", torch.zeros_like(expected))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)


def test_experts_that_no_token_reached_are_fitted_without_importance():
    model = tiny.model("qwen3_moe", num_experts=16)
    tokens = tiny.prompt(1, 3)["input_ids"]
    recipe = {"weights": [{"method": "kmeans", "bits": 3}]}
    artifacts = made(model, recipe, tokens)
    note = next(n for n in artifacts.plan.notes if "no calibration token" in n)
    stats = calibrate(model, tokens, {"fisher"}, experts=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    silent = [e for e in range(16) if f"{name}.{e}" not in stats.tensors["fisher"]]
    assert 10 <= len(silent) < 16
    assert note.startswith(f"{2 * len(silent)} experts") or "layers 0-1" in note
    plain = made(model, {"weights": [{"method": "kmeans", "bits": 3, "importance": "none"}]})
    for expert in range(16):
        mine, other = (
            {n: t[expert] for n, t in a.weights[name].tensors().items()} for a in (artifacts, plain)
        )
        same = all(torch.equal(mine[n], other[n]) for n in mine)
        assert same == (expert in silent)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_experts_are_the_same(family, tmp_path):
    model, folder = tiny.model(family), tmp_path / "made"
    ids = tiny.prompt(1, 20)["input_ids"]
    packed = made(model)
    squeeze.swap(model, packed)
    expected = model(ids).logits
    export.save(model, packed, folder)
    export.write_manifest(folder, {"plan": packed.plan.to_dict()})
    loaded = squeeze.load(folder)
    assert torch.equal(loaded(ids).logits, expected)
    again = export.artifacts_of(folder)
    for name, weight in packed.weights.items():
        for part, tensor in weight.tensors().items():
            assert torch.equal(again.weights[name].tensors()[part], tensor)
    loaded.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.equal(again(ids).logits, expected)
    export.dequantize(loaded)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, PackedExperts | PackedStack) for m in loaded.modules())
