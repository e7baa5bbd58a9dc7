"""The gate: the right artifact passes; each kind of wrong one fails, and says by how much."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from shortstack.artifact import Artifact, ExportSpec
from shortstack.certify import ReferenceFacts, certify, compare, make_reference, verify
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, VerificationError
from shortstack.export import exporter, gguf_chunks
from shortstack.runtimes.pytorch import PyTorchSession
from shortstack.text import open_corpus, token_windows
from shortstack.verification import Bounds, Verification

LENGTH, COUNT = 64, 4
LICENCE = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
EXACT = Bounds.of(ExportSpec.parse("gguf:F32"), max_perplexity_ratio=None)


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.fixture(scope="module")
def windows(tiny: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    return token_windows(
        open_corpus("spdx").test, lambda text: tokenizer.encode(text).ids, LENGTH, COUNT
    )


@pytest.fixture(scope="module")
def reference(
    checkpoint: Checkpoint, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> ReferenceFacts:
    out = tmp_path_factory.mktemp("reference") / "reference.npy"
    return make_reference(checkpoint, windows, out, threads=1)


def exported(checkpoint: Checkpoint, out: Path, target: str = "gguf:F32") -> Artifact:
    spec = ExportSpec.parse(target)
    return exporter(spec.format).export(checkpoint, spec, out)


def edited(
    checkpoint: Checkpoint,
    folder: Path,
    edit: Callable[[dict[str, Any]], None] = lambda tensors: None,
    **config: Any,
) -> Checkpoint:
    """Another model that claims to be the same."""
    shutil.copytree(checkpoint.path, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {**checkpoint.config, **config}
    (folder / "config.json").write_text(json.dumps(fields))
    return Checkpoint.open(folder)


def swap_layers(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        other = name.replace(".layers.2.", ".layers.3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def test_the_reference_is_a_file_of_log_probabilities(reference: ReferenceFacts) -> None:
    log_probs = np.load(reference.path)
    assert log_probs.shape == (COUNT, LENGTH, 512)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-4)
    assert 3 < reference.perplexity < 60


def test_a_model_of_no_numbers_is_not_blamed_on_its_artifact(
    checkpoint: Checkpoint, windows: list[list[int]], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = math.nan

    spoiled = edited(checkpoint, tmp_path / "spoiled", spoil)
    with pytest.raises(ShortstackError, match=r"spoiled computes no numbers \(NaN\)"):
        make_reference(spoiled, windows, tmp_path / "reference.npy", threads=1)


@pytest.mark.parametrize("target", ["gguf:F32", "gguf:F16", "onnx:fp32"])
def test_the_right_artifact_passes_the_hard_bounds(
    target: str,
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
) -> None:
    artifact = exported(checkpoint, tmp_path, target)
    bounds = Bounds.of(artifact.spec, max_perplexity_ratio=99)
    seen: list[tuple[int, int]] = []
    found = certify(
        artifact,
        windows,
        reference,
        bounds,
        threads=1,
        text="Some text.",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.n_tokens == COUNT * LENGTH
    assert found.kl < 1e-5
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-3)
    assert found.reference_perplexity == pytest.approx(reference.perplexity, rel=1e-5)
    assert found.tokenizer_equal is True
    assert seen[-1] == (COUNT * LENGTH // 2, COUNT * LENGTH // 2)
    assert Verification.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("fault", ["layers swapped", "rope theta", "norm epsilon"])
@pytest.mark.parametrize("target", ["gguf:F32", "onnx:fp32"])
def test_an_export_of_another_model_fails(
    fault: str,
    target: str,
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    faults: dict[str, dict[str, Any]] = {
        "layers swapped": {"edit": swap_layers},
        "rope theta": rope,
        "norm epsilon": {"rms_norm_eps": 1e-2},
    }
    wrong = edited(checkpoint, tmp_path / "model", **faults[fault])
    (tmp_path / "out").mkdir()
    artifact = exported(wrong, tmp_path / "out", target)
    with pytest.raises(VerificationError, match="differs from its checkpoint: KL in prefill"):
        certify(artifact, windows, reference, EXACT, threads=1)


def test_an_unpermuted_q_fails(
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_chunks, "interleave_rope", lambda array, heads: array)
    artifact = exported(checkpoint, tmp_path)
    with pytest.raises(VerificationError, match="KL in prefill"):
        certify(artifact, windows, reference, EXACT, threads=1)


def test_a_wrong_tokenizer_fails(
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
) -> None:
    wrong = edited(checkpoint, tmp_path / "model")
    file = wrong.path / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    del data["model"]["merges"][-20:]  # some words fall into more tokens
    file.write_text(json.dumps(data))
    (tmp_path / "out").mkdir()
    artifact = exported(wrong, tmp_path / "out")
    with pytest.raises(VerificationError, match="cuts the text into other tokens"):
        certify(artifact, windows, reference, EXACT, threads=1, text=LICENCE)


class Forgetful(PyTorchSession):
    """Decodes every token as if it were the first: a cache that holds nothing."""

    def decode(self, token: int) -> NDArray[np.float32]:
        return self.prefill([token])


class Stale(PyTorchSession):
    """Decodes each token at the wrong place: the one before it is fed twice."""

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        logits = super().prefill(tokens, all_logits=all_logits)
        super().decode(tokens[-1])
        return logits


@pytest.mark.parametrize("broken", [Forgetful, Stale])
def test_a_broken_cache_fails_though_the_prefill_is_right(
    broken: type[PyTorchSession],
    tiny: Path,
    windows: list[list[int]],
    reference: ReferenceFacts,
) -> None:
    truth = np.load(reference.path)
    with broken(tiny, threads=1, context_tokens=LENGTH + 1) as session:
        found = Verification(
            runtime="broken",
            runtime_version="0",
            n_windows=COUNT,
            prefill_tokens=LENGTH // 2,
            tokenizer_equal=None,
            **compare(session, windows, truth, LENGTH // 2),
        )
    assert found.kl_prefill < 1e-6
    assert any("cached decoding" in words for words in found.failures(EXACT))
    # the gate of quantized files sees it, too
    assert any("cached decoding" in w for w in found.failures(Bounds(max_perplexity_ratio=1.01)))


def test_a_quantized_file_is_held_to_the_recipes_gate(
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
) -> None:
    artifact = exported(checkpoint, tmp_path, "gguf:Q4_0")
    found = verify(artifact, windows, reference, threads=1)
    assert 1e-3 < found.kl < 0.5
    ratio = max(found.perplexity_ratio, found.perplexity_ratio_decode)
    assert not found.failures(Bounds.of(artifact.spec, max_perplexity_ratio=ratio + 0.01))
    with pytest.raises(VerificationError, match=r"the gate is .* x.*perplexity .* against"):
        certify(
            artifact,
            windows,
            reference,
            Bounds.of(artifact.spec, max_perplexity_ratio=ratio - 0.01),
            threads=1,
        )


def figures(**changed: Any) -> Verification:
    good: dict[str, Any] = {
        "runtime": "r",
        "runtime_version": "1",
        "n_tokens": 100,
        "n_windows": 1,
        "prefill_tokens": 50,
        **dict.fromkeys(("kl", "kl_prefill", "kl_decode", "max_kl", "max_error"), 1e-6),
        **dict.fromkeys(("top1", "top1_prefill", "top1_decode"), 1.0),
        **dict.fromkeys(("perplexity", "reference_perplexity"), 20.0),
        **dict.fromkeys(("perplexity_decode", "reference_perplexity_decode"), 20.0),
        "tokenizer_equal": True,
    }
    return Verification(**{**good, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"kl_prefill": 2e-4},
        {"kl_decode": 2e-4},
        {"kl_decode": math.nan},
        {"top1_prefill": 0.98},
        {"top1_decode": math.nan},
        {"tokenizer_equal": False},
    ],
)
def test_each_figure_alone_can_fail_an_exact_file(changed: dict[str, Any]) -> None:
    assert not figures().failures(EXACT)
    assert len(figures(**changed).failures(EXACT)) == 1


@pytest.mark.parametrize("name", ["perplexity", "perplexity_decode"])
@pytest.mark.parametrize("value", [30.1, math.nan, math.inf])
def test_each_perplexity_alone_can_fail_a_quantized_file(name: str, value: float) -> None:
    gate = Bounds(max_perplexity_ratio=1.5)
    assert not figures().failures(gate)
    assert len(figures(**{name: value}).failures(gate)) == 1


def test_no_recipe_can_loosen_the_bounds_of_exact_precisions() -> None:
    for target in ("gguf:F32", "gguf:F16", "onnx:fp32"):
        bounds = Bounds.of(ExportSpec.parse(target), max_perplexity_ratio=1e9, max_kl=1e9)
        assert bounds == Bounds(max_kl=1e-4, min_top1=0.99)
    by_name = ExportSpec.parse("onnx:fp16", builder="genai")
    assert Bounds.of(by_name, max_perplexity_ratio=1e9).max_kl == 1e-4
    with_exact_head = ExportSpec.parse("gguf:F16", head="F32")
    assert Bounds.of(with_exact_head, max_perplexity_ratio=1e9).max_kl == 1e-4
    with_rounded_head = ExportSpec.parse("gguf:F16", head="Q4_0")
    assert Bounds.of(with_rounded_head, max_perplexity_ratio=2.0).max_kl is None


def test_a_check_without_a_bound_is_refused() -> None:
    with pytest.raises(ShortstackError, match="needs a bound"):
        Bounds.of(ExportSpec.parse("gguf:Q4_0"), max_perplexity_ratio=None)


def test_windows_that_do_not_fit_are_refused(
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
) -> None:
    with pytest.raises(ShortstackError, match="windows of equal length"):
        make_reference(checkpoint, [[1, 2, 3, 4], [1, 2, 3]], tmp_path / "r.npy", threads=1)
    artifact = exported(checkpoint, tmp_path)
    with pytest.raises(ShortstackError, match="Make the reference again"):
        verify(artifact, windows[:2], reference, threads=1)


def test_a_file_of_another_vocabulary_fails(
    checkpoint: Checkpoint,
    windows: list[list[int]],
    reference: ReferenceFacts,
    tmp_path: Path,
) -> None:
    def pad(tensors: dict[str, Any]) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = table.repeat(2, 1).contiguous()

    wrong = edited(checkpoint, tmp_path / "model", pad, vocab_size=1024)
    (tmp_path / "out").mkdir()
    artifact = exported(wrong, tmp_path / "out")
    with pytest.raises(VerificationError, match="has 1024 tokens"):
        certify(artifact, windows, reference, EXACT, threads=1)
