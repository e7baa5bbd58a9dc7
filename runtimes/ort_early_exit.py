"""Answers that leave an ONNX decoder early: graph after graph, as long as none leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.early_exit.row import row_features
from shortstack.early_exit.rule import PROBE, Answer, Rule
from shortstack.early_exit.segments import Segment, read_segments
from shortstack.errors import MissingExtraError, ShortstackError, one_line

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Floats = NDArray[np.float32]


class OrtAnswerer:
    """A folder of segments open in onnxruntime on the CPU, one prompt at a time.

    Without a rule all segments are run. The check is a probe's, whose arrays the rule holds:
    onnxruntime gives states, numpy decides.
    """

    def __init__(self, folder: Path, rule: Rule | None = None, *, threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx", "running an ONNX model") from None
        self._found = read_segments(folder)
        self.n_layers = self._found.n_layers
        self._rule = rule
        if rule is not None:
            _check_rule(rule, self._found.cuts, folder)
        onnxruntime.set_default_logger_severity(4)  # what it has to say comes as an exception
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self._sessions = []
        for segment in self._found.segments:
            try:
                opened = onnxruntime.InferenceSession(
                    str(folder / segment.file), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's errors have no common class of their own
                raise ShortstackError(
                    f"onnxruntime cannot open {folder / segment.file}: "
                    f"{one_line(str(error), 300)} Split the export again."
                ) from None
            self._sessions.append(opened)
        config = folder / "genai_config.json"
        model = json.loads(config.read_text(encoding="utf-8"))["model"] if config.is_file() else {}
        self.context_tokens: int | None = model.get("context_length")
        self._head_dim = model.get("decoder", {}).get("head_size")

    @property
    def device(self) -> str:
        return "cpu"

    def answer_tokens(self, tokens: Sequence[int], answers: Sequence[int]) -> Answer:
        """`answers`: the ids that begin them."""
        given: dict[str, NDArray[Any]] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
        }
        for segment, session in zip(self._found.segments, self._sessions, strict=True):
            feed = {i.name: self._fed(i, given) for i in session.get_inputs()}
            names = list(segment.crossing) or ["logits"]
            given |= dict(zip(names, session.run(names, feed), strict=True))
            check = None if self._rule is None else self._rule.at(segment.end)
            if check is not None and segment.hidden:
                score, chosen = self._checked(check, segment, given)
                assert self._rule is not None
                if score >= self._rule.threshold:
                    return Answer(chosen, segment.end)
        logits = given["logits"][0, -1]
        return Answer(int(logits[list(answers)].argmax()), self.n_layers)

    def _fed(self, wanted: Any, given: dict[str, NDArray[Any]]) -> NDArray[Any]:
        if wanted.name in given:
            return given[wanted.name]
        _, heads, _, dim = wanted.shape  # an empty cache
        return np.zeros((1, heads, 0, self._head_dim or dim), DTYPES[wanted.type])

    def _checked(
        self, check: int, segment: Segment, given: dict[str, NDArray[Any]]
    ) -> tuple[float, int]:
        rule = self._rule
        assert rule is not None
        assert rule.probe is not None
        assert rule.probe_bias is not None
        states = sum(given[name][0, -1].astype(np.float32) for name in segment.hidden)
        unit = states / np.sqrt(np.square(states).mean())
        logits = rule.probe[check] @ unit + rule.probe_bias[check]
        features = np.array(row_features(logits.tolist()), np.float32)
        return float(features @ rule.weights[check] + rule.bias[check]), int(logits.argmax())

    def answer_batch(self, batch: Any) -> list[Answer]:
        """The rows of a `shortstack.early_exit.batches.Batch`, one by one."""
        tokens, last = batch.tokens.tolist(), batch.last.tolist()
        return [
            self.answer_tokens(row[: end + 1], [one for one in answers if one >= 0])
            for row, end, answers in zip(tokens, last, batch.answers.tolist(), strict=True)
        ]


def check_probe(rule: Rule) -> None:
    """Raise ShortstackError for a rule whose check needs more of the model than states."""
    if rule.check != PROBE:
        raise ShortstackError(
            f"onnxruntime runs early exits with a probe, this one's check is {rule.check!r}. "
            "Fit one with --check probe."
        )


def _check_rule(rule: Rule, cuts: Sequence[int], folder: Path) -> None:
    check_probe(rule)
    missing = [layer for layer in rule.layers if layer not in cuts]
    if missing:
        raise ShortstackError(
            f"the early exit checks after {missing[0]} layers, {folder} is cut after "
            f"{', '.join(map(str, cuts))}. Split the export for this early exit."
        )
