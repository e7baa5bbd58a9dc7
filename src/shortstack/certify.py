"""Prove an artifact: its real runtime against float32 PyTorch, prefill and cached decoding.

Each side runs in its own process, so that neither's memory or crash is ours, and the reference
model is gone before the artifact is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack import child
from shortstack.artifact import Artifact
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, VerificationError, require
from shortstack.progress import OnProgress, silent
from shortstack.verification import EXACT, Bounds, Verification

if TYPE_CHECKING:
    from shortstack.session import Session

TIMEOUT_S = 4 * 3600.0
TEXT_CHARS = 50_000
REPORT_EVERY = 16

PROBES = (
    "Hello world",
    "I'll say 1234567 don't, 3.14 or 1/2; it's 10:45",
    "two  spaces, a\ttab\n\nand lines\r\n   indented   ",
    "Grüße, naïve café — “quotes” … ½ €",
    "你好，世界。こんにちは Привет мир",
    "def f(x):\n    return x**2  # 🙂👍🏽\n",
)
"""Texts on which tokenizers that look alike differ."""


@dataclass(frozen=True)
class ReferenceFacts:
    """The float32 log-probabilities of a checkpoint on some windows, kept in a file."""

    path: Path
    checkpoint: Path
    n_windows: int
    length: int
    vocab_size: int
    perplexity: float

    @property
    def n_bytes(self) -> int:
        return self.path.stat().st_size


def require_pytorch() -> None:
    """Raise MissingExtraError if the reference could not be run."""
    require(("torch", "transformers", "tokenizers"), "prune", "proving an artifact")


def make_reference(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    out: Path,
    *,
    threads: int,
    progress: OnProgress = silent,
    timeout_s: float = TIMEOUT_S,
) -> ReferenceFacts:
    """Write log-probabilities of every position of every window to `out` (.npy).

    One full forward pass a window, no cache: nothing that an artifact could share an error with.
    The file takes windows x length x vocabulary x 4 bytes; the caller removes it.
    """
    _check_windows(windows)
    request = {
        "checkpoint": str(checkpoint.path),
        "windows": [list(window) for window in windows],
        "out": str(out),
        "threads": threads,
    }
    answer = child.call(
        "shortstack.certify:reference_here",
        request,
        timeout_s=timeout_s,
        what=f"running {checkpoint.path.name} in PyTorch",
        progress=progress,
    )
    return ReferenceFacts(path=out, checkpoint=checkpoint.path, **answer)


def certify(
    artifact: Artifact,
    windows: Sequence[Sequence[int]],
    reference: ReferenceFacts,
    bounds: Bounds,
    *,
    threads: int,
    runtime: str | None = None,
    prefill_tokens: int | None = None,
    text: str = "",
    progress: OnProgress = silent,
    timeout_s: float = TIMEOUT_S,
) -> Verification:
    """Run `artifact` over the windows of `reference` and hold it to `bounds`.

    Of each window the first `prefill_tokens` (default: half) are run at once, the others one by
    one through the cache. `text` is cut into tokens by the runtime and by tokenizer.json, too.
    Raises VerificationError, with the figures, if a bound is broken; the caller removes the file.
    """
    verification = verify(
        artifact,
        windows,
        reference,
        threads=threads,
        runtime=runtime,
        prefill_tokens=prefill_tokens,
        text=text,
        progress=progress,
        timeout_s=timeout_s,
    )
    failures = verification.failures(bounds)
    if failures:
        raise VerificationError(_complaint(artifact, verification, failures))
    return verification


def verify(
    artifact: Artifact,
    windows: Sequence[Sequence[int]],
    reference: ReferenceFacts,
    *,
    threads: int,
    runtime: str | None = None,
    prefill_tokens: int | None = None,
    text: str = "",
    progress: OnProgress = silent,
    timeout_s: float = TIMEOUT_S,
) -> Verification:
    """The measuring half of `certify`: figures, no bounds."""
    from shortstack.packed.runnable import runnable
    from shortstack.runtimes import runtimes_for

    if (len(windows), len(windows[0])) != (reference.n_windows, reference.length):
        raise ShortstackError(
            f"{reference.path} holds {reference.n_windows} windows of {reference.length} tokens, "
            f"not {len(windows)} of {len(windows[0])}. Make the reference again."
        )
    with runnable(artifact) as (path, fmt):
        chosen = runtime or runtimes_for(fmt)[0]
        request = {
            "artifact": str(path),
            "runtime": chosen,
            "windows": [list(window) for window in windows],
            "prefill_tokens": prefill_tokens or reference.length // 2,
            "reference": str(reference.path),
            "tokenizer": str(reference.checkpoint / "tokenizer.json"),
            "text": text[:TEXT_CHARS],
            "threads": threads,
        }
        answer = child.call(
            "shortstack.certify:verify_here",
            request,
            timeout_s=timeout_s,
            what=f"running {artifact.path.name} in {chosen}",
            progress=progress,
        )
    return Verification.from_dict(answer)


def _complaint(artifact: Artifact, found: Verification, failures: Sequence[str]) -> str:
    figures = (
        f"mean KL {found.kl:.2g}, top-1 {found.top1:.1%}, perplexity {found.perplexity:.2f} "
        f"against {found.reference_perplexity:.2f}, {found.n_tokens} tokens"
    )
    if artifact.spec.precision in EXACT:
        advice = "The export or the runtime is wrong here: shortstack doctor tells what works."
    else:
        advice = "Choose a finer precision or head, or loosen the gate in the recipe."
    name = artifact.path.name if artifact.path.is_file() else f"{artifact.spec.slug}/model.onnx"
    return (
        f"{name} in {found.runtime} differs from its checkpoint: "
        f"{'; '.join(failures)} ({figures}). It is not kept. {advice}"
    )


def _check_windows(windows: Sequence[Sequence[int]]) -> None:
    if not windows or len({len(window) for window in windows}) != 1 or len(windows[0]) < 4:
        raise ShortstackError(
            "a check needs windows of equal length, 4 tokens at least. Give longer text."
        )


def reference_here(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: full forward passes, log-probabilities streamed to the file."""
    import numpy as np

    from shortstack.disk import disk_errors
    from shortstack.export.verify import Tally, log_softmax
    from shortstack.runtimes import open_session

    windows, out = request["windows"], Path(request["out"])
    path, length = Path(request["checkpoint"]), len(windows[0])
    tally = Tally()
    with (
        open_session(path, "pytorch", threads=request["threads"], context_tokens=length) as session,
        disk_errors(out),
        out.open("wb") as file,
    ):
        shape = (len(windows), length, session.vocab_size)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for done, window in enumerate(windows, 1):
            log_probs = log_softmax(session.prefill(window, all_logits=True))
            if np.isnan(log_probs).any():
                raise ShortstackError(
                    f"{path} computes no numbers (NaN) in float32 PyTorch: nothing can be proven "
                    "against it. Look at its weights, and at the layers merged or replaced."
                )
            # not through a memory map: on a full disk that is a SIGBUS, this is an error
            file.write(log_probs.data)
            tally.add(log_probs, log_probs, np.array(window[1:]))
            child.report_progress(done, len(windows))
    return {
        "n_windows": shape[0],
        "length": shape[1],
        "vocab_size": shape[2],
        "perplexity": tally.perplexity,
    }


