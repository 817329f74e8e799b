"""The table of prefill quality: rows are found, cells measured and shown as they are."""

import os
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

import tests.pico
from benchmarks.kv_cache_quality import results
from benchmarks.kv_cache_quality.measure import Settings
from benchmarks.prefill_quality import __main__ as command
from benchmarks.prefill_quality import page
from benchmarks.prefill_quality.measure import measure
from squeeze import registry
from squeeze.errors import RecipeError


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return str(tests.pico.save(tmp_path_factory.mktemp("pico")))


def test_every_policy_has_a_row_of_its_name():
    found = command.discover()
    assert next(iter(found)) == "dense"
    assert set(registry.names("prefill")) <= set(found)
    assert not {"kv4", "quickstart"} & set(found)


def test_eight_bits_have_a_row_and_show_their_cosine(pico):
    row = command.discover()["sage"]
    assert row.settings["attention"]["quantize_min_length"] == command.MIN_LENGTH
    changed = ["attention.quantize_min_length=128", "attention.min_cosine=0.99"]
    row = command.choose("sage", [*changed, "attention.length=1024"])[0]
    settings = Settings(pico, "cpu", None, windows=1, facts=1)
    cell = measure(row, 512, settings, 1)
    assert cell["density"] == [[1.0] * 2] * 2
    assert "recall" not in cell
    assert all(0.99 < value < 1 for heads in cell["cosine"] for value in heads)
    result = results.empty({**results.conditions(settings), "mode": "prefill"})
    results.put(result, row, 512, cell)
    dense = command.discover()["dense"]
    results.put(result, dense, 512, measure(dense, 512, settings, 1))
    least = min(value for heads in cell["cosine"] for value in heads)
    assert f"| {least:.4f} |" in page.table(result).splitlines()[3]


def test_rows_are_chosen_and_changed():
    rows = command.choose("dense,antidiagonal", ["attention.mean_density=0.2"])
    assert [row.name for row in rows] == ["dense", "antidiagonal attention.mean_density=0.2"]
    assert rows[1].settings["attention"]["mean_density"] == 0.2
    assert rows[1].settings["attention"]["length"] == 8192
    with pytest.raises(RecipeError, match=r"unknown row .*Did you mean 'antidiagonal'"):
        command.choose("antidiagnal", [])


def test_a_cell_holds_what_the_table_shows(pico):
    changes = ["attention.prefill.min_length=128", "attention.prefill.window_size=64"]
    row = command.choose("streaming", changes)[0]
    settings = Settings(pico, "cpu", None, windows=1, facts=1)
    cell = measure(row, 512, settings, 1)
    assert len(cell["density"]) == 2
    assert all(0.2 < value < 0.8 for heads in cell["density"] for value in heads)
    # Random weights attend evenly, so what is read is what is recalled.
    recall = page.mean(cell["recall"])
    assert 0.2 < recall < 0.8
    result = results.empty({**results.conditions(settings), "mode": "prefill"})
    results.put(result, row, 512, cell)
    results.put(result, command.discover()["dense"], 512, cell)
    text = page.table(result)
    header, _, dense, streaming = text.splitlines()[:4]
    assert header.count("|") == dense.count("|") == streaming.count("|")
    assert "+0.00 ±" in streaming
    assert f"| {page.mean(cell['density']):.3f} |" in streaming
    assert "prefill mode; 1 windows and 1 facts" in text


def test_the_command_writes_cells_and_reasons(pico, tmp_path, monkeypatch, capsys):
    output = tmp_path / "found.json"
    arguments = [
        "prefill_quality", "--model", pico, "--rows", "dense,custom", "--lengths", "320",
        "--windows", "1", "--facts", "1", "--device", "cpu",
        "--set", "attention.prefill.mask=tests.nowhere:mask", "--output", str(output),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(command, "run_cells", in_this_process)
    assert command.main() == 1
    rows = results.read(output)["rows"]
    assert rows["dense"]["cells"]["320"]["density"] == [[1.0] * 2] * 2
    reason = rows["custom attention.prefill.mask=tests.nowhere:mask"]["cells"]["320"]["error"]
    assert "cannot be imported" in reason
    assert f"could not run: {reason}" in capsys.readouterr().out


def fatal(row, length, settings, threads):
    if row.name == "custom":
        os._exit(7)
    return {"process": os.getpid()}


def test_a_cell_that_dies_takes_no_other_along():
    rows = command.choose("custom,dense,moba", [])
    cells = [(row, 320) for row in rows]
    found = {row.name: cell for row, _, cell in command.run_cells(cells, None, 2, fatal)}
    assert isinstance(found["custom"], BrokenProcessPool)
    assert found["dense"]["process"] != found["moba"]["process"]


def in_this_process(cells, settings, jobs, measured):
    for row, length in cells:
        try:
            yield row, length, measured(row, length, settings, 1)
        except RecipeError as error:
            yield row, length, error


def test_the_page_names_every_policy():
    text = page.policies()
    for name in registry.names("prefill"):
        assert f"| `{name}` |" in text
