"""Reports round-trip, compare, refuse what they cannot read, and become one readable page."""

import json
import re
from html.parser import HTMLParser

import pytest

from squeeze import environment, report_charts
from squeeze.errors import CheckpointError
from squeeze.measurement import Measurement
from squeeze.report import FORMAT_VERSION, Report, compare


def result(perplexity, needle, mode="decode", length=2048):
    shared = {"mode": mode, "length": length}
    return {
        "books_perplexity": {"value": perplexity, "count": 4, **shared},
        "needle": {"value": needle, "count": 1, **shared},
    }


def measurement(factor=1.0, weight_bytes=30_000_000):
    results = [
        result(32.0 * factor, 1.0),
        result(28.0 * factor, 0.9, length=8192),
        result(33.0 * factor, 0.8, mode="prefill"),
    ]
    return Measurement.from_results(
        results,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=4096.0,
        prefill_seconds=1.5,
        decode_ms_per_token=10.0,
    )


def report(**changes):
    fields = {
        "model": "reference",
        "recipe": {"version": 1, "note": "<b>&"},
        "environment": {
            "versions": {"torch": "2.13.0"},
            "hardware": {"cpu": "x86_64", "cores": 2, "gpu": None},
            "commit": "abc",
        },
        "dense": measurement(),
        "squeezed": measurement(1.05, 10_000_000),
        "effective_bits": {"weights": 4.5, "keys": 4.25, "values": 16.0},
        "density": 0.25,
        "plan": {},
        "density_by_head": [[0.25, 1.0], [0.0, 0.5]],
        "sensitivity": [
            {"layer": 0, "bits": 2, "part": "keys", "loss_increase": 0.5},
            {"layer": 1, "bits": 2, "part": "keys", "loss_increase": -0.1},
        ],
        "conditions": {"device": "cpu", "speed_tokens": 2048},
    }
    return Report(**{**fields, **changes})


def test_results_are_sorted_by_mode_and_length():
    side = measurement()
    assert (side.books_perplexity, side.needle) == (32.0, 1.0)
    assert side.by_length["8192"] == {"books_perplexity": 28.0, "needle": 0.9}
    assert side.by_mode["prefill"]["2048"]["needle"] == 0.8
    assert side.counts["decode"]["2048"] == {"books_perplexity": 4, "needle": 1}


def test_saved_and_loaded_it_is_the_same(tmp_path):
    made = report()
    made.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert Report.load(tmp_path) == Report.load(tmp_path / "report.json") == made
    assert json.loads((tmp_path / "report.json").read_text()) == made.to_dict()


def test_the_table_has_numbers_with_their_conditions():
    text = report().table()
    assert re.search(
        r"books perplexity .*decode, 2048 tokens, 4 windows .*32.000 .*33.600 .*1.050", text
    )
    assert re.search(r"needle .*prefill, 2048 tokens, 1 fact ", text)
    assert re.search(r"weights, MB .*30.00 .*10.00 .*0.333", text)
    assert re.search(r"prefill, s .*2048 tokens, batch 1 .*1.500", text)
    assert "prefill density: 0.250" in text
    assert "peak memory" not in text


def test_compare_divides_second_by_first_and_names_what_differs():
    second = report(squeezed=measurement(2.1), conditions={"device": "cuda", "speed_tokens": 2048})
    found = compare(report(), second)
    key = "books perplexity (decode, 2048 tokens, 4 windows)"
    assert found.to_dict()["metrics"][key] == pytest.approx([33.6, 67.2])
    assert found.to_dict()["differences"] == {"device": ["cpu", "cuda"]}
    assert re.search(r"33.600 .*67.200 .*2.000", found.table())
    assert "device: cpu | cuda" in found.table()
    assert compare(report(), report()).differences == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": FORMAT_VERSION + 1}, ["format_version 2", "Allowed: 1 to 1"]),
        ({"densty": 1.0}, ["unknown field 'densty'", "Did you mean 'density'?"]),
        ({"dense": {"needel": 1.0}}, ["dense", "unknown field 'needel'", "Did you mean 'needle'?"]),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, change, words):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**report().to_dict(), **change}))
    with pytest.raises(CheckpointError) as caught:
        Report.load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_missing_files_fields_and_json_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"report\.json: no such file"):
        Report.load(tmp_path / "report.json")
    path = tmp_path / "report.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Report.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="a list"):
        Report.load(tmp_path)
    data = report().to_dict()
    del data["recipe"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="field 'recipe' is missing"):
        Report.load(tmp_path)


class Page(HTMLParser):
    """Collects tags and text, and fails on a tag that closes another than the open one."""

    VOID = frozenset({"meta", "br", "rect", "path", "circle"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)
        if tag in ("meta", "br"):
            self.open.pop()

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def saved_page(tmp_path, made):
    made.save(tmp_path)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_needs_no_other_file(tmp_path):
    page = saved_page(tmp_path, report())
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [a for a in page.attributes if a[0] in ("src", "href", "xlink:href")]
    assert page.tags.count("svg") == 4  # two of quality, one heat map, one of sensitivity
    assert "version: 1\nnote: <b>&\n" in page.words


def test_the_page_shows_every_head_and_every_layer(tmp_path):
    page = saved_page(tmp_path, report())
    titles = [word for word in page.words if word.startswith(("layer ", "2 bits"))]
    assert "layer 0, head 1: 1.000" in titles
    assert "layer 1, head 0: 0.000" in titles
    assert {"2 bits, 0: 0.5", "2 bits, 1: -0.1"} <= set(titles)


def test_sections_without_data_are_left_out(tmp_path):
    empty = Measurement()
    made = report(dense=empty, squeezed=empty, density_by_head=None, sensitivity=[])
    page = saved_page(tmp_path, made)
    assert "svg" not in page.tags
    assert "Measurements" in page.words


def test_ticks_are_round_and_cover_the_range():
    assert report_charts.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    for low, high in ((0.0, 0.0), (-0.03, 0.4), (31.9, 33.1), (0, 7e9)):
        found = report_charts.ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 3 <= len(found) <= 9


def test_the_environment_names_versions_hardware_and_commit():
    found = environment.environment()
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert found["hardware"]["cores"] >= 1
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])
