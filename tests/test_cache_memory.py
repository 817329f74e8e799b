"""What the cache allocates: the plan's bytes, no dense copy of a layer, nothing that leaks."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from squeeze import api
from squeeze.cache import LayerSpec, PackedLayer, Side
from squeeze.cache.layer import ENCODE_TOKENS
from squeeze.quant.kv.affine import Affine
from squeeze.types import Implementation
from tests import tiny
from tests.test_cache import squeezed

KEYS, VALUES = Affine(4, "channel", 64), Affine(4, "token", 16)


def layer(**changes: Any) -> PackedLayer:
    settings = {"block_length": 128, "sink_tokens": 4, "residual_length": 128, **changes}
    return PackedLayer(
        LayerSpec(
            Side(KEYS, {}),
            Side(VALUES, {}),
            implementation=Implementation.REFERENCE,
            **settings,
        )
    )


class Allocated(TorchDispatchMode):
    """Follow the storages that operators return: the most bytes alive, and the largest one."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.live[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def tokens(count: int, batch: int = 1, heads: int = 2, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch, heads, count, size, generator=generator)


def prefill(made: PackedLayer, keys: Tensor, values: Tensor, pads: list[int]) -> Allocated:
    made.pads = pads
    with Allocated(keys, values) as seen:
        made.update(keys, values)
        made.commit(keys, values)
    return seen


@pytest.mark.parametrize("pads", [[0, 0], [0, 700]], ids=["even", "padded"])
def test_a_long_prompt_is_packed_without_a_dense_copy(pads: list[int]) -> None:
    passing = {}
    for count in (16384, 65536):
        keys, values = tokens(count, 2), tokens(count, 2)
        made = layer()
        seen = prefill(made, keys, values, pads)
        passing[count] = seen.peak - made.nbytes
        assert seen.largest <= max(keys.nbytes // 8, ENCODE_TOKENS * 2 * 16 * 4)
    # What passes does not grow with the prompt.
    assert passing[65536] <= 1.02 * passing[16384]


def test_the_peak_follows_the_plan_at_131072_tokens() -> None:
    count, layers = 131072, 10
    recipe = {"kv_cache": {"keys": {"method": "affine", "granularity": "channel"},
                           "values": {"method": "affine", "group_size": 16}}}  # fmt: skip
    model = tiny.model("llama", num_hidden_layers=layers, num_key_value_heads=1)
    planned = api.plan(recipe, model, context=count).kv_bytes["after"]
    keys, values = tokens(count, heads=1), tokens(count, heads=1)
    made = [layer() for _ in range(layers)]
    with Allocated(keys, values) as seen:
        for one in made:
            one.update(keys, values)
            one.commit(keys, values)
    assert abs(sum(one.nbytes for one in made) - planned) <= 0.01 * planned
    assert seen.peak <= 1.05 * planned, seen.peak / planned


def test_exact_tokens_take_the_room_of_those_that_are_there() -> None:
    made = layer()
    prefill(made, tokens(10), tokens(10), [0])
    assert made.exact.keys.shape[2] == 64
    for slots in (64, 128, 192, 256, 260):
        while made.exact.counts.host[0] < slots - 1:
            made.update(tokens(1), tokens(1))
            made.commit(tokens(1), tokens(1))
        assert made.exact.keys.shape[2] == slots
    assert made.blocks == [0]


def test_addresses_are_kept_only_for_kernels_that_follow_them() -> None:
    made = layer()
    prefill(made, tokens(1000), tokens(1000), [0])
    assert made.key_blocks.segments and made.key_blocks.addresses is None
    spec = LayerSpec(Side(KEYS, {}), Side(VALUES, {}), 128, 4, 128, Implementation.TRITON)
    kernel = PackedLayer(spec)
    prefill(kernel, tokens(1000), tokens(1000), [0])
    for _ in range(300):
        kernel.update(tokens(1), tokens(1))
        kernel.commit(tokens(1), tokens(1))
    assert kernel.blocks == [9] and len(kernel.key_blocks.segments) > 1
    for storage in (kernel.key_blocks, kernel.value_blocks):
        for name, table in storage.addresses.items():
            slabs = [slab.data_ptr() for segment in storage.segments for slab in segment[name]]
            assert table.tolist() == slabs


def test_a_cache_keeps_no_graph_of_gradients() -> None:
    model = squeezed("llama").model
    ids = tiny.prompt(1, 80)["input_ids"]
    cache = model(ids).past_key_values
    loss = model(ids[:, :1], past_key_values=cache).logits.sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None
    one = cache.packed_layers[0]
    assert (
        not one.exact.keys.requires_grad and not one.key_blocks.segments[0]["scale"].requires_grad
    )


def test_a_prompt_read_in_inference_mode_goes_on_outside_it() -> None:
    model = squeezed("llama").model
    ids = tiny.prompt(2, 60)["input_ids"]
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
    with torch.no_grad():
        for _ in range(70):
            model(torch.full((4, 1), 7), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0, 2, 3]))
    assert cache.packed_layers[0].blocks == [3, 3, 3, 3]


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_is_flat_over_100000_decode_steps() -> None:
    made = layer(block_length=512, residual_length=64)
    step, prompt = tokens(1, 1, 1, 16), tokens(1000, 1, 1, 16)
    prefill(made, prompt, prompt, [0])
    found = []
    for t in range(100_001):
        if t % 25_000 == 0:
            gc.collect()
            objects = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
            found.append((made.nbytes, resident_bytes(), objects, len(made.key_blocks.segments)))
        made.update(step, step)
        made.commit(step, step)
    bits = KEYS.bits_per_value(16) + VALUES.bits_per_value(16)
    packed = 25_000 * 16 * bits / 8
    for earlier, later in itertools.pairwise(found):
        # Each stretch adds its packed bytes, at most one segment's slack, and nothing else.
        assert later[0] - earlier[0] <= packed + later[0] / 32 + 2 * 512 * 16
        assert later[1] - earlier[1] <= packed + 2**20
        assert later[2] - earlier[2] <= 6 * (later[3] - earlier[3])
    blocks = made.blocks[0] * 512 * 16 * bits / 8
    assert made.total == 101_001 and made.nbytes <= blocks * (1 + 1 / 32) + made.exact.nbytes + 4
