"""mobius-onnx: builds the graph from the config alone; weights stay in the checkpoint's files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import VerificationError
from shortstack.export.onnx_builders import ungroupable
from shortstack.export.weights import Weights

if TYPE_CHECKING:
    import onnx_ir as ir

PACKAGES = ("mobius", "onnxscript", "torch", "transformers")
EXTRA = "onnx"


def unsupported(checkpoint: Checkpoint) -> str | None:
    """Why this builder cannot be used: its MLPs have no biases, as measured with version 0.1.0."""
    inside = checkpoint.family.layer_prefix.partition("{")[0]
    biases = [
        name
        for name in checkpoint.tensors
        if name.startswith(inside) and ".mlp." in name and name.endswith(".bias")
    ]
    if biases:
        return f"mobius builds MLPs without biases, and {biases[0]} is one"
    return ungroupable(checkpoint)


def peak_ram_bytes(checkpoint: Checkpoint) -> int:
    """Anonymous memory of `build`: the packages, of which transformers imports accelerate and scipy
    where they are, and the graph; weights are mapped."""
    return 345_000_000


def disk_bytes(checkpoint: Checkpoint) -> int:
    return 0


def build(checkpoint: Checkpoint, scratch: Path) -> ir.Model:
    """In the child: a float32 graph whose tensors are read when they are written."""
    import mobius

    text = {**checkpoint.text, "architectures": [_decoder_architecture(checkpoint)]}
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(text), encoding="utf-8")
    with _quiet():
        package = mobius.build(
            str(scratch), dtype="f32", execution_provider="cpu", load_weights=False
        )
        module = mobius.registry.get(str(text["model_type"]))(package.config)
        tensors = module.preprocess_weights(_tensors(checkpoint))
        model: ir.Model = package["model"]
        unknown = set(tensors) - set(model.graph.initializers)
        package.apply_weights(tensors)
    _check_applied(checkpoint, model, unknown)
    return model


def _check_applied(checkpoint: Checkpoint, model: ir.Model, unknown: set[str]) -> None:
    """Raise VerificationError for tensors without a place and places without a tensor.

    mobius logs the first and leaves the second to whoever opens the file.
    """
    if checkpoint.tied:
        unknown = unknown - {checkpoint.family.head.hf}
    empty = [name for name, v in model.graph.initializers.items() if v.const_value is None]
    for kind, found in (("leaves out", sorted(unknown)), ("expects", empty)):
        if found:
            raise VerificationError(
                f"mobius {kind} {found[0]}, which the checkpoint has otherwise. "
                "Try another builder: --option builder=genai"
            )


def _decoder_architecture(checkpoint: Checkpoint) -> str:
    """The class of the decoder alone, where the checkpoint's has other towers, too."""
    return "Gemma3ForCausalLM" if checkpoint.family.nested else checkpoint.family.architecture


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """The decoder's tensors by the names they have in a model without other towers."""
    import torch

    weights, family = Weights(checkpoint), checkpoint.family
    outside = family.layer_prefix.partition("model.layers.")[0]
    found: dict[str, Any] = {}
    for name, info in checkpoint.tensors.items():
        if not name.startswith(family.others or ("\0",)):
            stored = weights.stored(name, writable=True)
            if info.dtype == "BF16":
                tensor = torch.from_numpy(stored.view("int16")).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(stored)
            found[name.removeprefix(outside)] = tensor
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It prints and logs; what goes wrong comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
