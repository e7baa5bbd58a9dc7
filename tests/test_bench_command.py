"""`shortstack bench` from the outside: models in, one record out, killed or not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import fails
from tests.devices.json_schema import errors
from tests.packed_models import pack

from shortstack.artifact import ExportSpec
from shortstack.bench.models import benchable
from shortstack.bench.plan import BenchChoice, make_plan
from shortstack.checkpoint import Checkpoint
from shortstack.cli import main
from shortstack.commands import bench as bench_commands
from shortstack.devices import host
from shortstack.devices.measurement import Measurement
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.recipe import BenchRecipe
from shortstack.steps import to_workload

SCHEMA = Path(__file__).parents[1] / "docs" / "schema" / "bench-2.schema.json"
SMALL = ["--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "2", "--threads", "1"]
SMALL += ["--memory-repeats", "1", "--no-ceilings"]


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare .gguf file, as anybody has it."""
    spec = ExportSpec.parse("gguf:F16")
    return exporter("gguf").export(Checkpoint.open(tiny), spec, tmp_path_factory.mktemp("g")).path


@pytest.fixture(scope="module")
def onnx(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ExportSpec.parse("onnx:int4", imatrix="no")
    folder = tmp_path_factory.mktemp("o")
    return exporter("onnx").export(Checkpoint.open(tiny), spec, folder).path


def record(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return data


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*args, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_every_kind_of_model_in_every_runtime_gives_one_record(
    tiny: Path, gguf: Path, onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    models = [str(tiny), str(gguf), str(onnx)]
    told = run(["bench", *models, "-o", str(out), *SMALL, "--repeats", "1"], capsys)
    assert told["failures"] == []
    made = record(out)
    assert (made["schema"], made["kind"]) == (2, "bench")
    assert len(made["run_id"]) == 32
    assert made["started_at"] <= made["finished_at"]
    assert made["ceilings"] == {}
    found = {(m["runtime"], m["artifact"]["spec"]["format"]) for m in made["measurements"]}
    assert found == {
        ("pytorch", "checkpoint"),
        ("llama.cpp", "gguf"),
        ("onnxruntime", "onnx"),
        ("onnxruntime-genai", "onnx"),
    }
    prompts = {m["prompt_sha256"] for m in made["measurements"]}
    assert len(prompts) == 1  # one tokenizer, one text: the same work for all
    for data in made["measurements"]:
        measured = Measurement.from_dict(data)
        assert len(measured.trials) == len(measured.memory) == 1
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert errors(made, schema, schema) == []
    text = (out / "bench.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(tiny.parent) not in text


def test_bytes_of_the_cache_agree_across_formats(
    tiny: Path, gguf: Path, onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(tiny), str(gguf), str(onnx), "-o", str(tmp_path / "out"), *SMALL]
    wanted = ["--repeats", "1", "--memory-repeats", "0"]
    names = ["--runtime", "pytorch", "--runtime", "llama.cpp", "--runtime", "onnxruntime"]
    run([*command, *wanted, *names], capsys)
    found = {
        m["runtime"]: m["kv_bytes_per_token"] for m in record(tmp_path / "out")["measurements"]
    }
    assert found["pytorch"] == 2 * found["llama.cpp"] > 0  # float32, F16
    assert found["onnxruntime"] in (found["pytorch"], found["llama.cpp"])


def test_what_a_foreign_file_holds_is_read_as_the_export_has_it(
    tiny: Path, gguf: Path, onnx: Path
) -> None:
    checkpoint = Checkpoint.open(tiny)
    for path, precision in ((gguf, "F16"), (onnx, "int4")):
        found = benchable(str(path))
        assert found.spec.precision == precision
        assert found.n_layers == checkpoint.n_layers
        assert found.n_params == pytest.approx(checkpoint.n_params, rel=0.3)
        assert 0 < found.weight_bytes_per_token <= found.size_bytes
    assert benchable(str(tiny), "bfloat16").weight_bytes_per_token == 2 * checkpoint.n_params


def test_prompt_lengths_depth_and_batch_reach_the_runtime(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    counts = ["--prompt-tokens", "16", "--depth", "10", "--batch", "3", "--cold", "--seed", "4"]
    run(["bench", str(gguf), "-o", str(out), *SMALL, *counts], capsys)
    made = record(out)
    works = [m["workload"] for m in made["measurements"]]
    assert [w["prompt_tokens"] for w in works] == [8, 16]
    assert {(w["depth_tokens"], w["batch"]) for w in works} == {(10, 3)}
    assert {m["runtime_info"]["batch"] for m in made["measurements"]} == {3}
    assert {m["protocol"]["seed"] for m in made["measurements"]} == {4}
    assert "--depth 10 --batch 3" in made["command"]
    assert made["command"].endswith("--no-ceilings --cold --text spdx")


def test_a_killed_campaign_goes_on_and_another_is_refused(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["bench", str(gguf), "-o", str(out), *SMALL, "--cooldown", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shortstack", *command, "--quiet"], stderr=subprocess.DEVNULL
    )
    journal, deadline = out / "trials.jsonl", time.monotonic() + 120
    while not (journal.is_file() and '"trial"' in journal.read_text(encoding="utf-8")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = journal.read_text(encoding="utf-8").splitlines()[:2]
    assert not (out / "bench.json").exists()
    assert "another campaign" in fails([*command, "--seed", "1"], capsys)
    told = run(command, capsys)
    assert journal.read_text(encoding="utf-8").splitlines()[:2] == kept
    assert [len(m["trials"]) for m in record(out)["measurements"]] == [2]
    before = (out / "bench.json").read_bytes()
    assert run(command, capsys) == told  # done: kept, not measured again
    assert (out / "bench.json").read_bytes() == before
    assert "another campaign" in fails([*command, "--decode-tokens", "5"], capsys)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    tiny: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["bench", str(gguf), str(tiny), "-o", str(out), *SMALL, "--batch", "2"]
    told = run([*command, "--dry-run"], capsys)
    assert told["trials"] == 2 * 3
    assert [c["runtime"] for c in told["cases"]] == ["llama.cpp", "pytorch"]
    assert told["does_not_fit"] == []
    assert not out.exists()
    assert main([*command, "--dry-run"]) == 0
    assert "Would be measured" in capsys.readouterr().out


def test_runtimes_that_cannot_are_left_out_and_told(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(onnx), "-o", str(tmp_path / "out"), *SMALL, "--batch", "2"]
    told = run([*command, "--dry-run"], capsys)
    assert [c["runtime"] for c in told["cases"]] == ["onnxruntime"]
    assert "one sequence at a time" in told["skipped"][0]
    assert "one sequence at a time" in fails([*command, "--runtime", "onnxruntime-genai"], capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runtime", "llama"], "unknown runtime 'llama'"),
        (["--runtime", "onnxruntime"], "onnxruntime does not open"),
        (["--device", "gpu"], "'gpu' is no device"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--option", "kv_type=q9"], "kv_type is 'q9', it must be one of"),
        (["--option", "dtype=float16"], "unknown option of llama.cpp 'dtype'"),
        (["--option", "dtype=fp16"], "dtype is 'fp16', it must be one of: float32"),
        (["--option", "kv_type"], "is not NAME=VALUE"),
        (["--prompt-tokens", "100000"], "was made for 512 tokens, 100,004 are asked for"),
        (["--cold", "--repeats", "1"], "every second load"),
        (["--threads", "5000"], "5000 threads are asked for"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_options_give_one_line_and_leave_nothing(
    options: list[str], words: str, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert words in fails(["bench", str(gguf), "-o", str(out), *SMALL, *options], capsys)
    assert not out.exists()


def test_an_option_where_no_runtime_has_one_says_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    exporter("onnx").export(Checkpoint.open(tiny), ExportSpec.parse("onnx:fp32"), folder)
    command = ["bench", str(folder), "-o", str(tmp_path / "out"), *SMALL]
    said = fails([*command, "--option", "dtype=float16"], capsys)
    assert "no options, 'dtype' is given. Leave it out." in said


def test_a_word_that_no_runtime_takes_is_refused_for_a_checkpoint_too(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(tiny), "-o", str(tmp_path / "out"), *SMALL, "--option", "dtype=fp16"]
    assert "dtype is 'fp16', it must be one of: float32" in fails(command, capsys)


@pytest.mark.parametrize("damage", ["{", "[]", '{"model": 3}', "\udcff", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "genai_config.json", "model.onnx"])
def test_damaged_files_of_a_folder_give_one_line(
    name: str, damage: str, onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(onnx, folder, ignore=shutil.ignore_patterns("shortstack.json"))
    if name == "config.json":
        (folder / "genai_config.json").unlink()
    (folder / name).write_bytes(damage.encode(errors="surrogateescape"))
    command = ["bench", str(folder), "-o", str(tmp_path / "out"), *SMALL, "--dry-run"]
    if damage == '{"model": 3}' and name != "model.onnx":
        assert main([*command, "--json"]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
    else:
        assert str(folder / name) in fails(command, capsys)


def test_places_that_are_no_model_or_not_ours_are_refused(
    tiny: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    out = str(tmp_path / "out")
    assert "is no model" in fails(["bench", str(empty), "-o", out], capsys)
    assert "no file or folder" in fails(["bench", str(tmp_path / "none"), "-o", out], capsys)
    assert "downloaded first" in fails(["bench", "hf:a/b", "-o", out], capsys)
    assert "not made by shortstack" in fails(["bench", str(gguf), "-o", str(foreign)], capsys)
    assert "overlap" in fails(["bench", str(tiny), "-o", str(tiny / "out")], capsys)
    assert (foreign / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ('{"version": 1, "model_sha', "is no plan of a packed model")],
)
def test_a_plan_that_is_not_there_or_cut_off_is_refused_before_anything_is_measured(
    content: str | None,
    words: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = pack(Checkpoint.open(tiny), tmp_path / "model.packed.safetensors").path
    file, out = tmp_path / "nope.json", tmp_path / "out"
    if content is not None:
        file.write_text(content)
    command = ["bench", str(packed), "-o", str(out), *SMALL, "--option", f"plan={file}"]
    assert f"{file} {words}" in fails(command, capsys)
    assert f"{file} {words}" in fails([*command, "--dry-run"], capsys)
    assert not out.exists()


def test_a_file_without_layers_is_refused_as_its_record_would_be(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = b"llama.block_count"
    raw = bytearray(gguf.read_bytes())
    place = raw.index(key) + len(key) + 4  # behind the type of the value
    raw[place : place + 4] = bytes(4)
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(raw)
    said = fails(["bench", str(empty), "-o", str(tmp_path / "out"), *SMALL], capsys)
    assert f"{empty} is no decoder that can be measured: its n_layers is 0" in said
    assert not (tmp_path / "out").exists()


def test_a_broken_model_is_a_recorded_failure(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The header is whole, so the file is looked at; a tensor that the arch needs is not there."""
    broken = tmp_path / "broken.gguf"
    raw = gguf.read_bytes()
    broken.write_bytes(raw.replace(b"blk.3.attn_norm.weight", b"blk.3.attn_nurm.weight"))
    out = tmp_path / "out"
    assert main(["bench", str(broken), str(gguf), "-o", str(out), *SMALL, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert "cannot open" in told["failures"][0]
    bad, good = record(out)["measurements"]
    assert bad["failure"]["phase"] == "load"
    assert good["failure"] is None
    assert len(good["trials"]) == 2
    first = told["run_id"]
    assert main(["bench", str(broken), str(gguf), "-o", str(out), *SMALL, "--json"]) == 1
    again = json.loads(capsys.readouterr().out)
    assert again["run_id"] != first  # what failed was tried again, so it is another record
    assert record(out)["measurements"][1] == good
    lines = (out / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"failure"' in line for line in lines) == 2


def test_a_retry_that_is_killed_is_still_a_retry(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    raw = gguf.read_bytes()
    broken.write_bytes(raw.replace(b"blk.3.attn_norm.weight", b"blk.3.attn_nurm.weight"))
    out = tmp_path / "out"
    command = ["bench", str(broken), str(gguf), "-o", str(out), *SMALL, "--json"]
    assert main(command) == 1
    with monkeypatch.context() as patched:
        patched.setattr(bench_commands, "measure", lambda *_, **__: killed())
        assert main(command) == 2
    assert main(command) == 1
    capsys.readouterr()
    lines = (out / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"failure"' in line for line in lines) == 2


def test_another_machine_with_the_same_processor_is_refused(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, name = tmp_path / "out", tmp_path / "machine-id"
    command = ["bench", str(gguf), "-o", str(out), *SMALL, "--repeats", "1"]
    monkeypatch.setattr(host, "MACHINE_ID", name)
    name.write_text("0123456789abcdef\n")
    run(command, capsys)
    assert all("0123456789abcdef" not in file.read_text() for file in out.iterdir())
    name.write_text("fedcba9876543210\n")
    assert "another campaign" in fails(command, capsys)


def test_the_files_of_a_foreign_graph_are_those_it_names(onnx: Path, tmp_path: Path) -> None:
    """Variants beside it are not counted, weights of any name are."""
    ir = pytest.importorskip("onnx_ir")
    folder = tmp_path / "model"
    shutil.copytree(onnx, folder, ignore=shutil.ignore_patterns("shortstack.json", "model.onnx*"))
    ir.save(ir.load(onnx / "model.onnx"), folder / "model.onnx", external_data="weights.bin")
    (folder / "model_q4.onnx").write_bytes(b"a variant")
    found = benchable(str(folder))
    parts = [folder / "model.onnx", folder / "weights.bin"]
    assert found.size_bytes == sum(part.stat().st_size for part in parts)
    raw = bytearray(parts[1].read_bytes())
    raw[-1] ^= 1
    parts[1].write_bytes(raw)
    assert benchable(str(folder)).sha256 != found.sha256
    parts[1].unlink()
    with pytest.raises(ShortstackError, match=r"keeps weights in weights\.bin"):
        benchable(str(folder))


def test_another_driver_makes_another_campaign(gguf: Path) -> None:
    plan = make_plan([str(gguf)], BenchChoice(prompt_tokens=(8,), decode_tokens=4))
    keys = set()
    for driver in ("580.1", "580.2"):
        cases = tuple(replace(case, device_info={"driver": driver}) for case in plan.cases)
        keys.add(str(replace(plan, cases=cases).identity))
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["bench.json", "shortstack.json"])
def test_what_a_kill_in_mid_write_leaves_is_no_strangers_file(
    name: str, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = ["bench", str(gguf), "-o", str(out), *SMALL, "--repeats", "1"]
    if name == "bench.json":
        run(command, capsys)
    (out / f".{name}.partial").write_text("{")
    run(command, capsys)
    assert not (out / f".{name}.partial").exists()
    assert run(command, capsys)["failures"] == []
    (out / ".notes.partial").write_text("mine")
    assert "holds .notes.partial" in fails(command, capsys)


def test_a_dry_run_counts_the_trials_for_energy(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_commands, "counters", lambda device: (["a counter"], []))
    command = ["bench", str(gguf), "-o", str(tmp_path / "out"), *SMALL, "--dry-run"]
    assert run([*command, "--energy"], capsys)["trials"] == run(command, capsys)["trials"] + 1


def killed() -> None:
    raise ShortstackError("as if it was killed")


def test_ceilings_are_measured_in_the_same_run(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(gguf), "-o", str(tmp_path / "out"), *SMALL, "--repeats", "1"]
    command.remove("--no-ceilings")
    run(command, capsys)
    found = record(tmp_path / "out")["ceilings"]["cpu"]
    assert found["threads"] == 1
    assert found["read_bytes_per_s"] > 0


def test_two_alike_get_two_names(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(gguf, again / gguf.name)
    command = ["bench", str(gguf), str(again / gguf.name), "-o", str(tmp_path / "out"), *SMALL]
    told = run([*command, "--dry-run"], capsys)
    first, second = (case["label"] for case in told["cases"])
    assert second == f"{first}'"


def test_bench_and_run_warm_up_with_the_whole_prompt() -> None:
    choice = BenchChoice(threads=1)
    assert choice.workload(512).warmup_prompt_tokens == 512
    assert choice.workload(4096).warmup_prompt_tokens == 1024
    assert replace(choice, device="cuda:0").workload(4096).warmup_prompt_tokens == 4096
    recipe = BenchRecipe(prompt_tokens=300, threads=1)
    assert to_workload(recipe).warmup_prompt_tokens == 300
