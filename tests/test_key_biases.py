import math

import pytest
import torch

from squeeze.key_biases import KeyBias, key_projection, rope_frequencies
from squeeze.model_info import describe
from tests import tiny

FAMILIES = {
    "qwen2": {},
    "llama": {"attention_bias": True},
    "gpt_oss": {},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5},
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1},
    # They have a key head for every query head, whatever this says.
    "gpt2": {"num_key_value_heads": 4},
    "opt": {"num_key_value_heads": 4},
}


def biased(family):
    """A model whose last layer's keys are their bias, drawn at random; and that layer."""
    model = tiny.model(family, **FAMILIES[family])
    item = describe(model).attention[-1]
    module = model.get_submodule(item.module)
    if family == "phi3":  # built without biases
        module.qkv_proj.bias = torch.nn.Parameter(torch.zeros(module.qkv_proj.out_features))
    name = key_projection(model, item)[0]
    with torch.no_grad():
        getattr(module, name).weight.zero_()
        getattr(module, name).bias.normal_().mul_(100)
    return model, item


def keys(model, item, length=300):
    ids = tiny.prompt(1, length)["input_ids"]
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values.layers[item.layer].keys[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_of_the_keys_is_found_in_plain_and_fused_projections(family):
    model, item = biased(family)
    name, weight, bias = key_projection(model, item)
    # RoPE leaves position 0 as it is, but for gpt_oss, which scales.
    first = keys(model, item, 2)[:, 0].flatten()
    scale = first[0] / bias[0]
    assert (scale == 1) == (family != "gpt_oss")
    torch.testing.assert_close(first, bias * scale)
    assert weight.shape == (item.kv_heads * item.head_dim, 64)
    found = describe(model).key_biases
    assert [(f.layer, f.projection) for f in found] == [(item.layer, name)]
    assert found[0].norm == pytest.approx(bias.norm().item())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
@pytest.mark.parametrize("tokens", [32, 128])
def test_keys_swing_within_a_group_as_radii_and_angles_say(family, tokens):
    model, item = biased(family)
    made = describe(model).key_biases[0]
    groups = keys(model, item).transpose(0, 1).flatten(1).unfold(0, tokens, 1)
    swings = (groups.amax(-1) - groups.amin(-1)).amax(0)
    radii, angles = torch.tensor(made.radii), torch.tensor(made.angles)
    bounds = 2 * radii * (angles * tokens).clamp(max=math.pi).mul(0.5).sin()
    assert (swings <= bounds * 1.001 + 1e-3).all()
    turned = angles * tokens > 2 * math.pi  # at some token near every phase
    assert turned.any() == (family not in ("gpt2", "opt"))
    assert (swings[turned] > 0.8 * bounds[turned]).all()
    assert (keys(model, item).abs().amax(1).flatten() <= radii * 1.001).all()


def test_bits_lost_to_a_bias():
    # One channel that turns by half a circle in 128 tokens: it swings from -26 to 26 where the
    # weights alone span 5.2 * 1.
    turning = KeyBias(0, "k_proj", 26.0, 1.0, 1.0, (26.0,), (math.pi / 128,), (1.0,))
    assert turning.lost_bits(128) == pytest.approx(math.log2(11))
    assert turning.lost_bits(256) == turning.lost_bits(128)
    assert turning.lost_bits(32) < turning.lost_bits(64) < turning.lost_bits(128)
    # A third of a half circle, centred where the sine is steepest: 2 * 26 * sin(pi / 6).
    sixth = KeyBias(0, "k_proj", 26.0, 1.0, 1.0, (26.0,), (math.pi / 384,), (1.0,))
    assert sixth.lost_bits(128) == pytest.approx(math.log2(6))
    # What stands still costs scales per channel nothing, and shared scales all of it.
    still = KeyBias(0, "k_proj", 26.0, 1.0, 1.0, (26.0,), (0.0,), (1.0,))
    assert still.lost_bits(128) == 0
    assert still.lost_bits(None) == pytest.approx(math.log2(11))


def test_channels_without_rope_do_not_turn():
    partial = tiny.model("gpt_neox", num_key_value_heads=4, rotary_pct=0.5)
    item = describe(partial).attention[0]
    assert len(rope_frequencies(partial, item.module)) == item.head_dim // 4
    opt = tiny.model("opt")
    assert rope_frequencies(opt, describe(opt).attention[0].module) is None


def test_ordinary_biases_are_not_huge_and_unread_ones_are_unknown():
    model = tiny.model("qwen2")
    assert describe(model).key_biases == ()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.fill_(0.5)
    assert describe(model).key_biases == ()
    assert describe(model.to("meta")).key_biases is None
    assert describe(tiny.model("llama").to("meta")).key_biases == ()
