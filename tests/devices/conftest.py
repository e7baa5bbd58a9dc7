"""Small true artifacts and the path to the fake runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import pytest

from shortstack.artifact import Artifact, ExportSpec
from shortstack.devices.records import Record, load_records
from shortstack.devices.report.merged import Merged, merge
from shortstack.devices.schedule import Case
from shortstack.devices.workload import Prompt, Workload

from .bench_sample import Json, laptop_run, server_run, written
from .merged_sample import Load

OPENER = "fake_session:open_session"


class MakeCase(Protocol):
    def __call__(
        self, runtime: str, label: str = ..., spec: str = ..., size: int = ...
    ) -> Case: ...


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets a child import tests/devices/fake_session.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    return OPENER


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    """A case around a file of `size` bytes."""

    def make(
        runtime: str, label: str = "original", spec: str = "gguf:Q8_0", size: int = 4096
    ) -> Case:
        path = tmp_path / f"{label}.{spec.replace(':', '.')}"
        path.write_bytes(b"\1" * size)
        layers = 4 if label == "original" else 3
        artifact = Artifact(
            path=path,
            spec=ExportSpec.parse(spec),
            n_layers=layers,
            n_params=1000 * layers,
            size_bytes=size,
            weight_bytes_per_token=900 * layers,
            sha256="a" * 64,
            source_sha256="b" * 64,
        )
        return Case(label, artifact, runtime)

    return make


@pytest.fixture
def workload() -> Workload:
    return Workload(
        prompt_tokens=4,
        decode_tokens=5,
        warmup_prompt_tokens=2,
        warmup_decode_tokens=1,
        repeats=2,
        memory_repeats=0,
        threads=1,
    )


@pytest.fixture
def prompt() -> Prompt:
    return Prompt((1, 2, 3, 4), "four numbers")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write records and read them back."""

    def loaded(*records: Json) -> list[Record]:
        folders = [written(tmp_path / f"r{i}", record) for i, record in enumerate(records)]
        return load_records(folders)

    return loaded


@pytest.fixture
def both(load: Load) -> Merged:
    return merge(load(laptop_run(), server_run()))
