"""Early exit on questions with one decision: layers and time saved, accuracy kept, by set.

    python -m benchmarks.early_exit MODEL --data DIR --out OUT [--device cuda:0] [--dtype float32]
        [--sets finance/financial_phrasebank ...] [--checks answers probe] [--rows N]
        [--tune-steps 500] [--every 2] [--loss 0.005] [--changed 0.03] [--single-rows 100]
        [--exit-loss 0.5] [--check-cost LAYERS]

DIR holds DOMAIN/SET/{train,validation,test}.jsonl[.gz] with questions. The model is first tuned on
two thirds of all sets' train rows (`--tune-steps 0` takes it as it is: SmolLM2-135M answers most of
these sets with one word, whatever is asked); OUT/tuned keeps it and is used again. With
`--exit-loss 0` only the last layer learns to answer, as in any fine-tune; else its loss is added
with that weight where the norm and the head read the checked layers (LayerSkip's early-exit loss,
arXiv:2404.16710): all decide earlier. The other
third and the validation rows are halved: classifiers are fitted to one half, thresholds to the
other, at a loss of at most `--loss` and at most `--changed` of the answers another than the whole
model's: of a hundred rows the loss alone says little. What a check takes is measured on the device
for every set and check (`--check-cost` fixes it; 0: checks cost nothing). The test rows are run
once, by all rules in turns, batch by batch; `--single-rows` of them one by one, too. `--rows`
bounds every part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.sets import questions
from torch.nn import functional

from shortstack import early_exit_report
from shortstack.checkpoint import Checkpoint
from shortstack.commands.early_exit_cost import check_cost
from shortstack.commands.early_exit_eval import answered, compared
from shortstack.early_exit.batches import batches
from shortstack.early_exit.cost import CheckCost
from shortstack.early_exit.prompts import Prompt, Style, choose_style, cut_prompts, encode
from shortstack.early_exit.rule import ANSWERS, PROBE, VOCABULARY, Rule
from shortstack.early_exit.rule_file import write_rule
from shortstack.early_exit.watched import Run, watched
from shortstack.errors import ShortstackError
from shortstack.evaluate.codec import FolderCodec
from shortstack.pretrained import load
from shortstack.progress import silent
from shortstack.prune.early_exit.fit import Settings, fit
from shortstack.prune.early_exit.states import collect
from shortstack.questions import Question, refuse_leaks
from shortstack.runtimes.pytorch_early_exit import Answerer

SETS = (
    "finance/financial_phrasebank",
    "legal/overruling",
    "medical/pubmedqa",
    "science/sciriff_yesno",
)
"""Sets with train rows. ARC-Easy, MedMCQA and LEDGAR are none of them: the tuned model answers by
chance there, and leaving at once loses nothing. Seen on test rows: docs/early_exit.md."""
TEST_SHARE = 0.2
"""Of the train rows of a set that has no others."""
SPLIT_SEED = 7
MAX_TOKENS = 512
VARIANTS = (
    (ANSWERS, "logistic"),
    (ANSWERS, "svm"),
    (PROBE, "logistic"),
    (PROBE, "svm"),
    (VOCABULARY, "svm"),
)
BATCH_ROWS, RATE, WARMUP_SHARE = 16, 5e-5, 0.1


def parts_of(data: Path, name: str, most: int | None) -> dict[str, list[Question]]:
    """`model` tunes the model, `fit` and `validation` the exit; `test` is for the end."""
    train, test = (questions(data, name, split) for split in ("train", "test"))
    for rows in (train, test):
        random.Random(SPLIT_SEED).shuffle(rows)
    if not test:
        kept = round(len(train) * (1 - TEST_SHARE))
        train, test = train[:kept], train[kept:]
    cut = len(train) * 2 // 3
    pool = train[cut:] + questions(data, name, "validation")
    random.Random(SPLIT_SEED).shuffle(pool)
    half = len(pool) // 2
    parts = {"model": train[:cut], "fit": pool[:half], "validation": pool[half:], "test": test}
    refuse_leaks(parts)
    return {part: rows[:most] for part, rows in parts.items()}


def prompts_of(
    codec: FolderCodec, parts: Mapping[str, Sequence[Question]]
) -> dict[str, list[Prompt]]:
    everything = [question for rows in parts.values() for question in rows]
    style = Style(choose_style(codec, everything))
    return {part: encode(codec, rows, style, MAX_TOKENS) for part, rows in parts.items()}


def tuned(source: Path, prompts: Sequence[Prompt], args: argparse.Namespace, out: Path) -> Path:
    """Tune all weights on the tokens that begin the right answers; write a Hugging Face folder."""
    steps, device = args.tune_steps, args.device
    model = load(source, torch.float32).to(device).train()
    n_layers = len(model.get_decoder().layers)
    layers = Settings(every=args.every, first=args.first).layers(n_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    warmup = max(1, round(WARMUP_SHARE * steps))
    for step, chosen in zip(range(steps), drawn(prompts), strict=False):
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = RATE * rate
        loss = answer_loss(model, chosen, device, layers, args.exit_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"tuning: step {step}, loss {loss.item():.3f}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    for file in Checkpoint.open(source).tokenizer_files:
        shutil.copyfile(file, out / file.name)
    return out


def drawn(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Batches without end; every prompt once in each round."""
    draw = random.Random(SPLIT_SEED)
    while True:
        order = list(prompts)
        draw.shuffle(order)
        for start in range(0, len(order), BATCH_ROWS):
            yield order[start : start + BATCH_ROWS]


