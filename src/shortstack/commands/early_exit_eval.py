"""`shortstack eval --early-exit`: an early exit against the whole model and the rules to beat."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shortstack.checkpoint import Checkpoint
from shortstack.commands.stages import opened
from shortstack.early_exit.prompts import (
    Prompt,
    Style,
    cut_note,
    cut_prompts,
    encode,
)
from shortstack.early_exit.rule_file import SUFFIX, check_model, read_rule
from shortstack.early_exit.segments import SEGMENTS
from shortstack.errors import ShortstackError, require
from shortstack.evaluate import metrics
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.subsets import subset
from shortstack.families import context_tokens
from shortstack.manifest import write_text
from shortstack.progress import Display
from shortstack.questions import Question, open_questions

if TYPE_CHECKING:
    from shortstack.early_exit.batches import Batch
    from shortstack.early_exit.rule import Answer, Rule
    from shortstack.evaluate.targets import Loading

WHOLE, OURS = "whole model", "early exit"
RULES = {"top": "fixed threshold", "depth": "always after the same layers"}


class Answering(Protocol):
    """A model that answers prompts, in whichever runtime."""

    n_layers: int

    @property
    def device(self) -> Any: ...

    def answer_batch(self, batch: Batch) -> list[Answer]: ...


def beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}.{name}{SUFFIX}")


def open_model(checkpoint: Checkpoint, loading: Loading) -> Any:
    import torch

    from shortstack.pretrained import load

    torch.set_num_threads(loading.threads)
    return load(checkpoint.path, getattr(torch, loading.dtype)).to(loading.device)


def prompt_limit(loading: Loading, context: int | None) -> int:
    """Of how many tokens a prompt may be: what was asked for, or the model's context if less."""
    return min(loading.context_tokens, context or loading.context_tokens)


def evaluate_exit(
    model: str,
    files: Sequence[Path],
    classifier: Path,
    loading: Loading,
    out: Path,
    *,
    limit: int | None,
    seed: int,
    display: Display,
) -> dict[str, Any]:
    """Answer the questions of `files` with the whole model, the early exit, and the rules beside
    it; write early_exit.json and early_exit.md into the folder `out`.

    Raises ShortstackError for a classifier that was edited, or fitted to another model.
    """
    require(("torch", "transformers"), "prune", "early exits")
    from shortstack import early_exit_report
    from shortstack.evaluate.torch_scorer import check_loading

    rules = {OURS: read_rule(classifier)}
    for name, title in RULES.items():
        if beside(classifier, name).is_file():
            rules[title] = read_rule(beside(classifier, name))
    questions = {file: subset(open_questions(file), limit, seed) for file in files}
    _check_folder(out)
    data: dict[str, Any] = {"schema": 1, "model": model, "classifier": str(classifier)}
    data |= {"seed": seed, "device": loading.device}
    if (Path(model) / SEGMENTS).is_file():
        _check_onnx(loading)
        data |= {"runtime": "onnxruntime", "dtype": None}
        data["results"] = _evaluated_onnx(Path(model), questions, rules, loading, display)
    else:
        check_loading(loading.device, loading.dtype)
        data |= {"runtime": "pytorch", "dtype": loading.dtype}
        data["results"] = _evaluated_here(model, out, questions, rules, loading, display)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "early_exit.json", json.dumps(data, indent=1) + "\n")
    write_text(out / "early_exit.md", early_exit_report.markdown(data))
    return {**data, "folder": str(out)}


def _check_folder(out: Path) -> None:
    present = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or present - {"early_exit.json", "early_exit.md"}:
        raise ShortstackError(f"{out} holds other things. Choose another -o.")


def _check_onnx(loading: Loading) -> None:
    if loading.device != "cpu":
        raise ShortstackError(
            f"graphs that were split run in onnxruntime on the CPU, not on {loading.device}. Leave "
            "--device out."
        )
    if loading.dtype != "float32":
        raise ShortstackError(
            f"what graphs compute in was settled when they were exported, not by --dtype "
            f"{loading.dtype}. Leave it out."
        )


def _evaluated_here(
    model: str,
    out: Path,
    questions: Mapping[Path, Sequence[Question]],
    rules: Mapping[str, Rule],
    loading: Loading,
    display: Display,
) -> list[dict[str, Any]]:
    from shortstack.runtimes.pytorch_early_exit import Answerer

    with opened(model, out, display) as checkpoint:
        for rule in rules.values():
            check_model(rule, checkpoint.sha256, model)
        loaded, codec = open_model(checkpoint, loading), FolderCodec(checkpoint.path)
        answerers: dict[str, Answering] = {WHOLE: Answerer(loaded)}
        answerers |= {name: Answerer(loaded, rule) for name, rule in rules.items()}
        limit = prompt_limit(loading, context_tokens(checkpoint.config, windowed=True))
        return _evaluated(answerers, codec, questions, rules, loading, limit, display)


