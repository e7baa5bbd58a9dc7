"""Exits of a frozen model against what they are compared with, at equal tokens.

    python -m benchmarks.exits sample MODEL --data DIR --out OUT --tokens 8000000 [--part 0 --of 2]
    python -m benchmarks.exits train MODEL --data DIR --out OUT --kind balcony --tokens 30000000
        [--at 8 15 22] [--minutes 6] [--rate 1e-3] [--compile] [--name NAME]
    python -m benchmarks.exits train ... --kind cut --at 15 [--plan plan.json]
    python -m benchmarks.exits eval MODEL --data DIR --out OUT NAME... [--split test]
    python -m benchmarks.exits table --out OUT [--split test]

Kinds: `balcony` (layers copied from the last), `random`, `norm-only`, `none` (bare logit lens), and
`cut`: the first k layers and the last (or what --plan keeps), healed. Each NAME lies in OUT; every
invocation stands alone, so that they can be spread over processes and cards.

Learnt from: train rows of text sets, three quarters of WikiText-2's validation articles, train rows
of multiple-choice sets as the evaluation asks them, with every choice, and text that the model
wrote itself. Rates are chosen on the last quarter and on validation rows (`--split validation`);
the test rows are scored once.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.depth import GENERAL, documents
from benchmarks.sets import file_of
from safetensors.numpy import load_file, save_file

from shortstack.checkpoint import Checkpoint
from shortstack.prune import apply_plan
from shortstack.prune.heal.data import packed_windows
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.plan import PrunePlan, read_plan
from shortstack.questions import open_questions
from shortstack.tokens import Encoder

LENGTH = 512
KINDS = {"balcony": "last", "random": "random", "norm-only": "norm-only", "none": "none"}
ASKED = (
    *("science/arc_easy", "science/arc_challenge", "science/mmlu_science", "general/mmlu_general"),
    *("science/sciriff_yesno", "medical/medmcqa", "finance/finqa_mc", "legal/casehold"),
)
"""Multiple-choice sets whose train rows are learnt from."""
SCORED = (
    *("science/arc_easy", "general/piqa", "general/hellaswag"),
    *("science/sciq", "general/commonsense_qa"),
)
TEXT = "general/wikitext2"
PROBE_STEPS = 24
"""Steps that tell how fast training is, where a time is set."""


def selection(data: Path) -> list[str]:
    """The quarter of the validation articles that nothing is fitted on."""
    own = documents(data, TEXT, "validation")
    return own[: len(own) // 4]


def asked_questions(data: Path) -> list[str]:
    """Every question of the train rows with each of its choices, as `eval` scores them."""
    return [
        prompt + continuation
        for name in ASKED
        for question in open_questions(file_of(data, name, "train"))
        for prompt, continuation in question.rendered()
    ]


def texts(data: Path) -> dict[str, list[str]]:
    own = documents(data, TEXT, "validation")
    return {
        "own": own[len(own) // 4 :],
        "general": [text for name in GENERAL for text in documents(data, name, "train")],
        "asked": asked_questions(data),
    }


def sample(asked: argparse.Namespace) -> None:
    """Text that the model writes, from beginnings of all training text."""
    from shortstack.prune.heal.sample import sampled_windows

    base = Checkpoint.open(asked.model)
    found, encode = texts(asked.data), Encoder(base).encode
    wanted = asked.tokens // LENGTH
    made: list[list[int]] = []
    for number, beginning in enumerate(asked.beginnings):
        # short beginnings leave the model its own subjects, long ones keep to the text's
        starts = [w for part in found.values() for w in packed_windows(part, encode, beginning)]
        random.Random(number).shuffle(starts)
        share = wanted // len(asked.beginnings) // asked.of
        mine = starts[asked.part :: asked.of]
        made += sampled_windows(
            base,
            [mine[at % len(mine)] for at in range(share)],
            LENGTH,
            share,
            seed=1000 * number + asked.part,
            batch=asked.batch,
            progress=lambda done, total: print(f"{done} of {total}", flush=True),
        )
    save_file({"tokens": np.array(made, np.int32)}, asked.out / f"sampled-{asked.part}.safetensors")


def training_windows(asked: argparse.Namespace, base: Checkpoint) -> list[list[int]]:
    """All windows that there are, some kinds repeated, mixed; the budget goes round in them."""
    found, encode = texts(asked.data), Encoder(base).encode
    repeats = {"own": asked.own_repeats, "general": 1, "asked": asked.asked_repeats}
    made = []
    for name, part in found.items():
        random.Random(1).shuffle(part)
        cut = packed_windows(part, encode, LENGTH)
        print(f"{name}: {len(cut):,} windows of {LENGTH}, {repeats[name]} x", flush=True)
        made += cut * repeats[name]
    for file in sorted(asked.out.glob("sampled-*.safetensors")):
        made += load_file(file)["tokens"].tolist()
    random.Random(0).shuffle(made)
    print(f"in all {len(made) * LENGTH:,} tokens", flush=True)
    return made[: max(1, asked.tokens // LENGTH)]


def settings_of(asked: argparse.Namespace, tokens: int) -> HealSettings:
    return HealSettings(
        tokens=tokens,
        window_tokens=LENGTH,
        batch_windows=asked.batch,
        micro_windows=asked.micro,
        learning_rate=asked.rate,
        warmup=asked.warmup,
        device=asked.device,
        seed=asked.seed,
    )


def train(asked: argparse.Namespace) -> None:
    base = Checkpoint.open(asked.model)
    name = asked.name or asked.kind
    if (asked.out / name / "facts.json").is_file():
        print(f"{name}: done before, kept")
        return
    windows = training_windows(asked, base)
    chosen = packed_windows(selection(asked.data), Encoder(base).encode, LENGTH)
    chosen = chosen[: asked.selection_windows]
    run = cut_run(asked, base) if asked.kind == "cut" else exits_run(asked, base)
    tokens = 0 if asked.kind == "none" else asked.tokens
    if asked.minutes and tokens:
        tokens = min(tokens, affordable(asked, run, windows, chosen))
    began = time.perf_counter()
    out = fresh(asked.out / f"{name}.partial")
    facts = run(windows, chosen, out, settings_of(asked, tokens), asked.out / f".{name}.state")
    facts = {"kind": asked.kind, "rate": asked.rate, "s": time.perf_counter() - began, **facts}
    (out / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    shutil.rmtree(asked.out / name, ignore_errors=True)
    out.rename(asked.out / name)
    shown = {k: v for k, v in facts.items() if k not in ("history", "settings")}
    print(json.dumps(shown), flush=True)


Run = Callable[[list[list[int]], list[list[int]], Path, HealSettings, Path | None], dict[str, Any]]


def affordable(
    asked: argparse.Namespace, run: Run, windows: list[list[int]], chosen: list[list[int]]
) -> int:
    """Tokens that the minutes allow, by the speed of a few steps."""
    tokens = PROBE_STEPS * asked.batch * LENGTH
    with tempfile.TemporaryDirectory() as folder:
        facts = run(windows, chosen[:2], Path(folder), settings_of(asked, tokens), None)
    found = int(60 * asked.minutes * facts["tokens_per_s"])
    print(f"{facts['tokens_per_s']:,.0f} tokens/s: at most {found:,} tokens", flush=True)
    return found


def exits_run(asked: argparse.Namespace, base: Checkpoint) -> Run:
    from shortstack.prune.exits.train import ExitChoice, train_exits

    choice = ExitChoice(tuple(asked.at), KINDS[asked.kind], asked.compile)

    def run(
        windows: list[list[int]],
        chosen: list[list[int]],
        out: Path,
        settings: HealSettings,
        state: Path | None,
    ) -> dict[str, Any]:
        made = train_exits(
            *(base, choice, windows, chosen, out, settings),
            lies_at=asked.out / (asked.name or asked.kind),
            note=lambda text: print(text, flush=True),
            state=state,
        )
        return dict(made.facts)

    return run


def cut_run(asked: argparse.Namespace, base: Checkpoint) -> Run:
    from shortstack.prune.heal.train import heal

    (at,) = asked.at
    last = base.n_layers - 1
    plan = PrunePlan(base.n_layers, tuple(range(at, last)), "explicit")
    if asked.plan is not None:
        plan = read_plan(asked.plan)

    def run(
        windows: list[list[int]],
        chosen: list[list[int]],
        out: Path,
        settings: HealSettings,
        state: Path | None,
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            cut = apply_plan(base, plan, Path(folder))
            _, facts = heal(
                *(cut, base, windows, chosen, out, settings),
                note=lambda text: print(text, flush=True),
                state=state,
            )
        return {"drop": list(plan.drop), **facts}

    return run


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def evaluate(asked: argparse.Namespace) -> None:
    """Perplexity and multiple choice by the repository's own `eval`, into OUT/eval-NAME-SPLIT."""
    from shortstack.commands.evaluate import evaluate as run
    from shortstack.evaluate.sets import SetSpec
    from shortstack.evaluate.targets import Loading
    from shortstack.exits import is_exits, read_exits
    from shortstack.terminal import display

    models: list[str] = []
    for name in asked.names:
        folder = asked.out / name
        if is_exits(folder):
            exits = read_exits(folder, asked.model).exits
            models += [f"{folder}@{exit}" for exit in exits if not asked.at or exit in asked.at]
        else:
            models.append(str(folder))
    text = file_of(asked.data, TEXT, "test")
    if asked.split == "validation":
        text = asked.out / "selection.jsonl"
        lines = [json.dumps({"text": document}) for document in selection(asked.data)]
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sets = [SetSpec("wikitext2", "text", text, limit=asked.windows, window_tokens=LENGTH)]
    for name in SCORED:
        file = file_of(asked.data, name, asked.split)
        sets.append(SetSpec(name.rpartition("/")[2], "choice", file, limit=asked.limit))
    run(
        models,
        str(asked.model),
        sets,
        Loading(threads=asked.threads, device=asked.device, dtype=asked.dtype),
        asked.out / f"eval-{asked.save_as or '-'.join(asked.names)}-{asked.split}",
        display(quiet=False),
    )
    table(asked)


