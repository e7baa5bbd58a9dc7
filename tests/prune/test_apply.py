from __future__ import annotations

import copy
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.disk import require_space
from shortstack.errors import ShortstackError
from shortstack.prune import PrunePlan, apply_plan, predict_prune
from shortstack.prune.apply import prepare
from shortstack.shards import ShardReader, ShardWriter

PLAN = PrunePlan(5, (1, 3), "explicit")
TOKENS = torch.arange(24).reshape(2, 12) % 96


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)


def cut_in_memory(model: Any, plan: PrunePlan) -> Any:
    """The oracle: the loaded model with the layers taken out and renumbered for the cache."""
    model = copy.deepcopy(model)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in plan.keep)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(plan.keep)
    return model


@torch.inference_mode()
def logits_through_the_cache(model: Any) -> Tensor:
    """Logits of a prefill, then of the rest decoded token by token."""
    first = model(input_ids=TOKENS[:, :9], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for at in range(9, TOKENS.shape[1]):
        step = model(input_ids=TOKENS[:, at : at + 1], past_key_values=cache, use_cache=True)
        steps.append(step.logits)
        cache = step.past_key_values
    return torch.cat(steps, dim=1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "pruned"
    folder.mkdir()
    return folder


def test_a_cut_folder_computes_what_the_cut_model_computes(any_model: Path, out: Path) -> None:
    pruned = apply_plan(Checkpoint.open(any_model), PLAN, out)
    assert pruned.n_layers == 3
    expected = logits_through_the_cache(cut_in_memory(load(any_model), PLAN))
    assert torch.equal(logits_through_the_cache(load(out)), expected)


def test_a_cut_changes_the_trained_model(tiny: Path, out: Path) -> None:
    apply_plan(Checkpoint.open(tiny), PrunePlan(6, (2,), "explicit"), out)
    with torch.inference_mode():
        assert not torch.allclose(load(out)(TOKENS).logits, load(tiny)(TOKENS).logits, atol=0.1)


def test_weights_keep_type_and_bytes(make_model: Callable[..., Path], out: Path) -> None:
    original = Checkpoint.open(make_model("llama-untied", dtype=torch.bfloat16))
    pruned = apply_plan(original, PLAN, out)
    with ShardReader(original) as before, ShardReader(pruned) as after:
        for new, source in prepare(original, PLAN).source.items():
            assert pruned.tensors[new].dtype == "BF16"
            assert b"".join(after.chunks(new)) == b"".join(source.chunks(before))


def test_tokenizer_files_are_copied_byte_for_byte(any_model: Path, out: Path) -> None:
    original = Checkpoint.open(any_model)
    pruned = apply_plan(original, PLAN, out)
    assert len(original.tokenizer_files) >= 3
    for before, after in zip(original.tokenizer_files, pruned.tokenizer_files, strict=True):
        assert (before.name, before.read_bytes()) == (after.name, after.read_bytes())


def test_the_plan_lies_beside_the_result(any_model: Path, out: Path) -> None:
    apply_plan(Checkpoint.open(any_model), PLAN, out)
    assert PrunePlan.from_json((out / "plan.json").read_text()) == PLAN


def test_predicted_size_is_the_written_size(any_model: Path, out: Path) -> None:
    original = Checkpoint.open(any_model)
    predicted = predict_prune(original, PLAN)
    pruned = apply_plan(original, PLAN, out)
    assert predicted["output_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert predicted["n_params"] == pruned.n_params
    assert predicted["n_layers"] == pruned.n_layers


def test_shards_in_give_shards_out_and_the_same_model(
    make_model: Callable[..., Path], out: Path
) -> None:
    original = Checkpoint.open(make_model("llama-untied", shard="30KB"))
    assert len(original.shards) > 1
    surgery = prepare(original, PLAN, max_shard=20_000)
    with ShardReader(original) as reader, ShardWriter(out, surgery.layout) as writer:
        for name in writer.names:
            writer.write(name, surgery.source[name].chunks(reader))
    (out / "config.json").write_text(surgery.config_text)
    written = sum(file.stat().st_size for file in out.iterdir() if file.name != "config.json")
    assert written == surgery.layout.n_bytes
    assert len(Checkpoint.open(out).shards) > 1
    expected = cut_in_memory(load(original.path), PLAN)
    with torch.inference_mode():
        assert torch.equal(load(out)(TOKENS).logits, expected(TOKENS).logits)


def test_progress_counts_tensors_to_the_end(any_model: Path, out: Path) -> None:
    calls: list[tuple[int, int]] = []
    apply_plan(Checkpoint.open(any_model), PLAN, out, progress=lambda *at: calls.append(at))
    assert calls[-1][0] == calls[-1][1] == len(calls)


def test_a_plan_for_another_depth_is_refused(tiny: Path, out: Path) -> None:
    with pytest.raises(ShortstackError, match="the plan is for 5 layers, .* has 6"):
        apply_plan(Checkpoint.open(tiny), PLAN, out)
    assert not list(out.iterdir())


def test_a_full_disk_is_said_in_one_line(tiny: Path, out: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shortstack.checkpoint import Checkpoint\n"
        "from shortstack.prune import PrunePlan, apply_plan\n"
        "from shortstack.errors import ShortstackError\n"
        "try: apply_plan(Checkpoint.open(Path(sys.argv[1])), PrunePlan(6, (2,), 'explicit'),"
        " Path(sys.argv[2]))\n"
        "except ShortstackError as error: print(error)\n"
    )
    limited = subprocess.run(
        [sys.executable, "-c", code, str(tiny), str(out)],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert limited.stdout.startswith("disk full while writing"), limited.stderr


def test_a_disk_too_small_is_refused_before_the_first_byte(out: Path) -> None:
    with pytest.raises(ShortstackError, match="disk full: .* MB are needed, .* MB free"):
        require_space(out, 2 * shutil.disk_usage(out).total)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncate", "truncated or not safetensors"),
        ("depth", "config.json disagrees with the tensors"),
        ("width", "config.json disagrees with the tensors"),
        ("family", "unknown architecture: model type 'gpt9'"),
        ("experts", "mixture-of-experts"),
        ("pickle", "is a pickle"),
    ],
)
def test_a_damaged_folder_is_refused(
    make_model: Callable[..., Path], damage: str, words: str
) -> None:
    folder = make_model("llama-tied")
    weights, config = folder / "model.safetensors", folder / "config.json"
    fields = json.loads(config.read_text())
    changes: dict[str, Any] = {
        "depth": {"num_hidden_layers": 6},
        "width": {"intermediate_size": 64},
        "family": {"model_type": "gpt9"},
        "experts": {"num_local_experts": 8},
    }
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    else:
        config.write_text(json.dumps({**fields, **changes[damage]}))
    with pytest.raises(ShortstackError, match=words):
        Checkpoint.open(folder)
