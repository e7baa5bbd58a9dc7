"""The merged page in a real browser: no error, no request, no overflow, every table by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shortstack.devices.records import load_records
from shortstack.devices.report.merged import merge
from shortstack.devices.report.merged.write import to_html

from .bench_sample import laptop_run, server_run, written
from .chromium import Browser, browser, find
from .merged_sample import EVIL, hostile

PROGRAM = find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH: page not tried in it")

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
FOCUSED = """(() => {
  const e = document.activeElement, box = e.getBoundingClientRect();
  return [e.tagName, e.className, (e.getAttribute("aria-label") || e.textContent).trim(),
    getComputedStyle(e).outlineStyle, box.left >= 0 && box.width > 0];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    records = load_records(
        [written(folder / "a", laptop_run()), written(folder / "b", server_run())]
    )
    (folder / "report.html").write_text(to_html(merge(records)), encoding="utf-8")
    return folder / "report.html"


@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_complains_of_nothing(
    page: Browser, file: Path, width: int, dark: bool
) -> None:
    page.open(file, width=width, dark=dark)
    assert page.run("innerWidth") == width
    assert page.run(OVERFLOW) <= 0
    assert page.complaints() == []
    assert all(url.startswith("file:") for url in page.requests())
    assert page.run("document.querySelectorAll('figure svg circle').length") >= 8


def test_dark_and_light_differ_and_can_be_read(page: Browser, file: Path) -> None:
    seen = set()
    for dark in (False, True):
        page.open(file, dark=dark)
        ink, paper = page.run(
            "['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])"
        )
        assert ink != paper
        seen.add(paper)
    assert len(seen) == 2


def test_the_first_tab_is_the_skip_link_and_it_skips(page: Browser, file: Path) -> None:
    page.open(file)
    page.press("Tab")
    tag, kind, words, _, visible = page.run(FOCUSED)
    assert (tag, kind, words) == ("A", "skip", "Skip to the results")
    assert visible
    page.press("Enter")
    assert page.run("location.hash") == "#main"
    page.press("Tab")
    assert page.run("document.activeElement.closest('main') !== null")


def test_tab_reaches_every_table_and_shows_where_it_is(page: Browser, file: Path) -> None:
    page.open(file, width=390)
    wanted = page.run("document.querySelectorAll('.scroll').length")
    reached = []
    for _ in range(page.run("document.querySelectorAll('a, button, .scroll').length") + 2):
        page.press("Tab")
        tag, kind, words, outline, _ = page.run(FOCUSED)
        if kind == "scroll":
            reached.append(words)
        if tag == "BUTTON" or kind == "scroll":
            assert outline == "solid"
    assert len(reached) == wanted >= 8


def test_a_column_sorts_by_button_and_by_size(page: Browser, file: Path) -> None:
    page.open(file)
    table = "[...document.querySelectorAll('#speed table')].at(-1)"
    column = page.run(
        f"[...{table}.tHead.rows[0].cells].findIndex(c => /Decode, t/.test(c.textContent))"
    )
    page.run(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').focus()")
    shown = f"[...{table}.tBodies[0].rows].map(r => parseFloat(r.cells[{column}].textContent))"
    page.press("Enter")
    rising = page.run(shown)
    assert rising == sorted(rising)
    assert rising[0] < rising[-1]
    assert page.run(f"{table}.tHead.rows[0].cells[{column}].ariaSort") == "ascending"
    page.press("Enter")
    assert page.run(shown) == rising[::-1]


@pytest.mark.parametrize("words", EVIL)
def test_hostile_words_run_nothing_and_break_nothing(
    page: Browser, tmp_path: Path, words: str
) -> None:
    merged = merge(load_records([written(tmp_path / "evil", hostile(words))]))
    target = tmp_path / "evil.html"
    target.write_text(to_html(merged), encoding="utf-8")
    page.open(target, width=390)
    assert page.complaints() == []
    assert page.run("document.scripts.length") == 1
    assert page.run("document.images.length") == 0
    assert page.run(OVERFLOW) <= 0


def test_names_without_a_break_do_not_widen_the_page(page: Browser, tmp_path: Path) -> None:
    merged = merge(load_records([written(tmp_path / "long", hostile("m" * 300))]))
    target = tmp_path / "long.html"
    target.write_text(to_html(merged), encoding="utf-8")
    page.open(target, width=390)
    assert page.run(OVERFLOW) <= 0
