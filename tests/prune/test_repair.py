"""Repairing a cut: what is linear comes back, what does not help is not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.repaired import TOKENS, cut, load, logits, random
from tests.zoo import make_model as make_zoo_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune import PrunePlan
from shortstack.prune.calibrate import LayerwiseModel, batches
from shortstack.prune.repair import REPAIRS, repair
from shortstack.prune.repair.fold import slot_tensors
from shortstack.prune.repair.maps import Slot
from shortstack.prune.repair.walk import Walk
from shortstack.tokens import Encoder


def linear_layer(folder: Path, layer: int) -> Checkpoint:
    """Make a layer of a model with biases exactly linear in its normed input, its head sharp."""
    checkpoint = Checkpoint.open(folder)
    epsilon = float(checkpoint.text["rms_norm_eps"])
    slot = Slot(0.3 * random(32, 32), random(32, seed=1), epsilon)
    made = slot_tensors(checkpoint, layer, slot)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.from_numpy(values) for name, values in made.items()}
    tensors["lm_head.weight"] *= 20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


def written_by(path: Path) -> list[list[int]]:
    """Text that the model itself finds likely: sampled from it."""
    model, generator = load(path), torch.Generator().manual_seed(0)
    tokens = torch.tensor([[row] for row in range(16)])
    for _ in range(23):
        with torch.inference_mode():
            chances = model(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    found: list[list[int]] = tokens.tolist()
    return found


def test_a_dropped_layer_that_was_linear_is_restored_by_ghost(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    original = linear_layer(make_model("llama-biases"), 3)
    plan = PrunePlan(5, (3,), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    out = tmp_path / "out"
    out.mkdir()
    made, facts = repair(
        original,
        pruned,
        plan,
        TOKENS,
        written_by(original.path),
        out,
        method="ghost",
        dtype="float32",
    )
    truth = logits(load(original.path))
    error = (logits(load(made.path)) - truth).abs().max()
    assert error < 0.01 * (logits(load(pruned.path)) - truth).abs().max()
    assert (facts["kept"], facts["n_layers"], facts["slot_layers"]) == ("ghost", 5, [3])
    assert facts["candidates"]["ghost"]["gaps"][0]["kept"]
    assert PrunePlan.from_json((out / "plan.json").read_text()).attention == (3,)


def windows(checkpoint: Checkpoint, text: str, count: int) -> list[list[int]]:
    return Encoder(checkpoint).windows([text], 32, count)


@pytest.fixture(scope="module")
def licence() -> str:
    return (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")


def test_auto_writes_the_best_and_lists_all(tiny: Path, tmp_path: Path, licence: str) -> None:
    original = Checkpoint.open(tiny)
    plan = PrunePlan(6, (1, 3), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    half = len(licence) // 2
    for method in ("auto", "folded"):
        out = tmp_path / method
        out.mkdir()
        made, facts = repair(
            original,
            pruned,
            plan,
            windows(pruned, licence[:half], 24),
            windows(pruned, licence[half:], 8),
            out,
            method=method,
            dtype="float32",
        )
        tried = facts["candidates"]
        assert [name for name in REPAIRS if name in tried] == list(tried)
        assert ("ghost" in tried) == (method == "auto")
        best = min(tried, key=lambda name: tried[name]["after"])
        assert facts["kept"] == best
        assert [name for name in tried if tried[name]["kept"]] == [best]
        reached = facts["selection_perplexity"]
        assert reached["repaired"] < reached["pruned"]
        assert reached["repaired"] == pytest.approx(tried[best]["after"], rel=0.02)  # rounded
        assert made.n_layers == 4 + len(facts["slot_layers"])
        assert not list(out.glob(".hidden*"))


def test_a_repair_that_worsens_is_not_kept(tiny: Path, tmp_path: Path, licence: str) -> None:
    folder = tmp_path / "harmful"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    noise = random(*tensors[name].shape) * 3
    tensors[name] = noise.to(tensors[name].dtype)  # the full model is worse than the cut one
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    original = Checkpoint.open(folder)
    plan = PrunePlan(6, (2,), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    out = tmp_path / "out"
    out.mkdir()
    texts = windows(pruned, licence, 24)
    made, facts = repair(original, pruned, plan, texts[:16], texts[16:], out, method="auto")
    assert facts["kept"] is None
    assert "no repair" in facts["note"]
    reached = facts["selection_perplexity"]
    assert reached["repaired"] == reached["pruned"] < reached["original"]
    assert not any(found["kept"] for found in facts["candidates"].values())
    assert made.config == pruned.config
    left, right = (load_file(c.path / "model.safetensors") for c in (made, pruned))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        ("mistral", "ghost", "in layers without attention for mistral"),
        ("qwen2", "bias", "MLPs with biases for qwen2"),
        ("granite", "patch", "without attention for granite"),
        ("smollm3", "bias", "MLPs with biases for smollm3"),
        ("gemma2", "scale", "gemma2 normalizes what a sub-block gives"),
        ("olmo2", "least-squares", "olmo2 normalizes"),
        ("granite", "scale", "granite multiplies the embedding"),
    ],
)
def test_a_family_that_cannot_hold_a_repair_is_named(
    model: str, method: str, said: str, tmp_path: Path
) -> None:
    original = Checkpoint.open(make_zoo_model(model, tmp_path / model))
    plan = PrunePlan(8, (4,), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    with pytest.raises(ShortstackError, match=said):
        repair(original, pruned, plan, TOKENS, TOKENS, tmp_path, method=method)


def test_another_model_and_too_little_text_are_refused(
    make_model: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    original = Checkpoint.open(make_model("llama-tied"))
    plan = PrunePlan(5, (2,), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    for other, its in ((Checkpoint.open(tiny), plan), (original, PrunePlan(5, (2, 3), "explicit"))):
        with pytest.raises(ShortstackError, match="was not made of"):
            repair(other, pruned, its, TOKENS, TOKENS, tmp_path)
    with pytest.raises(ShortstackError, match="cannot determine a map of 32 numbers"):
        repair(original, pruned, plan, [TOKENS[0]], TOKENS, tmp_path)
    with pytest.raises(ShortstackError, match="Did you mean 'ghost'"):
        repair(original, pruned, plan, TOKENS, TOKENS, tmp_path, method="gost")


def test_another_seed_is_another_model(make_model: Callable[..., Path], tmp_path: Path) -> None:
    original = Checkpoint.open(make_model("llama-tied"))
    plan = PrunePlan(5, (2,), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    file = original.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = random(96, 32).float()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ShortstackError, match="embeddings differ"):
        repair(Checkpoint.open(original.path), pruned, plan, TOKENS, TOKENS, tmp_path)


def test_a_walk_computes_the_loss_of_the_whole_model(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(make_model("llama-untied"))
    with torch.inference_mode():
        walk = Walk(LayerwiseModel(checkpoint, "float32"), batches(TOKENS), tmp_path / "walk")
        at_start = walk.nats()
        walk.advance(2)
        walk.advance(4)
        tokens = torch.tensor(TOKENS)
        loss = load(checkpoint.path)(tokens, labels=tokens).loss.item()
        assert walk.nats() == pytest.approx(at_start, rel=1e-6)
    assert at_start == pytest.approx(loss * walk.n_predicted, rel=1e-5)
