"""The comparison with llama-bench and genai: like settings on both sides, every round kept."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import side_by_side
from benchmarks.side_by_side import FIGURES, arguments, checked, llama_bench_words, row

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter

INFO: dict[str, Any] = {
    **{"n_batch": 512, "n_ubatch": 512, "flash_attention": "auto"},
    **{"kv_cache": "F16", "extra_buffers": True},
}
SMALL = ["--prompt-tokens", "8", "--decode-tokens", "4", "--threads", "1", "--rounds", "2"]
STAND_IN = f"""#!{sys.executable}
import json, sys
words = sys.argv[1:]
if "broken" in " ".join(words):
    sys.exit("error: failed to load model")
rate = 100.0 if words[words.index("-n") + 1] == "0" else 10.0
told = {{"model_filename": words[1], "avg_ts": rate, "words": words[2:], "n_threads": 1}}
told |= {{"samples_ts": [1.0, rate]}}
told |= {{"n_batch": 512, "n_ubatch": 512, "type_k": "f16", "flash_attn": -1}}
print(json.dumps([told]))
"""


def options(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


def test_llama_bench_gets_the_settings_of_our_session() -> None:
    cpu = options(llama_bench_words("cpu", {**INFO, "extra_buffers": False}))
    assert (cpu["-b"], cpu["-ub"], cpu["--repack"]) == ("512", "512", "0")
    assert options(llama_bench_words("cpu", {**INFO, "flash_attention": "off"}))["-fa"] == "off"
    assert (cpu["-ctk"], cpu["-ctv"]) == ("f16", "f16")
    assert (cpu["-ngl"], cpu["-nkvo"], cpu["-nopo"]) == ("0", "1", "1")
    card = options(llama_bench_words("cuda:1", INFO))
    assert (card["-ngl"], card["-dev"], card["-sm"], card["-mg"]) == ("999", "CUDA1", "none", "0")
    assert not {"-nkvo", "-nopo"} & set(card)


def test_a_row_has_medians_and_the_median_of_the_rounds_ratios() -> None:
    made = [
        {side: dict.fromkeys(FIGURES, rate) for side, rate in (("ours", mine), ("theirs", 100.0))}
        for mine in (90.0, 100.0, 110.0)
    ]
    cells = row("m.gguf", ("llama.cpp", "llama-bench"), made).split("|")
    assert [cell.strip() for cell in cells[1:6]] == [
        *("m.gguf", "llama.cpp", "llama-bench", "100.0", "100.0")
    ]
    assert cells[6].strip() == "1.000 (0.900 to 1.100)"


def test_a_llama_bench_with_other_settings_is_refused() -> None:
    told = {"n_batch": 512, "n_ubatch": 512, "n_threads": 2, "type_k": "f16", "flash_attn": 0}
    with pytest.raises(ShortstackError, match="flash_attn 0, ours with -1"):
        side_by_side._check_alike(told, {**INFO, "threads": 2})
    side_by_side._check_alike({**told, "flash_attn": -1}, {**INFO, "threads": 2})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m.gguf"], "--llama-bench PATH"),
        (["folder"], "neither a .gguf file nor"),
        (["m.gguf", "--device", "vulkan:0"], "cpu and cuda alone"),
        (["m.gguf", "--device", "gpu"], "is no device"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        checked(arguments(), words)
    assert said in capsys.readouterr().err


def test_several_models_in_one_call_and_a_failure_costs_its_own_row_only(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("gguf", "onnx"):
        (tmp_path / name).mkdir()
    spec = ExportSpec.parse("gguf:F16")
    made = exporter("gguf").export(Checkpoint.open(tiny), spec, tmp_path / "gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(made.path.read_bytes())
    spec = ExportSpec.parse("onnx:int4", imatrix="no")
    onnx = exporter("onnx").export(Checkpoint.open(tiny), spec, tmp_path / "onnx")
    bench = tmp_path / "llama-bench"
    bench.write_text(STAND_IN)
    bench.chmod(bench.stat().st_mode | stat.S_IXUSR)
    file = tmp_path / "rounds.json"
    models = [str(broken), str(made.path), str(onnx.path)]
    call = ["side_by_side", *models, "--llama-bench", str(bench), "--json", str(file), *SMALL]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as ended:
        side_by_side.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4  # two lines of head, the broken one has no row
    assert "broken.gguf: llama-bench ended with 1: error: failed to load model" in err
    failed, gguf, genai = json.loads(file.read_text(encoding="utf-8"))["models"]
    assert failed["rounds"] == []
    assert "failed to load" in failed["failure"]
    assert [one["first"] for one in gguf["rounds"]] == ["ours", "theirs"]
    assert len(gguf["rounds"][0]["ours"]["decode_step_s"]) == 4
    assert [test["avg_ts"] for test in gguf["rounds"][1]["theirs"]["tests"]] == [100.0, 10.0]
    again = gguf["rounds"][0]["ours"]
    assert len(again["again_s"]) == 2  # llama-bench's warm-up and its one repetition on a CPU
    assert again["again_tokens_per_s"] == 8 / again["again_s"][-1]
    head, _, ours, theirs = out.splitlines()
    assert head.count("|") == ours.count("|") == theirs.count("|")
    given = gguf["rounds"][0]["theirs"]["tests"][1]["words"]
    assert given[given.index("-d") + 1] == "8"
    assert given[given.index("-ub") + 1] == "512"
    assert genai["runtime"] == "onnxruntime-genai"
    assert genai["rounds"][0]["theirs"]["decode_s"] > 0
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
