"""What tests of trims share: questions with a rule, quick settings, a run."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.prune.trim.loop import Trimmed, trim
from shortstack.prune.trim.rows import Parts, Row
from shortstack.prune.trim.settings import Settings, Target
from shortstack.questions import Question
from shortstack.tokens import Encoder

WORDS = ["licence", "work", "source", "copy", "notice"]


QUICK = Settings(drop_per_step=3, ratio=0.5, rate=1e-3, batch_rows=8, max_prompt_tokens=48)


def made_up(count: int, seed: int = 0) -> list[Question]:
    """A rule that is learnt at once: red means yes."""
    draw = random.Random(seed)
    questions = []
    for number in range(count):
        words, red = " ".join(draw.choices(WORDS, k=3)), draw.randrange(2)
        text = f"{words} {number} {'red' if red else 'blue'}"
        questions.append(Question(str(number), text, ("yes", "no"), 1 - red))
    return questions


def parts(tune: int = 48, scan_rows: int = 16, test: int = 16) -> Parts:
    rows = made_up(tune + scan_rows + test)
    return Parts(
        tuple(rows[:tune]), tuple(rows[tune : tune + scan_rows]), tuple(rows[tune + scan_rows :])
    )


def longer(count: int) -> list[Question]:
    """Choices of several ids, one the beginning of another, and their own prompts' lengths."""
    choices = ("a copy of the licence", "a copy", "the source")
    return [Question(str(i), "work " * (1 + i % 4) + str(i), choices, i % 3) for i in range(count)]


def run(folder: Path, work: Path, settings: Settings = QUICK, **options: Any) -> Trimmed:
    target = options.pop("target", Target(keep=0.5))
    encoder = Encoder(Checkpoint.open(folder))
    rows = options.pop("parts", parts())
    return trim(load(folder, torch.float32), encoder, rows, settings, target, work, **options)


def log_likelihood(model: Any, row: Row) -> float:
    """The plain way: one row, the whole model, all logits."""
    ids = torch.tensor([[*row.prompt, *row.answer]])
    with torch.inference_mode():
        logs = model(ids).logits.float().log_softmax(-1)[0, :-1]
    start = len(row.prompt) - 1
    return math.fsum(logs[start + at, token].item() for at, token in enumerate(row.answer))
