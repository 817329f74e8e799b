"""The table of weights: its rows, what a row of the library stores, and how it is laid out."""

import importlib.util

import pytest
import torch

from benchmarks import weights_quality
from squeeze import recipe
from squeeze.errors import DeviceError, RecipeError
from tests import tiny


def result(**cells):
    where = {"model": "tiny", "dtype": "float32", "hardware": {"gpu": None, "cores": 2}}
    where |= {"windows": 2, "facts": 4, "seed": 0, "text": "books", "jobs": 1, "mode": "prefill"}
    rows = {
        name: {"kind": kind, "settings": {"nbits": 3}, "cells": {"2048": cell}}
        for name, (kind, cell) in cells.items()
    }
    return {"conditions": where, "rows": rows}


def cell(bits, nll, needle):
    perplexity = {"value": torch.tensor(nll).mean().exp().item(), "window_nll": nll}
    storage = {"effective_bits": bits, "wide_bits": bits - 0.25}
    quality = {"books_perplexity": perplexity, "needle": {"value": needle}}
    return quality | {"storage": storage, "compress_seconds": 12.3, "seconds": 20.0}


def test_rows_are_dense_the_weight_recipes_and_the_library():
    rows = weights_quality.discover()
    assert next(iter(rows)) == "dense" and {"hqq4", "hqq3", "hqq2"} < set(rows)
    shipped = {name: recipe.load(name) for name in recipe.shipped()}
    assert {"weights4", "weights3", "weights2", "dkm2", "mixed3", "gptq3"} < set(rows)
    assert not any(shipped[n].kv_cache or shipped[n].attention for n in rows if n in shipped)


def test_an_unknown_row_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="weights3"):
        weights_quality.choose("dense,weigths3")


def test_table_shows_bits_rise_and_failures():
    dense, ours = cell(16.0, [3.0, 3.5], 1.0), cell(3.5, [3.05, 3.56], 0.75)
    made = result(
        dense=("dense", dense),
        hqq3=("library", {"error": "DeviceError: hqq is not installed"}),
        weights3=("recipe", ours),
    )
    text = weights_quality.table(made)
    assert "| `weights3` | 3.500 | 3.250 | +5.65 ± " in text and "| 0.75 | 12 |" in text
    assert "hqq, 3 bits, groups of 64 | - | - | - | - | - |" in text
    assert "- Not measured: `awq4`, " in text and "`weights3`," not in text
    assert "`hqq3` at 2048 tokens could not run: DeviceError: hqq is not installed" in text


@pytest.mark.skipif(importlib.util.find_spec("hqq") is not None, reason="hqq is installed")
def test_without_the_library_its_rows_say_so():
    with pytest.raises(DeviceError, match="pip install hqq=="):
        weights_quality.round_by_library(tiny.model(), {"nbits": 3, "group_size": 64})
