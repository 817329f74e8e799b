"""Models that accelerate spread over devices: its hooks, ours, and what is refused."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForCausalLM

import squeeze
import tests.parallel as parallel
from squeeze.devices import device_of, stand_on_devices
from squeeze.errors import UnsupportedError

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
ROTARY = "model.rotary_emb"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    result = parallel.save(folder, "llama")
    tokens = parallel.generate(result.model).sequences
    return folder, result.artifacts, tokens, parallel.forced(result.model, tokens)


def places(**changes):
    return {**dict.fromkeys([*PARTS, ROTARY], "cpu"), **changes}


def hooked(model):
    hooks = {name: getattr(module, "_hf_hook", None) for name, module in model.named_modules()}
    return [name for name, hook in hooks.items() if isinstance(hook, AlignDevicesHook)]


def test_a_squeezed_model_is_dispatched(saved):
    folder, _, tokens, logits = saved
    model = squeeze.load(folder / "squeezed", device="cpu")
    dispatch_model(model, places(), force_hooks=True)
    assert {"model.layers.1", "model.layers.1.mlp.down_proj", "lm_head"} <= set(hooked(model))
    assert torch.equal(parallel.forced(model, tokens), logits)
    assert torch.equal(parallel.generate(model).sequences, tokens)


def test_a_dispatched_model_is_squeezed(saved):
    folder, artifacts, tokens, logits = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    dispatch_model(model, places(), force_hooks=True)
    dense, before = parallel.forced(model, tokens), hooked(model)
    with squeeze.swap(model, artifacts):
        assert torch.equal(parallel.forced(model, tokens), logits)
    assert torch.equal(parallel.forced(model, tokens), dense)
    assert hooked(model) == before


def test_layers_on_disk_keep_their_tables(saved, tmp_path):
    folder, _, tokens, logits = saved
    spread = {"device_map": places(**{"model.layers.1": "disk"}), "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(folder / "squeezed", **spread)
    assert model.model.layers[1].input_layernorm.weight.is_meta
    assert torch.equal(parallel.forced(model, tokens), logits)


def test_offloaded_tables_are_refused(saved, tmp_path):
    folder = saved[0]
    spread = {"device_map": places(**{"model.layers.1": "disk"}), "offload_folder": tmp_path}
    with pytest.raises(UnsupportedError, match="Allowed: offload_buffers=False"):
        AutoModelForCausalLM.from_pretrained(folder / "squeezed", offload_buffers=True, **spread)


def test_offloaded_weights_are_not_squeezed_in_place(saved, tmp_path):
    folder, artifacts = saved[:2]
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    dispatch_model(model, places(**{"model.layers.1": "disk"}), offload_dir=tmp_path)
    with pytest.raises(UnsupportedError, match=r"device_map: model\.layers\.1.* is offloaded"):
        squeeze.swap(model, artifacts)


class Devices:
    """Stands for torch.cuda's current device."""

    def __init__(self):
        self.current = 0

    def set_device(self, device):
        self.current = torch.device(device).index or 0 if not isinstance(device, int) else device

    def current_device(self):
        return self.current


def test_every_part_runs_with_its_gpu_current(llama, monkeypatch):
    devices = Devices()
    monkeypatch.setattr(torch.cuda, "set_device", devices.set_device)
    monkeypatch.setattr(torch.cuda, "current_device", devices.current_device)
    llama.hf_device_map = {**dict.fromkeys(PARTS, 0), "model.layers.1": 1, "lm_head": "cuda:1"}
    handles = stand_on_devices(llama)
    seen = {}
    for name in (*PARTS, "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        llama.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: devices.current})
        )
    llama(torch.tensor([[3, 4, 5]]))
    assert [seen[name] for name in PARTS] == [0, 0, 1, 0, 1]
    assert seen["model.layers.0.mlp.up_proj"] == 0
    assert seen["model.layers.1.self_attn.q_proj"] == 1
    assert devices.current == 0
    llama.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llama(torch.tensor([[3, 4, 5]]))
    assert devices.current == 0
    for handle in handles:
        handle.remove()


def test_steps_over_several_devices_are_not_recorded(saved):
    model = squeeze.load(saved[0] / "squeezed", device="cpu")
    cache = parallel.generate(model).past_key_values
    model.hf_device_map = {**dict.fromkeys(PARTS, 0), "model.layers.1": 1}
    assert model.squeeze_step._refusal(cache, {}) == "the model is on several devices (0, 1)"


@pytest.mark.parametrize("places", [{}, {"": 0}, {"model": "cpu", "lm_head": 0}])
def test_one_gpu_needs_no_hooks(llama, places):
    llama.hf_device_map = places
    assert stand_on_devices(llama) == []


def test_the_device_of_a_module_is_its_own(llama):
    llama.model.layers[1].to("meta")
    assert device_of(llama, "model.layers.1.self_attn").type == "meta"
    assert device_of(llama, "model.layers.0.self_attn").type == "cpu"
    assert device_of(llama, "model.rotary_emb").type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(saved):
    folder, artifacts, tokens, _ = saved
    whole = squeeze.load(folder / "squeezed", device="cuda")
    logits = parallel.forced(whole, tokens)
    spread = places(**dict.fromkeys(PARTS, 0) | {"model.layers.1": 1}, **{ROTARY: 0})
    model = AutoModelForCausalLM.from_pretrained(folder / "squeezed", device_map=spread)
    assert torch.equal(parallel.forced(model, tokens), logits)
    cache = parallel.generate(model).past_key_values
    assert [layer.key_blocks.segments[0]["codes"].device.index for layer in cache.layers] == [0, 1]
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", device_map=spread)
    with squeeze.swap(dense, artifacts):
        found = parallel.forced(dense, tokens)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-2 * float(logits.abs().max()))
