"""Key scales folded into the weights, and queries in float8."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import squeeze
from squeeze import api
from squeeze.cache.queries import to_float8
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import RecipeError, UnsupportedError
from squeeze.folding import fold, folded_tables
from squeeze.quant.transforms.smooth import Smooth
from squeeze.recipe import load
from squeeze.recipe_schema import schema
from squeeze.recipe_values import build_transform
from tests import pico, tiny

SMOOTH = {"method": "smooth", "strength": 1.0, "pairs": True, "fold": True}
FOLDABLE = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gpt_oss"]


def recipe(smooth=SMOOTH, weights=(), **cache):
    side = {"method": "affine", "granularity": "token", "group_size": 16, "symmetric": True}
    keys = {**side, "transforms": [smooth]}
    exact = {"sink_tokens": 2, "residual_length": 8, "block_length": 32}
    return {
        "weights": list(weights),
        "kv_cache": {"keys": keys, "values": dict(side), **exact, **cache},
    }


def artifacts(model, asked):
    plan = api.plan(asked, model)
    stats = calibrate(model, tiny.prompt(2, 64)["input_ids"], set(plan.statistics))
    return compress(model, plan, stats)


def loud(name="llama", dtype=torch.float32, **extra):
    """A model with loud channels of queries and keys, and biases and norms that matter."""
    extra |= {"attention_bias": True} if name == "llama" else {}
    model = tiny.model(name, dtype=dtype, **extra)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
            made = getattr(module, part, None)
            size = getattr(module, "head_dim", 0)
            for parameter in made.parameters() if isinstance(made, nn.Module) else ():
                draw = torch.randn(size, generator=generator).exp()
                rows = draw.repeat(len(parameter) // size).view(-1, *[1] * (parameter.ndim - 1))
                parameter.data.copy_((parameter.data + 0.01) * rows.to(dtype))
    return model


def dense_logits(model, ids):
    """Logits of a call that packs nothing."""
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_changes_no_bit_of_the_logits_and_is_undone(name, dtype):
    model, ids = loud(name, dtype), tiny.prompt(2, 50)["input_ids"]
    before, state = dense_logits(model, ids), copy.deepcopy(model.state_dict())
    made = artifacts(model, recipe())
    with squeeze.swap(model, made):
        assert torch.equal(dense_logits(model, ids), before)
        changed = {n for n, x in state.items() if not torch.equal(model.state_dict()[n], x)}
        kind = "norm" if name.startswith("qwen3") else "proj"
        assert {n.split(".")[-2] for n in changed} == {f"q_{kind}", f"k_{kind}"}
    assert all(torch.equal(model.state_dict()[n], x) for n, x in state.items())
    assert torch.equal(dense_logits(model, ids), before)


def test_folded_keys_are_the_scaled_ones_and_pairs_are_equally_loud():
    model, ids = loud(), tiny.prompt(1, 64)["input_ids"]
    before = model(ids).past_key_values.layers[1].keys
    made = artifacts(model, recipe())
    table = folded_tables(made.tables)["model.layers.1.self_attn.squeeze.keys_smooth_folded"]
    assert table.dtype == torch.int8
    assert torch.equal(table[:, :8], table[:, 8:])
    assert table.unique().numel() > 2
    few = model(ids[:, :8]).past_key_values.layers[1].keys  # too few to be packed
    with squeeze.swap(model, made):
        exact = model(ids[:, :8]).past_key_values.layers[1].exact.keys[:, :, :8]
    assert torch.equal(exact, few / table.float().exp2()[:, None])
    low, high = before.chunk(2, dim=-1)
    radius = torch.hypot(low, high).amax((0, 2)).repeat(1, 2)
    spread = (radius / table.float().exp2()).log2()
    # Rounding to powers of two leaves half an octave on either side.
    assert (spread.amax(1) - spread.amin(1)).max() < 1.1
    assert (radius.log2().amax(1) - radius.log2().amin(1)).min() > 2


def test_heads_that_share_a_norm_share_the_scales():
    model = loud("qwen3")
    plan = api.plan(recipe(), model)
    assert plan.kv_cache[0].keys["transforms"] == [{**SMOOTH, "shared": True}]
    for table in folded_tables(artifacts(model, recipe()).tables).values():
        assert torch.equal(table, table[:1].expand_as(table))


def test_what_pairs_cannot_share_acts_after_rope_and_adds_up():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 64, 16, generator=generator) * torch.logspace(-1, 1, 16)
    plain = Smooth(1.0, pairs=True, outliers=2).fit({"kv_samples": keys})
    method = Smooth(1.0, pairs=True, outliers=2, fold=True)
    fitted = method.fit({"kv_samples": keys})
    both = fitted["factor"] * fitted["folded"].float().exp2()
    torch.testing.assert_close(both, plain["factor"])
    assert method.constant_bytes(2, 16) == 5 * 2 * 16
    alone = Smooth(1.0, pairs=True, fold=True)
    fitted = alone.fit({"kv_samples": keys})
    assert list(fitted) == ["folded"]
    assert alone.constant_bytes(2, 16) == 2 * 16
    query = torch.randn(1, 4, 3, 16)
    assert alone.prepare_query(query, fitted)[0] is query
    assert alone.apply(keys, fitted) is keys
    assert alone.invert(keys, fitted) is keys


@pytest.mark.parametrize("outliers", [0, 3])
def test_packed_decoding_errs_as_with_scales_at_run_time_and_less_than_without(outliers):
    model, ids = loud(), tiny.prompt(2, 120)["input_ids"]

    def decode():
        cache = model(ids[:, :-1]).past_key_values
        return model(ids[:, -1:], past_key_values=cache).logits

    exact = decode()

    def error(asked):
        with squeeze.swap(model, artifacts(model, asked)):
            return (decode() - exact).detach().square().mean().item()

    def settings(**change):
        return recipe({**SMOOTH, "outliers": outliers, **change}, values={"bits": 16})

    folded = error(settings())
    assert folded < 0.8 * error(settings(strength=0.0, outliers=0))
    # Without outliers pairs are equally loud up to half an octave.
    assert folded == pytest.approx(error(settings(fold=False)), rel=1e-2 if outliers else 0.2)


def test_weights_are_quantized_in_the_folded_basis():
    model, ids = loud(), tiny.prompt(2, 40)["input_ids"]
    rule = {"method": "kmeans", "bits": 4}  # a codebook per row, in float16
    with squeeze.swap(model, artifacts(model, {"weights": [rule]})):
        expected = dense_logits(model, ids)
    made = artifacts(model, recipe(weights=[rule]))
    with squeeze.swap(model, made):
        found = dense_logits(model, ids)
    # Scaled rows have scaled codebooks: float16 rounds both alike.
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_a_part_of_the_artifacts_still_fits_the_model():
    model, ids = loud(), tiny.prompt(2, 40)["input_ids"]
    rule = {"method": "kmeans", "bits": 8, "granularity": "tensor", "targets": ["k_proj"]}
    made = artifacts(model, recipe(weights=[rule]))
    before = dense_logits(model, ids)
    part = replace(made, plan=replace(made.plan, kv_cache=()))
    with squeeze.swap(model, part):
        assert (dense_logits(model, ids) - before).norm() < 0.05 * before.norm()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The dense weights, a run's result and its folder."""
    folder = tmp_path_factory.mktemp("fireq")
    source = pico.save(folder / "source")
    dense = loud(vocab_size=8192, max_position_embeddings=1024)
    dense.save_pretrained(source)
    asked = recipe({**SMOOTH, "outliers": 1}, queries="float8")
    asked["calibration"] = {"samples": 2, "length": 64}
    result = squeeze.run(asked, source, folder / "out", evaluate=False, device="cpu")
    return dense.state_dict(), result.model, folder / "out"


