"""Weights quantized while they load: what is refused, what a session says, what a record counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack.bench.models import benchable
from shortstack.checkpoint import Checkpoint
from shortstack.devices import fit
from shortstack.devices.harness import as_loaded
from shortstack.devices.roofline.share import compute_type
from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.runtimes import open_session

TOKENS = [1, 50, 60, 70, 300, 20, 19]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'shortstack[quantize]'",
)


def opened(path: Path, **options: str) -> Any:
    return open_session(path, "pytorch", threads=1, context_tokens=16, options=options)


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")  # bitsandbytes and what it imports use what is deprecated
@pytest.mark.parametrize(("word", "agree"), [("bnb-int8", 1.0), ("bnb-nf4", 0.5)])
def test_a_quantized_model_is_near_the_model_and_says_its_bytes(
    tiny: Path, word: str, agree: float
) -> None:
    with opened(tiny) as session:
        truth = session.prefill(TOKENS, all_logits=True)
    with opened(tiny, quantize=word, dtype="float16") as session:
        logits, info = session.prefill(TOKENS, all_logits=True), session.info
    assert np.mean(logits.argmax(1) == truth.argmax(1)) >= agree
    assert not np.allclose(logits, truth, atol=0.05)  # it was quantized
    assert info["quantize"] == word
    assert info["unquantized_layers"] == ["lm_head"]
    assert info["quantized_layers"] == 7 * Checkpoint.open(tiny).n_layers
    planned = benchable(str(tiny), "float16", word)
    loaded = as_loaded(planned, info)
    assert loaded.weight_bytes_per_token == info["weight_bytes_per_token"] == info["weight_bytes"]
    assert planned.weight_bytes_per_token == pytest.approx(loaded.weight_bytes_per_token, rel=0.05)


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")
def test_bytes_are_those_of_weights_and_scales(tiny: Path) -> None:
    with opened(tiny, quantize="bnb-nf4", dtype="float16") as session:
        counted = session.info["weight_bytes"]
    tensors = Checkpoint.open(tiny).tensors
    expected = 0
    for name, tensor in tensors.items():
        n = int(np.prod(tensor.shape))
        matrix = ".layers." in name and len(tensor.shape) == 2
        expected += n // 2 + 4 * (n // 64) + 4 * 16 if matrix else 2 * n
    assert counted == expected


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        ({"quantize": "nf4"}, "cpu", "must be one of: none, bnb-int8"),
        ({"quantize": "bnb-int8"}, "cpu", "Add: --option dtype=float16"),
        ({"quantize": "torchao-int4", "dtype": "bfloat16"}, "cpu", "is for CUDA cards, cpu"),
        ({"quantize": "torchao-int4", "dtype": "float16"}, "cuda:0", "--option dtype=bfloat16"),
        ({"quantize": "awq-int4", "dtype": "float16"}, "cpu", "awq-int4 is for CUDA cards, cpu"),
        ({"quantize": "awq-int4"}, "cuda:0", "--option dtype=float16"),
        (
            {"quantize": "bnb-int8", "dtype": "float16", "cuda_graph": "on"},
            "cuda:0",
            "looks for outliers on the host",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, str], device: str, words: str
) -> None:
    with pytest.raises(ShortstackError, match=words) as caught:
        open_session(
            Path("none"), "pytorch", threads=1, context_tokens=4, device=device, options=options
        )
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_pip_command(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shortstack\[quantize\]'"):
        opened(tiny, quantize="bnb-nf4")


def test_a_plan_counts_the_bytes_that_quantizing_leaves(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    matrices = [
        int(np.prod(t.shape))
        for name, t in checkpoint.tensors.items()
        if ".layers." in name and len(t.shape) == 2
    ]
    found = benchable(str(tiny), "float16", "bnb-nf4")
    rest = checkpoint.n_params - sum(matrices)
    assert found.spec.precision == "bnb-nf4"
    assert found.weight_bytes_per_token == 2 * rest + round(0.5625 * sum(matrices))
    assert found.size_bytes == found.weight_bytes_per_token  # the head is tied
    assert fit.weight_bytes(found.to_dict()) == found.size_bytes


@pytest.mark.parametrize(
    ("precision", "dtype", "computed_in"),
    [
        ("bnb-int8", "float16", "int8"),
        ("bnb-nf4", "float16", "float16"),
        ("bnb-nf4", "bfloat16", "bfloat16"),
        ("torchao-int4", "bfloat16", "bfloat16"),
        ("awq-int4", "float16", "float16"),
    ],
)
def test_products_are_in_the_type_of_the_kernel(
    precision: str, dtype: str, computed_in: str
) -> None:
    record = {
        "artifact": {"spec": {"precision": precision}},
        "options": {"dtype": dtype, "quantize": precision},
        "device": "cuda:0",
        "runtime": "pytorch",
    }
    assert compute_type(record) == computed_in
