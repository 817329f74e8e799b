"""The module that holds a clustered weight."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from squeeze.kernels.lut_linear.api import reconstruct
from squeeze.linear import ClusteredLinear
from squeeze.quant.weights.kmeans import KMeans


def module(entries="int8", dtype=torch.float32, bias=True):
    method = KMeans(bits=3, entries=entries, importance="none")
    weight = method.fit(torch.randn(12, 70) * 0.02)
    return ClusteredLinear.from_weight(weight, torch.randn(12) if bias else None, dtype), method


@pytest.mark.parametrize("entries", ["int8", "float16"])
def test_forward_is_the_linear_layer_of_the_stored_weight(entries):
    layer, _ = module(entries)
    x = torch.randn(2, 5, 70)
    expected = torch.nn.functional.linear(x, reconstruct(layer.clustered), layer.bias)
    assert torch.equal(layer(x), expected)


def test_stores_no_dense_weight():
    layer, _ = module()
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight
    dense = 12 * 70 * 2
    assert layer.clustered.nbytes < dense / 2
    held = [*layer.parameters(), *layer.buffers()]
    assert sum(t.numel() * t.element_size() for t in held) == layer.clustered.nbytes + 12 * 4


@pytest.mark.parametrize("entries", ["int8", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_moves_the_bias_and_keeps_the_weight(entries, dtype):
    layer, _ = module(entries)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    for name in before.keys() - {"bias"}:
        assert layer.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(layer.state_dict()[name], before[name])
    assert layer(torch.randn(1, 70, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("entries", ["int8", "float16"])
def test_saves_and_loads_the_same_bits(entries, tmp_path):
    layer, method = module(entries)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    shell = ClusteredLinear(method.empty(12, 70, "meta"), torch.empty(12, device="meta"))
    shell.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = torch.randn(3, 70)
    assert torch.equal(shell(x), layer(x))


def test_leaves_the_meta_device():
    method = KMeans(bits=3)
    shell = ClusteredLinear(method.empty(12, 70, "meta")).to_empty(device="cpu")
    assert {tensor.device.type for tensor in shell.state_dict().values()} == {"cpu"}
    assert shell.scale.dtype == torch.float16


def test_describes_itself():
    layer, _ = module(bias=False)
    text = repr(layer)
    assert "bits=3" in text
    assert "in_features=70" in text
    assert "implementation=reference" in text
    assert layer.bias is None
