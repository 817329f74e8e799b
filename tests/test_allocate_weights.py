"""Allocation of weights under a bound on mean bits: what is chosen, and when uniform is kept."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import squeeze
from squeeze import api, recipe, reference
from squeeze.allocate import HELD_OUT
from squeeze.allocate_weights import (
    WEIGHT_CONTEST,
    WEIGHT_LOSS,
    allocate_weights,
    weight_contenders,
)
from squeeze.calibrate import Stats, calibrate
from squeeze.compress import compress
from squeeze.errors import RecipeError
from squeeze.evaluation.probe import make_windows
from squeeze.evaluation.suite import calibration_tokens, unread_text
from squeeze.evaluation.weight_bits import WeightProbe, choose_weights, predict_losses
from squeeze.linear import reconstruct
from squeeze.plan import Plan, repack, with_weights
from squeeze.plan_weights import mean_bits, tied, with_methods
from squeeze.recipe_values import Calibration
from tests import pico, tiny

KMEANS = {"method": "kmeans", "granularity": "tensor", "entries": "float16"}


def bounded(model, bound, **rule):
    return api.plan({"weights": {**KMEANS, "mean_bits": bound, **rule}}, model)


def stats(plan, losses, contest=((0.1, 0.1), (0.2, 0.2))):
    """Losses by group: ``(2 bits, 3 bits, 4 bits)``, all on the group's first module."""
    tensors = {}
    for group, own in zip(plan.weight_allocation.groups, losses, strict=True):
        tensors |= {name: torch.zeros(len(own)) for name in group}
        tensors[group[0]] = torch.tensor(own)
    measured = {WEIGHT_LOSS: tensors, WEIGHT_CONTEST: {HELD_OUT: torch.tensor(contest)}}
    return Stats(measured, 1, 1)


def bits(plan):
    return {row.module: row.method["bits"] for row in plan.weights}


def test_what_runtimes_fuse_is_tied(llama):
    groups = tied(f"a.{name}" for name in ("q_proj", "o_proj", "k_proj", "v_proj", "down_proj"))
    assert groups == (("a.q_proj", "a.k_proj", "a.v_proj"), ("a.o_proj",), ("a.down_proj",))
    assert len(bounded(llama, 3.2).weight_allocation.groups) == 2 * 4
    moe = bounded(tiny.model("qwen3_moe"), 4.5)
    assert ("model.layers.0.mlp.experts.gate_up_proj",) in moe.weight_allocation.groups


def test_plan_starts_uniform_and_survives_json(llama):
    plan = bounded(llama, 5.4)
    assert set(bits(plan).values()) == {5}
    assert plan.weight_allocation.candidates == tuple({**KMEANS, "bits": b} for b in (4, 5, 6))
    assert "at most 5.400 effective bits" in plan.table()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    read = recipe.load(plan.recipe)
    assert read.weights == recipe.load(read.to_dict()).weights
    assert recipe.load({"weights": [{**KMEANS, "mean_bits": 5.4}]}).weights == read.weights


def test_a_bound_below_every_candidate_is_refused(llama):
    with pytest.raises(RecipeError, match="narrowest candidate"):
        bounded(llama, 1.0)


def test_the_mix_spends_the_bound_where_it_pays_and_keeps_groups_together(llama):
    plan = bounded(llama, 3.1, candidates=[{"bits": b} for b in (2, 3, 4)])
    losses = [(1.0, 0.9, 0.8)] * 8
    losses[3], losses[4] = (9.0, 1.0, 0.1), (9.0, 1.0, 0.1)
    made = stats(plan, losses)
    mix = weight_contenders(plan, made)[0]
    found, groups = bits(mix), plan.weight_allocation.groups
    assert all(len({found[name] for name in group}) == 1 for group in groups)
    assert {found[name] for name in (*groups[3], *groups[4])} == {4}
    assert 2 in found.values()
    assert mean_bits(mix.weights, plan.weight_allocation) <= 3.1
    taken = sum(row.bytes_before - row.bytes_after for row in mix.weights)
    assert mix.weight_bytes["after"] == mix.weight_bytes["before"] - taken


