"""When a generated answer counts as right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.evaluate.conftest import write_rows

from shortstack.errors import ShortstackError
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.generation import Prompt, check, is_right, open_prompts, score
from shortstack.evaluate.scorer import Stop
from shortstack.evaluate.sets import SetSpec
from shortstack.evaluate.torch_scorer import TorchScorer
from shortstack.progress import OnProgress, silent

WORD = Prompt("1", "I don't care about", "signs", word=True)
ARTICLE = Prompt("4", "That is not the word, it is", "a", word=True)
MARK = Prompt("5", "And then", "\u2026", word=True)
LINE = Prompt("2", "Question: Who?\nAnswer:", "The Licensor", word=False)
NUMBER = Prompt("3", "Question: How many?\nAnswer:", "1,234.0", word=False)


@pytest.mark.parametrize(
    ("said", "prompt", "metric", "right"),
    [
        (" signs.\nAnd then", WORD, "exact_match", True),
        (" the signs", WORD, "exact_match", False),
        ("", WORD, "exact_match", False),
        ("\u00a0\u201cSigns,\u201d she said", WORD, "exact_match", True),
        (" signs\u2014or not", WORD, "exact_match", False),
        (" the", ARTICLE, "exact_match", False),
        (" a", ARTICLE, "exact_match", True),
        ("", MARK, "exact_match", False),
        (" a licensor!", LINE, "exact_match", True),
        (" the Licensor\nQuestion: Why?", LINE, "exact_match", True),
        (" the Licensor and others", LINE, "exact_match", False),
        (" 2 of 600 and 34, so 1234 in all.", NUMBER, "last_number", True),
        (" so $1234.00\nQuestion: 5", NUMBER, "last_number", True),
        (" 1234 less 4", NUMBER, "last_number", False),
        (" many", NUMBER, "last_number", False),
    ],
)
def test_an_answer_is_right_by_its_metric(
    said: str, prompt: Prompt, metric: str, right: bool
) -> None:
    assert is_right(said, prompt, metric) is right


@pytest.mark.parametrize(
    ("answer", "metric"),
    [("two words", "exact_match"), ("\u2026", "exact_match"), ("many", "last_number")],
)
def test_a_row_that_no_answer_could_be_right_on_is_refused(
    answer: str, metric: str, tmp_path: Path
) -> None:
    rows = [{"id": "fine", "context": "I owe you", "target": "7"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    check(tmp_path / "rows.jsonl", metric)
    write_rows(tmp_path / "rows.jsonl", [*rows, {"id": "bad", "context": "So", "target": answer}])
    with pytest.raises(ShortstackError, match="row bad: the answer .* would not be right by"):
        check(tmp_path / "rows.jsonl", metric)


class Counting(TorchScorer):
    """A scorer that tells how many tokens it made."""

    made = 0

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        stop: Stop,
        progress: OnProgress = silent,
    ) -> list[list[int]]:
        found = super().generate(prompts, max_tokens, stop, progress)
        self.made += sum(map(len, found))
        return found


def test_a_last_word_ends_at_the_space_after_it(
    tiny: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    """The rest of a line is time for nothing; what is said is the word alone."""
    prompts = open_prompts(rows["generation"])
    one = {"question": "Who may copy?", "answer_text": "Anyone"}
    words = [{"context": prompt.prompt, "target": prompt.answer} for prompt in prompts]
    mixed = write_rows(tmp_path / "mixed.jsonl", [*words, one])  # a line is wanted: all go on
    codec, found, made = FolderCodec(tiny), [], []
    for path in (rows["generation"], mixed):
        with Counting(tiny, threads=1) as scorer:
            found.append(score(scorer, codec, SetSpec("words", "generation", path), 0, silent))
            made.append(scorer.made)
    for row, other in zip(found[0], found[1], strict=False):
        assert other["said"] in (row["said"], "")  # a blank line ends a line, not a word
    assert any(row["right"] for row in found[0])
    assert all(len(row["said"].split()) == 1 for row in found[0])
    assert made[0] < made[1] / 3
