"""Make Triton's interpreter accept the installed NumPy, and compile kernels beside it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def interpreter_loop_bounds(monkeypatch):
    """Read one-element arrays with ``item``: NumPy 2.4 refuses the ``int()`` of Triton 3.6."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture
def compiled():
    """Run a ``compile_*.py`` of this folder without the interpreter: a fact sheet per kernel."""

    def run(name, *arguments):
        script = Path(__file__).with_name(name)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(script.parents[2])
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
