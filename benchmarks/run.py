"""Measure kernels, and refuse to print a speed while their tests fail.

Run from the repository root, on the machine to be measured::

    python -m benchmarks.run decode_attention
    python -m benchmarks.run --device cpu lut_linear

Each op named has ``tests/kernels/test_<op>.py`` and ``benchmarks/<op>.py``, whose
``run(device, repeats)`` yields a row per measurement, baselines first. The result goes to
``benchmarks/results/<op>.json`` with everything needed to judge it later, after every row, so what
a stopped run had measured is kept (``complete`` is false then). ``--warm`` runs every case with
few repeats and writes nothing: kernels are compiled and cached when the measurement starts.

A module that measures more than one kernel says what it rests on: ``KERNELS``, folders of kernels,
and ``TESTS``, test files. ``--resume`` goes on with a result that was stopped, where the module's
``run`` takes the rows ``done`` and commit, kernels, versions and hardware are the same; its tests
have passed then. ``--tests`` stops before the first row, ``--workers`` spreads the tests over
processes (pytest-xdist). ``bars(rows)`` of a module says which bars the rows meet.
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
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of a result that was stopped"
    )
    parser.add_argument(
        "--tests", action="store_true", help="only run the tests; --resume measures then"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that run the tests")
    options = parser.parse_args()
    if options.warm:
        for op in options.ops:
            print(f"{op}: {warm(op, options.device)} cases compiled", file=sys.stderr)
        return 0
    how = (options.device, options.output, options.resume, options.tests, options.workers)
    failed = [op for op in options.ops if not measure(op, *how)]
    for op in failed:
        print(f"{op}: tests failed, so nothing was measured", file=sys.stderr)
    return 1 if failed else 0


def warm(op: str, device: str) -> int:
    """Run every case of an op briefly, for the compile cache; return how many rows there were."""
    return sum(1 for _ in importlib.import_module(f"benchmarks.{op}").run(device, repeats=1))


def measure(
    op: str,
    device: str,
    output: Path,
    resume: bool = False,
    only_tests: bool = False,
    workers: int = 1,
) -> bool:
    """Run the tests of one op, then its benchmark; write and print the result.

    Returns:
        Whether the tests passed; nothing is measured when they did not.
    """
    module = importlib.import_module(f"benchmarks.{op}")
    where = environment()
    facts = {
        "op": op,
        "device": device,
        "hardware": where["hardware"],
        "versions": where["versions"],
        "commit": where["commit"],
        "kernel_sha256": kernel_hashes(op),
    }
    path = output / f"{op}.json"
    found = stopped(path, facts) if resume else None
    passed = found["tests_passed"] if found else run_tests(op, workers)
    if not passed:
        return False
    rows: list[dict[str, Any]] = found["rows"] if found else []
    result = {
        **facts,
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "tests_passed": passed,
        "complete": False,
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    if only_tests:
        write(path, result, module)
        return True
    for row in module.run(device, done=list(rows)) if rows else module.run(device):
        rows.append(row)
        write(path, result, module)
    result["complete"] = True
    write(path, result, module)
    show(op, rows, where["hardware"]["gpu"] or where["hardware"]["cpu"])
    return True


def stopped(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Read a result that lacks rows, if it was measured under the same conditions."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(name) == value for name, value in facts.items())
    return found if same and not found["complete"] else None


def write(path: Path, result: dict[str, Any], module: Any) -> None:
    """Write what is known so far."""
    if hasattr(module, "bars"):
        result["bars"] = module.bars(result["rows"])
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_tests(op: str, workers: int = 1) -> int:
    """Run the op's tests, those marked ``gpu`` where there is one; return how many passed, or 0.

    More than one worker needs pytest-xdist.
    """
    import torch

    marks = "gpu and not slow" if torch.cuda.is_available() else "not gpu and not slow and not hub"
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        module = importlib.import_module(f"benchmarks.{op}")
        tests = getattr(module, "TESTS", (f"tests/kernels/test_{op}.py",))
        spread = ["-n", str(workers)] if workers > 1 else []
        command = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={junit}"]
        if subprocess.run([*command, *spread, *tests], cwd=ROOT, check=False).returncode != 0:
            return 0
        suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return sum(1 for case in suite.iter("testcase") if case.find("skipped") is None)


def kernel_hashes(op: str) -> dict[str, str]:
    """Hash every file that decides what the op computes."""
    kernels = ROOT / "squeeze" / "kernels"
    folders = getattr(importlib.import_module(f"benchmarks.{op}"), "KERNELS", (op,))
    files = [kernels / "bits.py", *sorted(f for x in folders for f in (kernels / x).rglob("*.py"))]
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
