"""Stages do not import each other; the spine's light part imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "prune": {"prune"},
    "export": {"export"},
    "runtimes": {"runtimes"},
    "devices": {"devices", "runtimes"},
}
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "gguf", "numpy")


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("stage", sorted(ALLOWED))
def test_a_stage_imports_only_what_it_may(stage: str) -> None:
    files = list((ROOT / stage).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            parts = name.split(".")
            if parts[0] == "shortstack" and len(parts) > 1 and parts[1] in ALLOWED:
                assert parts[1] in ALLOWED[stage], f"{file} imports {name}"
            assert "pipeline" not in parts[:2], f"{file} imports the pipeline"


@pytest.mark.parametrize("stage", sorted(ALLOWED))
def test_a_stage_folder_is_the_installed_package(stage: str) -> None:
    module = __import__(f"shortstack.{stage}", fromlist=["__file__"])
    assert module.__file__ is not None
    installed = Path(module.__file__).resolve()
    assert installed == (ROOT / stage / "__init__.py").resolve(), (
        f"src/shortstack/{stage} is not a link to {stage}/: "
        "on Windows clone with 'git clone -c core.symlinks=true'"
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, shortstack.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
