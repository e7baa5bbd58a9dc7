"""The JSON Schema in the docs is that of the header we read."""

from __future__ import annotations

import json
from pathlib import Path

from shortstack.packed.header import Contents

SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "packed-1.schema.json"


def test_the_schema_is_written_down() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == Contents.model_json_schema()
