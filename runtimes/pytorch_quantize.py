"""Weights of a Hugging Face folder quantized while transformers loads them, and what they take.

bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) and NF4 (QLoRA, Dettmers et al.
2023, arXiv 2305.14314). torchao: groups of 128 weights in 4 bits for PyTorch's own tinygemm kernel.
AWQ's layout is made here, behind the load: `pytorch_awq`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, one_line, require
from shortstack.pretrained import load, of_decoder

PLAIN = "none"
EXTRA = "quantize"
AWQ = "awq-int4"
GROUP = 128
"""Weights that share a scale in torchao's int4: its default."""


def load_quantized(path: Path, word: str, dtype: str, device: Any) -> tuple[Any, dict[str, Any]]:
    """The model on `device` with its linear layers as `word` says, all else in `dtype`; and the
    facts for a session's info, in bytes.

    Tensors go to the device one by one and are quantized there: no copy in `dtype` of the whole is
    made, but for awq-int4. Raises ShortstackError where nothing was quantized or the libraries
    refuse, MissingExtraError where they are missing.
    """
    import torch

    if word == AWQ:
        return _load_awq(path, device)
    package = "torchao" if word.startswith("torchao") else "bitsandbytes"
    require(("accelerate", package), EXTRA, f"quantize={word}")
    kind = getattr(torch, dtype)
    with _one_line_errors(word, package), _device(torch, device):
        config = _torchao() if package == "torchao" else _bitsandbytes(word, kind)
        model = load(path, kind, quantization=config, device=device)
    return model, _facts(model, word)


def _load_awq(path: Path, device: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from shortstack.runtimes.pytorch_awq import INSTALL, load_awq

    with _one_line_errors(AWQ, "autoawq's Triton kernel", INSTALL), _device(torch, device):
        model = load_awq(path, device)
    return model, _facts(model, AWQ)


@contextlib.contextmanager
def _device(torch: Any, device: Any) -> Iterator[None]:
    """torchao packs on the current device, whichever the weights are on."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _one_line_errors(
    word: str, package: str, install: str = f"pip install 'shortstack[{EXTRA}]'"
) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, AssertionError) as error:
        if "out of memory" in str(error):
            raise
        raise ShortstackError(
            f"quantize={word} failed in {package} or below it: {one_line(str(error), 300)} "
            f"Install what fits this PyTorch: {install}"
        ) from None


def _bitsandbytes(word: str, kind: Any) -> Any:
    from transformers import BitsAndBytesConfig

    with _no_downloaded_kernels():
        import bitsandbytes  # noqa: F401  # transformers would import it unguarded
    if word == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind
    )


@contextlib.contextmanager
def _no_downloaded_kernels() -> Iterator[None]:
    """bitsandbytes 0.50, imported on a CPU with AVX512-BF16, has the package `kernels` download
    and load a binary from the hub; where that package is not to be had it does without."""
    before = {name: sys.modules[name] for name in ("kernels",) if name in sys.modules}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # so that importing it fails
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)


def _torchao() -> Any:
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    )


def _facts(model: Any, word: str) -> dict[str, Any]:
    import torch

    from shortstack.runtimes.pytorch_awq import AwqLinear

    kinds = (torch.nn.Linear, AwqLinear)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    kept = [
        name
        for name, module in linear.items()
        if not isinstance(module, AwqLinear) and not _is_quantized(module.weight)
    ]
    if len(kept) == len(linear):
        raise ShortstackError(
            f"quantize={word} turned none of {len(linear)} linear layers into fewer bits: their "
            f"widths may be no multiples of {GROUP}. Take another word, or leave it out."
        )
    total, per_token = weight_bytes(model)
    return {
        "quantized_layers": len(linear) - len(kept),
        "unquantized_layers": kept,
        "weight_bytes": total,
        "weight_bytes_per_token": per_token,
    }


def weight_bytes(model: Any) -> tuple[int, int]:
    """Bytes that all weights take where they are, scales included, and those that a token reads:
    without a table of embeddings that is not the head's, too, and without towers for images."""
    own = {id(weight): stored_bytes(weight) for weight in model.parameters()}
    text = {id(weight): own[id(weight)] for n, weight in model.named_parameters() if of_decoder(n)}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    read = sum(text.values())
    return sum(own.values()), read if tied else read - own[id(table.weight)]


def stored_bytes(weight: Any) -> int:
    """Bytes of a parameter and of the scales that belong to it."""
    if hasattr(weight, "__tensor_flatten__"):  # torchao: a tensor made of others
        names, _ = weight.__tensor_flatten__()
        return sum(stored_bytes(getattr(weight, name)) for name in names)
    scales = [getattr(weight, "SCB", None)]  # of bitsandbytes' int8: one a row
    state = getattr(weight, "quant_state", None)
    while state is not None:  # of its 4 bits: one a block; nested where those are quantized, too
        scales += [state.absmax, state.code]
        state = state.state2
    return sum(int(t.nbytes) for t in (weight.data, *scales) if t is not None)


def _is_quantized(weight: Any) -> bool:
    return hasattr(weight, "__tensor_flatten__") or not weight.dtype.is_floating_point
