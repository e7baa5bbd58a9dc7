"""Folded into ordinary weights, a map computes what it does between layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.repaired import EPSILON, cut, load, logits, random
from tests.zoo import make_model as make_zoo_model

from shortstack.checkpoint import Checkpoint
from shortstack.prune import PrunePlan
from shortstack.prune.calibrate import LayerwiseModel
from shortstack.prune.repair.boundaries import boundaries
from shortstack.prune.repair.fold import write_repaired
from shortstack.prune.repair.maps import Map, MapOutput, OwnMlp, Scale, Shift, Slot
from shortstack.prune.repair.support import refusal

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
