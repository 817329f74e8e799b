"""Prefill attention in eight bits: asked for by a recipe, refused or planned, chosen per layer."""

from dataclasses import replace

import pytest
import torch
from transformers.cache_utils import DynamicCache

import squeeze
import squeeze.attention
import tests.pico
from squeeze import api, recipe
from squeeze.calibrate import Stats
from squeeze.compress import compress
from squeeze.errors import DeviceError, RecipeError, UnsupportedError
from squeeze.evaluation.eight_bits import (
    choose_layers,
    cosine_by_head,
    keep_layers,
    measure_cosines,
)
from squeeze.kernels.block_sparse_attention.api import block_sparse_attention
from squeeze.loading import load_model
from squeeze.plan import Plan
from squeeze.plan_prefill import PREFILL_COSINES
from squeeze.prompt_identity import identity
from tests import tiny
from tests.test_cache import RECIPE as CACHE
from tests.test_cache import DequantizedLayer

POLICY = {"method": "streaming", "min_length": 128, "window_size": 256}
PARTS = (1300, 1700, 1702, 2000)  # the third is decode


def eight(**settings):
    return {"attention": {"quantize": "int8", "quantize_min_length": 128, **settings}}


def swapped(raw, name="llama"):
    """Swap every layer that may have eight bits, without calibration."""
    model = tiny.model(name)
    squeeze.swap(model, compress(model, api.plan(raw, model), None))
    return model


@pytest.fixture
def calls(monkeypatch):
    """What the attention function asks of the kernel."""
    seen = []

    def attend(query, keys, values, index, **call):
        seen.append((query.shape[2], keys.shape[2], index is not None, call["quantize"]))
        return block_sparse_attention(query, keys, values, index, **call)

    monkeypatch.setattr(squeeze.attention, "block_sparse_attention", attend)
    return seen


