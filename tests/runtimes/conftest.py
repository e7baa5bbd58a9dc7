"""What every runtime has something to open of."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter


@pytest.fixture(scope="session")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every format, float32."""
    checkpoint = Checkpoint.open(tiny)
    found = {"checkpoint": tiny}
    for text in ("gguf:F32", "onnx:fp32", "packed"):
        spec = ExportSpec.parse(text)
        folder = tmp_path_factory.mktemp(spec.format)
        found[spec.format] = exporter(spec.format).export(checkpoint, spec, folder).path
    return found
