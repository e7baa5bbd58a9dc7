"""What the doctor runs in child processes: each computes something whose answer is known."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

BATCH = 64
"""More than one token: AMX kernels, which may crash, run on batches only."""
WIDTH, VOCAB, LAYERS = 256, 256, 2


def llama_cpp(request: Mapping[str, Any]) -> dict[str, str]:
    """A batch through a tiny model with the library's own defaults, not with our way round."""
    import ctypes

    import numpy as np

    from shortstack.libllama import last_words, libllama, system_info

    lib = libllama()
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gguf(Path(folder) / "tiny.gguf")
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not model:
            raise ShortstackError(f"llama.cpp cannot open a tiny model: {last_words()}")
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = 2 * BATCH
        params.n_threads = params.n_threads_batch = 1
        context = lib.llama_init_from_model(model, params)
        tokens = (ctypes.c_int32 * BATCH)(*range(BATCH))
        code = lib.llama_decode(context, lib.llama_batch_get_one(tokens, BATCH))
        if code:
            raise ShortstackError(f"llama.cpp failed with code {code}: {last_words()}")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (VOCAB,))
        _check("llama.cpp", bool(np.isfinite(logits).all() and logits.std() > 0))
    return {"fact": f"runs a batch of {BATCH} with its defaults ({_features(system_info())})"}


def llama_cpp_session(request: Mapping[str, Any]) -> dict[str, str]:
    """The same model as our own session opens it."""
    import numpy as np

    from shortstack.runtimes import open_session

    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gguf(Path(folder) / "tiny.gguf")
        with open_session(path, "llama.cpp", threads=1, context_tokens=2 * BATCH) as session:
            logits = session.prefill(range(BATCH))
            _check("llama.cpp", bool(np.isfinite(logits).all() and logits.std() > 0))
    return {"fact": f"runs a batch of {BATCH}"}


def onnxruntime(request: Mapping[str, Any]) -> dict[str, str]:
    """A matrix product as a graph of one node."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    size = [WIDTH, WIDTH]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name in "abc"
    ]
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([node], "product", values[:2], values[2:])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    a = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(size) / WIDTH**2
    (c,) = session.run(None, {"a": a, "b": np.eye(WIDTH, dtype=np.float32) * 2})
    _check("onnxruntime", bool(np.allclose(c, 2 * a)))
    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    return {"fact": f"computes on the CPU; providers: {', '.join(providers)}"}


def onnxruntime_genai(request: Mapping[str, Any]) -> dict[str, str]:
    import onnxruntime_genai

    _check("onnxruntime-genai", hasattr(onnxruntime_genai, "Generator"))
    return {"fact": "can be imported"}


def pytorch(request: Mapping[str, Any]) -> dict[str, str]:
    """Products in float32 and bfloat16: the second takes AMX where there is one."""
    import torch

    a = torch.arange(WIDTH * WIDTH, dtype=torch.float32).reshape(WIDTH, WIDTH) / WIDTH**2
    eye = torch.eye(WIDTH)
    _check("pytorch", bool(torch.allclose(a @ eye, a)))
    half = a.bfloat16()
    _check("pytorch in bfloat16", bool(torch.equal(half @ eye.bfloat16(), half)))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    where = f"the CPU and {', '.join(gpus)}" if gpus else "the CPU"
    return {"fact": f"computes; devices: {where}"}


def write_tiny_gguf(path: Path) -> Path:
    """A random Llama without a tokenizer: one layer F16, one Q8_0, so that both kernels run."""
    try:
        import gguf
    except ImportError:
        raise ShortstackError(
            "the package 'gguf' is missing. Run: pip install 'shortstack[gguf]'"
        ) from None
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2 * BATCH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")

    def weight(name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType) -> None:
        data = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(data, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    half, byte = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
    weight("token_embd", VOCAB, WIDTH, half)
    weight("output", VOCAB, WIDTH, byte)
    norm("output_norm")
    for layer, kind in zip(range(LAYERS), (half, byte), strict=True):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weight(f"blk.{layer}.{part}", WIDTH, WIDTH, kind)
        for part in ("ffn_gate", "ffn_up"):
            weight(f"blk.{layer}.{part}", 2 * WIDTH, WIDTH, kind)
        weight(f"blk.{layer}.ffn_down", WIDTH, 2 * WIDTH, kind)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _check(name: str, right: bool) -> None:
    if not right:
        raise ShortstackError(f"{name} computes a wrong answer on this machine")


def _features(info: str) -> str:
    """`AVX2, AVX512` of `CPU : AVX2 = 1 | AVX512 = 1 | SVE = 0`."""
    on = [part.split(":")[-1].partition("=") for part in info.split("|")]
    return ", ".join(name.strip() for name, _, value in on if value.strip() == "1")
