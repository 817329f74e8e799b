"""``squeeze doctor``: what is installed, and what would compute each op."""

from __future__ import annotations

from typing import Any

from squeeze.cli import _options as options

OPTIONAL = {
    "triton": "kernels on a GPU; comes with a CUDA build of torch",
    "lm-eval": "tasks of lm-eval; pip install 'squeeze-llm[eval]'",
    "compressed-tensors": "that export format; pip install 'squeeze-llm[compressed-tensors]'",
}


@options.command()
@options.device
@options.as_json
def command(device: str | None, as_json: bool) -> None:
    """Show versions, the GPU, Triton, and which implementation each op would take."""
    from squeeze.cli._output import emit, print_table
    from squeeze.environment import environment
    from squeeze.plan import resolve_device

    device = resolve_device(device)
    found = environment()
    ops = _operations(device)
    missing = {name: use for name, use in OPTIONAL.items() if name not in found["versions"]}
    if as_json:
        emit({**found, "device": device, "operations": ops, "missing": missing}, "", as_json)
        return
    rows = [*found["versions"].items(), *found["hardware"].items(), ("commit", found["commit"])]
    rows += [(name, f"not installed ({use})") for name, use in missing.items()]
    print_table("installed", ["what", "found"], [(name, str(value)) for name, value in rows])
    print_table(f"operations on {device}", ["op", "implementation"], list(ops.items()))


def _operations(device: str) -> dict[str, Any]:
    """Say for every kernel folder what a plan made now would choose."""
    from importlib.resources import files

    from squeeze.errors import DeviceError
    from squeeze.plan import resolve_implementation

    chosen = {}
    folders = [entry for entry in files("squeeze.kernels").iterdir() if entry.is_dir()]
    for folder in sorted(folders, key=lambda entry: entry.name):
        if not folder.joinpath("api.py").is_file():
            continue
        if not folder.joinpath("triton.py").is_file():
            chosen[folder.name] = "reference (the only one)"
            continue
        try:
            chosen[folder.name] = resolve_implementation(device)
        except DeviceError as error:
            chosen[folder.name] = f"none: {error}"
    return chosen
