"""Which matrices stay uncoded: every form measured where it is to run, then a knapsack, then the
plan itself measured beside the int8 model.

A form's seconds are taken inside a decoding model, not alone: alone a matrix would lie in a cache.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.packed.plan import Option, Point, curve, quickest_within, smallest_within
from shortstack.packed.plan_file import CurvePoint, PlanFile
from shortstack.packed.resident import Resident
from shortstack.progress import OnProgress, silent

PROMPT_TOKENS = 32
STEPS = 24
"""Decode steps of a measurement, behind WARM_UP ones; medians are taken."""
WARM_UP = 4
ROUNDS = 2
TRIES = 3
"""Plans that are measured at most until one keeps the time: predictions err by a few percent."""
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

    def open(self, **options: str) -> Any:
        from shortstack.runtimes.pytorch_packed import open_session

        return open_session(
            self.path,
            threads=self.threads,
            context_tokens=PROMPT_TOKENS + ROUNDS * (WARM_UP + STEPS) + 1,
            device=self.device,
            dtype=self.dtype,
            workers=self.workers,
            cuda_graph=self.cuda_graph,
            **options,  # type: ignore[arg-type]  # words, checked by capabilities
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
            context_tokens=PROMPT_TOKENS + ROUNDS * (WARM_UP + STEPS) + 1,
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

    def total(self, forms: Mapping[str, str]) -> Point:
        """Bytes and seconds of a whole model under a plan."""
        n_bytes, seconds = self.rest_bytes, self.rest_s
        for name, options in self.options.items():
            chosen = next(one for one in options if one.form == forms[name])
            n_bytes, seconds = n_bytes + chosen.n_bytes, seconds + chosen.seconds
        sharing = {form for name, form in forms.items() if name not in self.gathered}
        n_bytes += sum(self.buffers.get(form, 0) for form in sharing)
        return Point({**self.plain, **forms}, n_bytes, seconds)

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


def fit(
    setting: Setting,
    *,
    memory_budget_mb: float | None,
    max_slowdown: float | None,
    points: int,
    progress: OnProgress = silent,
) -> PlanFile:
    """Measure, choose, measure the choice. `max_slowdown`: seconds a token over those of the int8
    model; `memory_budget_mb`: 10^6 bytes of weights and buffers; at least one of both is given.
    `points` more plans of the curve are measured, too.

    Raises ShortstackError for a budget that no plan meets, saying what is possible.
    """
    resident = Resident(setting.path)
    if not resident.coded:
        raise ShortstackError(
            f"{setting.path} has no row codes: there is no int8 form to plan from. Run it with "
            "form=stream or form=plain, or quantize before packing: shortstack quantize MODEL"
        )
    todo = [*FORMS[_kind(setting)] * ROUNDS, *["plan"] * (points + 1)]
    done = iter(range(1, len(todo) + TRIES + 1))
    tell = lambda: progress(min(next(done), len(todo)), len(todo))  # noqa: E731  # one use, one line
    measured = _measure(setting, tell)
    int8 = measured.all_of(INT8)
    whole = measured.curve()
    wanted = _wanted(whole, int8, memory_budget_mb, max_slowdown)
    base = _plan_file(setting, resident.sha256, measured, int8, wanted)
    chosen, seconds = _held(setting, base, whole, int8, wanted, max_slowdown, memory_budget_mb)
    tell()
    shown = []
    for point in _spread(whole, points):
        shown.append(_point(point, int8, _beside(setting, base, point)[0]))
        tell()
    held = _point(chosen, int8, seconds)
    rows = sorted([*shown, held], key=lambda row: -row.n_bytes)
    return base.model_copy(update={"chosen": held, "forms": dict(chosen.forms), "curve": rows})


def _kind(setting: Setting) -> str:
    return setting.device.partition(":")[0]


def _wanted(
    whole: Sequence[Point], int8: Point, budget_mb: float | None, slowdown: float | None
) -> Point:
    """The plan that the budgets ask for, by what was measured of its parts."""
    smallest, quickest = whole[-1], min(whole, key=lambda p: p.seconds)
    fitting = [p for p in whole if budget_mb is None or p.n_bytes <= budget_mb * 1e6]
    if not fitting:
        raise ShortstackError(
            f"no plan takes at most {budget_mb:,.1f} MB: the least is "
            f"{smallest.n_bytes / 1e6:,.1f} MB at {smallest.seconds / int8.seconds:.2f} times the "
            f"time of int8, which takes {int8.n_bytes / 1e6:,.1f} MB. Ask for as much, or quantize "
            "to fewer bits."
        )
    if slowdown is None:
        found = quickest_within(fitting, float("inf"))
    else:
        found = smallest_within(fitting, slowdown * int8.seconds)
    if found is None:
        best = min(fitting, key=lambda p: p.seconds)
        limit = "" if budget_mb is None else f" within {budget_mb:,.1f} MB"
        raise ShortstackError(
            f"no plan{limit} decodes in {slowdown} times the time of int8: the quickest takes "
            f"{best.seconds / int8.seconds:.2f} times at {best.n_bytes / 1e6:,.1f} MB (of all: "
            f"{quickest.seconds / int8.seconds:.2f}). Allow as much, or more memory."
        )
    return found


def _held(
    setting: Setting,
    base: PlanFile,
    whole: Sequence[Point],
    int8: Point,
    wanted: Point,
    slowdown: float | None,
    budget_mb: float | None,
) -> tuple[Point, float]:
    """(plan, its measured seconds): of TRIES plans, quicker ones each, the first that keeps the
    time beside int8, or else the quickest of them."""
    tried: list[tuple[float, Point]] = []
    allowed = slowdown or float("inf")
    point: Point | None = wanted
    for _ in range(TRIES):
        assert point is not None
        ratio = _beside(setting, base, point)[1]
        tried.append((ratio, point))
        if ratio <= allowed:
            break
        limit = point.seconds * allowed / ratio * 0.995
        fitting = [p for p in whole if budget_mb is None or p.n_bytes <= budget_mb * 1e6]
        point = smallest_within(fitting, limit)
        if point is None or point.forms == tried[-1][1].forms:
            break
    ratio, point = tried[-1] if tried[-1][0] <= allowed else min(tried, key=lambda t: t[0])
    return point, ratio * int8.seconds


def _beside(setting: Setting, base: PlanFile, point: Point) -> tuple[float, float]:
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


def _measure(setting: Setting, tell: Any) -> Measured:
    found = Measured()
    seconds: dict[tuple[str, str], list[float]] = {}
    rest: list[float] = []
    for _ in range(ROUNDS):
        for form in FORMS[_kind(setting)]:
            with setting.open(form=form) as session:
                taken, token_s = _times(session, setting)
                matrices = session.packed.matrices
                for name, matrix in matrices.items():
                    seconds.setdefault((name, form), []).append(taken[name])
                    options = found.options.setdefault(name, [])
                    if matrix.form == form and all(o.form != form for o in options):
                        options.append(Option(form, matrix.n_bytes, 0.0))
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


def _times(session: Any, setting: Setting) -> tuple[dict[str, float], float]:
    """(seconds of a token in each matrix, seconds of a whole token): medians."""
    matrices = session.packed.matrices
    session.prefill(list(range(1, PROMPT_TOKENS + 1)))
    if _kind(setting) == "cuda":
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


def _spread(whole: Sequence[Point], count: int) -> list[Point]:
    """`count` plans of the curve, evenly from the largest to the smallest."""
    if count <= 0:
        return []
    most, least = whole[0].n_bytes, whole[-1].n_bytes
    wanted = [most + (least - most) * i / max(1, count - 1) for i in range(count)]
    picked = {min(range(len(whole)), key=lambda i: abs(whole[i].n_bytes - w)) for w in wanted}
    return [whole[i] for i in sorted(picked)]


def _point(point: Point, int8: Point, measured_s: float | None) -> CurvePoint:
    return CurvePoint(
        n_bytes=point.n_bytes,
        predicted_s=point.seconds,
        measured_s=measured_s,
        share_of_int8=point.n_bytes / int8.n_bytes,
        slowdown=(measured_s or point.seconds) / int8.seconds,
        forms=dict(Counter(point.forms.values())),
    )


def _plan_file(
    setting: Setting, sha256: str, measured: Measured, int8: Point, wanted: Point
) -> PlanFile:
    return PlanFile.model_validate(
        {
            "model_sha256": sha256,
            "device": setting.device,
            "threads": setting.threads,
            "workers": measured.workers,
            "dtype": setting.dtype,
            "int8_bytes": int8.n_bytes,
            "int8_s": int8.seconds,
            "chosen": _point(wanted, int8, None),
            "curve": [],
            "forms": dict(wanted.forms),
        }
    )
