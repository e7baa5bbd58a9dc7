"""onnxruntime-genai's model builder, in float32: it prints, and its failures vary."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.disk import FULL, disk_full
from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.export.onnx_builders import ungroupable
from shortstack.families import rope_parameters

if TYPE_CHECKING:
    import onnx_ir as ir

PACKAGES = ("onnxruntime_genai", "torch", "transformers")
EXTRA = "onnx"

FAILS = {
    "smollm3": "KeyError 'position_ids'",
    "gemma3": "KeyError 'rope_type'",
    "gemma3_text": "KeyError 'rope_type'",
    "olmo2": "NotImplementedError",
    "olmo3": "NotImplementedError",
    "phi3": "KeyError 'multi_cache', or 'type' where the rotation has 'rope_type'",
}
"""Model types on which it raises, as measured with version 0.18.0."""


def unsupported(checkpoint: Checkpoint) -> str | None:
    """Why this builder cannot be used: it fails by itself."""
    kind = str(checkpoint.config["model_type"])
    reads_rotation = kind == "phi3" and "type" in rope_parameters(checkpoint.text)
    if kind in FAILS and not reads_rotation:
        return f"onnxruntime-genai's builder fails on {kind} models ({FAILS[kind]})"
    return ungroupable(checkpoint)


def peak_ram_bytes(checkpoint: Checkpoint) -> int:
    """At most, as measured on 135 M and 1.1 B parameters: a third to three quarters of it."""
    return 400_000_000 + 4 * checkpoint.n_params


def disk_bytes(checkpoint: Checkpoint) -> int:
    """The float32 graph, and the cache of what it converts."""
    return 4 * checkpoint.n_params + 4 * checkpoint.n_params // 2


def build(checkpoint: Checkpoint, scratch: Path) -> ir.Model:
    """In the child: the builder's own steps, its words kept for the error message."""
    import onnx_ir as ir

    made, cache, words = scratch / "made", scratch / "cache", io.StringIO()
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        builder = _builder()
        places = ("", str(checkpoint.path), str(made), "fp32", "cpu", str(cache))
        try:
            options = builder.parse_extra_options(*places, [])
            # True lets it ask the hub for a stored login
            options["hf_token"] = None
            builder.create_model(*places, **options)
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(made / "model.onnx.data") from None
            raise _refused(error, words) from None
        except Exception as error:  # its failures have no class in common; all become one line
            raise _refused(error, words) from None
    return ir.load(made / "model.onnx")


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
        "Try another builder: --option builder=mobius"
    )
