"""Train exits on a frozen model: all together, towards its own distribution, from one pass."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, unknown
from shortstack.exits.folder import INITS, ExitFolder, check_exits, write_exits
from shortstack.exits.model import exit_modules
from shortstack.footprint import measured
from shortstack.manifest import step_key
from shortstack.pretrained import load
from shortstack.progress import OnProgress, silent
from shortstack.prune.exits.start import starting_tensors
from shortstack.prune.exits.student import ExitStudent
from shortstack.prune.heal.loop import Loop
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.heal.sharded import copies, put
from shortstack.prune.heal.train import STORED
from shortstack.prune.scoring import perplexity

FIGURES = ("kl", "perplexity", "same_token")


@dataclass(frozen=True)
class ExitChoice:
    """Which exits, and how they begin. `compiled`: fuse the passes over logits (torch.compile)."""

    exits: tuple[int, ...]
    init: str = "last"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise unknown("init of exits", self.init, INITS)


def train_exits(
    base: Checkpoint,
    choice: ExitChoice,
    train_windows: Sequence[Sequence[int]],
    selection_windows: Sequence[Sequence[int]],
    out: Path,
    settings: HealSettings,
    *,
    lies_at: Path | None = None,
    progress: OnProgress = silent,
    note: Callable[[str], None] = lambda text: None,
    state: Path | None = None,
) -> ExitFolder:
    """Train the exits of `base`, which stays as it is; write them into the existing empty `out`.

    Windows are of equal length, in tokens. The best state is that of lowest perplexity on
    `selection_windows` (its geometric mean over exits), the start included. Tensors are stored in
    the type of the base's. `settings.tokens` is 0 for `none`, whose exits are the base's own norm.
    `state`: a folder for what a killed run goes on from. `lies_at`: where `out` will be moved to.

    The facts in exits.json: `losses` (an exit -> before and after training: `kl` in nats,
    `perplexity`, `same_token`, the share of positions where the likeliest token is the model's),
    `perplexity` of the model on the same windows, `tokens`, `steps`, `best_step`, `stopped`,
    `tokens_per_s` (of training alone), `wall_s`, `peak_bytes`, `history`, `settings`.
    """
    exits = check_exits(choice.exits, base.n_layers)
    check_training(base, choice, settings)
    with measured() as meter:
        windows = train_windows or selection_windows[:1]  # none: nothing reads them
        run = ExitLoop(base, choice, windows, selection_windows, settings, note)
        start = copies(run.trained)
        before = run.figures()
        if settings.tokens:
            run.train(progress, state, run_key(base, choice, train_windows, settings))
        run.restore_best()
        if not run.position.best_step:
            if run.position.step:
                note("training did not lower the perplexity on selection text: the start is kept")
            put(run.trained, start)
        tensors = run.rounded(base)
        after = run.figures()
    facts = _facts(run, exits, before, after, meter.footprint.peak_anon_bytes)
    made = write_exits(out, base, exits, choice.init, tensors, facts, lies_at=lies_at)
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)
    return made


def check_training(base: Checkpoint, choice: ExitChoice, settings: HealSettings) -> None:
    """Raise ShortstackError for what cannot be trained, before anything is loaded."""
    check_exits(choice.exits, base.n_layers)
    if choice.init == "none" and settings.tokens:
        raise ShortstackError(
            "exits of init none are the model's own norm and head, nothing of them is trained, "
            f"and {settings.tokens:,} tokens to train on are asked for. Leave them out, or choose "
            "another init."
        )
    if choice.init != "none" and not settings.tokens:
        raise ShortstackError(
            f"exits of init {choice.init} have to be trained, and tokens is 0. Say on how many, "
            "e.g. --tokens 20000000."
        )


class ExitLoop(Loop):
    """Healing's loop with exits in the place of a student: its steps, states and resumption."""

    def __init__(
        self,
        base: Checkpoint,
        choice: ExitChoice,
        train_windows: Sequence[Sequence[int]],
        selection_windows: Sequence[Sequence[int]],
        settings: HealSettings,
        note: Callable[[str], None],
    ) -> None:
        self._choice = choice
        super().__init__(base, None, train_windows, selection_windows, settings, note)

    def _module(
        self, student: Checkpoint, teacher: Checkpoint | None, cache: Path | None, low: bool
    ) -> Any:
        frozen = load(student.path, torch.float32)
        start = starting_tensors(
            frozen, student, self._choice.exits, self._choice.init, self.settings.seed
        )
        layers, norms = exit_modules(frozen, start, torch.float32)
        for module in (*layers.values(), *norms.values()):
            module.requires_grad_(True)
        frozen.requires_grad_(False).to(self.device)
        if low:  # weights alone: the frequencies of a rotation must stay float32
            for parameter in frozen.parameters():
                parameter.data = parameter.data.bfloat16()
        return ExitStudent(frozen, layers, norms, low, self._choice.compiled)

    def rounded(self, base: Checkpoint) -> dict[str, Tensor]:
        """What learnt, rounded to the type of the base's last layer, by the names of the file."""
        last = base.family.layer_name(base.n_layers - 1, base.family.layer[0])
        stored = STORED[base.tensors[last].dtype]
        with torch.no_grad():
            for parameter in self.trained.values():
                parameter.copy_(parameter.to(stored))
        return {f"exits.{name}": tensor.to(stored) for name, tensor in copies(self.trained).items()}

    @torch.no_grad()
    def figures(self) -> list[dict[str, float | None]]:
        """FIGURES of every exit and of the whole model, on the selection windows."""
        self.module.eval()
        sums = sum(
            self.module.figures(tokens.to(self.device)).cpu()
            for tokens in self.selection.split(self._micro)
        )
        self.module.train()
        found = []
        for kl, nats, same in (torch.as_tensor(sums) / self.selection[:, 1:].numel()).tolist():
            numbers = (kl, perplexity(nats) if math.isfinite(nats) else math.inf, same)
            found.append(
                {n: x if math.isfinite(x) else None for n, x in zip(FIGURES, numbers, strict=True)}
            )
        return found


def run_key(
    base: Checkpoint,
    choice: ExitChoice,
    windows: Sequence[Sequence[int]],
    settings: HealSettings,
) -> str:
    """What decides a run: a state of another one is not gone on from."""
    given = {"windows": windows, "settings": dataclasses.asdict(settings)}
    named = [choice.exits, choice.init]
    return step_key("exits-state", {"base": base.sha256, "exits": named, **given})


def _facts(
    run: ExitLoop,
    exits: Sequence[int],
    before: list[dict[str, float | None]],
    after: list[dict[str, float | None]],
    peak_bytes: int | None,
) -> dict[str, Any]:
    at, settings = run.position, run.settings
    if run.device.type == "cuda":
        peak_bytes = int(torch.cuda.max_memory_allocated(run.device))
    seen = at.step * settings.batch_windows * run.windows.shape[1]
    return {
        "losses": {
            str(exit): {"before": was, "after": now}
            for exit, was, now in zip(exits, before, after, strict=False)
        },
        "perplexity": after[-1]["perplexity"],
        "tokens": seen,
        "steps": at.step,
        "best_step": at.best_step,
        "stopped": run.stopped,
        "tokens_per_s": seen / at.trained_s if at.trained_s else 0.0,
        "wall_s": at.wall_s,
        "peak_bytes": peak_bytes,
        "device": str(run.device),
        "trained_parameters": sum(p.numel() for p in run.trained.values()),
        "settings": dataclasses.asdict(settings),
        "history": [
            {n: x if math.isfinite(x) else None for n, x in row.items()} for row in at.history
        ],
    }
