"""Bits against quality: the line of the best, and the page that compares several reports."""

import json
import re

import pytest
from click.testing import CliRunner

from squeeze.cli import main
from squeeze.report import compare
from squeeze.report_charts import Point
from squeeze.report_comparison import page
from squeeze.report_pareto import frontier, rise_chart, share_chart
from tests.test_report import Page, measurement, report

SIZE = (516, 340)


def points(*places):
    return [Point(f"p{i}", x, y, "squeezed") for i, (x, y) in enumerate(places)]


def circles(text):
    found = re.findall(r'<circle class="\w+" cx="([\d.]+)" cy="([\d.]+)"', text)
    return [(float(x), float(y)) for x, y in found]


def test_the_frontier_is_what_no_other_point_beats():
    some = points((4, 0.1), (2, 3.0), (4, 0.3), (3, 5.0), (8, 0.1), (6, -0.2))
    assert frontier(some) == [1, 0, 5]
    assert frontier(some, higher_is_better=True) == [1, 3]
    assert frontier(points((1, 1.0), (1, 1.0))) == [0]


def test_a_decade_of_rise_has_one_height_and_gains_stand_at_the_floor():
    (_, a), (_, b), (_, c), (_, gain), (_, floor) = circles(
        rise_chart(points((4, 0.1), (3, 1.0), (2, 10.0), (8, -0.5), (9, 0.01)), "x", "y", SIZE)
    )
    assert a - b == pytest.approx(b - c, abs=0.2) == pytest.approx(floor - a, abs=0.2)
    assert gain == floor


def test_shares_keep_their_axis_whatever_is_shown():
    (_, low), (_, high) = circles(share_chart(points((4, 0.5), (2, 0.6)), "x", "y", SIZE))
    (_, alone), _ = circles(share_chart(points((4, 0.5), (2, 0.9)), "x", "y", SIZE))
    assert low == alone
    assert high < low


def test_labels_of_near_points_cover_neither_each_other_nor_a_mark():
    near = points(*((4.5 + i / 50, 0.95 - i / 100) for i in range(8)))
    text = share_chart(near, "x", "y", SIZE)
    found = re.findall(r'<text class="small" x="([\d.]+)" y="([\d.]+)"[^>]*>p\d', text)
    assert len(found) == 8
    places = [(float(x), float(y)) for x, y in found]
    for i, (x, y) in enumerate(places):
        assert all(abs(x - u) > 13 or abs(y - v) > 13 for u, v in places[:i])
        assert all(abs(x - u) > 9 or abs(y - 4 - v) > 9 for u, v in circles(text))


def reports():
    bits = ({"keys": 4.5, "values": 4.5}, {"keys": 3.0, "values": 2.0})
    return [
        report(squeezed=measurement(1 + 0.01 * i), effective_bits={"weights": 16.0, **found})
        for i, found in enumerate(bits, start=1)
    ]


def test_compared_reports_are_plotted_by_the_bits_that_differ_from_dense():
    text = page(compare(*reports(), names=("four", "two")))
    shown = Page(text)
    assert shown.tags.count("svg") == 4  # perplexity and needle at 2048 and 8192 tokens
    assert {"four: 4.5 bits, +1%", "two: 2.5 bits, +2%", "two: 2.5 bits, 1"} <= set(shown.words)
    assert "Bits of the KV cache against quality" in shown.words
    assert "Bits of the weights against quality" not in shown.words
    assert "Conditions that differ: none." in shown.words


def test_the_command_compares_many_and_writes_the_page(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "again" / "b"]
    for folder, made in zip(folders, [*reports(), report()], strict=True):
        made.save(folder)
    target = tmp_path / "page.html"
    arguments = ["compare", *map(str, folders), "--html", str(target), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["metrics"]
    assert [len(values) for values in rows.values()] == [3] * len(rows)
    assert {"a", "b (2)", "b (3)"} <= set(Page(target.read_text(encoding="utf-8")).words)
