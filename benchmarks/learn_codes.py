"""What learning of codes brings at given bits, on a card: starts, learning rates, then long runs.

    python -m benchmarks.learn_codes MODEL --data DIR --bits 5.0 3.86 4.5 --tokens 5000000
        --rates 0.0002 0.0005 0.001 0.002 --reaches 0.45 0.25 --sweep-tokens 800000
        --self-generated 1000000 --device cuda:0 [--start-device cpu] [--restored 0 0.5] [--test]
        [--minutes 8] -o OUT

DIR: folders SET/NAME with train, validation and test .jsonl(.gz). Learnt from: the train files of
all sets, joined to documents of about 3000 characters, and text that the model writes itself.
Chosen on: validation files of WikiText-2 and contracts. Every result is a line of
OUT/results.jsonl as soon as it is known; OUT/BITS.codes.00, .01, ... are pieces (below 16 MB) of
what `benchmarks.code_deltas restore` makes the quantized folder from (cat them); the folders
themselves lie in OUT/work.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.code_deltas import save
from benchmarks.sets import file_of
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.prune.calibrate import LayerwiseModel, batches
from shortstack.prune.heal.data import drawn, packed_windows
from shortstack.prune.heal.model import final_hidden, head_of
from shortstack.prune.heal.sample import sampled_windows
from shortstack.prune.quantize import LearningText, QuantizeSettings, compensate, latent
from shortstack.prune.quantize.compensated import importances, write_compensated
from shortstack.prune.quantize.device import device_of
from shortstack.prune.quantize.latent_model import LatentModel
from shortstack.prune.quantize.learn import Learner, write_learned
from shortstack.prune.quantize.matrices import Floats, look_at, matrix_names
from shortstack.prune.quantize.rate import MatrixRate, other_bits, scale_for
from shortstack.prune.quantize.sensitivity import measure
from shortstack.prune.quantize.write import write_folder
from shortstack.rows import read_rows
from shortstack.shards import ShardReader
from shortstack.tokens import Encoder

CHOSEN_ON = ("general/wikitext2", "legal/contracts_text")
DOCUMENT_CHARS, PIECE_BYTES, CALIBRATION = 3000, 15_000_000, 32
Choice = tuple[float, float]
"""Learning rate, and START_REACH."""

BEGAN = time.perf_counter()


def silent(done: int, total: int) -> None:
    return None


def texts_of(file: Path) -> list[str]:
    return [text_of(row) for _, row in read_rows(file)]


def text_of(row: dict[str, Any]) -> str:
    """Text to learn from: a question with its right answer and why, not one to be scored."""
    if "text" in row:
        return str(row["text"])
    right = row["choices"][row["answer"]]
    why = row.get("explanation") or row.get("long_answer")
    parts = (row.get("context"), row["question"], right, why)
    return "\n".join(part for part in parts if isinstance(part, str))


def documents(data: Path) -> list[str]:
    """Of all train files; short rows of a set are joined."""
    found: list[str] = []
    names = {f.parent.relative_to(data).as_posix() for f in data.glob("*/*/train.jsonl*")}
    for name in sorted(names):
        texts, current = texts_of(file_of(data, name, "train")), ""
        random.Random(7).shuffle(texts)
        for text in texts:
            current = f"{current}\n\n{text}" if current else text
            if len(current) >= DOCUMENT_CHARS:
                found.append(current)
                current = ""
    random.Random(8).shuffle(found)
    return found


def windows_of(encoder: Encoder, data: Path, name: str, split: str, length: int) -> Tensor:
    texts = texts_of(file_of(data, name, split))
    return torch.tensor(packed_windows(texts, encoder.encode, length))


class Bench:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.device = asked, device_of(asked.device)
        self.work = asked.out / "work"
        self.work.mkdir(parents=True)
        self.checkpoint = Checkpoint.open(asked.model)
        self.names = matrix_names(self.checkpoint)
        with ShardReader(self.checkpoint) as reader:
            self.matrices = [look_at(reader, self.checkpoint, name) for name in self.names]
        self.teacher = load(asked.model, torch.float32).to(self.device).requires_grad_(False)
        encoder, length = Encoder(self.checkpoint), asked.window_tokens
        texts = documents(asked.data)
        self.calibration = encoder.windows(texts, length, CALIBRATION)
        self.learnt = drawn(packed_windows(texts, encoder.encode, length), 0)
        splits = ("validation", "test") if asked.test else ("validation",)
        self.sets = {
            (name, split): windows_of(encoder, asked.data, name, split, length)[: asked.limit]
            for name in CHOSEN_ON
            for split in splits
        }
        held = [self.sets[name, "validation"][::7][:12] for name in CHOSEN_ON]
        self.held_out: list[list[int]] = torch.cat(held).tolist()
        self.tell(what="text", windows=len(self.learnt), length=length)
        if asked.self_generated:
            beginnings = [window[:8] for window in self.learnt]
            count = math.ceil(asked.self_generated / length)
            own = "cpu" if self.device.type == "cpu" else "auto"
            self.learnt += sampled_windows(
                self.checkpoint, beginnings, length, count, batch=asked.sample_batch, device=own
            )
            self.tell(what="self-generated", windows=count)

    def tell(self, **facts: Any) -> None:
        line = json.dumps({"s": round(time.perf_counter() - BEGAN, 1), **facts})
        print(line, flush=True)
        with (self.asked.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def wanted(self, bits: float) -> float:
        return bits * self.checkpoint.n_params - other_bits(self.checkpoint, self.names)

    def bits_of(self, rates: Sequence[MatrixRate]) -> float:
        coded = sum(rate.code_bits + rate.side_bits for rate in rates)
        return (coded + other_bits(self.checkpoint, self.names)) / self.checkpoint.n_params

    def starts(self) -> Iterator[tuple[float, Path, float]]:
        """Compensated sidecars, of every RESTORED_SHARE: bits, folder, KL on validation text."""
        device = device_of(self.asked.start_device or self.asked.device)
        parts = [tokens.to(device) for tokens in batches(self.calibration)]
        model = LayerwiseModel(self.checkpoint, "float32")
        model.module.to(device)
        plain = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        found = measure(self.checkpoint, model, parts, 0, silent)
        with torch.no_grad():
            costs = importances(self.checkpoint, model, parts, found)
        units: dict[str, Floats] = {n: c.rsqrt().cpu().numpy() for n, c in costs.items()}
        self.tell(what="sensitivities")
        for bits in self.asked.bits:
            scale = np.float32(scale_for(self.matrices, units, self.wanted(bits)))
            steps = {name: unit * scale for name, unit in units.items()}
            for share in self.asked.restored:
                compensate.RESTORED_SHARE = share
                out = self.work / f"start-{bits:g}-{share:g}"
                out.mkdir()
                with torch.no_grad():
                    for name, parameter in model.module.named_parameters():
                        parameter.copy_(plain[name])
                    rates = write_compensated(
                        *(self.checkpoint, model, parts, found.head_gram, self.matrices),
                        *(steps, out, 0.0, silent),
                    )
                model.module.to(self.device)
                scores = self.scores(model.module, ("validation",))
                model.module.to(device)
                facts = {"bits": bits, "restored": share, "file_bits": self.bits_of(rates)}
                self.tell(what="start", **facts, **scores)
                yield bits, out, sum(score["kl"] for score in scores.values())

    @torch.no_grad()
    def scores(self, module: Any, splits: Sequence[str]) -> dict[str, Any]:
        """Perplexity over the original's (float32), its standard error, and KL in nats a token."""
        found: dict[str, Any] = {}
        for (name, split), windows in self.sets.items():
            if split not in splits:
                continue
            ratios, kls = [], []
            for tokens in windows.to(self.device).split(self.asked.score_windows):
                finals = [final_hidden(one, tokens) for one in (self.teacher, module)]
                heads = [head_of(one) for one in (self.teacher, module)]
                shape = (len(tokens), tokens.shape[1] - 1)
                for at in range(len(tokens)):
                    rows = slice(at * shape[1], (at + 1) * shape[1])
                    one, two = (
                        head.logits(final[rows]).log_softmax(-1)
                        for head, final in zip(heads, finals, strict=True)
                    )
                    targets = tokens[at, 1:, None]
                    ratios.append((one.gather(1, targets) - two.gather(1, targets)).mean())
                    kls.append((one.exp() * (one - two)).sum(-1).mean())
            log = torch.stack(ratios).double().cpu()
            told = f"{name.split('/')[1]} {split}"
            found[told] = {
                "ratio": round(float(log.mean().exp()), 5),
                "error": round(float(log.std() / math.sqrt(len(log))), 5),
                "kl": round(float(torch.stack(kls).mean()), 5),
            }
        return found

    def learner(self, bits: float, start: Path, tokens: int, choice: Choice) -> Learner:
        rate, latent.START_REACH = choice
        settings = QuantizeSettings(
            bits,
            method="compensated",
            learn_tokens=tokens,
            learning_rate=rate,
            batch_tokens=self.asked.batch_tokens,
            device=self.asked.device,
        )
        text = LearningText(self.learnt, self.held_out, note=lambda told: print(told, flush=True))
        model = LatentModel(self.checkpoint, start, self.device)
        return Learner(self.checkpoint, model, text, self.wanted(bits), settings)

    def best_choice(self, bits: float, start: Path) -> tuple[Choice, int]:
        """Of short runs, by KL on held-out windows at their end; and the tokens of a long run.

        Those are fewer than asked for where they would take longer than `--minutes`.
        """
        asked, tokens = self.asked, self.asked.tokens
        choices = [(rate, reach) for reach in asked.reaches for rate in asked.rates]
        if len(choices) == 1 and not asked.minutes:
            return choices[0], tokens
        found: dict[Choice, float] = {}
        for choice in choices:
            facts = self.learner(bits, start, asked.sweep_tokens, choice).run(silent).facts
            kl = facts["history"][-1]["kl"]
            found[choice] = math.inf if kl is None else kl
            self.tell(what="choice", bits=bits, rate=choice[0], reach=choice[1], **facts)
            if asked.minutes:
                fitting = 60 * asked.minutes * facts["tokens_seen"] / facts["wall_s"]
                tokens = min(tokens, int(fitting))
        return min(found, key=lambda choice: found[choice]), tokens

    def long_run(self, bits: float, start: Path, choice: Choice, tokens: int) -> None:
        run = self.learner(bits, start, tokens, choice)
        found = run.run(silent)
        out = self.work / f"{bits:g}-bits"
        out.mkdir()
        rates = write_learned(out, self.matrices, run.model, found.best)
        changed = {name: values.float().numpy() for name, values in found.best.vectors.items()}
        write_folder(self.checkpoint, out, changed)
        told = {"bits": bits, "file_bits": self.bits_of(rates)}
        facts = {**told, "rate": choice[0], "reach": choice[1], **found.facts}
        module = load(out, torch.float32).to(self.device)
        self.tell(what="learnt", **facts, **self.scores(module, ("validation", "test")))
        file = self.work / f"{bits:g}.codes"
        save(self.checkpoint, out, file)
        content = file.read_bytes()
        for number, at in enumerate(range(0, len(content), PIECE_BYTES)):
            piece = self.asked.out / f"{file.name}.{number:02d}"
            piece.write_bytes(content[at : at + PIECE_BYTES])
        self.tell(what="kept", bits=bits, size_bytes=len(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[5.0, 3.86, 4.5])
    parser.add_argument("--restored", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--minutes", type=float, help="a long run has fewer tokens to fit in")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0002, 0.0005, 0.001, 0.002])
    parser.add_argument("--reaches", type=float, nargs="+", default=[latent.START_REACH])
    parser.add_argument("--sweep-tokens", type=int, default=800_000)
    parser.add_argument("--self-generated", type=int, default=0)
    parser.add_argument("--sample-batch", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--score-windows", type=int, default=8)
    parser.add_argument("--limit", type=int, help="windows of a set that are scored")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--start-device", help="of rounding, where it is another one")
    parser.add_argument("--test", action="store_true", help="score test text of what was learnt")
    parser.add_argument("-o", "--out", type=Path, required=True)
    bench = Bench(parser.parse_args())
    starts: dict[float, Path] = {}
    best: dict[float, float] = {}
    for bits, folder, kl in bench.starts():
        if bits not in best or kl < best[bits]:
            best[bits], starts[bits] = kl, folder
    choice, tokens = bench.best_choice(*next(iter(starts.items())))
    for bits, folder in starts.items():
        bench.long_run(bits, folder, choice, tokens)


if __name__ == "__main__":
    main()
