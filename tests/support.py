"""Which cut of which family each runtime can express: `python -m tests.support` writes
docs/support.md from what the exporters themselves refuse; test_support.py measures every cell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.zoo import NAMES, make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.families import context_tokens
from shortstack.prune import PrunePlan, apply_plan
from shortstack.prune.plan import parse_removal

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
YES = "yes"
IN_WINDOW = "in window"
TARGETS = {"GGUF in llama.cpp": "gguf:F32", "ONNX in ONNX Runtime": "onnx:fp32"}

CUTS: dict[str, Callable[[int, int], str]] = {
    "first": lambda depth, period: "0",
    "middle": lambda depth, period: f"{depth // 2}",
    "last": lambda depth, period: f"{depth - 1}",
    "scattered": lambda depth, period: "1,4,6",
    "one period": lambda depth, period: f"{period}-{2 * period - 1}",
    "attention": lambda depth, period: "3.attention",
    "MLP": lambda depth, period: "3.mlp",
}
"""Name -> what to drop of a model with so many layers, whose kinds of layers repeat after so many
(4 where all are alike)."""


@dataclass(frozen=True)
class Cell:
    """A model of the zoo, a cut of it, and the pruned folder."""

    model: str
    cut: str
    plan: PrunePlan
    original: Checkpoint
    pruned: Checkpoint


def period_of(checkpoint: Checkpoint) -> int:
    return checkpoint.family.full_every or checkpoint.family.unrotated_every or 4


def plan_of(checkpoint: Checkpoint, cut: str) -> PrunePlan:
    depth = checkpoint.n_layers
    gone = parse_removal(CUTS[cut](depth, period_of(checkpoint)))
    return PrunePlan(depth, gone.layers, "explicit", attention=gone.attention, mlp=gone.mlp)


def make_cell(model: str, cut: str, original: Checkpoint, folder: Path) -> Cell:
    folder.mkdir()
    plan = plan_of(original, cut)
    return Cell(model, cut, plan, original, apply_plan(original, plan, folder))


def foretold(pruned: Checkpoint, target: str) -> str:
    """YES, IN_WINDOW, or why the exporter refuses."""
    spec = ExportSpec.parse(target)
    try:
        exporter(spec.format).check(pruned, spec)
    except ShortstackError as refusal:
        return str(refusal)
    context = exporter(spec.format).context_tokens(pruned, spec)
    in_window, longest = (context_tokens(pruned.config, windowed=flag) for flag in (False, True))
    return IN_WINDOW if context == in_window != longest else YES


def cells(folder: Path) -> Iterator[Cell]:
    for model in NAMES:
        original = Checkpoint.open(make_model(model, folder / model))
        for cut in CUTS:
            yield make_cell(model, cut, original, folder / f"{model}-{cut}")


def page() -> str:
    """The whole of docs/support.md."""
    found: dict[str, dict[tuple[str, str], str]] = {title: {} for title in TARGETS}
    spelled: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells(Path(folder)):
            spelled.setdefault(cell.cut, []).append(_spell(cell.plan))
            for title, target in TARGETS.items():
                found[title][cell.model, cell.cut] = foretold(cell.pruned, target)
    lines = [INTRODUCTION, *_cuts(spelled)]
    for title, answers in found.items():
        lines += ["", f"## {title}", "", *_table(answers)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# What can be cut, and where it runs

Written by `make support`; do not edit. `make test` cuts a small random model of each kind, exports
it, runs it on a prompt three times as long as its sliding window, at once and then token by token,
and fails where this page is wrong.

- *yes*: the largest difference of a logit from float32 PyTorch is at most 2e-3 of the largest logit
  in GGUF (its KV cache is float16), 1e-4 in ONNX.
- *in window*: the same, for as many tokens as the model's sliding window; the runtime cannot give
  single layers a window, so that the artifact's context ends there.
- a number: the export refuses, for the reason below.

Every pruned folder opens in plain transformers and computes what the original does with those
parts skipped, for all models and cuts on this page. Mixtures of experts, hybrids with state-space
layers and encoder-decoders are refused by name."""


def _spell(plan: PrunePlan) -> str:
    parts = [*map(str, plan.drop), *(f"{i}.attention" for i in plan.attention)]
    return ",".join([*parts, *(f"{i}.mlp" for i in plan.mlp)])


def _cuts(spelled: dict[str, list[str]]) -> list[str]:
    rows = ["", "| cut | drops |", "|---|---|"]
    for cut, drops in spelled.items():
        rows.append(f"| {cut} | {' or '.join(dict.fromkeys(drops))} |")
    return rows


def _table(answers: dict[tuple[str, str], str]) -> list[str]:
    reasons = [found for found in dict.fromkeys(answers.values()) if found not in (YES, IN_WINDOW)]
    number = {reason: f"{index}" for index, reason in enumerate(reasons, 1)}
    number |= {YES: YES, IN_WINDOW: IN_WINDOW}
    rows = [f"| | {' | '.join(CUTS)} |", "|---|" + "---|" * len(CUTS)]
    for model in NAMES:
        marks = " | ".join(number[answers[model, cut]] for cut in CUTS)
        rows.append(f"| {model} | {marks} |")
    return [*rows, *([""] if reasons else []), *(f"{number[r]}. {r}" for r in reasons)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
