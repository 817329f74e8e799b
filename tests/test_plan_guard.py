import json

import pytest
import torch

import squeeze
from squeeze import api
from squeeze.errors import RecipeError
from squeeze.plan import Plan
from squeeze.swapping import swap
from tests import pico, tiny

KV = {
    "keys": {"method": "affine", "bits": 4, "granularity": "channel", "group_size": 32},
    "values": {"method": "affine", "bits": 4, "granularity": "token", "group_size": 16},
    "residual_length": 32,
    "block_length": 32,
}


def qwen2(norm=600.0, slow=False, **extra):
    """Three layers of two heads of 16; the first and the last have key biases of that norm."""
    model = tiny.model("qwen2", num_hidden_layers=3, **extra)
    for index in (0, 2):
        bias = model.model.layers[index].self_attn.k_proj.bias.data
        direction = torch.randn(bias.shape).view(2, 16)
        if slow:  # the last two of eight pairs
            direction[:, [*range(6), *range(8, 14)]] = 0
        bias.copy_(direction.flatten() / direction.norm() * norm)
    return model


def widths(model, **cache):
    rows = api.plan({"kv_cache": {**KV, **cache}}, model).kv_cache
    return [tuple(side and side.get("bits") for side in (row.keys, row.values)) for row in rows]


def test_a_swinging_bias_gets_the_bits_it_costs_and_values_two_more():
    assert widths(qwen2(600)) == [(16, 8), (4, 4), (16, 8)]
    assert widths(qwen2(100)) == [(8, 8), (4, 4), (8, 8)]
    assert widths(qwen2(0)) == [(4, 4)] * 3
    coarse = {"keys": {**KV["keys"], "bits": 2}, "values": {**KV["values"], "bits": 2}}
    assert widths(qwen2(600), **coarse) == [(8, 4), (2, 2), (8, 4)]


def test_a_bias_that_hardly_turns_costs_keys_per_token_and_those_alone():
    model = qwen2(slow=True, rope_parameters={"rope_type": "default", "rope_theta": 1e8})
    assert widths(model) == [(4, 4)] * 3
    per_token = {**KV["keys"], "granularity": "token", "group_size": 16}
    assert widths(model, keys=per_token) == [(16, 4), (4, 4), (16, 4)]


def test_what_the_recipe_decides_stays():
    model = qwen2()
    assert widths(model, guard_biases=False) == [(4, 4)] * 3
    named = [{"match": [-1], "keys": {"bits": 3}}]
    assert widths(model, layers=named) == [(16, 8), (4, 4), (3, 4)]
    named = [{"match": [0], "values": {"bits": 2}}]
    assert widths(model, layers=named) == [(16, 2), (4, 4), (16, 8)]
    assert widths(model, keys={"bits": 16}) == [(16, 4)] * 3
    bound = {"mean_bits": 6.0, "candidates": {"keys": [{"bits": 2}], "values": [{"bits": 2}]}}
    assert widths(model, **bound) == [(2, 2)] * 3


def test_methods_without_finer_widths_fall_back_to_16_bits():
    sides = {"keys": {"method": "float8"}, "values": {"method": "ternary", "granularity": "token",
             "group_size": 16}}  # fmt: skip
    plan = api.plan({"kv_cache": {**sides, "block_length": 128}}, qwen2())
    first, middle, last = plan.kv_cache
    assert first.keys is first.values is last.keys is None
    assert first.reason == "its huge key bias asks for 16 bits"
    assert (middle.keys["method"], middle.values["method"]) == ("float8", "ternary")
    assert plan.effective_bits["keys"] == pytest.approx((32 + middle.key_bits) / 3)


def test_the_plan_says_which_layers_and_why():
    model = qwen2()
    plan = api.plan({"kv_cache": KV}, model)
    (note,) = plan.notes
    assert note.startswith(
        "KV cache of layers 0, 2: keys have 16 effective bits instead of 5 and values have 10 "
        "effective bits instead of 6, because the k_proj bias has norm 600, 600 (median of all "
        "layers 600) and would cost keys "
    )
    assert note.endswith("kv_cache.guard_biases: false turns this off")
    assert f"note: {note}" in plan.table()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert api.plan({"kv_cache": {**KV, "guard_biases": False}}, model).notes == ()
    (unread,) = api.plan({"kv_cache": KV}, model.to("meta")).notes
    assert "once the weights are read (kv_cache.guard_biases)" in unread
    assert api.plan({"kv_cache": KV}, tiny.model("llama").to("meta")).notes == ()


def test_the_flag_is_checked():
    with pytest.raises(RecipeError, match=r"kv_cache\.guard_biases.*got 'no'.*true or false"):
        api.plan({"kv_cache": {**KV, "guard_biases": "no"}}, qwen2())


def decoded(model, ids):
    with torch.no_grad():
        cache = model(ids[:, :-8], use_cache=True).past_key_values
        return model(ids[:, -8:], past_key_values=cache, use_cache=True).logits, cache


def test_a_run_reads_the_biases_and_its_checkpoint_keeps_what_followed(tmp_path):
    source = pico.save(tmp_path / "source")  # for its tokenizer
    qwen2(vocab_size=8192).save_pretrained(source)
    out = tmp_path / "out"
    assert "once the weights are read" in api.plan({"kv_cache": KV}, source).notes[0]
    made = squeeze.run({"kv_cache": KV}, source, out, evaluate=False, device="cpu")
    assert [row.keys["bits"] for row in made.plan.kv_cache] == [16, 4, 16]
    loaded = squeeze.load(out, device="cpu")
    ids = torch.randint(3, 128, (1, 200))
    logits, cache = decoded(loaded, ids)
    assert [layer.spec.values.format.bits for layer in cache.layers] == [8, 4, 8]
    assert torch.equal(logits, decoded(made.model, ids)[0])


@pytest.mark.parametrize("slow", [False, True], ids=["any channels", "slow channels"])
@pytest.mark.parametrize("seed", range(3))
def test_logits_over_a_guarded_cache_are_as_close_as_without_the_bias(slow, seed):
    errors = {}
    for norm, guard in ((2.0, True), (600.0, True), (600.0, False)):
        torch.manual_seed(seed)
        model = qwen2(norm, slow, seed=seed)
        ids = torch.randint(3, 128, (2, 300))
        dense, _ = decoded(model, ids)
        plan = api.plan({"kv_cache": {**KV, "guard_biases": guard}}, model)
        with swap(model, squeeze.compress.compress(model, plan, None)):
            packed, _ = decoded(model, ids)
        errors[norm, guard] = ((packed - dense).norm() / dense.norm()).item()
    assert errors[600.0, True] < 1.2 * errors[2.0, True]
    # Scales per channel already take out what stands nearly still.
    assert slow or errors[600.0, False] > 2 * errors[2.0, True]
