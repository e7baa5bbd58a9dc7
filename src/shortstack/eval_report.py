"""An evaluation as tables: for the terminal and for eval.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of words under a title; the first column names the model."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(data: Mapping[str, Any]) -> list[Table]:
    """One table a set, from what eval.json holds."""
    found = []
    for spec in data["sets"]:
        results = [result for result in data["results"] if result["set"] == spec["name"]]
        columns = COLUMNS[spec["kind"]](spec, results)
        if data["original"] is not None:
            columns |= AGAINST[spec["kind"]]
        rows = tuple(
            (result["model"], *(show(result) for show in columns.values())) for result in results
        )
        found.append(Table(_title(spec, results), ("model", *columns), rows))
    return found


def _title(spec: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    summary = results[0]["summary"]
    words = [f"n = {summary['n']}"]
    if spec["kind"] == "text":
        words = [f"{summary['n']} windows, {summary['n_tokens']} tokens"]
    for name in ("chance", "majority"):
        if name in summary:
            words.append(f"{name} {summary[name]:.3f}")
    return f"{spec['name']} ({', '.join(words)})"


def _choice(spec: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ["accuracy", "accuracy_by_length"]
    if "macro_f1" in results[0]["summary"]:
        names.append("macro_f1")
    names.sort(key=lambda name: name != spec["metric"])  # the set's own first
    return {name.replace("_", " "): _metric(name) for name in names}


def _generation(spec: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {spec["metric"].replace("_", " "): _metric(spec["metric"])}


def _text(spec: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"perplexity": lambda result: _interval(result["summary"]["perplexity"], "{:.2f}")}


def _metric(name: str) -> Any:
    return lambda result: _interval(result["summary"][name], "{:.3f}")


def _interval(found: Mapping[str, float], form: str) -> str:
    return "{} ({} to {})".format(*(form.format(found[k]) for k in ("estimate", "low", "high")))


def _against(key: str, form: str) -> Any:
    """A figure of the comparison; a dash for the original itself."""

    def show(result: Mapping[str, Any]) -> str:
        found = result.get("against", {}).get(key)
        if found is None:
            return "–"
        return _interval(found, form) if isinstance(found, Mapping) else form.format(found)

    return show


def _p_value(result: Mapping[str, Any]) -> str:
    found = result.get("against", {}).get("difference")
    return "–" if found is None else f"{found['p_value']:.2g}"


COLUMNS = {"choice": _choice, "text": _text, "generation": _generation}
AGAINST: dict[str, dict[str, Any]] = {
    "choice": {
        "difference": _against("difference", "{:+.3f}"),
        "McNemar p": _p_value,
        "stability": _against("stability", "{:.3f}"),
    },
    "text": {
        "ratio": _against("ratio", "{:.3f}"),
        "KL nats": _against("kl_nats", "{:.4f}"),
        "same top": _against("same_top", "{:.3f}"),
    },
    "generation": {
        "difference": _against("difference", "{:+.3f}"),
        "McNemar p": _p_value,
        "same text": _against("same_text", "{:.3f}"),
    },
}


def markdown(data: Mapping[str, Any]) -> str:
    """eval.md: one table a set, and how the numbers were made."""
    lines = ["# Evaluation", ""]
    lines += as_markdown(tables(data))
    lines += ["## Models", "", _line(("model", "runtime", "layers", "MB", "sha256"))]
    lines.append(_line(["---"] * 5))
    for model in data["models"]:
        layers = "?" if model["n_layers"] is None else str(model["n_layers"])
        size = f"{model['size_bytes'] / 1e6:.1f}"
        lines.append(_line((model["label"], model["runtime"], layers, size, model["sha256"][:12])))
    loading = data["loading"]
    lines += [
        "",
        f"Seed {data['seed']}; contexts of {loading['context_tokens']} tokens at most; checkpoints "
        f"in {loading['dtype']} on {loading['device']}. Intervals are 95 %: Wilson for shares, "
        "bootstrap over rows or windows for the rest. Every row is in eval.json.",
        "",
    ]
    return "\n".join(lines)


def as_markdown(found: Sequence[Table]) -> list[str]:
    """Lines of Markdown: a heading and a table each."""
    lines = []
    for table in found:
        lines += [f"## {table.title}", "", _line(table.columns)]
        lines.append(_line(["---", *("---:" for _ in table.columns[1:])]))
        lines += [_line(row) for row in table.rows] + [""]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(data: Mapping[str, Any], quiet: bool) -> None:
    """The tables on standard output, then where everything is."""
    from shortstack import terminal

    if not quiet:
        for table in tables(data):
            terminal.print_table(table.title, table.columns, table.rows)
    terminal.print_facts({"folder": data["folder"]}, quiet=False)
