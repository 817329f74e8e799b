"""Blocks that fill behind recorded steps: encoded as by launches, whenever each row is due."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import pytest
import torch

import squeeze
from squeeze import api
from squeeze.cache import Side, StaticPackedCache, make_recordable
from squeeze.cache.due import count_due, encode_due
from squeeze.calibrate import calibrate
from squeeze.compress import compress
from squeeze.errors import SqueezeWarning
from squeeze.step_encode import KEY, BlockEncoder
from squeeze.types import Implementation
from tests import tiny
from tests.test_cache import squeezed
from tests.test_decode_step import ALL, Traces, Watch, assert_same, both, recorded

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter"
)
PADS = (0, 9, 31)
FORMATS: dict[str, dict[str, Any]] = {
    "affine": {"bits": 3, "group_size": 16, "transforms": ["hadamard"]},
    "float8": {},
    "graded": {"widths": [4, 2], "transforms": ["klt"]},
    "bitmap": {},
    "product_quantization": {},
    "ternary": {},
    "binary_spectral": {},
}


def calibrated(name: str) -> Any:
    """Make a squeezed model whose keys and values have a format."""
    model = tiny.model("llama")
    side = {"method": name, **FORMATS[name]}
    sizes = {"sink_tokens": 2, "residual_length": 5, "block_length": 128}
    plan = api.plan({"kv_cache": {"keys": side, "values": side, **sizes}}, model)
    ids = tiny.prompt(2, 64)["input_ids"]
    squeeze.swap(model, compress(model, plan, calibrate(model, ids, set(plan.statistics))))
    return model


def content(cache: Any) -> list[torch.Tensor]:
    """Everything that rows hold, slots that none of them uses left out."""
    found = []
    for layer in cache.packed_layers:
        counts = zip(layer.blocks, layer.exact.counts.host, strict=True)
        for row, (blocks, exact) in enumerate(counts):
            for x in (layer.exact.keys, layer.exact.values):
                found.append(x[row, :, :exact])
            for storage in (layer.key_blocks, layer.value_blocks):
                found += [x[:, row] for x in storage.merged(blocks).values()]
        found += [layer.exact.counts.device, layer.block_counts.device]
        assert layer.exact.counts.device.tolist() == layer.exact.counts.host
        assert layer.block_counts.device.tolist() == layer.blocks
    return found


@torch.no_grad()
def filled(model: Any, tokens: int) -> StaticPackedCache:
    """Make a recordable cache of ragged rows, one of which has a block due."""
    cache = make_recordable(model(**tiny.prompt(3, tokens, pads=PADS)).past_key_values, 16)
    cache.reserve(tokens + 400)
    go_on(cache)
    return cache


def go_on(cache: StaticPackedCache) -> None:
    """Append equal tokens, as far as they are asked for again, until a block is due."""
    while not cache.is_due:
        generator = torch.Generator().manual_seed(cache.get_seq_length())
        for layer in cache.static_layers:
            shape = layer.exact.keys[:, :, :1].shape
            layer.exact.append(*torch.randn(2, *shape, generator=generator))
        cache.count(1)


def assert_equal(cache: StaticPackedCache, expected: StaticPackedCache) -> None:
    for found, wanted in zip(content(cache), content(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_rows_that_are_due_are_encoded_as_by_launches_and_only_once(name: str | None) -> None:
    model = squeezed("llama").model if name is None else calibrated(name)
    cache = filled(model, 100 if name is None else 240)
    expected, before = copy.deepcopy(cache), [layer.blocks for layer in cache.static_layers]
    expected.settle()
    for layer in cache.static_layers:
        layer.make_room()
        with Watch():
            for _ in range(2):
                encode_due(layer)
        count_due(layer)
    assert not cache.is_due
    for layer, blocks in zip(cache.static_layers, before, strict=True):
        assert sum(layer.blocks) == sum(blocks) + 1
    assert_equal(cache, expected)


@needs_interpreter
def test_the_kernel_follows_the_addresses_of_a_cache() -> None:
    cache = filled(squeezed("llama").model, 100)
    expected = copy.deepcopy(cache)
    expected.settle()
    for layer in cache.static_layers:
        layer.spec = dataclasses.replace(layer.spec, implementation=Implementation.TRITON)
        for storage in (layer.key_blocks, layer.value_blocks):
            whole, storage.addressed = storage.segments[0], True
            parts = {n: x.split([1, len(x) - 1]) for n, x in whole.items()}
            storage.segments = [{n: x[i].clone() for n, x in parts.items()} for i in range(2)]
            storage.reserve_addresses(layer.capacity)
        encode_due(layer)
        count_due(layer)
    assert_equal(cache, expected)


def test_ragged_rows_share_one_recording() -> None:
    model, traces = recorded()
    ours, theirs = both(model, tiny.prompt(3, 100, pads=PADS), **ALL, max_new_tokens=80)
    assert_same(ours, theirs)
    assert ours.past_key_values.layers[0].blocks == theirs.past_key_values.layers[0].blocks
    assert model.squeeze_step.encoder.records and traces.encoders == 1


def test_a_cache_and_its_copy_are_recorded_apart() -> None:
    cache = filled(squeezed("llama").model, 100)
    expected, encoder, traces = copy.deepcopy(cache), BlockEncoder(), Traces()
    caches = [cache]
    for turn in range(6):
        for each in caches:
            assert encoder.encode(each, traces) is None
        expected.settle()
        for each in (*caches, expected):
            go_on(each)
        if turn == 2:
            assert cache.recordings[KEY].replay is not None
            caches.append(copy.deepcopy(cache))
            assert KEY not in caches[1].recordings and caches[1].places() != cache.places()
    assert encoder.watched and traces.encoders == 2
    for each in caches:
        assert_equal(each, expected)


def test_what_moved_is_recorded_anew() -> None:
    cache = filled(squeezed("llama").model, 100)
    encoder, traces = BlockEncoder(), Traces()
    for _ in range(2):
        encoder.encode(cache, traces)
        go_on(cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    expected = copy.deepcopy(cache)
    for _ in range(3):
        encoder.encode(cache, traces)
        expected.settle()
        for each in (cache, expected):
            go_on(each)
    assert traces.encoders == 2
    assert_equal(cache, expected)


def test_a_recording_that_fails_leaves_the_blocks_to_launches(monkeypatch: Any) -> None:
    cache = filled(squeezed("llama").model, 100)
    expected, encoder, traces = copy.deepcopy(cache), BlockEncoder(), Traces()

    def fails(work: Any) -> Any:
        raise RuntimeError("a capture went wrong")

    monkeypatch.setattr(traces, "record", fails)
    reasons = []
    for _ in range(4):
        reasons.append(encoder.encode(cache, traces))
        expected.settle()
        for each in (cache, expected):
            go_on(each)
    failed = "recording how blocks are encoded failed (a capture went wrong)"
    assert reasons == [None, failed, None, None]
    assert_equal(cache, expected)


def test_an_encoder_that_waits_is_said_once_and_launched(monkeypatch: Any) -> None:
    model, traces = recorded()
    encode = Side.encode

    def waits(side: Any, x: torch.Tensor, *args: Any) -> Any:
        float(x.sum())
        return encode(side, x, *args)

    monkeypatch.setattr(Side, "encode", waits)
    with pytest.warns(SqueezeWarning, match="encoded failed.*_local_scalar_dense.* waits") as said:
        ours, theirs = both(model, tiny.prompt(3, 100, pads=PADS), **ALL, max_new_tokens=70)
    assert len(said) == 1
    assert_same(ours, theirs)
    assert not model.squeeze_step.encoder.records and model.squeeze_step.enabled
    assert traces.encoders == 0 and traces.replayed > 60
    assert ours.past_key_values.layers[0].blocks == theirs.past_key_values.layers[0].blocks
