"""onnxruntime-genai's model builder, run in a child: it prints, and its failures vary."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack import child
from shortstack.disk import FULL, disk_full
from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.progress import OnProgress, silent

TIMEOUT_S = 24 * 3600.0

MATRICES = 5
"""Matrices of a layer as the builder writes them: fused QKV, output, gate, up, down."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def build(
    source: Path,
    out: Path,
    cache: Path,
    precision: str,
    *,
    options: Sequence[str],
    weights: Mapping[str, Any] | None,
    n_layers: int,
    progress: OnProgress = silent,
) -> None:
    """Write model.onnx, its data and genai_config.json into `out`.

    `options` are the builder's KEY=VALUE extras, `weights` its structured description of how
    weights are quantized, None for not at all.
    """
    request = {
        "source": str(source),
        "out": str(out),
        "cache": str(cache),
        "precision": precision,
        "options": list(options),
        "weights": weights,
        "n_layers": n_layers,
    }
    child.call(
        "shortstack.export.onnx_build:build_here",
        request,
        timeout_s=TIMEOUT_S,
        what=f"building the {precision} ONNX model",
        progress=progress,
        env=QUIET,
    )


def build_here(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: the builder's own steps, its words kept for the error message."""
    words = _Words(request["n_layers"], quantizes=request["weights"] is not None)
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        builder = _builder()
        places = ("", request["source"], request["out"], request["precision"], "cpu")
        try:
            options = builder.parse_extra_options(
                *places, request["cache"], request["options"], **_structured(request["weights"])
            )
            # True lets it ask the hub for a stored login
            options["hf_token"] = None
            builder.create_model(*places, request["cache"], **options)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(Path(request["out"]) / "model.onnx.data") from None
            raise _refused(error, words) from None
        except Exception as error:  # its failures have no class in common; all become one line
            raise _refused(error, words) from None
    return {}


class _Words(io.StringIO):
    """What the builder prints, kept; each layer read and each matrix quantized is a step."""

    def __init__(self, n_layers: int, *, quantizes: bool) -> None:
        super().__init__()
        self._done = 0
        self._total = n_layers * (1 + MATRICES * quantizes) + 1

    def write(self, text: str) -> int:
        if "Reading layer" in text or "complete quantization" in text:
            self._done = min(self._done + 1, self._total - 1)
            child.report_progress(self._done, self._total)
        return super().write(text)


def _structured(weights: Mapping[str, Any] | None) -> dict[str, Any]:
    if weights is None:
        return {}
    return {
        "builder_config_version": 2,
        "target_options": {"quant_config": {"weights": dict(weights)}},
    }


def _builder() -> Any:
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        # the builder imports torch and transformers, which its package does not declare
        extra = "onnx" if (error.name or "").startswith("onnx") else "prune"
        raise MissingExtraError(str(error.name), extra, "the export to ONNX") from None
    return builder


def _refused(error: Exception, words: io.StringIO) -> ShortstackError:
    lines = str(error).strip().splitlines() or words.getvalue().strip().splitlines() or [""]
    return ShortstackError(
        f"onnxruntime-genai's builder failed: {type(error).__name__}: {one_line(lines[-1], 300)}. "
        "Try another precision, or gguf."
    )
