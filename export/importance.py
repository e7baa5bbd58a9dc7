"""What calibration text says of a checkpoint: how much each input channel is used, how large
activations get. One pass in float32, one layer in memory, in a child.

The importance of a channel is the mean over tokens of its square: with it a quantizer minimises
the error of a layer's results instead of the error of its weights (llama.cpp, tools/imatrix).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from shortstack import child
from shortstack.activations import ActivationRange, Peak
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, one_line, require
from shortstack.export.importance_file import Squares, write_channels, write_importance
from shortstack.export.weights import Weights
from shortstack.pretrained import attention_of, config_of, layers_return_tuples
from shortstack.progress import OnProgress, silent

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_S = 24 * 3600.0
BATCH_TOKENS = 2048
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Has glibc give large tensors back when they are freed. Left to itself it raises this threshold
and keeps them: 1.0 GB instead of 0.42 for 135 M parameters."""
HEAD = "lm_head"
"""What reads the last norm's results; a layer's modules are called "layers.3.mlp.up_proj"."""


def observe(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    file: Path | None = None,
    *,
    channels: Path | None = None,
    progress: OnProgress = silent,
) -> ActivationRange:
    """Run a checkpoint on token windows; write the importance matrix to `file`, for libllama, and
    to `channels`, the head's input included, where they are given."""
    require(("torch", "transformers"), "prune", "running a model on calibration text")
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] < 1:
        raise ShortstackError(
            f"calibration windows must have one length, got {lengths or 'none'}. Give more text."
        )
    answer = child.call(
        "shortstack.export.importance:observe_here",
        {
            "checkpoint": str(checkpoint.path),
            "windows": [list(window) for window in windows],
            "file": str(file) if file else None,
            "channels": str(channels) if channels else None,
        },
        timeout_s=TIMEOUT_S,
        what="running the model on calibration text",
        progress=progress,
        env=RETURN_MEMORY,
    )
    return ActivationRange.from_dict(answer)


def peak_ram_bytes(checkpoint: Checkpoint, n_tokens: int = 8192) -> int:
    """Anonymous memory of `observe`: torch, one layer in float32 and one of its matrices again
    while it is converted, and the hidden states of all tokens."""
    sizes, prefix = checkpoint.dims, checkpoint.family.layer_prefix.format(i=0)
    matrices = [
        4 * math.prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix)
    ]
    widest = max(sizes["ff"], sizes["d"]) * BATCH_TOKENS * 4
    layer = sum(matrices) + max(matrices)
    return 330_000_000 + layer + 3 * n_tokens * sizes["d"] * 4 + 4 * widest


def observe_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """In the child: the pass."""
    import torch

    checkpoint = Checkpoint.open(Path(request["checkpoint"]))
    tokens = torch.tensor(request["windows"])
    gauge = Gauge()
    with torch.inference_mode():
        _run(checkpoint, tokens, gauge)
    if request["file"]:
        write_importance(Path(request["file"]), gauge.squares(checkpoint), *tokens.shape)
    if request["channels"]:
        write_channels(Path(request["channels"]), gauge.channels())
    return gauge.range(tokens.numel()).to_dict()


class Gauge:
    """Sums of squares by layer and module, and the peaks."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], NDArray[np.float64]] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self._head: tuple[NDArray[np.float64], int] = np.zeros(1), 0
        self._inputs = Peak(0.0, 0, "none")
        self._anywhere = Peak(0.0, 0, "none")

    def read(self, layer: int, module: str, inputs: Tensor) -> None:
        """Count what a linear layer reads; shape (..., channels)."""
        sums, count = _squares(inputs)
        key = (layer, module)
        self._sums[key] = self._sums.get(key, 0.0) + sums
        self._counts[key] = self._counts.get(key, 0) + count
        peak = Peak(float(inputs.abs().max()), layer, f"input of {module}")
        self._inputs = max(self._inputs, peak, key=lambda p: p.value)

    def read_by_head(self, inputs: Tensor) -> None:
        sums, count = _squares(inputs)
        self._head = self._head[0] + sums, self._head[1] + count

    def wrote(self, layer: int, module: str, outputs: Tensor) -> None:
        peak = Peak(float(outputs.abs().max()), layer, module)
        self._anywhere = max(self._anywhere, peak, key=lambda p: p.value)

    def range(self, n_tokens: int) -> ActivationRange:
        anywhere = max(self._inputs, self._anywhere, key=lambda p: p.value)
        return ActivationRange(self._inputs, anywhere, n_tokens)

    def squares(self, checkpoint: Checkpoint) -> dict[str, tuple[NDArray[np.float64], int]]:
        """By the names of GGUF."""
        found = {}
        for (layer, module), sums in self._sums.items():
            for rule in checkpoint.family.layer:
                if rule.hf == f"{module}.weight":
                    name = f"blk.{layer}.{rule.gguf}"
                    found[name] = (sums, self._counts[layer, module])
        return found

    def channels(self) -> Squares:
        """By the names of modules, the head's too."""
        found = {
            f"layers.{layer}.{module}": (sums, self._counts[layer, module])
            for (layer, module), sums in self._sums.items()
        }
        return {**found, HEAD: self._head}


