"""Decode steps whose layers are fused, against steps that run the layers' own modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import squeeze
from squeeze import api
from squeeze.errors import SqueezeWarning
from squeeze.families import refusal
from squeeze.joint import Joint
from squeeze.joint import refusal as apart
from squeeze.layers import decoder_layers
from tests import tiny
from tests.test_cache import RECIPE
from tests.test_decode_step import ALL, Traces, assert_same, both

PALETTE = [{"method": "kmeans", "bits": 4, "importance": "none"}]
INTEGERS = [{"method": "integer", "bits": 4, "group_size": 32}]


class Repeats(Traces):
    """Records by remembering what to do, which is faster than tracing it."""

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        output = work()
        if output is None:  # encodes blocks, and is done
            return work, None
        kept = output["logits"] = torch.full_like(output.logits, torch.nan)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            kept.copy_(work().logits)

        return replay, output


def with_weights(weights: Any) -> dict[str, Any]:
    return {**RECIPE, "weights": weights}


def randomised(name: str, **extra: Any) -> Any:
    """Make a model whose norms and biases are no ones and zeros."""
    model = tiny.model(name, **extra)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def prepared(model: Any, recipe: Any = RECIPE, recorder: type[Traces] = Repeats) -> Any:
    """Squeeze a model that records its steps."""
    traces = recorder()
    own = squeeze.run(recipe, model, evaluate=False).model
    own.squeeze_step.recorder, own.squeeze_step.enabled = traces, True
    return own, traces


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", 1), ("llama", 3), ("mistral", 1), ("qwen2", 3), ("qwen3", 3)]
)
def test_generate_gives_what_unfused_steps_give(name: str, rows: int) -> None:
    recorder = Traces if (name, rows) == ("llama", 3) else Repeats
    model, traces = prepared(randomised(name), recorder=recorder)
    inputs = tiny.prompt(rows, 90, pads=(7, 0, 30)[: rows - 1])
    ours, theirs = both(model, inputs, **ALL, max_new_tokens=36)
    assert_same(ours, theirs)
    step = model.squeeze_step
    assert list(step.fusion.layers) == [0, 1] and not step.fusion.reasons
    assert step.fuses and step.compared and traces.replayed == 33


def test_fusing_is_switched_off_for_caches_to_come() -> None:
    model, traces = prepared(randomised("llama"))
    step, inputs = model.squeeze_step, tiny.prompt(1, 50)
    step.fuses = False
    ours = model.generate(**inputs, **ALL, max_new_tokens=10)
    assert step.fusion is None and traces.recorded == 1
    step.fuses = True
    assert_same(model.generate(**inputs, **ALL, max_new_tokens=10), ours)
    assert step.compared and traces.recorded == 2


@pytest.mark.parametrize("weights", [PALETTE, INTEGERS])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_weights_are_read_together(name: str, weights: Any) -> None:
    model, _ = prepared(randomised(name, intermediate_size=128), with_weights(weights))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    ours, theirs = both(model, tiny.prompt(2, 60, pads=(9,)), **ALL, max_new_tokens=20)
    assert_same(ours, theirs)
    assert model.squeeze_step.fusion.moved == 4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in after.values()
    }
    assert sum(storages.values()) <= sum(x.numel() * x.element_size() for x in before.values())


def test_steps_of_several_tokens_are_fused() -> None:
    changed = {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 32}}
    model, traces = prepared(randomised("qwen3"), changed)
    ids = tiny.prompt(1, 12)["input_ids"].repeat(1, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"do_sample": False, "max_new_tokens": 60, "prompt_lookup_num_tokens": 4}
    ours, theirs = both(model, inputs, **settings)
    assert torch.equal(ours, theirs)
    assert model.squeeze_step.compared and traces.replayed > 10


def test_a_layer_that_computes_something_else_is_found_out(monkeypatch: Any) -> None:
    model, traces = prepared(randomised("llama"))
    monkeypatch.setattr(
        "squeeze.fused_layer.silu_mul", lambda gate, up, implementation: gate.relu() * up
    )
    inputs = tiny.prompt(2, 50)
    with pytest.warns(SqueezeWarning, match="fused layers are off by"):
        ours = model.generate(**inputs, **ALL, max_new_tokens=20)
    step = model.squeeze_step
    # The steps after the prompt are compared, warm up and are watched.
    assert not step.fuses and step.enabled and traces.replayed == 16
    step.enabled = False
    assert_same(ours, model.generate(**inputs, **ALL, max_new_tokens=20))


def scaled(module: Any, args: Any) -> Any:
    return (args[0] * 1.5,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x: setattr(x.mlp, "act_fn", nn.GELU()),
            r"mlp\.act_fn is .*GELU, not SiLU or SiLUActivation",
        ),
        (
            lambda x: setattr(x.self_attn, "gate", nn.Identity()),
            r"self_attn\.gate is .*Identity, not expected",
        ),
        (
            lambda x: setattr(x.mlp, "down_proj", nn.Identity()),
            r"mlp\.down_proj is .*Identity, not Linear",
        ),
        (lambda x: delattr(x, "input_layernorm"), "input_layernorm is missing"),
        (lambda x: x.mlp.register_forward_pre_hook(scaled), "mlp has hooks"),
        (lambda x: setattr(x.mlp, "forward", print), "mlp has a forward of its own"),
        (lambda x: setattr(x.self_attn, "sliding_window", 16), "its attention has a window"),
        (lambda x: x.input_layernorm.bfloat16(), "norms are of several dtypes"),
    ],
)
def test_what_is_not_expected_in_a_layer_is_named(change: Any, reason: str) -> None:
    layer = tiny.model("llama").model.layers[0]
    assert refusal(layer) is None
    change(layer)
    found = refusal(layer)
    assert found is not None and re.search(reason, found), found


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_other_families_run_as_they_are(name: str) -> None:
    layer = decoder_layers(tiny.model(name))[1][0]
    found = refusal(layer)
    assert found is not None and "none of the classes that are spelled out" in found


def test_a_layer_beside_an_unfused_one_is_fused() -> None:
    model, traces = prepared(randomised("qwen3"))
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("Other", (type(mlp),), {})
    ours, theirs = both(model, tiny.prompt(2, 60, pads=(9,)), **ALL, max_new_tokens=20)
    assert_same(ours, theirs)
    fusion = model.squeeze_step.fusion
    assert list(fusion.layers) == [0] and fusion.reasons[1].startswith("mlp is ")
    assert traces.replayed == 17


def test_nothing_of_it_stays_in_the_model() -> None:
    dense = randomised("llama")
    before = {name: x.clone() for name, x in dense.state_dict().items()}
    traces = Repeats()
    done = squeeze.swap(dense, squeeze.run(RECIPE, tiny.model("llama"), evaluate=False).artifacts)
    dense.squeeze_step.recorder, dense.squeeze_step.enabled = traces, True
    dense.generate(**tiny.prompt(2, 50), **ALL, max_new_tokens=10)
    assert dense.squeeze_step.fusion.moved == 4
    twin = copy.deepcopy(dense)
    assert twin.squeeze_step.fusion.layers[0].layer is twin.model.layers[0]
    done.restore()
    assert not any("forward" in vars(module) for module in dense.modules())
    after = dense.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def linear(out: int, seed: int = 0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(32, out, bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_a_joint_product_is_that_of_its_parts(bias: bool) -> None:
    parts = [linear(out, out, bias) for out in (8, 16, 4)]
    joint, x = Joint(parts), torch.randn(2, 3, 32)
    expected = [part(x) for part in parts]
    assert all(torch.equal(a, b) for a, b in zip(joint(x), expected, strict=True))
    assert joint.join() and not joint.join()
    found = joint(x)
    assert found[0].untyped_storage().data_ptr() == found[2].untyped_storage().data_ptr()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for part in parts:
        part.double()
    found = joint(x.double())
    assert all(torch.equal(a, part(x.double())) for a, part in zip(found, parts, strict=True))
    assert joint.join()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([linear(8), nn.Identity()], "several kinds"),
        ([linear(8), linear(8, bias=True)], "some have a bias"),
        ([linear(8), nn.Linear(16, 8, False)], "weight differs in shape"),
        ([linear(8), linear(8).half()], "weight differs in kind"),
        ([linear(8, bias=True).half(), linear(3, bias=True).half(), linear(8, bias=True).half()],
         "bias would not be aligned"),
    ],
)  # fmt: skip
def test_layers_that_differ_stay_apart(parts: list[Any], reason: str) -> None:
    found = apart(parts)
    assert found is not None and reason in found
    if all(isinstance(part, nn.Linear) for part in parts):
        assert not Joint(parts).join()


@pytest.mark.parametrize("targets", [["k_proj", "up_proj"], ["q_proj", "gate_proj"]])
def test_packed_layers_beside_dense_ones_stay_apart(targets: list[str]) -> None:
    weights = [{**PALETTE[0], "targets": targets}]
    model, traces = prepared(randomised("qwen2"), with_weights(weights))
    assert_same(*both(model, tiny.prompt(2, 50), **ALL, max_new_tokens=10))
    assert model.squeeze_step.compared and traces.replayed == 7


def test_fused_layers_that_fail_are_said_and_not_run(monkeypatch: Any) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("cos is float32")

    model, traces = prepared(randomised("llama"))
    monkeypatch.setattr("squeeze.fused_layer.rope_append", fails)
    inputs = tiny.prompt(2, 50)
    with pytest.warns(SqueezeWarning, match=r"fused layers fail \(cos is float32\), so layers run"):
        ours, theirs = both(model, inputs, **ALL, max_new_tokens=10)
    assert_same(ours, theirs)
    assert not model.squeeze_step.fuses and traces.replayed == 6


def test_weights_of_several_bits_stay_apart() -> None:
    weights = [{**PALETTE[0], "bits": 3}, {**PALETTE[0], "bits": 4, "targets": ["q_proj"]}]
    model, _ = prepared(randomised("llama"), with_weights(weights))
    assert_same(*both(model, tiny.prompt(2, 50), **ALL, max_new_tokens=10))
    assert model.squeeze_step.fusion.moved == 2
    attention = model.model.layers[0].self_attn
    assert apart([attention.q_proj, attention.k_proj]) is not None


def test_the_plan_says_which_layers_are_fused() -> None:
    plan = api.plan(RECIPE, tiny.model("qwen3"))
    assert "recorded decode steps: layers 0-1 run fused" in plan.table()
    assert type(plan).from_dict(plan.to_dict()) == plan
    plan = api.plan(RECIPE, tiny.model("phi3"))
    reason = "Phi3DecoderLayer is none of the classes that are spelled out"
    assert f"recorded decode steps: layers 0-1 run as they are: {reason}" in plan.table()
    assert "recorded" not in api.plan({"weights": PALETTE}, tiny.model("llama")).table()
    offloaded = {"kv_cache": {**RECIPE["kv_cache"], "offload": True}}
    reason = "kv_cache.offload is on"
    table = api.plan(offloaded, tiny.model("llama")).table()
    assert f"decode steps are not recorded: {reason}" in table
    table = api.plan(RECIPE, tiny.model("gemma3")).table()
    assert "decode steps are not recorded: layers 0 keep their own cache" in table
