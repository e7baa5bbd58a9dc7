"""A model with exits in memory and on disk: every family, every depth, its own slots."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.exits import make_exits
from tests.zoo import NAMES, make_model

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.exits.folder import ExitFolder, check_exits, read_exits
from shortstack.exits.model import open_exits
from shortstack.pretrained import load
from shortstack.prune.exits.cut import exit_cut, write_exit

TOKENS = torch.arange(1, 81).reshape(2, 40)
EXIT = 3


@pytest.fixture(scope="module")
def exits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ExitFolder:
    return make_exits(tiny, tmp_path_factory.mktemp("exits") / "exits")


@pytest.mark.parametrize("name", NAMES)
def test_every_family_runs_at_an_exit_as_its_exported_model_does(name: str, tmp_path: Path) -> None:
    base = make_model(name, tmp_path / "base")
    folder = make_exits(base, tmp_path / "exits", (EXIT,))
    plain = load(base, torch.float32)
    opened = open_exits(folder)
    (tmp_path / "cut").mkdir()
    cut = write_exit(folder.open_base(), folder, EXIT, tmp_path / "cut")
    assert cut.n_layers == EXIT + 1
    ordinary = load(cut.path, torch.float32)
    slots = opened.new_slots()
    with torch.inference_mode():
        wanted = ordinary(input_ids=TOKENS, use_cache=False).logits
        parts = [
            opened.at(EXIT)(input_ids=part, past_key_values=slots.at(EXIT), use_cache=True).logits
            for part in TOKENS.split((30, 1, 9), 1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=1e-5)
        whole = opened.at(opened.n_layers)(input_ids=TOKENS, use_cache=False).logits
        assert torch.equal(whole, plain(input_ids=TOKENS, use_cache=False).logits)
        states = _states(opened.model, EXIT)
        assert torch.equal(opened.logits(states, EXIT), opened.at(EXIT)(input_ids=TOKENS).logits)


def _states(model: Any, behind: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, named: Any) -> None:
        seen.append(args[0] if args else named["hidden_states"])

    handle = model.get_decoder().layers[behind].register_forward_pre_hook(note, with_kwargs=True)
    model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return seen[0]


def test_a_copy_of_the_last_layer_behind_all_others_is_the_model(
    tiny: Path, tmp_path: Path
) -> None:
    from shortstack.exits.model import base_tensors, with_tensors

    model = load(tiny, torch.float32)
    last = len(model.get_decoder().layers) - 1
    opened = with_tensors(model, {last: base_tensors(model, Checkpoint.open(tiny))})
    with torch.inference_mode():
        made = opened.at(last)(input_ids=TOKENS).logits
        assert torch.equal(made, model(input_ids=TOKENS).logits)


def test_depths_share_the_slots_of_the_first_layers_and_have_their_own(exits: ExitFolder) -> None:
    opened = open_exits(exits)
    slots = opened.new_slots()
    with torch.inference_mode():
        opened.at(4)(input_ids=TOKENS, past_key_values=slots.at(4), use_cache=True)
        shallow, deep = slots.at(2), slots.at(4)
        assert shallow.layers[:2] == deep.layers[:2]
        assert shallow.layers[2] is not deep.layers[2]
        assert deep.layers[4].get_seq_length() == 40
        assert shallow.layers[2].get_seq_length() == 0
        slots.crop(11)
        assert [layer.get_seq_length() for layer in deep.layers] == [11] * 5
        again = opened.at(4)(input_ids=TOKENS[:, 11:], past_key_values=deep, use_cache=True).logits
        wanted = opened.at(4)(input_ids=TOKENS, use_cache=False).logits[:, 11:]
    torch.testing.assert_close(again, wanted, atol=2e-5, rtol=1e-5)


def test_an_exit_in_steps_from_the_bases_states(exits: ExitFolder) -> None:
    opened = open_exits(exits)
    slots = opened.new_slots()
    with torch.inference_mode():
        states = _states(opened.model, 2)
        parts = [opened.logits(part, 2, slots.head(2)) for part in states.split((25, 15), 1)]
        wanted = opened.logits(states, 2)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["norm-only", "none"])
def test_exits_without_a_layer_run_k_layers(tiny: Path, tmp_path: Path, init: str) -> None:
    folder = make_exits(tiny, tmp_path / "exits", (2,), init)
    opened = open_exits(folder)
    (tmp_path / "cut").mkdir()
    cut = write_exit(folder.open_base(), folder, 2, tmp_path / "cut")
    assert cut.n_layers == folder.layers_at(2) == 2
    with torch.inference_mode():
        wanted = load(cut.path, torch.float32)(input_ids=TOKENS).logits
        assert torch.equal(opened.at(2)(input_ids=TOKENS).logits, wanted)
        assert torch.equal(opened.logits(_states(opened.model, 2), 2), wanted)


def test_the_plan_of_an_exit_says_what_is_written(exits: ExitFolder, tmp_path: Path) -> None:
    base = exits.open_base()
    planned = exit_cut(base, exits, 4).checkpoint(base, exits, 4)
    written = write_exit(base, exits, 4, tmp_path)
    assert {n: (i.dtype, i.shape) for n, i in planned.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in written.tensors.items()
    }
    assert planned.config == written.config
    assert planned.n_layers == 5


def test_exits_may_lie_in_the_models_own_folder(
    tiny: Path, exits: ExitFolder, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    for name in ("exits.json", "exits.safetensors"):
        shutil.copyfile(exits.path / name, tmp_path / "model" / name)
    base = Checkpoint.open(tmp_path / "model")
    assert base.sha256 == exits.base_sha256
    assert read_exits(tmp_path / "model").open_base().path == tmp_path / "model"


def test_exits_of_another_model_are_refused(exits: ExitFolder, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other")
    with pytest.raises(ShortstackError, match="was made for another model than"):
        read_exits(exits.path, other).open_base()
    with pytest.raises(
        ShortstackError, match="nowhere holds no model, which .* needs. Name its folder"
    ):
        read_exits(exits.path, tmp_path / "nowhere").open_base()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema": 9}, "has schema 9, this version reads 1"),
        ({"n_layers": 3}, "no exit behind 4 layers: the model has 3"),
        ({"exits": [4, 4]}, "must be named once each"),
        ({"exits": "all"}, "is damaged"),
        ({"init": "lats"}, "Did you mean 'last'"),
        ({"base": None}, "is damaged"),
        ({"exits": ["2", 4]}, "must be whole numbers"),
        ({"exits": [True, 4]}, "must be whole numbers"),
        ({"schema": "x" * 9999}, "has schema .{9,70}, this version reads 1"),
        ({"base": {"sha256": "0", "path": "x" * 9999}}, "path has 9999 characters"),
        ({"tensors_sha256": "0"}, "its checksum is wrong"),
    ],
)
def test_a_changed_folder_is_refused(
    exits: ExitFolder, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    shutil.copytree(exits.path, tmp_path / "copy")
    data = json.loads((tmp_path / "copy" / "exits.json").read_text())
    (tmp_path / "copy" / "exits.json").write_text(json.dumps({**data, **changed}))
    with pytest.raises(ShortstackError, match=said):
        read_exits(tmp_path / "copy")


@pytest.mark.parametrize("what", ["missing", "extra", "shape"])
def test_tensors_that_are_not_those_of_the_exits_are_refused(
    exits: ExitFolder, tmp_path: Path, what: str
) -> None:
    from shortstack.checkpoint import hash_file

    copy = tmp_path / "copy"
    shutil.copytree(exits.path, copy)
    tensors = load_file(copy / "exits.safetensors")
    if what == "missing":
        del tensors["exits.2.norm.weight"]
    elif what == "extra":
        tensors["exits.3.norm.weight"] = torch.ones(64)
    else:
        tensors["exits.2.norm.weight"] = torch.ones(63)
    save_file(tensors, copy / "exits.safetensors")
    data = json.loads((copy / "exits.json").read_text())
    data["tensors_sha256"] = hash_file(copy / "exits.safetensors")
    (copy / "exits.json").write_text(json.dumps(data))
    with pytest.raises(ShortstackError, match=r"exits\.[23]\.norm\.weight"):
        read_exits(copy, exits.base).open_base()


def test_exits_outside_the_model_are_refused() -> None:
    for wrong in ((0,), (6,), (7, 2)):
        with pytest.raises(ShortstackError, match="Name exits from 1 to 5"):
            check_exits(wrong, 6)
    with pytest.raises(ShortstackError, match="Write e.g. 8,15,22"):
        check_exits((), 6)
    assert check_exits((5, 1), 6) == (1, 5)


def test_an_unknown_depth_names_the_known_ones(exits: ExitFolder) -> None:
    assert exits.depths == (2, 4, 6)
    assert [exits.layers_at(depth) for depth in exits.depths] == [3, 5, 6]
    with pytest.raises(ShortstackError, match="no depth 3. It has 2, 4, and 6, the whole model"):
        exits.check_depth(3)
