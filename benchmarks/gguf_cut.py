"""Cut a GGUF file against `cp`, and against libllama's own prune_layers, from one command.

    python benchmarks/gguf_cut.py [--gigabytes 4] [--repeats 5] [--folder DIR]

Speed: a synthetic Llama (random bytes as Q8_0, Q4_0 and F16) loses four layers; `cp` copies as
many bytes. They take turns; the page cache stays warm, as dropping it takes root. `cut` is the
pass over the file alone; `durable` adds fsync and sha256, against `cp` with fsync; `command` is
`shortstack prune`, which also starts Python and decodes one token in llama.cpp.

Correctness: tiny random files; right is the whole file with dropped layers that add nothing (zero
output projections), so no layer changes its number. `scale` is the largest right logit.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shortstack import child
from shortstack.errors import ShortstackError
from shortstack.gguf_header import (
    FLOAT32,
    GGML_TYPES,
    INT32,
    STRING,
    UINT32,
    encode_array,
    encode_scalar,
    encode_string,
)
from shortstack.prune.gguf_cut import cut_gguf, plan_cut, write_cut

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, MLP, HEADS, KV_HEADS, VOCAB = 4096, 11008, 32, 32, 8192
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
POLL_S = 0.005
FILES: dict[str, dict[str, Any]] = {
    "llama": {"depth": 8, "drop": [1, 4]},
    "gemma3": {"depth": 12, "drop": [4, 7, 10]},
    "gemma3, pattern in the file": {"depth": 12, "drop": [4, 7, 10], "pattern": 6},
    "gemma2": {"depth": 8, "drop": [1, 4, 6]},
    "olmo2": {"depth": 8, "drop": [1, 4]},
    "smollm3": {"depth": 12, "drop": [5]},
    "deci": {"depth": 8, "drop": [2, 5], "without_attention": [3, 6]},
}


def layer_rows(layer: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, dims and type of a layer's tensors, as llama.cpp names them."""
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield f"blk.{layer}.{name}.weight", (HIDDEN, HIDDEN), Q8_0
    for name in ("ffn_gate", "ffn_up"):
        yield f"blk.{layer}.{name}.weight", (HIDDEN, MLP), Q4_0
    yield f"blk.{layer}.ffn_down.weight", (MLP, HIDDEN), Q4_0
    for name in ("attn_norm", "ffn_norm"):
        yield f"blk.{layer}.{name}.weight", (HIDDEN,), F32


def size_of(dims: Sequence[int], kind: int) -> int:
    row = dims[0] // GGML_TYPES[kind].block * GGML_TYPES[kind].n_bytes
    return row * (dims[1] if len(dims) > 1 else 1)


def write_synthetic(path: Path, gigabytes: float) -> int:
    """Write a file of about this size; return its number of layers."""
    ends = [("token_embd.weight", (HIDDEN, VOCAB), F16), ("output_norm.weight", (HIDDEN,), F32)]
    each = sum(size_of(dims, kind) for _, dims, kind in layer_rows(0))
    n_layers = max(6, round(gigabytes * 1e9 / each))
    rows = [*ends, *(row for layer in range(n_layers) for row in layer_rows(layer))]
    keys = metadata(n_layers)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(rows), len(keys)) + b"".join(keys)
    at = 0
    for name, dims, kind in rows:
        head += encode_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        at += size_of(dims, kind)
    with path.open("wb") as out:
        out.write(head + bytes(-len(head) % 32))
        for _, dims, kind in rows:
            left = size_of(dims, kind)
            while left:
                left -= out.write(values(kind)[:left])
    return n_layers


@functools.cache
def values(kind: int) -> bytes:
    """Random bytes as blocks of a type; scales and floats are small, so that the file also runs."""
    if kind == F32:
        return struct.pack("<f", 1.0) * 2**12
    if kind == F16:
        noise = os.urandom(2**22)
        return bytes(byte & 0x1F if at % 2 else byte for at, byte in enumerate(noise))
    scale, rest = struct.pack("<e", 1e-3), GGML_TYPES[kind].n_bytes - 2
    return b"".join(scale + os.urandom(rest) for _ in range(2**17))


