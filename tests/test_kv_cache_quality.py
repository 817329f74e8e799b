"""The table of cache quality: rows are found, cells measured, merged, and shown as they are."""

import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import tests.pico
from benchmarks.kv_cache_quality import __main__ as command
from benchmarks.kv_cache_quality import catalogue, measure, page, results, rows
from squeeze import api, recipe, registry
from squeeze.errors import CheckpointError, DeviceError, RecipeError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"calibration": {"samples": 2, "length": 64}}
SIDE = {"method": "affine", "bits": 4, "group_size": 64}
CENTERED = {
    "kv_cache": {
        "keys": {**SIDE, "granularity": "channel", "transforms": ["center"]},
        "values": {**SIDE, "granularity": "token", "bits": 2},
    },
    **SMALL,
}


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return str(tests.pico.save(tmp_path_factory.mktemp("pico")))


def cell(rise=0.0, needle=1.0, bits=4.5):
    """A made-up cell whose windows lose ``rise`` nats each over dense."""
    nll = [3.0 + rise, 3.5 + rise]
    return {
        "books_perplexity": {"value": math.exp(sum(nll) / 2), "count": 2, "window_nll": nll},
        "needle": {"value": needle, "count": 4},
        "storage": {"effective_bits": bits, "bytes": 1000 * bits, "dense_bytes": 16000},
        "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
        "versions": {},
        "seconds": 1.0,
    }


@pytest.fixture
def made_up():
    """Results of three rows at two lengths, one cell of which failed."""
    made = results.empty(
        {
            "model": "m",
            "dtype": "bfloat16",
            "mode": "decode",
            "windows": 2,
            "facts": 4,
            "seed": 0,
            "text": "t",
            "hardware": {"cpu": "x86_64", "cores": 2, "gpu": None},
            "versions": {"torch": "2"},
        }
    )
    theirs = rows.discover()["hqq2"]
    for length in (64, 128):
        results.put(made, rows.Row("dense", rows.DENSE, {}), length, cell(bits=16.0))
        results.put(made, rows.Row("kv4", rows.RECIPE, {"a": 1}), length, cell(0.01, 0.75))
    results.put(made, theirs, 64, cell(0.5, 0.0, 2.5))
    results.put(made, theirs, 128, DeviceError("row hqq2", "hqq is not installed"))
    return made


def test_rows_are_dense_every_recipe_of_a_cache_alone_and_transformers_own():
    found = rows.discover()
    assert next(iter(found)) == "dense"
    assert {"kv4", "kv2", "affine", "hqq4", "hqq2", "quanto4", "quanto2"} <= set(found)
    assert not {"quickstart", "kmeans", "streaming", "weights4"} & set(found)
    assert found["hqq4"].settings["axis_key"] == 1
    assert recipe.load(dict(found["kv4"].settings)).kv_cache == recipe.load("kv4").kv_cache


def test_an_unknown_row_is_refused_by_name():
    assert [row.name for row in command.choose("kv4,dense")] == ["kv4", "dense"]
    with pytest.raises(RecipeError, match=r"--rows: unknown row 'kv44'.*Did you mean 'kv4'"):
        command.choose("kv44")


@pytest.mark.parametrize(("settings", "expected"), [(CENTERED, None), ({}, 32.0)])
def test_counted_bits_are_the_planned_ones(pico, settings, expected):
    row = rows.Row("row", rows.RECIPE if settings else rows.DENSE, settings)
    with rows.opened(row, pico, "cpu", None) as (model, tokenizer):
        found = measure.storage(model, tokenizer, 450)
    if expected is None:
        plan = api.plan(settings, pico)
        expected = (plan.effective_bits["keys"] + plan.effective_bits["values"]) / 2
        assert plan.effective_bits["keys"] > 4.5
    assert found["effective_bits"] == pytest.approx(expected, rel=1e-9)
    assert found["dense_bytes"] == 2 * 450 * 2 * 64 * 4
    assert (found["bytes"] == found["dense_bytes"]) == (not settings)


