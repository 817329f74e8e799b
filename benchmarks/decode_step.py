"""One whole decode step of an 8B-shaped Llama on one GPU: dense, compiled, and squeezed.

32 layers, 32 query and 8 key/value heads of 128, bfloat16, vocabulary of 128256, random weights.
The squeezed model has 4-bit weights of random codebooks and indices (nothing is fitted: time does
not depend on what they hold) and the cache of recipe ``kv4`` filled with copies of a random block.
``unfused`` runs the modules of every layer in the recorded step, ``launched`` records nothing.
Dense rows are transformers' own: ``eager`` over a DynamicCache, ``compiled`` over a StaticCache,
the whole forward compiled as ``generate`` compiles it (``reduce-overhead``: inductor and CUDA
graphs), anew for every shape so that no size in it is dynamic, and of a cache that ends soon after
the steps measured. Caches are filled, not computed.

``python -m benchmarks.run decode_step`` measures what the bars compare, those rows first that most
bars need. By itself, this module measures what it is told and prints it, parts at a time::

    python -m benchmarks.decode_step --variants squeezed unfused --shapes 1x1024 --profile

``step_ms`` is the median time of one call of the model and an argmax, the device awaited after each
step; ``generate_ms`` that between the tokens of ``generate``; ``queued_ms`` the mean where the
device is awaited at the end alone, which hides the launches that it can. ``first_ms`` lists the
first steps: those that compile, tune and record; ``again_ms`` those over a second cache.
``slowest_ms`` includes the encoding of blocks; ``encode_ms`` lists the steps that encoded, of 3
blocks: launched, recorded, replayed. ``peak_gb`` counts weights, cache and step of the row's own
model, the other model left out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation import StoppingCriteria

from squeeze import api, recipe, swapping
from squeeze.cache.layer import every_row
from squeeze.cache_hook import new_cache
from squeeze.compress import weight_method

OP = "decode_step"
TESTS = ("tests/test_decode_step_gpu.py", "tests/test_fused_layer_gpu.py")
KERNELS = ("block_store", "decode_attention", "kv_encode", "lut_linear", "step_glue")
SHAPES = ("1x1024", "1x32768", "8x32768", "32x8192")
SQUEEZED = ("squeezed", "unfused", "launched")
VARIANTS = (*SQUEEZED, "eager", "compiled")
# Rows in the order of what most bars need.
ORDER = (
    ("compiled", "1x32768"),
    ("squeezed", "1x32768"),
    ("compiled", "1x1024"),
    ("squeezed", "1x1024"),
    ("squeezed", "8x32768"),
    ("squeezed", "32x8192"),
    ("eager", "1x32768"),
    ("eager", "8x32768"),
    ("eager", "32x8192"),
    ("compiled", "8x32768"),
    ("compiled", "32x8192"),
    ("eager", "1x1024"),
)
# Figure, shape, whom squeezed is compared with (the better of them counts), and how many times
# smaller its figure must be.
BARS = (
    ("step_ms", "1x32768", ("compiled",), 3),
    ("step_ms", "1x32768", ("eager",), 12),
    ("step_ms", "1x1024", ("compiled",), 2),
    ("step_ms", "8x32768", ("compiled", "eager"), 8),
    ("step_ms", "32x8192", ("compiled", "eager"), 5),
    ("peak_gb", "8x32768", ("eager",), 1 / 0.32),
)
STEPS = 60
FIRST = 8  # steps that are timed apart
PROFILED = 10
WEIGHTS = [{"method": "kmeans", "bits": 4, "importance": "none"}]
PARTS = {
    "attention": ("attend", "_merge"),
    "weights": ("_kernel", "multiply", "_finish", "_split_", "gemm", "gemv", "nvjet", "cutlass"),
}


def run(
    device: str | torch.device, repeats: int = STEPS, done: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Measure what the bars compare, in an order that serves a run that is stopped.

    Args:
        device: The current CUDA device.
        repeats: Steps of a row.
        done: Rows that a run before has measured.

    Yields:
        One dictionary per variant and shape.
    """
    known = {(row["implementation"], row["shape"]) for row in done}
    models = Models(torch.device(device))
    options = Options(steps=repeats)
    for variant, shape in ORDER:
        if (variant, shape) not in known:
            yield models.measure(variant, shape, options)


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how far the rows at hand meet the bars: times faster, and share of memory."""
    found = {(row["implementation"], row["shape"]): row for row in rows}
    result = []
    for figure, shape, others, factor in BARS:
        asked = [found.get((name, shape)) for name in ("squeezed", *others)]
        if None in asked:
            continue
        ours, *theirs = [float(row[figure]) for row in asked if row is not None]
        ratio = min(theirs) / ours
        bar = {"bar": f"{figure} {shape} against {' and '.join(others)}", "wanted": factor}
        result.append({**bar, "ratio": ratio, "met": ratio >= factor})
    return result


def main() -> int:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="batch x context")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--generate", action="store_true", help="time generate() as well")
    parser.add_argument("--encode", action="store_true", help="time steps that encode blocks")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step")
    parser.add_argument("--again", action="store_true", help="time a second cache's first steps")
    options = parser.parse_args(namespace=Options())
    models = Models(torch.device("cuda"), options.layers)
    for variant in options.variants:
        for shape in options.shapes:
            row = models.measure(variant, shape, options)
            print(f"{variant:9} {shape:9}", summary(row), flush=True)
    return 0


class Options(argparse.Namespace):
    """What is measured of a row."""

    steps = STEPS
    layers = 32
    generate = encode = profile = again = False


class Models:
    """The dense and the squeezed model, made when they are first asked for."""

    def __init__(self, device: torch.device, layers: int = 32) -> None:
        self.device, self.layers = device, layers
        self.held: dict[bool, Any] = {}

    def measure(self, variant: str, shape: str, options: Options) -> dict[str, Any]:
        """Time the steps of one variant at one shape."""
        start, squeezed = time.perf_counter(), variant in SQUEEZED
        if squeezed not in self.held:
            self.held[squeezed] = dense_model(self.layers)
            if squeezed:
                squeeze_model(self.held[squeezed])
        model = self.held[squeezed]
        if squeezed:
            step: Any = model.squeeze_step
            step.enabled, step.fuses = variant != "launched", variant == "squeezed"
        batch, length = map(int, shape.split("x"))
        row = {"op": OP, "shape": shape, "implementation": variant, "layers": self.layers}
        try:
            row |= measure(model, variant, batch, length, options)
        finally:
            torch.compiler.reset()  # lets the caches of compiled steps go
        return row | {"baseline": not squeezed, "seconds": time.perf_counter() - start}


def dense_model(layers: int) -> LlamaForCausalLM:
    """Build the dense model on the GPU with random weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=65536,
        rope_theta=500000.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def squeeze_model(model: Any) -> None:
    """Swap random packed weights and the cache of ``kv4`` in, once."""
    if hasattr(model, "squeeze_swap"):
        return
    asked = {"weights": WEIGHTS, "kv_cache": recipe.load("kv4").to_dict()["kv_cache"]}
    plan = api.plan(asked, model, device="cuda")
    weights = {}
    for row in plan.weights:
        weight = weight_method(row).empty(*row.shape, "cuda")
        weight.indices.random_()
        if weight.codebook.dtype == torch.int8:
            weight.codebook.random_(-127, 128)
        else:
            weight.codebook.normal_(0, 0.02)
        if weight.scale is not None:
            weight.scale.fill_(0.0003)
        weights[row.module] = weight
    swapping.swap(model, swapping.Artifacts(plan, weights, {}), keep_dense=False)


