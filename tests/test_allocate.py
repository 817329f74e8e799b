"""Allocation: the best mix under a bound, checked against uniform, and its mistakes named."""

from __future__ import annotations

import itertools
import json
import random

import jsonschema
import pytest
import torch

from squeeze import api, recipe
from squeeze.allocate import CONTEST, HELD_OUT, allocate, contenders, pick
from squeeze.calibrate import Stats
from squeeze.errors import RecipeError
from squeeze.plan import KV_LOSS, Plan
from squeeze.plan_cache import cache_bits
from tests import tiny

CACHE = {
    "keys": {"method": "affine", "granularity": "channel", "group_size": 64},
    "values": {"method": "affine", "granularity": "token", "group_size": 16},
    "candidates": {side: [{"bits": width} for width in (2, 4, 8)] for side in ("keys", "values")},
}


def planned(**cache) -> Plan:
    model = tiny.model("llama", num_hidden_layers=4)
    return api.plan({"kv_cache": {**CACHE, "mean_bits": 5.0, **cache}}, model)


def stats(plan: Plan, losses, contest=None) -> Stats:
    """Statistics with ``losses(layer, side)`` as the divergences of the three candidates."""
    table = {
        row.module: torch.tensor([[[d, 0.0] for d in losses(row.layer, s)] for s in (0, 1)])
        for row in plan.kv_cache
    }
    tensors = {KV_LOSS: table}
    if contest is not None:
        tensors[CONTEST] = {HELD_OUT: torch.tensor([[loss, 0.0] for loss in contest])}
    return Stats(tensors, 1, 1)


def one_matters(layer, side):
    """Only the keys of layer 2 matter."""
    return (1.0, 0.1, 0.01) if (layer, side) == (2, 0) else (1e-4, 1e-5, 1e-6)


def test_pick_finds_what_trying_everything_finds() -> None:
    generator = random.Random(0)
    for _ in range(20):
        groups = [
            [(generator.choice((2, 3, 4.5, 8)), generator.random() ** 3) for _ in range(3)]
            for _ in range(6)
        ]
        budget = sum(min(cost for cost, _ in group) for group in groups) + generator.random() * 9
        best = min(
            sum(loss for _, loss in chosen)
            for chosen in itertools.product(*groups)
            if sum(cost for cost, _ in chosen) <= budget
        )
        chosen = [group[index] for group, index in zip(groups, pick(groups, budget), strict=True)]
        assert sum(cost for cost, _ in chosen) <= budget
        # Each of the six steps may take a choice whose loss is 1/256 above the best.
        assert sum(loss for _, loss in chosen) <= best * (1 + 1 / 256) ** 6


def test_pick_affords_hundreds_of_groups_of_uneven_costs() -> None:
    generator = random.Random(1)
    groups = [
        [(bits + generator.random(), generator.random() / bits) for bits in (2, 3, 4, 8)]
        for _ in range(160)
    ]
    budget = 160 * 4.0
    chosen = [group[index] for group, index in zip(groups, pick(groups, budget), strict=True)]
    assert budget - 8 < sum(cost for cost, _ in chosen) <= budget


def test_bits_go_where_they_were_measured_to_matter() -> None:
    plan = planned()
    done = allocate(plan, stats(plan, one_matters, contest=[0.01, 0.2, 0.3]))
    assert done.allocation.chosen == "mix"
    assert done.allocation.measured["mix"] == pytest.approx(0.01)
    assert done.kv_cache[2].key_bits == 8.5
    assert cache_bits(done.kv_cache) <= 5.0
    assert sum(done.effective_bits[side] for side in ("keys", "values")) / 2 <= 5.0
    assert done.kv_bytes["after"] < done.kv_bytes["before"]
    assert "formats differ between layers, under a bound of 5.000 mean bits" in done.table()
    assert "layers 2: keys affine" in done.table()
    assert Plan.from_dict(json.loads(json.dumps(done.to_dict()))) == done


def test_uniform_stays_where_the_mix_does_not_beat_it() -> None:
    plan = planned()
    measured = stats(plan, one_matters)
    mix, *uniform = contenders(plan, measured)
    assert mix.kv_cache != uniform[0].kv_cache
    contest = [0.2] + [0.2 + 0.1 * i for i in range(len(uniform))]
    done = allocate(plan, stats(plan, one_matters, contest))
    assert done.allocation.chosen == "uniform"
    assert done.kv_cache == uniform[0].kv_cache
    assert "does not beat" in done.notes[-1]


def test_equal_losses_ask_for_no_mix() -> None:
    plan = planned(mean_bits=3.25)
    done = allocate(plan, stats(plan, lambda *_: (1.0, 0.5, 0.2), contest=[0.2, 0.2]))
    assert done.allocation.chosen == "uniform"
    assert "no difference between layers" in done.notes[-1]


