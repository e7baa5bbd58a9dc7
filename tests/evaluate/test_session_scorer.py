"""An artifact in its own runtime gets the scores of its checkpoint in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.runtimes.precision import exact
from tests.zoo import make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.evaluate.choice import score_choices
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.session_scorer import SessionScorer
from shortstack.evaluate.targets import Loading, Target, target_of
from shortstack.evaluate.torch_scorer import TorchScorer
from shortstack.export import exporter
from shortstack.manifest import write_manifest
from shortstack.questions import open_questions
from shortstack.runtimes import RUNTIMES, open_session

CONTEXT = 256


def tolerance(runtime: str) -> float:
    return 0.05 if runtime == "llama.cpp" else 1e-3  # its KV cache is half precision


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_choices_score_as_in_pytorch(
    runtime: str, tiny: Path, exports: dict[str, Path], rows: dict[str, Path]
) -> None:
    questions = open_questions(rows["choice"])
    codec = FolderCodec(tiny)
    with TorchScorer(tiny, max_tokens=CONTEXT) as scorer:
        wanted = score_choices(scorer, codec, questions)
    target = target_of(exports[RUNTIMES[runtime][0]], runtime=runtime)
    session = open_session(
        target.path, runtime, threads=1, context_tokens=CONTEXT, options=exact(runtime)
    )
    with SessionScorer(session, max_tokens=CONTEXT) as scorer:
        found = score_choices(scorer, target.codec(), questions)
    assert [row.n_tokens for row in found] == [row.n_tokens for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.nats, theirs.nats, atol=tolerance(runtime))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_windows_and_answers_are_those_of_pytorch(
    runtime: str, tiny: Path, exports: dict[str, Path]
) -> None:
    codec = FolderCodec(tiny)
    window = codec.encode("Permission is hereby granted, free of charge, to any person")[:24]
    with TorchScorer(tiny) as scorer:
        (nats,), probs = scorer.nats([window]), scorer.log_probs(window)
        answer = scorer.generate([window[:9], window], 8, lambda ids: False)
        short = scorer.generate([window], 8, lambda ids: len(ids) == 3)
    place = exports[RUNTIMES[runtime][0]]
    session = open_session(place, runtime, threads=1, context_tokens=64, options=exact(runtime))
    with SessionScorer(session, max_tokens=64) as other:
        (found,) = other.nats([window])
        np.testing.assert_allclose(other.log_probs(window), probs, atol=tolerance(runtime))
        assert other.generate([window[:9], window], 8, lambda ids: False) == answer
        assert other.generate([window], 8, lambda ids: len(ids) == 3) == short
    assert found.n_tokens == nats.n_tokens == len(window) - 1
    assert found.sum_nats == pytest.approx(nats.sum_nats, abs=tolerance(runtime))


def test_a_shared_beginning_stays_in_the_cache(exports: dict[str, Path]) -> None:
    """Resumed or run anew, a row's score is the same; the second prompt is really resumed."""
    context, file = list(range(10, 80)), exports["gguf"]
    pairs = [(context, [100, 101]), (context, [102]), (context[:40], [7]), (context, [103, 4, 5])]
    alone = []
    for pair in pairs:
        session = open_session(file, "llama.cpp", threads=1, context_tokens=128)
        with SessionScorer(session, max_tokens=128) as scorer:
            alone += scorer.log_likelihoods([pair])
    session = open_session(file, "llama.cpp", threads=1, context_tokens=128)
    with SessionScorer(session, max_tokens=128) as scorer:
        found = scorer.log_likelihoods(pairs)
        assert scorer._run([*context, 100], first=69).shape == (2, 512)
    np.testing.assert_allclose(
        [one.sum_nats for one in found], [one.sum_nats for one in alone], atol=1e-2
    )
    assert [one.n_tokens for one in found] == [2, 1, 1, 3]


@pytest.mark.parametrize(
    ("name", "form"), [("gemma3", "gguf:F32"), ("mistral-window", "onnx:fp32")]
)
def test_sliding_windows_do_not_spoil_what_is_kept(name: str, form: str, tmp_path: Path) -> None:
    """Prompts of several windows: going back must not lose keys that are still to be seen."""
    make_model(name, tmp_path / name)
    spec = ExportSpec.parse(form)
    (tmp_path / "made").mkdir()
    made = exporter(spec.format).export(Checkpoint.open(tmp_path / name), spec, tmp_path / "made")
    draw = np.random.default_rng(3)
    context = draw.integers(3, 512, 60).tolist()
    pairs = [(context, draw.integers(3, 512, 1 + 9 * k).tolist()) for k in range(5)]
    with TorchScorer(tmp_path / name) as torch_scorer:
        wanted = torch_scorer.log_likelihoods(pairs)
    target = target_of(made.path)
    with target.open(Loading(context_tokens=112)) as scorer:
        found = scorer.log_likelihoods(pairs)
    np.testing.assert_allclose(
        [one.sum_nats / one.n_tokens for one in found],
        [one.sum_nats / one.n_tokens for one in wanted],
        atol=0.02,
    )


def test_the_tokenizer_of_a_gguf_file_is_the_checkpoints(
    tiny: Path, exports: dict[str, Path]
) -> None:
    ours, theirs = FolderCodec(tiny), target_of(exports["gguf"]).codec()
    assert (ours.start, ours.end, ours.prefix) == (theirs.start, theirs.end, theirs.prefix)
    for text in ("Permission is  hereby\ngranted", "naïve – ½ 🙂", ""):
        assert ours.encode(text) == theirs.encode(text)
        assert theirs.decode(theirs.encode(text)) == text


def test_the_folder_of_an_export_tells_the_hash_that_records_know(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    made = exporter("gguf").export(Checkpoint.open(tiny), ExportSpec("gguf", "F32"), folder)
    write_manifest(folder, "export", "key", {"artifact": made.to_dict()})
    target = target_of(folder)
    assert (target.export, target.artifact_sha256) == ("gguf-f32", made.sha256)
    assert Target.from_dict(target.to_dict()) == target
    assert target_of(made.path).artifact_sha256 is None
