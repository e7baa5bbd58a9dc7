"""optimum-onnx: traces the model in transformers 4.57, so the graph has what the model computes.

Windows, rotations and removed parts of single layers come out right by themselves, after any cut:
the trace runs every layer as it is. Attention stays in single operators: there is no
GroupQueryAttention, and the cache grows by copying. Version 0.1.0 wants transformers below 4.58:
it lives in an environment of its own (the extra `optimum`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.disk import FULL, disk_full
from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.families import both_spellings

if TYPE_CHECKING:
    import onnx_ir as ir

PACKAGES = ("optimum", "torch", "transformers")
EXTRA = "optimum"
TASK = "text-generation-with-past"
PROTOBUF_BYTES = 2**31

CALLED = {"olmo3": "olmo2"}
"""Model types that version 0.1.0 has no entry for -> one whose inputs and outputs are the same;
the model that is traced is not changed by it."""


def unsupported(checkpoint: Checkpoint) -> str | None:
    """Why this builder cannot be used: transformers 4.57 cannot say what the config says.

    Every family of the table is right within 1e-4 (tests/export/test_onnx_optimum.py).
    """
    try:
        both_spellings(checkpoint.config, strict=True)
    except ShortstackError as refusal:
        return str(refusal).removesuffix(".")
    return None


def peak_ram_bytes(checkpoint: Checkpoint) -> int:
    """Anonymous memory of `build`, as measured for graphs of 0.65, 1.81 and 2.37 GB: 2.41, 6.75 and
    5.28 GB. One above 2 GiB, which no protobuf holds, is written in pieces: fewer copies."""
    size = _graph_bytes(checkpoint)
    return 400_000_000 + (4 * size if size < PROTOBUF_BYTES else 5 * size // 2)


def disk_bytes(checkpoint: Checkpoint) -> int:
    """The float32 graph; one above 2 GB is written in pieces, then anew as one."""
    return 2 * _graph_bytes(checkpoint)


def _graph_bytes(checkpoint: Checkpoint) -> int:
    """A tied table is written twice, the second time turned round."""
    turned = checkpoint.dims["vocab"] * checkpoint.dims["d"] if checkpoint.tied else 0
    return 4 * (checkpoint.n_params + turned)


def build(checkpoint: Checkpoint, scratch: Path) -> ir.Model:
    """In the child: trace the decoder in float32 into `scratch`, without network or remote code."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    words = io.StringIO()
    try:
        with _quiet(words):
            _export()(_decoder(checkpoint), scratch, task=TASK, do_validation=False, device="cpu")
    except ShortstackError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(scratch / "model.onnx") from None
        raise _refused(error) from None
    except Exception as error:  # its failures have no class in common; all become one line
        raise _refused(error) from None
    import onnx_ir as ir

    return ir.load(scratch / "model.onnx")


def _export() -> Any:
    try:
        from optimum.exporters.onnx import onnx_export_from_model
    except ImportError as error:
        raise MissingExtraError(str(error.name), EXTRA, "the optimum builder") from None
    return onnx_export_from_model


def _decoder(checkpoint: Checkpoint) -> Any:
    """The model as optimum wants it; of a multimodal one the text tower alone."""
    import torch

    from shortstack.pretrained import load

    model = load(checkpoint.path, torch.float32, text_only=True)
    kind = model.config.model_type
    model.config.use_cache = True
    model.config.export_model_type = CALLED.get(kind, kind)
    return model


def _refused(error: Exception) -> ShortstackError:
    lines = str(error).strip().splitlines() or [""]
    return ShortstackError(
        f"optimum failed: {type(error).__name__}: {one_line(lines[-1], 300)}. "
        "Try another builder: --option builder=mobius"
    )


@contextlib.contextmanager
def _quiet(words: io.StringIO) -> Iterator[None]:
    """It prints, warns of every traced branch and logs; what goes wrong comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(words),
            contextlib.redirect_stderr(words),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
