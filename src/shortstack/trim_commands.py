"""`shortstack trim`: tune on a domain's questions while depth is taken out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.commands import opened
from shortstack.errors import ShortstackError, require
from shortstack.manifest import (
    check_apart,
    check_ours,
    staged,
    step_key,
    write_manifest,
    write_text,
)
from shortstack.progress import Display
from shortstack.questions import Question, open_questions

if TYPE_CHECKING:
    from shortstack.prune.trim.loop import Trimmed
    from shortstack.prune.trim.rows import Parts
    from shortstack.prune.trim.settings import Settings, Target

CURVE = "curve.json"
SNAPSHOTS = "snapshots"


def trim(
    model: str,
    files: Mapping[str, Path | None],
    off_domain: Sequence[Path],
    settings: Mapping[str, Any],
    target: Mapping[str, Any],
    out: Path,
    *,
    device: str,
    display: Display,
) -> dict[str, Any]:
    """Trim `model` on the questions of `files` (`tune`, and `scan`, `test` or None).

    `out` becomes the trimmed model, with `curve.json`, and `snapshots/LEFT-of-ALL/` of the depths
    on the way. The state lies beside it in `.NAME.trim` until the end, also after a kill: the same
    command goes on from there.
    """
    require(("torch", "transformers"), "prune", "trimming")
    from shortstack.prune.trim.result import check_trimmable
    from shortstack.prune.trim.settings import Settings, Target

    given = [*(file for file in files.values() if file), *off_domain]
    check_ours(out, "trim")
    check_apart(out, given)
    chosen, wanted = Settings(**settings), Target(**target)
    parts = _parts(files, chosen.seed)
    others = {file.name: open_questions(file) for file in off_domain}
    with opened(model, out, display) as checkpoint:
        check_apart(out, [checkpoint.path])
        check_trimmable(checkpoint)
        work = out.absolute().parent / f".{out.name}.trim"
        trimmed = _run(checkpoint, parts, others, chosen, wanted, work, device, display)
        facts = _facts(trimmed, parts, chosen)
        with display.step("Write the models") as progress, staged(out, "trim") as partial:
            for done, kept in enumerate(reversed(trimmed.kept)):
                _write(checkpoint, trimmed, kept.n_left, work, partial)
                progress(done + 1, len(trimmed.kept))
            write_text(partial / CURVE, json.dumps(facts, indent=1) + "\n")
            key = step_key("trim", {"settings": settings, "target": target})
            write_manifest(partial, "trim", key, {"left": facts["left"]})
    shutil.rmtree(work, ignore_errors=True)
    shown = {name: facts[name] for name in ("left", "plan", "accuracy", "tests", "tokens")}
    return {"folder": str(out), **shown, "seconds": facts["curve"][-1]["seconds"]}


def _parts(files: Mapping[str, Path | None], seed: int) -> Parts:
    from shortstack.prune.trim.rows import Parts, split_scan

    rows = {name: open_questions(file) if file else () for name, file in files.items()}
    tune, scan = rows["tune"], rows["scan"]
    if not scan:
        tune, scan = split_scan(tune, seed)
    return Parts(tune, scan, rows["test"])


def _run(
    checkpoint: Checkpoint,
    parts: Parts,
    others: Mapping[str, Sequence[Question]],
    settings: Settings,
    target: Target,
    work: Path,
    device: str,
    display: Display,
) -> Trimmed:
    import torch

    from shortstack.pretrained import load
    from shortstack.prune.trim.loop import trim
    from shortstack.tokens import Encoder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ShortstackError(f"there is no device {device!r} here. Use auto, cpu or cuda.")
    loaded = load(checkpoint.path, torch.float32).to(device)

    def note(row: dict[str, Any]) -> None:
        gone = ", ".join(row["dropped"]) or "nothing"
        display.note(
            f"{row['left']} left ({row['share']:.0%}): scan accuracy {row['accuracy']:.3f}, "
            f"loss {row['loss']:.3f}; drops {gone}"
        )

    return trim(
        loaded,
        Encoder(checkpoint),
        parts,
        settings,
        target,
        work,
        identity=checkpoint.sha256,
        others=dict(others),
        on_round=note,
    )


def _facts(trimmed: Trimmed, parts: Parts, settings: Settings) -> dict[str, Any]:
    last = trimmed.last
    return {
        "left": f"{last.n_left} of {trimmed.n_units}",
        "plan": [str(unit) for unit in last.gone],
        "accuracy": last.accuracy,
        "tests": {
            str(left): {name: dataclasses.asdict(score) for name, score in scores.items()}
            for left, scores in trimmed.tests.items()
        },
        "tokens": trimmed.curve[-1]["tokens"],
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "rows": {name: len(getattr(parts, name)) for name in ("tune", "scan", "test")},
        "trained": [str(unit) for unit in trimmed.trained],
        "curve": list(trimmed.curve),
    }


def _write(
    checkpoint: Checkpoint, trimmed: Trimmed, n_left: int, work: Path, out: Path
) -> Checkpoint:
    """One kept model: the deepest becomes `out` itself, the others lie in `snapshots`."""
    from shortstack.prune.trim.result import write_kept

    kept = next(kept for kept in trimmed.kept if kept.n_left == n_left)
    folder = out
    if kept != trimmed.last:
        folder = out / SNAPSHOTS / f"{n_left}-of-{trimmed.n_units}"
        folder.mkdir(parents=True)
    return write_kept(checkpoint, kept, work, {"scan_accuracy": kept.accuracy}, folder)
