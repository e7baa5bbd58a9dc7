"""`shortstack exits fit` and `shortstack exits split`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.commands.early_exit_eval import beside, open_model, prompt_limit
from shortstack.commands.stages import opened
from shortstack.early_exit.prompts import (
    Prompt,
    choose_style,
    cut_note,
    cut_prompts,
    encode,
    with_examples,
    without_examples,
)
from shortstack.early_exit.rule_file import SUFFIX, check_model, read_rule, write_rule
from shortstack.errors import ShortstackError, require
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.subsets import subset
from shortstack.families import context_tokens
from shortstack.manifest import (
    MANIFEST,
    check_apart,
    check_ours,
    check_place,
    staged,
    step_key,
    write_manifest,
)
from shortstack.progress import Display, silent
from shortstack.questions import Question, open_questions, refuse_leaks

if TYPE_CHECKING:
    from shortstack.early_exit.rule import Rule
    from shortstack.evaluate.targets import Loading
    from shortstack.prune.early_exit.fit import Settings

VALIDATION_SHARE = 1 / 3


def fit_exit(
    model: str,
    tune: Path,
    validation: Path | None,
    settings: Mapping[str, Any],
    out: Path,
    loading: Loading,
    *,
    answers: str,
    shots: int,
    rows: int | None,
    seed: int,
    display: Display,
) -> dict[str, Any]:
    """Fit an early exit to the questions of `tune`; write it to the file `out`, and the rules to
    beat beside it (NAME.top.safetensors, NAME.depth.safetensors).

    Without `validation` a third of the rows sets the threshold. `rows`: the most that are used.
    """
    require(("torch", "transformers"), "prune", "fitting an early exit")
    require(("sklearn",), "exits", "fitting an early exit")
    from shortstack.evaluate.torch_scorer import check_loading
    from shortstack.prune.early_exit.fit import Settings, check_rows

    chosen = Settings(**settings)
    check_out(out)
    check_loading(loading.device, loading.dtype)
    parts = _parts(tune, validation, rows, seed)
    with opened(model, out, display) as checkpoint:
        codec = FolderCodec(checkpoint.path)
        every = [question for part in parts.values() for question in part]
        style = with_examples(choose_style(codec, every, answers), parts["tune"], shots, seed)
        parts["tune"] = without_examples(style, parts["tune"])
        check_rows({name: len(part) for name, part in parts.items()})
        length = prompt_limit(loading, context_tokens(checkpoint.config, windowed=True))
        prompts = {name: encode(codec, part, style, length) for name, part in parts.items()}
        cut = {name: cut_prompts(part) for name, part in prompts.items()}
        for name in (name for name, count in cut.items() if count):
            display.note(cut_note(f"the {name} rows", prompts[name], length))
        told = {"style": style.to_dict(), "cut_prompts": cut}
        rule, others = _fit(checkpoint, prompts, told, chosen, loading, display)
    write_rule(rule, out)
    for name, other in others.items():
        write_rule(other, beside(out, name))
    return _said(rule, others, out)


def check_out(out: Path) -> None:
    """Raise ShortstackError for a name that is no early exit's, for another file of that name, and
    for a place that cannot be written."""
    if out.suffix != SUFFIX:
        raise ShortstackError(f"{out} must end in {SUFFIX}. Choose another -o.")
    check_place(out)
    if out.exists():
        try:
            read_rule(out)
        except ShortstackError:
            raise ShortstackError(
                f"{out} exists and is no early exit of this shortstack. Choose another -o, or "
                "remove it."
            ) from None


def _parts(
    tune: Path, validation: Path | None, rows: int | None, seed: int
) -> dict[str, tuple[Question, ...]]:
    first = subset(open_questions(tune), rows, seed)
    if validation is not None:
        parts = {"tune": first, "validation": subset(open_questions(validation), rows, seed)}
    else:
        keys = sorted({question.key for question in first})
        random.Random(seed).shuffle(keys)
        taken = set(keys[: round(VALIDATION_SHARE * len(keys))])
        parts = {
            "tune": tuple(question for question in first if question.key not in taken),
            "validation": tuple(question for question in first if question.key in taken),
        }
    refuse_leaks(parts)
    return parts


def _fit(
    checkpoint: Checkpoint,
    prompts: Mapping[str, Sequence[Prompt]],
    told: Mapping[str, Any],
    settings: Settings,
    loading: Loading,
    display: Display,
) -> tuple[Rule, dict[str, Rule]]:
    """`told`: what else the rules shall hold as facts."""
    import dataclasses

    from shortstack.commands.early_exit_cost import check_cost
    from shortstack.prune.early_exit.fit import fit
    from shortstack.prune.early_exit.states import collect

    model = open_model(checkpoint, loading)
    layers = settings.layers(checkpoint.n_layers)
    states = {}
    for name, part in prompts.items():
        with display.step(f"Run the {name} rows") as progress:
            states[name] = collect(model, part, layers, loading.batch_tokens, progress)
    words = {prompt.words for part in prompts.values() for prompt in part}
    shared = words.pop() if len(words) == 1 else ()
    measured = settings.check_cost is None
    with display.step("Time a check") if measured else nullcontext(silent) as progress:
        cost = check_cost(model, prompts["validation"], settings, progress)
    with display.step("Fit"):
        rule, others = fit(
            *(model, states["tune"], states["validation"], shared, settings),
            model_sha256=checkpoint.sha256,
            cost=cost,
        )

    def telling(one: Rule) -> Rule:
        return dataclasses.replace(one, facts={**one.facts, **told})

    return telling(rule), {name: telling(other) for name, other in others.items()}


def _said(rule: Rule, others: Mapping[str, Rule], out: Path) -> dict[str, Any]:
    return {
        "classifier": str(out),
        "kind": rule.kind,
        "check": rule.check,
        "checks": list(rule.layers),
        "of_layers": rule.n_layers,
        "check_cost": rule.facts["check_cost"],
        "rows": rule.facts["rows"],
        "cut_prompts": rule.facts["cut_prompts"],
        "validation": rule.facts["validation"],
        **{name: other.facts["validation"] for name, other in others.items()},
    }


def split_export(export: Path, classifier: Path, out: Path, *, display: Display) -> dict[str, Any]:
    """Cut the ONNX export in the folder `export` where `classifier` checks; `out` becomes a folder
    that `shortstack eval --early-exit` runs in onnxruntime."""
    require(("onnx_ir", "onnxruntime"), "onnx", "splitting an ONNX export")
    from shortstack.commands.stages import open_artifact
    from shortstack.export.onnx_split import split
    from shortstack.runtimes.ort_early_exit import check_probe

    check_ours(out, "split")
    check_apart(out, [export, classifier])
    rule = read_rule(classifier)
    check_probe(rule)
    artifact = open_artifact(export)
    if artifact.format != "onnx":
        raise ShortstackError(
            f"{export} is an export to {artifact.format}: only ONNX graphs can be split. "
            "GGUF has no early exit; cut a copy of fixed depth with shortstack prune."
        )
    check_model(rule, artifact.source_sha256, str(export))
    key = step_key("split", {"artifact": artifact.sha256, "layers": rule.layers})
    with display.step("Split the graph"), staged(out, "split") as partial:
        made = split(artifact.path, rule.layers, partial, artifact.source_sha256)
        for file in artifact.path.iterdir():
            if file.suffix in (".json", ".jinja") and file.name != MANIFEST:
                shutil.copyfile(file, partial / file.name)
        write_manifest(partial, "split", key, {"split": {"layers": list(rule.layers)}})
    return {"folder": str(out), "graphs": len(made.segments), "cuts": list(made.cuts)}
