"""GGUF files, opened by the real llama.cpp and held against float32 PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from shortstack import floats
from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter, gguf_chunks, to_gguf
from shortstack.export.gguf_meta import rope_factors
from shortstack.runtimes import open_session

Distance = Callable[[Checkpoint, Path, str], tuple[float, float]]
MakeVariant = Callable[..., Checkpoint]

VARIANTS = (
    "llama-tied",
    "llama-untied",
    "llama-biases",
    "llama3-rope",
    "linear-rope",
    "mistral-untied",
    "wide-heads",
)


def spec(precision: str, **options: str) -> ExportSpec:
    return ExportSpec.parse(f"gguf:{precision}", **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_f32_computes_what_the_checkpoint_computes(
    name: str, make_variant: MakeVariant, distance: Distance, tmp_path: Path
) -> None:
    checkpoint = make_variant(name)
    artifact = to_gguf.export(checkpoint, spec("F32"), tmp_path)
    assert max(distance(checkpoint, artifact.path, "llama.cpp")) < 1e-5


def test_without_the_permutation_of_q_the_distance_shows_it(
    checkpoint: Checkpoint,
    distance: Distance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_chunks, "interleave_rope", lambda array, heads: array)
    artifact = to_gguf.export(checkpoint, spec("F32"), tmp_path)
    assert min(distance(checkpoint, artifact.path, "llama.cpp")) > 0.1


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        ("F16", 1e-5),
        ("BF16", 1e-3),
        ("Q8_0", 1e-2),
        ("Q6_K", 1e-2),
        ("Q5_K_M", 0.05),
        ("Q4_K_M", 0.1),
        ("Q4_1", 0.3),
        ("Q4_0", 0.3),
    ],
)
def test_each_precision_is_as_near_as_its_bits_allow(
    precision: str, bound: float, checkpoint: Checkpoint, distance: Distance, tmp_path: Path
) -> None:
    artifact = to_gguf.export(checkpoint, spec(precision), tmp_path)
    assert max(distance(checkpoint, artifact.path, "llama.cpp")) < bound
    assert [p.name for p in tmp_path.iterdir()] == [f"model-{precision}.gguf"]
    predicted = to_gguf.predict(checkpoint, spec(precision))["size_bytes"]
    assert predicted == pytest.approx(artifact.size_bytes, rel=0.12)


def test_rows_that_fit_no_k_quant_are_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = to_gguf.export(checkpoint, spec("Q4_K_M"), tmp_path)
    (note,) = (note for note in artifact.notes if "fell back" in note)
    assert "Q4_K -> Q5_0" in note


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_the_head_option_reaches_the_head(
    name: str, make_variant: MakeVariant, tmp_path: Path
) -> None:
    checkpoint = make_variant(name)
    artifact = to_gguf.export(checkpoint, spec("Q8_0", head="Q4_0"), tmp_path)
    types = {row.name: row.type for row in to_gguf.read_table(artifact.path)}
    head = "token_embd.weight" if checkpoint.tied else "output.weight"
    assert types[head] == "Q4_0"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    if not checkpoint.tied:
        assert types["token_embd.weight"] == "Q8_0"


def test_head_and_embedding_of_an_untied_model_differ_if_asked(
    make_variant: MakeVariant, tmp_path: Path
) -> None:
    wanted = spec("F16", head="Q8_0", embedding="Q4_0")
    artifact = to_gguf.export(make_variant("llama-untied"), wanted, tmp_path)
    types = {row.name: row.type for row in to_gguf.read_table(artifact.path)}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q4_0")
    assert types["blk.0.ffn_up.weight"] == "F16"


def test_bytes_per_token_count_a_tied_table_once_and_an_untied_embedding_not(
    checkpoint: Checkpoint, make_variant: MakeVariant, tmp_path: Path
) -> None:
    tied = to_gguf.export(checkpoint, spec("F32"), tmp_path)
    untied = to_gguf.export(make_variant("llama-untied"), spec("F32"), tmp_path)
    assert tied.weight_bytes_per_token == 4 * checkpoint.n_params
    assert untied.weight_bytes_per_token == tied.weight_bytes_per_token


def test_the_llama3_divisors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / rope_factors(rope, 128), scaled.numpy(), rtol=1e-5)


def test_a_sliding_window_caps_the_context_and_is_told(
    make_variant: MakeVariant, tmp_path: Path
) -> None:
    checkpoint = make_variant(
        model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128
    )
    artifact = to_gguf.export(checkpoint, spec("F16"), tmp_path)
    fields = gguf.GGUFReader(artifact.path).fields
    assert fields["llama.context_length"].contents() == 128
    assert any("sliding window" in note for note in artifact.notes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    config: dict[str, Any], words: str, make_variant: MakeVariant, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match=words):
        to_gguf.export(make_variant(**config), spec("F16"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (spec("Q4_KM"), "Did you mean 'Q4_K_M'"),
        (spec("Q8_0", haed="F16"), "Did you mean 'head'"),
        (spec("Q8_0", head="Q9"), "unknown GGUF type for head 'Q9'"),
        (spec("Q8_0", head="Q6_K"), "multiples of 256"),
        (spec("Q8_0", head="F16", embedding="Q8_0"), "one table, one type"),
    ],
)
def test_a_spec_it_cannot_realise_is_refused(
    wanted: ExportSpec, words: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(ShortstackError, match=words):
        exporter("gguf").check(checkpoint, wanted)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_stored_types_survive_the_intermediate_file(
    dtype: str, make_variant: MakeVariant, distance: Distance, tmp_path: Path
) -> None:
    def convert(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half() if dtype == "F16" else tensors[name].float()

    checkpoint = make_variant(edit=convert)
    artifact = to_gguf.export(checkpoint, spec("Q8_0"), tmp_path)
    assert max(distance(checkpoint, artifact.path, "llama.cpp")) < 1e-2


def test_a_weight_beyond_f16_is_refused_not_made_infinite(
    make_variant: MakeVariant, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5

    with pytest.raises(ShortstackError, match="beyond the 65504"):
        to_gguf.export(make_variant(edit=enlarge), spec("F16"), tmp_path)


def test_bfloat16_rounds_to_nearest_even() -> None:
    import torch

    values = np.array([1.0, 1.00390625, 1.01171875, -3.14159, 1e-30, 65504.0], np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(floats.from_bfloat16(floats.to_bfloat16(values)), expected)


@pytest.mark.parametrize(
    ("wanted", "limit"),
    [
        (spec("F32"), 300_000),
        (spec("Q8_0"), 300_000),
        (spec("F32", head="F32"), 700_000),  # the intermediate file, BF16, fits
    ],
    ids=["writer", "intermediate", "libllama"],
)
def test_a_full_disk_is_one_clear_line(
    wanted: ExportSpec,
    limit: int,
    checkpoint: Checkpoint,
    tmp_path: Path,
    small_files: Callable[[int], None],
) -> None:
    small_files(limit)
    with pytest.raises(ShortstackError, match="disk full while writing"):
        to_gguf.export(checkpoint, wanted, tmp_path)


def test_too_little_space_is_told_before_the_work(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ShortstackError, match="disk full: 1 MB are needed"):
        to_gguf.export(checkpoint, spec("F32"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_llama_cpp_cuts_text_as_tokenizer_json_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    artifact = to_gguf.export(checkpoint, spec("F16"), tmp_path)
    with open_session(artifact.path, "llama.cpp", threads=1, context_tokens=32) as session:
        for text in ("Hello  world 12345", "<|im_start|>user\nHi<|im_end|>", "né 你好 🙂\r\n\t x"):
            assert session.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids
