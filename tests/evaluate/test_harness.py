"""lm-evaluation-harness gets from our model what it gets from its own, on the same rows."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack.cli import main
from shortstack.evaluate.choice import score_choices
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.harness_command import TASKS, with_tasks
from shortstack.evaluate.torch_scorer import TorchScorer
from shortstack.questions import open_questions

lm_eval = pytest.importorskip("lm_eval")  # of the extra `harness`

# lm-evaluation-harness and datasets leave files open and call what is deprecated
pytestmark = pytest.mark.filterwarnings("ignore")


def harness(model: str, task: str, rows: Path, **model_args: Any) -> tuple[dict[str, Any], Any]:
    """Metrics of a task, and the model's answers to each of its rows."""
    from lm_eval.tasks import TaskManager

    import shortstack.evaluate.harness  # noqa: F401  # registers the model

    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"file": str(rows)}
    )
    found = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=[task], task_manager=manager, device="cpu"
    )
    return found["results"][task], [sample["resps"] for sample in found["samples"][task]]


def own(tiny: Path, task: str, rows: Path) -> tuple[dict[str, Any], Any]:
    """By the harness's own model for PyTorch."""
    return harness("hf", task, rows, pretrained=str(tiny), dtype="float32", batch_size=4)


def nats(answers: Any) -> list[float]:
    """Every log-likelihood in the answers, in their order."""
    return [float(resp[0][0]) for row in answers for resp in row]


@pytest.fixture(scope="session")
def expected(tiny: Path, rows: dict[str, Path]) -> tuple[dict[str, Any], Any]:
    return own(tiny, "shortstack_choice", rows["choice"])


@pytest.mark.parametrize(
    ("form", "runtime"),
    [
        ("checkpoint", "pytorch"),
        ("gguf", "llama.cpp"),
        ("onnx", "onnxruntime"),
        ("onnx", "onnxruntime-genai"),
    ],
)
def test_accuracy_and_likelihoods_are_those_of_the_harnesss_own_model(
    form: str,
    runtime: str,
    expected: tuple[dict[str, Any], Any],
    exports: dict[str, Path],
    rows: dict[str, Path],
) -> None:
    found, answers = harness(
        "shortstack", "shortstack_choice", rows["choice"], path=str(exports[form]), runtime=runtime
    )
    wanted, theirs = expected
    assert found["acc,none"] == wanted["acc,none"]
    assert found["acc_norm,none"] == wanted["acc_norm,none"]
    tolerance = 0.05 if runtime == "llama.cpp" else 2e-3
    np.testing.assert_allclose(nats(answers), nats(theirs), atol=tolerance)


def test_shortstack_eval_counts_as_the_harness_counts(
    expected: tuple[dict[str, Any], Any], tiny: Path, rows: dict[str, Path]
) -> None:
    with TorchScorer(tiny) as scorer:
        scored = score_choices(scorer, FolderCodec(tiny), open_questions(rows["choice"]))
    wanted, theirs = expected
    assert np.mean([row.right for row in scored]) == pytest.approx(wanted["acc,none"])
    assert np.mean([row.right_by_length for row in scored]) == pytest.approx(
        wanted["acc_norm,none"]
    )
    mine = [-one for row in scored for one in row.nats]
    np.testing.assert_allclose(mine, nats(theirs), atol=2e-3)


def test_whole_documents_and_answers_are_those_of_the_harnesss_own_model(
    tiny: Path, rows: dict[str, Path]
) -> None:
    """The document is longer than the model's context: windows follow one another."""
    wanted, theirs = own(tiny, "shortstack_text", rows["text"])
    found, mine = harness("shortstack", "shortstack_text", rows["text"], path=str(tiny))
    assert found["byte_perplexity,none"] == pytest.approx(wanted["byte_perplexity,none"], rel=1e-5)
    np.testing.assert_allclose(np.array(mine, float), np.array(theirs, float), rtol=1e-5)
    wanted, theirs = own(tiny, "shortstack_answers", rows["generation"])
    found, mine = harness("shortstack", "shortstack_answers", rows["generation"], path=str(tiny))
    assert mine == theirs
    assert found["exact_match,strip"] == wanted["exact_match,strip"]


def test_the_command_finds_model_and_tasks_without_a_network(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    words = ["--model", "shortstack", "--model_args", f"path={tiny}", "--tasks"]
    code = main(["lm-eval", *words, "shortstack_choice", "--output_path", str(tmp_path)])
    assert code == 0
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["shortstack_choice"]["sample_len"] == 8


def test_a_folder_of_tasks_of_ones_own_takes_the_place_of_ours() -> None:
    assert with_tasks(["--tasks", "a"]) == ["--tasks", "a", "--include_path", str(TASKS)]
    assert with_tasks(["run", "--include_path=b"]) == ["run", "--include_path=b"]
    assert with_tasks(["ls", "tasks"]) == ["ls", "tasks"]


@pytest.mark.parametrize(
    ("model_args", "task", "said"),
    [
        ("path=TMP", "shortstack_choice", "is no model"),
        ("path=TMP,dtipe=float32", "shortstack_choice", "Did you mean 'dtype'?"),
        ("threads=1", "shortstack_choice", "--model_args path=MODEL"),
        ("path=TMP", "shortstack_chioce", "Tasks not found: shortstack_chioce"),
    ],
)
def test_what_a_user_gets_wrong_is_refused_in_one_line(
    model_args: str, task: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = model_args.replace("TMP", str(tmp_path))
    words = ["--model", "shortstack", "--model_args", given, "--tasks"]
    assert main(["lm-eval", *words, task]) == 2
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("shortstack: ")]
    assert said in line