@pytest.mark.parametrize(("contest", "chosen"), [
    (((0.1, 0.0), (0.2, 0.0)), "mix"), (((0.2, 0.0), (0.1, 0.0)), "uniform"),
])  # fmt: skip
def test_uniform_is_kept_unless_the_mix_measures_better(llama, contest, chosen):
    plan = bounded(llama, 3.1, candidates=[{"bits": b} for b in (2, 3, 4)])
    losses = [(1.0, 0.9, 0.8)] * 7 + [(9.0, 1.0, 0.1)]
    final = allocate_weights(plan, stats(plan, losses, contest))
    assert final.weight_allocation.chosen == chosen
    assert len(set(bits(final).values())) == (1 if chosen == "uniform" else 3)
    assert final.weight_allocation.measured == pytest.approx(
        dict(zip(("mix", "uniform"), (row[0] for row in contest), strict=True))
    )
    assert "nats per token" in final.notes[-1]
    assert allocate_weights(api.plan({"weights": [KMEANS]}, llama), stats(plan, losses)).notes


def test_predicted_losses_are_importance_times_squared_errors():
    model, tokens = tiny.model("qwen3_moe"), tiny.prompt(2, 6)["input_ids"]
    plan = bounded(model, 4.5)
    measured = calibrate(model, tokens, set(plan.statistics), experts=True)
    variants = [
        compress(model, with_weights(plan, uniform(plan, index)), measured) for index in range(3)
    ]
    found = predict_losses(model, variants, measured).tensors[WEIGHT_LOSS]
    name = "model.layers.1.self_attn.o_proj"
    weight = model.get_submodule(name).weight
    for index, made in enumerate(variants):
        errors = reconstruct(made.weights[name]) - weight
        expected = (measured.tensors["fisher"][name] * errors.square()).sum()
        torch.testing.assert_close(found[name][index], expected)
    experts = found["model.layers.0.mlp.experts.down_proj"]
    assert experts[0] > experts[1] > experts[2] > 0


def uniform(plan, index):
    allocation = plan.weight_allocation
    methods = [allocation.candidates[index]] * len(allocation.groups)
    return with_methods(plan.weights, allocation, methods, repack)


def test_unread_text_shares_nothing_with_the_samples():
    settings = Calibration(samples=8, length=64)
    tokenizer = AutoTokenizer.from_pretrained(reference.path())
    left = unread_text(settings)
    whole = "\n".join(reference.calibration_passages())
    assert 0.9 * len(whole) < len(left) < len(whole)
    for row in calibration_tokens(tokenizer, settings):
        assert tokenizer.decode(row[8:]) not in left
    assert unread_text(Calibration(samples=4000)) == whole


def test_choose_weights_measures_fits_and_resumes(tmp_path):
    folder = pico.save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    plan = bounded(model, 3.5, candidates=[{"bits": 2}, {"bits": 4}])
    settings = Calibration(samples=2, length=64)
    measured = calibrate(model, calibration_tokens(tokenizer, settings), {"fisher"})
    text, work = unread_text(settings), tmp_path / "work"
    final, found, weights = choose_weights(model, tokenizer, plan, measured, text, folder=work)
    assert weights.keys() == {row.module for row in plan.weights}
    for row in final.weights:
        assert weights[row.module].nbytes == row.bytes_after
    assert final.weight_allocation.chosen in ("mix", "uniform")
    mean = mean_bits(final.weights, final.weight_allocation)
    assert 2 < mean <= 3.5
    again = choose_weights(model, tokenizer, plan, measured, text, folder=work)
    assert again[0] == final
    windows = make_windows(tokenizer, text, most=1024)
    probe = WeightProbe(model, windows)
    assert probe.measure() == (0.0, 0.0)
    artifacts = compress(model, final, found, fitted=weights)
    assert artifacts.weights == weights
    chosen = final.weight_allocation
    with squeeze.swap(model, artifacts):
        divergence, rise = probe.measure()
    assert divergence == pytest.approx(chosen.measured[chosen.chosen], rel=1e-4)
    assert abs(rise) < 10 * divergence + 0.1
    assert dataclasses.asdict(chosen)["mean_bits"] == 3.5