def measure(model: Any, variant: str, batch: int, length: int, options: Options) -> dict[str, Any]:
    """Time the steps of one variant at one shape."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - model_bytes(model)
    room = FIRST + 2 * options.steps + 8
    room += options.generate * (options.steps + 8) + options.profile * PROFILED
    cache = filled_cache(model, variant, batch, length, room)
    step = stepper(model, variant, cache, batch, length)
    with torch.no_grad():
        first = [timed(step) for _ in range(FIRST)]
        times = [timed(step) for _ in range(options.steps)]
        queued = timed(lambda: [step() for _ in range(options.steps)]) / options.steps
    result = {
        "step_ms": statistics.median(times),
        "queued_ms": queued,
        "slowest_ms": max(times),
        "first_ms": first,
        "steps": options.steps,
    }
    if options.generate:
        result["generate_ms"] = generate_ms(model, cache, batch, length, options.steps)
    result["peak_gb"] = (torch.cuda.max_memory_allocated() - others) / 1e9
    if options.again:
        other = filled_cache(model, variant, batch, length, room)
        other_step = stepper(model, variant, other, batch, length)
        with torch.no_grad():
            result["again_ms"] = [timed(other_step) for _ in range(FIRST)]
    if options.profile:
        result |= profile(step)
    if options.encode and variant in SQUEEZED:
        result["encode_ms"] = encoding_steps(cache, step)
    return result


def model_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, parts of one storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def encoding_steps(cache: Any, step: Callable[[], Any], blocks: int = 3) -> list[float]:
    """Milliseconds of the steps that encode a block of every row."""
    times, stored = [], cache.packed_layers[0].max_blocks
    with torch.no_grad():
        while len(times) < blocks:
            spent = timed(step)
            if cache.packed_layers[0].max_blocks > stored:
                stored = cache.packed_layers[0].max_blocks
                times.append(spent)
    return times


def filled_cache(model: Any, variant: str, batch: int, length: int, room: int) -> Any:
    """Make a cache that holds ``length`` random tokens of every row."""
    if variant in SQUEEZED:
        return packed_cache(model, batch, length)
    if variant == "eager":
        cache: Any = DynamicCache(config=model.config)
        for i in range(len(model.model.layers)):
            keys, values = (
                torch.randn(batch, 8, length, 128, dtype=torch.bfloat16, device="cuda")
                for _ in range(2)
            )
            cache.update(keys, values, i)
        return cache
    cache = StaticCache(model.config, max_cache_len=length + room)
    some = torch.empty(batch, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    for layer in cache.layers:
        layer.lazy_initialization(some, some)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
    return cache


@torch.no_grad()
def packed_cache(model: Any, batch: int, length: int) -> Any:
    """Fill a packed cache: every block is a copy of one, at an address of its own."""
    cache = new_cache(model.config, model.squeeze_swap.states)
    for layer in cache.packed_layers:
        spec = layer.spec
        blocks = spec.ready(length)
        exact = length - blocks * spec.block_length
        some = torch.randn(batch, 8, exact, 128, dtype=torch.bfloat16, device="cuda")
        layer.lazy_initialization(some[:, :, :1], some[:, :, :1])
        layer.exact.reserve(exact)
        for buffer in (layer.exact.keys, layer.exact.values):
            buffer[:, :, :exact] = some
        for side, storage in ((spec.keys, layer.key_blocks), (spec.values, layer.value_blocks)):
            block = torch.randn(
                1, 1, 8, spec.block_length, 128, dtype=torch.bfloat16, device="cuda"
            )
            packed = every_row(side.encode(block, spec.implementation), batch)
            storage.grow(blocks, packed)
            for name, x in storage.segments[0].items():
                x.copy_(packed[name].expand(x.shape))
        layer.exact.counts.set([exact] * batch)
        layer.block_counts.set([blocks] * batch)
        layer.total = length
    return cache


def stepper(model: Any, variant: str, cache: Any, batch: int, length: int) -> Callable[[], Any]:
    """Return one greedy step, as a loop of one's own would make it."""
    token = torch.full((batch, 1), 5, device="cuda")
    place = torch.full((batch, 1), length, device="cuda")
    call, fixed = model, {}
    if variant == "compiled":
        call = model.get_compiled_call(model.generation_config.compile_config)
        # The mask of a compiled cache is made outside of the compiled call; its content is free.
        mask = torch.ones(batch, length + 1, dtype=torch.long, device="cuda")
        ids = token.expand(batch, length + 1)
        fixed = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=place,
        )
        fixed = {n: x for n, x in fixed.items() if n == "attention_mask"}

    def step() -> None:
        out = call(
            input_ids=token,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **fixed,
        )
        token.copy_(out.logits[:, -1:].argmax(-1))
        place.add_(1)

    return step


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, the device awaited before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


