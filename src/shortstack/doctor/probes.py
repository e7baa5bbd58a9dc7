"""What the doctor runs in child processes: each computes something whose answer is known."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.doctor.onnx import CONTEXT, decoder_answer, decoder_inputs, write_tiny_onnx
from shortstack.errors import ShortstackError

BATCH = 64
"""More than one token: AMX kernels, which may crash, run on batches only."""
WIDTH, VOCAB, LAYERS = 256, 256, 2
CLOSE = 0.1
"""Other kernels round otherwise: logits may differ by this share of their own spread."""

PROMPT, NEXT = (3, 1, 2, 7), 5


def llama_cpp(request: Mapping[str, Any]) -> dict[str, str]:
    """A batch through a tiny model with the library's own defaults, not with our way round.

    On another device than the CPU every layer is there, and the logits must be those of the CPU.
    """
    import numpy as np

    from shortstack.libllama import system_info
    from shortstack.llama_devices import named

    device = request["device"]
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gguf(Path(folder) / "tiny.gguf")
        if device == "cpu":
            logits = _llama_logits(path, {})
            check("llama.cpp", bool(np.isfinite(logits).all() and logits.std() > 0))
            features = _features(system_info())
            return {"fact": f"runs a batch of {BATCH} with its defaults ({features})"}
        here = named(device)
        if here is None:
            return {"lacks": f"this build has no {device.partition(':')[0]} backend"}
        name, pointer = here
        told = _llama_logits(path, {"n_gpu_layers": LAYERS + 1}, pointer)
        plain = _llama_logits(path, {"n_gpu_layers": 0, "use_extra_bufts": False})
        close = bool(np.abs(told - plain).max() < CLOSE * plain.std())
        check(f"llama.cpp on {name}", close)
    return {"fact": f"runs a batch of {BATCH} on {name}, with the logits of the CPU"}


def llama_cpp_session(request: Mapping[str, Any]) -> dict[str, str]:
    """The same model as our own session opens it on the CPU; elsewhere there is no way round."""
    import numpy as np

    from shortstack.runtimes import open_session

    if request["device"] != "cpu":
        raise ShortstackError(f"llama.cpp has no way round on {request['device']}")
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gguf(Path(folder) / "tiny.gguf")
        with open_session(path, "llama.cpp", threads=1, context_tokens=2 * BATCH) as session:
            logits = session.prefill(range(BATCH))
            check("llama.cpp", bool(np.isfinite(logits).all() and logits.std() > 0))
    return {"fact": f"runs a batch of {BATCH}"}


def onnxruntime(request: Mapping[str, Any]) -> dict[str, str]:
    """A prompt through a decoder of five nodes."""
    import numpy as np
    import onnxruntime as ort

    from shortstack.runtimes.capabilities import device_kind
    from shortstack.runtimes.ort import CUDA, check_in_force, providers

    device = device_kind(request["device"])
    offered = ort.get_available_providers()
    names = ", ".join(name.removesuffix("ExecutionProvider") for name in offered)
    if device[0] == "cuda" and CUDA not in offered:
        return {"lacks": f"this build has no CUDA provider, it has: {names}"}
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_onnx(Path(folder))
        session = ort.InferenceSession(str(path), providers=providers(ort, device))
    check_in_force(session, device)
    (logits,) = session.run(["logits"], decoder_inputs(PROMPT))
    check("onnxruntime", bool(np.allclose(logits[0, -1], decoder_answer(PROMPT), atol=1e-3)))
    return {"fact": f"runs a tiny decoder on {request['device']}; providers: {names}"}


def onnxruntime_genai(request: Mapping[str, Any]) -> dict[str, str]:
    """The same decoder, a prompt and a token after it: its cache is used."""
    import numpy as np
    import onnxruntime_genai as genai

    device = request["device"]
    genai.disable_telemetry_events()
    if device != "cpu" and not genai.is_cuda_available():
        return {"lacks": "this build has no CUDA provider"}
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_onnx(Path(folder))
        config = genai.Config(folder)
        config.clear_providers()
        if device != "cpu":
            config.append_provider("cuda")
            config.set_provider_option("cuda", "device_id", device.partition(":")[2])
        model = genai.Model(config)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        generator = genai.Generator(model, params)
        for tokens in (PROMPT, (NEXT,)):
            generator.append_tokens(np.array([tokens], np.int32))
        logits = np.array(generator.get_logits(), np.float32).ravel()
        right = decoder_answer((*PROMPT, NEXT))
        check("onnxruntime-genai", bool(np.allclose(logits, right, atol=1e-3)))
    return {"fact": f"runs a tiny decoder on {device}, with its cache"}


def pytorch(request: Mapping[str, Any]) -> dict[str, str]:
    """Products in float32 and bfloat16 (AMX where there is one), then a tiny Llama, if we can.

    Elsewhere than on the CPU: both, and the logits must be those of the CPU.
    """
    import torch

    lacks = torch_lacks(request["device"])
    if lacks is not None:
        return {"lacks": lacks}
    place = {"metal": "mps"}.get(request["device"].partition(":")[0], request["device"])
    a = torch.arange(WIDTH * WIDTH, dtype=torch.float32, device=place).reshape(WIDTH, WIDTH)
    half, eye = (a / WIDTH**2).bfloat16(), torch.eye(WIDTH, device=place)
    check("pytorch", bool(torch.allclose(a @ eye, a)))
    check("pytorch in bfloat16", bool(torch.equal(half @ eye.bfloat16(), half)))
    if importlib.util.find_spec("transformers") is None:
        return {"fact": f"computes on {place}"}
    check(f"pytorch on {place}", _llama_agrees(place))
    return {"fact": f"runs a tiny Llama on {place} in float32 and bfloat16"}


def torch_lacks(device: str) -> str | None:
    """Why this build of torch cannot use a kind of device; None if it can."""
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"this build, {build}, sees no NVIDIA card"
    if kind == "metal" and not torch.backends.mps.is_available():
        return "this build sees no Metal device"
    return None


def tiny_llama() -> Any:
    """A random Llama in float32, the same every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def _llama_agrees(place: str) -> bool:
    """Whether a random Llama gives in float32 and bfloat16 on `place` what it gives on the CPU."""
    import torch

    model = tiny_llama()
    tokens = torch.arange(BATCH)[None]
    with torch.inference_mode():
        right = model(tokens).logits
        for kind in (torch.float32, torch.bfloat16):
            told = model.to(place, kind)(tokens.to(place)).logits.float().cpu()
            if not bool((told - right).abs().max() < CLOSE * right.std()):
                return False
    return True


