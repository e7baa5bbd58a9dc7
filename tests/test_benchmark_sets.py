"""Benchmarks find the rows of a set, plain or packed, and say where there are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from benchmarks.learn_codes import texts_of
from benchmarks.sets import file_of, questions

ROW = {"question": "Is it so?", "choices": ["no", "yes"], "answer": 1, "explanation": "It is."}


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz"])
def test_rows_are_found_plain_and_packed(tmp_path: Path, end: str) -> None:
    folder = tmp_path / "general" / "made-up"
    folder.mkdir(parents=True)
    content = (json.dumps(ROW) + "\n\n" + json.dumps({"text": "a\u2028b"})).encode()
    file = folder / f"train{end}"
    file.write_bytes(gzip.compress(content) if end.endswith("gz") else content)
    assert file_of(tmp_path, "general/made-up", "train") == file
    assert texts_of(file) == ["Is it so?\nyes\nIt is.", "a\u2028b"]


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert questions(tmp_path, "general/made-up", "validation") == []
    with pytest.raises(SystemExit, match="no test rows of general/made-up in"):
        file_of(tmp_path, "general/made-up", "test")
