"""A model on the Hugging Face hub: safetensors, config and tokenizer files only."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from shortstack.checkpoint import TOKENIZER_FILES, Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.intake import Preview
from shortstack.manifest import finished, staged, step_key, write_manifest
from shortstack.progress import OnProgress
from shortstack.shards import INDEX

WANTED = ("config.json", "*.safetensors", INDEX, *TOKENIZER_FILES)
UNWANTED = ("consolidated*", "*/*")
"""Mistral's second copy of the same weights; other formats in sub-folders."""


def identify(target: str) -> dict[str, Any]:
    """Owner, name and revision as asked for; `main` if none is."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", target)
    if match is None:
        raise ShortstackError(
            f"'hf:{target}' is not a hub reference. Write hf:OWNER/NAME or hf:OWNER/NAME@REVISION."
        )
    return {"repository": match[1], "revision": match[2] or "main"}


def open_source(
    target: str, identity: dict[str, Any], work: Path, progress: OnProgress
) -> Checkpoint:
    """Download into `work`, or reopen an earlier download of the same revision."""
    key = step_key("intake", identity)
    if finished(work, key) is None:
        with disk_errors(work), staged(work, "intake") as out:
            commit = _download(identity["repository"], identity["revision"], out, progress)
            Checkpoint.open(out)
            write_manifest(out, "intake", key, {"source": {**identity, "commit": commit}})
    return Checkpoint.open(work)


def preview(target: str) -> Preview | None:
    identify(target)
    return None


def wanted_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of a repository's files (name -> bytes) those that a checkpoint is made of."""
    return {
        name: size
        for name, size in sorted(sizes.items())
        if any(fnmatch(name, pattern) for pattern in WANTED)
        and not any(fnmatch(name, pattern) for pattern in UNWANTED)
    }


def _download(repository: str, revision: str, out: Path, progress: OnProgress) -> str:
    """Download the wanted files of one commit; return the commit."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise MissingExtraError("huggingface_hub", "prune", "downloading a model") from None
    disable_progress_bars()
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        commit = str(info.sha)
        sizes = wanted_files({f.rfilename: f.size or 0 for f in info.siblings or ()})
        total, done = sum(sizes.values()), 0
        require_space(out, total)
        for name, size in sizes.items():
            hf_hub_download(repository, name, revision=commit, local_dir=out)
            done += size
            progress(done, total)
    except (HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise ShortstackError(
            f"cannot download hf:{repository}@{revision}: {one_line(str(error), 200)} "
            "Check the name and the network, or name a local folder."
        ) from None
    shutil.rmtree(out / ".cache", ignore_errors=True)
    return commit