def _squares(inputs: Tensor) -> tuple[NDArray[np.float64], int]:
    """Sum of squares of each channel, and the tokens that are summed."""
    import torch

    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat.square().sum(0, dtype=torch.float64).numpy(), len(flat)


def _run(checkpoint: Checkpoint, tokens: Tensor, gauge: Gauge) -> None:
    decoder = _skeleton(checkpoint)
    weights = Weights(checkpoint)
    batches = [
        _first_layer(checkpoint, decoder, weights, batch)
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))
    ]
    for index, layer in enumerate(decoder.layers):
        prefix = checkpoint.family.layer_prefix.format(i=index)
        _fill(layer, prefix, checkpoint, weights)
        with _watched(layer, index, gauge):
            for number, (hidden, arguments) in enumerate(batches):
                output = layer(hidden, **arguments[index])
                hidden = output[0] if isinstance(output, tuple) else output
                gauge.wrote(index, "residual stream", hidden)
                batches[number] = (hidden, arguments)
        layer.to("meta")
        child.report_progress(index + 1, len(decoder.layers))
    for hidden, _ in batches:
        gauge.read_by_head(decoder.norm(hidden))


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The decoder in transformers, its parameters without memory, its buffers as they should be."""
    from transformers import AutoModelForCausalLM

    try:
        config = config_of(checkpoint.path).get_text_config()
        config.dtype = None
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **attention_of(config)
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ShortstackError(
            f"transformers cannot open {checkpoint.path}: {one_line(str(error), 300)} "
            "Mend config.json or download the folder again."
        ) from None
    return model.eval().get_decoder()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules made inside hold parameters on the meta device; their buffers are computed."""
    from torch import nn

    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    with mock.patch.object(nn.Module, "register_parameter", register):
        yield


def _first_layer(
    checkpoint: Checkpoint, decoder: Any, weights: Weights, tokens: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states before layer 0 and what the model calls each layer with.

    Only the rows of the token table that the text uses are read.
    """
    import torch

    family = checkpoint.family
    used, short = torch.unique(tokens, return_inverse=True)
    for rule in family.outer:
        module = decoder.get_submodule(rule.hf.removesuffix(".weight").rpartition(".")[2])
        rows = used.numpy() if rule.shape[0] == "vocab" else slice(None)
        _set(module, "weight", _float32(checkpoint, weights, rule.hf, rows))
    decoder.embed_tokens.padding_idx = None
    first: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    in_tuple = layers_return_tuples(decoder.config)

    def note(hidden: Tensor, **named: Any) -> Any:
        first.append(hidden)
        arguments.append(named)
        return (hidden,) if in_tuple else hidden

    for layer in decoder.layers:
        layer.forward = note  # shadows the method of the class for this one layer
    decoder(input_ids=short, use_cache=False)
    for layer in decoder.layers:
        del layer.forward
    return first[0], arguments


def _fill(layer: Any, prefix: str, checkpoint: Checkpoint, weights: Weights) -> None:
    for name, _ in list(layer.named_parameters()):
        stem, _, last = name.rpartition(".")
        _set(layer.get_submodule(stem), last, _float32(checkpoint, weights, prefix + name))


def _set(module: Any, name: str, value: Tensor) -> None:
    from torch import nn

    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _float32(
    checkpoint: Checkpoint, weights: Weights, name: str, rows: Any = slice(None)
) -> Tensor:
    import torch

    from shortstack.floats import from_bfloat16

    stored = weights.stored(name)[rows]
    if checkpoint.tensors[name].dtype == "BF16":
        return torch.from_numpy(from_bfloat16(stored))
    return torch.from_numpy(np.array(stored, np.float32))


@contextlib.contextmanager
def _watched(layer: Any, index: int, gauge: Gauge) -> Iterator[None]:
    """Report to the gauge what the linear layers of a layer read and write."""
    from torch import nn

    def watch(name: str) -> Any:
        def seen(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            gauge.read(index, name, inputs[0])
            gauge.wrote(index, name, output)

        return seen

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
