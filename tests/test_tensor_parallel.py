"""Two processes that share a squeezed model compute what one does."""

import dataclasses

import pytest
import torch

import squeeze
import tests.parallel as parallel
from squeeze import api, tensor_parallel
from squeeze.errors import UnsupportedError
from squeeze.linear import PackedLinear
from squeeze.loading import load_model
from squeeze.tensor_parallel import Processes, check, style_of

STYLES = {
    "lm_head": "colwise_gather_output",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    result = parallel.save(folder, request.param)
    model = squeeze.load(folder / "squeezed", device="cpu")
    output = parallel.generate(model)
    logits = parallel.forced(model, output.sequences)
    return folder, result.artifacts, output.sequences, logits, output.past_key_values.nbytes


def check_loaded(folder, tokens, logits, nbytes):
    model = squeeze.load(folder / "squeezed", tp_plan="auto")
    assert all(isinstance(m, PackedLinear) for n, m in model.named_modules() if n.endswith("_proj"))
    assert model.model.layers[0].self_attn.k_proj.out_features == 16  # one of two heads
    assert model.model.layers[0].self_attn.o_proj.in_features == 32
    output = parallel.generate(model)
    assert torch.equal(output.sequences, tokens)
    assert output.past_key_values.nbytes == pytest.approx(nbytes / 2, rel=0.01)
    found = parallel.forced(model, tokens)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    reason = model.squeeze_step._refusal(output.past_key_values, {})
    assert reason == "the model is split by tensor parallelism"
    for refused in (
        lambda: model.save_pretrained(folder / "again"),
        lambda: model.dequantize(),
        lambda: squeeze.run(parallel.RECIPE, model, evaluate=False),
        lambda: api.inspect_model(model),
        lambda: squeeze.save_prompt(
            output.past_key_values, folder / "prompt", tokens=tokens, model=model
        ),
    ):
        with pytest.raises(UnsupportedError, match="split over"):
            refused()


def test_a_loaded_model(saved, tmp_path):
    folder, _, tokens, logits, nbytes = saved
    parallel.together(tmp_path / "meeting", check_loaded, folder, tokens, logits, nbytes)


def check_swapped(folder, artifacts, tokens, logits):
    model = load_model(folder / "dense", tp_plan="auto")
    dense = parallel.forced(model, tokens)
    with squeeze.swap(model, artifacts):
        found = parallel.forced(model, tokens)
        assert model.model.layers[1].mlp.up_proj.out_features == 64
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert torch.equal(parallel.forced(model, tokens), dense)


def test_a_swapped_model(saved, tmp_path):
    folder, artifacts, tokens, logits, _ = saved
    parallel.together(tmp_path / "meeting", check_swapped, folder, artifacts, tokens, logits)


def check_run(folder, tokens):
    made = squeeze.run(parallel.RECIPE, folder / "dense", evaluate=False, tp_plan="auto")
    assert made.model.model.layers[0].self_attn.k_proj.out_features == 16
    found = parallel.forced(made.model, tokens)
    whole = load_model(folder / "dense")
    squeeze.swap(whole, made.artifacts)
    logits = parallel.forced(whole, tokens)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_a_run_ends_with_a_split_model(saved, tmp_path):
    folder, _, tokens, _, _ = saved
    parallel.together(tmp_path / "meeting", check_run, folder, tokens)


def test_a_run_does_not_split_what_it_is_given(llama):
    with pytest.raises(UnsupportedError, match="run: tp_plan: the model was passed in whole"):
        squeeze.run({}, llama, tp_plan="auto")


SCALED = {
    "weights": [{"method": "integer", "bits": 4, "group_size": 64, "scaling": "awq"}],
    "kv_cache": {
        "keys": {
            "method": "affine",
            "bits": 4,
            "granularity": "channel",
            "group_size": 32,
            "transforms": [{"method": "smooth", "pairs": True, "fold": True}],
        },
        "values": {"method": "affine", "bits": 4, "granularity": "token", "group_size": 16},
    },
    "calibration": {"samples": 2, "length": 64},
}


def check_scales(folder, artifacts, tokens, logits):
    for model in (squeeze.load(folder / "squeezed", tp_plan="auto"), None):
        if model is None:
            model = load_model(folder / "dense", tp_plan="auto")
            squeeze.swap(model, artifacts)
        found = parallel.forced(model, tokens)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scales_folded_into_split_weights(name, tmp_path):
    result = parallel.save(tmp_path, name, SCALED)
    tokens = parallel.generate(result.model).sequences
    logits = parallel.forced(result.model, tokens)
    meeting = tmp_path / "meeting"
    parallel.together(meeting, check_scales, tmp_path, result.artifacts, tokens, logits)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    parallel.save(tmp_path, "llama")
    model = squeeze.load(tmp_path / "squeezed", device="cuda")
    tokens = parallel.generate(model).sequences.cpu()
    logits = parallel.forced(model, tokens)
    parallel.together(tmp_path / "meeting", check_gpus, tmp_path, tokens, logits, gpu=True)


def check_gpus(folder, tokens, logits):
    model = squeeze.load(folder / "squeezed", tp_plan="auto")
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    found = parallel.forced(model, tokens)
    # Products on tensor cores round their inputs to 11 bits.
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-2 * float(logits.abs().max()))


