"""Modules trained as one: they give what each gives alone, and come apart as they went in."""

import pytest
import torch

from squeeze import api
from squeeze.compress import compress, weight_method
from squeeze.distill import distilled_rows
from squeeze.saved_tensors import SavedTensors
from squeeze.stacks import Stack, stacked
from tests import tiny

RULE = {"method": "dkm", "bits": 3, "start": {"method": "kmeans", "importance": "none"}}


def stacks_of(**changes):
    model = tiny.model("llama")
    plan = api.plan({"weights": [{**RULE, **changes}]}, model)
    rows, weights = distilled_rows(plan), compress(model, plan, None).weights
    linears = {row.module: model.get_submodule(row.module) for row in rows}
    stacks = [Stack(group, weights, linears) for group in stacked(rows, weights)]
    return stacks, rows, weights, linears


@pytest.mark.parametrize(("changes", "count"), [
    ({}, 2), ({"granularity": "tile"}, 2), ({"granularity": "rows", "rows_per_codebook": 16}, 2),
    ({"granularity": "rows", "rows_per_codebook": 24}, 11), ({"granularity": "tensor"}, 14),
    ({"entries": "float16"}, 14),
])  # fmt: skip
def test_a_stack_gives_what_its_modules_give(changes, count):
    stacks, rows, weights, linears = stacks_of(**changes)
    assert sorted(name for stack in stacks for name in stack.names) == sorted(linears)
    assert len(stacks) == count
    methods = {row.module: weight_method(row) for row in rows}
    for stack in stacks:
        stack.student.soften(stack.dense(linears))
        packed = dict(stack.packed())
        for name, weight in stack.weights(SavedTensors()):
            alone = methods[name].student(linears[name].weight, weights[name])
            alone.soften(linears[name].weight.detach())
            assert torch.equal(weight, alone.weight())
            for key, tensor in alone.packed().tensors().items():
                assert torch.equal(packed[name].tensors()[key], tensor), (name, key)