class Stamps(StoppingCriteria):
    """Note the time of every token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Wait for the device, note the time, and never stop."""
        torch.cuda.synchronize()
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_ms(model: Any, cache: Any, batch: int, length: int, steps: int) -> float:
    """Median milliseconds between the tokens of ``generate`` over the filled cache."""
    ids = torch.full((batch, int(cache.get_seq_length()) + 1), 5, device="cuda")
    stamps = Stamps()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=steps + 5,
        do_sample=False,
        stopping_criteria=[stamps],
    )
    between = [1000 * (b - a) for a, b in zip(stamps.at, stamps.at[1:], strict=False)]
    return statistics.median(between[4:])


def profile(step: Callable[[], Any], steps: int = PROFILED) -> dict[str, Any]:
    """Sum the kernels of a step by what they do, and list the longest."""
    from torch.profiler import ProfilerActivity

    with torch.no_grad(), torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spent: dict[str, float] = {"attention": 0.0, "weights": 0.0, "other": 0.0}
    kernels, launches = [], 0.0
    for event in found.key_averages():
        micros = event.self_device_time_total / steps
        name = event.key
        kind = next((k for k, words in PARTS.items() if any(w in name for w in words)), "other")
        kind = "other" if "at::native" in name else kind
        spent[kind] += micros / 1000
        launches += event.count / steps
        kernels.append((round(micros, 1), event.count / steps, event.key[:90]))
    kernels.sort(reverse=True)
    for kernel in kernels[:14]:
        print("   ", *kernel)
    result = {f"{kind}_ms": value for kind, value in spent.items()}
    return result | {"launches": launches, "kernels": kernels[:30]}


def summary(row: dict[str, Any]) -> str:
    """Say the figures of a row in one line."""
    lists = ("first_ms", "again_ms", "encode_ms")
    names = [n for n in row if n.endswith("_ms") and n not in lists] + ["peak_gb", "seconds"]
    names += ["launches"] if "launches" in row else []
    figures = [f"{name} {row[name]:.2f}" for name in names]
    for name in lists:
        if name in row:
            figures.append(f"{name} [{' '.join(f'{x:.1f}' for x in row[name])}]")
    return " ".join(figures)


if __name__ == "__main__":
    sys.exit(main())