def _llama_logits(path: Path, options: Mapping[str, Any], device: int | None = None) -> Any:
    """Logits after a batch of the tiny model: array (vocab,). Raises ShortstackError.

    `options` are fields of llama_model_params; `device` is a pointer from llama.cpp's list.
    """
    import ctypes

    import numpy as np

    from shortstack.libllama import last_words, libllama
    from shortstack.llama_devices import use_only

    lib = libllama()
    params = lib.llama_model_default_params()
    for key, value in options.items():
        setattr(params, key, value)
    kept = use_only(params) if device is None else use_only(params, device)
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    del kept
    if not model:
        raise ShortstackError(f"llama.cpp cannot open a tiny model: {last_words()}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 2 * BATCH
    settings.n_threads = settings.n_threads_batch = 1
    settings.op_offload = settings.offload_kqv = device is not None
    context = lib.llama_init_from_model(model, settings)
    tokens = (ctypes.c_int32 * BATCH)(*range(BATCH))
    code = lib.llama_decode(context, lib.llama_batch_get_one(tokens, BATCH))
    if code:
        raise ShortstackError(f"llama.cpp failed with code {code}: {last_words()}")
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (VOCAB,)).copy()


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


def check(name: str, right: bool) -> None:
    if not right:
        raise ShortstackError(f"{name} computes a wrong answer on this machine")


def _features(info: str) -> str:
    """`AVX2, AVX512` of `CPU : AVX2 = 1 | AVX512 = 1 | SVE = 0`."""
    on = [part.split(":")[-1].partition("=") for part in info.split("|")]
    return ", ".join(name.strip() for name, _, value in on if value.strip() == "1")