def metadata(n_layers: int) -> list[bytes]:
    counts = {
        "llama.block_count": n_layers,
        "llama.context_length": 4096,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
    }
    tokens = [f"<0x{i:02X}>" if i < 256 else f"word{i}" for i in range(VOCAB)]
    # One key-value after another; a string's type word is 8.
    texts = {"general.architecture": "llama", "tokenizer.ggml.model": "llama"}
    eps = struct.pack("<If", FLOAT32, 1e-5)
    types = struct.pack("<i", 6) * 256 + struct.pack("<i", 1) * (VOCAB - 256)
    strings = b"".join(map(encode_string, tokens))
    return [
        *(
            encode_string(k) + struct.pack("<I", STRING) + encode_string(v)
            for k, v in texts.items()
        ),
        *(encode_scalar(name, UINT32, value) for name, value in counts.items()),
        encode_string("llama.attention.layer_norm_rms_epsilon") + eps,
        encode_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, STRING, VOCAB) + strings,
        encode_array("tokenizer.ggml.scores", FLOAT32, bytes(4 * VOCAB)),
        encode_array("tokenizer.ggml.token_type", INT32, types),
    ]


def copied(source: Path, target: Path, *, durable: bool) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    if durable:
        with target.open("rb+") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - start


def cut_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: the seconds of one cut."""
    start = time.perf_counter()
    made = plan_cut(Path(request["source"]), tuple(request["drop"]))
    if request["durable"]:
        cut_gguf(made, Path(request["target"]))
    else:
        write_cut(made, Path(request["target"]))
    return {"seconds": time.perf_counter() - start}


def watched(command: list[str], text: str = "") -> tuple[str, float, int]:
    """Run a command; return its output, wall seconds and most anonymous bytes, of all its
    processes together. RssAnon is polled: a peak shorter than the pause between looks is missed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    most = 0

    def look() -> None:
        nonlocal most
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(POLL_S)

    watcher = threading.Thread(target=look)
    watcher.start()
    answer, _ = process.communicate(text)
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return answer, time.perf_counter() - start, most


def anonymous_bytes(pid: int) -> int:
    """Of a process and all it has started."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended meanwhile
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    return own + sum(anonymous_bytes(int(child)) for task in tasks for child in task.split())


def timed_cut(source: Path, target: Path, drop: Sequence[int], durable: bool) -> tuple[float, int]:
    request = {"source": str(source), "target": str(target), "drop": drop, "durable": durable}
    answer, _, most = watched([sys.executable, __file__, "--one"], json.dumps(request))
    return float(json.loads(answer)["seconds"]), most


def timed_command(source: Path, target: Path, drop: Sequence[int]) -> tuple[float, int]:
    layers = ",".join(map(str, drop))
    command = [sys.executable, "-m", "shortstack", "prune", str(source), "--drop", layers, "-q"]
    _, seconds, most = watched([*command, "-o", str(target)])
    return seconds, most


def race(folder: Path, gigabytes: float, repeats: int) -> None:
    source, same, target = folder / "whole.gguf", folder / "same.gguf", folder / "new.gguf"
    n_layers = write_synthetic(source, gigabytes)
    drop = list(range(n_layers // 2, min(n_layers // 2 + 4, n_layers - 1)))
    write_cut(plan_cut(source, tuple(drop)), same)
    print(
        f"{source.stat().st_size / 1e9:.2f} GB, {n_layers} layers; without {len(drop)}: "
        f"{same.stat().st_size / 1e9:.2f} GB"
    )
    runs: dict[str, Callable[[], tuple[float, int]]] = {
        "cp": lambda: (copied(same, target, durable=False), 0),
        "cut": lambda: timed_cut(source, target, drop, durable=False),
        "cp, durable": lambda: (copied(same, target, durable=True), 0),
        "cut, durable": lambda: timed_cut(source, target, drop, durable=True),
        "command": lambda: timed_command(source, target, drop),
    }
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            target.unlink(missing_ok=True)
            os.sync()  # what the last run left to write would slow the next
            samples[name].append(run())
    against = {"cut": "cp", "cut, durable": "cp, durable", "command": "cp, durable"}
    for name, found in samples.items():
        seconds = [second for second, _ in found]
        words = f"{name:13} median {statistics.median(seconds):6.2f} s  "
        words += f"({min(seconds):.2f} to {max(seconds):.2f})"
        if name in against:
            ratios = [a[0] / b[0] for a, b in zip(found, samples[against[name]], strict=True)]
            words += f"  {statistics.median(ratios):.2f} x {against[name]}"
            words += f"  peak anonymous {max(most for _, most in found) / 1e6:.0f} MB"
        print(words)


def prune_with_libllama(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: llama_model_quantize with prune_layers, tensors copied."""
    from shortstack.libllama import last_words, libllama

    lib = libllama()
    params = lib.llama_model_quantize_default_params()
    params.only_copy = True
    layers = [*request["drop"], -1]
    params.prune_layers = (ctypes.c_int32 * len(layers))(*layers)
    code = lib.llama_model_quantize(request["source"].encode(), request["target"].encode(), params)
    return {"failed": last_words() if code else ""}


