"""Repairs without training: the sums, the maps they give, and the weights that hold the maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.zoo import make_model as make_zoo_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune import PrunePlan, apply_plan
from shortstack.prune.calibrate import LayerwiseModel, batches
from shortstack.prune.repair import REPAIRS, bias, ghost, least_squares, patch, refit, repair, scale
from shortstack.prune.repair.boundaries import Boundary, boundaries
from shortstack.prune.repair.fold import slot_tensors, write_repaired
from shortstack.prune.repair.maps import Map, MapOutput, OwnMlp, Scale, Shift, Slot
from shortstack.prune.repair.statistics import Statistics, normed, regress
from shortstack.prune.repair.support import refusal
from shortstack.prune.repair.walk import Walk
from shortstack.tokens import Encoder

TOKENS = [[(7 * i * i + 13 * i + 5 * row) % 96 for i in range(24)] for row in range(6)]
EPSILON = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(original: Checkpoint, plan: PrunePlan, folder: Path) -> Checkpoint:
    folder.mkdir()
    return apply_plan(original, plan, folder)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(torch.tensor(TOKENS), use_cache=False).logits
    return result


def test_every_gap_of_a_cut_is_found() -> None:
    plan = PrunePlan(8, (0, 3, 4, 7), "explicit", attention=(5,))
    assert boundaries(plan) == (
        Boundary(0, 1, (0,)),
        Boundary(2, 5, (3, 4)),
        Boundary(3, 6, ()),
        Boundary(4, 8, (7,)),
    )


def test_the_sums_equal_those_of_all_hidden_states_at_once(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    original = Checkpoint.open(make_model("llama-tied"))
    pruned = cut(original, PrunePlan(5, (2, 3), "explicit"), tmp_path / "cut")
    whole, left = load(original.path), load(pruned.path)
    outputs: list[Tensor] = []
    left.model.layers[1].mlp.register_forward_hook(lambda _, __, made: outputs.append(made))
    with torch.inference_mode():
        tokens = torch.tensor(TOKENS)
        z = whole(tokens, output_hidden_states=True).hidden_states[4].flatten(0, 1).double()
        x = left(tokens, output_hidden_states=True).hidden_states[2].flatten(0, 1).double()
    x, z, m = x.numpy(), z.numpy(), outputs[0].flatten(0, 1).double().numpy()

    basis = patch.basis(32)
    by_mlp = Statistics(32, features="mlp")
    by_norm = Statistics(32, features="normed", basis=basis, epsilon=EPSILON)
    with torch.inference_mode():
        parts = list(torch.tensor(TOKENS).split(4))
        top = Walk(LayerwiseModel(original, "float32"), parts, tmp_path / "z")
        walk = Walk(LayerwiseModel(pruned, "float32"), parts, tmp_path / "x", keep_mlp=True)
        top.advance(4)
        walk.advance(2)
        for (hidden, mlp), target in zip(walk.batches(), top.hidden, strict=True):
            by_mlp.add(hidden, mlp, target)
            by_norm.add(hidden, mlp, target)

    w2 = 1 / (z**2).sum(1, keepdims=True)
    n = np.hstack([x / np.sqrt((x**2).mean(1, keepdims=True) + EPSILON), np.ones((len(x), 1))])
    h = basis.numpy()
    expected = {
        "step": (z - x).sum(0),
        "weighted_step": (w2 * (z - x)).sum(0),
        "absolute_x": abs(x @ h).sum(0),
        "absolute_z": abs(z @ h).sum(0),
        "gram": (n * w2).T @ n,
        "cross": (n * w2).T @ (z - x),
        "input_cross": (n * w2).T @ x,
        "norm_x": np.linalg.norm(x, axis=1).sum(),
        "norm_z": np.linalg.norm(z, axis=1).sum(),
        "weight": w2.sum(),
        "n_tokens": len(x),
    }
    for name, value in expected.items():
        found = np.asarray(getattr(by_norm, name))
        assert np.abs(found - value).max() < 1e-4 * np.abs(value).max(), name
    gram, cross = (m * w2).T @ m, (m * w2).T @ (z - x)
    assert np.abs(by_mlp.gram.numpy() - gram).max() < 1e-4 * np.abs(gram).max()
    assert np.abs(by_mlp.cross.numpy() - cross).max() < 1e-4 * np.abs(cross).max()


def test_a_ridge_is_in_units_of_the_mean_diagonal_and_spares_the_constant() -> None:
    rows, wanted = random(50, 4), random(50, 3, seed=1)
    gram, cross = rows.T @ rows, rows.T @ wanted
    penalty = 0.5 * gram.diagonal()[:3].mean() * torch.tensor([1.0, 1, 1, 0]).double()
    expected = torch.linalg.solve(gram + torch.diag(penalty), cross)
    assert torch.allclose(regress(gram, cross, 0.5, n_constants=1), expected)


@pytest.mark.parametrize("width", [8, 24, 9, 576])
def test_the_basis_is_orthogonal_and_spreads(width: int) -> None:
    basis = patch.basis(width)
    assert torch.allclose(basis @ basis.T, torch.eye(width).double(), atol=1e-12)
    assert basis.abs().max() < 1
    assert torch.equal(basis, patch.basis(width))


def collected(x: Tensor, z: Tensor, mlp: Tensor | None = None, **wanted: Any) -> Statistics:
    found = Statistics(x.shape[-1], epsilon=EPSILON, **wanted)
    for part in range(0, len(x), 100):
        rows = slice(part, part + 100)
        found.add(x[rows], None if mlp is None else mlp[rows], z[rows])
    return found


def nearest(made: list[tuple[str, Map]], x: Tensor, z: Tensor, mlp: Tensor | None = None) -> float:
    """Relative error of the first candidate, the one with the smallest ridge."""
    return float((made[0][1].apply(x.float(), mlp) - z).norm() / z.norm())


def test_what_a_repair_can_express_it_finds() -> None:
    x, matrix = random(500, 16), 0.3 * random(16, 16, seed=1)
    constant = random(16, seed=2)
    z = x + constant
    assert nearest(bias.fit(collected(x, z)), x, z) < 1e-6
    z = 1.7 * x
    assert nearest(scale.fit(collected(x, z)), x, z) < 1e-6
    z = x + normed(x, EPSILON) @ matrix + constant
    assert nearest(ghost.fit(collected(x, z, features="normed")), x, z) < 1e-3
    mlp = 0.5 * random(500, 16, seed=3)
    z = x + mlp @ matrix
    found = collected(x, z, mlp, features="mlp")
    exact = MapOutput(regress(found.gram, found.cross, 1e-12))
    assert nearest([("", exact)], x, z, mlp.float()) < 1e-6
    assert nearest(least_squares.fit(found), x, z, mlp.float()) < 0.01


def test_a_patch_scales_the_coordinates_of_the_rotated_basis() -> None:
    basis = patch.basis(12)
    factors = torch.linspace(0.5, 2, 12).double()
    x = random(400, 12)
    z = (x @ basis) * factors @ basis.T
    found = collected(x, z, features="normed", basis=basis)
    assert torch.allclose(x @ patch.patch(found), z)
    error = nearest(patch.fit(found), x, z)
    assert error < 0.5 * nearest([("none", Scale(1.0))], x, z)  # the norm loses each row's length


MAPS: dict[str, Callable[[int], Map]] = {
    "shift": lambda width: Shift(random(width)),
    "scale": lambda width: Scale(1.6),
    "output": lambda width: MapOutput(0.1 * random(width, width)),
    "slot": lambda width: Slot(0.1 * random(width, width), random(width, seed=1), EPSILON),
}
LLAMAS = ("llama", "llama-untied")
PLAIN = ("llama", "llama-untied", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "phi3")
HOLD = {
    "shift": (*LLAMAS, "granite"),
    "slot": LLAMAS,
    "scale": PLAIN,
    "output": (*PLAIN, "granite"),
}


@pytest.mark.parametrize(
    ("kind", "model"), [(kind, model) for kind, models in HOLD.items() for model in models]
)
def test_a_folded_map_computes_what_the_map_does_between_layers(
    kind: str, model: str, tmp_path: Path
) -> None:
    original = Checkpoint.open(make_zoo_model(model, tmp_path / model))
    plan = PrunePlan(8, (2, 3, 5), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    assert refusal(pruned, kind) is None
    maps = [(gap, MAPS[kind](64)) for gap in boundaries(plan)]
    out = tmp_path / "out"
    out.mkdir()
    made, noted = write_repaired(original, pruned, plan, maps, out)
    epsilon = float(pruned.text["rms_norm_eps"])
    expected = load(pruned.path)
    for gap, map_ in maps:
        if isinstance(map_, MapOutput):
            change = map_.change.float() / float(pruned.text.get("residual_multiplier") or 1)
            expected.model.layers[gap.position - 1].mlp.register_forward_hook(
                lambda _, __, given, change=change: given + given @ change
            )
        else:
            if isinstance(map_, Slot):
                map_ = Slot(map_.matrix, map_.constant, epsilon)
            expected.model.layers[gap.position].register_forward_pre_hook(
                lambda _, given, map_=map_: (map_.apply(given[0], None), *given[1:])
            )
    found = logits(load(made.path))
    assert (found - logits(expected)).abs().max() < 1e-4 * found.abs().max()
    assert (found - logits(load(pruned.path))).abs().max() > 1e-2 * found.abs().max()
    assert made.n_layers == len(noted.keep) == 5 + 2 * (kind == "slot")
    assert made.removed["attention"] == ((2, 4) if kind == "slot" else ())


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2"])
def test_a_refitted_layer_is_the_old_one_with_another_down_projection(
    model: str, tmp_path: Path
) -> None:
    original = Checkpoint.open(make_zoo_model(model, tmp_path / model))
    plan = PrunePlan(8, (2, 3, 5), "explicit")
    pruned = cut(original, plan, tmp_path / "cut")
    gap = boundaries(plan)[0]
    down = 0.3 * random(96, 64)
    out = tmp_path / "out"
    out.mkdir()
    made, noted = write_repaired(original, pruned, plan, [(gap, OwnMlp(3, down))], out)
    expected = load(original.path)
    layer = expected.model.layers[3]
    layer.mlp.down_proj.weight.data = down.T.float()
    for name, parameter in layer.self_attn.named_parameters():
        if name.startswith("o_proj"):
            parameter.data.zero_()
    for index in (2, 5):
        expected.model.layers[index].register_forward_hook(lambda _, given, __: given[0])
    assert (logits(load(made.path)) - logits(expected)).abs().max() < 1e-5
    assert (noted.drop, noted.attention) == ((2, 5), (3,))
    assert made.removed["attention"] == (2,)
    with torch.inference_mode():
        whole = LayerwiseModel(original, "float32")
        activate = partial(whole.mlp_activations, 3)
        hidden = random(2, 5, 64).float()
        step = OwnMlp(3, down, None, activate).apply(hidden, None) - hidden
        expected_step = layer.mlp(layer.post_attention_layernorm(hidden))
    assert torch.allclose(step, expected_step, atol=1e-5)


def test_a_refit_is_ridge_regression_to_the_old_weights() -> None:
    x, activations, old = random(300, 8), random(300, 12, seed=1), random(12, 8, seed=2)
    wanted, offset = old + random(12, 8, seed=3), random(8, seed=4)
    z = x + activations @ wanted + offset
    found = Statistics(8, features="own", start=old, offset=offset)
    found.add(x, activations, z)
    downs = {label: map_.down for label, map_ in refit.fit(found) if isinstance(map_, OwnMlp)}
    assert torch.equal(downs["as it was"], old)
    errors = [float((down - wanted).norm() / (old - wanted).norm()) for down in downs.values()]
    assert errors[1] < 0.05
    assert errors[1] < errors[2] < errors[3] < errors[0] == 1


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
