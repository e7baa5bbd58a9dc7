"""Memory and speed of forms on a card, of a synthetic shape: Gaussian codes of 4.05 bits, made on
the card. Called by packed_memory.py --device cuda:0 --shape 7b."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.make_synthetic import SHAPES, config_of
from torch import Tensor, nn

from shortstack.runtimes.packed.card import CardDirectMatrix
from shortstack.runtimes.packed.int8 import Int8Matrix
from shortstack.runtimes.packed.matrix import Matrix
from shortstack.runtimes.packed.model import skeleton
from shortstack.runtimes.packed.modules import PackedEmbedding, PackedLinear
from shortstack.runtimes.packed.together import put_together, siblings
from shortstack.runtimes.pytorch_graph import GraphSession

NAMES = {"7b": "llama-2-7b"}
SIGMA_STEPS = 4.0
"""Codes are Gaussian with this standard deviation: 4.05 bits of entropy."""
STEP = 0.02 / SIGMA_STEPS
PROMPT, STEPS, WARM_UP = 64, 64, 8
PIECE, FRAME_REPEATS = 2**20, 12


def gaussian_codes(rows: int, columns: int, device: torch.device, sigma: float) -> Tensor:
    """int8, shape (rows, columns), made by blocks: float32 of a whole matrix is not needed."""
    made = torch.empty(rows, columns, dtype=torch.int8, device=device)
    for start in range(0, rows, 4096):
        part = made[start : start + 4096]
        drawn = torch.randn(part.shape, device=device).mul_(sigma).round_()
        part.copy_(drawn.clamp_(-127, 127))
    return made


class Synthetic:
    """A loader for a session: the model of a shape, its matrices random, `direct` in the first
    `share` of the layers (and in head and embeddings from a share of 1 on), `int8` in the others,
    or all numbers in bfloat16 where `share` is None."""

    def __init__(self, shape: str, layers: int, share: float | None, sigma: float) -> None:
        self._config = config_of(NAMES.get(shape, shape), num_hidden_layers=layers)
        self._layers, self._share, self._sigma = layers, share, sigma
        self.matrices: dict[str, Matrix] = {}
        """Those that are held as one by the name of the first tensor."""

    def __call__(self, path: Path, *, dtype: str, device: Any) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            (Path(folder) / "config.json").write_text(json.dumps(self._config))
            model = skeleton(Path(folder), kind)
            if self._share is not None:
                self._pack(model, kind, device)
            for name, tensor in list(model.named_parameters()):
                above, _, last = name.rpartition(".")
                values = torch.ones(tensor.shape, dtype=kind, device=device)
                if tensor.dim() == 2:
                    values.normal_(0, 0.02)
                setattr(model.get_submodule(above), last, nn.Parameter(values, False))
            model.to(device)
        return model, {}

    def _pack(self, model: Any, kind: torch.dtype, device: Any) -> None:
        modules = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if type(module) in (nn.Linear, nn.Embedding)
        }
        while modules:
            name = next(iter(modules))
            names = siblings(name)
            members = [modules.pop(one) for one in names]
            rows = sum(module.weight.shape[0] for module in members)
            codes = gaussian_codes(rows, members[0].weight.shape[1], device, self._sigma)
            steps = torch.full((rows,), STEP, device=device)
            made: Any = CardDirectMatrix if self._is_direct(name) else Int8Matrix
            matrix = self.matrices[name] = made.of(codes, steps, kind)
            place = name.removesuffix(".weight")
            if type(members[0]) is nn.Embedding:
                model.set_submodule(place, PackedEmbedding(matrix, None))
            elif len(names) == 1:
                model.set_submodule(place, PackedLinear(matrix, None))
            else:
                put_together(model, matrix, names)

    def _is_direct(self, name: str) -> bool:
        assert self._share is not None
        parts = name.split(".")
        if "layers" not in parts:
            return self._share >= 1
        return int(parts[parts.index("layers") + 1]) < self._share * self._layers


def measure(
    shape: str, layers: int, share: float | None, device: str, sigma: float
) -> dict[str, Any]:
    """One model: resident bytes of the card and milliseconds of a token, decoded by a graph."""
    place = torch.device(device)
    gc.collect()
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(place)
    start = time.perf_counter()
    loader = Synthetic(shape, layers, share, sigma)
    session = GraphSession(
        Path(),
        loader=loader,
        threads=4,
        context_tokens=PROMPT + STEPS + WARM_UP,
        device=device,
        dtype="bfloat16",
    )
    with session:
        load_s = time.perf_counter() - start
        prompt_s = []
        for _ in range(3):
            begun = time.perf_counter()
            logits = session.prefill(list(range(1, PROMPT + 1)))
            prompt_s.append(time.perf_counter() - begun)
        taken = []
        for step in range(WARM_UP + STEPS):
            begun = time.perf_counter()
            session.decode(step + 1)
            taken.append(time.perf_counter() - begun)
        torch.cuda.empty_cache()
        free_after, _ = torch.cuda.mem_get_info(place)
        weights = sum(p.nbytes for p in session._model.parameters())
        weights += sum(m.n_bytes for m in loader.matrices.values())
        kernels = {}
        if loader.matrices:
            from shortstack.runtimes.packed.card_times import by_matrix

            times = by_matrix(loader.matrices)
            kernels = {
                "+".join(one.split(".")[-2] for one in siblings(name)): round(seconds * 1e6, 2)
                for name, seconds in times.items()
            }
    del session
    return {
        "share_direct": share,
        "weight_bytes": weights,
        "resident_bytes": free_before - free_after,
        "decode_ms": statistics.median(taken[WARM_UP:]) * 1e3,
        "decode_ms_p90": sorted(taken[WARM_UP:])[int(0.9 * STEPS)] * 1e3,
        "prefill_ms": min(prompt_s) * 1e3,
        "load_s": load_s,
        "finite": bool((logits == logits).all()),
        "kernel_us": kernels,
    }


def run(shape: str, layers: int | None, device: str, sigma: float) -> list[dict[str, Any]]:
    """bfloat16, int8, then more and more direct; each row beside int8's."""
    layers = layers or SHAPES[NAMES.get(shape, shape)]["num_hidden_layers"]
    rows = []
    for share in (0.0, None, 0.25, 0.5, 0.75, 1.0):
        rows.append(measure(shape, layers, share, device, sigma))
        print(json.dumps(rows[-1]), flush=True)
    int8 = rows[0]
    for row in rows:
        for key in ("weight_bytes", "resident_bytes", "decode_ms"):
            row[f"{key}_over_int8"] = round(row[key] / int8[key], 4)
    return rows