def decoded(model):
    ids = tiny.prompt(1, 90)["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    return model(ids[:, :20], past_key_values=cache).logits


def test_a_checkpoint_holds_folded_weights_and_is_folded_once(checkpoint):
    dense, model, folder = checkpoint
    loaded = squeeze.load(folder, device="cpu")
    assert torch.equal(decoded(loaded), decoded(model))
    assert loaded.squeeze_swap.states[0].spec().queries == "float8"
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(loaded.state_dict()[name], dense[name])
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    loaded.squeeze_swap.restore()
    assert loaded.state_dict().keys() == dense.keys()
    assert all(torch.equal(loaded.state_dict()[n], x) for n, x in dense.items())


def test_a_loaded_model_saves_again_and_dequantizes(checkpoint, tmp_path):
    dense, model, folder = checkpoint
    squeeze.load(folder, device="cpu").save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(decoded(again), decoded(model))
    plain = again.dequantize()
    assert all(torch.equal(plain.state_dict()[n], x) for n, x in dense.items())


def test_weights_that_would_underflow_are_refused_and_left_alone():
    model = loud(dtype=torch.float16)
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight.data.clamp_(-1e-6, 1e-6)
    state = copy.deepcopy(model.state_dict())
    table = torch.full((2, 16), 5, dtype=torch.int8)
    names = [f"model.layers.{i}.self_attn.squeeze.keys_smooth_folded" for i in range(2)]
    with pytest.raises(UnsupportedError, match=r"underflow in float16.*bfloat16"):
        fold(model, dict.fromkeys(names, table))
    assert all(torch.equal(model.state_dict()[n], x) for n, x in state.items())


def test_scales_of_another_model_are_refused_and_leave_it_alone():
    other, ids = loud(num_key_value_heads=4), tiny.prompt(1, 20)["input_ids"]
    before = dense_logits(other, ids)
    with pytest.raises(UnsupportedError, match=r"k_proj.*64 rows.*32, as the key scales"):
        squeeze.swap(other, artifacts(loud(), recipe()))
    assert torch.equal(dense_logits(other, ids), before)
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2", "opt", "gemma3", "qwen3_next"])
def test_other_architectures_are_refused(name):
    with pytest.raises(UnsupportedError, match=r"smooth\.fold.*cannot take it.*Set fold: false"):
        api.plan(recipe(), tiny.model(name))
    assert api.plan(recipe({**SMOOTH, "fold": False}), tiny.model(name)).kv_cache


@pytest.mark.parametrize(("change", "words"), [
    ({"smooth": {**SMOOTH, "pairs": False}}, "pairs: true"),
    ({"mean_bits": 3.0}, "stands beside kv_cache.mean_bits"),
    ({"keys": {"method": "affine", "transforms": ["center", SMOOTH]}}, "first of the transforms"),
], ids=["pairs", "mean_bits", "order"])  # fmt: skip
def test_recipes_that_cannot_fold_are_refused(change, words, llama):
    with pytest.raises(RecipeError, match=words):
        api.plan(recipe(**change), llama)


def test_queries_are_rounded_to_float8_numbers():
    query = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(0)) * 30
    found = to_float8(query)
    largest = query.abs().amax(-1, keepdim=True)
    assert ((found - query).abs() <= query.abs() / 16 + largest / 448 * 2**-10).all()
    codes = (found / largest * 448).flatten(0, 2)
    torch.testing.assert_close(codes.to(torch.float8_e4m3fn).float(), codes)
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), largest)
    assert to_float8(query.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(to_float8(torch.zeros(1, 1, 1, 8)), torch.zeros(1, 1, 1, 8))


def test_rounded_queries_read_packed_keys_alone(llama):
    ids = tiny.prompt(1, 120)["input_ids"]
    plain, rounded = recipe({"method": "smooth"}), recipe({"method": "smooth"}, queries="float8")

    def decode(asked, length):
        with squeeze.swap(llama, artifacts(llama, asked)):
            cache = llama(ids[:, :length]).past_key_values
            return llama(ids[:, length : length + 1], past_key_values=cache).logits

    before, after = decode(plain, 100), decode(rounded, 100)
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    assert torch.equal(decode(plain, 20), decode(rounded, 20))  # nothing is packed yet


def test_the_recipe_names_its_queries():
    asked = load(recipe(queries="float8"))
    assert load(asked.to_dict()).kv_cache == asked.kv_cache
    assert asked.kv_cache.queries == "float8"
    assert load(recipe()).kv_cache.queries is None
    with pytest.raises(RecipeError, match=r"kv_cache\.queries.*got 'int8'.*float8"):
        load(recipe(queries="int8"))
    assert schema()["properties"]["kv_cache"]["properties"]["queries"]["enum"] == ["float8", None]
    shipped = load("fireq").kv_cache
    assert shipped.queries == "float8"
    assert build_transform(shipped.keys.transforms[0])[1].fold