@pytest.mark.parametrize("settings", [{}, {"prefill": POLICY}, {"min_cosine": 0.99}])
def test_a_recipe_is_written_as_it_was_read(settings):
    made = recipe.load(eight(**settings))
    assert recipe.load(made.to_dict()).attention == made.attention
    plan = api.plan(made, tiny.model("llama"))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert not plan.lossless
    assert PREFILL_COSINES in plan.statistics


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"quantize": "int4"}, r"attention\.quantize: got 'int4'.*int8, float8"),
        ({"quantize": "int8", "min_cosine": 2}, r"min_cosine: got 2.*at most 1"),
        ({"quantize": "int8", "quantize_min_length": 0}, r"quantize_min_length: got 0"),
        ({"min_cosine": 0.99}, r"min_cosine: is given without attention\.quantize"),
        ({"quantize": "int8", "mean_density": 0.3}, r"bounds no prefill method.*antidiagonal"),
    ],
)
def test_mistakes_are_named(attention, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load({"attention": attention})


def test_the_plan_says_what_is_read_and_how():
    text = api.plan(eight(), tiny.model("llama")).table()
    assert "everything, in int8 from 128 tokens" in text
    assert "a cosine under 0.999 on calibration text" in text
    text = api.plan(eight(prefill=POLICY, quantize="float8"), tiny.model("llama")).table()
    assert "window_size 256), in float8 from 128 tokens" in text


def test_layers_with_a_window_stay_dense():
    plan = api.plan(eight(), tiny.model("gemma3"))
    assert [row.quantize for row in plan.prefill] == [None, "int8"]
    assert "prefill of layers 0 stays dense: sliding attention is already local" in plan.notes


@pytest.mark.parametrize(
    ("name", "extra", "why"),
    [
        ("gemma2", {}, r"bounds the scores \(soft-cap 50\).*Remove attention\.quantize"),
        ("gpt_oss", {}, r"learned sink logits.*Remove attention\.quantize"),
        ("mistral", {"sliding_window": 64}, r"every layer .* has sliding attention"),
    ],
)
def test_models_that_it_would_change_are_refused(name, extra, why):
    with pytest.raises(UnsupportedError, match=why):
        api.plan(eight(), tiny.model(name, **extra))


def test_devices_without_the_products_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = tiny.model("llama")
    with pytest.raises(UnsupportedError, match=r"capability 8\.0, .*8\.9 and later.*reference"):
        api.plan(eight(), model, device="cuda")
    assert api.plan({**eight(), "implementation": "reference"}, model, device="cuda").prefill
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    plan = api.plan(eight(), model, device="cuda")
    assert [(row.quantize, row.implementation) for row in plan.prefill] == [("int8", "triton")] * 2
    wide = tiny.model("mistral", head_dim=512)
    with pytest.raises(UnsupportedError, match=r"heads of 512.*at most 256"):
        api.plan(eight(), wide, device="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="'triton' is needed and not installed"):
        api.plan(eight(), model, device="cuda")


def test_long_prompts_are_multiplied_in_eight_bits_and_decode_is_not(calls):
    model, dense = swapped(eight()), tiny.model("llama")
    ids = tiny.prompt(1, 200)["input_ids"]
    assert torch.equal(model(ids[:, :127]).logits, dense(ids[:, :127]).logits)
    assert calls == []
    found, expected = model(ids).logits, dense(ids).logits
    assert calls == [(200, 200, False, "int8")] * 2
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.squeeze_statistics()["density"] == [[1.0] * 4] * 2
    calls.clear()
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert calls == [(200, 200, False, "int8")] * 2
    model.squeeze_swap.restore()
    assert torch.equal(model(ids).logits, expected)


def test_it_composes_with_a_policy_and_each_has_its_length(calls):
    ids = tiny.prompt(1, 700)["input_ids"]
    both = swapped(eight(prefill={**POLICY, "min_length": 400}, quantize_min_length=600))
    alone = swapped({"attention": {"prefill": {**POLICY, "min_length": 400}}})
    assert torch.equal(both(ids[:, :500]).logits, alone(ids[:, :500]).logits)
    assert calls == [(500, 500, True, None)] * 4
    calls.clear()
    both(ids)
    assert calls == [(700, 700, True, "int8")] * 2
    assert both.squeeze_statistics()["density"][0][0] < 1.0
    calls.clear()
    swapped(eight(prefill={**POLICY, "min_length": 1000}))(ids)
    assert calls == [(700, 700, False, "int8")] * 2


@pytest.mark.parametrize("policy", [None, "streaming", "vertical_slash", "permuted"])
def test_a_padded_row_is_what_it_is_alone(policy):
    settings = {} if policy is None else {"prefill": {"method": policy, "min_length": 128}}
    model = swapped(eight(**settings))
    inputs = tiny.prompt(2, 600, pads=(0, 130))
    # Keys turned to other positions would round otherwise.
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(**inputs, position_ids=positions).logits
    alone = model(inputs["input_ids"][1:, 130:]).logits
    torch.testing.assert_close(together[1:, 130:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", ["int8", "float8"])
@pytest.mark.parametrize("policy", [None, POLICY])
def test_parts_over_a_packed_cache_equal_the_reference_with_the_same_calls(policy, quantize, calls):
    inputs, pads = tiny.prompt(2, PARTS[-1], pads=(0, 130)), [0, 130]
    raw = eight(quantize=quantize, **({"prefill": policy} if policy else {}))
    ours, theirs = swapped({**raw, **CACHE}), swapped(raw)
    cache = DynamicCache(config=theirs.config)
    for i, state in ours.squeeze_swap.states.items():
        cache.layers[i] = DequantizedLayer(state.spec(), pads)
    logits, expected = in_parts(ours, inputs, None), in_parts(theirs, inputs, cache)
    # Decode, the third part, never comes here; each other part does, in both models' two layers.
    assert calls.count((PARTS[3] - PARTS[2], PARTS[3], policy is not None, quantize)) == 4
    assert len(calls) == 2 * 2 * 3
    for row, pad in enumerate(pads):
        error = (logits[row, pad:] - expected[row, pad:]).abs().max()
        assert error <= 1e-4 * expected.abs().max()


def in_parts(model, inputs, cache):
    logits, first = [], 0
    for end in PARTS:
        ids, mask = inputs["input_ids"][:, first:end], inputs["attention_mask"][:, :end]
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, first = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, 1)


def test_cosines_by_hand():
    x = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])[None]
    y = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])[None]
    torch.testing.assert_close(cosine_by_head(x, y), torch.tensor([0.6, 1.0]))
    one = torch.tensor([[[[0.0, 0.0]], [[0.0, 1.0]]]])
    assert cosine_by_head(one, one.flip(1)).tolist() == [0.0, 0.0]


def test_the_least_of_samples_and_lists_is_kept():
    model = tiny.model("llama")
    rows = tiny.prompt(2, 1100)["input_ids"].tolist()
    plan = api.plan(eight(prefill=POLICY), model)

    def measured(prefill, rows):
        found = measure_cosines(model, prefill, rows).tensors[PREFILL_COSINES]
        return torch.stack([found[row.module] for row in plan.prefill])

    both = measured(plan.prefill, rows)
    assert both.shape == (2, 4)
    assert ((both > 0.99) & (both < 1)).all()
    assert torch.equal(both, torch.minimum(*(measured(plan.prefill, [row]) for row in rows)))
    dense = measured([replace(row, policy=None) for row in plan.prefill], rows)
    assert (both <= dense).all()
    assert not torch.equal(both, dense)


