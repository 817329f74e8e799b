"""Imports go one way, methods know no other method, and importing squeeze loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from squeeze.registry import KINDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "squeeze"
# Low to high. A file may import lower strata, and earlier names of its own stratum.
STRATA = (
    (
        "errors",
        "types",
        "registry",
        "environment",
        "atomic",
        "saved_tensors",
        "magnitudes",
        "matching",
    ),
    ("kernels",),
    ("quant", "sparsify"),
    (
        "recipe_values",
        "recipe_parse",
        "recipe_schema",
        "recipe",
        "key_biases",
        "fused",
        "families",
        "model_info",
        "plan_table",
        "plan_guard",
        "plan_fold",
        "plan_cache",
        "plan_scaling",
        "plan_weights",
        "plan_mixer",
        "plan_prefill",
        "plan_activations",
        "plan",
    ),
    (
        "reference",
        "weight_shards",
        "linear",
        "joint",
        "experts",
        "mixer",
        "sparse_inputs",
        "tensor_files",
        "processes",
        "layers",
        "calibrate",
        "expert_fit",
        "allocate",
        "allocate_prefill",
        "allocate_weights",
        "cache",
        "attention",
        "cache_hook",
        "devices",
        "tensor_parallel",
        "recorder",
        "fused_layer",
        "step_encode",
        "decode_step",
        "folding",
        "scaling",
        "swapping",
        "compress",
        "guidance",
        "layer_turn",
        "layerwise",
        "stacks",
        "distill",
    ),
    (
        "measurement",
        "evaluation",
        "echoes",
        "training_text",
        "report_charts",
        "report_pareto",
        "report_html",
        "report",
        "report_comparison",
    ),
    ("loading", "quantizer", "export", "export_compressed", "prompt_identity", "prompt"),
    ("api",),
    ("cli",),
)
# transformers calls the quantizer back, which has to reach the loader above it.
CALLBACKS = {("quantizer.py", "export")}
METHOD_FOLDERS = {Path(*path.split(".")[1:]) for path in KINDS.values()}


def files():
    found = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return [path for path in found if path != Path("__init__.py")]


def top(path):
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Dotted names below ``squeeze`` that a file imports, functions included, annotations aside."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    for_types = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".", 1)[1] for name in names if name.startswith("squeeze."))


def rank(name):
    for level, names in enumerate(STRATA):
        if name in names:
            return level, names.index(name)
    raise AssertionError(f"squeeze/{name} has no place in STRATA")


@pytest.mark.parametrize("path", files(), ids=str)
def test_imports_go_down(path):
    level, place = rank(top(path))
    for name in imports(path):
        target = name.split(".", 1)[0]
        if target == top(path) or (str(path), target) in CALLBACKS:
            continue
        if (PACKAGE / f"{target}.py").is_file() or (PACKAGE / target).is_dir():
            other, earlier = rank(target)
            lower = other < level or (other == level and earlier < place)
            assert lower, f"{path} imports squeeze.{name}, which is above it"
            assert {target, top(path)} != {"quant", "sparsify"}, f"{path} imports squeeze.{name}"


@pytest.mark.parametrize("path", [p for p in files() if p.parent in METHOD_FOLDERS], ids=str)
def test_a_method_imports_no_method_and_kernels_only_through_an_api(path):
    for name in imports(path):
        for methods in METHOD_FOLDERS:
            inside = Path(name.replace(".", "/")).is_relative_to(methods)
            is_private = any(part.startswith("_") for part in name.split("."))
            assert not inside or is_private, f"{path} imports the method squeeze.{name}"
        if name.startswith("kernels."):
            parts = name.split(".")
            assert parts[1] == "bits" or parts[2] == "api", f"{path} imports squeeze.{name}"


@pytest.mark.parametrize("op", sorted(p.parent.name for p in PACKAGE.glob("kernels/*/api.py")))
def test_reference_and_triton_never_know_each_other(op):
    folder = Path("kernels", op)
    for name, other in (("reference", "triton"), ("triton", "reference")):
        path = folder / f"{name}.py"
        if (PACKAGE / path).is_file():
            forbidden = (f"kernels.{op}.{other}", f"kernels.{op}.api")
            assert not [i for i in imports(path) if i.startswith(forbidden)]


def run(code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_squeeze_loads_nothing_heavy():
    loaded = run("import sys, squeeze; print(*sys.modules)")
    heavy = ("lm_eval", "datasets", "triton", "compressed_tensors")
    assert not [name for name in loaded if name.split(".")[0] in heavy]
    assert not [
        name for name in loaded if ".modeling_" in name and name.startswith("transformers.models.")
    ]
    assert not [name for name in loaded if name.startswith("squeeze.kernels.") and "triton" in name]


def test_no_submodule_shadows_a_public_name():
    code = """
import importlib, pkgutil, squeeze
for module in pkgutil.iter_modules(squeeze.__path__, "squeeze."):
    importlib.import_module(module.name)
print(*(name for name in squeeze.__all__ if type(getattr(squeeze, name)).__name__ == "module"))
"""
    assert run(code) == []
