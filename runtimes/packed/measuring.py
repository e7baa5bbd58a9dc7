"""What a token costs under a plan, and in each matrix in each form, measured where it is to run.

A form's seconds are taken inside a decoding model: alone a matrix would lie in a cache.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.packed.plan import Option, Point, curve
from shortstack.packed.plan_file import PlanFile

PROMPT_TOKENS = 32
STEPS = 24
"""Decode steps of a measurement, behind WARM_UP ones; medians are taken."""
WARM_UP = 4
ROUNDS = 2
CONTEXT_TOKENS = PROMPT_TOKENS + ROUNDS * (WARM_UP + STEPS) + 1
INT8 = "int8"
FORMS = {"cpu": (INT8, "direct", "lean", "stream"), "cuda": (INT8, "direct")}


@dataclass(frozen=True)
class Setting:
    """What is fitted, and where it is to run; words as the session's options have them."""

    path: Path
    threads: int
    device: str = "cpu"
    dtype: str = "bfloat16"
    workers: str = "auto"
    cuda_graph: str = "off"

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]

    def open(self, **options: Any) -> Any:
        from shortstack.runtimes.pytorch_packed import open_session

        return open_session(
            self.path,
            threads=self.threads,
            context_tokens=CONTEXT_TOKENS,
            device=self.device,
            dtype=self.dtype,
            workers=self.workers,
            cuda_graph=self.cuda_graph,
            **options,
        )

    def open_forms(self, base: PlanFile, forms: Mapping[str, str]) -> Any:
        from shortstack.runtimes.pytorch_packed import AUTO, Packed, PackedSession

        kind: Any = PackedSession
        if self.cuda_graph == "on":
            from shortstack.runtimes.packed.graph import PackedGraphSession as kind
        plan = base.model_copy(update={"forms": dict(forms)})
        packed = Packed(form=AUTO, head=AUTO, workers=self.workers, threads=self.threads, plan=plan)
        return kind(
            self.path,
            packed=packed,
            threads=self.threads,
            context_tokens=CONTEXT_TOKENS,
            device=self.device,
            dtype=self.dtype,
        )


