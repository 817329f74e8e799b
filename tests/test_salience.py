"""Which tokens a cache protects: those that queries attend to, and text before other kinds."""

from __future__ import annotations

import pytest
import torch

import squeeze
from squeeze import api
from squeeze.cache import LayerSpec, PackedLayer, Side
from squeeze.cache.salience import attention_mass, joined, text_tokens
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import RecipeError
from squeeze.quant.kv.ternary import Ternary
from squeeze.recipe import load
from squeeze.types import Implementation
from tests import tiny

TERNARY = {"method": "ternary", "protected": 4}
KV = {"keys": TERNARY, "values": TERNARY, "sink_tokens": 2, "residual_length": 16}


def artifacts(model, salience="attention", **changes):
    recipe = {"kv_cache": {**KV, "salience": salience, **changes}}
    plan = api.plan(recipe, model)
    ids = tiny.prompt(2, 64)["input_ids"]
    return compress(model, plan, calibrate(model, ids, set(plan.statistics)))


def kept(layer, side="value"):
    """Positions from a row's first token of what is protected, ``[B, H_kv, n]``, ascending."""
    storage = getattr(layer, f"{side}_blocks")
    blocks = torch.cat([s["kept_at"] for s in storage.segments])[: layer.max_blocks]
    starts = torch.arange(len(blocks)).view(-1, 1, 1, 1, 1) * 128 + layer.spec.sink_tokens
    return (blocks.long() + starts).permute(1, 2, 0, 3, 4).flatten(2)


def by_hand(query, keys, scaling):
    """Attention of the last 64 queries ``[B, H, 64, E]`` to keys that belong to all of them."""
    groups = query.shape[1] // keys.shape[1]
    scores = query[:, :, -64:] @ keys.repeat_interleave(groups, 1).mT * scaling
    steps, tokens = query.shape[2], keys.shape[2]
    late = torch.ones(steps, tokens).triu(tokens - steps + 1).bool()[-64:]
    weights = scores.masked_fill(late, -torch.inf).softmax(-1)
    return weights.unflatten(1, (-1, groups)).mean((2, 3))


@pytest.mark.parametrize(("steps", "tokens"), [(100, 100), (1, 50), (7, 30), (64, 64)])
def test_mass_is_that_of_the_last_queries(steps, tokens):
    query, keys = torch.randn(2, 6, steps, 16), torch.randn(2, 2, tokens, 16)
    found = attention_mass(query, keys, [0, 0], [tokens, tokens], 0.25, None)
    torch.testing.assert_close(found, by_hand(query, keys, 0.25))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2))


def test_padded_rows_are_judged_as_they_are_alone():
    query, keys = torch.randn(2, 4, 90, 16), torch.randn(2, 2, 90, 16)
    keys[1, :, :40] = torch.nan  # padding
    found = attention_mass(query, keys, [0, 40], [90, 50], 0.25, None)
    alone = attention_mass(query[1:], keys[1:, :, 40:], [0], [50], 0.25, None)
    torch.testing.assert_close(found[1:, :, 40:], alone)
    # 14 of the 64 queries are padding and give nothing.
    torch.testing.assert_close(found[1].sum(-1), torch.full((2,), 50 / 64))
    assert (found[1, :, :40] == 0).all()


def test_soft_capped_scores_are_flatter():
    query, keys = torch.randn(1, 2, 70, 16) * 5, torch.randn(1, 2, 70, 16)
    peaked, flat = (attention_mass(query, keys, [0], [70], 1.0, cap) for cap in (None, 1.0))
    assert flat.amax() < peaked.amax() / 2


