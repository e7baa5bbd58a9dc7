"""What a campaign of `bench` is: choices and models in, cases with their prompts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifact import Artifact
from shortstack.bench.models import benchable, longest_context
from shortstack.devices import fit, listing
from shortstack.devices.host import check_threads, cpu_model, libraries, machine_id, usable_cores
from shortstack.devices.schedule import Case
from shortstack.devices.workload import Prompt, Workload, warmup_tokens
from shortstack.errors import ShortstackError, unknown
from shortstack.evaluate.codec import Codec, FolderCodec, packed_codec
from shortstack.exits import is_exits, parse_exits, read_exits, split_depth
from shortstack.runtimes import RUNTIMES, capabilities, runtimes_for
from shortstack.text import Corpus, open_corpus, token_windows

PACKAGES = {
    "llama.cpp": "llama_cpp",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "pytorch": "transformers",
    "pytorch-packed": "transformers",
}


NO_DEPTH = "0"
"""What `--depth` is where it is not given."""


@dataclass(frozen=True)
class BenchChoice:
    """The options of the command, as they were given."""

    runtimes: tuple[str, ...] = ()
    prompt_tokens: tuple[int, ...] = (128,)
    decode_tokens: int = 64
    depth_tokens: int = 0
    batch: int = 1
    repeats: int = 6
    memory_repeats: int = 2
    threads: int | None = None
    seed: int = 0
    cooldown_s: float = 0.0
    time_budget_s: float | None = None
    timeout_s: float = 900.0
    cold: bool = False
    energy: bool = False
    ceilings: bool = True
    device: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)
    text: str = "spdx"

    def workload(self, prompt_tokens: int) -> Workload:
        return Workload(
            prompt_tokens=prompt_tokens,
            decode_tokens=self.decode_tokens,
            warmup_prompt_tokens=warmup_tokens(prompt_tokens, self.device),
            repeats=self.repeats,
            memory_repeats=self.memory_repeats,
            threads=self.threads or usable_cores(),
            depth_tokens=self.depth_tokens,
            batch=self.batch,
            cooldown_s=self.cooldown_s,
            time_budget_s=self.time_budget_s,
        )


@dataclass(frozen=True)
class Plan:
    """Every case with its own workload and prompt; `skipped` says what is left out and why."""

    cases: tuple[Case, ...]
    choice: BenchChoice
    skipped: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it another campaign: what is measured, how, where, with which versions.

        For `step_key` alone, which stores a hash of it.
        """
        info = self.cases[0].device_info
        return {
            "cases": [
                [c.label, c.artifact.sha256, *c.group, c.prompt.sha256 if c.prompt else None]
                for c in self.cases
            ],
            "workloads": [c.workload.to_dict() for c in self.cases if c.workload],
            "seed": self.choice.seed,
            "cold": self.choice.cold,
            "energy": self.choice.energy,
            "ceilings": self.choice.ceilings,
            "timeout_s": self.choice.timeout_s,
            "cpu": cpu_model(),
            "machine": machine_id(),
            "libraries": libraries(),
            "device": [info.get(name) for name in ("name", "uuid_sha256", "driver")],
        }

    def refusals(self) -> list[str]:
        """Models that cannot fit, each in one line."""
        return [
            why
            for c in self.cases
            if c.workload is not None
            and (
                why := fit.refusal(c.artifact, c.workload, c.device, c.device_info, dict(c.options))
            )
        ]


