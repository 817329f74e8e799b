"""Two processes that share a model: what the tests of tensor parallelism run in each."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes

import squeeze
import tests.tiny as tiny

STEPS = 24
RECIPE = {
    "weights": [
        {"method": "kmeans", "bits": 4, "targets": ["self_attn"]},
        {"method": "lnq", "bits": 4, "targets": ["gate_proj", "up_proj", "down_proj", "lm_head"]},
    ],
    "kv_cache": {
        "keys": {
            "method": "affine",
            "bits": 4,
            "granularity": "channel",
            "group_size": 32,
            "transforms": ["center", "klt"],
        },
        "values": {"method": "affine", "bits": 4, "granularity": "token", "group_size": 16},
        "sink_tokens": 4,
        "residual_length": 32,
    },
    "calibration": {"samples": 2, "length": 64},
}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


def save(folder: Path, name: str, recipe: Any = None, **extra: Any) -> squeeze.api.Result:
    """Write a dense model with the reference tokenizer to ``dense``, squeezed to ``squeezed``."""
    options = {"vocab_size": 8192, "intermediate_size": 128, **BIASES.get(name, {}), **extra}
    model = tiny.model(name, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin as zeros, which no error would change
                parameter.add_(torch.randn_like(parameter) / 8)
    model.save_pretrained(folder / "dense")
    squeeze.load_tokenizer("reference").save_pretrained(folder / "dense")
    return squeeze.run(
        recipe or RECIPE, folder / "dense", folder / "squeezed", evaluate=False, device="cpu"
    )


def inputs() -> dict[str, torch.Tensor]:
    """Make two prompts, one padded on the left."""
    return {n: x for n, x in tiny.prompt(2, 100, (7, 0)).items() if isinstance(x, torch.Tensor)}


@torch.no_grad()
def forced(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a prompt's end and of steps over given tokens, ``[B, 1 + steps, V]``."""
    given = {name: x.to(model.device) for name, x in inputs().items()}
    mask, start = given["attention_mask"], given["input_ids"].shape[1]
    output = model(**given, use_cache=True)
    found = [output.logits[:, -1].float().cpu()]
    for place in range(start, tokens.shape[1] - 1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(
            tokens[:, place : place + 1].to(model.device),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=output.past_key_values,
        )
        found.append(output.logits[:, -1].float().cpu())
    return torch.stack(found, 1)


def generate(model: Any) -> Any:
    """Generate greedily."""
    given = {name: x.to(model.device) for name, x in inputs().items()}
    return model.generate(
        **given, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True
    )


def _enter(rank: int, size: int, path: Path, work: Any, gpu: bool, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{path}", rank=rank, world_size=size
    )
    work(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()


def together(path: Path, work: Any, *arguments: Any, size: int = 2, gpu: bool = False) -> None:
    """Run a function of a module in several processes that know one another."""
    enter = functools.partial(_enter, size=size, path=path, work=work, gpu=gpu, arguments=arguments)
    start_processes(enter, nprocs=size, start_method="spawn" if gpu else "fork")
