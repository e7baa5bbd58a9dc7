"""`shortstack eval`: models and artifacts on the same rows, into one folder that can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack import eval_report
from shortstack.commands import stages
from shortstack.devices.host import check_threads
from shortstack.errors import ShortstackError
from shortstack.evaluate import agreement
from shortstack.evaluate.run import Examinee
from shortstack.evaluate.sets import SetSpec, distinct
from shortstack.evaluate.targets import PYTORCH, Loading, Target, target_of
from shortstack.evaluate.torch_scorer import check_loading
from shortstack.exits import split_depth
from shortstack.manifest import check_apart, read_manifest, write_text
from shortstack.packed.runnable import PACKED
from shortstack.progress import Display, OnProgress
from shortstack.run_folder import RunFolder


def evaluate(
    models: Sequence[str],
    against: str | None,
    sets: Sequence[SetSpec],
    loading: Loading,
    out: Path,
    display: Display,
    *,
    seed: int = 0,
    runtime: str = "",
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Score every model on every set; write eval.json and eval.md into `out`.

    What an earlier, killed run finished there is kept. Raises ShortstackError for a model or a
    file that cannot be read, and for an `out` that is not an evaluation's.
    """
    sets = distinct(sets)
    for spec in sets:  # before a model is opened
        spec.module.check(spec.path, spec.metric)
    check_threads(loading.threads)
    _check_out(out)
    named = [Path(name) for name in (*models, against) if name is not None]
    check_apart(out, [path for path in named if path.exists()])
    told = [Path(name).name for name in models]  # a record holds no folders of the machine
    first_told = None if against is None else Path(against).name
    facts = {"command": "eval", "models": told, "against": first_told, "seed": seed}
    with contextlib.ExitStack() as stack:
        found = [_Wanted(name, runtime, tokenizer) for name in models]
        first = None if against is None else _Wanted(against, "", tokenizer)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        targets = _targets(stack, found, first, out, display)
        if any(target.runtime in (PYTORCH, PACKED) for target in targets):
            check_loading(loading.device, loading.dtype)
        folder = stack.enter_context(RunFolder.claim(out, facts, display))
        data = _evaluated(folder, targets, against is not None, sets, loading, seed)
        write_text(out / "eval.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        write_text(out / "eval.md", eval_report.markdown(data))
    return {**data, "folder": str(out)}


def _evaluated(
    folder: RunFolder,
    targets: Sequence[Target],
    compared: bool,
    sets: Sequence[SetSpec],
    loading: Loading,
    seed: int,
) -> dict[str, Any]:
    """`compared`: the first of the targets is the original."""
    results = _score_all(folder, targets, sets, loading, seed)
    if not compared:
        return _gathered(targets, None, sets, loading, seed, results, {})
    agreed = _agree_all(folder, targets[0], targets[1:], sets, loading, seed)
    return _gathered(targets, targets[0], sets, loading, seed, results, agreed)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A model as the user names it."""

    name: str
    runtime: str
    tokenizer: Path | None


def _check_out(out: Path) -> None:
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is not None and manifest.get("command") != "eval":
        raise ShortstackError(
            f"{out} holds the result of another command ({manifest.get('step')}). "
            "Choose another output."
        )


def _targets(
    stack: contextlib.ExitStack,
    models: Sequence[_Wanted],
    against: _Wanted | None,
    out: Path,
    display: Display,
) -> list[Target]:
    """The models, the original first; one that holds what an earlier one does comes once, which is
    said. Raises ShortstackError for a name that means two models."""
    targets: list[Target] = []
    named: list[str] = []
    for wanted in (*([against] if against else []), *models):
        label = _label(wanted.name, [target.label for target in targets])
        place = Path(wanted.name)
        depth = split_depth(place)[1]  # of a folder that is there, too: it may hide an exit
        if depth is not None or (":" in wanted.name and not place.exists()):
            place = stack.enter_context(stages.opened(wanted.name, _near(out, label), display)).path
        target = target_of(place, label=label, runtime=wanted.runtime, tokenizer=wanted.tokenizer)
        same = [
            name
            for name, t in zip(named, targets, strict=True)
            if (t.sha256, t.runtime) == (target.sha256, target.runtime)
        ]
        if same:
            display.note(_twice(wanted.name, same[0]))
        else:
            targets.append(target)
            named.append(wanted.name)
    return targets


def _twice(name: str, earlier: str) -> str:
    if name == earlier:
        return f"{name} is named twice: scored once"
    return f"{name} holds the same weights as {earlier}: scored once"


def _near(out: Path, label: str) -> Path:
    """Each model that is made into a folder has one of its own while all are evaluated."""
    return out.with_name(f"{out.name}.{label}")


def _label(name: str, taken: Sequence[str]) -> str:
    """The last part of a path, with the one before it where that is taken."""
    parts = [part for part in Path(name).absolute().parts if part != "/"]
    for count in range(1, len(parts) + 1):
        label = "-".join(parts[-count:]).removesuffix(".gguf").replace(":", "-")
        if label not in taken and not label.startswith("."):
            return label
    return f"{label}-{len(taken)}"


def _score_all(
    folder: RunFolder,
    targets: Sequence[Target],
    sets: Sequence[SetSpec],
    loading: Loading,
    seed: int,
) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for target in targets:
        with Examinee(target, loading, seed) as examinee:
            for spec in sets:

                def make(
                    partial: Path,
                    progress: OnProgress,
                    examinee: Examinee = examinee,
                    spec: SetSpec = spec,
                ) -> Mapping[str, Any]:
                    scored = examinee.score(spec, progress)
                    _write(partial / "rows.json", scored["rows"])
                    if scored["info"].get("batches_halved"):
                        folder.display.note("out of memory: batches were halved, nothing is lost")
                    return {"info": scored["info"], "score_s": round(scored["score_s"], 3)}

                name = f"scores/{target.label}/{spec.name}"
                title = f"{target.label} on {spec.name}"
                inputs = _inputs(target, spec, loading, seed)
                path, manifest = folder.build(name, title, inputs, make)
                found[target.label, spec.name] = {
                    "rows": _read(path / "rows.json"),
                    "info": manifest["info"],
                    "score_s": manifest["score_s"],
                }
    return found


def _inputs(target: Target, spec: SetSpec, loading: Loading, seed: int) -> dict[str, Any]:
    """What a result depends on; how many threads or rows at once does not change it."""
    own: dict[str, Any] = {"context_tokens": loading.context_tokens}
    if target.runtime in (PYTORCH, PACKED):
        own |= {"dtype": loading.dtype, "device": loading.device}
    return {
        "model": target.sha256,
        "runtime": target.runtime,
        "set": spec.identity,
        "seed": seed,
        **own,
    }


def _agree_all(
    folder: RunFolder,
    original: Target,
    targets: Sequence[Target],
    sets: Sequence[SetSpec],
    loading: Loading,
    seed: int,
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """KL and top-1 agreement to the original on every text."""
    found = {}
    for spec in (spec for spec in sets if spec.kind == "text"):
        inputs = {
            target.label: {
                "original": _inputs(original, spec, loading, seed),
                **_inputs(target, spec, loading, seed),
            }
            for target in targets
        }
        names = {target.label: f"agreement/{target.label}/{spec.name}" for target in targets}
        missing = [t for t in targets if not folder.holds(names[t.label], inputs[t.label])]
        with _reference(folder, original, spec, loading, seed, bool(missing)) as reference:
            for target in targets:

                def make(
                    partial: Path,
                    progress: OnProgress,
                    target: Target = target,
                    spec: SetSpec = spec,
                    reference: Path = reference,
                ) -> Mapping[str, Any]:
                    with Examinee(target, loading, seed) as examinee:
                        _write(partial / "rows.json", examinee.agree(spec, reference, progress))
                    return {}

                title = f"{target.label} against {original.label} on {spec.name}"
                label = target.label
                path, _ = folder.build(names[label], title, inputs[label], make)
                found[label, spec.name] = _read(path / "rows.json")
    return found


@contextlib.contextmanager
def _reference(
    folder: RunFolder,
    original: Target,
    spec: SetSpec,
    loading: Loading,
    seed: int,
    wanted: bool,
) -> Iterator[Path]:
    """The original's distributions in a file, for as long as models are held against them."""
    file = folder.path / ".reference.partial.npy"
    try:
        if wanted:
            with (
                folder.display.step(f"{original.label}: distributions on {spec.name}") as progress,
                Examinee(original, loading, seed) as examinee,
            ):
                examinee.write_reference(spec, file, progress)
        yield file
    finally:
        file.unlink(missing_ok=True)


def _gathered(
    targets: Sequence[Target],
    original: Target | None,
    sets: Sequence[SetSpec],
    loading: Loading,
    seed: int,
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    agreed: Mapping[tuple[str, str], Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """Everything in one value: what eval.json holds."""
    rows = []
    for spec in sets:
        for target in targets:
            key = (target.label, spec.name)
            result = results[key]
            entry: dict[str, Any] = {"model": target.label, "set": spec.name, "kind": spec.kind}
            entry["summary"] = spec.module.summarise(result["rows"])
            if original is not None and target is not original:
                first = results[original.label, spec.name]["rows"]
                entry["against"] = spec.module.compare(first, result["rows"])
                if key in agreed:
                    entry["against"] |= agreement.summarise(agreed[key])
            rows.append({**entry, **result})
    return {
        "schema": 1,
        "seed": seed,
        "loading": dataclasses.asdict(loading),
        "original": None if original is None else original.label,
        "models": [target.record for target in targets],
        "sets": [{**spec.identity, "path": spec.path.name} for spec in sets],
        "results": rows,
    }


def _write(file: Path, rows: Sequence[Any]) -> None:
    write_text(file, json.dumps(rows, ensure_ascii=False) + "\n")


def _read(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows
