"""Text for healing: the user's and general text mixed at a share, packed into token windows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shortstack.errors import ShortstackError
from shortstack.prune.heal.settings import HealSettings
from shortstack.text import PARTS, Corpus, open_corpus
from shortstack.tokens import Encoder

SPLITS = {"calibration": "train", "selection": "validation", "test": "test"}


@dataclass(frozen=True)
class Documents:
    """What healing may learn from, what it is chosen on and what it must not see; no document is
    in two of them."""

    train: tuple[str, ...]
    selection: tuple[str, ...]
    test: tuple[str, ...]


def read_documents(sources: Sequence[str]) -> Documents:
    """Read and join texts: files as `open_corpus` splits them, or folders with train, validation
    and test files. Raises ShortstackError where a part of one holds a document of another's."""
    corpora = [_open(source) for source in sources]
    parts = {
        part: tuple(document for corpus in corpora for document in corpus.part(part))
        for part in PARTS
    }
    for first, second in itertools.combinations(PARTS, 2):
        shared = set(parts[first]) & set(parts[second])
        if shared:
            raise ShortstackError(
                f"{' and '.join(sources)} share {len(shared)} documents between {first} and "
                f"{second} text. Remove them from one file."
            )
    return Documents(parts["calibration"], parts["selection"], parts["test"])


def healing_windows(
    own: Documents,
    general: Documents | None,
    encoder: Encoder,
    settings: HealSettings,
    *,
    share: float,
    selection_windows: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to train on, `share` of them general, and those to choose the best state on: half
    of them general, where that text has a selection part.

    Raises ShortstackError for a text without a single window, and for a document that is to be
    learnt from in one text and is chosen or reported on in the other.
    """

    def cut(documents: Sequence[str], what: str) -> list[list[int]]:
        inner = settings.window_tokens - len(encoder.prefix)
        windows = packed_windows(documents, encoder.encode, inner)
        if not windows:
            raise ShortstackError(
                f"the {what} text holds no {settings.window_tokens} tokens. Give more text or ask "
                "for shorter windows."
            )
        return [[*encoder.prefix, *window] for window in windows]

    if general is not None:
        _check_disjoint(own, general)
    train, selection = cut(own.train, "training"), cut(own.selection, "selection")
    if general is None:
        return train, selection[:selection_windows]
    wanted = settings.steps * settings.batch_windows
    other = cut(general.train, "general training")
    train = mix(drawn(train, settings.seed), drawn(other, settings.seed), share, wanted)
    if not general.selection:
        return train, selection[:selection_windows]
    half = max(1, selection_windows // 2)
    return train, [*selection[:half], *cut(general.selection, "general selection")[:half]]


def drawn(windows: Sequence[list[int]], seed: int) -> list[list[int]]:
    """All windows in the order that a seed draws them: those that a budget leaves out are not
    always the last of the text."""
    return random.Random(seed).sample(windows, len(windows))


def _check_disjoint(own: Documents, general: Documents) -> None:
    shared = set(own.train) & {*general.selection, *general.test}
    shared |= set(general.train) & {*own.selection, *own.test}
    shared |= set(own.selection) & set(general.test) | set(general.selection) & set(own.test)
    if shared:
        raise ShortstackError(
            f"your text and the general text share {len(shared)} documents between training, "
            "selection and test: a leak. Remove them from one file."
        )


def packed_windows(
    documents: Sequence[str], encode: Callable[[str], list[int]], length: int
) -> list[list[int]]:
    """All windows of `length` tokens: long documents are cut by themselves, what is left of them
    and short ones are joined with a blank line between. An incomplete last window is dropped."""
    windows: list[list[int]] = []
    rest: list[int] = []
    blank = encode("\n\n")
    for document in documents:
        ids = encode(document)
        whole = len(ids) // length * length
        windows += [ids[at : at + length] for at in range(0, whole, length)]
        rest += [*ids[whole:], *blank]
    windows += [rest[at : at + length] for at in range(0, len(rest) - length + 1, length)]
    return windows


def mix(
    own: Sequence[list[int]], general: Sequence[list[int]], share: float, wanted: int
) -> list[list[int]]:
    """At most `wanted` windows, `share` of them general: one pass over both texts, in which the
    one that is short for its share is repeated."""
    if not general or share == 0:
        return list(own[:wanted])
    if not own or share == 1:
        return list(general[:wanted])
    count = min(wanted, round(max(len(own) / (1 - share), len(general) / share)))
    n_general = min(count - 1, max(1, round(count * share)))
    return [
        *itertools.islice(itertools.cycle(own), count - n_general),
        *itertools.islice(itertools.cycle(general), n_general),
    ]


def _open(source: str) -> Corpus:
    folder = Path(source)
    if not folder.is_dir():
        return open_corpus(source)
    found = {part: _split(folder, split) for part, split in SPLITS.items()}
    files = {part: str(file) for part, file in found.items() if file is not None}
    if len(files) == len(SPLITS):
        return open_corpus(files)
    for part in ("calibration", "selection"):
        if part in files:
            return open_corpus(files[part])
    raise ShortstackError(
        f"{folder} holds no train.jsonl and no validation.jsonl. Name a text file instead."
    )


def _split(folder: Path, split: str) -> Path | None:
    names = (f"{split}{ending}" for ending in (".jsonl", ".jsonl.gz", ".txt"))
    return next((folder / name for name in names if (folder / name).is_file()), None)
