"""Sparse outliers: what is corrected, what it costs, and that every form of it says the same."""

import pytest
import torch

import squeeze
from squeeze import api, export
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import UnsupportedError
from squeeze.kernels.lut_linear.outliers import corrections
from squeeze.kernels.lut_linear.reference import lut_linear, reconstruct
from squeeze.quant.weights.kmeans import KMeans
from squeeze.quant.weights.lnq import Lnq
from tests import tiny

SHARE = 0.02


def problem(out=48, columns=70):
    weight = torch.randn(out, columns)
    weight[3, 5], weight[3, 69], weight[40, 0] = 30.0, -25.0, 20.0
    return weight, torch.rand(out, columns) + 0.5


def plain(**fields):
    return KMeans(bits=3, **fields)


@pytest.mark.parametrize("granularity", ["row", "rows", "tile", "tensor"])
@pytest.mark.parametrize("entries", ["int8", "float16"])
def test_corrected_weights_are_exact_and_the_rest_fits_better(granularity, entries):
    weight, mass = problem()
    fields = {"granularity": granularity, "entries": entries}
    with_them = plain(sparse_outliers=SHARE, **fields).fit(weight, {"fisher": mass})
    without = plain(**fields).fit(weight, {"fisher": mass})
    added = corrections(with_them)
    held = added != 0
    assert 0 < held.sum() <= round(SHARE * weight.numel()) == len(with_them.outlier_values)
    found = reconstruct(with_them)
    torch.testing.assert_close(found[held], weight[held], rtol=1e-3, atol=1e-3)
    errors = [(mass * (reconstruct(w) - weight).square()).sum() for w in (with_them, without)]
    assert errors[0] < 0.9 * errors[1]
    offsets = with_them.outlier_offsets
    assert offsets[0] == 0 and offsets[-1] == len(with_them.outlier_values)
    assert torch.equal(offsets.diff() >= held.sum(1), torch.ones(48, dtype=torch.bool))


def test_bytes_are_those_of_the_plan_and_a_share_of_zero_changes_nothing():
    weight, mass = problem()
    method = plain(sparse_outliers=SHARE)
    fitted = method.fit(weight, {"fisher": mass})
    assert fitted.nbytes == method.shape_bytes(48, 70)
    assert fitted.nbytes - plain().shape_bytes(48, 70) == 67 * 4 + 49 * 4
    empty = method.empty(48, 70, "meta").tensors()
    assert {n: (t.shape, t.dtype) for n, t in fitted.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in empty.items()
    }
    none = plain(sparse_outliers=0.0).fit(weight, {"fisher": mass})
    same = plain().fit(weight, {"fisher": mass})
    assert none.tensors().keys() == same.tensors().keys() == {"indices", "codebook", "scale"}


def test_columns_past_int16_are_numbered_right():
    weight = torch.zeros(2, 40000)
    weight[1, 39999], weight[0, 32768] = 7.0, 5.0
    method = KMeans(bits=1, importance="none", sparse_outliers=2 / weight.numel())
    fitted = method.fit(weight)
    assert len(fitted.outlier_values) == 2
    assert reconstruct(fitted)[1, 39999] == 7.0
    assert reconstruct(fitted)[0, 32768] == 5.0
    with pytest.raises(UnsupportedError, match="70000 columns"):
        method.check(2, 70000)


def test_lnq_lowers_its_own_loss_with_outliers():
    weight, _ = problem(48, 70)
    x = torch.randn(200, 70) * (torch.rand(70) + 0.2)
    hessian = {"guided_hessian": (x.T @ x)[None] / 200}
    losses = []
    for share in (0.0, SHARE):
        errors = reconstruct(Lnq(bits=3, sparse_outliers=share).fit(weight, hessian)) - weight
        losses.append(((errors @ hessian["guided_hessian"][0]) * errors).sum())
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_models_with_outliers_swap_save_and_load(family, tmp_path):
    model, ids = tiny.model(family), tiny.prompt(1, 20)["input_ids"]
    recipe = {"weights": [{"method": "kmeans", "bits": 4, "sparse_outliers": SHARE}]}
    plan = api.plan(recipe, model)
    stats = calibrate(model, tiny.prompt(2, 40)["input_ids"], {"fisher"}, experts=True)
    made = compress(model, plan, stats)
    assert sum(w.nbytes for w in made.weights.values()) == sum(r.bytes_after for r in plan.weights)
    squeeze.swap(model, made)
    expected = model(ids).logits
    export.save(model, made, tmp_path / "made")
    export.write_manifest(tmp_path / "made", {"plan": plan.to_dict()})
    loaded = squeeze.load(tmp_path / "made")
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(loaded.to(torch.bfloat16).state_dict()[_name(family)], _values(made))
    assert lut_linear(torch.ones(1, 64), made.weights[_first(made)]).isfinite().all()


def _first(made):
    return made.plan.weights[0].module


def _name(family):
    return "model.layers.0.self_attn.q_proj.outlier_values"


def _values(made):
    return made.weights["model.layers.0.self_attn.q_proj"].outlier_values
