"""The decode step that is recorded and replayed, against the step that is launched."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import squeeze
from squeeze.cache import StaticPackedCache
from squeeze.cache import static as static_module
from squeeze.decode_step import OFTEN
from squeeze.errors import SqueezeWarning, UnsupportedError
from squeeze.recorder import CudaGraphs
from squeeze.step_encode import KEY
from tests import tiny
from tests.test_cache import RECIPE, squeezed
from tests.test_salience import artifacts as protecting

FULL = ["llama", "mistral", "qwen3", "phi3", "gpt_neox", "opt", "gpt2"]
ALL = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
# Reading a number, or counting what a mask selects.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select")


class Watch(TorchDispatchMode):
    """Raise, as CUDA does, where a step would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in WAITS):
            raise RuntimeError(f"{func} waits")
        return func(*args, **(kwargs or {}))


class Traces:
    """Records by tracing: host numbers become constants, tensors are used where they lie."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.encoders = 0

    def busy(self) -> bool:
        return False

    @contextmanager
    def watch(self) -> Iterator[None]:
        with Watch():
            yield

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        returned: list[Any] = []

        def traced() -> Any:
            returned.append(work())
            return None if returned[-1] is None else returned[-1].logits

        graph = make_fx(traced)()
        output = returned[-1]
        if output is None:  # encodes blocks; what was done while tracing, a replay finds not due
            self.encoders += 1
            return graph, None
        output["logits"] = torch.full_like(output.logits, torch.nan)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            output["logits"].copy_(graph())

        return replay, output


def recorded(name: str = "llama", recipe: dict[str, Any] | None = None) -> tuple[Any, Traces]:
    """Make a squeezed model that records its steps."""
    model = squeezed(name, recipe).model if recipe else squeezed(name).model
    traces = model.squeeze_step.recorder = Traces()
    assert model.squeeze_step.enabled
    return model, traces


def both(model: Any, inputs: Any, **settings: Any) -> tuple[Any, Any]:
    """Generate with recorded steps, then with launched ones."""
    torch.manual_seed(0)
    ours = model.generate(**inputs, **settings)
    model.squeeze_step.enabled = False
    torch.manual_seed(0)
    theirs = model.generate(**inputs, **settings)
    model.squeeze_step.enabled = True
    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    found, expected = torch.stack(ours.logits), torch.stack(theirs.logits)
    # The exact slots are as many as may ever be needed, so sums over them round otherwise.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", FULL)
def test_generate_replays_one_recording_and_gives_what_launched_steps_give(name: str) -> None:
    model, traces = recorded(name)
    ours, theirs = both(model, tiny.prompt(2, 90, pads=(7,)), **ALL, max_new_tokens=60)
    assert_same(ours, theirs)
    # The prompt gives a token; one step warms up and one is watched.
    assert (traces.recorded, traces.replayed) == (1, 57)
    cache = ours.past_key_values
    assert isinstance(cache, StaticPackedCache) and cache.static_layers[0].blocks == [4, 4]
    assert model.squeeze_step.verified


def test_sampled_sequences_and_beams_are_those_of_launched_steps() -> None:
    model, traces = recorded()
    inputs = tiny.prompt(2, 40, pads=(0, 11))
    settings = {**ALL, "max_new_tokens": 30}
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 20, "num_return_sequences": 2}
    assert_same(*both(model, inputs, **settings | sampled))
    assert traces.replayed == 27
    assert_same(*both(model, inputs, **settings, num_beams=3))
    assert traces.replayed > 27


def test_the_cache_grows_by_buckets_and_the_step_is_recorded_anew(monkeypatch: Any) -> None:
    monkeypatch.setattr(static_module, "BUCKET_TOKENS", 64)
    model, traces = recorded()
    inputs = tiny.prompt(2, 50, pads=(3,))
    ours, theirs = both(model, inputs, **ALL, max_new_tokens=150)
    assert_same(ours, theirs)
    # Lengths 51 to 199: buckets of 64, 128 and 256 tokens, the last for 7 blocks of 32.
    assert ours.past_key_values.static_layers[0].capacity == 7
    assert traces.recorded == 3


def test_a_second_prompt_continues_the_same_cache() -> None:
    model, traces = recorded()
    ids = tiny.prompt(2, 120)["input_ids"]
    results = []
    for enabled in (True, False):
        model.squeeze_step.enabled = enabled
        cache, known = None, ids[:, :40]
        for turn in range(3):
            out = model.generate(
                known,
                attention_mask=torch.ones_like(known),
                past_key_values=cache,
                max_new_tokens=20,
                **ALL,
            )
            cache = out.past_key_values
            known = torch.cat([out.sequences, ids[:, 40 + turn : 65 + turn]], 1)
        results.append(out)
    assert_same(*results)
    assert traces.recorded >= 1


def test_steps_of_several_tokens_are_recorded_and_cropped() -> None:
    model, traces = recorded("llama", {"kv_cache": {**RECIPE["kv_cache"], "residual_length": 32}})
    ids = tiny.prompt(1, 12)["input_ids"].repeat(1, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"do_sample": False, "max_new_tokens": 150, "prompt_lookup_num_tokens": 4}
    ours, theirs = both(model, inputs, **settings, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    recordings = ours.past_key_values.recordings
    often = {kind for kind, count in recordings.asked.items() if kind[1] == 1 or count > OFTEN}
    assert {kind for kind in recordings if kind != KEY} == often != set(recordings.asked)
    assert traces.recorded == sum(recordings[kind].replay is not None for kind in often) == 2
    assert traces.replayed > 10


@torch.no_grad()
def test_kinds_beyond_a_few_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squeeze.decode_step.MOST_RECORDINGS", 2)
    model, traces = recorded()
    ids = tiny.prompt(1, 80)["input_ids"]
    cache, own = (model(ids[:, :20]).past_key_values for _ in range(2))
    for _ in range(OFTEN + 3):
        for steps in (1, 2, 3):
            model.squeeze_step.enabled = True
            ours = model(ids[:, :steps], past_key_values=cache).logits
            model.squeeze_step.enabled = False
            theirs = model(ids[:, :steps], past_key_values=own).logits
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert traces.recorded == 2 and cache.get_seq_length() == own.get_seq_length()


def test_reference_implementations_on_a_gpu_are_launched_without_a_word() -> None:
    model, _ = recorded()
    model.squeeze_step.recorder = CudaGraphs()
    out = model.generate(**tiny.prompt(1, 20), **ALL, max_new_tokens=5)
    assert not isinstance(out.past_key_values, StaticPackedCache)


def test_a_static_cache_of_the_callers_own_is_recorded_until_it_is_full() -> None:
    model, traces = recorded()
    inputs = tiny.prompt(2, 60, pads=(9,))
    cache = squeeze.static_cache(model, 100)
    settings = {**ALL, "max_new_tokens": 41}
    ours = model.generate(**inputs, **settings, past_key_values=cache)
    model.squeeze_step.enabled = False
    assert_same(ours, model.generate(**inputs, **settings))
    assert traces.replayed == 38
    model.squeeze_step.enabled = True
    with torch.no_grad(), pytest.raises(UnsupportedError, match="100 tokens and 1 more do not fit"):
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    cache.reset()
    assert_same(model.generate(**inputs, **settings, past_key_values=cache), ours)
    assert traces.recorded == 1


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma3", {}, r"layers \[0\] keep their own cache"),
        ("llama", {"offload": True}, r"kv_cache\.offload is on"),
    ],
)
def test_what_cannot_be_recorded_is_said_once(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    model, traces = recorded(name, {"kv_cache": {**RECIPE["kv_cache"], **changes}})
    inputs = tiny.prompt(1, 50)
    with pytest.warns(SqueezeWarning, match=reason) as said:
        ours, theirs = both(model, inputs, **ALL, max_new_tokens=10)
    assert len(said) == 1
    assert torch.equal(ours.sequences, theirs.sequences)
    assert traces.recorded == 0


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"output_attentions": True}, "asks for output_attentions"),
        ({"return_dict": False}, "switches use_cache or return_dict off"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep is a tensor"),
        ({"attention_mask": torch.ones(2, 31)}, "a mask and no position_ids"),
    ],
)
@torch.no_grad()
def test_a_call_that_asks_for_more_is_launched(extra: dict[str, Any], reason: str) -> None:
    model, traces = recorded()
    ids = tiny.prompt(2, 30)["input_ids"]
    cache = model(ids).past_key_values
    with pytest.warns(SqueezeWarning, match=reason):
        model(ids[:, :1], past_key_values=cache, **extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
    assert traces.replayed == 1


def add_total(x: torch.Tensor, cache: Any) -> torch.Tensor:
    return x + 0.01 * cache.get_seq_length()


def read_sum(x: torch.Tensor, cache: Any) -> torch.Tensor:
    return x + 0 * float(x.sum())


@pytest.mark.parametrize(
    ("change", "reason"),
    [(add_total, "a replayed step is off by"), (read_sum, "_local_scalar_dense.* waits")],
)
def test_a_step_that_depends_on_the_host_is_found_out(change: Any, reason: str) -> None:
    model, _ = recorded()
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: forward(change(x, kwargs["past_key_values"]), **kwargs)
    inputs = tiny.prompt(2, 50)
    with pytest.warns(SqueezeWarning, match=reason):
        ours = model.generate(**inputs, **ALL, max_new_tokens=40)
    assert not model.squeeze_step.enabled
    assert_same(ours, model.generate(**inputs, **ALL, max_new_tokens=40))


def test_hooks_that_no_replay_would_run_keep_the_step_launched() -> None:
    model, traces = recorded()
    model(**tiny.prompt(1, 20), output_hidden_states=True)  # leaves hooks of transformers
    seen: list[int] = []
    hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(SqueezeWarning, match=r"model\.layers\.1 has forward hooks") as said:
        model.generate(**tiny.prompt(1, 20), min_new_tokens=8, max_new_tokens=8)
    assert len(said) == 1 and len(seen) == 8 and not traces.recorded
    hook.remove()
    model.generate(**tiny.prompt(1, 20), min_new_tokens=8, max_new_tokens=8)
    assert traces.replayed == 5


@torch.no_grad()
def test_every_other_call_passes() -> None:
    model, traces = recorded()
    ids = tiny.prompt(2, 30)["input_ids"]
    cache = model(ids).past_key_values
    assert type(cache).__name__ == "PackedCache"
    model(ids[:, :20], past_key_values=cache)
    with torch.enable_grad():
        model(ids[:, :1], past_key_values=cache)
    model.train()
    model(ids[:, :1], past_key_values=cache)
    model.eval()
    assert type(cache).__name__ == "PackedCache" and cache.get_seq_length() == 52
    for _ in range(4):
        model(ids[:, :1], None, None, cache)
    assert traces.replayed == 2
    other = copy.deepcopy(cache)
    expected = model(ids[:, :1], past_key_values=cache).logits
    assert torch.equal(model(ids[:, :1], past_key_values=other).logits, expected)
    assert traces.recorded == 2


def test_blocks_that_ask_for_salience_come_due_in_launched_steps() -> None:
    model = tiny.model("llama")
    squeeze.swap(model, protecting(model))
    traces = model.squeeze_step.recorder = Traces()
    model.squeeze_step.enabled = True
    ours, theirs = both(model, tiny.prompt(2, 100, pads=(9,)), **ALL, max_new_tokens=60)
    assert_same(ours, theirs)
    assert ours.past_key_values.static_layers[0].blocks == [1, 1]
    # Of 59 steps one warms up, one is watched, and each row brings a block due once.
    assert traces.replayed == 59 - 4


def test_restoring_gives_the_forward_back_and_a_copy_steps_by_itself() -> None:
    model, traces = recorded()
    twin = copy.deepcopy(model)
    assert twin.forward is twin.squeeze_step and twin.squeeze_step.model is twin
    assert "past_key_values" in inspect.signature(model.forward).parameters
    del twin
    dense = tiny.model("llama")
    done = squeeze.swap(dense, squeezed("llama").artifacts)
    done.restore()
    assert "forward" not in vars(dense) and not hasattr(dense, "squeeze_step")
    assert not traces.recorded


def test_watching_ends_whatever_happens_and_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [0]

    def change(mode: int) -> None:  # as torch does: the mode is set when the warning is raised
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", change)
    with pytest.raises(RuntimeError, match="waits"), CudaGraphs().watch():
        raise RuntimeError("waits")
    assert modes == [0, 2, 0]
