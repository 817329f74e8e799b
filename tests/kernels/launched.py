"""Compile what launchers launch, for a GPU that need not be here.

A launcher runs on meta tensors; every kernel it would start is specialised and compiled exactly as
on that GPU (absent tensors, divisible sizes, constants), and its machine code is described.
Imported by scripts that tests run in a process of its own, because the interpreter and the compiler
exclude each other.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Absent:
    """Stands in for the driver of a GPU of one compute capability."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        """The GPU to compile for."""
        return self.target

    def get_current_device(self):
        """A number of its own for each capability, as compiled kernels are kept by device."""
        return self.target.arch

    def get_current_stream(self, device):
        """Nothing is ever put on it."""
        return 0


class OnGpu(torch.Tensor):
    """A tensor without memory that says it is on a GPU, for launchers that ask."""

    is_cuda = property(lambda self: True)


def absent(*shape, dtype):
    """A tensor without memory that says it is on a GPU."""
    return torch.empty(*shape, dtype=dtype, device="meta").as_subclass(OnGpu)


@contextlib.contextmanager
def asked_about(capability):
    """Have PyTorch describe a GPU of 132 multiprocessors and a compute capability."""
    major, minor = divmod(capability, 10)
    facts = SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(major, minor)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=facts),
    ):
        yield


@contextlib.contextmanager
def launches(capability):
    """Compile instead of launching; yields the list to which ``(name, compiled)`` are appended."""
    made = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.fn.__name__, compiled))
        return compiled

    driver.set_active(Absent(capability))
    with asked_about(capability), mock.patch.object(JITFunction, "run", run):
        yield made


def run_tool(compiled, *command):
    """What a tool prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        full = [os.path.join(TOOLS, command[0]), *command[1:], file.name]
        return subprocess.run(full, capture_output=True, text=True, check=True).stdout


def usage(compiled):
    """Registers and bytes of stack (spills) per thread, shared memory of a program."""
    text = run_tool(compiled, "cuobjdump", "-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
    }
