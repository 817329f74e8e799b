"""Budgets of heads: chosen by what they lose, measured beside the dense model, kept in the plan."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

import squeeze
import tests.pico
from squeeze import api, recipe
from squeeze.allocate_prefill import allocate_prefill, spread
from squeeze.calibrate import Stats
from squeeze.compress import compress
from squeeze.errors import RecipeError, UnsupportedError
from squeeze.evaluation.head_budgets import (
    choose_budgets,
    measure_curves,
    output_gram,
    quoting_samples,
)
from squeeze.loading import load_tokenizer
from squeeze.plan_prefill import PREFILL_CURVES
from squeeze.sparsify.prefill.antidiagonal import Antidiagonal
from tests import tiny

POLICY = {"method": "antidiagonal", "min_length": 128}
RECIPE = {"attention": {"prefill": POLICY, "mean_density": 0.8, "length": 1024}}


def best(curves, mean_density):
    """Try every combination; return the least sum of losses under the bound."""
    found = []
    for picks in itertools.product(*(range(len(curve)) for curve in curves)):
        points = [curve[pick] for curve, pick in zip(curves, picks, strict=True)]
        if sum(cost for cost, _ in points) <= mean_density * len(curves) + 1e-12:
            found.append(sum(loss for _, loss in points))
    return min(found)


@pytest.mark.parametrize("seed", range(20))
def test_spread_is_close_to_the_best_of_all_choices(seed):
    generator = random.Random(seed)
    curves = []
    for _ in range(5):
        costs = sorted(generator.uniform(0, 1) for _ in range(5))
        losses = sorted((generator.uniform(0, 1) ** 3 for _ in range(5)), reverse=True)
        curves.append(list(zip(costs, losses, strict=True)))
    bound = generator.uniform(0.4, 0.8)
    picks = spread(curves, bound)
    points = [curve[pick] for curve, pick in zip(curves, picks, strict=True)]
    least = sum(min(curve)[0] for curve in curves)
    assert sum(cost for cost, _ in points) <= max(5 * bound, least)
    # Greedy along the hulls misses the optimum by at most one step of one head.
    steps = [max(a[1] - b[1] for a, b in itertools.pairwise(curve)) for curve in curves]
    assert sum(loss for _, loss in points) <= best(curves, max(bound, least / 5)) + max(steps)


def test_spread_by_hand():
    # The second head saves more per density; a point above the hull is never taken.
    curves = [[(0.1, 0.5), (0.5, 0.4)], [(0.1, 1.0), (0.2, 0.9), (0.3, 0.1), (1.0, 0.1)]]
    assert spread(curves, 0.05) == [0, 0]
    assert spread(curves, 0.2) == [0, 2]
    assert spread(curves, 0.4) == [1, 2]
    assert spread(curves, 1.0) == [1, 2]


def test_the_loss_is_the_error_of_what_the_head_adds_to_the_stream():
    model = tiny.model("llama")
    policy = {**POLICY, "max_density": 1.0}
    plan = api.plan({"attention": {"prefill": policy}}, model)
    ids = tiny.prompt(1, 1600)["input_ids"]
    first, second = plan.prefill
    stats = measure_curves(model, plan, ids.tolist())
    curves = stats.tensors[PREFILL_CURVES][second.module]
    assert curves.shape == (4, 11, 2)
    seen = {}
    hooks = [
        model.get_submodule(second.module).register_forward_hook(
            lambda module, args, output: seen.update(output=output[0][0, -400:])
        ),
        model.model.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(stream=(*args, *kwargs.values())[0][0, -400:]),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        model(ids)
        dense, stream = seen["output"], seen["stream"]
        heads = {**policy, "heads": [1.0, 0.5, 1.0, 1.0]}  # one head alone leaves anything out
        alone = (replace(first, policy=None, reason="dense"), replace(second, policy=heads))
        with squeeze.swap(model, compress(model, replace(plan, prefill=alone), None)):
            model(ids)
            density = model.squeeze_statistics()["density"]
    for hook in hooks:
        hook.remove()
    error = (seen["output"] - dense).square().sum(-1) / stream.square().sum(-1)
    assert float(error.mean()) == pytest.approx(float(curves[1, 0, 1]), rel=1e-3)
    assert density[0] == [1.0] * 4
    assert density[1][1] == pytest.approx(float(curves[1, 0, 0]), rel=1e-6)
    assert density[1][0] == density[1][2] == 1.0


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox", "opt"])
def test_it_measures_other_families(name):
    model = tiny.model(name)
    before = model(tiny.prompt(1, 200)["input_ids"]).logits
    plan = api.plan({"attention": {"prefill": POLICY}}, model)
    stats = measure_curves(model, plan, tiny.prompt(1, 1200)["input_ids"].tolist())
    rows = [row for row in plan.prefill if row.policy]
    assert set(stats.tensors[PREFILL_CURVES]) == {row.module for row in rows}
    for curve in stats.tensors[PREFILL_CURVES].values():
        assert (curve[:, 1:, 0] >= curve[:, :-1, 0] - 1e-6).all()
        assert (curve[:, 0, 1] > 0).all()
    assert torch.equal(model(tiny.prompt(1, 200)["input_ids"]).logits, before)
    assert not any("squeeze_watcher" in vars(module) for module in model.modules())


def test_the_gram_matrix_is_that_of_the_output_projection():
    module = tiny.model("llama").model.layers[0].self_attn
    weight = module.o_proj.weight.unflatten(1, (4, 16))  # [hidden, H, D]
    expected = torch.einsum("ohd,ohe->hde", weight, weight)
    torch.testing.assert_close(output_gram(module, 4, 16), expected)
    assert torch.equal(output_gram(torch.nn.Identity(), 2, 3), torch.eye(3).expand(2, 3, 3))


def test_samples_quote_their_own_beginning():
    tokenizer = load_tokenizer("reference")
    text = " ".join(f"word{i} is {i * i}." for i in range(20000))
    rows = quoting_samples(tokenizer, [text], 2048, 3, 0)
    assert [len(row) for row in rows] == [2048] * 3
    assert rows == quoting_samples(tokenizer, [text], 2048, 3, 0)
    assert rows[0] != rows[1]
    for row in rows:
        early = " ".join(map(str, row[:1536]))
        quotes = row[1792:]
        found = [" ".join(map(str, quotes[i : i + 8])) in early for i in range(248)]
        assert sum(found) > 100
    with pytest.raises(RecipeError, match=r"attention\.length"):
        quoting_samples(tokenizer, ["too short"], 2048, 1, 0)


def test_a_run_keeps_the_budgets_in_its_plan(tmp_path):
    folder = tests.pico.save(tmp_path / "pico")
    result = api.run(RECIPE, folder, tmp_path / "out", evaluate=False)
    heads = [row.policy["heads"] for row in result.plan.prefill]
    assert all(len(row) == 2 for row in heads)
    assert all(budget in Antidiagonal.ladder for row in heads for budget in row)
    notes = [note for note in result.plan.notes if note.startswith("prefill: budgets of 4 heads")]
    assert len(notes) == 1
    assert "heads each its own" in result.plan.table()
    again = api.load(tmp_path / "out")
    policies = [state.policy for state in again.squeeze_swap.states.values()]
    assert [list(policy.heads) for policy in policies] == heads
    ids = torch.randint(0, 8192, (1, 700), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids).logits, result.model(ids).logits)


def test_finished_curves_are_found_again(tmp_path, monkeypatch):
    model, plan = tiny.model("llama"), api.plan(RECIPE, tiny.model("llama"))
    tokenizer, texts = load_tokenizer("reference"), ["x y z " * 9000]
    monkeypatch.setattr(
        "squeeze.evaluation.head_budgets.quoting_samples",
        lambda *arguments: tiny.prompt(2, 1200)["input_ids"].tolist(),
    )
    steps = []
    made = choose_budgets(
        model, tokenizer, plan, texts, 0.8, 1200, folder=tmp_path,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [("budgets", 1, 2), ("budgets", 2, 2)]
    monkeypatch.setattr("squeeze.evaluation.head_budgets.measure_curves", None)
    assert choose_budgets(model, tokenizer, plan, texts, 0.8, 1200, folder=tmp_path) == made


def test_a_bound_below_every_head_is_said():
    model = tiny.model("llama")
    plan = api.plan(RECIPE, model)
    curves = {row.module: torch.full((4, 11, 2), 0.9) for row in plan.prefill}
    made = allocate_prefill(plan, Stats({PREFILL_CURVES: curves}, 1, 100), 0.5)
    assert "over the bound of 0.5: no budget reads less" in made.notes[-1]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"prefill": {"method": "grid"}, "mean_density": 0.3}, r"'grid' has no budget per head"),
        ({"prefill": POLICY, "mean_density": 1.5}, r"mean_density: got 1.5"),
        ({"prefill": POLICY, "mean_density": 0.3, "length": 100}, r"length: got 100"),
    ],
)
def test_what_cannot_be_bounded_is_refused(attention, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load({"attention": attention})


def test_budgets_of_another_number_of_heads_are_refused():
    policy = {**POLICY, "heads": [0.5, 0.6]}
    with pytest.raises(UnsupportedError, match="2 budgets for 4 query heads"):
        api.plan({"attention": {"prefill": policy}}, tiny.model("llama"))


def test_a_recipe_is_written_as_it_was_read():
    made = recipe.load(RECIPE)
    assert recipe.load(made.to_dict()).attention == made.attention
    assert made.attention.mean_density == 0.8