def answer_loss(
    model: Any, prompts: Sequence[Prompt], device: str, layers: Sequence[int], weight: float
) -> torch.Tensor:
    """Mean nats of the right answers' first tokens, and `weight` times their mean at `layers`."""
    (batch,) = batches(prompts, device, 1 << 30)
    ordered = [prompts[at] for at in batch.index]
    wanted = torch.tensor([prompt.answers[prompt.right] for prompt in ordered], device=device)
    rows = torch.arange(len(wanted), device=device)
    kept: list[torch.Tensor] = []

    def keep(index: int, run: Run, hidden: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        hidden = run(hidden, **named)
        if weight and index + 1 in layers:
            kept.append(hidden[rows, batch.last])
        return hidden

    def nats(states: torch.Tensor) -> torch.Tensor:
        logits = model.get_output_embeddings()(states).float()
        return functional.cross_entropy(logits, wanted)

    with (
        torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"),
        watched(model, keep),
    ):
        states = model.get_decoder()(input_ids=batch.tokens, use_cache=False).last_hidden_state
        loss = nats(states[rows, batch.last])
        if kept:
            early = [nats(model.get_decoder().norm(one)) for one in kept]
            loss = loss + weight * torch.stack(early).mean()
    return loss


def rules_of(
    model: Any, prompts: Mapping[str, Sequence[Prompt]], args: argparse.Namespace, sha256: str
) -> tuple[dict[str, Rule], dict[str, str]]:
    """(title -> rule, title -> why there is none); states are collected once for all."""
    n_layers = len(model.get_decoder().layers)
    layers = Settings(every=args.every, first=args.first).layers(n_layers)
    states = {part: collect(model, prompts[part], layers) for part in ("fit", "validation")}
    words = {prompt.words for part in ("fit", "validation") for prompt in prompts[part]}
    found: dict[str, Rule] = {}
    refused: dict[str, str] = {}
    costs: dict[str, CheckCost] = {}
    for check, classifier in (v for v in VARIANTS if v[0] in args.checks):
        title = f"{check}, {classifier}"
        settings = Settings(
            *(check, classifier, args.every, args.first, args.loss, args.changed, args.check_cost)
        )
        if check not in costs:  # once, so that all classifiers are told the same
            costs[check] = check_cost(model, prompts["fit"], settings)
        try:
            shared = next(iter(words)) if len(words) == 1 else ()
            fitted = (model, states["fit"], states["validation"], shared, settings)
            found[title], others = fit(*fitted, model_sha256=sha256, cost=costs[check])
        except ShortstackError as error:
            refused[title] = str(error)
            continue
        for name, rule in others.items():
            found.setdefault(f"{check}, {name}", rule)
    return found, refused


def measured(
    model: Any, name: str, prompts: Mapping[str, Sequence[Prompt]], args: argparse.Namespace
) -> dict[str, Any]:
    rules, refused = rules_of(model, prompts, args, args.sha256)
    answerers = {"whole model": Answerer(model)}
    answerers |= {title: Answerer(model, rule) for title, rule in rules.items()}
    n_layers = len(model.get_decoder().layers)
    timed = answered(answerers, prompts["test"], args.batch_tokens, silent)
    result = compared(name, prompts["test"], timed, n_layers)
    result |= {
        "refused": refused,
        "cut_prompts_of_parts": {part: cut_prompts(rows) for part, rows in prompts.items()},
        "checks": {title: list(rule.layers) for title, rule in rules.items()},
        "validation": {title: rule.facts["validation"] for title, rule in rules.items()},
        "check_cost": {title: rule.facts["check_cost"] for title, rule in rules.items()},
        "agreement": {title: rule.facts["agreement"] for title, rule in rules.items()},
        "prompt_tokens": statistics.mean(len(prompt.tokens) for prompt in prompts["test"]),
    }
    single = prompts["test"][: args.single_rows]
    if single and args.device != "cpu":
        alone = answered(answerers, single, 1, silent)
        result["single"] = compared(f"{name}, one by one", single, alone, n_layers)
        del result["single"]["answers"]
    for title, rule in rules.items():
        file = args.out / "rules" / f"{name}.{title.replace(', ', '.')}.safetensors"
        write_rule(
            dataclasses.replace(rule, facts={**rule.facts, "style": {"name": "words"}}), file
        )
    del result["answers"]
    return result


def means(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Over the sets, of the rules that all of them have."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for entry in result["rules"]:
            rows.setdefault(entry["rule"], []).append(entry)
    lines = ["| rule | sets | layers saved | time saved | time / layers | difference |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for rule, entries in rows.items():
        if "saved" not in entries[0]:
            continue
        saved, time_saved, lost = (
            statistics.mean(entry[key]["estimate"] for entry in entries)
            for key in ("saved", "time_saved", "difference")
        )
        share = f"{time_saved / saved:.2f}" if saved else "–"
        lines.append(
            f"| {rule} | {len(entries)} | {saved:.1%} | {time_saved:.1%} | {share} | {lost:+.4f} |"
        )
    return lines


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--checks", nargs="+", default=[ANSWERS, PROBE, VOCABULARY])
    parser.add_argument("--tune-steps", type=int, default=500)
    parser.add_argument("--exit-loss", type=float, default=0.5)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--first", type=int, default=4)
    parser.add_argument("--loss", type=float, default=0.005)
    parser.add_argument("--changed", type=float, default=0.03)
    parser.add_argument("--check-cost", type=float, help="in layers; default: measured")
    parser.add_argument("--single-rows", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    codec = FolderCodec(args.model)
    prompts = {name: prompts_of(codec, parts_of(args.data, name, args.rows)) for name in args.sets}
    args.folder = args.model
    if args.tune_steps:
        args.folder = args.out / "tuned"
        if not (args.folder / "tokenizer.json").is_file():
            rows = [prompt for parts in prompts.values() for prompt in parts["model"]]
            tuned(args.model, rows, args, args.folder)
    args.sha256 = Checkpoint.open(args.folder).sha256
    model = load(args.folder, getattr(torch, args.dtype)).to(args.device)
    results = []
    for name in args.sets:
        results.append(measured(model, name, prompts[name], args))
        data: dict[str, Any] = {"runtime": "pytorch", "device": args.device, "dtype": args.dtype}
        data["results"] = results
        said = early_exit_report.markdown(data)
        alone = [result["single"] for result in results if "single" in result]
        if alone:
            said += early_exit_report.markdown({**data, "results": alone})
            said += "\n".join(["", "One by one:", "", *means(alone), ""])
        said += "\n".join(["", "Means over the sets:", "", *means(results), ""])
        (args.out / "early_exit.json").write_text(json.dumps(data, indent=1) + "\n")
        (args.out / "early_exit.md").write_text(said)
        print(f"{name}: done", flush=True)
    print(said)


if __name__ == "__main__":
    main()