def test_bits_of_a_cache_with_nothing_packed_are_refused(pico):
    row = rows.Row("row", rows.RECIPE, {**CENTERED})
    with (
        rows.opened(row, pico, "cpu", None) as (model, tokenizer),
        pytest.raises(ValueError, match="nothing is packed"),
    ):
        measure.storage(model, tokenizer, 100)


def test_a_missing_backend_is_named_with_its_remedy(pico, monkeypatch):
    monkeypatch.setitem(rows.PACKAGES, "hqq", ("absent-package", "1.0"))
    row = rows.discover()["hqq4"]
    with (
        pytest.raises(DeviceError, match=r"row hqq4: absent-package is .* absent-package==1\.0"),
        rows.opened(row, pico, "cpu", None),
    ):
        raise AssertionError("nothing to open")


def test_quantos_bytes_are_taken_apart_field_by_field():
    packed = torch.tensor([[0b11100100], [0b00011011]], dtype=torch.uint8)
    assert rows.unpack(packed, 2).flatten().tolist() == [0, 3, 1, 2, 2, 1, 3, 0]
    assert rows.unpack(packed, 4).flatten().tolist() == [4, 11, 14, 1]


def test_errors_travel_between_processes():
    error = DeviceError("row", "received", "allowed", "Remedy")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.remedy, type(again)) == (str(error), "Remedy", DeviceError)