def table(asked: argparse.Namespace) -> None:
    """All evaluations of a split in one table; what is kept of the accuracy above chance."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    first: str | None = None
    for file in sorted(asked.out.glob(f"eval-*-{asked.split}/eval.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        first = data["original"]
        for row in data["results"]:
            found.setdefault(row["model"], {})[row["set"]] = row
    if first is None:
        raise SystemExit(f"nothing of {asked.split} is scored in {asked.out}")
    names = [name for name, row in found[first].items() if row["kind"] == "choice"]
    head = ["model", "perplexity", "KL", *names, "mean", "kept of the mean", "kept above chance"]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    whole = means(found[first], names)
    order = sorted(found, key=lambda model: (model != first, model))
    for model in order:
        mean, above = means(found[model], names)
        text = found[model]["wikitext2"]
        kl = text.get("against", {}).get("kl_nats", {}).get("estimate")
        cells = [f"{text['summary']['perplexity']['estimate']:.1f}", f"{kl:.3f}" if kl else ""]
        cells += [f"{100 * accuracy(found[model][name]):.1f}" for name in names]
        cells += [f"{100 * mean:.1f}", f"{100 * mean / whole[0]:.1f} %"]
        cells.append(f"{100 * above / whole[1]:.1f} %")
        print(f"| {model} | {' | '.join(cells)} |")


def accuracy(row: dict[str, Any]) -> float:
    """By likelihood for the length, as docs/depth.md has it."""
    return float(row["summary"]["accuracy_by_length"]["estimate"])


def means(rows: dict[str, dict[str, Any]], names: list[str]) -> tuple[float, float]:
    """Mean accuracy over sets, and the mean of what is above chance."""
    mean = sum(accuracy(rows[name]) for name in names) / len(names)
    return mean, mean - sum(float(rows[name]["summary"]["chance"]) for name in names) / len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, *, reads: bool = True) -> argparse.ArgumentParser:
        made = verbs.add_parser(name)
        if reads:
            made.add_argument("model", type=Path)
            made.add_argument("--data", type=Path, required=True)
        made.add_argument("--out", type=Path, required=True)
        return made

    one = verb("sample")
    one.add_argument("--tokens", type=int, default=8_000_000)
    one.add_argument("--beginnings", type=int, nargs="+", default=[8, 32])
    one.add_argument("--batch", type=int, default=1536)
    one.add_argument("--part", type=int, default=0)
    one.add_argument("--of", type=int, default=1, help="processes that share the tokens")
    _train_options(verb("train"))
    one = verb("eval")
    one.add_argument("names", nargs="+")
    one.add_argument("--at", type=int, nargs="*", help="only these exits")
    one.add_argument("--save-as", help="name of the evaluation; default: those of the models")
    one.add_argument("--split", choices=("validation", "test"), default="validation")
    one.add_argument("--limit", type=int, default=2000, help="rows of a set")
    one.add_argument("--windows", type=int, help="of text; default: all")
    one.add_argument("--device", default="cpu")
    one.add_argument("--dtype", default="float32")
    one.add_argument("--threads", type=int, default=2)
    verb("table", reads=False).add_argument("--split", default="validation")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    {"sample": sample, "train": train, "eval": evaluate, "table": table}[asked.verb](asked)


def _train_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--kind", choices=(*KINDS, "cut"), required=True)
    one.add_argument("--name", help="folder in OUT; default: the kind")
    one.add_argument("--at", type=int, nargs="+", default=[8, 15, 22])
    one.add_argument("--plan", type=Path, help="of cut: which layers go")
    one.add_argument("--tokens", type=int, default=30_000_000)
    one.add_argument("--minutes", type=float, help="fewer tokens where they would take longer")
    one.add_argument("--rate", type=float, default=2e-3)
    one.add_argument("--warmup", type=float, default=0.02)
    one.add_argument("--batch", type=int, default=32, help="windows a step")
    one.add_argument("--micro", type=int, help="windows at once")
    one.add_argument("--own-repeats", type=int, default=4)
    one.add_argument("--asked-repeats", type=int, default=2)
    one.add_argument("--compile", action="store_true")
    one.add_argument("--device", default="auto")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--selection-windows", type=int, default=64)


if __name__ == "__main__":
    main()
