"""Every method that chooses: counts, protection, repeatability, and what each one computes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.zoo import make_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.forecast import preview_cut
from shortstack.pretrained import attention_of, config_of
from shortstack.prune import METHODS, PrunePlan, apply_plan, planner
from shortstack.recipe import PruneRecipe
from shortstack.text import open_corpus
from shortstack.tokens import Encoder

CHOOSING = sorted(set(METHODS) - {"explicit"})
FLOAT32: dict[str, Any] = {"dtype": "float32"}


@pytest.fixture(scope="module")
def original(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.fixture(scope="module")
def windows(original: Checkpoint) -> list[list[int]]:
    return Encoder(original).windows(open_corpus("spdx").calibration, 32, 6)


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **attention_of(config_of(folder))
    )
    return model.eval()


@torch.inference_mode()
def loss(model: Any, windows: list[list[int]]) -> float:
    tokens = torch.tensor(windows)
    return float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def without(folder: Path, *dropped: int) -> Any:
    """The whole transformers model, layers taken out."""
    model = load(folder)
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(model.model.layers) if index not in dropped
    )
    return model


@torch.inference_mode()
def states_of(model: Any, windows: list[list[int]]) -> list[torch.Tensor]:
    """Before each layer, and after the last, before the final norm."""
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(input_ids=torch.tensor(windows), use_cache=False)
    return seen


@pytest.mark.parametrize("name", CHOOSING)
def test_a_method_keeps_the_ends_drops_the_count_and_repeats_itself(
    name: str, original: Checkpoint, windows: list[list[int]]
) -> None:
    asked = windows if METHODS[name].needs_text else []
    calls: list[tuple[int, int]] = []
    plans = [
        planner(name)(original, drop=3, windows=asked, progress=lambda *at: calls.append(at))
        for _ in range(2)
    ]
    plan = plans[0]
    lost = [*plan.drop, *plan.drop, *plan.attention, *plan.mlp]
    assert len(lost) == (3 if METHODS[name].sub_blocks else 6)
    assert set(lost) <= {1, 2, 3, 4}
    assert plan.method == name
    assert plans[1].identity == plan.identity
    assert PrunePlan.from_json(plan.to_json()) == plan
    if asked:
        assert {"unit", "tokens", "dtype", "layer_evaluations"} <= set(plan.facts)
        assert calls[-1][0] <= calls[-1][1]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("greedy", {"screen": -1}, "cannot try -1 candidates"),
        ("sub-block", {"screen": -1}, "cannot try -1 candidates"),
        ("repaired", {"screen": -1}, "cannot try -1 candidates"),
        ("repaired", {"repair": "biass"}, "unknown repair 'biass'. Did you mean 'bias'"),
        ("shapley", {"permutations": 0}, "cannot walk 0 permutations"),
        ("shapley", {"depth": -1}, "to depth -1"),
        ("laco", {"merge": 1}, "cannot merge 1 layers"),
        ("laco", {"interval": 0}, "at intervals of 0"),
        ("laco", {"protect_first": 4}, "cannot merge all 1 layers"),
        ("sub-block", {"protect_first": 5}, "0 may go"),
    ],
)
def test_an_option_without_sense_is_refused(
    name: str, options: dict[str, Any], words: str, original: Checkpoint
) -> None:
    with pytest.raises(ShortstackError, match=words):
        planner(name)(original, drop=1, windows=[[1, 2, 3]], **options)


def test_controls_look_at_nothing_but_the_count(original: Checkpoint) -> None:
    assert planner("every")(original, drop=2, windows=[]).drop == (2, 4)
    assert planner("every")(original, drop=4, windows=[]).drop == (1, 2, 3, 4)
    assert planner("last")(original, drop=2, windows=[], protect_last=0).drop == (4, 5)
    drawn = {planner("random")(original, drop=2, windows=[], seed=seed).drop for seed in range(9)}
    assert len(drawn) > 2


def test_runs_are_chosen_by_what_lies_between_their_ends(
    tiny: Path, original: Checkpoint, windows: list[list[int]]
) -> None:
    states = states_of(load(tiny), windows)
    angles, cosines = [], []
    for start in (1, 2, 3):
        before, after = states[start], states[start + 2]
        cosine = functional.cosine_similarity(before, after, dim=-1)
        angles.append((cosine[:, -1].arccos() / math.pi).mean().item())
        cosines.append(1 - cosine.mean().item())
    for name, expected in (("angular", angles), ("cosine-run", cosines)):
        plan = planner(name)(original, drop=2, windows=windows, **FLOAT32)
        assert plan.scores[1:4] == pytest.approx(expected, abs=1e-5)
        assert plan.scores[0] is plan.scores[4] is plan.scores[5] is None
        first = 1 + expected.index(min(expected))
        assert plan.drop == (first, first + 1)


def test_greedy_without_screening_is_brute_force_at_every_step(
    tiny: Path, original: Checkpoint, windows: list[list[int]]
) -> None:
    plan = planner("greedy")(original, drop=3, windows=windows, screen=0, **FLOAT32)
    gone: list[int] = []
    for step in plan.facts["path"]:
        left = [layer for layer in (1, 2, 3, 4) if layer not in gone]
        losses = [loss(without(tiny, *gone, layer), windows) for layer in left]
        assert step["drop"] == left[losses.index(min(losses))]
        assert step["score"] == pytest.approx(min(losses), abs=2e-6)
        gone.append(step["drop"])
    assert plan.drop == tuple(sorted(gone))
    assert plan.facts["perplexity"] == pytest.approx(math.exp(min(losses)), rel=1e-5)


def test_screening_tries_fewer_and_renews_what_it_passed_over(
    original: Checkpoint, windows: list[list[int]]
) -> None:
    whole, few = (
        planner("greedy")(original, drop=3, windows=windows, screen=screen, **FLOAT32)
        for screen in (0, 2)
    )
    assert (whole.facts["candidates_tried"], few.facts["candidates_tried"]) == (4 + 3 + 2, 3 * 2)
    assert few.facts["path"][0]["score"] >= whole.facts["path"][0]["score"]
    assert all(score is not None for score in few.scores[1:-1])


def test_taylor_is_the_sum_of_weights_times_gradients(
    tiny: Path, original: Checkpoint, windows: list[list[int]]
) -> None:
    model, tokens = load(tiny), torch.tensor(windows)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    expected = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        expected.append(sum((m.weight * m.weight.grad).abs().sum().item() for m in matrices))
    plan = planner("taylor")(original, drop=2, windows=windows)
    assert plan.scores == pytest.approx(expected, rel=1e-4)


def test_shapley_values_of_whole_walks_add_up_to_what_all_layers_are_worth(
    tiny: Path, original: Checkpoint, windows: list[list[int]]
) -> None:
    plan = planner("shapley")(original, drop=1, windows=windows, permutations=2, depth=4, **FLOAT32)
    worth = loss(without(tiny, 1, 2, 3, 4), windows) - loss(load(tiny), windows)
    assert sum(score for score in plan.scores if score is not None) == pytest.approx(
        worth, abs=1e-4
    )


def test_shallow_shapley_walks_begin_anew_from_the_whole_model(
    original: Checkpoint, windows: list[list[int]]
) -> None:
    alone = planner("perplexity")(original, drop=2, windows=windows, **FLOAT32)
    plan = planner("shapley")(original, drop=2, windows=windows, permutations=1, depth=1, **FLOAT32)
    assert plan.scores[1:-1] == pytest.approx(alone.scores[1:-1], abs=1e-5)


def test_laco_adds_the_differences_and_scores_the_model_it_will_be(
    original: Checkpoint, windows: list[list[int]], tmp_path: Path
) -> None:
    plan = planner("laco")(original, drop=3, windows=windows, merge=3, threshold=0.9, **FLOAT32)
    assert sum(len(step["drop"]) for step in plan.facts["path"]) == 3
    assert all(sum(weights.values()) == pytest.approx(1) for weights in plan.merge.values())
    (into, weights), *_ = plan.merge.items()
    pruned = apply_plan(original, plan, tmp_path)
    before = load_file(original.path / "model.safetensors")
    after = load_file(pruned.path / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    own = before[name.format(into)].float()
    expected = own + sum(
        weight * (before[name.format(source)].float() - own) for source, weight in weights.items()
    )
    written = after[name.format(plan.keep.index(into))]
    assert torch.allclose(written.float(), expected, atol=0.01, rtol=0.01)  # stored as bfloat16
    last = [states_of(load(folder), windows)[-1] for folder in (original.path, pruned.path)]
    norm = load(original.path).model.norm
    cosine = functional.cosine_similarity(norm(last[0]), norm(last[1]), dim=-1)[:, :-1].mean()
    assert plan.facts["path"][-1]["score"] == pytest.approx(cosine.item(), abs=5e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "olmo2", "phi3"])
def test_the_loss_of_a_sub_block_cut_is_that_of_the_cut_checkpoint(
    name: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(make_model(name, tmp_path / "model"))
    drawn = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    plan = planner("sub-block")(checkpoint, drop=6, windows=drawn, screen=3, **FLOAT32)
    assert 2 * len(plan.drop) + len(plan.attention) + len(plan.mlp) == 6
    out = tmp_path / "out"
    out.mkdir()
    pruned = apply_plan(checkpoint, plan, out)
    assert plan.facts["path"][-1]["score"] == pytest.approx(
        loss(load(pruned.path), drawn), abs=2e-5
    )


def test_sub_blocks_keep_what_gguf_needs_and_count_what_is_gone_already(
    original: Checkpoint, windows: list[list[int]], tmp_path: Path
) -> None:
    ends: dict[str, Any] = {"protect_first": 0, "protect_last": 0}
    plan = planner("sub-block")(original, drop=11, windows=windows, screen=2, **ends)
    assert (plan.drop, plan.mlp, plan.attention) == ((1, 2, 3, 4, 5), (0,), ())
    with pytest.raises(ShortstackError, match="cannot remove 12 of 12 sub-blocks: 11 may go"):
        planner("sub-block")(original, drop=12, windows=windows, **ends)
    once = apply_plan(original, PrunePlan(6, (), "explicit", attention=(2,)), tmp_path)
    twice = planner("sub-block")(once, drop=7, windows=windows, screen=2)
    assert twice.drop == (1, 2, 3, 4)


def test_the_divergence_of_unrepaired_cuts_is_that_of_the_logits(
    tiny: Path, original: Checkpoint, windows: list[list[int]]
) -> None:
    plan = planner("repaired")(
        original, drop=2, windows=windows, screen=0, repair="none", **FLOAT32
    )
    tokens = torch.tensor(windows)
    with torch.inference_mode():
        wanted = load(tiny)(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        found = {
            pair: functional.kl_div(
                without(tiny, *pair)(tokens, use_cache=False).logits[:, :-1].log_softmax(-1),
                wanted,
                log_target=True,
                reduction="sum",
            ).item()
            / wanted[..., 0].numel()
            for pair in itertools.combinations((1, 2, 3, 4), 2)
        }
    first, second = plan.facts["path"]
    partners = [pair for pair in found if first["drop"] in pair]
    assert plan.drop == min(partners, key=found.__getitem__)
    assert second["score"] == pytest.approx(found[plan.drop], abs=1e-5)


@pytest.mark.parametrize("repair", ["bias", "scale", "linear"])
def test_repairs_lower_the_divergence(
    repair: str, original: Checkpoint, windows: list[list[int]]
) -> None:
    bare, mended = (
        planner("repaired")(
            original, drop=1, windows=windows, screen=0, repair=name, **FLOAT32
        ).facts["path"][0]["score"]
        for name in ("none", repair)
    )
    assert 0 < mended < bare


def test_a_count_of_sub_blocks_may_exceed_the_layers(original: Checkpoint) -> None:
    expected = preview_cut(original, PruneRecipe(method="sub-block", drop=8))
    assert expected.n_layers == original.n_layers  # an upper bound of the size
    with pytest.raises(ShortstackError, match="cannot drop 12 of 6 layers"):
        preview_cut(original, PruneRecipe(method="sub-block", drop=12))
    with pytest.raises(ShortstackError, match="cannot drop 6 of 6 layers"):
        preview_cut(original, PruneRecipe(method="greedy", drop=6))
