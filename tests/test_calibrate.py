"""Calibration: right numbers, unchanged model, and a killed run that resumes to the same bits."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from squeeze.calibrate import PARTIAL, STATISTICS, Stats, calibrate
from squeeze.errors import CheckpointError, UnsupportedError
from tests import tiny


def text(samples=6, length=12):
    return torch.randint(3, 128, (samples, length))


def fisher_by_autograd(model, tokens, name):
    """Mean over samples of the squared gradient, by one backward through the whole model."""
    weight = model.get_submodule(name).weight
    total = torch.zeros_like(weight)
    for sample in tokens:
        logits = model(sample[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, sample[1:], reduction="sum")
        total += torch.autograd.grad(loss, weight)[0].square()
    return total / len(tokens)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_fisher_is_the_squared_gradient(family):
    model, tokens = tiny.model(family), text()
    stats = calibrate(model, tokens, {"fisher"})
    assert len(stats.tensors["fisher"]) > 0
    for name, found in stats.tensors["fisher"].items():
        expected = fisher_by_autograd(model, tokens, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)


def moments_by_autograd(model, tokens, name):
    """Means over tokens of ``x x^T``, the same weighted by ``mean(g^2)``, and of ``g g^T``."""
    kept = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, output: kept.append((args[0], output)))
    sums = [0, 0, 0]
    for sample in tokens:
        logits = model(sample[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, sample[1:], reduction="sum")
        x, output = kept.pop()
        g = torch.autograd.grad(loss, output)[0][0]
        parts = zip(x[0], g, strict=True)
        for read, grad in parts:
            outer = torch.outer(read, read)
            terms = (outer, outer * grad.square().mean(), torch.outer(grad, grad))
            sums = [total + term for total, term in zip(sums, terms, strict=True)]
    handle.remove()
    return [total.detach() / tokens.numel() for total in sums]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_hessians_are_moments_of_inputs_and_output_gradients(family):
    model, tokens = tiny.model(family), text(samples=5)
    wanted = ("hessian", "guided_hessian", "output_hessian")
    tensors = calibrate(model, tokens, set(wanted)).tensors
    assert (
        tensors["hessian"].keys() == calibrate(model, tokens, {"fisher"}).tensors["fisher"].keys()
    )
    for name in tensors["hessian"]:
        for statistic, expected in zip(
            wanted, moments_by_autograd(model, tokens, name), strict=True
        ):
            found = tensors[statistic][name]
            if statistic == "guided_hessian":
                expected = expected[None]
            spread = 1e-5 * float(expected.abs().max())  # of sums that cancel
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=spread)


def test_key_mean_is_the_mean_of_cached_keys(llama):
    tokens = text()
    stats = calibrate(llama, tokens, {"key_mean"})
    cache = llama(tokens, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        found = stats.tensors["key_mean"][f"model.layers.{index}.self_attn"]
        torch.testing.assert_close(found, layer.keys.mean(dim=(0, 2)), rtol=1e-4, atol=1e-6)


def test_kv_samples_are_keys_and_values_of_tokens_spread_over_all_positions(llama):
    tokens = text(samples=3)
    stats = calibrate(llama, tokens, {"kv_samples"})
    last = llama.config.max_position_embeddings - tokens.shape[1]
    caches = [
        llama(
            sample[None], position_ids=torch.arange(tokens.shape[1])[None] + start, use_cache=True
        ).past_key_values
        for sample, start in zip(tokens, (0, last // 2, last), strict=True)
    ]
    for index in range(len(caches[0].layers)):
        found = stats.tensors["kv_samples"][f"model.layers.{index}.self_attn"]
        assert found.dtype == torch.float16
        for side, name in enumerate(("keys", "values")):
            parts = [getattr(cache.layers[index], name)[0] for cache in caches]
            expected = torch.cat(parts, dim=1)
            torch.testing.assert_close(found[side].float(), expected, rtol=1e-2, atol=1e-3)


def test_kv_samples_are_bounded_and_evenly_spaced(llama, monkeypatch):
    monkeypatch.setattr("squeeze.calibrate.SAMPLED_TOKENS", 6)
    tokens = text(samples=2, length=12)
    bounded = calibrate(llama, tokens, {"kv_samples"}).tensors["kv_samples"]
    monkeypatch.undo()
    whole = calibrate(llama, tokens, {"kv_samples"}).tensors["kv_samples"]
    places = torch.tensor([2, 6, 10, 14, 18, 22])
    for name, found in bounded.items():
        assert torch.equal(found, whole[name][:, :, places])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_kv_importance_is_the_mean_square_of_queries(family):
    model, tokens = tiny.model(family), text(samples=2)
    found = calibrate(model, tokens, {"kv_importance"}).tensors["kv_importance"]
    seen = {}

    def spy(module, query, key, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        squares = query.square().unflatten(1, (key.shape[1], groups)).mean(dim=(0, 2, 3))
        seen[module.layer_idx] = squares
        return sdpa(module, query, key, *args, **kwargs)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model.set_attn_implementation("sdpa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
        model(tokens)
    assert len(found) == len(seen) == 2
    for name, importance in found.items():
        index = int(name.split(".")[2])
        torch.testing.assert_close(importance[0], seen[index], rtol=1e-4, atol=1e-6)
        assert importance[1].eq(1).all()


def test_leaves_the_model_as_it_was(llama):
    tokens = text()
    llama.train()
    before = llama(tokens[:1]).logits
    flags = [p.requires_grad for p in llama.parameters()]
    calibrate(llama, tokens, {"fisher", "key_mean", "kv_importance", "kv_samples"})
    assert llama.training
    assert [p.requires_grad for p in llama.parameters()] == flags
    assert all(p.grad is None for p in llama.parameters())
    assert all("forward" not in layer.__dict__ for layer in llama.model.layers)
    assert torch.equal(llama(tokens[:1]).logits, before)


def test_bfloat16_model_is_measured_in_float32(llama):
    tokens = text()
    exact = calibrate(llama, tokens, {"fisher"}).tensors["fisher"]
    rough = calibrate(llama.bfloat16(), tokens, {"fisher"}).tensors["fisher"]
    for name, tensor in rough.items():
        assert tensor.dtype == torch.float32
        error = (tensor - exact[name]).norm() / exact[name].norm()
        assert error < 0.1


def test_killed_run_resumes_to_the_same_bits(llama, tmp_path):
    tokens = text(10)
    wanted = set(STATISTICS)
    whole = calibrate(llama, tokens, wanted)

    def kill(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, tokens, wanted, folder=tmp_path, progress=kill)
    seen = []
    resumed = calibrate(
        llama, tokens, wanted, folder=tmp_path,
        progress=lambda stage, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(8, 10), (10, 10)]
    for statistic, modules in whole.tensors.items():
        assert modules.keys() == resumed.tensors[statistic].keys()
        for name, tensor in modules.items():
            assert torch.equal(tensor, resumed.tensors[statistic][name])


def test_progress_of_another_run_is_refused(llama, tmp_path):
    calibrate(llama, text(2), {"key_mean"}, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"another model.*Remove the file"):
        calibrate(llama, text(2), {"key_mean"}, folder=tmp_path)


def test_damaged_progress_is_refused(llama, tmp_path):
    (tmp_path / PARTIAL).write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        calibrate(llama, text(2), {"key_mean"}, folder=tmp_path)


def test_stats_round_trip(llama, tmp_path):
    stats = calibrate(llama, text(2), {"fisher", "key_mean"})
    stats.save(tmp_path / "stats.safetensors")
    loaded = Stats.load(tmp_path / "stats.safetensors")
    assert loaded.to_dict() == stats.to_dict()
    for statistic, modules in stats.tensors.items():
        for name, tensor in modules.items():
            assert torch.equal(tensor, loaded.tensors[statistic][name])
    assert "2 samples, 24 tokens" in stats.table()


def test_nothing_asked_is_nothing_done(llama):
    assert calibrate(llama, text(), set()) == Stats({}, 0, 0)


def test_refuses(llama):
    with pytest.raises(ValueError, match="unknown statistics"):
        calibrate(llama, text(), {"jacobian"})
    with pytest.raises(ValueError, match="tokens must be"):
        calibrate(llama, text()[0], {"fisher"})
    with pytest.raises(UnsupportedError, match="no list of decoder layers"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), text(), {"fisher"})
