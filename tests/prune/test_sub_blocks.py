"""Sub-blocks removed, layers merged or replaced: the folder loads in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families import REMOVED
from shortstack.prune import PrunePlan, apply_plan, cut_identity

TOKENS = torch.arange(1, 25)[None] * 3 % 96


@pytest.fixture
def original(make_model: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(make_model("llama-biases"))


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(TOKENS).logits
    return result


class Nothing(torch.nn.Module):
    """A sub-block that adds nothing to the residual stream."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self._attention = attention

    def forward(self, hidden_states: torch.Tensor, **_: object) -> object:
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self._attention else zero


def test_a_removed_sub_block_adds_nothing(original: Checkpoint, tmp_path: Path) -> None:
    plan = PrunePlan(5, (1,), "explicit", attention=(2,), mlp=(0, 4))
    pruned = apply_plan(original, plan, tmp_path)
    expected = load(original.path)
    layers = expected.model.layers
    layers[2].self_attn = Nothing(attention=True)
    layers[0].mlp = Nothing(attention=False)
    layers[4].mlp = Nothing(attention=False)
    del layers[1]
    expected.config.num_hidden_layers = 4
    for number, layer in enumerate(layers):
        if not isinstance(layer.self_attn, Nothing):
            layer.self_attn.layer_idx = number
    assert torch.allclose(logits(load(tmp_path)), logits(expected), atol=1e-6)
    assert not torch.allclose(logits(load(tmp_path)), logits(load(original.path)), atol=1e-2)
    assert pruned.removed == {"attention": (1,), "mlp": (0, 3)}
    assert json.loads((tmp_path / "config.json").read_text())[REMOVED] == {
        "attention": [1],
        "mlp": [0, 3],
    }


def test_a_second_cut_renumbers_what_the_first_removed(
    original: Checkpoint, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    once = apply_plan(original, PrunePlan(5, (), "explicit", attention=(1, 3)), first)
    twice = apply_plan(once, PrunePlan(5, (0, 1), "explicit", mlp=(4,)), second)
    assert twice.removed == {"attention": (1,), "mlp": (2,)}
    with pytest.raises(ShortstackError, match="nothing of layer 3 would be left"):
        apply_plan(once, PrunePlan(5, (), "explicit", mlp=(3,)), second)


def test_a_merge_is_the_weighted_sum_rounded_once(original: Checkpoint, tmp_path: Path) -> None:
    plan = PrunePlan(5, (3,), "explicit", merge={2: {2: 0.75, 3: 0.25}})
    pruned = apply_plan(original, plan, tmp_path)
    before = load_file(original.path / "model.safetensors")
    after = load_file(pruned.path / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    expected = 0.75 * before[name.format(2)] + 0.25 * before[name.format(3)]
    assert torch.allclose(after[name.format(2)], expected, atol=1e-7)
    assert torch.equal(after[name.format(3)], before[name.format(4)])


def block_of(original: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): tensor + 1
        for name, tensor in load_file(original.path / "model.safetensors").items()
        if name.startswith(prefix)
    }


def test_a_merge_beyond_the_type_of_the_weights_is_refused(
    original: Checkpoint, tmp_path: Path
) -> None:
    plan = PrunePlan(5, (3,), "explicit", merge={2: {2: 3e38, 3: 3e38}})
    with pytest.raises(ShortstackError, match="values that F32 cannot hold"):
        apply_plan(original, plan, tmp_path)


def test_a_layer_merged_or_replaced_gets_its_sub_blocks_back(
    original: Checkpoint, tmp_path: Path
) -> None:
    first, file = tmp_path / "first", tmp_path / "block.safetensors"
    first.mkdir()
    once = apply_plan(original, PrunePlan(5, (), "explicit", attention=(1, 2, 3)), first)
    save_file(block_of(original, 1), file)
    plan = PrunePlan(
        5,
        (0,),
        "explicit",
        replace={1: str(file)},
        merge={2: {2: 0.5, 3: 0.5, 4: 0.0}, 3: {3: 0.5, 4: 0.5}},
    )
    (tmp_path / "second").mkdir()
    assert apply_plan(once, plan, tmp_path / "second").removed == {"attention": (1,), "mlp": ()}


def test_another_content_of_a_replacement_is_another_cut(
    original: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "block.safetensors"
    plan = PrunePlan(5, (0,), "explicit", replace={2: str(file)})
    block = block_of(original, 2)
    save_file(block, file)
    before = cut_identity(plan)
    assert cut_identity(plan) == before
    save_file({name: tensor + 1 for name, tensor in block.items()}, file)
    assert cut_identity(plan) != before
    file.unlink()
    with pytest.raises(ShortstackError, match=r"no file .*block\.safetensors"):
        cut_identity(plan)


def test_a_replacement_with_a_tensor_too_many_is_refused(
    original: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "block.safetensors"
    save_file({**block_of(original, 2), "self_attn.q_norm.weight": torch.ones(8)}, file)
    plan = PrunePlan(5, (0,), "explicit", replace={2: str(file)})
    with pytest.raises(ShortstackError, match=r"'self_attn\.q_norm\.weight' is no tensor"):
        apply_plan(original, plan, tmp_path)


def test_a_replaced_layer_comes_from_the_file(original: Checkpoint, tmp_path: Path) -> None:
    block = block_of(original, 2)
    file, out = tmp_path / "block.safetensors", tmp_path / "out"
    out.mkdir()
    save_file(block, file)
    plan = PrunePlan(5, (0,), "explicit", replace={2: str(file)})
    pruned = apply_plan(original, plan, out)
    written = load_file(pruned.path / "model.safetensors")
    name = "self_attn.q_proj.weight"
    assert torch.equal(written[f"model.layers.1.{name}"], block[name])
    del block[name]
    save_file(block, file)
    with pytest.raises(ShortstackError, match=f"has no tensor '{name}'"):
        apply_plan(original, plan, out)


def test_layers_of_other_shapes_are_not_merged(make_model: Callable[..., Path]) -> None:
    with pytest.raises(ShortstackError, match="there is no layer 7"):
        PrunePlan(5, (), "explicit", merge={1: {7: 1.0}})
