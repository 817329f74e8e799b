"""``squeeze generate``: stream text from a squeezed model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options


@options.command()
@click.argument("directory")
@click.option("--prompt", help="Text to continue.")
@click.option("--file", "path", help="File with the text to continue; '-' is standard input.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, help="0, the default: greedy."
)
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True)
@options.seed
@options.loading
@options.as_json
def command(
    directory: str,
    prompt: str | None,
    path: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Continue a text with the model in DIRECTORY, squeezed or dense, token by token."""
    import torch
    from transformers import TextStreamer

    from squeeze.cli._models import open_model
    from squeeze.cli._output import emit, note

    text = _text(prompt, path)
    model, tokenizer = open_model(directory, **loading)
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature else {}
    started = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=bool(temperature),
        streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True),
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        **sampling,
    )
    seconds = time.perf_counter() - started
    result = _describe(output, tokenizer, inputs["input_ids"].shape[1], seconds)
    if as_json:
        emit({"prompt": text, **result}, "", as_json)
    else:
        note(
            f"{result['new_tokens']} tokens after {result['prompt_tokens']} in {seconds:.1f} s, "
            f"cache {result['kv_bytes'] / 1e6:.2f} MB"
        )


def _text(prompt: str | None, path: str | None) -> str:
    """Take the text from exactly one of the two options.

    Raises:
        RecipeError: none or both are given, or the file cannot be read.
    """
    from squeeze.errors import RecipeError

    if (prompt is None) == (path is None):
        received = "both --prompt and --file" if prompt is not None else "no text"
        raise RecipeError("generate", received, "--prompt TEXT or --file PATH", "Give one of them")
    if prompt is not None:
        return prompt
    if path == "-":
        return sys.stdin.read()
    assert path is not None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("--file", f"{path!r} cannot be read ({error})", "a text file") from error


def _describe(output: Any, tokenizer: Any, prompt_tokens: int, seconds: float) -> dict[str, Any]:
    from squeeze.evaluation.memory import kv_bytes

    new = output.sequences[0, prompt_tokens:]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new),
        "seconds": seconds,
        "kv_bytes": kv_bytes(output.past_key_values),
    }
