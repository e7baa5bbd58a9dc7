"""Rows for the tasks beside this file, from a local file; the hub is never asked.

The harness calls these with what stands in `--metadata`: `file`, and `limit` and `seed` if wanted.
Without a file the rows are the few below, enough to see that a set-up works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from shortstack.errors import ShortstackError
from shortstack.evaluate.generation import open_prompts
from shortstack.evaluate.perplexity import open_documents
from shortstack.evaluate.subsets import subset
from shortstack.questions import SLOT, Question, open_questions

QUESTIONS = (
    ("What do you get when you mix red and yellow?", ("orange", "green", "purple"), 0),
    ("How many legs does a spider have?", ("six", "eight", "ten", "four"), 1),
    ("Which of these is a planet?", ("the Moon", "the Sun", "Mars"), 2),
    ("Water turns into ice when it is", ("cold", "hot"), 0),
    ("What is the capital of France?", ("Rome", "Madrid", "Berlin", "Paris"), 3),
    ("Which animal lays eggs?", ("the cow", "the hen", "the horse"), 1),
    ("What is two plus three?", ("five", "six", "four", "seven"), 0),
    ("At what time of day does the sun rise?", ("at noon", "in the morning", "at midnight"), 1),
)


def choice(file: str | None = None, limit: int | None = None, seed: int = 0, **_: Any) -> Any:
    """Questions as the harness reads them: `query`, `choices`, `answer`."""
    if file is None:
        questions = tuple(
            Question(str(n), *fields[:2], fields[2]) for n, fields in enumerate(QUESTIONS)
        )
    else:
        questions = subset(open_questions(Path(file)), limit, seed)
    return {"test": Dataset.from_list([_question(question) for question in questions])}


def _question(question: Question) -> dict[str, Any]:
    prompts = {prompt for prompt, _ in question.rendered()}
    if len(prompts) != 1:
        raise ShortstackError(
            f"question {question.id} fills a gap ({SLOT}), which this task cannot. "
            "Use: shortstack eval --choice"
        )
    choices = [choice.strip() for choice in question.choices]
    return {
        "id": question.id,
        "query": prompts.pop(),
        "choices": choices,
        "answer": question.answer,
    }


def text(file: str | None = None, limit: int | None = None, seed: int = 0, **_: Any) -> Any:
    """Whole documents, field `text`."""
    documents = tuple(question for question, _, _ in QUESTIONS)
    if file is not None:
        documents = subset(open_documents(Path(file)), limit, seed)
    return {"test": Dataset.from_list([{"text": document} for document in documents])}


def answers(file: str | None = None, limit: int | None = None, seed: int = 0, **_: Any) -> Any:
    """Prompts and the answers that are wanted: `query`, `target`."""
    rows = [
        {"query": f"Question: {question}\nAnswer:", "target": choices[right]}
        for question, choices, right in QUESTIONS
    ]
    if file is not None:
        prompts = subset(open_prompts(Path(file)), limit, seed)
        rows = [{"query": prompt.prompt, "target": prompt.answer} for prompt in prompts]
    return {"test": Dataset.from_list(rows)}
