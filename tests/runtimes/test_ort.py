"""What of an onnxruntime session crosses to the host, and what it says of a card's work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from shortstack.runtimes import open_session, ort

TOKENS = [1, 50, 60, 70, 300, 20, 19, 45]


def test_of_a_prompt_only_the_last_row_of_each_sequence_is_copied(files: dict[str, Path]) -> None:
    rows = np.array([TOKENS, TOKENS[::-1]], np.int64)
    with ort.open_session(files["onnx"], threads=1, context_tokens=16) as session:
        every = [session.prefill([*row], all_logits=True) for row in rows.tolist()]
        alone = session.prefill(TOKENS)
    with ort.open_session(files["onnx"], threads=1, context_tokens=16, batch=2) as session:
        both = session.prefill_rows(rows)
    np.testing.assert_array_equal(alone, every[0][-1])
    assert both.shape == (2, 512)
    np.testing.assert_allclose(both, [part[-1] for part in every], atol=1e-4)


def test_outputs_in_any_order_are_told_apart(files: dict[str, Path], tmp_path: Path) -> None:
    """Caches that are returned, not shared, are found by their binding, not by the graph."""
    from tests.runtimes.test_runtimes import concatenating_graph

    concatenating_graph(tmp_path)
    with open_session(tmp_path, "onnxruntime", threads=1, context_tokens=6) as session:
        expected = [session.prefill([1, 2]), session.decode(3), session.decode(4)]
    model = onnx.load(tmp_path / "model.onnx")
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))
    onnx.save(model, tmp_path / "model.onnx")
    with open_session(tmp_path, "onnxruntime", threads=1, context_tokens=6) as session:
        found = [session.prefill([1, 2]), session.decode(3), session.decode(4)]
    np.testing.assert_array_equal(found, expected)


def test_nodes_that_a_card_leaves_to_the_cpu_are_counted(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the CPU has them all; it is asked as a card is."""
    import onnxruntime

    monkeypatch.setattr(ort, "providers", lambda *_: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "check_in_force", lambda *_: None)
    session = ort._open(onnxruntime, files["onnx"], 1, ("cuda", 0))
    told: dict[str, Any] = ort._left_on_the_cpu(session)
    layers = sum(name.name.endswith(".key") for name in session.get_inputs())
    assert told["cpu_nodes"]["GroupQueryAttention"] == layers > 0
    assert told["nodes"] == sum(told["cpu_nodes"].values())
    with ort.open_session(files["onnx"], threads=1, context_tokens=4) as opened:
        assert "cpu_nodes" not in opened.info
