"""`shortstack fit-packed`: a plan of forms for a packed model, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.bench.models import benchable
from shortstack.errors import ShortstackError
from shortstack.manifest import check_place, write_text
from shortstack.packed.plan_file import PlanFile
from shortstack.packed.runnable import check_runnable
from shortstack.progress import Display


def fit_packed(
    model: Path,
    out: Path,
    *,
    memory_budget_mb: float | None,
    max_slowdown: float | None,
    threads: int,
    workers: str,
    device: str,
    points: int,
    display: Display,
) -> dict[str, Any]:
    """Fit and write the plan to `out`, replacing one that is there.

    Without a budget the fewest bytes at most 5 % slower than int8 are asked for. Raises
    ShortstackError for a budget that no plan meets, and for `out` that is no plan.
    """
    check_runnable()
    check_place(out)
    artifact = benchable(str(model))
    if artifact.format != "packed":
        raise ShortstackError(
            f"{model} is not packed. Pack it: shortstack export {model} --to packed -o OUT"
        )
    if out.exists():
        from shortstack.packed.plan_file import read_plan

        read_plan(out)  # nothing else is overwritten
    from shortstack.runtimes.packed.fit import fit
    from shortstack.runtimes.packed.measuring import Setting

    if memory_budget_mb is None and max_slowdown is None:
        max_slowdown = 1.05
    graph = "on" if device.startswith("cuda") else "off"
    setting = Setting(artifact.path, threads, device, workers=workers, cuda_graph=graph)
    with display.step("Measure the forms") as progress:
        plan = fit(
            setting,
            memory_budget_mb=memory_budget_mb,
            max_slowdown=max_slowdown,
            points=points,
            progress=progress,
        )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_text(out, plan.model_dump_json(indent=1) + "\n")
    return {
        "plan": str(out),
        "int8_bytes": plan.int8_bytes,
        "int8_s": plan.int8_s,
        "chosen": plan.chosen.model_dump(),
        "curve": [point.model_dump() for point in plan.curve],
        "table": table(plan),
    }


def table(plan: PlanFile) -> str:
    """The curve, a plan a line; `*` marks the chosen one."""
    lines = [f"{'MB':>10} {'of int8':>8} {'x time':>7} {'predicted':>10}  forms"]
    for point in plan.curve:
        forms = ", ".join(f"{count} {form}" for form, count in sorted(point.forms.items()))
        mark = " *" if point == plan.chosen else ""
        lines.append(
            f"{point.n_bytes / 1e6:10.1f} {point.share_of_int8:8.3f} {point.slowdown:7.3f} "
            f"{point.predicted_s / plan.int8_s:10.3f}  {forms}{mark}"
        )
    return "\n".join(lines)
