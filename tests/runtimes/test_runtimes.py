"""Every runtime keeps the Session's promises, on a real file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.runtimes.precision import exact

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import MissingExtraError, ShortstackError
from shortstack.export import exporter
from shortstack.runtimes import RUNTIMES, open_session, runtimes_for
from shortstack.session import Resumable

TOKENS = [1, 50, 60, 70, 300, 20, 19, 45, 200, 210, 77, 12]


@pytest.fixture(scope="session")
def truth(tiny: Path) -> np.ndarray:
    with open_session(tiny, "pytorch", threads=1, context_tokens=16) as session:
        return session.prefill(TOKENS, all_logits=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_prefill_and_cached_decoding_give_the_oracles_logits(
    runtime: str, files: dict[str, Path], truth: np.ndarray
) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=len(TOKENS), options=exact(runtime)
    ) as session:
        assert session.vocab_size == 512
        every = session.prefill(TOKENS, all_logits=True)
        last = session.prefill(TOKENS)
        rows = [session.prefill(TOKENS[:5])] + [session.decode(t) for t in TOKENS[5:]]
    assert every.shape == (len(TOKENS), 512)
    assert last.shape == rows[0].shape == (512,)
    assert every.dtype == last.dtype == rows[-1].dtype == np.float32
    # the KV cache of llama.cpp is half precision
    tolerance = 0.05 if runtime == "llama.cpp" else 1e-3
    np.testing.assert_allclose(every, truth, atol=tolerance)
    np.testing.assert_allclose(last, truth[-1], atol=tolerance)
    np.testing.assert_allclose(np.array(rows), truth[4:], atol=tolerance)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_sequence_goes_on_from_an_earlier_token(
    runtime: str, files: dict[str, Path], truth: np.ndarray
) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=len(TOKENS), options=exact(runtime)
    ) as session:
        assert isinstance(session, Resumable)
        session.prefill([*TOKENS[:6], 400, 401, 402])
        first = session.resume(6, [7, 8])
        rows = session.resume(6, TOKENS[6:])
    assert first is not None
    assert rows is not None
    assert first.shape == (2, 512)
    assert rows.dtype == np.float32
    tolerance = 0.05 if runtime == "llama.cpp" else 1e-3
    np.testing.assert_allclose(rows, truth[6:], atol=tolerance)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_prefill_forgets_what_was_before(runtime: str, files: dict[str, Path]) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=16, options=exact(runtime)
    ) as session:
        fresh = session.prefill(TOKENS[:6])
        session.prefill([400] * 9)
        session.decode(401)
        again = session.prefill(TOKENS[:6])
    np.testing.assert_array_equal(fresh, again)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_earlier_logits_are_not_overwritten_by_later_ones(
    runtime: str, files: dict[str, Path]
) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=16, options=exact(runtime)
    ) as session:
        session.prefill(TOKENS[:4])
        first = session.decode(TOKENS[4])
        kept = first.copy()
        session.decode(TOKENS[5])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_cuts_text_like_the_others(runtime: str, files: dict[str, Path]) -> None:
    text = "Hello  world 12345\n<|im_end|> né 你好"
    with open_session(files["checkpoint"], "pytorch", threads=1, context_tokens=4) as session:
        expected = session.tokenize(text)
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=4, options=exact(runtime)
    ) as session:
        assert session.tokenize(text) == expected


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_in_force_is_said(runtime: str, files: dict[str, Path]) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=2, context_tokens=4, options=exact(runtime)
    ) as session:
        info = session.info
    assert info["runtime"] == runtime
    assert info["version"]
    assert info["threads"] == 2


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime", "pytorch"])
def test_a_full_context_is_an_error(runtime: str, files: dict[str, Path]) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=6, options=exact(runtime)
    ) as session:
        session.prefill(TOKENS[:6])
        with pytest.raises(ShortstackError, match="context of 6 tokens is full"):
            session.decode(1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_no_model_is_refused_in_one_line(runtime: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf" if runtime == "llama.cpp" else tmp_path
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    (tmp_path / "genai_config.json").write_text('{"model": {"type": "llama"}}')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ShortstackError, match="cannot open") as caught:
        open_session(path, runtime, threads=1, context_tokens=8)
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_a_batch_is_run_in_parts(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    spec = ExportSpec.parse("gguf:F32")
    path = exporter("gguf").export(checkpoint, spec, tmp_path).path
    tokens = (TOKENS * 60)[:700]
    with open_session(path, "llama.cpp", threads=1, context_tokens=800) as session:
        every = session.prefill(tokens, all_logits=True)
        last = session.prefill(tokens)
    assert np.isfinite(every).all()
    np.testing.assert_allclose(every[-1], last, atol=1e-3)


def concatenating_graph(folder: Path) -> None:
    """A graph without genai_config.json that returns a longer cache each time.

    logits = sum of the rows of a table for all tokens so far; keys are carried, not used.
    """
    f, i = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    table = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
    constants = {"table": table, "axis": np.array(1), "heads": np.array([1]), "seq": np.array([2])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "heads"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        helper.make_node("ReduceSum", ["past_key_values.0.value", "seq"], ["before"], keepdims=0),
        helper.make_node("CumSum", ["rows", "axis"], ["running"]),
        helper.make_node("Add", ["running", "before"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, i, [1, length])
        for name, length in (("input_ids", "new_length"), ("attention_mask", "total"))
    ]
    caches = [
        [helper.make_tensor_value_info(f"{side}.0.{kind}", f, [1, 1, f"{side}_length", 9])]
        for side in ("past_key_values", "present")
        for kind in ("key", "value")
    ]
    graph = helper.make_graph(
        nodes,
        "concatenating",
        [*inputs, *caches[0], *caches[1]],
        [helper.make_tensor_value_info("logits", f, [1, "new_length", 9]), *caches[2], *caches[3]],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "model.onnx")


def test_a_graph_that_concatenates_its_cache_decodes_too(tmp_path: Path) -> None:
    concatenating_graph(tmp_path)
    with open_session(tmp_path, "onnxruntime", threads=1, context_tokens=6) as session:
        assert session.info["kv_cache_shared"] is False
        every = session.prefill([1, 2, 3, 4, 5], all_logits=True)
        rows = [session.prefill([1, 2]), *(session.decode(token) for token in (3, 4, 5))]
    np.testing.assert_allclose(np.array(rows), every[1:], rtol=1e-5)


def test_without_amx_safe_buffers_results_stay(
    files: dict[str, Path], truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortstack.runtimes import llama_cpp

    monkeypatch.setattr(llama_cpp, "has_amx", lambda: True)
    session = open_session(files["gguf"], "llama.cpp", threads=1, context_tokens=16)
    with session:
        assert session.info["extra_buffers"] is False
        assert "AMX" in session.info["note"]
        np.testing.assert_allclose(session.prefill(TOKENS), truth[-1], atol=0.05)


def test_a_checkpoint_with_a_tensor_missing_is_refused(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortstackError, match=r"layers\.2\.mlp\.up_proj\.weight is missing"):
        open_session(folder, "pytorch", threads=1, context_tokens=4)


def test_runtimes_by_format() -> None:
    assert runtimes_for("gguf") == ["llama.cpp"]
    assert runtimes_for("onnx") == ["onnxruntime", "onnxruntime-genai"]
    assert runtimes_for("onnx", ["onnxruntime-genai"]) == ["onnxruntime-genai"]
    with pytest.raises(ShortstackError, match="unknown runtime 'llama'"):
        runtimes_for("gguf", ["llama"])
    with pytest.raises(ShortstackError, match="Did you mean 'onnxruntime'"):
        open_session(Path("x"), "onnxruntim", threads=1, context_tokens=4)


@pytest.mark.parametrize(
    ("runtime", "module", "extra"),
    [
        ("llama.cpp", "llama_cpp", "gguf"),
        ("onnxruntime", "onnxruntime", "onnx"),
        ("onnxruntime-genai", "onnxruntime_genai", "onnx"),
        ("pytorch", "transformers", "prune"),
    ],
)
def test_a_missing_package_names_the_pip_command(
    runtime: str,
    module: str,
    extra: str,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shortstack.libllama import libllama

    libllama.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.setitem(__import__("sys").modules, f"{module}.{module}", None)
    path = files[RUNTIMES[runtime][0]]
    with pytest.raises(MissingExtraError, match=rf"pip install 'shortstack\[{extra}\]'"):
        open_session(path, runtime, threads=1, context_tokens=4)


def test_llama_cpp_opens_the_device_that_is_named_not_the_nth_of_its_own_list(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp leaves integrated graphics out of its list, so that numbers move."""
    import ctypes

    from shortstack import llama_devices
    from shortstack.libllama import libllama

    here = {"Vulkan0": 11, "CUDA0": 22, "CUDA1": 33}
    given: list[int] = []

    def load(path: bytes, params: Any) -> None:
        given.append(ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))[0])
        assert ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))[1] is None
        assert params.main_gpu == 0

    monkeypatch.setattr(llama_devices, "handles", lambda: here)
    monkeypatch.setattr(libllama(), "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(libllama(), "llama_model_load_from_file", load)
    for device in ("cuda:1", "vulkan:0", "cuda"):
        with pytest.raises(ShortstackError, match="cannot open"):
            open_session(files["gguf"], "llama.cpp", threads=1, context_tokens=4, device=device)
    assert given == [33, 11, 22]
    with pytest.raises(ShortstackError, match="has no metal:0, it has"):
        open_session(files["gguf"], "llama.cpp", threads=1, context_tokens=4, device="metal:0")


def test_no_cache_is_zeroed_or_made_anew_while_a_prompt_is_timed(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortstack.libllama import libllama

    lib = libllama()
    zeroed: list[bool] = []
    clear = lib.llama_memory_clear

    def watched(memory: Any, data: bool) -> None:
        zeroed.append(data)
        clear(memory, data)

    monkeypatch.setattr(lib, "llama_memory_clear", watched)
    with open_session(files["gguf"], "llama.cpp", threads=1, context_tokens=16) as session:
        session.prefill(TOKENS)
    assert zeroed == [False]
    genai = pytest.importorskip("onnxruntime_genai")
    made = []

    def counted(*given: Any) -> Any:
        made.append(1)
        return build(*given)

    build = genai.Generator
    monkeypatch.setattr(genai, "Generator", counted)
    with open_session(files["onnx"], "onnxruntime-genai", threads=1, context_tokens=16) as session:
        before = len(made)
        first = session.prefill(TOKENS)
        session.decode(5)
        np.testing.assert_array_equal(session.prefill(TOKENS), first)
    assert (before, len(made)) == (1, 1)


def test_a_step_binds_its_ids_and_not_the_cache_where_that_is_shared(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortstack.runtimes import ort

    session = ort.open_session(files["onnx"], threads=1, context_tokens=16)
    with session:
        assert session.info["kv_cache_shared"]
        session.prefill(TOKENS[:5])
        expected = [session.decode(token) for token in TOKENS[5:7]]
        session.prefill(TOKENS[:5])
        monkeypatch.setattr(ort, "HOST", ("cpu", 1))  # as on a card
        monkeypatch.setattr(session, "_bind", lambda *_: pytest.fail("all was bound anew"))
        monkeypatch.setattr(session, "_bind_cache", lambda *_: pytest.fail("the cache was bound"))
        again = [session.decode(token) for token in TOKENS[5:7]]
    np.testing.assert_array_equal(again, expected)


def test_genai_says_what_its_cache_holds(files: dict[str, Path]) -> None:
    """onnxruntime reads the same graph; bytes of a token are counted by this type."""
    with open_session(files["onnx"], "onnxruntime", threads=1, context_tokens=4) as session:
        expected = session.info["kv_cache"]
    with open_session(files["onnx"], "onnxruntime-genai", threads=1, context_tokens=4) as session:
        assert "kv_cache" not in session.info
        session.prefill([1])
        assert session.info["kv_cache"] == expected


def test_genai_decodes_nothing_before_a_prompt(files: dict[str, Path]) -> None:
    with open_session(files["onnx"], "onnxruntime-genai", threads=1, context_tokens=4) as session:
        with pytest.raises(ShortstackError, match="needs a prefill"):
            session.decode(1)
        assert isinstance(session, Resumable)
        assert session.resume(1, [2]) is None


def test_a_card_that_onnxruntime_silently_leaves_is_an_error(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with onnxruntime-gpu and without cuDNN: the session has the CPU alone."""
    ort = pytest.importorskip("onnxruntime")
    loaded: list[int] = []
    build = ort.InferenceSession

    def on_the_cpu(*given: Any, providers: list[Any]) -> Any:
        assert loaded == [1]
        assert providers[0] == ("CUDAExecutionProvider", {"device_id": 1})
        return build(*given, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append(1))
    monkeypatch.setattr(ort, "InferenceSession", on_the_cpu)
    with pytest.raises(ShortstackError, match=r"onnxruntime-gpu\[cuda,cudnn\]"):
        open_session(files["onnx"], "onnxruntime", threads=1, context_tokens=4, device="cuda:1")
