"""`shortstack prune MODEL.gguf -o OUT.gguf`: file to file, without torch and without a folder."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from shortstack import child
from shortstack.errors import ShortstackError
from shortstack.intake import resolve
from shortstack.progress import Display
from shortstack.prune.gguf_cut import GgufCut, check_free, cut_gguf, plan_cut
from shortstack.prune.plan import parse_drop, read_plan

CHECK_TOKENS = 32
"""Context of the check: all it decodes is one token."""


def wanted(model: str, out: Path) -> bool:
    """Whether the output is to be a .gguf file. Raises ShortstackError if the model is none."""
    if out.suffix.lower() != ".gguf":
        return False
    kind, target = resolve(model)
    if kind != "gguf":
        raise ShortstackError(
            f"{out} is to be a GGUF file, but {target} is none: layers are cut file to file or "
            "folder to folder. Name a folder with -o, then run: shortstack export"
        )
    return True


def cut_model(
    model: str,
    drop: str | None,
    plan_file: Path | None,
    out: Path,
    *,
    dry_run: bool,
    display: Display,
) -> dict[str, Any]:
    """Cut the layers of `drop` or of a plan file; `out` becomes a GGUF file that llama.cpp opens.

    The file is opened there, and one token decoded, before it gets its name; where
    llama-cpp-python is missing, the result says so.
    """
    if (drop is None) == (plan_file is None):
        raise ShortstackError("say what to drop: --drop 11-15,20 or --plan plan.json, one of them.")
    source = Path(resolve(model)[1])
    check_free(out)
    plan = parse_drop(drop or "") if plan_file is None else read_plan(plan_file)
    cut = plan_cut(source, plan)
    if dry_run:
        return {"file": str(out), **_facts(cut)}
    with display.step("Cut the layers") as progress:
        sha256 = cut_gguf(cut, out, progress, check=check_file)
    checked = "opened in llama.cpp, one token decoded"
    if not _has_llama_cpp():
        checked = "no: llama-cpp-python is not installed. Run: pip install 'shortstack[gguf]'"
    return {"file": str(out), **_facts(cut), "sha256": sha256, "checked": checked}


def check_file(file: Path) -> None:
    """Open a file in llama.cpp, in a process of its own. Raises ShortstackError if it cannot be
    run; does nothing where llama-cpp-python is missing."""
    if not _has_llama_cpp():
        return
    patience_s = 120 + file.stat().st_size / 2e7  # a disk that reads 20 MB/s
    request = {"file": str(file)}
    child.call(
        "shortstack.commands.gguf_cut:run_here", request, timeout_s=patience_s, what="the cut file"
    )


def run_here(request: dict[str, Any]) -> dict[str, Any]:
    """Load a file as a map, decode token 0, look at its logits. Runs in a child."""
    from shortstack.libllama import last_words, libllama
    from shortstack.llama_devices import use_only

    lib = libllama()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    kept = use_only(settings)
    settings.use_extra_bufts = False  # repacked weights would be a copy of the file in memory
    model = lib.llama_model_load_from_file(request["file"].encode(), settings)
    del kept
    if not model:
        raise ShortstackError(
            f"llama.cpp cannot open the cut file: {last_words()}. Nothing was written. "
            "Try another cut, or the original folder."
        )
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CHECK_TOKENS
    settings.op_offload = settings.offload_kqv = False
    context = lib.llama_init_from_model(model, settings)
    batch = lib.llama_batch_get_one((lib.llama_token * 1)(0), 1)
    code = lib.llama_decode(context, batch) if context else -1
    logits = lib.llama_get_logits_ith(context, -1) if code == 0 else None
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    if not logits or not all(map(math.isfinite, logits[:n_vocab])):
        raise ShortstackError(
            f"llama.cpp cannot run the cut file: {last_words()}. Nothing was written. "
            "Try another cut, or the original folder."
        )
    return {}


def _has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _facts(cut: GgufCut) -> dict[str, Any]:
    return {
        "drop": list(cut.plan.drop),
        "layers": f"{cut.plan.n_layers} to {len(cut.plan.keep)}",
        "original_bytes": cut.header.n_bytes,
        "size_bytes": cut.n_bytes,
        "keys_changed": list(cut.edits.changed),
        "least_runtime": cut.edits.least_runtime or "what runs the original",
        **({"notes": list(cut.edits.notes)} if cut.edits.notes else {}),
    }