def at_depths(models: Sequence[str], depth: str) -> tuple[list[str], int]:
    """What `--depth` says: models with every depth of a folder of exits named (`EXITS@15`), and
    the tokens in the cache before the prompt, which it means for other models.

    Raises ShortstackError for models of both kinds, and for a depth that exits do not have.
    """
    with_exits = [model for model in models if is_exits(Path(model))]
    if not with_exits:
        if not depth.isdecimal():
            raise ShortstackError(
                f"--depth {depth}: these models have no exits, so it counts tokens in the cache "
                "before the prompt, one number. Train exits with: shortstack exits train"
            )
        return list(models), int(depth)
    if depth != NO_DEPTH and len(with_exits) < len(models):
        raise ShortstackError(
            "--depth names layers of models with exits, and tokens in the cache of others. Measure "
            "them apart, or leave it out."
        )
    named: list[str] = []
    for model in models:
        if model not in with_exits:
            named.append(model)
            continue
        exits = read_exits(Path(model))
        depths = exits.depths if depth == NO_DEPTH else parse_exits(depth)
        for one in depths:
            exits.check_depth(one)
        if len(set(depths)) < len(depths):
            raise ShortstackError(f"--depth {depth} names a depth twice. Name each once.")
        named += [f"{Path(model)}@{one}" for one in depths]
    return named, 0


def make_plan(models: Sequence[str], choice: BenchChoice) -> Plan:
    """Look at every model and cut the text. Nothing is loaded, nothing written.

    Raises ShortstackError for whatever cannot be measured as it is asked for.
    """
    if choice.cold and any(split_depth(Path(model))[1] is not None for model in models):
        raise ShortstackError(
            "--cold drops the files of a folder from memory; those of exits lie in two. Leave it "
            "out, or measure folders of: shortstack exits export"
        )
    check_threads(choice.threads)
    if choice.cold and choice.repeats < 2:
        raise ShortstackError(
            "--cold is for every second load and --repeats 1 has none. Ask for 2 repeats or more."
        )
    capabilities.device_kind(choice.device)
    _check_words(choice.options)
    lengths = tuple(dict.fromkeys(choice.prompt_tokens))
    workloads = [choice.workload(length) for length in lengths]
    dtype, word = choice.options.get("dtype", "float32"), choice.options.get("quantize", "none")
    with ThreadPoolExecutor() as pool:  # most of it is hashing, which frees the interpreter
        artifacts = list(pool.map(lambda name: benchable(name, dtype, word), models))
    for artifact in artifacts:
        _check_context(artifact, workloads)
    prompts = _prompts(artifacts, open_corpus(choice.text), workloads)
    info = listing.device(choice.device)
    cases, skipped = [], []
    for label, artifact, given in zip(labels(models, artifacts), artifacts, prompts, strict=True):
        for runtime in _runtimes(artifact, choice):
            why = _why_not(artifact, runtime, choice)
            if why is not None:
                skipped.append(f"{label} in {runtime} is left out: {why}")
                continue
            mine = capabilities.CAPABILITIES[runtime].options
            options = tuple(sorted((k, v) for k, v in choice.options.items() if k in mine))
            capabilities.check_together(runtime, choice.device, dict(options))
            cases += [
                Case(label, artifact, runtime, choice.device, options, info, work, prompt)
                for work, prompt in zip(workloads, given, strict=True)
            ]
    if not cases:
        raise ShortstackError(f"nothing can be measured. {'; '.join(skipped)}")
    _check_options(cases, choice.options)
    return Plan(tuple(cases), choice, tuple(skipped))


def labels(models: Sequence[str], artifacts: Sequence[Artifact]) -> list[str]:
    """`original` and `pruned` where the folders say so, else names; no two of an export alike."""
    found: list[str] = []
    taken: set[tuple[str, str]] = set()
    for model, artifact in zip(models, artifacts, strict=True):
        place = Path(model.removeprefix("pkg:")).absolute()
        known = [part for part in place.parts[-2:] if part in ("original", "pruned")]
        label = known[0] if known else place.name.removesuffix(".gguf")
        while (label, artifact.spec.slug) in taken:
            label += "'"
        taken.add((label, artifact.spec.slug))
        found.append(label)
    return found


def _runtimes(artifact: Artifact, choice: BenchChoice) -> list[str]:
    fitting = runtimes_for(artifact.format, choice.runtimes)
    if not fitting:
        opens = ", ".join(name for name, (fmt, _) in RUNTIMES.items() if fmt == artifact.format)
        asked = ", ".join(choice.runtimes)
        raise ShortstackError(f"{asked} does not open {artifact.path}. Runtimes that do: {opens}.")
    return fitting


