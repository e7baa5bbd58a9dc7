"""Write a checkpoint again with some of its tensors changed: repaired, healed or tuned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.errors import ShortstackError
from shortstack.floats import STORED, to_stored
from shortstack.progress import OnProgress, silent
from shortstack.prune.apply import PLAN_FILE, check_loadable
from shortstack.shards import MAX_SHARD_BYTES, ShardReader, ShardWriter, lay_out


def rewrite(
    checkpoint: Checkpoint,
    changed: Mapping[str, NDArray[np.float32]],
    out: Path,
    *,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    progress: OnProgress = silent,
) -> Checkpoint:
    """Write `checkpoint` into the existing empty folder `out` with the tensors of `changed`.

    Everything else is copied byte for byte: other tensors, tokenizer, the plan of an earlier cut.
    Changed tensors keep the type they are stored in, or get `dtype` (F32, BF16, F16). A name that
    the checkpoint lacks is added; `config` replaces config.json, which must then agree. `names`
    (new name -> name in the checkpoint) copies tensors under other names; those of `changed` are
    new ones. Raises ShortstackError for a value that is not finite, a changed shape, a full disk.
    """
    source = {name: name for name in checkpoint.tensors} if names is None else names
    infos = _infos(checkpoint, source, changed, dtype)
    layout = lay_out(((name, *what) for name, what in infos.items()), MAX_SHARD_BYTES)
    require_space(out, layout.n_bytes)
    with disk_errors(out):
        with ShardReader(checkpoint) as reader, ShardWriter(out, layout) as writer:
            for done, name in enumerate(writer.names, 1):
                if name in changed:
                    writer.write(name, [to_stored(changed[name], infos[name][0])])
                else:
                    writer.write(name, reader.chunks(source[name]))
                progress(done, len(writer.names))
        return finish(checkpoint, out, config or checkpoint.config)


def finish(checkpoint: Checkpoint, out: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Put beside the weights in `out` what makes them a model, and check that it is one: the
    config, and the tokenizer and the plan of an earlier cut of `checkpoint`, byte for byte."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    for file in (*checkpoint.tokenizer_files, checkpoint.path / PLAN_FILE):
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    written = Checkpoint.open(out)
    check_loadable(written)
    return written


def _infos(
    checkpoint: Checkpoint,
    source: Mapping[str, str],
    changed: Mapping[str, NDArray[np.float32]],
    dtype: str | None,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor to write."""
    first = next(iter(checkpoint.tensors.values()))
    infos = {
        name: (checkpoint.tensors[old].dtype, checkpoint.tensors[old].shape)
        for name, old in source.items()
    }
    for name, values in changed.items():
        if not np.isfinite(values).all():
            raise ShortstackError(
                f"{name} holds numbers that are not finite. Train again with a lower rate."
            )
        stored, shape = infos.get(name, (first.dtype, values.shape))
        if shape != values.shape:
            raise ShortstackError(f"{name} is {list(shape)}, not {list(values.shape)}.")
        if dtype is not None and dtype not in STORED:
            raise ShortstackError(f"cannot store {dtype!r}. Use one of {', '.join(STORED)}.")
        infos[name] = (dtype or stored, shape)
    return infos
