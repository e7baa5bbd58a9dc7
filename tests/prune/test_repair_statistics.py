"""The sums over tokens are those of all at once, and give the maps that they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.repaired import EPSILON, TOKENS, cut, load, random
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.prune import PrunePlan
from shortstack.prune.calibrate import LayerwiseModel
from shortstack.prune.repair import bias, ghost, least_squares, patch, refit, scale
from shortstack.prune.repair.boundaries import Boundary, boundaries
from shortstack.prune.repair.maps import Map, MapOutput, OwnMlp, Scale
from shortstack.prune.repair.statistics import Statistics, normed, regress
from shortstack.prune.repair.walk import Walk


def test_every_gap_of_a_cut_is_found() -> None:
    plan = PrunePlan(8, (0, 3, 4, 7), "explicit", attention=(5,))
    assert boundaries(plan) == (
        Boundary(0, 1, (0,)),
        Boundary(2, 5, (3, 4)),
        Boundary(3, 6, ()),
        Boundary(4, 8, (7,)),
    )


def states(original: Path, pruned: Path) -> list[np.ndarray]:
    """X, M and Z of a gap in front of layers 2 and 4, from transformers: float64, rows tokens."""
    whole, left = load(original), load(pruned)
    outputs: list[Tensor] = []
    left.model.layers[1].mlp.register_forward_hook(lambda _, __, made: outputs.append(made))
    with torch.inference_mode():
        tokens = torch.tensor(TOKENS)
        z = whole(tokens, output_hidden_states=True).hidden_states[4]
        x = left(tokens, output_hidden_states=True).hidden_states[2]
    return [part.flatten(0, 1).double().numpy() for part in (x, outputs[0], z)]


def test_the_sums_equal_those_of_all_hidden_states_at_once(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    original = Checkpoint.open(make_model("llama-tied"))
    pruned = cut(original, PrunePlan(5, (2, 3), "explicit"), tmp_path / "cut")
    x, m, z = states(original.path, pruned.path)
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