def nvcomp_rates(device: str, sigma: float) -> dict[str, Any]:
    """Decoding of coded codes by nvCOMP on the card, GB/s of plain bytes: its own ANS, and the
    frames of Zstandard that packed files hold. What it refuses is said in its words."""
    from nvidia import nvcomp

    from shortstack.packed.coders import zstd

    codes = gaussian_codes(4096, 11008, torch.device(device), sigma)
    plain = codes.view(torch.uint8).reshape(-1)
    found: dict[str, Any] = {"version": getattr(nvcomp, "__version__", "?"), "bytes": plain.numel()}
    try:
        codec = nvcomp.Codec(algorithm="ANS")
        coded = codec.encode(nvcomp.as_array(plain))
        found["ans_ratio"] = plain.numel() / coded.buffer_size
        found["ans_gb_s"] = _rate(lambda: codec.decode(coded), plain.numel())
    except Exception as error:  # noqa: BLE001  # a third party's, whatever it is, belongs in the record
        found["ans_error"] = repr(error)[:300]
    try:
        host = plain.cpu().numpy()
        pieces = [host[i : i + PIECE] for i in range(0, len(host), PIECE)]
        frames = [zstd.encode(piece, 4096, "fast") for piece in pieces]
        found["zstd_ratio"] = plain.numel() / sum(map(len, frames))
        # as many frames at a time as half a gigabyte has: a matrix alone does not fill the card
        arrays = [np.frombuffer(frame, np.uint8) for frame in frames] * FRAME_REPEATS
        there = nvcomp.as_arrays(arrays).cuda()
        raw = nvcomp.Codec(
            algorithm="Zstd", bitstream_kind=nvcomp.BitstreamKind.RAW, uncomp_chunk_size=PIECE
        )
        decoded = raw.decode(there, "|u1")
        found["zstd_exact"] = np.array_equal(np.asarray(decoded[0].cpu()), pieces[0])
        n_bytes = FRAME_REPEATS * plain.numel()
        found["zstd_gb_s"] = _rate(lambda: raw.decode(there, "|u1"), n_bytes)
    except Exception as error:  # noqa: BLE001  # the same
        found["zstd_error"] = repr(error)[:2000]
    return found


def _rate(call: Any, n_bytes: int) -> float:
    call()
    torch.cuda.synchronize()
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return n_bytes / 1e9 / min(taken)
