"""`shortstack unpack`: a packed model into a folder, or on into a file that a runtime opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortstack.commands import stages
from shortstack.errors import ShortstackError
from shortstack.manifest import (
    check_apart,
    check_ours,
    finished,
    staged,
    step_key,
    write_manifest,
)
from shortstack.packed.read import open_packed
from shortstack.packed.unpack import unpack_folder
from shortstack.progress import Display
from shortstack.recipe import ExportRecipe

TARGETS = ("hf", "gguf:Q8_0", "onnx:int8")


def unpack(
    model: Path,
    to: str,
    out: Path,
    *,
    text: str,
    max_perplexity_ratio: float,
    threads: int,
    display: Display,
) -> dict[str, Any]:
    """Unpack into the folder `out`; other formats than `hf` are exports, proven as every one."""
    if to not in TARGETS:
        raise ShortstackError(
            f"unpack writes {', '.join(TARGETS)}, not {to!r}. For other formats: "
            f"shortstack export {model} --to {to}"
        )
    if to != "hf":
        wanted = ExportRecipe(to=to, max_perplexity_ratio=max_perplexity_ratio)
        return stages.export(
            str(model), wanted, text, out, threads=threads, dry_run=False, display=display
        )
    packed = open_packed(model)
    check_ours(out, "unpack")
    check_apart(out, [model])
    key = step_key("unpack", {"packed": packed.sha256})
    kept = finished(out, key)
    if kept is None:
        with display.step("Unpack") as progress, staged(out, "unpack") as partial:
            checkpoint = unpack_folder(packed, partial, progress)
            facts = {
                "packed_sha256": packed.sha256,
                "sha256": checkpoint.sha256,
                "n_tensors": len(checkpoint.tensors),
                "plain_bytes": packed.contents.plain_bytes,
            }
            kept = write_manifest(partial, "unpack", key, facts)
    return {"checkpoint": str(out), **stages.facts_of(kept)}
