"""Distillation: it helps, resumes bit for bit, leaves the model alone, and shares its work."""

import functools

import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

import squeeze
from squeeze import api
from squeeze.compress import compress
from squeeze.distill import STATE, distill, reading, sequences, training
from squeeze.errors import CheckpointError, RecipeError, UnsupportedError
from squeeze.swapping import swap
from tests import pico, tiny

RULE = {
    "method": "dkm", "bits": 2, "start": {"method": "kmeans", "importance": "none"},
    "steps": 12, "codebook_steps": 4, "batch": 4, "entry_rate": 0.003, "weight_rate": 0.003,
}  # fmt: skip


def setting(weights=None, **changes):
    model = tiny.model("llama")
    rules = weights or [{**RULE, **changes}]
    plan = api.plan({"weights": rules}, model)
    rows = max(1, sequences(plan))
    tokens = torch.randint(3, 128, (rows, 96), generator=torch.Generator().manual_seed(5))
    return model, compress(model, plan, None), tokens


def divergence(model, artifacts, ids):
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
        with swap(model, artifacts):
            found = model(ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("changes", [
    {}, {"derivative": "straight"}, {"iterations": 1}, {"hidden": 1.0, "entries": "float16"},
    {"codebook_steps": 12},
    {"uniquify": True, "marshal": True, "granularity": "tensor", "iterations": 1},
], ids=["entries", "straight", "means", "hidden", "codebooks", "tensor"])  # fmt: skip
def test_the_squeezed_model_comes_nearer_to_the_dense_one(changes):
    model, start, tokens = setting(**changes)
    ids = torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(6))
    tuned = distill(model, start, tokens)
    assert divergence(model, tuned, ids) < 0.97 * divergence(model, start, ids)
    assert tuned.nbytes == start.nbytes


def test_the_model_is_given_back_as_it_was():
    model, start, tokens = setting()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distill(model, start, tokens)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("killed_at", [2, 7])
def test_a_killed_run_resumes_with_the_same_bits(killed_at, tmp_path):
    model, start, tokens = setting()
    whole = distill(model, start, tokens)
    with training(model, start, tokens) as run:
        for number in range(killed_at):
            run.step(number)
        run.save(tmp_path, killed_at)
    done = []
    resumed = distill(
        model, start, tokens, folder=tmp_path, progress=lambda stage, n, total: done.append(n)
    )
    assert done[0] == killed_at + 1
    for name, weight in whole.weights.items():
        for key, tensor in weight.tensors().items():
            assert torch.equal(tensor, resumed.weights[name].tensors()[key]), (name, key)


def test_progress_of_another_run_is_refused(tmp_path):
    model, start, tokens = setting()
    distill(model, start, tokens, folder=tmp_path)
    with pytest.raises(CheckpointError, match="other weights, text or settings"):
        distill(model, start, tokens.flip(0), folder=tmp_path)
    (tmp_path / STATE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        distill(model, start, tokens, folder=tmp_path)


def test_other_weights_stay_and_are_in_place_while_training():
    rules = [
        {**RULE, "targets": ["mlp"]},
        {"method": "kmeans", "bits": 2, "importance": "none", "targets": ["self_attn"]},
    ]
    model, start, tokens = setting(rules)
    with training(model, start, tokens) as run:
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == "ClusteredLinear"
        run.step(0)
        assert run.losses[0] > 0
    tuned = distill(model, start, tokens)
    for name, weight in tuned.weights.items():
        same = torch.equal(weight.indices, start.weights[name].indices)
        assert same == ("self_attn" in name)


def test_nothing_to_train_changes_nothing():
    model, start, tokens = setting(steps=0)
    assert sequences(start.plan) == 0
    assert reading(start.plan) == {"own": 0.0, "echo": 0.0}
    assert distill(model, start, tokens) is start


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["read", "own"])
def test_a_run_trains(own):
    rule = {**RULE, "targets": ["re:layers.0.mlp.down_proj"], "batch": 1, "entry_rate": 0.05}
    rule["own_text"] = own
    found = []
    for steps in (0, 1):
        raw = {"weights": [{**rule, "steps": steps}], "calibration": {"length": 32}}
        found.append(squeeze.run(raw, evaluate=False).artifacts.weights)
    (name,) = found[0]
    assert not torch.equal(found[0][name].codebook, found[1][name].codebook)


def bits_of(plan):
    return {row.module: row.method["bits"] for row in plan.weights}


def test_bits_are_chosen_by_the_starts_losses_and_trained_together(tmp_path):
    folder = pico.save(tmp_path / "model")
    recipe = {
        "weights": {
            **RULE, "start": "kmeans", "mean_bits": 3.5, "candidates": [{"bits": 2}, {"bits": 4}],
            "steps": 2, "codebook_steps": 1, "batch": 1, "entry_rate": 0.05,
        },
        "calibration": {"samples": 2, "length": 64},
    }  # fmt: skip
    start = squeeze.run(recipe, folder, evaluate=False, overrides={"weights.steps": 0})
    made = squeeze.run(recipe, folder, tmp_path / "out", evaluate=False)
    assert set(bits_of(made.plan).values()) == {2, 4}
    assert bits_of(made.plan) == bits_of(start.plan)
    assert made.plan.effective_bits["weights"] <= 3.5
    assert made.artifacts.nbytes == start.artifacts.nbytes
    for name, weight in made.artifacts.weights.items():
        assert not torch.equal(weight.codebook, start.artifacts.weights[name].codebook)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(squeeze.load(tmp_path / "out")(ids).logits, made.model(ids).logits)


@pytest.mark.parametrize(("changes", "kind", "words"), [
    ({"batch": 8}, RecipeError, r"rules say 4 and 8.*Give all"),
    ({"shard": True}, RecipeError, "shard"),
])  # fmt: skip
def test_rules_that_disagree_are_refused(changes, kind, words):
    rules = [{**RULE, "targets": ["mlp"]}, {**RULE, "targets": ["self_attn"], **changes}]
    with pytest.raises(kind, match=words):
        setting(rules)


def test_sharding_alone_and_too_little_text_are_refused():
    model, start, tokens = setting(shard=True)
    with pytest.raises(UnsupportedError, match="torchrun"):
        distill(model, start, tokens)
    model, start, tokens = setting()
    with pytest.raises(ValueError, match="need more than 3 rows"):
        distill(model, start, tokens[:3])


def first_gradients(**changes):
    model, start, tokens = setting(steps=1, codebook_steps=0, **changes)
    with training(model, start, tokens) as run:
        run.step(0)
        return {name: moments["mean"] for name, moments in run.moments.items()}


def check_processes(rank, path, expected):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for name, found in first_gradients(shard=True, uniquify=True, iterations=1).items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5 * size)
    distributed.destroy_process_group()


def test_two_processes_average_to_the_gradients_of_one(tmp_path):
    meet = functools.partial(
        check_processes, path=tmp_path / "meeting", expected=first_gradients(iterations=1)
    )
    start_processes(meet, nprocs=2, start_method="fork")
