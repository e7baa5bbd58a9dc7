"""What fewer layers bring: each artifact against the deepest one of its kind at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.devices.report.compare import rounds_in_turn
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.unlike import why_unlike
from shortstack.devices.stats import Interval, paired_ratio_interval, ratio_interval


@dataclass(frozen=True)
class Gain:
    """Ratios above one: `case` is faster than `whole` or reads and needs less."""

    case: Case
    whole: Case
    decode: Interval | None
    prefill: Interval | None
    bytes_ratio: float | None
    peak_ratio: float | None
    paired: bool
    reasons: tuple[str, ...] = ()


def gains(cases: Sequence[Case]) -> list[Gain]:
    """Every case but the deepest of its place, export, runtime and shape."""
    found = []
    for family in families(cases):
        for case in family:
            whole = _whole_of(case, family)
            if whole is not None:
                found.append(_gain(case, whole))
    return found


def families(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that may be one model at several depths, of one export, runtime, shape and place."""
    groups: dict[tuple[object, ...], list[list[Case]]] = {}
    for case in cases:
        if not case.measurement.trials:
            continue
        members = groups.setdefault((case.place, case.export, case.runtime, case.shape), [])
        fitting = next((f for f in members if all(one_model(case, c) for c in f)), None)
        if fitting is None:
            members.append([case])
        else:
            fitting.append(case)
    return [family for members in groups.values() for family in members]


def one_model(a: Case, b: Case) -> bool:
    """Whether two parameter counts can be one model cut to two depths.

    Layers of one size and the same rest (embedding, head, norms): the count is a straight line
    over layers whose slope is positive and whose intercept is not negative. Records name no
    common origin, so two unlike models of one shape pass.
    """
    one, other = a.measurement.artifact, b.measurement.artifact
    layers = one.n_layers - other.n_layers
    if layers == 0:
        return True
    per_layer = (one.n_params - other.n_params) / layers
    return per_layer > 0 and one.n_params - one.n_layers * per_layer >= 0


def _whole_of(case: Case, family: Sequence[Case]) -> Case | None:
    """The deepest, of the same run if it has one: those were measured in turn."""
    deepest = max(c.n_layers for c in family)
    candidates = [c for c in family if c.n_layers == deepest]
    if case.n_layers == deepest:
        return None
    return next((c for c in candidates if c.run == case.run), candidates[0])


def _gain(case: Case, whole: Case) -> Gain:
    reasons = why_unlike(case, whole, artifact=False)
    bytes_ratio = _ratio(
        whole.measurement.artifact.weight_bytes_per_token,
        case.measurement.artifact.weight_bytes_per_token,
    )
    if reasons:
        return Gain(case, whole, None, None, bytes_ratio, None, False, tuple(reasons))
    mine, theirs = ({t.round: i for i, t in enumerate(c.measurement.trials)} for c in (case, whole))
    rounds = sorted(rounds_in_turn(case.measurement.trials, whole.measurement.trials))
    paired = case.run == whole.run and len(rounds) == len(mine) == len(theirs)

    def speedup(above: Sequence[float], below: Sequence[float]) -> Interval:
        if not paired:
            return ratio_interval(above, below)
        return paired_ratio_interval(
            [above[mine[r]] for r in rounds], [below[theirs[r]] for r in rounds]
        )

    return Gain(
        case,
        whole,
        speedup(case.decode_tokens_per_s, whole.decode_tokens_per_s),
        speedup(case.prefill_tokens_per_s, whole.prefill_tokens_per_s),
        bytes_ratio,
        _ratio(whole.peak_bytes, case.peak_bytes),
        paired,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
