"""Accuracy after taking out each unit, all candidates in one climb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError
from shortstack.prune.trim.batch import Batch, batch_of, packed
from shortstack.prune.trim.rows import encode
from shortstack.questions import Question

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.trim.model import TrimModel, Unit
    from shortstack.tokens import Encoder

TOKENS = {"cuda": (16384, 131072, 4096), "cpu": (1024, 2048, 256)}
"""Ids in a batch of rows, in one call of a layer, and positions in one call of the head."""


@dataclass(frozen=True)
class Score:
    """Of one set of questions: accuracy, mean probability lost on the right choice (nats, the
    choices' probabilities renormalised), and macro-F1 where all questions have the same choices."""

    accuracy: float
    nats: float
    macro_f1: float | None
    n: int


@dataclass(frozen=True)
class Scan:
    """`whole` of the model as it is, `without` each candidate, `norm` of each unit's result."""

    whole: Score
    without: dict[Unit, Score]
    norm: dict[Unit, float]


class Exam:
    """Questions ready to be scored: equal inputs once, sorted by length, in batches.

    A row whose inputs begin another's is read off that one: one-token choices cost one pass.
    Raises ShortstackError where there are no questions: nothing has an accuracy then.
    """

    def __init__(
        self, encoder: Encoder, questions: Sequence[Question], max_prompt_tokens: int, device: Any
    ) -> None:
        if not questions:
            raise ShortstackError("there are no questions to score. Give at least one.")
        self.questions = tuple(questions)
        rows = [encode(encoder, question, max_prompt_tokens) for question in questions]
        self.n_choices = [len(choices) for choices in rows]
        flat = [row for choices in rows for row in choices]
        self.batches = [batch_of(part, device) for part in packed(flat, TOKENS[device.type][0])]
        self.n_tokens = sum(int(batch.real.sum()) for batch in self.batches)

    def score(self, log_likelihoods: Tensor) -> Score:
        """From one number a choice, in order of the questions."""
        import torch

        table = torch.nn.utils.rnn.pad_sequence(
            list(log_likelihoods.cpu().split(self.n_choices)),
            batch_first=True,
            padding_value=-torch.inf,
        )
        answers = torch.tensor([question.answer for question in self.questions])
        chosen = table.argmax(1)
        nats = (table.logsumexp(1) - table.gather(1, answers[:, None])[:, 0]).mean()
        return Score(
            accuracy=(chosen == answers).double().mean().item(),
            nats=float(nats),
            macro_f1=self._macro_f1(chosen.tolist()),
            n=len(answers),
        )

    def _macro_f1(self, chosen: list[int]) -> float | None:
        labels = set(self.questions[0].choices)
        if any(set(question.choices) != labels for question in self.questions):
            return None
        pairs = [
            (q.choices[i], q.choices[q.answer]) for q, i in zip(self.questions, chosen, strict=True)
        ]
        return macro_f1(pairs)


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean over the labels that occur of 2 TP / (2 TP + FP + FN); pairs are (chosen, right)."""
    scores = []
    for label in {right for _, right in pairs}:
        both = sum(chosen == right == label for chosen, right in pairs)
        either = sum((chosen == label) + (right == label) for chosen, right in pairs)
        scores.append(2 * both / either)
    return sum(scores) / len(scores)


def evaluate(model: TrimModel, exam: Exam) -> Score:
    return scan(model, exam, ()).whole


def scan(model: TrimModel, exam: Exam, candidates: Sequence[Unit]) -> Scan:
    """Score the model and, for each candidate, the model without it.

    Below a unit that is left out nothing changes: variant i joins the climb at unit i with the
    whole model's states, and from there all climb together as one large batch.
    """
    import torch

    wanted = [unit for unit in model.units if unit in set(candidates)]
    n_flat = sum(exam.n_choices)
    sums = torch.zeros(1 + len(wanted), n_flat, dtype=torch.float64, device=model.device)
    squares = torch.zeros(len(model.units), dtype=torch.float64, device=model.device)
    with torch.inference_mode(), model.autocast():
        for batch in exam.batches:
            # Outside the handler: in it the failed attempt would still hold its memory.
            fits = _climbs(model, batch, wanted, sums, squares)
            for half in () if fits else _halves(batch):
                if not _climbs(model, half, wanted, sums, squares):
                    raise ShortstackError(
                        f"out of memory while scanning {len(half.tokens)} rows of "
                        f"{half.tokens.shape[1]} tokens. Shorten the prompts or scan on the CPU."
                    )
    scores = [exam.score(row) for row in sums.cpu()]
    norms = squares.sqrt().tolist()
    return Scan(
        scores[0],
        dict(zip(wanted, scores[1:], strict=True)),
        dict(zip(model.units, norms, strict=True)),
    )


def _halves(batch: Batch) -> list[Batch]:
    """The batch in two: memory did not hold it whole."""
    middle = -(-len(batch.tokens) // 2)
    first = batch.row < middle
    parts = ((slice(middle), first, 0), (slice(middle, None), ~first, middle))
    return [
        Batch(
            *(batch.tokens[rows], batch.real[rows], batch.row[reads] - start),
            *(batch.position[reads], batch.target[reads], batch.choice[reads]),
        )
        for rows, reads, start in parts
        if reads.any()
    ]


def _climbs(
    model: TrimModel, batch: Batch, wanted: Sequence[Unit], sums: Tensor, squares: Tensor
) -> bool:
    """Add the batch's log likelihoods and squared norms; False, and nothing added, if the memory
    does not hold it."""
    import torch

    try:
        logs, norms = _climb(model, batch, wanted)
    except torch.OutOfMemoryError:
        return False
    sums.index_add_(1, batch.choice, logs)
    squares += norms
    return True


def _climb(model: TrimModel, batch: Batch, wanted: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """Log likelihood of every target, (1 + variants, targets), and squared norms of the units."""
    import torch

    whole = model.embed(batch.tokens)
    variants = torch.empty(len(wanted), *whole.shape, dtype=whole.dtype, device=whole.device)
    squares = torch.zeros(len(model.units), dtype=torch.float64, device=whole.device)
    joined = 0
    step = max(1, TOKENS[whole.device.type][1] // batch.tokens.numel())
    for number, unit in enumerate(model.units):
        below = whole
        whole = model.call(unit, whole)
        squares[number] += ((whole - below)[batch.real].float() ** 2).sum()
        for start in range(0, joined, step):
            part = variants[start : min(joined, start + step)]
            part.copy_(model.call(unit, part.flatten(0, 1)).view_as(part))
        if joined < len(wanted) and unit == wanted[joined]:
            variants[joined].copy_(below)
            joined += 1
    logs = [
        _log_probabilities(model, hidden[batch.row, batch.position], batch.target)
        for hidden in (whole, *variants)
    ]
    return torch.stack(logs), squares


def _log_probabilities(model: TrimModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax of the logits at the targets, float64, (positions,)."""
    import torch

    size = TOKENS[hidden.device.type][2]
    found = []
    for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.finish(states)
        picked = logits.gather(1, wanted[:, None])[:, 0]
        found.append((picked - logits.logsumexp(1)).double())
    return torch.cat(found)
