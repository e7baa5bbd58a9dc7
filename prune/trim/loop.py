"""The loop: tune, scan, drop, again, until the target (TrimLLM, arXiv:2412.11242, algorithm 1)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError
from shortstack.manifest import step_key
from shortstack.prune.trim.choose import choose, kept_first
from shortstack.prune.trim.model import TrimModel, Unit, parse_unit
from shortstack.prune.trim.rows import Parts, example
from shortstack.prune.trim.scan import Exam, Scan, Score, evaluate, scan
from shortstack.prune.trim.schedule import Schedule, droppable
from shortstack.prune.trim.settings import Settings, Target
from shortstack.prune.trim.state import StateFolder, optimizer_tensors, restore
from shortstack.prune.trim.tune import NotFiniteError, Tuner
from shortstack.questions import Question

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.tokens import Encoder


@dataclass(frozen=True)
class Kept:
    """A model worth keeping: what is gone, and the tensors that differ from the original."""

    n_left: int
    gone: tuple[Unit, ...]
    accuracy: float
    round: int
    file: str


@dataclass(frozen=True)
class Trimmed:
    """What a trim gave: the last model, the snapshots on the way, a curve with one row a round.

    Rows hold `left`, `share`, `dropped`, `tokens`, `seconds`, `loss` (nats, of the objective,
    mean of the round's steps), `batch_rows` (fewer than
    asked for where memory did not hold them), and the scan rows' `accuracy`, `nats`, `macro_f1`.
    `tests` has the test rows' scores of every kept depth.
    """

    n_units: int
    kept: tuple[Kept, ...]
    curve: tuple[dict[str, Any], ...]
    tests: dict[int, dict[str, Score]]
    trained: tuple[Unit, ...]

    @property
    def last(self) -> Kept:
        return self.kept[-1]


def trim(
    hf_model: Any,
    encoder: Encoder,
    parts: Parts,
    settings: Settings,
    target: Target,
    work: Path,
    *,
    identity: str = "",
    others: Mapping[str, Sequence[Question]] | None = None,
    resumable: bool = True,
    on_round: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Trimmed:
    """Trim a loaded transformers model in place; `work` holds the state and the snapshots.

    A run that was killed goes on from `work` if parts, settings, target and `identity` (of the
    model) are the same; with `resumable` false only the kept models are written there. `others`:
    further questions (off-domain) scored with the test rows, once, at the end. Raises
    ShortstackError for a target deeper than the model and for a loss that is not finite; the last
    good state then stays in `work`, and the same run with another rate goes on from it.
    """
    loop = _Loop(hf_model, encoder, parts, settings, target, work, identity, on_round)
    loop.resumable = resumable
    return loop.run(others or {})


class _Loop:
    def __init__(
        self,
        hf_model: Any,
        encoder: Encoder,
        parts: Parts,
        settings: Settings,
        target: Target,
        work: Path,
        identity: str,
        on_round: Callable[[dict[str, Any]], None],
    ) -> None:
        self.model = TrimModel(hf_model, settings.unit)
        self.settings, self.parts, self.encoder = settings, parts, encoder
        self.schedule = Schedule.make(self.model, settings, target)
        limit = settings.max_prompt_tokens
        self.exam = Exam(encoder, parts.scan, limit, self.model.device)
        self.examples = [
            example(encoder, question, limit, settings.objective) for question in parts.tune
        ]
        seen = {"tune": parts.tune, "scan": parts.scan}
        inputs = {
            "settings": dataclasses.asdict(settings),
            "target": dataclasses.asdict(target),
            "rows": {name: [(q.key, q.answer) for q in rows] for name, rows in seen.items()},
            "model": identity,
            "device": self.model.device.type,
        }
        loose = {**inputs, "settings": {**dataclasses.asdict(settings), "rate": None}}
        self.state = StateFolder(work, step_key("trim", inputs), step_key("trim", loose))
        self.on_round = on_round
        self.curve: list[dict[str, Any]] = []
        self.kept: dict[int, Kept] = {}
        self.phase, self.round, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.tuner: Tuner
        self.resumable = True
        self.since = time.perf_counter()

    def run(self, others: Mapping[str, Sequence[Question]]) -> Trimmed:
        saved = self.state.read() if self.resumable else None
        if saved is None:
            self._begin()
        else:
            self._resume(saved)
        while not self._done():
            self._one_round()
        tests = self._test(others)
        kept = tuple(self.kept[left] for left in sorted(self.kept, reverse=True))
        trained = tuple(sorted(self.tuner.trained))
        return Trimmed(len(self.model.all_units), kept, tuple(self.curve), tests, trained)

    def _begin(self) -> None:
        trained: Sequence[Unit] = self.model.all_units
        if self.settings.ratio < 1 and self.settings.first_scan == "untuned":
            first = scan(self.model, self.exam, droppable(self.model, self.settings))
            trained = kept_first(first, trained, self.settings)
        self.tuner = Tuner(self.model, self.settings, trained)
        self._save()

    @property
    def _narrows(self) -> bool:
        """Whether this round trains everything and its scan chooses what trains from now on."""
        sparse = self.settings.ratio < 1 and self.settings.first_scan == "tuned"
        return sparse and self.round == 0

    def _weights(self) -> dict[str, Tensor]:
        """The parameters that may differ from the original's."""
        if self.settings.ratio < 1 and self.settings.first_scan == "untuned":
            return dict(self.tuner.parameters)
        return dict(self.model.hf.named_parameters())

    def _done(self) -> bool:
        return bool(self.curve) and self.schedule.ends(self.round, self.model, self.curve)

    def _one_round(self) -> None:
        """Tune; then score or scan; then drop. Saved as a whole: a kill repeats one round."""
        try:
            took = self.tuner.round(self.examples, self.round, lambda: None)
        except NotFiniteError as error:
            self.state.stop()
            raise ShortstackError(
                f"{error} The last good state, {len(self.model.units)} of "
                f"{len(self.model.all_units)} units left, is in {self.state.path}. "
                "Run again with a lower rate to go on from there."
            ) from None
        self.tokens += took.n_tokens
        n_drop = self.schedule.drops(self.round, self.model)
        free = droppable(self.model, self.settings) if n_drop or self._narrows else ()
        found = scan(self.model, self.exam, free)
        self._note(found, took.loss)
        self._keep(found.whole)
        if self._narrows:
            trained = kept_first(found, self.model.all_units, self.settings)
            self.tuner = Tuner(self.model, self.settings, trained)
        if n_drop and not self.schedule.missed(self.curve):
            self._drop(found, free, n_drop)
        self.round += 1
        self._save()
        # After the state, which no longer names them: a kill between leaves only spare files.
        self.state.clear("kept-*.safetensors", {kept.file for kept in self.kept.values()})
        self.on_round(self.curve[-1])

    def _drop(self, found: Scan, free: Sequence[Unit], n_drop: int) -> None:
        dropped = self.schedule.enough(choose(found, free, n_drop, self.settings.score), self.model)
        self.curve[-1]["dropped"] = [str(unit) for unit in dropped]
        self.model.take_out({*self.model.gone, *dropped})

    def _note(self, found: Scan, loss: float) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        left = len(self.model.units)
        self.curve.append(
            {
                "round": self.round,
                "left": left,
                "share": round(left / len(self.model.all_units), 4),
                "loss": loss,
                **dataclasses.asdict(found.whole),
                "tokens": self.tokens,
                "seconds": round(self.seconds, 2),
                "batch_rows": -(-self.settings.batch_rows // self.tuner.pieces),
                "dropped": [],
            }
        )

    def _keep(self, score: Score) -> None:
        """Keep the model at a wanted depth; where several rounds share a depth, the best."""
        left = len(self.model.units)
        before = self.kept.get(left)
        if not self.schedule.keeps(self.model, self.curve):
            return
        if before is not None and before.accuracy > score.accuracy:
            return
        name = f"kept-{left:04d}-{self.round:04d}.safetensors"
        self.state.save(name, self._weights())
        if self.schedule.target.loss_points is not None:  # the latest is the deepest that passes
            self.kept = {at: kept for at, kept in self.kept.items() if at in self.schedule.kept_at}
        self.kept[left] = Kept(
            left, tuple(sorted(self.model.gone)), score.accuracy, self.round, name
        )

    def _save(self) -> None:
        self.phase += 1
        if not self.resumable:
            return
        progress = {
            "phase": self.phase,
            "round": self.round,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "curve": self.curve,
            "costs": {str(unit): cost for unit, cost in self.schedule.costs.items()},
            "gone": [str(unit) for unit in sorted(self.model.gone)],
            "trained": [str(unit) for unit in sorted(self.tuner.trained)],
            "kept": [
                {**dataclasses.asdict(kept), "gone": [str(unit) for unit in kept.gone]}
                for kept in self.kept.values()
            ],
        }
        self.state.write(progress, {**self._weights(), **optimizer_tensors(self.tuner)})

    def _resume(self, saved: dict[str, Any]) -> None:
        self.phase, self.round = saved["phase"], saved["round"]
        self.tokens, self.seconds = saved["tokens"], saved["seconds"]
        self.curve = saved["curve"]
        # Times were measured by the first process: not again.
        costs = {parse_unit(unit): cost for unit, cost in saved["costs"].items()}
        schedule = self.schedule
        self.schedule = Schedule.make(self.model, self.settings, schedule.target, costs)
        for kept in saved["kept"]:
            gone = tuple(map(parse_unit, kept["gone"]))
            self.kept[kept["n_left"]] = Kept(**{**kept, "gone": gone})
        self.model.take_out(map(parse_unit, saved["gone"]))
        self.tuner = Tuner(self.model, self.settings, tuple(map(parse_unit, saved["trained"])))
        tensors = self.state.load(saved["tensors"])
        self._put(tensors)
        restore(self.tuner, tensors)

    def _test(self, others: Mapping[str, Sequence[Question]]) -> dict[int, dict[str, Score]]:
        """Score every kept model on the test rows, which nothing before this has seen."""
        sets = {"test": self.parts.test, **others}
        limit, device = self.settings.max_prompt_tokens, self.model.device
        exams = {n: Exam(self.encoder, rows, limit, device) for n, rows in sets.items() if rows}
        scores: dict[int, dict[str, Score]] = {}
        for left in sorted(self.kept, reverse=True):
            self._show(self.kept[left])
            scores[left] = {name: evaluate(self.model, exam) for name, exam in exams.items()}
        return scores

    def _show(self, kept: Kept) -> None:
        """Make the model in memory the kept one."""
        self.model.take_out(kept.gone)
        self._put(self.state.load(kept.file))

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.model.hf.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])
