"""When a generated answer counts as right."""

from __future__ import annotations

import pytest

from shortstack.evaluate.generation import Prompt, is_right

WORD = Prompt("1", "I don't care about", "signs", word=True)
LINE = Prompt("2", "Question: Who?\nAnswer:", "The Licensor", word=False)
NUMBER = Prompt("3", "Question: How many?\nAnswer:", "1,234.0", word=False)


@pytest.mark.parametrize(
    ("said", "prompt", "metric", "right"),
    [
        (" signs.\nAnd then", WORD, "exact_match", True),
        (" the signs", WORD, "exact_match", False),
        ("", WORD, "exact_match", False),
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
