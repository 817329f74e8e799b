"""Compressed prompts on disk: prefill once, go on from the packed cache in any later process.

One safetensors file holds the packed bytes as they are, the exact tokens, the counts and the token
ids. Its header says with which model, settings and content it was written; whatever differs when it
is loaded is refused, as the answer would be silently wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from squeeze import atomic
from squeeze.cache import PackedCache
from squeeze.cache.saved import export_layer, load_layer
from squeeze.cache_hook import new_cache, packing_states
from squeeze.errors import CheckpointError, UnsupportedError
from squeeze.prompt_identity import check_identity, identity
from squeeze.tensor_parallel import require_whole
from squeeze.types import Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
HEADER = "squeeze_prompt"
SPLIT_REMEDY = "Prefill again, or load the model without tp_plan"


@dataclass(frozen=True)
class Prompt:
    """A prompt that was prefilled before.

    Attributes:
        cache: What it left in the cache; ``copy.deepcopy`` of it serves several continuations.
        tokens: int64 ``[B, T]``, its token ids, padding included.
        attention_mask: int64 ``[B, T]``, zero where a row is padded on the left.
    """

    cache: PackedCache
    tokens: Tensor
    attention_mask: Tensor


def save_prompt(
    cache: PackedCache,
    path: str | Path,
    *,
    tokens: Tensor,
    model: PreTrainedModel,
    overwrite: bool = False,
) -> Path:
    """Write a prompt's compressed cache to one file, which appears whole or not at all.

    Args:
        cache: The ``past_key_values`` that ``model`` returned.
        path: File to write, by custom ``*.safetensors``.
        tokens: ``[B, T]``, the ids that the cache was filled with; ids beyond its length, like the
            last one that ``generate`` returns, are left out.
        model: The squeezed model.
        overwrite: Replace a file that is there.

    Raises:
        UnsupportedError: the cache is not this model's packed one, ``tokens`` are not its own, or
            the model is split over processes.
        CheckpointError: the file exists and ``overwrite`` is not set.
    """
    path = Path(path)
    require_whole(model, "save_prompt", SPLIT_REMEDY)
    if path.exists() and not overwrite:
        raise CheckpointError(
            str(path), "exists", "a new file", "Choose another, or overwrite=True"
        )
    ids = _own_tokens(cache, tokens)
    tensors: Tensors = {"tokens": ids}
    facts = {
        "format_version": FORMAT_VERSION,
        **identity(model, cache),
        "padded_right": cache.padded_right,
        "layers": [
            export_layer(layer, f"layers.{i}", tensors) for i, layer in enumerate(cache.layers)
        ],
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    facts["content"] = _content_hash(tensors, facts)
    with atomic.replacing(path) as draft:
        save_file(tensors, draft, metadata={HEADER: json.dumps(facts)})
    return path


def load_prompt(
    path: str | Path,
    model: PreTrainedModel,
    *,
    tokens: Tensor | None = None,
    into: PackedCache | None = None,
) -> Prompt:
    """Read a compressed prompt back, onto the model's device.

    Go on with ``model.generate(ids, past_key_values=prompt.cache)``, where ``ids`` begin with
    ``prompt.tokens``.

    Args:
        path: What ``save_prompt`` wrote.
        model: The same model, squeezed by the same settings.
        tokens: ``[B, >= T]``, checked to begin with the prompt's tokens.
        into: An empty cache of this model to fill, as ``static_cache`` makes; by default a new one.

    Raises:
        CheckpointError: the file is damaged, of a newer format, or of another model, other settings
            or another prompt; the message says which.
        UnsupportedError: the model packs no cache, or is split over processes.
    """
    path = Path(path)
    require_whole(model, "load_prompt", SPLIT_REMEDY)
    states = packing_states(model, "load_prompt")
    if into is not None and into.get_seq_length():
        raise UnsupportedError(
            "load_prompt: into",
            f"the cache holds {into.get_seq_length()} tokens",
            "an empty cache",
            "Reset it, or leave it out",
        )
    cache = into or new_cache(model.config.get_text_config(decoder=True), states)
    facts, tensors = _read(path)
    check_identity(path, facts, identity(model, cache))
    ids = tensors["tokens"]
    if tokens is not None:
        _check_tokens(path, ids, tokens)
    cache.padded_right = facts["padded_right"]
    for i, (layer, saved) in enumerate(zip(cache.layers, facts["layers"], strict=True)):
        load_layer(layer, f"layers.{i}", saved, tensors, _device(model, i))
    pads = torch.tensor(cache.packed_layers[0].pads)
    mask = (torch.arange(ids.shape[1]) >= pads.view(-1, 1)).long()
    return Prompt(cache, ids.clone().to(model.device), mask.to(model.device))


def _device(model: Any, layer: int) -> torch.device:
    """Find where a layer's keys and values are computed."""
    name = model.squeeze_swap.names.get(layer)
    module = model if name is None else model.get_submodule(name)
    tensors = itertools.chain(module.parameters(), module.buffers())  # clustered weights are these
    return next(tensors).device