def _why_not(artifact: Artifact, runtime: str, choice: BenchChoice) -> str | None:
    """Why a runtime that nobody asked for by name is left out; one that was asked for is tried or
    refused."""
    from importlib.util import find_spec

    try:
        capabilities.check(runtime, choice.device, choice.batch, {})
        if choice.batch > 1 and choice.depth_tokens:
            capabilities.check_batch_at_depth(runtime)
    except ShortstackError as error:
        if runtime in choice.runtimes:
            raise
        return str(error)
    if runtime in choice.runtimes:
        return None
    if find_spec(PACKAGES[runtime]) is None:
        return f"{PACKAGES[runtime]} is not installed"
    if runtime == "onnxruntime-genai" and not (artifact.path / "genai_config.json").is_file():
        return "there is no genai_config.json"
    return None


def _check_words(options: Mapping[str, str]) -> None:
    """An option with a word that no runtime takes is refused before a model is looked at."""
    for name, value in options.items():
        refused: list[ShortstackError] = []
        knowing = [r for r, row in capabilities.CAPABILITIES.items() if name in row.options]
        for runtime in knowing:
            try:
                capabilities.check(runtime, "cpu", 1, {name: value})
            except ShortstackError as error:
                refused.append(error)
        if refused and len(refused) == len(knowing):
            raise refused[0]


def _check_options(cases: Sequence[Case], options: Mapping[str, str]) -> None:
    """Every option must be of some runtime that runs."""
    runtimes = list(dict.fromkeys(case.runtime for case in cases))
    offered = {name for r in runtimes for name in capabilities.CAPABILITIES[r].options}
    for name in options:
        if not offered:
            raise ShortstackError(
                f"{', '.join(runtimes)} has no options, {name!r} is given. Leave it out."
            )
        if name not in offered:
            raise unknown(f"option of {', '.join(runtimes)}", name, offered)


def _check_context(artifact: Artifact, workloads: Sequence[Workload]) -> None:
    longest = longest_context(artifact)
    needed = max(work.input_tokens + work.decode_tokens for work in workloads)
    if longest is not None and needed > longest:
        raise ShortstackError(
            f"{artifact.path.name} was made for {longest:,} tokens, {needed:,} are asked for "
            "(depth, prompt and decoded ones). Ask for fewer."
        )


def _prompts(
    artifacts: Sequence[Artifact], corpus: Corpus, workloads: Sequence[Workload]
) -> list[list[Prompt]]:
    """For each artifact a prompt for each workload, the shorter ones the beginning of the longest.

    Each model's own tokenizer cuts the text; equal tokenizers give equal prompts. A model without
    one takes the tokens of the first that has one.
    """
    longest = max(work.input_tokens for work in workloads)
    source = _source_name(corpus)
    rows: list[tuple[int, ...] | None] = []
    reason = ""
    for artifact in artifacts:
        try:
            encode = _codec(artifact).encode
        except ShortstackError as error:
            rows.append(None)
            reason = str(error)
            continue
        rows.append(tuple(token_windows(corpus.test, encode, longest, 1)[0]))
    first = next((row for row in rows if row is not None), None)
    if first is None:
        raise ShortstackError(reason)
    return [
        [Prompt((row or first)[: work.input_tokens], source) for work in workloads] for row in rows
    ]


def _codec(artifact: Artifact) -> Codec:
    if artifact.format == "gguf":
        from shortstack.evaluate.gguf_codec import GgufCodec

        return GgufCodec(artifact.path)
    if artifact.format == "packed":
        return packed_codec(artifact.path)
    folder, depth = split_depth(artifact.path)
    return FolderCodec(artifact.path if depth is None else read_exits(folder).base)


def _source_name(corpus: Corpus) -> str:
    """Names, not paths: a record tells nobody how a disk is arranged."""
    return f"{' '.join(Path(part).name for part in corpus.source.split())}, test part"
