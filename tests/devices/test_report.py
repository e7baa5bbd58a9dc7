"""The report: honest first line, nothing fetched, nothing unescaped, the same data in and out."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shortstack.devices.report import (
    Comparison,
    Quality,
    ReportData,
    to_html,
    to_markdown,
    write_report,
)
from shortstack.devices.report.headline import gains
from shortstack.devices.stats import Interval
from shortstack.errors import ShortstackError

from .sample import sample

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def data() -> ReportData:
    return sample()


@pytest.fixture(scope="module")
def page(data: ReportData) -> Page:
    return Page(to_html(data))


def with_perplexity(data: ReportData, pruned: float) -> ReportData:
    return dataclasses.replace(data, quality=Quality(10.0, pruned, 100, "text"))


def first_line(data: ReportData) -> str:
    return to_markdown(data).splitlines()[0]


def test_the_first_line_says_by_how_much_it_is_worse(data: ReportData) -> None:
    line = first_line(with_perplexity(data, 15.0))
    assert "without 6 of its 30 layers is worse" in line
    assert "1.50 times" in line
    assert "from 10.0 to 15.0" in line


@pytest.mark.parametrize(
    ("pruned", "words"), [(9.0, "is not worse"), (10.01, "is as good"), (10.2, "is worse")]
)
def test_the_first_line_follows_the_figures(data: ReportData, pruned: float, words: str) -> None:
    assert words in first_line(with_perplexity(data, pruned))


def test_without_a_figure_the_first_line_admits_it(data: ReportData) -> None:
    assert "was not measured" in first_line(dataclasses.replace(data, quality=None))


def test_a_speed_up_within_the_error_is_not_claimed(data: ReportData) -> None:
    original = data.entries[0]
    assert original.measurement is not None
    same = dataclasses.replace(
        original,
        label="pruned",
        measurement=dataclasses.replace(original.measurement, label="pruned"),
    )
    text = to_markdown(dataclasses.replace(data, entries=(original, same)))
    assert "no change within the error" in text.splitlines()[2]


def test_headline_and_page_agree(data: ReportData, page: Page) -> None:
    heading = first_line(data).removeprefix("# ").replace("\\", "")
    assert heading in page.words


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        assert not {a for a in attrs if a.startswith("on")}
        for key in ("src", "href", "xlink:href"):
            assert (attrs.get(key) or "#").startswith("#")
    style = next(w for w in page.words if ":root" in w)
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_can_be_read_by_keyboard_and_screen_reader(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for key in ("aria-labelledby", "href"):
            for name in (attrs.get(key) or "").replace("#", "").split():
                assert name in ids
        if tag == "svg":
            assert attrs.get("aria-hidden") or attrs.get("role") == "img"
        if tag == "div" and attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
            assert attrs["aria-label"]
    assert sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in page.tags) == 6
    assert sum(tag == "th" for tag, _ in page.tags) > 20
    assert ("html", {"lang": "en"}) in page.tags


def test_every_promised_section_is_there(page: Page) -> None:
    text = " ".join(page.words)
    for words in (
        "What was verified",
        "How it was measured",
        "Where it came from",
        "Failures",
        "died of signal SIGSEGV",
        "Decode, tokens/s",
        "Peak anonymous, MB",
        "Speed-up over bytes saved",
        "rows of 576 are no multiple of 256",
        "shortstack run demo -o out",
        "Example CPU 9000",
    ):
        assert words in text


def test_hostile_names_are_escaped_everywhere(data: ReportData) -> None:
    evil = '<script>alert("1")</script>|`*x*`\n# heading'
    entry = data.entries[0]
    assert entry.artifact is not None
    artifact = {**entry.artifact, "notes": [evil], "sha256": evil}
    artifact["spec"] = {"format": evil, "precision": evil, "options": {evil: evil}}
    hostile = dataclasses.replace(
        data,
        model=dataclasses.replace(data.model, name=evil, source=evil),
        plan={"n_layers": 2, "drop": [1], "method": evil, "scores": [1.0, 2.0]},
        host={"cpu": {"model": evil}, "os": evil},
        versions={evil: evil},
        recipe={evil: evil},
        command=evil,
        entries=tuple(
            dataclasses.replace(e, artifact=artifact, spec=evil, runtime=evil, failure=evil)
            for e in data.entries[:2]
        ),
    )
    page = Page(to_html(hostile))
    assert "script" not in {tag for tag, _ in page.tags}
    lines = to_markdown(hostile).splitlines()
    fence = lines.index("```json")
    for line in lines[:fence]:
        assert not re.search(r"(?<!\\)<script", line)
    assert sum(line.startswith("# ") for line in lines) == 1


def test_characters_that_nobody_sees_are_written_out(data: ReportData, tmp_path: Path) -> None:
    name = "tiny\x1b[2J\u202e"
    evil = dataclasses.replace(data, model=dataclasses.replace(data.model, name=name))
    html, markdown, raw = write_report(evil, tmp_path)
    for file in (html, markdown):
        text = file.read_text(encoding="utf-8")
        assert "u202e" in text
        assert not re.search("[\x1b\u202e]", text)
    assert json.loads(raw.read_text(encoding="utf-8"))["model"]["name"] == name


def test_markdown_tables_have_as_many_cells_as_columns(data: ReportData) -> None:
    tables = [b for b in to_markdown(data).split("\n\n") if b.startswith("| ")]
    assert len(tables) == 5
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_three_files_are_written_and_the_json_holds_everything(
    data: ReportData, tmp_path: Path
) -> None:
    html, markdown, raw = write_report(data, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert markdown.read_text(encoding="utf-8").startswith("# SmolLM2")
    content: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8"))
    assert content["schema"] == 1
    assert len(content["entries"][0]["measurement"]["trials"][0]["decode_step_s"]) == 64
    assert content["comparisons"][0]["gain_over_bytes"]["estimate"] > 0.9
    again = ReportData.from_dict(content)
    assert to_html(again) == to_html(data)
    assert to_markdown(again) == to_markdown(data)


def test_a_score_that_is_no_number_becomes_null(data: ReportData, tmp_path: Path) -> None:
    assert data.plan is not None
    scores = [float("nan"), *data.plan["scores"][1:]]
    unscored = dataclasses.replace(data, plan={**data.plan, "scores": scores})
    html, _, raw = write_report(unscored, tmp_path)
    assert json.loads(raw.read_text(encoding="utf-8"))["plan"]["scores"][0] is None
    assert "not scored" in html.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_report(data: ReportData, tmp_path: Path) -> None:
    write_report(data, tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    broken = dataclasses.replace(data, plan={"n_layers": 2})
    with pytest.raises(KeyError):
        write_report(broken, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_an_empty_run_still_gives_a_page(data: ReportData) -> None:
    bare = ReportData(model=data.model, entries=())
    text = " ".join(Page(to_html(bare)).words)
    assert "was not measured" in text
    assert "Nothing was verified" in text


@pytest.mark.parametrize(
    ("change", "words"), [({"schema": 2}, "schema 2"), ({"colour": 1}, "damaged")]
)
def test_a_report_it_cannot_read_is_refused(
    data: ReportData, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ShortstackError, match=words):
        ReportData.from_dict({**data.to_dict(), **change})


def test_equal_data_give_equal_files(data: ReportData) -> None:
    assert to_html(data) == to_html(sample())


def a_comparison(speed: float, size: float, width: float = 0.01) -> Comparison:
    return Comparison(
        spec="s",
        runtime="r",
        decode_speedup=Interval(speed, speed - width, speed + width, 6),
        size_ratio=size,
    )


def test_many_exports_are_told_as_a_range() -> None:
    four = [a_comparison(speed, 1.25) for speed in (1.1, 1.2, 1.3, 1.4)]
    told = gains(four, {})
    assert "decode speed is 1.10 to 1.40 \N{MULTIPLICATION SIGN};" in told
    assert "files 20 % smaller" in told


def test_ranges_admit_exports_without_a_sure_gain() -> None:
    four = [a_comparison(speed, 1.0, width=0.05) for speed in (1.0, 1.2, 1.3, 1.02)]
    assert "in 2 of 4 within the error of no change" in gains(four, {})


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0.8, 0.8), "files 25 % larger"),
        ((1.25, 0.8), "files from 20 % smaller to 25 % larger"),
        ((1.25, 2.0), "files 20 to 50 % smaller"),
    ],
)
def test_what_grows_is_said_to_grow(sizes: tuple[float, ...], words: str) -> None:
    assert words in gains([a_comparison(1.2, size) for size in sizes], {})


def test_warnings_come_before_the_results(data: ReportData) -> None:
    entry = data.entries[0]
    assert entry.measurement is not None
    noisy = dataclasses.replace(entry.measurement, trials=entry.measurement.trials[:3])
    changed = dataclasses.replace(data, entries=(dataclasses.replace(entry, measurement=noisy),))
    for text in (to_html(changed), to_markdown(changed)):
        assert text.index("Read this first") < text.index("What it costs and what it gains")
        assert "only 3 of 6 trials" in text
