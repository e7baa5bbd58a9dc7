"""The merged report as files: llama-bench's rows, CSV, a whole page, nothing unescaped."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from pathlib import Path

import pytest

from shortstack.devices.report.merged import Merged, merge, write_merged
from shortstack.devices.report.merged.llama_bench import llama_bench_rows
from shortstack.devices.report.merged.matrix import rows
from shortstack.devices.report.merged.table_csv import to_csv
from shortstack.devices.report.merged.write import to_html, to_markdown
from shortstack.roofline_report import shares

from .bench_sample import (
    bench,
    laptop_run,
    measurement,
    server_run,
    workload,
)
from .merged_sample import EVIL, Load, guess, hostile
from .test_report import Page

LLAMA_BENCH = (
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
    *("model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads"),
    *("cpu_mask", "cpu_strict", "poll", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe"),
    *("split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split"),
    *("tensor_buft_overrides", "load_mode", "embeddings", "no_op_offload", "no_host"),
    *("fit_target", "fit_min_ctx", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns"),
    *("stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
)
"""What `llama-bench -o json` prints of a test."""


def test_llama_bench_rows_have_its_fields_in_its_order(both: Merged) -> None:
    made = llama_bench_rows(both.cases)
    assert len(made) == 2 * len(both.cases)
    assert [name for name in made[0] if name != "use_mmap"] == list(LLAMA_BENCH)
    assert None not in [value for row in made for value in row.values()]
    prompt, decode = made[:2]
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (128, 0, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 16, 128)
    assert decode["avg_ts"] == pytest.approx(1e9 * 16 / decode["avg_ns"], rel=0.01)
    assert len(decode["samples_ns"]) == len(decode["samples_ts"]) == 6
    assert {row["backends"] for row in made} == {"CPU", "CUDA"}
    assert made[-1]["gpu_info"] == "Example H9"


def test_llama_bench_rows_tell_what_the_runtime_said(load: Load) -> None:
    record = bench([measurement("original", 30)])
    told = {"n_gpu_layers": 31, "n_batch": 512, "n_ubatch": 256, "mmap": True, "backend": "Vulkan"}
    record["measurements"][0]["runtime_info"] |= {**told, "kv_cache": "Q8_0"}
    row = llama_bench_rows(merge(load(record)).cases)[0]
    assert row.items() >= {"n_gpu_layers": 31, "n_batch": 512, "n_ubatch": 256}.items()
    assert row.items() >= {"use_mmap": True, "backends": "Vulkan"}.items()
    assert (row["type_k"], row["type_v"]) == ("q8_0", "q8_0")


def test_llama_bench_rows_say_no_only_where_that_is_known(both: Merged) -> None:
    laptop, *_, server = llama_bench_rows(both.cases)
    assert (laptop["n_gpu_layers"], server["n_gpu_layers"]) == (0, -1)
    assert laptop["use_mmap"] == ""
    assert laptop["flash_attn"] == -1
    assert laptop["type_k"] == "f16"


def test_a_batch_has_no_place_in_llama_bench(load: Load) -> None:
    cases = [measurement("original", 30, work=workload(batch=8)), measurement("cut24", 24)]
    merged = merge(load(bench(cases)))
    assert len(llama_bench_rows(merged.cases)) == 2
    assert "1 measurement of a batch above 1" in to_markdown(merged)


def test_csv_has_one_line_a_measurement_and_computes_nothing(load: Load) -> None:
    record = laptop_run()
    record["measurements"][0]["label"] = '=HYPERLINK("http://x","y")'
    merged = merge(load(record, server_run()))
    lines = list(csv.DictReader(io.StringIO(to_csv(merged, rows(merged.cases)))))
    assert len(lines) == 8
    assert lines[0]["label"].startswith("'=HYPERLINK")
    assert float(lines[1]["decode_step_ms"]) == pytest.approx(14.0, rel=0.02)
    assert lines[-1]["decode_net_j_per_token"] == "30.0"
    assert not any(value.startswith(("=", "@", "+")) for line in lines for value in line.values())


@pytest.mark.parametrize("words", EVIL)
def test_hostile_words_are_escaped_everywhere(load: Load, words: str) -> None:
    merged = merge(
        load(hostile(words), server_run()),
        projected=[guess(words, 1.0, ())],
        share_of=shares,
    )
    page = Page(to_html(merged))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "49" not in [w.strip() for w in page.words]
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        target = attributes.get("href") or "#"
        assert target.startswith("#")
    lines = to_markdown(merged).splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert not any(re.search(r"(?<!\\)<|\x1b|\x00", line) for line in lines)
    assert json.loads(json.dumps(llama_bench_rows(merged.cases)))
    assert to_csv(merged, rows(merged.cases))


def test_no_file_holds_a_character_that_a_terminal_or_a_page_obeys(
    load: Load, tmp_path: Path
) -> None:
    evil = "a\x1b[2J\u202egpj\u2066\x07\x7f\x9b1m\u200f\u061c\u2028\rend"
    merged = merge(load(hostile(evil), server_run()), share_of=shares)
    (tmp_path / "out").mkdir()
    for file in write_merged(merged, tmp_path / "out"):
        text = file.read_text(encoding="utf-8")
        unseen = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
        assert unseen <= {"\n"}, file.name
        assert "u202e" in text, file.name


def test_labels_that_differ_in_an_unseen_character_stay_two(load: Load) -> None:
    two = [measurement("model", 30), measurement("model\u202e", 30)]
    labels = [case.label for case in merge(load(bench(two))).cases]
    assert labels == ["model", r"model\u202e"]


def test_a_path_in_a_command_is_not_shown(load: Load) -> None:
    record = bench([measurement("original", 30)])
    record["command"] = "shortstack bench /home/jane/models/a.gguf C:\\Users\\jane\\b.gguf -o out/x"
    record["measurements"][0]["artifact"]["path"] = "/home/jane/a.gguf"
    merged = merge(load(record))
    text = to_html(merged) + to_markdown(merged) + str(llama_bench_rows(merged.cases))
    assert "jane" not in text
    assert "shortstack bench a.gguf b.gguf -o x" in text


def test_the_page_is_whole_and_asks_for_nothing(both: Merged) -> None:
    text = to_html(both)
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "img"}
        assert "src" not in attributes
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes.get("href") or "")[1:] in ids
    assert not re.search(r"https?://", text)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_tables_have_captions_and_headers_of_both_kinds(both: Merged) -> None:
    page = Page(to_html(both))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") >= 8
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    scrolls = [a for t, a in page.tags if t == "div" and a.get("class") == "scroll"]
    assert len(scrolls) == tags.count("table")
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolls)


def test_markdown_tables_have_as_many_cells_as_columns(both: Merged) -> None:
    blocks = [b for b in to_markdown(both).split("\n\n") if b.startswith("| ")]
    assert len(blocks) >= 9
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_equal_records_give_equal_files(both: Merged) -> None:
    assert to_html(both) == to_html(both)


def test_four_files_are_written(both: Merged, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    paths = write_merged(both, out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in paths)
    assert json.loads((out / "llama-bench.json").read_text(encoding="utf-8"))
