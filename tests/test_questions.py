"""Questions are read strictly, and never cross from tuning to testing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shortstack.errors import ShortstackError
from shortstack.questions import Question, open_questions, refuse_leaks

GOOD = {"id": "a", "question": "What melts?", "choices": ["ice", "rock"], "answer": 0}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_row_becomes_a_question(tmp_path: Path) -> None:
    (found,) = open_questions(write(tmp_path / "q.jsonl", {**GOOD, "context": "Heat."}))
    assert found == Question("a", "What melts?", ("ice", "rock"), 0, "Heat.")
    assert found.rendered()[1] == ("Heat.\nQuestion: What melts?\nAnswer:", " rock")


def test_choices_that_fill_a_gap_are_scored_by_what_follows() -> None:
    gap = Question("w", "The cup missed the shelf so _ was too high.", ("the cup", "the shelf"), 1)
    assert gap.rendered()[0] == (
        "The cup missed the shelf so the cup",
        " was too high.",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": None}, "line 1: no string field 'question'"),
        ({"choices": ["ice"]}, "no list of two or more"),
        ({"choices": ["ice", " ice"]}, "one text twice"),
        ({"answer": 2}, "index from 0 to 1, got 2"),
        ({"answer": True}, "got True"),
        ({"context": 3}, "'context' is no text"),
        ({"choices": ["ice", "\ud83d"]}, "line 1: it holds half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_refused_by_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ShortstackError, match=said):
        open_questions(write(tmp_path / "q.jsonl", {**GOOD, **change}))


def test_an_empty_file_and_another_type_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ShortstackError, match="holds no questions"):
        open_questions(tmp_path / "empty.jsonl")
    with pytest.raises(ShortstackError, match=r"not \.jsonl"):
        open_questions(tmp_path / "q.csv")


def test_a_question_in_two_parts_is_a_leak() -> None:
    first = Question("1", "What melts?", ("ice", "rock"), 0)
    again = Question("9", "  what MELTS? ", ("Ice", "rock"), 0)
    other = Question("2", "What burns?", ("ice", "wood"), 1)
    refuse_leaks({"tune": [first], "scan": [other], "test": []})
    with pytest.raises(ShortstackError, match="tune and test rows share 1 questions"):
        refuse_leaks({"tune": [first], "scan": [other], "test": [again]})


def test_a_character_of_two_halves_is_text(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {**GOOD, "question": "What is \N{ROCKET}?"})
    assert "\\ud83d\\ude80" in file.read_text(encoding="utf-8")
    assert open_questions(file)[0].question == "What is \N{ROCKET}?"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"answer": ' + "9" * 5000 + "}"])
def test_what_python_will_not_read_is_refused_by_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(ShortstackError, match="line 1: not JSON"):
        open_questions(file)
