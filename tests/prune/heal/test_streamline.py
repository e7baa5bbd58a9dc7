"""One trained layer stands for a run: chosen as the paper says, better than nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.healing import LENGTH, Windows, read, settings

from shortstack import cli
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.pretrained import load
from shortstack.prune.heal.model import across
from shortstack.prune.streamline import most_alike_run, plan_run, streamline


def test_the_run_is_the_one_of_highest_mean_cosine(original: Checkpoint, windows: Windows) -> None:
    first, cosines = most_alike_run(original, windows[1], 3, "float32")
    model, tokens, states = load(original.path, torch.float32), torch.tensor(windows[1]), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        model(tokens)
    wanted = [
        torch.cosine_similarity(states[at], states[at + 3], dim=-1).mean().item() for at in range(4)
    ]
    assert cosines == pytest.approx(wanted, abs=1e-5)
    assert first == max(range(4), key=wanted.__getitem__)


def test_a_replacement_is_as_deep_as_none(original: Checkpoint, windows: Windows) -> None:
    plans = {kind: plan_run(original, windows[1], 2, kind) for kind in ("layer", "swiglu", "none")}
    assert {len(plan.drop) for plan in plans.values()} == {2}
    first, last = plans["layer"].facts["run"]
    assert plans["layer"].drop == tuple(range(first + 1, last + 1))
    assert plans["swiglu"].attention == (first,)


def test_hidden_states_across_a_run(original: Checkpoint, windows: Windows) -> None:
    model, tokens = load(original.path, torch.float32), torch.tensor(windows[1][:2])
    with torch.no_grad():
        inputs, named, wanted = across(model, tokens, 2, 3)
        states = inputs
        for layer in model.model.layers[2:4]:
            output = layer(states, **named)
            states = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(states, wanted)
    assert (inputs - wanted).abs().max() > 0


@pytest.mark.parametrize("replacement", ["layer", "swiglu"])
@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_training_the_replacement_helps(
    original: Checkpoint, windows: Windows, tmp_path: Path, objective: str, replacement: str
) -> None:
    plan = plan_run(original, windows[1], 2, replacement)
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    made, facts = streamline(
        *(original, plan, *windows, work, out, settings()), objective=objective
    )
    assert facts["perplexity_after"] < facts["perplexity_before"]
    losses = [point["loss"] for point in facts["history"][1:]]  # each of other windows
    assert min(losses[1:]) < losses[0]
    first = plan.facts["run"][0]
    before, after = read(Checkpoint.open(work / "cut")), read(made)
    changed = {made.family.layer_of(name) for name in before if before[name] != after[name]}
    assert changed == {first}
    assert made.n_layers == 4
    assert made.removed["attention"] == ((first,) if replacement == "swiglu" else ())


def test_the_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        *("streamline", str(tiny), "--drop", "2", "--text", "spdx", "-o", str(out)),
        *("--tokens", str(8 * LENGTH), "--window-tokens", str(LENGTH), "--batch-windows", "4"),
        *("--selection-windows", "4", "--device", "cpu", "--json"),
    ]
    assert cli.main([*command, "--replacement", "none"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["perplexity_after"]) == (0, facts["perplexity_before"])
    assert Checkpoint.open(out).n_layers == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert cli.main([*command, "--objective", "lm"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize(("drop", "kind", "said"), [(6, "none", "leaves"), (2, "ffn", "swiglu")])
def test_what_cannot_be_done_is_refused(
    original: Checkpoint, windows: Windows, drop: int, kind: str, said: str
) -> None:
    with pytest.raises(ShortstackError, match=said):
        plan_run(original, windows[1], drop, kind)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"--drop": "6", "--replacement": "none"}, "leaves nothing of the 6 layers"),
        ({"--objective": "nse"}, "Did you mean 'mse'?"),
        ({"--replacement": "ffn"}, "unknown replacement 'ffn'"),
        ({"--device": "tpu"}, "unknown device 'tpu'"),
        ({"--rate": "nan"}, "--rate is nan; it must be a number above 0"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    given: dict[str, str],
    said: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {"--drop": "2", "--text": "spdx", "--tokens": "64", **given}
    words = [word for pair in asked.items() for word in pair]
    assert cli.main(["streamline", str(tiny), *words, "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()  # no bar: refused before the model runs
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())
