"""`shortstack trim`: tune on a domain's questions while depth is taken out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.commands.stages import opened
from shortstack.errors import ShortstackError, require, unknown
from shortstack.intake import preview_model
from shortstack.manifest import (
    check_apart,
    check_ours,
    finished,
    staged,
    step_key,
    write_manifest,
    write_text,
)
from shortstack.progress import Display
from shortstack.questions import Question, open_questions, refuse_leaks

if TYPE_CHECKING:
    from shortstack.prune.trim.loop import Trimmed
    from shortstack.prune.trim.rows import Parts
    from shortstack.prune.trim.settings import Settings, Target

CURVE = "curve.json"
SNAPSHOTS = "snapshots"
DEVICES = ("auto", "cpu", "cuda")


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
    from shortstack.prune.trim.ahead import check_reachable
    from shortstack.prune.trim.result import check_trimmable
    from shortstack.prune.trim.settings import Settings, Target

    given = [*(file for file in files.values() if file), *off_domain]
    check_ours(out, "trim")
    check_apart(out, given)
    chosen, wanted, device = Settings(**settings), Target(**target), _device(device)
    parts = _parts(files, chosen.seed)
    others = {file.name: open_questions(file) for file in off_domain}
    for name, rows in others.items():
        refuse_leaks({"tune": parts.tune, "scan": parts.scan, name: rows})
    preview = preview_model(model)
    if preview is not None:
        check_trimmable(preview.checkpoint)
        check_reachable(preview.checkpoint, chosen, wanted)
    with opened(model, out, display) as checkpoint:
        check_apart(out, [checkpoint.path])
        check_trimmable(checkpoint)
        questions = {**vars(parts), **others}
        inputs = {
            **{"settings": settings, "target": target, "model": checkpoint.sha256},
            "rows": {name: [(q.key, q.answer) for q in rows] for name, rows in questions.items()},
        }
        key = step_key("trim", inputs)
        if finished(out, key):
            display.note("Trim: unchanged, kept")
        else:
            work = out.absolute().parent / f".{out.name}.trim"
            trimmed = _run(checkpoint, parts, others, chosen, wanted, work, device, display)
            _write_all(checkpoint, trimmed, work, out, key, _facts(trimmed, parts, chosen), display)
            shutil.rmtree(work, ignore_errors=True)
    facts = json.loads((out / CURVE).read_text(encoding="utf-8"))
    shown = {name: facts[name] for name in ("left", "plan", "accuracy", "tests", "tokens")}
    return {"folder": str(out), **shown, "seconds": facts["curve"][-1]["seconds"]}


def _write_all(
    checkpoint: Checkpoint,
    trimmed: Trimmed,
    work: Path,
    out: Path,
    key: str,
    facts: Mapping[str, Any],
    display: Display,
) -> None:
    """The deepest model becomes `out` itself, the others lie in `snapshots`."""
    from shortstack.prune.trim.result import write_kept

    with display.step("Write the models") as progress, staged(out, "trim") as partial:
        for done, kept in enumerate(reversed(trimmed.kept), 1):
            folder = partial
            if kept != trimmed.last:
                folder = partial / SNAPSHOTS / f"{kept.n_left}-of-{trimmed.n_units}"
                folder.mkdir(parents=True)
            write_kept(checkpoint, kept, work, {"scan_accuracy": kept.accuracy}, folder)
            progress(done, len(trimmed.kept))
        write_text(partial / CURVE, json.dumps(facts, indent=1) + "\n")
        write_manifest(partial, "trim", key, {"left": facts["left"]})


def _parts(files: Mapping[str, Path | None], seed: int) -> Parts:
    from shortstack.prune.trim.rows import Parts, split_scan

    rows = {name: open_questions(file) if file else () for name, file in files.items()}
    tune, scan = rows["tune"], rows["scan"]
    if not scan:
        tune, scan = split_scan(tune, seed)
    return Parts(tune, scan, rows["test"])


def _device(name: str) -> str:
    """The device that is meant. Raises ShortstackError for one that is not here."""
    import torch

    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ShortstackError(
            "PyTorch sees no GPU here. Use --device cpu, or run: shortstack doctor"
        )
    return name if name != "auto" else "cuda" if found else "cpu"


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

    loaded = load(checkpoint.path, torch.float32).to(device)

    def note(row: dict[str, Any]) -> None:
        gone = ", ".join(row["dropped"]) or "nothing"
        if row["batch_rows"] < settings.batch_rows:
            display.note(f"Memory did not hold the batches: {row['batch_rows']} rows at a time")
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
