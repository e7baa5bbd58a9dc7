"""What a runtime offers it does right: many tokens at depth, rows side by side. The rest it
refuses in one line, before it opens anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.runtimes.precision import exact

from shortstack.errors import ShortstackError
from shortstack.runtimes import RUNTIMES, open_session
from shortstack.runtimes.capabilities import CAPABILITIES, device_kind
from shortstack.session import Batched, Extendable, ResumableRows

ROWS = np.array(
    [[1, 50, 60, 70, 300, 20, 19], [45, 200, 210, 77, 12, 9, 8], [7, 7, 8, 400, 3, 2, 1]]
)
BATCHED = [name for name, row in CAPABILITIES.items() if row.batch]


@pytest.fixture(scope="module")
def truth(tiny: Path) -> np.ndarray:
    """Logits of every position of every row, one row at a time."""
    with open_session(tiny, "pytorch", threads=1, context_tokens=16) as session:
        return np.stack([session.prefill(row, all_logits=True) for row in ROWS.tolist()])


def tolerance(runtime: str) -> float:
    return 0.05 if runtime == "llama.cpp" else 1e-3  # its KV cache is half precision


def test_every_runtime_has_a_row() -> None:
    assert CAPABILITIES.keys() == RUNTIMES.keys()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_prompt_behind_others_sees_them(
    runtime: str, files: dict[str, Path], truth: np.ndarray
) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=8, options=exact(runtime)
    ) as session:
        assert isinstance(session, Extendable)
        row = ROWS[0].tolist()
        session.prefill(row[:3])
        middle, last = session.extend(row[3:6]), session.decode(row[6])
    np.testing.assert_allclose(middle, truth[0, 5], atol=tolerance(runtime))
    np.testing.assert_allclose(last, truth[0, 6], atol=tolerance(runtime))


@pytest.mark.parametrize("runtime", BATCHED)
def test_rows_side_by_side_compute_what_each_computes_alone(
    runtime: str, files: dict[str, Path], truth: np.ndarray
) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=7, batch=3, options=exact(runtime)
    ) as session:
        assert isinstance(session, Batched)
        for _ in range(2):  # the second time over a cache that was used
            seen = [session.prefill_rows(ROWS[:, :3])]
            seen += [session.extend_rows(ROWS[:, at : at + 1]) for at in (3, 4)]
    for rows, at in zip(seen, (2, 3, 4), strict=True):
        np.testing.assert_allclose(rows, truth[:, at], atol=tolerance(runtime))


@pytest.mark.parametrize("runtime", BATCHED)
def test_a_batch_at_depth_is_right_or_refused(
    runtime: str, files: dict[str, Path], truth: np.ndarray
) -> None:
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=7, batch=3, options=exact(runtime)
    ) as session:
        assert isinstance(session, Batched)
        session.prefill_rows(ROWS[:, :3])
        if CAPABILITIES[runtime].batch_at_depth:
            rows = session.extend_rows(ROWS[:, 3:])
            np.testing.assert_allclose(rows, truth[:, 6], atol=tolerance(runtime))
        else:
            with pytest.raises(ShortstackError, match="batch 1 or depth 0"):
                session.extend_rows(ROWS[:, 3:])


@pytest.mark.parametrize("runtime", BATCHED)
def test_rows_go_back_together(runtime: str, files: dict[str, Path], truth: np.ndarray) -> None:
    """What energy of decoding a batch is counted over: the same steps, again behind the prompts."""
    path = files[RUNTIMES[runtime][0]]
    with open_session(
        path, runtime, threads=1, context_tokens=7, batch=3, options=exact(runtime)
    ) as session:
        assert isinstance(session, ResumableRows)
        session.prefill_rows(ROWS[:, :3])
        for at in (3, 4):  # other tokens: what must be forgotten
            session.extend_rows(ROWS[:, at : at + 1] + 1)
        again = session.resume_rows(3, ROWS[:, 3:4])
        after = session.extend_rows(ROWS[:, 4:5])
    assert again is not None
    np.testing.assert_allclose(again, truth[:, 3], atol=tolerance(runtime))
    np.testing.assert_allclose(after, truth[:, 4], atol=tolerance(runtime))


def test_rows_longer_than_a_batch_of_llama_cpp_run_in_parts(files: dict[str, Path]) -> None:
    rows = np.tile(ROWS, (1, 60))[:, :400]
    options = {"threads": 1, "context_tokens": 400}
    with open_session(files["gguf"], "llama.cpp", batch=3, **options) as session:  # type: ignore[arg-type]  # a dict of two ints
        assert isinstance(session, Batched)
        together = session.prefill_rows(rows)
    with open_session(files["gguf"], "llama.cpp", **options) as alone:  # type: ignore[arg-type]  # the same
        apart = np.stack([alone.prefill(row) for row in rows.tolist()])
    np.testing.assert_allclose(together, apart, atol=0.05)


@pytest.mark.parametrize("kv_type", ["f32", "bf16"])
def test_the_type_of_the_cache_is_in_force(kv_type: str, files: dict[str, Path]) -> None:
    options = {"kv_type": kv_type, "flash_attention": "on"}
    with open_session(
        files["gguf"], "llama.cpp", threads=1, context_tokens=8, options=options
    ) as session:
        assert session.info["kv_cache"] == kv_type.upper()
        assert np.isfinite(session.prefill([1, 2, 3])).all()


@pytest.mark.parametrize(
    ("runtime", "asked", "words"),
    [
        ("onnxruntime-genai", {"batch": 2}, "one sequence at a time.*onnxruntime, pytorch"),
        ("pytorch", {"device": "vulkan:0"}, "does not run on vulkan. It runs on: cpu, cuda"),
        ("pytorch", {"device": "gpu"}, "'gpu' is no device"),
        ("pytorch", {"options": {"dtypo": "float16"}}, "Did you mean 'dtype'"),
        ("pytorch", {"options": {"dtype": "int3"}}, "must be one of: float32"),
        ("llama.cpp", {"options": {"gpu_layers": "-1"}}, "gpu_layers is '-1'"),
        ("onnxruntime", {"options": {"kv_type": "f16"}}, "onnxruntime has no options"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused(
    runtime: str, asked: dict[str, object], words: str
) -> None:
    with pytest.raises(ShortstackError, match=words) as caught:
        open_session(Path("none"), runtime, threads=1, context_tokens=4, **asked)  # type: ignore[arg-type]  # of many kinds
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_cuda_where_there_is_none_is_refused(runtime: str, files: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: nothing to refuse")
    path = files[RUNTIMES[runtime][0]]
    with pytest.raises(ShortstackError, match="cuda|CUDA") as caught:
        open_session(path, runtime, threads=1, context_tokens=4, device="cuda:0")
    assert "\n" not in str(caught.value)


def test_ids_of_devices() -> None:
    assert device_kind("cpu") == ("cpu", 0)
    assert device_kind("cuda") == device_kind("cuda:0") == ("cuda", 0)
    assert device_kind("cuda:3") == ("cuda", 3)
    with pytest.raises(ShortstackError, match="no device"):
        device_kind("cuda:x")


def test_llama_cpp_says_how_it_splits_and_reads_the_model(files: dict[str, Path]) -> None:
    with open_session(files["gguf"], "llama.cpp", threads=1, context_tokens=8) as session:
        info = session.info
    told = {name: info[name] for name in ("backend", "n_gpu_layers", "n_batch", "n_ubatch", "mmap")}
    assert told == {"backend": "CPU", "n_gpu_layers": 0, "n_batch": 512, "n_ubatch": 512} | {
        "mmap": True
    }
