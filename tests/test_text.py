"""Text: parts are disjoint, windows do not overlap, bad files give one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from shortstack.errors import ShortstackError
from shortstack.text import PARTS, open_corpus, token_windows


def rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def by_bytes(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("source", ["rows", "text", "spdx"])
def test_no_document_is_in_two_parts(source: str, tmp_path: Path) -> None:
    if source == "rows":
        texts = [f"document {n % 30}" for n in range(60)]  # every document stands twice
        source = rows(tmp_path / "a.jsonl", texts)
    elif source == "text":
        file = tmp_path / "a.txt"
        file.write_text("\n\n".join(f"paragraph {n} " + "x" * 2000 for n in range(40)))
        source = str(file)
    corpus = open_corpus(source)
    seen = [set(corpus.part(name)) for name in PARTS]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert open_corpus(source).sha256 == corpus.sha256


def test_licences_of_one_family_stay_together() -> None:
    corpus = open_corpus("spdx")
    with_gpl = [n for n in PARTS if any("GNU GENERAL PUBLIC" in d[:80] for d in corpus.part(n))]
    assert len(with_gpl) == 1


def test_three_files_are_taken_as_they_are(tmp_path: Path) -> None:
    files = {n: rows(tmp_path / f"{n}.jsonl", [f"{n} {i}" for i in range(3)]) for n in PARTS}
    assert open_corpus(files).test == ("test 0", "test 1", "test 2")


def test_three_files_that_share_a_document_are_refused(tmp_path: Path) -> None:
    files = {n: rows(tmp_path / f"{n}.jsonl", [n, "the same"]) for n in PARTS}
    with pytest.raises(ShortstackError, match="share 1 documents"):
        open_corpus(files)


def test_gzip_reads_as_plain(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(8)]
    plain = rows(tmp_path / "a.jsonl", texts)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert open_corpus(str(packed)).sha256 == open_corpus(plain).sha256


def test_windows_have_the_length_and_take_documents_in_turn() -> None:
    documents = ["a" * 25, "b" * 7, "c" * 30]
    windows = token_windows(documents, by_bytes, 10, 4)
    assert [bytes(w) for w in windows] == [b"a" * 10, b"c" * 10, b"a" * 10, b"c" * 10]


def test_short_documents_are_joined_for_a_long_window() -> None:
    (window,) = token_windows(["a" * 4, "b" * 4, "c" * 4], by_bytes, 10, 2)
    assert bytes(window) == b"aaaa\n\nbbbb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 1}\n', "line 1: no string field 'text'"),
        ('{"text": "a"}\n{bad\n', "line 2: not JSON"),
        ('{"text": "a"}\n', "too few documents"),
        ("", "too few documents"),
    ],
)
def test_a_bad_file_gives_one_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(ShortstackError, match=message):
        open_corpus(str(file))


def test_a_missing_file_and_too_short_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match=r"cannot read the text file .*FileNotFoundError"):
        open_corpus(str(tmp_path / "none.txt"))
    with pytest.raises(ShortstackError, match="the text holds no 10 tokens"):
        token_windows(["short"], by_bytes, 10, 1)
