"""The benchmarks of clustered and of sparse-input linear layers: what they conclude."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import lut_linear, sparse_gemv


def clustered(bits: int, entries: str, rows: int, shape: tuple[int, int], us: float) -> dict:
    """A row of the clustered layer's benchmark, where cuBLAS takes 30 microseconds."""
    facts: dict[str, Any] = {"bits": bits, "entries": entries, "rows": rows, "shape": list(shape)}
    return facts | {"median_us": us, "speedup": 30 / us}


def test_a_clustered_bar_is_judged_by_its_slowest_shape() -> None:
    large = lut_linear.SHAPES[1:]
    rows = [clustered(4, "int8", 1, shape, 10 + i) for i, shape in enumerate(large)]
    assert lut_linear.bars(rows[:1]) == []
    rows.append(clustered(4, "int8", 1, lut_linear.SHAPES[0], 29.0))  # not asked for
    (found,) = lut_linear.bars(rows)
    assert found["bar"] == "4 bits int8, 1 rows against cuBLAS"
    assert (found["wanted"], found["ratio"], found["met"]) == (2.7, 30 / 11, True)
    assert found["case"] == [4, "int8", 1, *large[1]]


def test_the_library_is_compared_wherever_it_is_measured() -> None:
    counts = [count for count in lut_linear.ROWS if count <= lut_linear.INTEGER_ROWS]
    cases = [(count, shape) for count in counts for shape in lut_linear.SHAPES]
    ours = [clustered(4, "float16", *case, 15.0) for case in cases]
    theirs = [clustered(4, "uniform", *case, 20.0) for case in cases]
    theirs[-1]["median_us"] = 12.0
    name = "4 bits float16 against the library's int4"
    found = {each["bar"]: each for each in lut_linear.bars(ours + theirs)}
    assert found[name]["ratio"] == pytest.approx(0.8) and not found[name]["met"]
    assert found[name]["case"] == [4, "float16", cases[-1][0], *cases[-1][1]]
    assert name not in {each["bar"] for each in lut_linear.bars(ours + theirs[:-1])}


def test_half_the_columns_are_the_bar_of_sparse_inputs() -> None:
    rows: list[dict[str, Any]] = [
        {"sparsity": sparsity, "rows": count, "shape": list(shape), "baseline": False}
        | {"speedup": 1.6 + sparsity - 0.1 * count}
        for shape in sparse_gemv.SHAPES
        for sparsity in sparse_gemv.SPARSITIES
        for count in sparse_gemv.ROWS
    ]
    (found,) = sparse_gemv.bars(rows)
    assert found["ratio"] == pytest.approx(2.0) and found["met"]
    assert sparse_gemv.bars([row for row in rows if row["shape"] != [4096, 4096]]) == []


@pytest.mark.parametrize("module", [lut_linear, sparse_gemv])
def test_nothing_is_concluded_from_a_cpu(module: Any) -> None:
    rows = list(module.run("cpu", 1))
    assert rows[0]["baseline"] and module.bars(rows) == []
