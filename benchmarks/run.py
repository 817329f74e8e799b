"""Measure kernels, and refuse to print a speed while their tests fail.

Run from the repository root, on the machine to be measured::

    python -m benchmarks.run decode_attention
    python -m benchmarks.run --device cpu lut_linear

Each op named has ``tests/kernels/test_<op>.py`` and ``benchmarks/<op>.py``, whose
``run(device, repeats)`` yields a row per measurement, baselines first. The result goes to
``benchmarks/results/<op>.json`` with everything needed to judge it later, after every row, so what
a stopped run had measured is kept (``complete`` is false then). ``--warm`` runs every case with
few repeats and writes nothing: kernels are compiled and cached when the measurement starts.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from squeeze.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Test and measure the named ops; return 1 when one of them fails its tests."""
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "run")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("ops", nargs="+", choices=known, help="what to measure")
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--warm", action="store_true", help="only compile; measure and test nothing"
    )
    options = parser.parse_args()
    if options.warm:
        for op in options.ops:
            print(f"{op}: {warm(op, options.device)} cases compiled", file=sys.stderr)
        return 0
    failed = [op for op in options.ops if not measure(op, options.device, options.output)]
    for op in failed:
        print(f"{op}: tests failed, so nothing was measured", file=sys.stderr)
    return 1 if failed else 0


def warm(op: str, device: str) -> int:
    """Run every case of an op briefly, for the compile cache; return how many rows there were."""
    return sum(1 for _ in importlib.import_module(f"benchmarks.{op}").run(device, repeats=1))


def measure(op: str, device: str, output: Path) -> bool:
    """Run the tests of one op, then its benchmark; write and print the result.

    Returns:
        Whether the tests passed; nothing is measured when they did not.
    """
    passed = run_tests(op)
    if not passed:
        return False
    rows: list[dict[str, Any]] = []
    where = environment()
    result = {
        "op": op,
        "device": device,
        "hardware": where["hardware"],
        "versions": where["versions"],
        "commit": where["commit"],
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "tests_passed": passed,
        "kernel_sha256": kernel_hashes(op),
        "complete": False,
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{op}.json"
    for row in importlib.import_module(f"benchmarks.{op}").run(device):
        rows.append(row)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["complete"] = True
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(op, rows, where["hardware"]["gpu"] or where["hardware"]["cpu"])
    return True


def run_tests(op: str) -> int:
    """Run the op's tests, those marked ``gpu`` where there is one; return how many passed, or 0."""
    import torch

    marks = "gpu and not slow" if torch.cuda.is_available() else "not gpu and not slow and not hub"
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        test = ROOT / "tests" / "kernels" / f"test_{op}.py"
        command = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={junit}", str(test)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            return 0
        suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return sum(1 for case in suite.iter("testcase") if case.find("skipped") is None)


def kernel_hashes(op: str) -> dict[str, str]:
    """Hash every file that decides what the op computes."""
    kernels = ROOT / "squeeze" / "kernels"
    files = [kernels / "bits.py", *sorted((kernels / op).rglob("*.py"))]
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def show(op: str, rows: list[dict[str, Any]], hardware: str) -> None:
    """Print the rows as a table, hardware in its title."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=f"{op} on {hardware}", title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in names))
    Console(width=160).print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