def test_styles_by_name():
    assert style_of(STYLES, "model.layers.17.mlp.down_proj") == "rowwise"
    assert style_of(STYLES, "lm_head") == "colwise_gather_output"
    assert style_of(STYLES, "model.layers.17.mlp.gate_proj") is None


def test_shares_are_runs():
    assert Processes(1, 2, None).share(8) == slice(4, 8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "tensor parallel: model.layers.0.self_attn.q_proj: 64 rows for 3 processes."),
        (4, "tensor parallel: model.layers.0.self_attn: 2 key heads for 4 processes."),
    ],
)
def test_refused_before_anything_is_loaded(size, message):
    plan = api.plan(parallel.RECIPE, parallel.tiny.model("llama", intermediate_size=128))
    check(plan, STYLES, 2)
    with pytest.raises(UnsupportedError, match=message) as found:
        check(plan, STYLES, size)
    assert str(found.value).endswith("Start another number of processes, or load the model whole.")


def test_a_plan_says_whether_it_can_be_split(llama):
    api.plan(parallel.RECIPE, llama, tp_size=1)
    with pytest.raises(UnsupportedError, match="2 key heads for 4 processes"):
        api.plan(parallel.RECIPE, llama, tp_size=4)
    with pytest.raises(UnsupportedError, match="tensor parallel: gpt2: transformers has no"):
        api.plan("dense", parallel.tiny.model("gpt2"), tp_size=2)


def test_groups_that_end_elsewhere_are_refused():
    plan = api.plan(
        {"weights": [{"method": "integer", "bits": 4, "group_size": 32}]},
        parallel.tiny.model("llama"),
    )
    with pytest.raises(UnsupportedError, match="would cut every 48 columns"):
        check(plan, STYLES, 2)


def test_unknown_styles_and_packed_experts_are_refused():
    plan = api.plan({"weights": [{"method": "kmeans", "bits": 4}]}, parallel.tiny.model("llama"))
    styles = {**STYLES, "model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(UnsupportedError, match="up_proj: style 'packed_colwise'"):
        check(plan, styles, 2)
    row = dataclasses.replace(plan.weights[0], module="model.layers.0.mlp.experts.up", experts=4)
    with pytest.raises(UnsupportedError, match="packed experts"):
        check(
            dataclasses.replace(plan, weights=(row,)),
            {"model.layers.*.mlp.experts": "moe_tp_experts"},
            2,
        )


def test_a_whole_model_stays_whole(llama):
    assert tensor_parallel.processes_of(llama) is None
    tensor_parallel.require_whole(llama, "run", "")
