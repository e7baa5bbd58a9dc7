"""Every file type that libllama writes: its mix foretold, its error in proportion to its bits."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from shortstack import libllama
from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import to_gguf
from shortstack.export.gguf_mix import MIXES, requires_importance
from shortstack.export.gguf_options import types_of
from shortstack.export.gguf_types import PRECISIONS, TYPES
from shortstack.export.gguf_write import write_floats
from shortstack.progress import silent

Distance = Callable[[Checkpoint, Path, str], tuple[float, float]]
MakeVariant = Callable[..., Checkpoint]
Tensors = dict[str, torch.Tensor]

BLIND = [name for name in PRECISIONS if name not in ("F32", "F16", "BF16")]
"""The quantized file types."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "ungrouped, untied": ("Llama", {"num_key_value_heads": 8, "tie_word_embeddings": False}),
    "fused": ("Phi3", {"num_key_value_heads": 4, "pad_token_id": None}),
    "80 layers": ("Llama", {"num_key_value_heads": 2, "num_hidden_layers": 80}),
    "rows of 160": ("Llama", {"hidden_size": 128, "intermediate_size": 160}),
    "rows of 80": ("Llama", {"hidden_size": 128, "intermediate_size": 80}),
}
"""What the mixes look at: query heads a key head, an own head, fused projections, depth, rows."""


def spec(precision: str, **options: str) -> ExportSpec:
    return ExportSpec.parse(f"gguf:{precision}", **options)


@pytest.mark.parametrize("name", TYPES)
def test_the_type_table_is_that_of_the_gguf_package(name: str) -> None:
    kind, facts = gguf.GGMLQuantizationType[name], TYPES[name]
    assert facts.number == kind.value
    assert (facts.block, facts.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_the_file_types_are_those_of_the_gguf_package() -> None:
    known = {
        kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value
        for kind in gguf.LlamaFileType
    }
    assert {name: known[name] for name in PRECISIONS} == {
        name: precision.file_type for name, precision in PRECISIONS.items()
    }
    assert set(known) - set(PRECISIONS) == {"MXFP4_MOE", "NVFP4", "GUESSED"}
    assert set(MIXES) <= set(PRECISIONS)


@pytest.fixture(scope="module", params=SHAPES)
def shape(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Path]:
    """A random model of a shape, 16 layers by default, and its GGUF file of plain floats."""
    classes, fields = SHAPES[request.param]
    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    folder = tmp_path_factory.mktemp("shape")
    config = getattr(transformers, f"{classes}Config")(**{**sizes, **fields})
    with torch.device("meta"):
        model = getattr(transformers, f"{classes}ForCausalLM")(config).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    checkpoint = Checkpoint.open(folder)
    write_floats(checkpoint, folder / "plain.gguf", None, silent)
    return checkpoint, folder / "plain.gguf"


def libllamas_choice(source: Path, precision: str, importance: bool) -> dict[str, str]:
    """What libllama says in a dry run: name of a matrix -> type."""
    lib = libllama.libllama()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.dry_run = PRECISIONS[precision].file_type, True
    one = (ctypes.c_float * 1)(1.0)
    rows = (lib.llama_model_imatrix_data * 2)(lib.llama_model_imatrix_data(b"any", one, 1))
    if importance:
        params.imatrix = rows
    libllama.clear_log()
    assert lib.llama_model_quantize(bytes(source), b"", params) == 0, libllama.last_words()
    pattern = r"\] +(\S+) .*type = +bf16, .* \((\w+)\)$"
    found = [re.search(pattern, line) for line in libllama.log()]
    return {match[1]: match[2].upper() for match in found if match}


@pytest.mark.parametrize("importance", [False, True], ids=["blind", "weighed"])
def test_libllama_gives_each_tensor_the_type_that_the_tables_foretell(
    importance: bool, shape: tuple[Checkpoint, Path]
) -> None:
    checkpoint, source = shape
    shapes = to_gguf.tensor_shapes(checkpoint)
    checked = 0
    for precision in BLIND:
        wanted = spec(precision, imatrix="yes") if importance else spec(precision)
        chosen = types_of(checkpoint, wanted, shapes)
        if not importance and requires_importance(chosen, precision):
            continue
        if precision == "Q1_0" and any(s[-1] % 128 for s in shapes.values() if len(s) > 1):
            continue
        foretold = {name: choice.type for name, choice in chosen.items()}
        assert libllamas_choice(source, precision, importance) == foretold, precision
        checked += 1
    assert checked > 15