def test_a_mix_that_was_not_measured_says_so() -> None:
    plan = planned()
    done = allocate(plan, stats(plan, one_matters))
    assert done.allocation.chosen == "mix"
    assert "not measured as a whole" in done.notes[-1]


def test_a_plan_without_a_bound_is_returned_as_it_is() -> None:
    plan = api.plan("kv4")
    assert allocate(plan, Stats({}, 0, 0)) is plan
    assert plan.allocation is None


def test_the_plan_shows_the_bound_and_the_widest_uniform_choices() -> None:
    plan = planned()
    assert plan.statistics == (KV_LOSS,)
    assert plan.allocation.layers == (0, 1, 2, 3)
    assert "at most 5.000 effective bits" in plan.table()
    assert {(row.key_bits, row.value_bits) for row in plan.kv_cache} == {(4.5, 4.0)}
    _, *uniform = contenders(plan, stats(plan, one_matters))
    found = {(p.effective_bits["keys"], p.effective_bits["values"]) for p in uniform}
    assert found == {(4.5, 4.0), (2.5, 6.0)}  # neither holds the other; 4.5 and 6.0 is too wide


def test_layers_that_the_recipe_names_keep_what_it_says_and_count() -> None:
    pinned = [{"match": [-1], "keys": {"bits": 8}, "values": {"bits": 8}}]
    plan = planned(mean_bits=5.5, layers=pinned)
    done = allocate(plan, stats(plan, one_matters, contest=[0.0, 1.0, 1.0]))
    assert plan.allocation.layers == (0, 1, 2)
    assert (done.kv_cache[3].key_bits, done.kv_cache[3].value_bits) == (8.5, 10.0)
    assert done.kv_cache[2].key_bits == 8.5
    assert cache_bits(done.kv_cache) <= 5.5


def test_candidates_are_the_methods_widths_unless_given_and_bring_their_statistics() -> None:
    loaded = recipe.load({"kv_cache": {"mean_bits": 3}})
    widths = [side.method.parameters["bits"] for side in loaded.kv_cache.candidates.keys]
    assert widths == [2, 3, 4, 8]
    assert recipe.load(loaded.to_dict()).to_dict() == loaded.to_dict()
    centred = {**CACHE["candidates"], "keys": [{"bits": 2}, {"bits": 4, "transforms": ["center"]}]}
    assert planned(candidates=centred).statistics == ("key_mean", KV_LOSS)


def test_a_candidate_may_leave_out_the_transforms_of_its_side() -> None:
    cache = {**CACHE, "keys": {**CACHE["keys"], "transforms": ["center"]}, "mean_bits": 5.0}
    cache["candidates"] = {"keys": [{"bits": 4, "transforms": []}]}
    loaded = recipe.load({"kv_cache": cache})
    again = recipe.load(loaded.to_dict())
    assert loaded.kv_cache.candidates.keys[0].transforms == ()
    assert again.kv_cache == loaded.kv_cache


@pytest.mark.parametrize(("cache", "place", "received", "hint"), [
    ({"mean_bits": 0}, "kv_cache.mean_bits", "got 0", "above 0 and at most 16"),
    ({"mean_bits": "3"}, "kv_cache.mean_bits", "got '3'", "a number"),
    ({"mean_bits": None}, "kv_cache.candidates", "without kv_cache.mean_bits", "both or neither"),
    ({"candidates": {"key": []}}, "kv_cache.candidates.key", "unknown key", "'keys'"),
    ({"candidates": {"keys": []}}, "kv_cache.candidates.keys", "got []", "a list of formats"),
    ({"candidates": {"keys": [{"bits": 5}]}}, "kv_cache.candidates.keys.0.bits", "got 5",
     "2, 3, 4, 8"),
    ({"candidates": {"values": [{"bits": 2}, {"method": "afine"}]}},
     "kv_cache.candidates.values.1.method", "unknown method 'afine'", "'affine'"),
    ({"mean_bits": 2.0}, "kv_cache.mean_bits", "2.0 is under what the narrowest candidates need",
     "at least 3.250"),
])  # fmt: skip
def test_a_mistake_is_named(cache: dict, place: str, received: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(**cache)
    for word in (place, received, hint):
        assert word in str(caught.value)


def test_the_schema_knows_the_bound() -> None:
    schema = recipe.schema()
    jsonschema.validate({"kv_cache": {"mean_bits": 3.0}}, schema)
    jsonschema.validate({"kv_cache": {**CACHE, "mean_bits": 3.0}}, schema)
    for wrong in (CACHE, {"mean_bits": 0}, {"mean_bits": 3, "candidates": {"keys": []}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"kv_cache": wrong}, schema)
