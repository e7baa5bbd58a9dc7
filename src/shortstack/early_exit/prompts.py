"""Questions as prompts with one decision: the token that begins the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.errors import ShortstackError, unknown
from shortstack.evaluate.codec import Codec, with_prefix
from shortstack.questions import Question

WORDS, LETTERS, AUTO = "words", "letters", "auto"
STYLES = (AUTO, WORDS, LETTERS)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BETWEEN = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """Ids to run, the ids that begin the answers, and which of them is right."""

    id: str
    tokens: tuple[int, ...]
    answers: tuple[int, ...]
    right: int
    words: tuple[str, ...]
    """The answers as text."""
    cut_tokens: int = 0
    """At its beginning, as there was no room for them."""


@dataclass(frozen=True)
class Style:
    """How a question is put. `words`: the prompt of `Question.rendered`, answers by their first
    tokens. `letters`: choices are listed, the answers are A, B, ... `examples` come before."""

    name: str
    examples: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "examples": self.examples}

    def text(self, question: Question) -> str:
        if self.name == WORDS:
            return question.rendered()[0][0]
        head = f"{question.context.strip()}\n" if question.context else ""
        listed = zip(ALPHABET, question.choices, strict=False)
        choices = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in listed)
        return f"{head}Question: {question.question.strip()}\n{choices}\nAnswer:"

    def answers(self, question: Question) -> tuple[str, ...]:
        if self.name == WORDS:
            return tuple(choice.strip() for choice in question.choices)
        return tuple(ALPHABET[: len(question.choices)])


def choose_style(codec: Codec, questions: Sequence[Question], wanted: str = AUTO) -> str:
    """`words` where no two answers of a question begin with the same token, else `letters`.

    Raises ShortstackError for words where some do.
    """
    if wanted not in STYLES:
        raise unknown("style of answers", wanted, STYLES)
    if wanted == LETTERS:
        return wanted
    for question in questions:
        if not _distinct(codec, question):
            if wanted == AUTO:
                return LETTERS
            raise ShortstackError(
                f"question {question.id}: two of its answers begin with the same token, so that "
                "one decision cannot tell them apart. Use --answers letters."
            )
    return WORDS


def _distinct(codec: Codec, question: Question) -> bool:
    prompts = {prompt for prompt, _ in question.rendered()}
    return len(prompts) == 1 and len(set(_first(codec, question.choices))) == len(question.choices)


def _first(codec: Codec, answers: Sequence[str]) -> tuple[int, ...]:
    return tuple(codec.encode(f" {answer.strip()}")[0] for answer in answers)


def with_examples(style: str, questions: Sequence[Question], count: int, seed: int) -> Style:
    """`count` questions with their answers, drawn so that no answer comes much more often."""
    if not count:
        return Style(style)
    if count >= len(questions):
        raise ShortstackError(
            f"{count} examples are asked for, there are {len(questions)} rows to draw them from "
            "and to fit to. Ask for fewer."
        )
    plain, rest = Style(style), list(questions)
    random.Random(seed).shuffle(rest)
    used: dict[str, int] = {}
    texts = []
    for _ in range(count):
        # min is stable: the first of those whose answer was used least
        chosen = min(rest, key=lambda q: used.get(plain.answers(q)[q.answer], 0))
        rest.remove(chosen)
        answer = plain.answers(chosen)[chosen.answer]
        used[answer] = used.get(answer, 0) + 1
        texts.append(f"{plain.text(chosen)} {answer}")
    return Style(style, BETWEEN.join(texts) + BETWEEN)


def without_examples(style: Style, questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions that are not among the examples."""
    if not style.examples:
        return tuple(questions)
    shown = set(style.examples.split(BETWEEN))
    plain = Style(style.name)
    kept = []
    for question in questions:
        said = f"{plain.text(question)} {plain.answers(question)[question.answer]}"
        if not shown.issuperset(said.split(BETWEEN)):
            kept.append(question)
    return tuple(kept)


def encode(
    codec: Codec, questions: Sequence[Question], style: Style, max_tokens: int
) -> list[Prompt]:
    """Of a prompt of more than `max_tokens` the last ones are kept, and it says how many were cut.

    Raises ShortstackError for a question of more choices than there are letters, and where two
    answers begin with the same token.
    """
    made = []
    for question in questions:
        if len(question.choices) > len(ALPHABET):
            raise ShortstackError(
                f"question {question.id} has {len(question.choices)} choices, "
                f"{len(ALPHABET)} are the most. Remove the row."
            )
        words = style.answers(question)
        answers = _first(codec, words)
        if len(set(answers)) < len(answers):
            raise ShortstackError(
                f"question {question.id}: two of its answers begin with the same token. "
                "Fit with --answers letters, or remove the row."
            )
        tokens = with_prefix(codec, style.examples + style.text(question))
        kept = tuple(tokens[-max_tokens:])
        cut_tokens = len(tokens) - len(kept)
        made.append(Prompt(question.id, kept, answers, question.answer, words, cut_tokens))
    return made


def cut_prompts(prompts: Sequence[Prompt]) -> int:
    """How many of them lost their beginning."""
    return sum(prompt.cut_tokens > 0 for prompt in prompts)


def cut_note(name: str, prompts: Sequence[Prompt], max_tokens: int) -> str:
    return (
        f"{name}: {cut_prompts(prompts)} of {len(prompts)} prompts were cut to their last "
        f"{max_tokens} tokens; a higher --context keeps more, as far as the model's own reaches"
    )
