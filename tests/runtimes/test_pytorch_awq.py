"""Weights in AWQ's layout: what the codes say, what autoawq's kernel makes of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch

from shortstack.errors import ShortstackError
from shortstack.runtimes import pytorch_awq
from shortstack.runtimes.pytorch_awq import AwqLinear, convert, quantized
from shortstack.runtimes.pytorch_quantize import load_quantized, weight_bytes

SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bits that outputs 0..7 begin at: the order 0, 2, 4, 6, 1, 3, 5, 7, read from the other side."""


def unpacked(words: torch.Tensor) -> np.ndarray:
    """Codes, shape (n, out), of int32 words, shape (n, out / 8)."""
    bits = words.numpy().view(np.uint32)[:, :, None] >> np.array(SHIFTS, np.uint32)
    return (bits & 15).reshape(len(words), -1).astype(np.float64)


def dequantized(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> np.ndarray:
    """Weights, shape (out, in)."""
    qweight, qzeros, scales = parts
    zeros, steps = (a.repeat(128, 0) for a in (unpacked(qzeros), scales.double().numpy()))
    return np.asarray(((unpacked(qweight) - zeros) * steps).T)


@pytest.mark.parametrize("kind", ["centred", "positive", "negative", "zeros"])
def test_codes_say_every_weight_within_half_a_step(kind: str) -> None:
    weight = 0.02 * torch.randn(24, 384, generator=torch.Generator().manual_seed(0))
    weight = {
        "centred": weight,
        "positive": weight.abs() + 0.1,
        "negative": -weight.abs() - 0.1,
    }.get(kind, torch.zeros(24, 384))
    parts = quantized(weight.half())
    assert [tuple(one.shape) for one in parts] == [(384, 3), (3, 3), (3, 24)]
    assert [one.dtype for one in parts] == [torch.int32, torch.int32, torch.float16]
    steps = parts[2].double().numpy().repeat(128, 0).T
    wrong = np.abs(dequantized(parts) - weight.half().double().numpy()) / steps
    # 15 steps of a scale that float16 rounded by 2^-11 may end that much before the range does
    assert wrong.max() <= 0.5 + 15 * 2**-11


def test_nibbles_lie_where_awq_wants_them() -> None:
    codes = torch.arange(8).reshape(1, 8)
    assert int(pytorch_awq.packed(codes)) & 0xFFFFFFFF == 0x75316420


def small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def test_layers_but_the_head_are_turned_and_their_bytes_counted() -> None:
    model = small().half()
    convert(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert linear == ["lm_head"]
    turned = [m for m in model.modules() if isinstance(m, AwqLinear)]
    assert len(turned) == 7 * 2
    n_weights = sum(m.in_features * m.out_features for m in turned)
    in_layers = n_weights // 2 + n_weights // 128 * 2 + n_weights // 256
    table, norms = 512 * 128 * 2, 5 * 128 * 2
    assert weight_bytes(model) == (in_layers + 2 * table + norms, in_layers + table + norms)


def test_a_missing_package_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    pytorch_awq.kernels.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    small().save_pretrained(tmp_path)
    with pytest.raises(ShortstackError, match="'autoawq', which.*pip install --no-deps") as caught:
        load_quantized(tmp_path, "awq-int4", "float16", torch.device("cpu"))
    assert "\n" not in str(caught.value)


def needed() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, AWQ's kernel was not tried: pip install triton")
    try:
        importlib.metadata.distribution("autoawq")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"autoawq is not installed, its kernel was not tried: {pytorch_awq.INSTALL}")


def test_the_kernel_multiplies_what_the_codes_say(tmp_path: Path) -> None:
    """In Triton's interpreter, on the CPU: both kernels, a split of 4 and one of 8, a bias."""
    needed()
    script = dedent(
        """
        import contextlib, sys
        import numpy as np, torch
        from triton.runtime import interpreter
        before = interpreter._patch_lang_tensor
        def patched(tensor, scope):  # triton 3.6 wants an int of shape (1,), numpy 2.4 makes none
            before(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        interpreter._patch_lang_tensor = patched
        torch.cuda.device = lambda number: contextlib.nullcontext()  # autoawq's file enters it
        from shortstack.runtimes import pytorch_awq
        torch.manual_seed(0)
        found = {}
        for n_in, split in ((384, 4), (512, 8)):
            layer = torch.nn.Linear(n_in, 48).half()
            made = pytorch_awq.AwqLinear(layer)
            assert made._split_k == split
            x = torch.randn(2, 3, n_in).half()
            found |= {f"{n_in}-x": x, f"{n_in}-bias": layer.bias, f"{n_in}-y": made(x)}
            pytorch_awq.MANY_ROWS = 6
            found[f"{n_in}-many"] = made(x)
            pytorch_awq.MANY_ROWS = 1024
            for name in ("qweight", "qzeros", "scales"):
                found[f"{n_in}-{name}"] = getattr(made, name)
        np.savez(sys.argv[1], **{k: v.detach().numpy() for k, v in found.items()})
        """
    )
    file = tmp_path / "found.npz"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-c", script, str(file)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(file) as found:
        for n_in in (384, 512):
            parts = [
                torch.from_numpy(found[f"{n_in}-{n}"]) for n in ("qweight", "qzeros", "scales")
            ]
            weight = dequantized((parts[0], parts[1], parts[2]))
            expected = found[f"{n_in}-x"].astype(np.float64) @ weight.T + found[f"{n_in}-bias"]
            for name in ("y", "many"):
                assert found[f"{n_in}-{name}"].shape == (2, 3, 48)
                # float16 sums of n_in products below 0.2: a step of 2^-11 at numbers up to 4
                np.testing.assert_allclose(found[f"{n_in}-{name}"], expected, atol=8e-3)
