"""Weights fitted layer by layer: the same as all at once, resumable, in memory that is bounded."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.multiprocessing import start_processes

from squeeze import api, processes
from squeeze.calibrate import STATISTICS, Stats, calibrate
from squeeze.compress import compress, fit_tables
from squeeze.errors import CheckpointError, UnsupportedError
from squeeze.evaluation.suite import calibration_tokens
from squeeze.layerwise import FILE, fit_layers, streamed
from squeeze.linear import reconstruct
from squeeze.loading import load_tokenizer
from squeeze.quant.weights.lnq import Lnq
from squeeze.recipe import load
from squeeze.swapping import Artifacts, swap
from squeeze.tensor_files import flatten, unflatten
from tests import ssm, tiny
from tests.test_integer_flow import uneven

SOME = {"targets": ["q_proj", "v_proj", "o_proj", "down_proj", "mixer"]}
LNQ = {"method": "lnq", "bits": 2, "rounds": 1, **SOME}
RULES = {
    "guided": [LNQ],
    "coupled": [{**LNQ, "sweeps": 1, "targets": ["k_proj", "down_proj"]}],
    "plain": [{**LNQ, "guidance": "none"}],
    "fisher": [{"method": "kmeans", "bits": 2}],
    "gptq": [{"method": "integer", "bits": 4, "group_size": 32, "rounding": "gptq"}],
    "awq": [{"method": "integer", "bits": 3, "group_size": 32, "scaling": "awq"}],
    "mixed": [LNQ, {"method": "kmeans", "bits": 3, "targets": ["down_proj"]}],
}


def text(samples=6, length=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (samples, length), generator=generator)


def planned(model, rules):
    return api.plan({"weights": rules}, model, device="cpu")


def assert_same(first, second):
    assert first.keys() == second.keys()
    for module, weight in first.items():
        for name, tensor in weight.tensors().items():
            assert torch.equal(tensor, second[module].tensors()[name]), (module, name)


def assert_close(first, second):
    """Equal, but where sums in another order make a near tie fall the other way."""
    assert first.keys() == second.keys()
    for module, weight in first.items():
        for name, tensor in weight.tensors().items():
            other = second[module].tensors()[name]
            same = (tensor == other) | torch.isclose(tensor.float(), other.float(), rtol=1e-2)
            assert same.float().mean() > 0.98, (module, name)


@pytest.mark.parametrize("rule", RULES)
def test_dense_inputs_give_what_one_calibration_gives(llama, rule):
    plan, tokens = planned(llama, RULES[rule]), text()
    whole = compress(llama, plan, calibrate(llama, tokens, set(plan.statistics)))
    again, weights = fit_layers(llama, plan, tokens, {})
    assert again == plan
    assert_close(weights, whole.weights)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_state_space_models_go_layer_by_layer_too(name):
    model, tokens = ssm.model(name), text()
    plan = planned(model, [LNQ])
    whole = compress(model, plan, calibrate(model, tokens, set(plan.statistics)))
    assert_close(fit_layers(model, plan, tokens, {})[1], whole.weights)
    assert_finite(fit_layers(model, plan, tokens, {}, quantized=True)[1])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_go_layer_by_layer_too(family, quantized):
    model, tokens = tiny.model(family), text(samples=2, length=16)
    plan = planned(model, [{**LNQ, "targets": ["q_proj", "experts"]}])
    stats = calibrate(model, tokens, set(plan.statistics), experts=True)
    whole = compress(model, plan, stats)
    noted, weights = fit_layers(model, plan, tokens, {}, quantized=quantized)
    assert ("no calibration token" in " ".join(noted.notes)) == _unrouted(plan, stats)
    experts = {row.module for row in plan.weights if row.experts}
    assert experts
    expected = {name: whole.weights[name] for name in experts}
    assert_close({name: weights[name] for name in experts}, expected)
    assert_finite(weights)


def _unrouted(plan, stats):
    measured = stats.tensors["guided_hessian"]
    names = [f"{r.module}.{e}" for r in plan.weights for e in range(r.experts)]
    return not all(name in measured for name in names)


def assert_finite(weights):
    assert weights
    for weight in weights.values():
        assert all(tensor.float().isfinite().all() for tensor in weight.tensors().values())


def output_error(model, plan, weights, tokens):
    """Mean square error of the last hidden state over some tokens."""
    with torch.no_grad():
        before = model.model(tokens).last_hidden_state
        with swap(model, Artifacts(plan, weights, {})) as packed:
            return (packed.model(tokens).last_hidden_state - before).square().mean()


def test_quantized_inputs_lower_the_error_at_the_end():
    model, tokens = tiny.model("llama", num_hidden_layers=3), text(24, 32)
    plan = planned(model, [{"method": "lnq", "bits": 2, "rounds": 1, "guidance": "none"}])
    error = {}
    for quantized in (False, True):
        weights = fit_layers(model, plan, tokens, {}, quantized=quantized)[1]
        error[quantized] = output_error(model, plan, weights, tokens)
    assert error[True] < 0.9 * error[False]


def test_input_scales_are_taken_out_behind_packed_layers():
    model, tokens = uneven("llama"), text(24, 32)
    plan = planned(model, RULES["awq"])
    assert any(row.producer for row in plan.weights)
    error = {}
    for quantized in (False, True):
        weights = fit_layers(model, plan, tokens, {}, quantized=quantized)[1]
        assert any(weight.exponents.any() for weight in weights.values())
        error[quantized] = output_error(model, plan, weights, tokens)
    assert error[True] < error[False]


def test_key_scales_are_taken_out_behind_packed_layers(llama):
    """Powers of two that cancel change nothing that a later layer reads."""
    smooth = {"method": "smooth", "pairs": True, "fold": True}
    affine = {"method": "affine", "group_size": 16}
    sides = {"keys": {**affine, "transforms": [smooth]}, "values": affine}
    cache = {**sides, "residual_length": 8, "block_length": 32}
    rules = [{**LNQ, "guidance": "none"}]
    plan = api.plan({"weights": rules, "kv_cache": cache}, llama, device="cpu")
    with torch.no_grad():
        llama.model.layers[0].self_attn.k_proj.weight[::8].mul_(64.0)
    tokens = text()
    needed = set(plan.statistics) - streamed(plan)
    tables = fit_tables(llama, plan, calibrate(llama, tokens, needed))
    found = fit_layers(llama, plan, tokens, tables, quantized=True)[1]
    plain = fit_layers(llama, plan, tokens, {}, quantized=True)[1]
    last = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(reconstruct(found[last]), reconstruct(plain[last]))
    query = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(reconstruct(found[query]), reconstruct(plain[query]))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rule", ["guided", "coupled"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, rule, quantized):
    model, tokens = tiny.model("llama", num_hidden_layers=4), text()
    plan = planned(model, RULES[rule])
    unbroken = fit_layers(model, plan, tokens, {}, quantized=quantized)[1]

    def kill(at):
        def tell(stage, done, total):
            if (stage, done) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_layers(model, plan, tokens, {}, quantized=quantized, folder=tmp_path, progress=tell)

    kill(("calibrate", 1))
    assert not (tmp_path / FILE.format(0)).exists()
    kill(("compress", len(plan.weights) // 2))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [(tmp_path / FILE.format(i)).exists() for i in range(4)] == [True, True, False, False]
    resumed = fit_layers(model, plan, tokens, {}, quantized=quantized, folder=tmp_path)[1]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert_same(resumed, unbroken)
    finished = fit_layers(model, plan, tokens, {}, quantized=quantized, folder=tmp_path)[1]
    assert_same(finished, unbroken)


@pytest.mark.parametrize("inputs", ["dense", "quantized"])
def test_a_run_fits_layer_by_layer_as_the_recipe_says(inputs):
    model, tokenizer = tiny.model("llama", vocab_size=8192), load_tokenizer("reference")
    settings = {"samples": 3, "length": 24, "inputs": inputs}
    recipe = {"weights": RULES["plain"], "calibration": settings}
    tokens = calibration_tokens(tokenizer, load(recipe).calibration)
    plan = api.plan(recipe, model, device="cpu")
    expected = fit_layers(model, plan, tokens, {}, quantized=inputs == "quantized")[1]
    result = api.run(recipe, model, tokenizer=tokenizer, evaluate=False)
    assert_same(result.artifacts.weights, expected)


def test_another_runs_layers_are_refused(llama, tmp_path):
    plan = planned(llama, RULES["plain"])
    fit_layers(llama, plan, text(2), {}, folder=tmp_path)
    for tokens, quantized in ((text(3), False), (text(2), True)):
        with pytest.raises(CheckpointError, match=r"another model.*Remove the file"):
            fit_layers(llama, plan, tokens, {}, quantized=quantized, folder=tmp_path)


def live_bytes():
    """Bytes of all tensors that Python can reach, each storage once."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):  # asking the object itself warns
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(monkeypatch, depth, quantized):
    """Most bytes that a run holds beside the model while weights are fitted, and packed bytes."""
    model, tokens = tiny.model("llama", num_hidden_layers=depth), text(2, 16)
    plan = planned(model, [{**LNQ, "sweeps": 1, "targets": ["o_proj", "down_proj"]}])
    before, held = live_bytes(), []
    fit = Lnq.fit

    def watched(self, weight, statistics):
        held.append(live_bytes() - before)
        return fit(self, weight, statistics)

    with monkeypatch.context() as patch:
        patch.setattr(Lnq, "fit", watched)
        weights = fit_layers(model, plan, tokens, {}, quantized=quantized)[1]
    return max(held), sum(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize("quantized", [False, True])
def test_memory_does_not_grow_with_depth(monkeypatch, quantized):
    layer = sum(p.nbytes for p in tiny.model("llama").model.layers[0].parameters())
    small, packed = peak_bytes(monkeypatch, 2, quantized)
    large, more = peak_bytes(monkeypatch, 6, quantized)
    assert large - small < (more - packed) + layer / 10
    # Copies of a layer, their statistics (three matrices as large as the weights, at most)
    # and hidden states of 32 tokens.
    assert large - more < (2 + quantized) * layer + 3 * layer + 10 * 32 * 64 * 4


def work_together(rank, path, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    stats = calibrate(tiny.model("llama"), text(5), set(STATISTICS))
    model = tiny.model("llama")
    plan = planned(model, RULES["guided"])
    weights = fit_layers(model, plan, text(5), {}, quantized=True, folder=folder)[1]
    if rank == 1:
        stats.save(folder / "stats.safetensors")
        packed = {name: weight.tensors() for name, weight in weights.items()}
        save_file(flatten(packed), folder / "weights.safetensors")
    distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(llama, tmp_path):
    meet = functools.partial(work_together, path=tmp_path / "meeting", folder=tmp_path)
    start_processes(meet, nprocs=2, start_method="fork")
    alone = calibrate(llama, text(5), set(STATISTICS))
    together = Stats.load(tmp_path / "stats.safetensors")
    assert (together.samples, together.tokens) == (alone.samples, alone.tokens)
    for statistic, modules in alone.tensors.items():
        assert modules.keys() == together.tensors.get(statistic, {}).keys()
        for name, tensor in modules.items():
            found = together.tensors[statistic][name]
            torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-6 * float(tensor.max()))
    weights = fit_layers(llama, planned(llama, RULES["guided"]), text(5), {}, quantized=True)[1]
    packed = unflatten(load_file(tmp_path / "weights.safetensors"))
    found = {name: weights[name].with_tensors(own) for name, own in packed.items()}
    assert_close(found, weights)


def test_fewer_samples_than_processes_are_refused(llama, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(UnsupportedError, match=r"calibration.samples.*2 for 3 processes"):
        fit_layers(llama, planned(llama, RULES["plain"]), text(2), {})


def test_what_is_left_to_an_allocation_is_measured_at_once(llama):
    open_bits = {"mean_bits": 3.6, "candidates": [{"bits": 2}, {"bits": 3}]}
    plan = planned(llama, {"method": "lnq", **open_bits})
    assert streamed(plan) == set()
    chosen = replace(plan.weight_allocation, chosen="uniform")
    assert streamed(replace(plan, weight_allocation=chosen)) == {"guided_hessian"}
    assert streamed(planned(llama, RULES["mixed"])) == {"fisher", "guided_hessian"}