def test_layers_below_the_bound_stay_as_they_are():
    plan = api.plan(eight(), tiny.model("llama"))
    low, high = torch.tensor([0.9999, 0.9985]), torch.tensor([0.9991, 0.9995])
    first, second = (row.module for row in plan.prefill)
    stats = Stats({PREFILL_COSINES: {first: low, second: high}}, 2, 100)
    made = keep_layers(plan, stats, 0.999)
    assert [row.quantize for row in made.prefill] == [None, "int8"]
    assert [row.cosine for row in made.prefill] == [pytest.approx(0.9985), pytest.approx(0.9991)]
    assert "by layer: 0 0.99850 (not taken), 1 0.99910" in made.table()
    assert "1 of 2 layers multiply in int8" in made.notes[-1]
    assert Plan.from_dict(made.to_dict()) == made
    sparse = keep_layers(api.plan(eight(prefill=POLICY), tiny.model("llama")), stats, 0.9995)
    assert [row.acts for row in sparse.prefill] == [True, True]
    assert [row.quantize for row in sparse.prefill] == [None, None]
    none = keep_layers(plan, stats, 0.9995)
    assert none.lossless
    assert "no layer multiplies in int8: each has a head under a cosine of 0.9995" in none.notes[-1]


def test_a_run_keeps_its_layers_in_the_checkpoint(tmp_path):
    folder = tests.pico.save(tmp_path / "pico")
    raw = eight(length=1024, min_cosine=0.99)
    result = api.run(raw, folder, tmp_path / "out", evaluate=False)
    rows = result.plan.prefill
    assert [row.quantize for row in rows] == ["int8"] * 2
    assert all(0.99 <= row.cosine < 1 for row in rows)
    again = api.load(tmp_path / "out")
    states = again.squeeze_swap.states.values()
    assert [(s.quantize, s.quantize_min_length) for s in states] == [("int8", 128)] * 2
    ids = torch.randint(0, 8192, (1, 700), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids).logits, result.model(ids).logits)
    strict = api.run(eight(length=1024, min_cosine=1.0), folder, evaluate=False)
    assert strict.plan.lossless
    assert "(not taken)" in strict.plan.table()
    assert not strict.model.squeeze_swap.states


def test_budgets_of_heads_are_chosen_first(tmp_path):
    folder = tests.pico.save(tmp_path / "pico")
    policy = {"method": "antidiagonal", "min_length": 128}
    settings = {"prefill": policy, "mean_density": 0.8, "length": 1024, "min_cosine": 0.99}
    steps = []
    made = api.run(
        {**eight(**settings), **CACHE}, folder, evaluate=False,
        progress=lambda what, *_: steps.append(what),
    )  # fmt: skip
    assert [what for what in dict.fromkeys(steps) if what in ("budgets", "eight bits")] == [
        "budgets",
        "eight bits",
    ]
    rows = made.plan.prefill
    assert all(len(row.policy["heads"]) == 2 and row.quantize == "int8" for row in rows)
    assert all(0.99 <= row.cosine < 1 for row in rows)


def test_finished_cosines_are_found_again(tmp_path, monkeypatch):
    model, plan = tiny.model("llama"), api.plan(eight(), tiny.model("llama"))
    monkeypatch.setattr(
        "squeeze.evaluation.eight_bits.quoting_samples",
        lambda *arguments: tiny.prompt(2, 1200)["input_ids"].tolist(),
    )
    steps = []
    made = choose_layers(
        model, None, plan, [], 0.99, 1200, folder=tmp_path,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [("eight bits", 1, 2), ("eight bits", 2, 2)]
    monkeypatch.setattr("squeeze.evaluation.eight_bits.measure_cosines", None)
    assert choose_layers(model, None, plan, [], 0.99, 1200, folder=tmp_path) == made


def test_a_saved_prompt_remembers_the_eight_bits():
    model = swapped({**eight(), **CACHE})
    cache = model(tiny.prompt(1, 200)["input_ids"]).past_key_values
    found = identity(model, cache)["prefill"]
    assert found == {i: {"quantize": "int8", "quantize_min_length": 128} for i in ("0", "1")}


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [None, "vertical_slash", "antidiagonal"])
def test_triton_agrees_with_the_reference_implementation(policy):
    settings = {} if policy is None else {"prefill": {"method": policy, "min_length": 1024}}
    plan = api.plan(eight(**settings), "reference", device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(3, 8000, (2, 1600), device="cuda", generator=generator)
    dense = load_model("reference", device="cuda", dtype=torch.float32)
    exact = replace(plan, prefill=tuple(replace(row, quantize=None) for row in plan.prefill))
    oracle, found = logits(dense, exact, "reference", ids), {}
    for implementation in ("reference", "triton"):
        model = load_model("reference", device="cuda")
        found[implementation] = logits(model, plan, implementation, ids)
    errors = {name: (x - oracle).abs().mean() for name, x in found.items()}
    assert errors["triton"] <= 2 * errors["reference"] + 2**-8 * 0.01 * oracle.abs().max()


@torch.no_grad()
def logits(model, plan, implementation, ids):
    """Swap the plan in and run a prompt, its end over the cache of its beginning."""
    rows = tuple(replace(row, implementation=implementation) for row in plan.prefill)
    with squeeze.swap(model, compress(model, replace(plan, prefill=rows), None)):
        first = model(ids[:, :1300], use_cache=True)
        second = model(ids[:, 1300:], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], 1).float()
