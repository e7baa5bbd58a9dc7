"""Which matrices stay uncoded: every form measured where it is to run, then a knapsack, then the
plan itself measured beside the int8 model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from shortstack.errors import ShortstackError
from shortstack.packed.plan import Point, quickest_within, smallest_within
from shortstack.packed.plan_file import CurvePoint, PlanFile
from shortstack.packed.resident import Resident
from shortstack.progress import OnProgress, silent
from shortstack.runtimes.packed.measuring import (
    FORMS,
    INT8,
    ROUNDS,
    Measured,
    Setting,
    beside,
    measure,
)

TRIES = 3
"""Plans that are measured at most until one keeps the time: predictions err by a few percent."""


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
    check_codes(setting)
    todo = len(FORMS[setting.kind]) * ROUNDS + points + 1
    done = iter(range(1, 2 * todo))
    tell = lambda: progress(min(next(done), todo), todo)  # noqa: E731  # one use, one line
    measured = measure(setting, tell)
    return fitted(
        setting,
        measured,
        memory_budget_mb=memory_budget_mb,
        max_slowdown=max_slowdown,
        points=points,
        tell=tell,
    )


def check_codes(setting: Setting) -> None:
    """Raise ShortstackError for a file without row codes."""
    if not Resident(setting.path).coded:
        raise ShortstackError(
            f"{setting.path} has no row codes: there is no int8 form to plan from. Run it with "
            "form=stream or form=plain, or quantize before packing: shortstack quantize MODEL"
        )


def fitted(
    setting: Setting,
    measured: Measured,
    *,
    memory_budget_mb: float | None,
    max_slowdown: float | None,
    points: int,
    tell: Callable[[], object] = lambda: None,
) -> PlanFile:
    """The second half of `fit`: choose by what was measured."""
    int8, whole = measured.all_of(INT8), measured.curve()
    wanted = _wanted(whole, int8, memory_budget_mb, max_slowdown)
    base = _plan_file(setting, Resident(setting.path).sha256, measured, int8, wanted)
    chosen, seconds = _held(setting, base, whole, int8, wanted, max_slowdown, memory_budget_mb)
    tell()
    shown = []
    for point in spread(whole, points):
        shown.append(_point(point, int8, beside(setting, base, point)[0]))
        tell()
    held = _point(chosen, int8, seconds)
    rows = sorted([*shown, held], key=lambda row: -row.n_bytes)
    return base.model_copy(update={"chosen": held, "forms": dict(chosen.forms), "curve": rows})


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
        ratio = beside(setting, base, point)[1]
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


def spread(whole: Sequence[Point], count: int) -> list[Point]:
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