def _evaluated_onnx(
    folder: Path,
    questions: Mapping[Path, Sequence[Question]],
    rules: Mapping[str, Rule],
    loading: Loading,
    display: Display,
) -> list[dict[str, Any]]:
    """Of rules that check where the graphs are cut; others were fitted for other cuts."""
    from shortstack.early_exit.segments import read_segments
    from shortstack.runtimes.ort_early_exit import OrtAnswerer

    found = read_segments(folder)
    for rule in rules.values():
        check_model(rule, found.source_sha256, str(folder))
    fitting = {
        name: rule
        for name, rule in rules.items()
        if name == OURS or set(rule.layers) <= set(found.cuts)
    }
    whole = OrtAnswerer(folder, threads=loading.threads)
    limit = prompt_limit(loading, whole.context_tokens)
    answerers: dict[str, Answering] = {WHOLE: whole}
    answerers |= {
        name: OrtAnswerer(folder, rule, threads=loading.threads) for name, rule in fitting.items()
    }
    return _evaluated(answerers, FolderCodec(folder), questions, fitting, loading, limit, display)


def _evaluated(
    answerers: Mapping[str, Answering],
    codec: FolderCodec,
    questions: Mapping[Path, Sequence[Question]],
    rules: Mapping[str, Rule],
    loading: Loading,
    limit: int,
    display: Display,
) -> list[dict[str, Any]]:
    """`limit`: tokens of a prompt, of which the last ones are kept."""
    style, n_layers = Style(**rules[OURS].facts["style"]), answerers[WHOLE].n_layers
    results = []
    for file, rows in questions.items():
        prompts = encode(codec, rows, style, limit)
        name = f"{file.absolute().parent.name}/{file.name}"
        if cut_prompts(prompts):
            display.note(cut_note(name, prompts, limit))
        with display.step(name) as progress:
            timed = answered(answerers, prompts, loading.batch_tokens, progress)
        results.append(
            compared(f"{file.absolute().parent.name}/{file.stem}", prompts, timed, n_layers)
        )
    return results


def answered(
    answerers: Mapping[str, Answering],
    prompts: Sequence[Prompt],
    batch_tokens: int | None,
    progress: Any,
) -> dict[str, dict[str, Any]]:
    """Answers, layers and seconds of each. They take turns batch by batch, in an order that goes
    round, so that what else the machine does meets them alike."""
    from shortstack.early_exit.batches import batches

    names = list(answerers)
    device = answerers[names[0]].device
    parts = list(batches(prompts, device, batch_tokens))
    found = {name: {"chosen": [0] * len(prompts), "layers": [0] * len(prompts)} for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # the first pass of each kind sets libraries up
        answerers[name].answer_batch(parts[-1])
    for turn, batch in enumerate(parts):
        if str(device) != "cpu":  # kernels for a new shape are looked up once
            answerers[names[0]].answer_batch(batch)
        for at in range(len(names)):
            name = names[(turn + at) % len(names)]
            begun = time.perf_counter()
            answers = answerers[name].answer_batch(batch)  # answers on the host: it has waited
            seconds[name].append(time.perf_counter() - begun)
            for index, answer in zip(batch.index, answers, strict=True):
                found[name]["chosen"][index] = answer.chosen
                found[name]["layers"][index] = answer.n_layers
        progress(turn + 1, len(parts))
    return {name: {**found[name], "batch_s": seconds[name]} for name in names}


def compared(
    name: str,
    prompts: Sequence[Prompt],
    timed: Mapping[str, Mapping[str, Any]],
    n_layers: int,
) -> dict[str, Any]:
    """Each rule against the whole model on the same rows; intervals are paired bootstraps."""
    whole = timed[WHOLE]
    right = [prompt.right for prompt in prompts]
    full_right = [a == b for a, b in zip(whole["chosen"], right, strict=True)]
    rows = []
    for rule, found in timed.items():
        ours = [a == b for a, b in zip(found["chosen"], right, strict=True)]
        saved = [1 - n / n_layers for n in found["layers"]]
        entry: dict[str, Any] = {
            "rule": rule,
            "accuracy": metrics.wilson(sum(ours), len(ours)).to_dict(),
            "total_s": sum(found["batch_s"]),
        }
        if rule != WHOLE:
            entry |= {
                "difference": metrics.paired_difference(full_right, ours).to_dict(),
                "saved": metrics.ratio_of_sums(saved, [1] * len(saved)).to_dict(),
                "time_saved": time_saved(whole["batch_s"], found["batch_s"]),
                "same_answer": sum(
                    a == b for a, b in zip(whole["chosen"], found["chosen"], strict=True)
                )
                / len(ours),
            }
        rows.append(entry)
    return {
        "set": name,
        "n": len(prompts),
        "cut_prompts": cut_prompts(prompts),
        "majority": metrics.majority(right),
        "chance": metrics.chance([len(prompt.answers) for prompt in prompts]),
        "rules": rows,
        "answers": {rule: dict(found) for rule, found in timed.items()},
    }


def time_saved(whole_s: Sequence[float], found_s: Sequence[float]) -> dict[str, float]:
    """1 - Σ seconds / Σ seconds of the whole model over the same batches, bootstrap over them."""
    import numpy as np

    whole, ours = np.asarray(whole_s), np.asarray(found_s)
    return metrics.bootstrap(
        lambda rows: float(1 - ours[rows].sum() / whole[rows].sum()), len(whole)
    ).to_dict()
