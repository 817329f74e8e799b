"""Make Triton's interpreter accept the installed NumPy."""

import importlib.util
import os

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
