"""Importance and activation ranges: equal to hooks on the whole model in transformers, and used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.zoo import make_model
from transformers import AutoModelForCausalLM

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter, to_gguf
from shortstack.export.importance import HEAD, observe
from shortstack.export.importance_file import read_channels, read_importance

MakeVariant = Callable[..., Checkpoint]
FAMILIES = ("phi3", "smollm3", "gemma3-multimodal")


def windows(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    made: list[list[int]] = torch.randint(8, 500, (count, length), generator=generator).tolist()
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_squares_and_peaks_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model(name, tmp_path / "model"))
    given = windows(3, 32)
    files = tmp_path / "imatrix.gguf", tmp_path / "imatrix.safetensors"
    seen = observe(checkpoint, given, files[0], channels=files[1])
    found, channels = read_importance(files[0]), read_channels(files[1])

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}
    peak = 0.0

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
            nonlocal peak
            flat = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + flat.double().square().mean(0)
            peak = max(peak, float(flat.abs().max()))

        return hook

    decoder = model.get_decoder()
    for path, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(path))
    with torch.inference_mode():
        last = decoder(input_ids=torch.tensor(given)).last_hidden_state
    assert seen.n_tokens == 96
    assert seen.inputs.value == pytest.approx(peak, rel=1e-4)
    names = {
        f"layers.{i}.{rule.hf.removesuffix('.weight')}": f"blk.{i}.{rule.gguf}"
        for i in range(checkpoint.n_layers)
        for rule in checkpoint.family.layer
    }
    assert {names[path] for path in sums} == set(found)
    for path, expected in sums.items():
        np.testing.assert_allclose(found[names[path]], expected.numpy(), rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(channels[path], found[names[path]], rtol=1e-5)
    head = last.reshape(-1, last.shape[-1]).double().square().mean(0).numpy()
    np.testing.assert_allclose(channels[HEAD], head, rtol=1e-3)
    assert len(channels) == len(found) + 1


def test_weighing_channels_brings_quantized_weights_nearer(
    checkpoint: Checkpoint,
    tokens: list[int],
    distance: Callable[[Checkpoint, Path, str], tuple[float, float]],
    tmp_path: Path,
) -> None:
    """Calibrated on other text than compared on would be fairer; here the mechanism is shown."""
    kl = {}
    for choice in ("no", "yes"):
        out = tmp_path / choice
        out.mkdir()
        spec = ExportSpec.parse("gguf:Q4_0", imatrix=choice)
        made = to_gguf.export(checkpoint, spec, out, calibration=[tokens])
        kl[choice] = sum(distance(checkpoint, made.path, "llama.cpp"))
        assert any("importance matrix" in note for note in made.notes) == (choice == "yes")
    assert kl["yes"] < 0.95 * kl["no"]


def test_importance_asks_for_text_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    spec = ExportSpec.parse("gguf:Q4_0", imatrix="yes")
    assert to_gguf.calibrates(checkpoint, spec)
    with pytest.raises(ShortstackError, match="no calibration text"):
        to_gguf.export(checkpoint, spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_activations_beyond_float16_refuse_f16_and_leave_q8_0(
    make_variant: MakeVariant, tokens: list[int], tmp_path: Path
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        """The same function, but what down_proj reads is 2^22 times as large in layer 2."""
        tensors["model.layers.2.mlp.up_proj.weight"] *= 2.0**22
        tensors["model.layers.2.mlp.down_proj.weight"] *= 2.0**-22

    checkpoint = make_variant(edit=widen)
    message = r"in layer 2 \(input of mlp.down_proj\), beyond the 65504"
    with pytest.raises(ShortstackError, match=message):
        to_gguf.export(checkpoint, ExportSpec.parse("gguf:F16"), tmp_path, calibration=[tokens])
    assert list(tmp_path.iterdir()) == []
    made = to_gguf.export(
        checkpoint, ExportSpec.parse("gguf:Q8_0", imatrix="yes"), tmp_path, calibration=[tokens]
    )
    assert any("use bfloat16 or float32" in note for note in made.notes)


def test_q8_0_alone_needs_no_calibration(checkpoint: Checkpoint) -> None:
    gguf = exporter("gguf")
    assert not gguf.calibrates(checkpoint, ExportSpec.parse("gguf:Q8_0"))
    assert gguf.calibrates(checkpoint, ExportSpec.parse("gguf:F16"))