def logits_here(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: logits of 48 tokens, three windows of the tiny files."""
    from shortstack.runtimes import open_session

    tokens = [3 + 7 * at % 120 for at in range(48)]
    with open_session(
        Path(request["file"]), "llama.cpp", threads=1, context_tokens=len(tokens)
    ) as session:
        return {"logits": session.prefill(tokens, all_logits=True).tolist()}


def in_child(function: str, **request: Any) -> dict[str, Any]:
    return child.call(
        f"benchmarks.gguf_cut:{function}",
        request,
        timeout_s=120,
        what=function,
        env={"PYTHONPATH": str(ROOT)},
    )


def correctness(folder: Path) -> None:
    """Print the error of both cutters for each tiny file."""
    print(
        f"{'file':30} {'without':10} {'scale':>6}  {'shortstack':34} llama-quantize --prune-layers"
    )
    for name, case in FILES.items():
        arch = name.partition(",")[0]
        right = wanted_logits(folder, arch, case)
        source, drop = folder / "whole.gguf", case["drop"]
        words = [f"{name:30} {str(drop)[1:-1]:10} {max(map(abs, flat(right))):6.2f} "]
        for cutter in (cut_ours, cut_theirs):
            target = folder / "cut.gguf"
            target.unlink(missing_ok=True)
            try:
                cutter(source, drop, target)
                found = in_child("logits_here", file=str(target))["logits"]
            except ShortstackError as error:
                words.append(f"refused: {reason(str(error))}")
                continue
            gaps = (abs(a - b) for a, b in zip(flat(found), flat(right), strict=True))
            words.append(f"error {max(gaps):.1e}")
        print(f"{words[0]} {words[1]:34} {words[2]}")


def reason(text: str) -> str:
    """The part of an error that tells most."""
    for sign in ("Nearest safe cuts: ", "error loading model hyperparameters: "):
        if sign in text:
            return text.partition(sign)[2].partition(" | ")[0]
    return text[:100]


def cut_ours(source: Path, drop: list[int], target: Path) -> None:
    cut_gguf(plan_cut(source, tuple(drop)), target)


def cut_theirs(source: Path, drop: list[int], target: Path) -> None:
    failed = in_child("prune_with_libllama", source=str(source), target=str(target), drop=drop)
    if failed["failed"]:
        raise ShortstackError(failed["failed"])


def wanted_logits(folder: Path, arch: str, case: dict[str, Any]) -> list[list[float]]:
    """Of the whole file with the dropped layers adding nothing: no number of a layer changes.
    Writes `whole.gguf`, too."""
    from tests.gguf_zoo import write_file

    depth = case["depth"]
    more: dict[str, Any] = {"without_attention": case.get("without_attention", ())}
    if "pattern" in case:
        more["pattern"] = [layer % case["pattern"] != case["pattern"] - 1 for layer in range(depth)]
    write_file(folder / "whole.gguf", arch, range(depth), **more)
    write_file(folder / "right.gguf", arch, range(depth), silent=case["drop"], **more)
    found: list[list[float]] = in_child("logits_here", file=str(folder / "right.gguf"))["logits"]
    return found


def flat(rows: list[list[float]]) -> Iterator[float]:
    return (value for row in rows for value in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write, default: the system's")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(cut_here(json.load(sys.stdin))))
        return
    sys.path.insert(0, str(ROOT))
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        correctness(folder)
        race(folder, asked.gigabytes, asked.repeats)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
