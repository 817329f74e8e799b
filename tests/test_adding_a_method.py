"""One file adds a method: it is found by ``ls``, ``plan`` and ``run`` without any edit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import squeeze
import squeeze.quant.kv
from squeeze import api, registry
from squeeze.cli import main
from tests import tiny

SOURCE = '''
"""Halves: keep the upper half of every float16."""

from dataclasses import dataclass

import torch

from squeeze.registry import register


@register(source="https://example.org/halves", year=2026)
@dataclass(frozen=True)
class Halves:
    """Keep the sign, the exponent and two bits of the fraction."""

    statistics = ()
    block_length = 32

    def fit(self, statistics):
        return {}

    def encode(self, x, parameters):
        bits = x.to(torch.float16).view(torch.int16)
        return {"codes": ((bits >> 8) & 0xFF).to(torch.uint8)}

    def decode(self, packed, parameters):
        return (packed["codes"].to(torch.int16) << 8).view(torch.float16).float()

    def bits_per_value(self, head_dim):
        return 8.0

    def constant_bytes(self, heads, head_dim):
        return 0

    def check(self, head_dim):
        pass
'''


@pytest.fixture
def halves(tmp_path: Path, monkeypatch):
    (tmp_path / "halves.py").write_text(SOURCE)
    monkeypatch.setattr(squeeze.quant.kv, "__path__", [*squeeze.quant.kv.__path__, str(tmp_path)])
    yield "halves"
    sys.modules.pop("squeeze.quant.kv.halves", None)


def test_a_dropped_file_is_found_by_ls_plan_and_run(halves: str) -> None:
    assert halves in registry.names("kv")
    listed = CliRunner().invoke(main, ["ls", "kv", "--json"])
    assert listed.exit_code == 0, listed.output
    assert "halves" in json.dumps(json.loads(listed.output))
    recipe = {
        "kv_cache": {
            "keys": {"method": halves},
            "values": {"method": halves},
            "residual_length": 8,
            "block_length": 32,
        }
    }
    model = tiny.model("llama")
    assert api.plan(recipe, model).effective_bits["keys"] == 8.0
    result = squeeze.run(recipe, model, evaluate=False)
    ids = tiny.prompt(1, 80)["input_ids"]
    cache = result.model(ids).past_key_values
    stored = cache.layers[0].key_blocks.segments[0]["codes"]
    assert stored.dtype == torch.uint8
    output = result.model(ids[:, :1], past_key_values=cache).logits
    assert torch.isfinite(output).all()