@pytest.fixture
def seen(monkeypatch):
    """The arguments and results of every call by which a cache judges tokens."""
    calls = []

    def watch(*arguments):
        calls.append((*arguments, attention_mass(*arguments)))
        return calls[-1][-1]

    monkeypatch.setattr("squeeze.cache.layer.attention_mass", watch)
    return calls


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_prompt_protects_what_its_end_attends_to(name, seen):
    model, ids = tiny.model(name), tiny.prompt(1, 300)["input_ids"]
    exact = model(ids).past_key_values.layers[1].keys
    with squeeze.swap(model, artifacts(model)):
        seen.clear()
        packed = model(ids).past_key_values.layers[1]
    query, keys, starts, counts, scaling, softcap, mass = seen[-1]
    torch.testing.assert_close(keys, exact)
    attention = model.model.layers[1].self_attn
    assert (query.shape[2], starts, counts, scaling) == (300, [0], [300], attention.scaling)
    assert softcap == getattr(model.config, "attn_logit_softcapping", None)
    if softcap is None:
        torch.testing.assert_close(mass, by_hand(query, keys, scaling))
    blocks = mass[:, :, 2 : 2 + 256].unflatten(2, (2, 128))
    top = blocks.topk(4).indices.sort(-1).values + torch.tensor([[2], [130]])
    assert torch.equal(kept(packed, "key"), top.flatten(2))
    assert torch.equal(kept(packed, "value"), top.flatten(2))


def test_a_row_protects_what_it_does_alone_and_keeps_it_when_selected(llama):
    inputs = tiny.prompt(2, 330, pads=(0, 37))
    squeeze.swap(llama, artifacts(llama))
    batch = llama(**inputs).past_key_values.layers[1]
    alone = llama(inputs["input_ids"][1:, 37:]).past_key_values.layers[1]
    assert torch.equal(kept(batch)[1:], kept(alone))
    before = kept(batch)
    batch.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(kept(batch), before[[1, 1]])


def test_blocks_that_fill_while_decoding_are_judged_by_the_step(llama, seen):
    ids = tiny.prompt(1, 260)["input_ids"]
    squeeze.swap(llama, artifacts(llama))
    cache = llama(ids[:, :100]).past_key_values
    seen.clear()
    for step in range(100, 260):
        llama(ids[:, step : step + 1], past_key_values=cache)
    assert len(seen) == 2  # one block in each layer
    assert [call[0].shape[2] for call in seen] == [1, 1]
    assert seen[0][3] == [2 + 16 + 128]
    top = seen[1][-1][:, :, 2:130].topk(4).indices.sort(-1).values + 2
    assert torch.equal(kept(cache.layers[1]), top)


def test_without_protected_tokens_nobody_is_asked(llama, seen):
    plain = {"method": "ternary"}
    with squeeze.swap(llama, artifacts(llama, keys=plain, values=plain)):
        assert llama(tiny.prompt(1, 300)["input_ids"]).past_key_values.layers[0].max_blocks == 2
    assert not seen


def test_by_default_the_tokens_that_lose_the_most_are_protected(llama, seen):
    ids = tiny.prompt(1, 300)["input_ids"]
    exact = llama(ids).past_key_values.layers[1].values[:, :, 2:258].unflatten(2, (2, 128))
    squeeze.swap(llama, artifacts(llama, salience="error"))
    layer = llama(ids).past_key_values.layers[1]
    plain = Ternary()
    lost = (exact - plain.decode(plain.encode(exact, {}), {})).norm(dim=-1)
    top = lost.topk(4).indices.sort(-1).values + torch.tensor([[2], [130]])
    assert torch.equal(kept(layer), top.flatten(2))
    assert not seen


def test_protection_helps_where_attention_is_peaked():
    torch.manual_seed(1)
    keys, values = torch.randn(1, 2, 146, 32), torch.randn(1, 2, 146, 32)
    query = torch.randn(1, 2, 146, 32)
    query[:, :, -80:] = 3 * keys[:, :, [30]] + 3 * keys[:, :, [70]]  # all ask for two tokens
    errors = []
    for count in (0, 2):
        side = Side(Ternary(protected=count), {})
        layer = PackedLayer(
            LayerSpec(side, side, 128, 2, 16, Implementation.REFERENCE, salience="attention")
        )
        layer.update(keys, values)
        layer.commit(keys, values, query, 0.2)
        if count:
            assert kept(layer).tolist() == [[[30, 70]] * 2]
        exact = (query[:, :, -1:] @ keys.mT * 0.2).softmax(-1) @ values
        step = [x[:, :, :1] for x in (keys, values)]
        layer.update(*step)
        found, _ = layer.attend(query[:, :, -1:], *step, 0.2, None)
        errors.append((found - exact).norm().item())
    assert errors[1] < errors[0] / 4


