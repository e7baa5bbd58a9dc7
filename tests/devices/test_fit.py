"""What the KV cache takes and whether a model fits, from headers; and what is in the page cache."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from shortstack.devices import fit
from shortstack.devices.page_cache import prepare, resident_share
from shortstack.devices.workload import Workload
from shortstack.doctor.probes import write_tiny_gguf

from .conftest import MakeCase


def test_a_checkpoint_tells_its_cache(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    head = config["hidden_size"] // config["num_attention_heads"]
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
    assert fit.kv_values_per_token(tiny, "checkpoint") == values
    assert fit.kv_bytes_per_token(tiny, "checkpoint", "float32") == 4 * values
    assert fit.kv_bytes_per_token(tiny, "checkpoint", "Q8_0") == values * 34 // 32
    assert fit.kv_bytes_per_token(tiny, "checkpoint", None) is None


def test_a_gguf_file_tells_its_cache(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    from shortstack.gguf_header import read_header

    header = read_header(path)
    arch = header.text("general.architecture")
    layers, heads = (
        header.integer(f"{arch}.block_count"),
        header.integer(f"{arch}.attention.head_count"),
    )
    width = header.integer(f"{arch}.embedding_length") // heads
    kv_heads = header.integer(f"{arch}.attention.head_count_kv")
    assert fit.kv_values_per_token(path, "gguf") == 2 * layers * kv_heads * width


def test_a_genai_folder_tells_its_cache_and_another_does_not(tmp_path: Path) -> None:
    assert fit.kv_values_per_token(tmp_path, "onnx") is None
    decoder = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_size": 64}
    config = {"model": {"decoder": decoder}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert fit.kv_values_per_token(tmp_path, "onnx") == 2 * 3 * 2 * 64


def test_what_fits_is_not_refused(make_case: MakeCase, workload: Workload) -> None:
    artifact = make_case("instant").artifact
    assert fit.refusal(artifact, workload, "cpu", {}, {}) is None
    assert fit.refusal(artifact, workload, "cuda:0", {}, {}) is None  # nothing is known of it
    assert fit.refusal(artifact, workload, "cuda:0", {"vram_bytes": 4096}, {}) is None


def test_what_does_not_fit_says_what_it_needs_and_what_there_is(
    make_case: MakeCase, workload: Workload
) -> None:
    artifact = dataclasses.replace(make_case("instant").artifact, size_bytes=15_000_000_000)
    why = fit.refusal(artifact, workload, "cuda:0", {"vram_bytes": 12_000_000_000}, {})
    assert why is not None
    assert "15.00 GB" in why
    assert "cuda:0 has 12.00 GB" in why


def test_the_cache_counts_with_batch_and_context(tiny: Path, make_case: MakeCase) -> None:
    artifact = dataclasses.replace(make_case("instant").artifact, path=tiny, n_params=1000)
    artifact = dataclasses.replace(
        artifact, spec=dataclasses.replace(artifact.spec, format="checkpoint", precision="float16")
    )
    values = fit.kv_values_per_token(tiny, "checkpoint")
    assert values is not None
    work = Workload(prompt_tokens=500, decode_tokens=99, batch=7, threads=1)
    needed = 1000 * 2 + values * 2 * 600 * 7
    options = {"dtype": "float16"}  # of the cache; the weights' type is the artifact's
    exact, less = {"vram_bytes": needed}, {"vram_bytes": needed - 1}
    assert fit.refusal(artifact, work, "cuda:0", exact, options) is None
    assert fit.refusal(artifact, work, "cuda:0", less, options) is not None


def test_a_model_of_which_layers_stay_in_ram_is_tried(
    make_case: MakeCase, workload: Workload
) -> None:
    artifact = dataclasses.replace(make_case("instant").artifact, size_bytes=15_000_000_000)
    small = {"vram_bytes": 12_000_000_000}
    layers = artifact.n_layers
    for some in ("0", "2", str(layers)):
        assert fit.refusal(artifact, workload, "cuda:0", small, {"gpu_layers": some}) is None
    for every in ("all", str(layers + 1)):
        assert fit.refusal(artifact, workload, "cuda:0", small, {"gpu_layers": every})


def test_a_cache_with_windows_refuses_nothing(
    tiny: Path, tmp_path: Path, make_case: MakeCase
) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    windows = {
        "model_type": "mistral",
        "sliding_window": 64,
        "architectures": ["MistralForCausalLM"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config | windows), encoding="utf-8")
    artifact = dataclasses.replace(make_case("instant").artifact, path=tmp_path, n_params=1000)
    artifact = dataclasses.replace(
        artifact, spec=dataclasses.replace(artifact.spec, format="checkpoint", precision="float32")
    )
    work = Workload(prompt_tokens=100_000, decode_tokens=8, threads=1)
    assert fit.refusal(artifact, work, "cuda:0", {"vram_bytes": 5000}, {}) is None
    assert fit.refusal(artifact, work, "cuda:0", {"vram_bytes": 3000}, {}) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in the page cache")
def test_dropped_pages_are_gone_and_read_ones_are_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(1 << 22))
    (tmp_path / "empty").touch()
    assert resident_share(tmp_path) == 1.0
    cold = prepare(tmp_path, cold=True)
    if cold["why_not_cold"]:  # a file system in memory
        assert cold["load_kind"] == "warm"
        pytest.skip(cold["why_not_cold"])
    assert (cold["load_kind"], cold["page_cache_share"]) == ("cold", 0.0)
    (tmp_path / "a").read_bytes()
    assert prepare(tmp_path, cold=False) == {
        "load_kind": "warm",
        "page_cache_share": 1.0,
        "why_not_cold": None,
    }


def test_a_system_that_cannot_drop_pages_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    (tmp_path / "a").write_bytes(b"x")
    told = prepare(tmp_path, cold=True)
    assert told["load_kind"] == "warm"
    assert "no posix_fadvise" in told["why_not_cold"]
