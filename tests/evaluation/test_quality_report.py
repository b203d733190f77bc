"""The page that `kvcompress eval` writes, and its looks."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.records import ABOUT, only, record
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.cells import (
    make_cells,
    make_overall,
)
from vllm_kvcompress.evaluation.quality.charts import TOP, XAxis, heat_map, marker, swatch
from vllm_kvcompress.evaluation.quality.page import (
    CSS,
    DARK_LINES,
    LIGHT_LINES,
    luminance,
)
from vllm_kvcompress.evaluation.quality.records import BASELINE, Record, RecordFolder
from vllm_kvcompress.evaluation.quality.report import write_report
from vllm_kvcompress.evaluation.quality.section_tables import MOST_FLIPS
from vllm_kvcompress.evaluation.quality.text import percent, signed, tokens

VOID = {"meta", "br", "input", "hr", "img", "link"}


class Page(HTMLParser):
    """Reads a page, and fails on what a browser would have to guess."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.idents: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.cells: list[tuple[dict[str, str | None], str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        given = dict(attrs)
        assert not [name for name in names if name.startswith("on")], names
        self.tags.add(tag)
        self.idents += [value for name, value in attrs if name == "id" and value]
        self.links += [v or "" for name, v in attrs if name in ("href", "src", "xlink:href")]
        if tag == "td":
            self.cells.append((given, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open:
            given, text = self.cells[-1]
            self.cells[-1] = given, text + data

    def cell(self, **where: Any) -> str:
        """Text of the first cell that says it belongs there."""
        wanted = {f"data-{name}": str(value) for name, value in where.items()}
        return next(text for given, text in self.cells if wanted.items() <= given.items())


def made(folder: Path, records: list[Record], failures: int = 0, **asked: Any) -> Page:
    files = RecordFolder(folder)
    files.start({"model": "a/model", **asked}, ABOUT)
    files.add(records)
    for index in range(failures):
        files.add_failure("ruler_vt", f"f{index}", "The prompt is <too> long.")
    path = write_report(folder)
    assert path == folder / "report.html"
    assert (folder / "cells.csv").is_file()
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.idents) == len(set(page.idents))
    assert all(link[1:] in page.idents for link in page.links if link.startswith("#"))
    assert [link for link in page.links if not link.startswith("#")] == []
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert not re.search(r"https?://|url\(|@import|//[a-z]", html)
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    return page


def wide_run(policies: int, budgets: int, lengths: int, samples: int = 3) -> list[Record]:
    generator = np.random.default_rng(5)
    settings = [(BASELINE, 1.0)]
    settings += [(f"p{p}", 0.5 / 2**b) for p in range(policies) for b in range(budgets)]
    found = []
    for task in ("niah_single", "ruler_vt", "text"):
        for length in range(lengths):
            for index in range(samples):
                for policy, budget in settings:
                    more: dict[str, Any] = {"sample": f"{length}-{index}", "task": task}
                    more["length"] = 4096 * 2**length
                    more["depth"] = index / samples if task == "niah_single" else None
                    score = float(generator.random() < 0.7)
                    if task != "niah_single":
                        score = float(generator.random())
                    if task == "text":
                        kl = float(generator.random())
                        more |= {"nll": 2 + kl, "kl": kl, "answer": "", "answer_tokens": 0}
                    found.append(record(policy, budget, score, **more))
    return found


def test_the_pages_numbers_are_the_cells(tmp_path: Path) -> None:
    records = wide_run(policies=2, budgets=2, lengths=2)
    page = made(tmp_path, records)
    pooled = make_cells(records, by_length=False)
    for each in make_overall(pooled, {"text"}):
        where = {"policy": each.policy, "budget": each.budget, "protocol": "visible"}
        shown = page.cell(**where)
        bounds = f"[{percent(each.interval.low)}, {percent(each.interval.high)}]"
        assert shown.startswith(f"{percent(each.mean)} {bounds}")
        if each.policy != BASELINE:
            assert each.share is not None
            assert f"{percent(each.share)} % of whole" in shown
    for cell in pooled:
        where = {"task": cell.task, "policy": cell.policy, "budget": cell.budget}
        tables = [
            text
            for given, text in page.cells
            if {f"data-{k}": str(v) for k, v in where.items()}.items() <= given.items()
        ]
        bounds = f"[{percent(cell.interval.low)}, {percent(cell.interval.high)}]"
        assert f"{percent(cell.mean)} {bounds}" in tables
        if cell.against is not None:
            step = signed(cell.against.mean - cell.against.baseline)
            assert any(text.startswith(step) for _, text in page.cells)
    text_cell = only(pooled, task="text", policy="p0", budget=0.25)
    where = {"task": "text", "policy": "p0", "budget": 0.25}
    assert text_cell.kl is not None and text_cell.nll is not None
    assert page.cell(kl=text_cell.kl, **where) == f"{text_cell.kl:.4f}"
    assert page.cell(nll=text_cell.nll, **where) == f"{math.exp(text_cell.nll):.2f}"
    for cell in make_cells(records):
        where = {"policy": cell.policy, "budget": cell.budget, "length": cell.length}
        assert page.cell(task=cell.task, **where) == percent(cell.mean)


def test_what_models_and_files_say_stays_text(tmp_path: Path) -> None:
    bad = '<script>alert("x")</script><img src=x onerror=y> & \x00\x1b[31m \u202eabc 東京 🦙'
    records = [
        record(sample=bad, task="<i>t</i>", answer="4"),
        record("<b>p'\"", 0.5, 0.0, sample=bad, task="<i>t</i>", answer=bad),
    ]
    page = made(tmp_path, records, failures=2, **{"tasks": [bad], "<u>": {"x": bad}})
    assert not page.tags & {"i", "u"}
    shown = bad.replace("\x00", "␀").replace("\x1b", "␛").replace("\u202e", "\ufffd")
    assert shown in page.text and "\u202e" not in page.text
    assert "The prompt is <too> long." in page.text
    assert "2 samples could not be measured when tried" in page.text


def test_long_answers_and_many_flips_are_cut_and_counted(tmp_path: Path) -> None:
    count = MOST_FLIPS + 7
    records = []
    for index in range(count):
        records.append(record(sample=f"s{index}"))
        records.append(record("snapkv", 0.5, 0.0, sample=f"s{index}", answer="y" * 1000))
    page = made(tmp_path, records)
    assert f"{count} answers changed sides: {count} lost" in page.text
    assert f"The first {MOST_FLIPS} of {count}" in page.text
    assert page.text.count("600 more characters") == MOST_FLIPS


def test_only_a_baseline(tmp_path: Path) -> None:
    page = made(tmp_path, [record(sample=name) for name in "ab"])
    assert page.cell(policy=BASELINE).startswith("100.0 [34.2, 100.0]")
    assert "2 samples, 1 task and the whole cache alone" in page.text
    assert "not measured (no records" not in page.text
    assert "shaded" not in page.text and "Below it" not in page.text
    assert "changed sides" not in page.text


def test_one_record_without_depth_or_baseline(tmp_path: Path) -> None:
    page = made(tmp_path, [record("snapkv", 0.25, 0.3, depth=None, length=0)])
    assert "The whole cache was not measured" in page.text
    assert page.cell(policy="snapkv").startswith("30.0")
    assert "% of whole" not in page.text
    assert "Needles by depth" not in page.text


def test_no_record_yet(tmp_path: Path) -> None:
    page = made(tmp_path, [], failures=1)
    assert "Nothing was measured yet." in page.text
    assert "1 sample could not be measured when tried" in page.text


def test_a_failure_counts_once_however_often_it_was_tried(tmp_path: Path) -> None:
    files = RecordFolder(tmp_path)
    files.start({}, ABOUT)
    for name, why in (("b", "out of memory"), ("b", "too long"), ("c", "too long")):
        files.add_failure("niah_single", name, why)
    files.add([record(sample="a"), record(sample="c")])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "2 samples could not be measured when tried; 1 of them could, under" in page.text
    assert "out of memory" not in page.text
    assert [text for _, text in page.cells].count("too long") == 1


def test_two_protocols_stay_apart(tmp_path: Path) -> None:
    records = []
    for protocol, score in (("visible", 1.0), ("hidden", 0.0)):
        records.append(record(protocol=protocol))
        records.append(record("snapkv", 0.5, score, protocol=protocol))
    page = made(tmp_path, records)
    assert page.cell(policy="snapkv", protocol="visible").startswith("100.0")
    assert page.cell(policy="snapkv", protocol="hidden").startswith("0.0")
    assert page.text.count("Protocol: hidden") >= 2


def test_unknown_bytes_make_the_budget_the_axis(tmp_path: Path) -> None:
    known = [record(), record("snapkv", 0.5, 0.0)]
    assert "share of cache bytes kept" in made(tmp_path / "known", known).text
    unknown = [known[0], replace(known[1], kept=None)]
    page = made(tmp_path / "unknown", unknown)
    assert "charts use the asked budget" in page.text
    assert "asked budget (bytes kept unknown)" in page.text
    assert "share of cache bytes kept" not in page.text


def test_points_are_where_the_bytes_kept_are(tmp_path: Path) -> None:
    records = [record(), record("snapkv", 0.25, 0.0, kept=0.4)]
    made(tmp_path, records)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    mark = r'class="mark" transform="translate\(([\d.]+) ([\d.]+)\)" d="[^"]+"><title>'
    ((x, y),) = re.findall(mark, html)
    assert float(x) == pytest.approx(XAxis([0.4]).place(0.4), abs=0.06)
    (whole,) = re.findall(r'class="whole" d="M\d+ ([\d.]+)H', html)
    assert float(whole) < float(y)
    assert float(whole) == TOP
    assert "budget 25\N{NO-BREAK SPACE}%, holds 40\N{NO-BREAK SPACE}%: 0.0 [0.0, 79.3]" in html


def test_needle_maps_show_their_means(tmp_path: Path) -> None:
    records = [
        record("snapkv", 0.5, score, sample=f"{depth}{score}", depth=depth)
        for depth, score in ((0.0, 1.0), (0.0, 0.0), (1.0, 0.0))
    ]
    page = made(tmp_path, records)
    assert "Lowest: 0.0 at depth 100 %, length 4K." in page.text
    spread = [record(sample=str(i), depth=i / 40, score=float(i < 4)) for i in range(41)]
    page = made(tmp_path / "many", spread)
    assert "90–100" in page.text and "97.5 %" not in page.text


def test_labels_of_lengths_do_not_run_into_one_another() -> None:
    for columns in (["1,500"], ["1,500", "2,000", "16,000"], ["4K", "8K"]):
        svg = heat_map("i", "title", ["0 %"], columns, {(0, 0): 1.0})
        (width,) = map(int, re.findall(r'^<svg class="heat" width="(\d+)"', svg))
        middles = [float(x) for x in re.findall(r'class="tick m" x="([\d.]+)"', svg)]
        halves = [7 * len(label) / 2 for label in columns]  # 7 px: a wide digit of 11 px
        ends = [middle + half for middle, half in zip(middles, halves, strict=True)]
        begins = [middle - half for middle, half in zip(middles, halves, strict=True)]
        assert all(end < begin for end, begin in zip(ends, begins[1:], strict=False))
        assert ends[-1] <= width


def test_continuation_alone_has_no_headline(tmp_path: Path) -> None:
    records = [
        record(task="text", nll=2.0, kl=0.0),
        record("snapkv", 0.5, 0.3, task="text", nll=800.0, kl=0.5),
    ]
    page = made(tmp_path, records)
    assert "Scores over all tasks" not in page.text
    assert "No answer changed" in page.text
    assert "7.39" in page.text  # exp(2)


def test_twenty_policies_five_budgets_four_lengths(tmp_path: Path) -> None:
    page = made(tmp_path, wide_run(policies=20, budgets=5, lengths=4, samples=2))
    assert page.cell(policy="p19", budget=0.5 / 16, task="ruler_vt")
    assert "20 policies and 5 budgets" in page.text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no JSON"):
        write_report(tmp_path)


# --- looks --------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    values = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (one, other))
    dark, light = sorted(luminance(value) for value in values)
    return (light + 0.05) / (dark + 0.05)


def test_lines_stand_out_from_the_page() -> None:
    assert min(contrast(color, "#ffffff") for color in LIGHT_LINES) >= 3
    assert min(contrast(color, "#14181d") for color in DARK_LINES) >= 3


def test_twenty_policies_look_different() -> None:
    looks = {(swatch(style), marker(style)) for style in range(56)}
    assert len(looks) == 56
    assert "prefers-color-scheme" not in CSS  # colours come from variables alone


def test_axis_spreads_small_shares() -> None:
    axis = XAxis([0.03, 0.06, 0.5])
    steps = [axis.place(x) for x in (0.03, 0.06, 0.12, 0.24)]
    gaps = np.diff(steps)
    assert gaps == pytest.approx([gaps[0]] * 3)
    assert axis.log and not XAxis([0.0, 0.5]).log
    assert XAxis([]).place(1.0) > XAxis([]).place(0.6)


@pytest.mark.parametrize(
    ("length", "shown"), [(0, "own length"), (4096, "4K"), (131072, "128K"), (3000, "3,000")]
)
def test_lengths_as_people_say_them(length: int, shown: str) -> None:
    assert tokens(length) == shown
