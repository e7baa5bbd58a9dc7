"""onnxruntime on an exported folder: KV cache bound once, nothing copied between tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import MissingExtraError, ShortstackError, one_line
from shortstack.runtimes.capabilities import device_kind

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)$")
HOST = ("cpu", 0)
CUDA = "CUDAExecutionProvider"


class OrtSession:
    """A folder with model.onnx open in onnxruntime, on the CPU or on CUDA.

    Graphs of GroupQueryAttention write new keys and values into the buffer they read the old ones
    from: it is allocated once for the whole context and bound as input and output. Other graphs
    return a longer cache; it is passed on as it is. Either way the cache stays on the device; only
    ids go there, only logits come back, and of a prompt only those that are asked for.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        context_tokens: int,
        device: str = "cpu",
        batch: int = 1,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx", "running an ONNX model") from None
        onnxruntime.disable_telemetry_events()
        onnxruntime.set_default_logger_severity(4)  # what it has to say comes as an exception
        self._ort = onnxruntime
        self._folder = path
        self._context_tokens = context_tokens
        self._device = device_kind(device)
        self._batch = batch
        self._session = _open(onnxruntime, path, threads, self._device)
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._inputs = inputs
        self._past_names = sorted((n for n in inputs if PAST.search(n)), key=_layer_and_kind)
        self._check(path)
        logits = next(o for o in self._session.get_outputs() if o.name == "logits")
        self._vocab = int(logits.shape[-1])
        self._dtype = DTYPES[inputs[self._past_names[0]].type]
        self._logits_dtype = DTYPES[logits.type]
        config = _genai_config(path)
        self._shared = bool(config.get("search", {}).get("past_present_share_buffer"))
        # such graphs call this dimension `kv_cache_dim` instead of giving its size
        self._head_dim = config.get("model", {}).get("decoder", {}).get("head_size")
        self._past = 0
        self._ones = np.ones((batch, context_tokens), np.int64)
        self._token = np.zeros((batch, 1), np.int64)
        self._position = np.zeros((batch, 1), np.int64)
        self._row = np.zeros((batch, 1, self._vocab), self._logits_dtype)
        self._cache = self._new_cache(context_tokens if self._shared else 0)
        self._step = self._bind(self._token, self._position, self._row)
        self._info = {
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "threads": threads,
            "context_tokens": context_tokens,
            "kv_cache": np.dtype(self._dtype).name,
            "kv_cache_shared": self._shared,
            "providers": self._session.get_providers(),
            "device": device,
            "batch": batch,
            "spinning": True,  # the default: a third faster a token, at the price of idle cores
            **({} if self._device == HOST else _left_on_the_cpu(self._session)),
        }

    def _check(self, path: Path) -> None:
        outputs = {o.name for o in self._session.get_outputs()}
        lacking = {"input_ids", "attention_mask"} - set(self._inputs)
        if lacking or not self._past_names or "logits" not in outputs:
            raise ShortstackError(
                f"{path / 'model.onnx'} is no decoder with a KV cache: it has the inputs "
                f"{one_line(', '.join(self._inputs), 120)}. Export it with shortstack."
            )

    def _new_cache(self, length: int) -> list[Any]:
        shapes = [self._inputs[name].shape for name in self._past_names]
        return [
            self._value(
                np.zeros((self._batch, heads, length, self._head_dim or dim), self._dtype),
                self._device,
            )
            for _, heads, _, dim in shapes
        ]

    def _value(self, array: NDArray[Any], place: tuple[str, int] = HOST) -> Any:
        """An OrtValue: on the host the same memory as `array`, on a device a copy."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, *place)

    def _bind(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits: NDArray[Any] | None,
    ) -> Any:
        """Bind all but the mask, whose length changes with every token."""
        binding = self._session.io_binding()
        self._bind_ids(binding, tokens, positions)
        if logits is None:
            binding.bind_output("logits", *self._device)
        else:
            binding.bind_ortvalue_output("logits", self._value(logits))
        self._bind_cache(binding)
        return binding

    def _bind_ids(
        self, binding: Any, tokens: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> None:
        """On the host the binding sees later values too, on a device it copies these."""
        binding.bind_ortvalue_input("input_ids", self._value(tokens))
        if "position_ids" in self._inputs:
            binding.bind_ortvalue_input("position_ids", self._value(positions))

    def _bind_cache(self, binding: Any) -> None:
        for name, value in zip(self._past_names, self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
            if self._shared:
                binding.bind_ortvalue_output(_present(name), value)
            else:
                binding.bind_output(_present(name), *self._device)

    @property
    def vocab_size(self) -> int:
        return self._vocab

    @property
    def info(self) -> dict[str, Any]:
        return dict(self._info)

    def prefill(self, tokens: Sequence[int], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._empty_cache()
        rows = np.array([tokens], np.int64)
        if all_logits:
            return np.array(self._append(rows).numpy()[0], np.float32)
        return np.asarray(self._last(self._append(rows))[0])

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.asarray(self._last(self._append(np.array([tokens], np.int64)))[0])

    def prefill_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self._empty_cache()
        return self.extend_rows(rows)

    def extend_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if rows.shape[1] == 1:
            return self._step_once(rows)
        if self._shared and self._past and len(rows) > 1:
            raise ShortstackError(
                "onnxruntime's GroupQueryAttention takes no batch of prompts behind a filled "
                "cache. Ask for batch 1 or depth 0."
            )
        return self._last(self._append(rows))

    def _empty_cache(self) -> None:
        if not self._shared:
            self._cache = self._new_cache(0)
        self._past = 0

    def resume(self, keep: int, tokens: Sequence[int]) -> NDArray[np.float32] | None:
        self._go_back(keep)
        return np.array(self._append(np.array([tokens], np.int64)).numpy()[0], np.float32)

    def resume_rows(self, keep: int, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        self._go_back(keep)
        return self.extend_rows(rows)

    def _go_back(self, keep: int) -> None:
        if not self._shared:  # a shared buffer is overwritten: the mask's length says from where
            self._cache = [
                self._value(np.ascontiguousarray(value.numpy()[:, :, :keep]), self._device)
                for value in self._cache
            ]
        self._past = keep

    def _append(self, rows: NDArray[np.int64]) -> Any:
        """Run tokens after the cache's; an OrtValue on the device: logits of each, shape (batch,
        n, vocab)."""
        count = rows.shape[1]
        positions = np.arange(self._past, self._past + count, dtype=np.int64)[None]
        tokens = np.ascontiguousarray(rows, np.int64)
        binding = self._bind(tokens, np.repeat(positions, len(rows), axis=0), None)
        self._run(binding, count)
        return binding.get_outputs()[0]

    def _last(self, logits: Any) -> NDArray[np.float32]:
        """Copy each sequence's last row to the host and nothing else; shape (batch, vocab).

        A binding that is never run makes OrtValues of parts of memory that another one owns: of a
        prompt of 512 tokens and a vocabulary of 32,000 all rows in float32 are 65 MB.
        """
        batch, count, vocab = logits.shape()
        row_bytes = vocab * np.dtype(self._logits_dtype).itemsize
        found = np.empty((batch, vocab), np.float32)
        for index in range(batch):
            start = logits.data_ptr() + ((index + 1) * count - 1) * row_bytes
            view = self._session.io_binding()
            view.bind_output("logits", *self._device, self._logits_dtype, [1, 1, vocab], start)
            found[index] = view.get_outputs()[0].numpy()[0, 0]
        return found

    def decode(self, token: int) -> NDArray[np.float32]:
        return np.asarray(self._step_once(token)[0])

    def _step_once(self, tokens: NDArray[np.int64] | int) -> NDArray[np.float32]:
        """One token a row through the binding that is kept; logits, shape (batch, vocab)."""
        self._token[:] = tokens
        self._position[:] = self._past
        if self._device != HOST:
            self._bind_ids(self._step, self._token, self._position)
        if not self._shared:
            self._bind_cache(self._step)
        self._run(self._step, 1)
        return np.array(self._row[:, 0], np.float32)

    def _run(self, binding: Any, count: int) -> None:
        total = self._past + count
        if total > self._context_tokens:
            raise ShortstackError(
                f"the context of {self._context_tokens} tokens is full. Ask for fewer tokens."
            )
        binding.bind_ortvalue_input("attention_mask", self._value(self._ones[:, :total]))
        self._session.run_with_iobinding(binding)
        self._past = total
        if not self._shared:
            # in the order they were bound, which need not be the graph's
            names = ["logits", *map(_present, self._past_names)]
            outputs = dict(zip(names, binding.get_outputs(), strict=True))
            self._cache = [outputs[_present(name)] for name in self._past_names]

    def tokenize(self, text: str) -> list[int] | None:
        file = self._folder / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return None
        ids: list[int] = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
        return ids

    def close(self) -> None:
        self._step = None
        self._cache = []
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(onnxruntime: Any, path: Path, threads: int, device: tuple[str, int]) -> Any:
    file = path / "model.onnx"
    if not file.is_file():
        raise ShortstackError(f"{path} holds no model.onnx. Name the folder of an ONNX export.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if device != HOST:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=providers(onnxruntime, device)
        )
    except _errors(onnxruntime) as error:
        raise ShortstackError(
            f"onnxruntime cannot open {file}: {one_line(str(error), 300)}. Export it again."
        ) from None
    check_in_force(session, device)
    return session


def providers(onnxruntime: Any, device: tuple[str, int]) -> list[Any]:
    """What to ask a session for. Raises ShortstackError where this build has none for the device.

    The CUDA libraries of NVIDIA's packages are loaded first: the provider looks for them in the
    system's folders alone.
    """
    kind, number = device
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if CUDA not in onnxruntime.get_available_providers():
        raise ShortstackError(
            "this onnxruntime has no CUDA provider. Run: pip uninstall onnxruntime; "
            "pip install 'shortstack[cuda]'"
        )
    onnxruntime.preload_dlls()
    return [(CUDA, {"device_id": number}), "CPUExecutionProvider"]


def check_in_force(session: Any, device: tuple[str, int]) -> None:
    """onnxruntime goes on with the CPU, without a word, where a library of CUDA is missing.

    Raises ShortstackError.
    """
    kind, number = device
    if kind == "cuda" and CUDA not in session.get_providers():
        raise ShortstackError(
            f"the CUDA libraries of onnxruntime do not load, cuda:{number} would be the CPU. "
            "Run: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )


def _left_on_the_cpu(session: Any) -> dict[str, Any]:
    """`nodes`, how many onnxruntime dealt out, and `cpu_nodes`, operator -> how many of it went to
    the CPU: each may copy its inputs off the card and its results back.

    Counted before nodes are fused; nodes that onnxruntime adds to copy are in neither. Some it
    gives to the CPU on purpose: arithmetic on shapes and lengths.
    """
    total, left = 0, Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        nodes = [node.op_type for node in part.get_nodes()]
        total += len(nodes)
        if part.ep_name == "CPUExecutionProvider":
            left.update(nodes)
    return {"nodes": total, "cpu_nodes": dict(sorted(left.items()))}


def _errors(onnxruntime: Any) -> tuple[type[Exception], ...]:
    """What loading a file can raise; onnxruntime gives its errors no common class but this one."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    return tuple(getattr(state, name) for name in names)


def _genai_config(path: Path) -> dict[str, Any]:
    """What onnxruntime-genai's builder writes beside a graph; empty for other exports."""
    file = path / "genai_config.json"
    if not file.is_file():
        return {}
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _present(past_name: str) -> str:
    return past_name.replace("past_key_values", "present")


def _layer_and_kind(name: str) -> tuple[int, str]:
    found = PAST.search(name)
    assert found is not None
    return int(found[1]), found[2]


def open_session(
    path: Path, *, threads: int, context_tokens: int, device: str = "cpu", batch: int = 1
) -> OrtSession:
    return OrtSession(
        path, threads=threads, context_tokens=context_tokens, device=device, batch=batch
    )
