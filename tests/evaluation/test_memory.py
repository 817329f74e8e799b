from types import SimpleNamespace

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

from squeeze.evaluation.memory import kv_bytes, weight_bytes


def test_shared_memory_counts_once_and_buffers_count(trained):
    model = nn.Module()
    model.a = nn.Linear(4, 8, bias=False)
    model.tied = nn.Linear(4, 8, bias=False)
    model.tied.weight = model.a.weight
    model.register_buffer("view", model.a.weight.detach())
    model.register_buffer("indices", torch.zeros(5, dtype=torch.uint8))
    assert weight_bytes(model) == 4 * 8 * 4 + 5
    distinct = {id(tensor): tensor for tensor in (*trained.parameters(), *trained.buffers())}
    assert weight_bytes(trained) == sum(4 * tensor.numel() for tensor in distinct.values())


def test_parts_of_one_storage_count_each_and_meta_tensors_too():
    whole = torch.zeros(10)
    parts = nn.ParameterList([nn.Parameter(whole[:4]), nn.Parameter(whole[4:6])])
    assert weight_bytes(parts) == 24
    assert weight_bytes(nn.Sequential(*(nn.Linear(3, 3, device="meta") for _ in range(2)))) == 96


def test_a_cache_is_asked_or_walked(pico):
    assert kv_bytes(SimpleNamespace(nbytes=7)) == 7
    cache = DynamicCache(config=pico.config)
    pico(torch.zeros(1, 6, dtype=torch.int64), past_key_values=cache)
    assert kv_bytes(cache) == 2 * 2 * 2 * 6 * 8 * 4
    packed = {"words": torch.zeros(3, dtype=torch.int32), "scale": [torch.zeros(2).half()]}
    layer = SimpleNamespace(packed=packed, length=6)
    assert kv_bytes(SimpleNamespace(layers=[layer])) == 16


def test_a_tensor_made_of_tensors_counts_as_what_it_holds():
    layer = SimpleNamespace(quantized=TwoTensor(torch.zeros(3), torch.zeros(3)))
    assert kv_bytes(SimpleNamespace(layers=[layer])) == 24
