"""`shortstack repair PRUNED --of ORIGINAL`: fitted on the user's text, kept only if it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.commands.stages import opened
from shortstack.errors import ShortstackError, unknown
from shortstack.families import context_tokens
from shortstack.intake import model_paths, preview_model
from shortstack.manifest import check_apart, check_ours, finished, staged, step_key, write_manifest
from shortstack.progress import Display
from shortstack.prune.apply import PLAN_FILE
from shortstack.prune.plan import PrunePlan
from shortstack.prune.repair import CHOICES, repair
from shortstack.prune.repair.origin import check_made_of, check_sizes
from shortstack.text import open_corpus
from shortstack.tokens import Encoder


def repair_model(
    pruned: Path,
    of: str,
    method: str,
    text: str,
    out: Path,
    *,
    windows: int,
    window_tokens: int,
    display: Display,
) -> dict[str, Any]:
    """Repair the folder `pruned`, cut from the model `of`; `out` becomes a Hugging Face folder.

    `windows` of `window_tokens` tokens are fitted on, a quarter as many decide what is kept.
    """
    if method not in CHOICES:
        raise unknown("repair", method, CHOICES)
    check_ours(out, "repair")
    check_apart(out, [pruned, *model_paths(of)])
    cut, plan = Checkpoint.open(pruned), _plan_of(pruned)
    preview = preview_model(of)
    if preview is not None:
        check_sizes(preview.checkpoint, cut, plan, of)
    corpus = open_corpus(text)
    encoder = Encoder(cut)
    length = min(window_tokens, context_tokens(cut.config, windowed=True) or window_tokens)
    texts = (
        encoder.windows(corpus.calibration, length, windows),
        encoder.windows(corpus.selection, length, max(1, windows // 4)),
    )
    with opened(of, out, display) as original:
        check_made_of(original, cut, plan)  # before both are hashed
        inputs = {
            "model": original.sha256,
            "pruned": cut.sha256,
            "cut": plan.identity,
            "text": corpus.sha256,
            "windows": [windows, window_tokens],
            "method": method,
        }
        key = step_key("repair", inputs)
        kept = finished(out, key)
        if kept is None:
            with display.step("Repair the cut") as progress, staged(out, "repair") as partial:
                _, facts = repair(
                    original, cut, plan, *texts, partial, method=method, progress=progress
                )
                kept = write_manifest(partial, "repair", key, {"repair": facts})
    return {"checkpoint": str(out), **_figures(kept["repair"])}


def _plan_of(pruned: Path) -> PrunePlan:
    """The plan that `shortstack prune` left in the folder."""
    file = pruned / PLAN_FILE
    try:
        return PrunePlan.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ShortstackError):
        raise ShortstackError(
            f"{pruned} has no {PLAN_FILE} that can be read, so what was cut is not known. "
            "Name a folder that shortstack prune made."
        ) from None


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts in lines that can be read; plan.json in the folder has them gap by gap."""
    tried = []
    for name, found in facts["candidates"].items():
        said = found.get("refused") or f"{found['after']:.2f}"
        tried.append(f"{name} {said}" + _slots(found.get("slot_layers", 0)))
    reached = ", ".join(f"{name} {p:.2f}" for name, p in facts["selection_perplexity"].items())
    return {
        "kept": facts["kept"] or "none",
        "layers": facts["n_layers"],
        "slot_layers": facts["slot_layers"],
        "selection perplexity": reached,
        "tried": "; ".join(tried),
        "facts": facts,
        **({"note": facts["note"]} if "note" in facts else {}),
    }


def _slots(count: int) -> str:
    return f" (with {count} layers of an MLP alone)" if count else ""
