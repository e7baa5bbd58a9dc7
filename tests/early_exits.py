"""What tests of early exits share: questions with a rule, a model with opinions, a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.trimming import made_up

from shortstack.early_exit.prompts import WORDS, Prompt, Style, encode
from shortstack.early_exit.rule import Rule
from shortstack.evaluate.codec import FolderCodec
from shortstack.pretrained import load
from shortstack.prune.early_exit.fit import Settings, fit
from shortstack.prune.early_exit.states import States, collect

ANSWERS = ("yes", "no")


def opened(folder: Path) -> Any:
    return load(folder, torch.float32)


def prompts_of(folder: Path, count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of different lengths."""
    codec = FolderCodec(folder)
    return encode(codec, made_up(count, seed), Style(WORDS), max_tokens=64)


def states_of(model: Any, prompts: Sequence[Prompt], layers: Sequence[int]) -> States:
    return collect(model, prompts, layers)


def fitted(folder: Path, settings: Settings, count: int = 96) -> tuple[Any, Rule, list[Prompt]]:
    """(model, rule, prompts that the rule has not seen)."""
    model = opened(folder)
    prompts = prompts_of(folder, count)
    layers = settings.layers(len(model.get_decoder().layers))
    third = count // 3
    tune = states_of(model, prompts[:third], layers)
    validation = states_of(model, prompts[third : 2 * third], layers)
    rule, _ = fit(model, tune, validation, ANSWERS, settings, model_sha256="0" * 64)
    return model, rule, prompts[2 * third :]