def typed(rows, length):
    """Types of tokens: 1, but for the given positions of each row, which are text."""
    types = torch.ones(len(rows), length, dtype=torch.int64)
    for row, places in enumerate(rows):
        types[row, places] = 0
    return types


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_text_is_protected_before_other_tokens(llama, name):
    inputs = tiny.prompt(2, 330, pads=(0, 20))
    rows = [[0, 10, 11, 40, 129, 131, 200, 201, 257], [21, 30, 60, 99, 149, 151, 160, 170, 180]]
    squeeze.swap(llama, artifacts(llama, salience="token_types"))
    inputs[name] = typed(rows, 330)
    layer = llama(**inputs).past_key_values.layers[1]
    # Counted from the first real token, the first two of which are sinks.
    assert [kept(layer)[0, head].tolist() for head in range(2)] == [rows[0][1:]] * 2
    assert [kept(layer)[1, head].tolist() for head in range(2)] == [
        [place - 20 for place in rows[1][1:]]
    ] * 2
    plain = llama(**tiny.prompt(2, 330, pads=(0, 20))).past_key_values.layers[1]
    assert plain.types is None
    assert not torch.equal(kept(plain), kept(layer))


def test_types_are_remembered_over_calls_and_follow_their_rows(llama):
    ids = tiny.prompt(2, 300)["input_ids"]
    rows = [[20, 50, 100, 129], [3, 4, 5, 6]]
    types = typed(rows, 140)
    squeeze.swap(llama, artifacts(llama, salience="token_types"))
    cache = llama(ids[:, :90], mm_token_type_ids=types[:, :90]).past_key_values
    assert cache.layers[1].max_blocks == 0
    cache.reorder_cache(torch.tensor([1, 0]))
    llama(ids[:, 90:140], mm_token_type_ids=types.flip(0), past_key_values=cache)  # of all so far
    llama(ids[:, 140:150], past_key_values=cache)  # text, which is not packed yet
    assert kept(cache.layers[1])[:, 0].tolist() == rows[::-1]
    assert kept(cache.layers[0])[:, 1].tolist() == rows[::-1]


def test_types_join_what_is_known():
    first, second = torch.tensor([[1, 0, 1]]), torch.tensor([[1, 1]])
    assert joined(None, None, 0, 3) is None
    assert joined(None, first, 0, 3).tolist() == [[1, 0, 1]]
    assert joined(first, second, 3, 2).tolist() == [[1, 0, 1, 1, 1]]
    assert joined(first, second, 5, 2).tolist() == [[1, 0, 1, 0, 0, 1, 1]]  # text between
    assert joined(first, second, 2, 2).tolist() == [[1, 0, 1, 1]]  # cropped
    assert joined(first, None, 1, 2).tolist() == [[1]]
    assert joined(None, second, 3, 2).tolist() == [[0, 0, 0, 1, 1]]
    assert joined(second, torch.tensor([[0, 1, 0]]), 2, 1).tolist() == [[0, 1, 0]]


def test_marks_of_text_lie_where_the_tokens_are():
    types = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    found = text_tokens(types, [1, 3], [2, 0], [3, 2], 6)
    assert found.tolist() == [[[1, 1, 1, 0, 1, 1]], [[0, 1, 1, 1, 1, 1]]]


def test_the_plan_counts_what_is_stored_and_the_recipe_names_the_ranking(llama):
    made = artifacts(llama, salience="token_types")
    row = made.plan.kv_cache[0]
    assert row.value_bits == Ternary(protected=4).bits_per_value(16)
    squeeze.swap(llama, made)
    layer = llama(tiny.prompt(1, 300)["input_ids"]).past_key_values.layers[0]
    values = 2 * 256 * 16  # heads, tokens and channels
    assert layer.value_blocks.nbytes == values * row.value_bits / 8
    asked = load({"kv_cache": {**KV, "salience": "token_types"}})
    assert load(asked.to_dict()).kv_cache == asked.kv_cache
    assert load({"kv_cache": KV}).kv_cache.salience == "error"
    with pytest.raises(
        RecipeError, match=r"kv_cache\.salience.*got 'norm'.*attention, token_types"
    ):
        load({"kv_cache": {**KV, "salience": "norm"}})
