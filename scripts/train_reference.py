"""Train the embedded reference model; it took 440 seconds on one NVIDIA H200.

    python scripts/train_reference.py --data DATA --out OUT

``DATA`` holds ``tokenizer.json`` (8192 tokens; 0 begins a text, 2 pads) and ``train.npy`` and
``val.npy``: the token ids of the books, uint16. ``OUT`` receives a Hugging Face checkpoint and
``train_eval.json``. A part of the sequences hides facts or repeats passages, so that the model must
look far back; contexts grow from 2048 to 32768 tokens. Time and not steps ends a stage, so a rerun
gives a model as good, not the same bytes. ``reference_text.py`` makes the sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from reference_text import BOS, PAD, Sequences, Writer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from squeeze.evaluation.facts import DIGITS, FORMS

HEAD_DIM, VOCABULARY, THETA, EPSILON = 64, 8192, 500000.0, 1e-5
EOS = 1


class Stage(NamedTuple):
    """A share of the time, and its mixture of (context, share made up, share of steps)."""

    share: float
    mixture: list[tuple[int, float, float]]


STAGES = [
    Stage(0.52, [(2048, 0.25, 1.0)]),
    Stage(0.20, [(8192, 0.45, 0.8), (2048, 0.35, 0.2)]),
    Stage(0.28, [(32768, 0.5, 0.6), (8192, 0.5, 0.25), (2048, 0.4, 0.15)]),
]
TINY_STAGES = [
    Stage(0.5, [(256, 0.3, 1.0)]),
    Stage(0.5, [(512, 0.5, 0.5), (256, 0.3, 0.5)]),
]


class Norm(nn.Module):
    """Root-mean-square normalisation in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        shape = (x.shape[-1],)
        return functional.rms_norm(x.float(), shape, self.weight.float(), EPSILON).to(x.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to ``[B, H, T, D]``, halves rotated against each other."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Block(nn.Module):
    """One layer; parameter names are those of a Llama checkpoint."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden), Norm(hidden)
        sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(hidden, n * HEAD_DIM, bias=False) for name, n in sizes.items()}
        )
        self.self_attn["o_proj"] = nn.Linear(heads * HEAD_DIM, hidden, bias=False)
        self.mlp = nn.ModuleDict(
            {name: nn.Linear(hidden, ffn, bias=False) for name in ("gate_proj", "up_proj")}
        )
        self.mlp["down_proj"] = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attend and transform ``[B, T, hidden]``."""
        hidden, shape = self.input_layernorm(x), (*x.shape[:2], -1, HEAD_DIM)
        query, keys, values = (
            self.self_attn[name](hidden).view(shape).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, keys = rotate(query, cosine, sine), rotate(keys, cosine, sine)
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        )
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        hidden = self.post_attention_layernorm(x)
        gated = functional.silu(self.mlp["gate_proj"](hidden)) * self.mlp["up_proj"](hidden)
        return x + self.mlp["down_proj"](gated)


class Model(nn.Module):
    """A Llama with tied embeddings; ``forward`` returns the normalised hidden states."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        sizes = (options.hidden, options.heads, options.kv_heads, options.ffn)
        self.embed_tokens = nn.Embedding(VOCABULARY, options.hidden)
        self.layers = nn.ModuleList(Block(*sizes) for _ in range(options.layers))
        self.norm = Norm(options.hidden)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = math.sqrt(2 * options.layers) if into_residual else 1
                nn.init.normal_(weight, std=0.02 / scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids ``[B, T]`` to hidden states ``[B, T, hidden]``; bfloat16 on CUDA."""
        x = self.embed_tokens(ids).to(torch.bfloat16 if ids.is_cuda else torch.float32)
        steps = torch.arange(0, HEAD_DIM, 2, device=ids.device).float()
        positions = torch.arange(ids.shape[1], device=ids.device).float()
        angles = torch.outer(positions, 1 / THETA ** (steps / HEAD_DIM)).repeat(1, 2)
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(x)


def weighted_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy over all tokens."""
    logits = (hidden @ embedding.t()).float().view(-1, VOCABULARY)
    losses = functional.cross_entropy(logits, targets.reshape(-1), reduction="none")
    return (losses * weights.reshape(-1)).sum() / weights.sum()


def train(model: Model, options: argparse.Namespace) -> dict[str, float]:
    """Train by the clock, stage after stage; return tokens seen, in millions, and steps."""
    began, cuda = time.time(), options.device == "cuda"
    loss_of = torch.compile(weighted_loss, dynamic=False) if cuda else weighted_loss
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.95),
        fused=cuda,
    )
    loaders: dict[tuple[int, float], Iterator[Any]] = {}
    chooser, step, seen, ends = random.Random(3), 0, 0, 0.0
    for stage in TINY_STAGES if options.tiny else STAGES:
        ends += stage.share * options.seconds
        while (elapsed := time.time() - began) < ends:
            chosen = chooser.choices(stage.mixture, [share for *_, share in stage.mixture])[0]
            if chosen[:2] not in loaders:
                loaders[chosen[:2]] = load(options, *chosen[:2], number=len(loaders))
            batch = next(loaders[chosen[:2]])
            ids, targets, weights = (x.to(options.device, non_blocking=True) for x in batch)
            rate = options.lr * schedule(step, elapsed / options.seconds)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(options.device, torch.bfloat16, enabled=cuda):
                loss = loss_of(model(ids), model.embed_tokens.weight, targets, weights)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + ids.numel()
            if step % 200 == 0:
                print(f"{elapsed:.0f} s, step {step}, loss {loss.item():.4f}", flush=True)
    return {"tokens_seen_M": seen / 1e6, "steps": step}


def schedule(step: int, progress: float) -> float:
    """Scale the learning rate: 150 steps up, flat, then linearly down from 45% of the time."""
    return min(1, (step + 1) / 150) * (1 if progress < 0.45 else max(0.01, (1 - progress) / 0.55))


def load(options: argparse.Namespace, length: int, made_up: float, number: int) -> Iterator[Any]:
    """Start worker processes that make batches of ``options.tokens`` tokens."""
    loader = torch.utils.data.DataLoader(
        Sequences(options.data, length, made_up, options.seed * 10 + number),
        batch_size=max(1, options.tokens // length),
        num_workers=options.workers if number == 0 else max(1, options.workers // 2),
        pin_memory=options.device == "cuda",
        prefetch_factor=4,
    )
    return iter(loader)


@torch.no_grad()
def measure(
    model: Model, options: argparse.Namespace, length: int, count: int = 8
) -> dict[str, float]:
    """Measure perplexity of the last 1024 tokens, and recall of 5-digit facts by token and fact."""
    tokenizer = Tokenizer.from_file(str(options.data / "tokenizer.json"))
    writer = Writer(np.load(options.data / "val.npy"), tokenizer, seed=7)
    loss, hits = 0.0, []
    for _ in range(count):
        ids = torch.tensor([writer.book(length).ids], device=options.device)
        logits = predict(model, ids[:, :-1], min(1024, length))
        loss += functional.cross_entropy(logits, ids[0, -len(logits) :]).item() / count
    for index in range(count):
        sequence = writer.facts(length, 8, FORMS[index % len(FORMS)], draw_five_digits)
        ids = torch.tensor([sequence.ids], device=options.device)
        greedy = predict(model, ids[:, :-1], length).argmax(-1)
        hits += [greedy[a - 1 : a - 1 + n] == ids[0, a : a + n] for a, n in sequence.answers]
    return {
        "ppl_last1k": round(math.exp(loss), 3),
        "needle_tok": round(torch.cat(hits).float().mean().item(), 4),
        "needle_full": round(sum(bool(hit.all()) for hit in hits) / len(hits), 4),
    }


def draw_five_digits(generator: random.Random) -> str:
    """Draw a value of one kind and size, so that lengths of context can be compared."""
    return "".join(generator.choice(DIGITS) for _ in range(5))


def predict(model: Model, ids: Tensor, last: int) -> Tensor:
    """Return float32 logits ``[last, V]`` of the final positions of one sequence."""
    hidden = model(ids)[0, -last:]
    return (hidden @ model.embed_tokens.weight.t().to(hidden.dtype)).float()


def save(model: Model, options: argparse.Namespace) -> None:
    """Write weights in bfloat16 and the configuration, as transformers reads them."""
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    stored = {name: x.to(torch.bfloat16).contiguous().cpu() for name, x in weights.items()}
    save_file(stored, options.out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "rms_norm_eps": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "bfloat16",
        "initializer_range": 0.02,
    }
    (options.out / "config.json").write_text(json.dumps(config, indent=2))


def parse() -> argparse.Namespace:
    """Read the command line; the defaults made the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    sizes = {"hidden": 384, "heads": 6, "kv-heads": 2, "ffn": 1024, "layers": 8}
    for name, default in (sizes | {"seed": 5, "workers": 12, "tokens": 131072}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=440.0)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="short contexts, to try the script")
    return parser.parse_args()


def main() -> None:
    """Train, save and measure."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = Model(options).to(options.device)
    if options.device == "cuda":
        for layer in model.layers:
            layer.compile(dynamic=False)
    closing = train(model, options)
    save(model, options)
    for layer in model.layers:
        layer._compiled_call_impl = None  # Not worth compiling for the lengths measured once.
    with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
        lengths = (256, 512) if options.tiny else (2048, 4096, 8192, 16384, 32768)
        results = {str(length): measure(model, options, length) for length in lengths}
    (options.out / "train_eval.json").write_text(json.dumps(results | closing, indent=1))
    print(json.dumps(results | closing))


if __name__ == "__main__":
    main()