def verify_here(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: open the artifact, run the windows, compare."""
    import numpy as np

    from shortstack.runtimes import open_session

    windows, length = request["windows"], len(request["windows"][0])
    reference = np.load(request["reference"], mmap_mode="r")
    with open_session(
        Path(request["artifact"]),
        request["runtime"],
        threads=request["threads"],
        context_tokens=length,
    ) as session:
        if session.vocab_size != reference.shape[-1]:
            raise VerificationError(
                f"{request['artifact']} has {session.vocab_size} tokens, its checkpoint "
                f"{reference.shape[-1]}. Export it again."
            )
        figures = compare(session, windows, reference, request["prefill_tokens"])
        same_tokens = tokenizer_equal(session, Path(request["tokenizer"]), request["text"])
        info = session.info
    return Verification(
        runtime=info["runtime"],
        runtime_version=info["version"],
        n_windows=len(windows),
        prefill_tokens=request["prefill_tokens"],
        tokenizer_equal=same_tokens,
        **figures,
    ).to_dict()


def compare(
    session: Session, windows: Sequence[Sequence[int]], reference: Any, prefill_tokens: int
) -> dict[str, Any]:
    """Teacher-forced: each window prefilled in part, then decoded token by token.

    `reference` is an array (windows, length, vocabulary) of log-probabilities.
    """
    import numpy as np

    from shortstack.export.verify import Tally, log_softmax

    prefill, decode, expected, expected_decode = Tally(), Tally(), Tally(), Tally()
    steps = len(windows[0]) - prefill_tokens
    for index, (window, truth) in enumerate(zip(windows, reference, strict=True)):
        targets = np.array(window[1:])
        candidate = log_softmax(session.prefill(window[:prefill_tokens], all_logits=True))
        head = truth[:prefill_tokens]
        prefill.add(head, candidate, targets[:prefill_tokens])
        expected.add(head, head, targets[:prefill_tokens])
        for step, token in enumerate(window[prefill_tokens:]):
            at = prefill_tokens + step
            row = log_softmax(session.decode(token)[None])
            decode.add(truth[at : at + 1], row, targets[at : at + 1])
            expected_decode.add(truth[at : at + 1], truth[at : at + 1], targets[at : at + 1])
            if step % REPORT_EVERY == 0 or step + 1 == steps:
                child.report_progress(index * steps + step + 1, len(windows) * steps)
    both = prefill + decode
    return {
        "n_tokens": both.n,
        "kl": both.mean_kl,
        "kl_prefill": prefill.mean_kl,
        "kl_decode": decode.mean_kl,
        "max_kl": both.max_kl,
        "top1": both.top1,
        "top1_prefill": prefill.top1,
        "top1_decode": decode.top1,
        "max_error": both.max_error,
        "perplexity": both.perplexity,
        "reference_perplexity": (expected + expected_decode).perplexity,
        "perplexity_decode": decode.perplexity,
        "reference_perplexity_decode": expected_decode.perplexity,
    }


def tokenizer_equal(session: Session, file: Path, text: str) -> bool | None:
    """Whether the session cuts `text`, the probes and every special token as tokenizer.json does.

    None where the session has no tokenizer of its own or there is no tokenizer.json.
    """
    if session.tokenize("x") is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", ())
    specials = [token["content"] for token in added if token["special"]]
    return all(
        session.tokenize(sample) == tokenizer.encode(sample, add_special_tokens=False).ids
        for sample in (text, *PROBES, *specials)
        if sample
    )
