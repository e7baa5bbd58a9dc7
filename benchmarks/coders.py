"""The coders of packed files on streams of weights: entropy, coded size, speed.

    python -m benchmarks.coders [FOLDER ...] [--weights 8.4e6] [--best] [--nvcomp]
    python -m benchmarks.coders --shape llama-2-7b [--layers N] [--work FOLDER]

The first: Gaussian weights as bfloat16 and as codes of several steps, then what lies in each
FOLDER: exponents and the rest of bfloat16 weights, or the codes of `row_codes.safetensors`, of the
embedding and of two matrices of the middle layer. Sizes are bits a byte of the stream; speeds are
MB of plain bytes by seconds of CPU time of one thread, the best of three, every result held against
the plain bytes. `taken` is what packing chooses. --best also tries level 19, which is very slow.
--nvcomp adds a table of NVIDIA's decoders on a card (packages nvidia-nvcomp and torch with CUDA).

The second: a synthetic model in bfloat16 is packed by `shortstack export --to packed`, its proof
included, in a process of its own: time, peak of anonymous memory, size of the header. Random
weights: times and memory are those of any model of the shape, sizes are not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.make_synthetic import SHAPES, drawn, make_synthetic

from shortstack.checkpoint import Checkpoint
from shortstack.entropy import bits_a_byte
from shortstack.floats import to_bfloat16
from shortstack.packed.choose import choose_codes, choose_floats, tries
from shortstack.packed.coders import Bytes, coder
from shortstack.packed.pack import chunk_elements
from shortstack.packed.sources import Source, sources
from shortstack.packed.tensors import split_floats

COLUMNS = 1024
SIGMA = 0.02
REPEATS = 3
Stream = tuple[str, Bytes, int, str]
"""Name, plain bytes of a chunk, bytes a row, the coder that packing takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--weights", type=float, default=8.4e6, help="Gaussian ones")
    parser.add_argument("--best", action="store_true", help="also Zstandard's level 19")
    parser.add_argument("--nvcomp", action="store_true", help="also decoders on a card")
    parser.add_argument("--shape", choices=SHAPES, help="pack a synthetic model instead")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--work", type=Path, help="where the synthetic model lies meanwhile")
    asked = parser.parse_args()
    if asked.shape:
        pack_synthetic(asked.shape, asked.layers, asked.work)
        return
    found = [*gaussian(int(asked.weights) // COLUMNS), *of_folders(asked.folders)]
    on_cpu(found, ["fast", "matching", *(["best"] if asked.best else [])])
    if asked.nvcomp:
        on_card(found)


def gaussian(rows: int) -> Iterator[Stream]:
    """Streams of Gaussian weights, as packing would cut and choose."""
    weights = np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32)
    yield from floats("Gaussian BF16", to_bfloat16(weights * np.float32(SIGMA)).view(np.uint8))
    for name, share in (("1/4", 0.25), ("1/2", 0.5), ("1", 1.0), ("2", 2.0), ("3", 3.0)):
        yield codes_of(f"Gaussian codes, step {name} sigma", weights / share)
    yield codes_of("Gaussian codes, row's largest / 127", scaled(weights))
    spread = np.exp(0.5 * np.random.default_rng(1).standard_normal((rows, 1), np.float32))
    yield codes_of("the same, rows of unlike spread", scaled(weights) * np.minimum(spread / 3, 1))


def scaled(weights: Any) -> Any:
    return weights * (127 / np.abs(weights).max(1, keepdims=True))


def codes_of(name: str, exact: Any) -> Stream:
    rows = chunk_elements(COLUMNS, 4) // COLUMNS
    codes = np.clip(np.rint(exact[:rows]), -127, 127).astype(np.int8)
    return row_codes(name, codes.view(np.uint8).reshape(-1), COLUMNS)


def row_codes(name: str, codes: Bytes, columns: int) -> Stream:
    steps = np.ones(codes.size // columns, "<f2").view(np.uint8)
    chosen = choose_codes(codes, steps, columns, tries("auto", "matching"))
    return name, codes, columns, chosen.coders[0]


def floats(name: str, data: Bytes, columns: int = COLUMNS) -> Iterator[Stream]:
    data = data.reshape(-1)[: 2 * chunk_elements(columns, 2)]
    chosen = choose_floats(data[: 2**21], 2, columns, tries("auto", "matching")).coders
    for part, stream, taken in zip(
        ("exponents", "mantissas and signs"), split_floats(data, 2), chosen, strict=False
    ):
        yield f"{name}, {part}", stream, columns, taken


def of_folders(folders: list[Path]) -> Iterator[Stream]:
    """A chunk of the embedding, and one of the middle layer's up projection."""
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        middle = checkpoint.family.layer_prefix.format(i=checkpoint.n_layers // 2)
        wanted = {
            "embedding": checkpoint.family.outer[0].hf,
            "attention": middle + "self_attn.q_proj.weight",
            "MLP": middle + "mlp.up_proj.weight",
        }
        found = {source.name: source for source in sources(checkpoint) if source.is_tensor}
        for kind, name in wanted.items():
            if name in found:
                yield from of_source(f"{folder.name}, {kind}", found[name])


def of_source(name: str, source: Source) -> Iterator[Stream]:
    stop = min(source.n_elements, chunk_elements(source.columns, source.itemsize))
    if source.codes is not None:
        yield row_codes(f"{name} codes", source.read_codes(0, stop)[0], source.columns)
    elif source.dtype == "BF16":
        yield from floats(f"{name} BF16", source.read(0, stop), source.columns)


def on_cpu(streams: list[Stream], efforts: list[str]) -> None:
    """Print a row a stream: entropy, then of each coder bits; MB/s in, out."""
    ways = [("zstd", effort) for effort in efforts] + [("ans", "fast")]
    names = [f"zstd {effort}" if name == "zstd" else "ANS" for name, effort in ways]
    print("| stream | entropy, bits | " + " | ".join(names) + " | taken |")
    print("| --- |" + " --- |" * (len(names) + 2))
    for name, data, columns, taken in streams:
        cells = [tried(data, columns, *way) for way in ways]
        print(f"| {name} | {bits_a_byte(data):.3f} | " + " | ".join(cells) + f" | {taken} |")
        sys.stdout.flush()


def tried(data: Bytes, columns: int, name: str, effort: str) -> str:
    used = coder(name)
    repeats = 1 if effort == "best" else REPEATS
    coded, encode_s = best(lambda: used.encode(data, columns, effort), repeats)
    plain, decode_s = best(lambda: used.decode(coded, data.size, columns), REPEATS)
    assert np.array_equal(plain, data)
    mb = data.size / 1e6
    return f"{8 * len(coded) / data.size:.3f}; {mb / encode_s:.0f} in, {mb / decode_s:.0f} out"


def best(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result, and the least CPU seconds of `repeats` tries."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        taken.append(time.process_time() - start)
    return result, max(min(taken), 1e-9)


def on_card(streams: list[Stream]) -> None:
    """Print what nvCOMP's own formats take and how fast a card decodes them, data on the card.

    They are other formats than the packed file's: no packed file can be given to them.
    """
    try:
        nvcomp, torch = (importlib.import_module(name) for name in ("nvidia.nvcomp", "torch"))
    except ImportError as error:
        raise SystemExit(f"--nvcomp: {error}. Install nvidia-nvcomp-cu12 and torch.") from None
    if not torch.cuda.is_available():
        raise SystemExit("--nvcomp: torch sees no CUDA card here.")
    algorithms = ("ANS", "Zstd", "GDeflate", "LZ4")
    print(f"\nnvCOMP {nvcomp.__version__} on {torch.cuda.get_device_name()}: bits, GB/s out")
    print("| stream | entropy, bits | " + " | ".join(algorithms) + " |")
    print("| --- |" + " --- |" * (len(algorithms) + 1))
    for name, data, _, _ in streams:
        cells = [on_card_by(nvcomp, torch, algorithm, data) for algorithm in algorithms]
        print(f"| {name} | {bits_a_byte(data):.3f} | " + " | ".join(cells) + " |", flush=True)


def on_card_by(nvcomp: Any, torch: Any, algorithm: str, data: Bytes) -> str:
    codec = nvcomp.Codec(algorithm=algorithm)
    coded = codec.encode(nvcomp.as_array(data).cuda())
    taken = []
    for _ in range(2 + REPEATS):  # the first ones allocate
        torch.cuda.synchronize()
        start = time.perf_counter()
        plain = codec.decode(coded)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    assert np.array_equal(np.asarray(plain.cpu()).view(np.uint8).reshape(-1), data)
    speed = data.size / 1e9 / min(taken[2:])
    return f"{8 * coded.buffer_size / data.size:.3f}; {speed:.1f}"


def pack_synthetic(shape: str, layers: int | None, work: Path | None) -> None:
    """Print time and peak memory of packing and proving a model of a shape."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, out = Path(name) / "model", Path(name) / "packed"
        changed = {} if layers is None else {"num_hidden_layers": layers}
        n_bytes = make_synthetic(folder, shape, 0, drawn, **changed)  # by place, for mypy
        start = time.perf_counter()
        command = [sys.executable, "-m", "shortstack", "export", str(folder), "--to", "packed"]
        subprocess.run([*command, "-o", str(out), "--quiet"], check=True)
        wall_s = time.perf_counter() - start
        made = json.loads((out / "shortstack.json").read_text(encoding="utf-8"))
        with (out / made["artifact"]["path"]).open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
    peak = made["footprint"]["peak_anon_bytes"]
    print(
        f"{shape}, {made['artifact']['n_layers']} layers, {n_bytes / 1e9:.2f} GB: packed and "
        f"proven in {wall_s:.0f} s, peak {peak / 1e6:.0f} MB, header {header / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    main()