def _own_tokens(cache: Any, tokens: Tensor) -> Tensor:
    if not isinstance(cache, PackedCache) or not cache.get_seq_length():
        raise UnsupportedError(
            "save_prompt: cache",
            f"got {'an empty' if isinstance(cache, PackedCache) else 'a'} {type(cache).__name__}",
            "the past_key_values that a squeezed model returned",
            "Run the prompt through the model first",
        )
    length, rows = cache.get_seq_length(), len(cache.packed_layers[0].pads)
    if tokens.ndim != 2 or tokens.shape[0] != rows or tokens.shape[1] < length:
        raise UnsupportedError(
            "save_prompt: tokens",
            f"got ids of shape {list(tokens.shape)}",
            f"the ids that filled the cache, {rows} rows of at least {length}",
            "Pass input_ids, padding included",
        )
    return tokens[:, :length].detach().cpu().long()


def _check_tokens(path: Path, ids: Tensor, tokens: Tensor) -> None:
    given = tokens[:, : ids.shape[1]].cpu()
    if given.shape == ids.shape and torch.equal(given, ids):
        return
    where = f"{list(ids.shape)} ids, got {list(tokens.shape)}"
    if given.shape == ids.shape:
        row, place = (given != ids).nonzero()[0].tolist()
        where = f"id {int(ids[row, place])} in row {row} at {place}, got {int(given[row, place])}"
    raise CheckpointError(
        str(path),
        f"holds another prompt: {where}",
        "tokens that begin with the saved ones",
        "Load the file of this prompt, or prefill it again",
    )


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Read header and tensors of a prompt's file, and check them against each other."""
    remedy = "Check the path, or save the prompt again"
    if not path.is_file():
        raise CheckpointError(str(path), "no such file", "what save_prompt wrote", remedy)
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise CheckpointError(
                    str(path), "is not a compressed prompt", "what save_prompt wrote", remedy
                )
            facts = json.loads(header)
            if facts["format_version"] > FORMAT_VERSION:
                raise CheckpointError(
                    str(path),
                    f"prompt format {facts['format_version']} is newer than this squeeze",
                    f"up to {FORMAT_VERSION}",
                    "Upgrade squeeze",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(path), f"cannot be read ({error})", "what save_prompt wrote", remedy
        ) from error
    if facts.get("content") != _content_hash(tensors, facts):
        raise CheckpointError(
            str(path),
            "its content is not what its header says",
            "the bytes that save_prompt wrote",
            "Copy the file again, or save the prompt again",
        )
    return facts, tensors


def _content_hash(tensors: Tensors, facts: Mapping[str, Any]) -> str:
    """Hash every tensor and the header."""
    digest = hashlib.sha256()
    header = {key: value for key, value in facts.items() if key != "content"}
    digest.update(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
