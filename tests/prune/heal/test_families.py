"""Every family heals: its head's scale and cap, sliding windows, fused projections, a tower."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.healing import read, settings
from tests.zoo import NAMES, make_model

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.prune.heal.train import heal


@pytest.mark.parametrize("train", ["all", "lora:2"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_trained(name: str, train: str, tmp_path: Path) -> None:
    student = Checkpoint.open(make_model(name, tmp_path / "model"))
    out = tmp_path / "healed"
    out.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 500, (4, 24), generator=generator).tolist()
    chosen = settings(
        **{"loss": "ce", "train": train, "tokens": 3 * 4 * 24, "batch_windows": 4},
        **{"warmup": 0.0, "learning_rate": 5e-3},
    )
    healed, facts = heal(student, None, rows, rows, out, chosen)
    tokens = torch.tensor(rows)
    for checkpoint, told in ((student, "before"), (healed, "after")):
        model = load(checkpoint.path, torch.float32)
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss.item()
        assert facts[f"perplexity_{told}"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert facts["perplexity_after"] < 0.98 * facts["perplexity_before"]
    before, after = read(student), read(healed)
    changed = {key for key in before if before[key] != after[key]}
    layers = {student.family.layer_of(key) for key in changed} - {None}
    assert layers == set(range(student.n_layers))
    assert not any("vision" in key for key in changed)
