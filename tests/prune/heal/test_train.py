"""Healing on a cut of the trained tiny model: better, and only where it may be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.healing import LENGTH, Windows, read, settings

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.heal import lora
from shortstack.prune.heal.train import heal


@pytest.mark.parametrize("loss", ["kl", "ce", "mix"])
def test_loss_falls_and_perplexity_improves(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path, loss: str
) -> None:
    before = read(original)
    healed, facts = heal(cut, original, *windows, tmp_path, settings(loss=loss))
    assert facts["perplexity_after"] < 0.9 * facts["perplexity_before"]
    assert facts["history"][-1]["loss"] < facts["history"][1]["loss"]
    assert read(original) == before
    assert healed.removed == cut.removed  # its projection is still zero
    name = "model.layers.1.self_attn.o_proj.weight"
    assert not np.frombuffer(read(healed)[name], np.uint8).any()


def test_the_perplexity_told_is_that_of_the_folder(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    healed, facts = heal(cut, original, *windows, tmp_path, settings())
    tokens = torch.tensor(windows[1])
    with torch.no_grad():
        loss = load(healed.path, torch.float32)(tokens, labels=tokens).loss
    assert facts["perplexity_after"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_only_the_neighbours_of_the_cut_learn(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    healed, _ = heal(cut, original, *windows, tmp_path, settings(train="neighbours"))
    before, after = read(cut), read(healed)
    changed = {cut.family.layer_of(name) for name in before if before[name] != after[name]}
    assert changed == {2, 3}


def test_lora_is_merged_into_ordinary_weights(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    chosen = settings(train="lora:4", keep_float32=True, learning_rate=1e-2)
    healed, facts = heal(cut, original, *windows, tmp_path, chosen)
    assert facts["perplexity_after"] < 0.9 * facts["perplexity_before"]
    assert facts["perplexity_after"] == pytest.approx(facts["history"][-1]["perplexity"], rel=1e-5)
    assert healed.tensors.keys() == cut.tensors.keys()
    before, after = read(cut), read(healed)
    changed = {name for name in before if before[name] != after[name]}
    assert all("_proj" in name for name in changed)
    assert not any("layers.1.self_attn" in name for name in changed)  # removed


def test_merged_updates_compute_what_unmerged_do(cut: Checkpoint) -> None:
    model = load(cut.path, torch.float32)
    lora.add_lora(model, cut, 4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        plain = load(cut.path, torch.float32)(tokens).logits
        unmerged = model(tokens).logits
        lora.merge_lora(model)
        merged = model(tokens).logits
    assert (unmerged - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)


def test_where_healing_never_helps_the_student_is_kept(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    said: list[str] = []
    chosen = settings(learning_rate=3.0, loss="ce", eval_steps=5)
    healed, facts = heal(cut, original, *windows, tmp_path, chosen, note=said.append)
    assert facts["best_step"] == 0
    assert facts["perplexity_after"] == facts["perplexity_before"]
    assert any("did not lower" in text for text in said)
    assert read(healed) == read(cut)


def test_a_loss_that_is_no_number_stops_the_run(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    said: list[str] = []
    chosen = settings(learning_rate=1e30, warmup=0.0)
    healed, facts = heal(cut, original, *windows, tmp_path, chosen, note=said.append)
    assert "the loss of step 2 is nan" in facts["stopped"]
    assert any("step 2" in text for text in said)
    assert read(healed) == read(cut)


def test_out_of_memory_halves_the_batch_once(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    def full(module: object, arguments: tuple[object, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            (tokens,) = arguments
            assert isinstance(tokens, torch.Tensor)
            if len(tokens) > room:
                raise torch.OutOfMemoryError("out of memory")

    whole, _ = heal(cut, original, *windows, _made(tmp_path / "a"), settings(keep_float32=True))
    said: list[str] = []
    training, selection = windows[0], windows[1][:4]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        room = 4
        halved, facts = heal(
            cut,
            original,
            training,
            selection,
            _made(tmp_path / "b"),
            settings(keep_float32=True),
            note=said.append,
        )
        room = 1
        with pytest.raises(ShortstackError, match="out of memory with 4 windows"):
            heal(cut, original, training, selection[:1], _made(tmp_path / "c"), settings())
    finally:
        hook.remove()
    assert [text for text in said if "out of memory: 4 windows" in text]
    assert facts["steps"] == 10
    for name, data in read(whole).items():
        if whole.tensors[name].dtype == "F32":
            np.testing.assert_allclose(
                np.frombuffer(data, np.float32),
                np.frombuffer(read(halved)[name], np.float32),
                atol=2e-4,
            )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "kl"}, "--teacher"),
        ({"loss": "ce", "train": "layers:9"}, "no layer 9"),
        ({"loss": "ce", "train": "layers"}, "layers:3,4"),
        ({"loss": "mse"}, "streamline"),
        ({"loss": "huber"}, "huber"),
        ({"loss": "ce", "learning_rate": math.nan}, "learning_rate"),
        ({"loss": "ce", "tokens": -1}, "tokens is -1"),
        ({"loss": "ce", "device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_done_is_refused(
    cut: Checkpoint, windows: Windows, tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    with pytest.raises(ShortstackError, match=said):
        heal(cut, None, *windows, tmp_path, settings(**changed))


def test_a_run_that_could_learn_nothing_is_refused(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match="its own teacher"):
        heal(cut, cut, *windows, tmp_path, settings())
    with pytest.raises(ShortstackError, match="--top-k"):
        heal(cut, original, *windows, tmp_path, settings(loss="ce"), cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match="training windows"):
        heal(cut, original, [], windows[1], tmp_path, settings())
    with pytest.raises(ShortstackError, match="selection windows"):
        heal(cut, original, windows[0], [[1] * LENGTH, [1]], tmp_path, settings())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
