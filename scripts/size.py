"""Count lines per Python file and folder: size is a budget, and review sees the difference.

Run it from anywhere in the checkout::

    python scripts/size.py                       lines per folder, and files to look at again
    python scripts/size.py --base main           the same, with the difference to a commit
    python scripts/size.py --largest-bytes N     fail when a file is larger (not the model)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_LINES, KERNEL_LIMIT_LINES = 300, 450
EXEMPT = ("squeeze/reference/",)  # the embedded model and its data


def main() -> int:
    """Print the tables; return 1 when a file is over ``--largest-bytes``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", help="commit to print the difference to")
    parser.add_argument("--largest-bytes", type=int, help="fail when a file is larger")
    options = parser.parse_args()
    files = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    files = [name for name in files if (ROOT / name).is_file()]
    if options.largest_bytes is not None:
        return check_bytes(files, options.largest_bytes)
    now = {name: lines((ROOT / name).read_bytes()) for name in files if name.endswith(".py")}
    print_folders(now, earlier(options.base) if options.base else None)
    print_long(now)
    return 0


def git(*arguments: str) -> str:
    """Return what a git command prints."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lines(content: bytes) -> int:
    """Count the lines of a file that are not blank."""
    return sum(bool(line.strip()) for line in content.splitlines())


def earlier(commit: str) -> dict[str, int]:
    """Count the lines of every Python file of a commit."""
    names = git("ls-tree", "-r", "--name-only", commit).splitlines()
    return {n: lines(git("show", f"{commit}:{n}").encode()) for n in names if n.endswith(".py")}


def print_folders(now: dict[str, int], before: dict[str, int] | None) -> None:
    """Print files and lines per folder, with the difference when there is an earlier count."""
    files = Counter(str(Path(name).parent) for name in now)
    print(f"{'folder':<44}{'files':>6}{'lines':>8}" + ("    change" if before is not None else ""))
    for folder in sorted({*files, *(str(Path(name).parent) for name in before or {})}):
        total = sum(count for name, count in now.items() if str(Path(name).parent) == folder)
        row = f"{folder:<44}{files[folder]:>6}{total:>8}"
        if before is not None:
            old = sum(count for name, count in before.items() if str(Path(name).parent) == folder)
            row += f"{total - old:>+10}"
        print(row)
    print(f"{'all':<44}{len(now):>6}{sum(now.values()):>8}")


def print_long(now: dict[str, int]) -> None:
    """Name the files past the length at which to ask whether they are two."""
    for name, count in sorted(now.items(), key=lambda item: -item[1]):
        is_kernel = name.startswith("squeeze/kernels/")
        limit = KERNEL_LIMIT_LINES if is_kernel else LIMIT_LINES
        if count > limit:
            print(f"look again: {name} has {count} lines, past {limit}")


def check_bytes(files: list[str], largest: int) -> int:
    """Return 1 and name them when files are too large for a repository."""
    sizes = {name: (ROOT / name).stat().st_size for name in files if not name.startswith(EXEMPT)}
    too_large = {name: size for name, size in sizes.items() if size > largest}
    for name, size in too_large.items():
        print(f"{name}: {size} bytes, allowed {largest}", file=sys.stderr)
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