def test_the_command_measures_stores_failures_and_adds_to_its_file(
    pico, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(rows.PACKAGES, "quanto", ("absent-package", "1.0"))
    monkeypatch.setattr(
        command, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1)
    )
    path = tmp_path / "results.json"
    common = ["--model", pico, "--lengths", "330", "--windows", "1", "--facts", "2"]
    common += ["--output", str(path), "--jobs", "2", "--device", "cpu"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kv_cache_quality", *common, *arguments])
        return command.main()

    assert run("--rows", "dense") == 0
    assert run("--rows", "quanto4") == 1
    assert "`quanto4` at 330 tokens could not run: DeviceError" in capsys.readouterr().err
    found = results.read(path)
    assert list(found["rows"]) == ["dense", "quanto4"]
    dense = found["rows"]["dense"]["cells"]["330"]
    assert dense["needle"]["count"] == 2
    assert len(dense["books_perplexity"]["window_nll"]) == 1
    assert "absent-package==1.0" in found["rows"]["quanto4"]["cells"]["330"]["error"]
    assert run("--rows", "dense", "--windows", "2") == 2
    assert "windows is 2 beside 1" in capsys.readouterr().err


def test_results_merge_under_equal_conditions_only(made_up):
    other = results.empty(made_up["conditions"])
    results.put(other, rows.Row("kv4", rows.RECIPE, {"a": 1}), 64, cell(0.02))
    results.put(other, rows.Row("kv3", rows.RECIPE, {}), 64, cell(0.03))
    merged = results.merge(made_up, other, "other.json")
    assert list(merged["rows"]) == ["dense", "kv4", "hqq2", "kv3"]
    assert page.rise(merged, "kv4", 64)[0] == pytest.approx(2.0201, abs=1e-4)
    assert page.rise(merged, "kv4", 128)[0] == pytest.approx(1.0050, abs=1e-4)
    results.put(other, rows.Row("kv4", rows.RECIPE, {"a": 2}), 64, cell())
    changed = results.merge(made_up, other, "other.json")
    assert list(changed["rows"]["kv4"]["cells"]) == ["64"]  # those of another recipe are gone
    other["conditions"]["dtype"] = "float32"
    with pytest.raises(CheckpointError, match=r"other\.json: dtype is float32 beside bfloat16"):
        results.merge(made_up, other, "other.json")


def test_results_survive_the_disk(made_up, tmp_path):
    path = tmp_path / "new" / "results.json"
    results.write(made_up, path)
    assert results.read(path) == made_up
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        results.read(path)


def test_the_table_has_every_row_by_bits_and_every_failure(made_up):
    lines = page.table(made_up).splitlines()
    assert lines[2] == "| dense | 16.00 | 100.0% | 25.790 | 1.00 | 25.790 | 1.00 |"
    assert lines[3] == "| `kv4` | 4.50 | 28.1% | +1.01 ± 0.00% | 0.75 | +1.01 ± 0.00% | 0.75 |"
    assert lines[4] == "| transformers, hqq, 2 bits | 2.50 | - | +65 ± 0% | 0.00 | - | - |"
    assert "2 windows and 4 facts" in lines[6]
    assert "0123456789ab-dirty" in lines[6]
    assert "`hqq2` at 128 tokens could not run: DeviceError: row hqq2: hqq is not" in lines[8]


def test_rows_without_a_cell_are_named(made_up, monkeypatch):
    known = rows.discover()
    monkeypatch.setattr(page, "discover", lambda: {n: known[n] for n in ("dense", "kv4", "kv2")})
    assert page.missing(made_up) == "Not measured: `kv2`.\n"
    monkeypatch.setattr(page, "discover", lambda: {"dense": known["dense"]})
    assert page.missing(made_up) == ""


def test_the_error_of_a_rise_is_that_of_the_mean_difference(made_up):
    windows = made_up["rows"]["kv4"]["cells"]["64"]["books_perplexity"]["window_nll"]
    windows[:] = [3.0 + 0.01, 3.5 + 0.03]
    found, error = page.rise(made_up, "kv4", 64)
    assert found == pytest.approx(100 * (math.exp(0.02) - 1))
    assert error == pytest.approx(math.exp(0.02) * 1.0)  # percent: stdev 0.01 * sqrt(2) / sqrt(2)


def test_the_picture_has_every_measured_row_at_every_length(made_up):
    root = ElementTree.fromstring(page.picture(made_up))
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert sorted(titles) == sorted(
        ["kv4: 4.5 bits, +1.01%", "kv4: 4.5 bits, 0.75"] * 2
        + ["hqq2: 2.5 bits, +64.9%", "hqq2: 2.5 bits, 0"]
    )


def test_the_page_names_every_format_with_its_parameters():
    text = catalogue.formats()
    assert all(f"| `{name}` |" in text for name in registry.names("kv"))
    assert "`granularity`: channel, token; default token" in text


def test_the_page_describes_recipes_of_a_cache_alone(tmp_path, monkeypatch):
    side = "{method: affine, bits: 4, granularity: token, group_size: 64"
    cache = f"kv_cache:\n  keys: {side}, transforms: [center]}}\n  values: {side}}}\n"
    weights = "weights:\n  - {method: kmeans, bits: 4}\n"
    texts = {
        "mine": f"# Made for\n# tests. Not for use.\nversion: 1\n{cache}",
        "both": f"version: 1\n{weights}{cache}",
    }
    paths = {name: tmp_path / f"{name}.yaml" for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name])
    monkeypatch.setattr(recipe, "shipped", lambda: paths)
    affine = "`affine`, bits 4, granularity token, group_size 64"
    # Scale and zero point cost half a bit; the mean, once per 32768 tokens, next to nothing.
    expected = f"| `mine` | {affine}; `center` | {affine} | 4.50 | 4.50 | Made for tests. |"
    assert catalogue.recipes().splitlines()[2:] == [expected]


def test_the_documented_table_is_that_of_the_results():
    result = results.read(command.RESULTS)
    text = (ROOT / "docs" / page.PAGE).read_text(encoding="utf-8")
    shown = text.partition("<!-- table: ")[2].partition("-->\n")[2]
    assert shown.partition("<!-- end of table -->")[0] == page.table(result)
    assert (ROOT / "docs" / page.PICTURE).read_text(encoding="utf-8") == page.picture(result)


def test_the_measured_recipes_are_the_shipped_ones():
    for name, row in results.read(command.RESULTS)["rows"].items():
        if row["kind"] == rows.RECIPE:
            measured = recipe.load(row["settings"]).kv_cache
            remedy = f"measure {name} anew: python -m benchmarks.kv_cache_quality --rows {name}"
            assert measured == recipe.load(name).kv_cache, remedy