@dataclass
class Measured:
    """What the forms cost: options by matrix, and of all else bytes and seconds of a token."""

    options: dict[str, list[Option]] = field(default_factory=dict)
    rest_bytes: int = 0
    rest_s: float = 0.0
    plain: dict[str, str] = field(default_factory=dict)
    """Matrices without row codes, which stay as they are."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Form -> bytes that its matrices share."""
    gathered: set[str] = field(default_factory=set)
    """Matrices that take no part in those."""
    workers: int = 0
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors of matrices that are held as one where they have one form; an option is for all."""

    def total(self, forms: Mapping[str, str]) -> Point:
        """Bytes and seconds of a whole model under a plan."""
        n_bytes, seconds = self.rest_bytes, self.rest_s
        for name, options in self.options.items():
            chosen = next(one for one in options if one.form == forms[name])
            n_bytes, seconds = n_bytes + chosen.n_bytes, seconds + chosen.seconds
        sharing = {form for name, form in forms.items() if name not in self.gathered}
        n_bytes += sum(self.buffers.get(form, 0) for form in sharing)
        each = {
            one: form for name, form in forms.items() for one in self.members.get(name, (name,))
        }
        return Point({**self.plain, **each}, n_bytes, seconds)

    def all_of(self, form: str) -> Point:
        """The model with every matrix in a form, where it has that; else in its quickest."""
        return self.total(
            {
                name: form if any(o.form == form for o in options) else options[0].form
                for name, options in self.options.items()
            }
        )

    def curve(self) -> list[Point]:
        return [self.total(point.forms) for point in curve(self.options)]


def beside(setting: Setting, base: PlanFile, point: Point) -> tuple[float, float]:
    """(seconds, over int8's) of a token under a plan; both models are open and take turns, as the
    speed of a machine wanders."""
    forms = dict.fromkeys(point.forms, INT8) | {
        name: form for name, form in point.forms.items() if form == "plain"
    }
    with setting.open_forms(base, forms) as int8, setting.open_forms(base, point.forms) as plan:
        for session in (int8, plan):
            session.prefill(list(range(1, PROMPT_TOKENS + 1)))
        times: tuple[list[float], list[float]] = ([], [])
        for step in range(ROUNDS * STEPS):
            for session, taken in zip((int8, plan), times, strict=True):
                start = time.perf_counter()
                session.decode(step + 1)
                taken.append(time.perf_counter() - start)
    usual, ours = (statistics.median(taken[WARM_UP:]) for taken in times)
    return base.int8_s * ours / usual, ours / usual


def measure(setting: Setting, tell: Any) -> Measured:
    found = Measured()
    seconds: dict[tuple[str, str], list[float]] = {}
    rest: list[float] = []
    for _ in range(ROUNDS):
        for form in FORMS[setting.kind]:
            with setting.open(form=form) as session:
                taken, token_s = _times(session, setting)
                matrices = session.packed.matrices
                if form == INT8:
                    found.members = dict(session.packed.members)
                for name, parts in _parts(matrices, found.members).items():
                    seconds.setdefault((name, form), []).append(sum(taken[one] for one in parts))
                    options = found.options.setdefault(name, [])
                    if matrices[name].form == form and all(o.form != form for o in options):
                        n_bytes = sum(matrices[one].n_bytes for one in parts)
                        options.append(Option(form, n_bytes, 0.0))
                held = sum(matrix.n_bytes for matrix in matrices.values())
                if form == INT8:
                    rest.append(token_s - sum(taken.values()))
                    found.rest_bytes = session.info["weight_bytes"] - held
                    plain = session.packed.forms.items()
                    found.plain = {name: word for name, word in plain if word == "plain"}
                if form == "stream":
                    found.gathered = {name for name, m in matrices.items() if not m.buffered}
                    found.workers = session.info["workers"]
                found.buffers[form] = session.info["buffer_bytes"]
            tell()
    found.rest_s = max(0.0, min(rest))
    found.options = {
        name: [Option(o.form, o.n_bytes, min(seconds[name, o.form])) for o in options]
        for name, options in found.options.items()
    }
    return found


def _parts(
    matrices: Mapping[str, Any], members: Mapping[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Matrices of a session by those of the int8 one, which holds as one what it can."""
    first = {one: name for name, names in members.items() for one in names}
    found: dict[str, list[str]] = {}
    for name in matrices:
        found.setdefault(first.get(name, name), []).append(name)
    return found


def _times(session: Any, setting: Setting) -> tuple[dict[str, float], float]:
    """(seconds of a token in each matrix, seconds of a whole token): medians."""
    matrices = session.packed.matrices
    session.prefill(list(range(1, PROMPT_TOKENS + 1)))
    if setting.kind == "cuda":
        from shortstack.runtimes.packed.card_times import by_matrix

        token_s = _token_s(session)
        return by_matrix(matrices), token_s
    taken: dict[str, list[float]] = {name: [] for name in matrices}
    whole = []
    with _watched(matrices) as spent:
        for step in range(WARM_UP + STEPS):
            spent.clear()
            start = time.perf_counter()
            session.decode(step + 1)
            whole.append(time.perf_counter() - start)
            for name in matrices:
                taken[name].append(spent[name])
    medians = {name: statistics.median(times[WARM_UP:]) for name, times in taken.items()}
    return medians, statistics.median(whole[WARM_UP:])


def _token_s(session: Any) -> float:
    whole = []
    for step in range(WARM_UP + STEPS):
        start = time.perf_counter()
        session.decode(step + 1)
        whole.append(time.perf_counter() - start)
    return statistics.median(whole[WARM_UP:])


@contextlib.contextmanager
def _watched(matrices: Mapping[str, Any]) -> Iterator[Counter[str]]:
    """Seconds spent in each matrix, multiplied and gathered, added up."""
    spent: Counter[str] = Counter()

    def timed(name: str, real: Any) -> Any:
        def call(x: Any) -> Any:
            start = time.perf_counter()
            made = real(x)
            spent[name] += time.perf_counter() - start  # type: ignore[assignment]  # seconds
            return made

        return call

    for name, matrix in matrices.items():
        matrix.multiply = timed(name, matrix.multiply)
        matrix.gather = timed(name, matrix.gather)
    try:
        yield spent
    finally:
        for matrix in matrices.values():
            del matrix.multiply, matrix.gather
