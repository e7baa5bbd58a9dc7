"""The options of the GGUF export, checked against the model's tensors before anything is written.

`head` and `embedding` name a tensor type for the output matrix and the token table; `tensors`
names types for any others, `imatrix` says whether quantizing weighs channels by their use.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import NoReturn

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, unknown
from shortstack.export.gguf_mix import Choice, Wish, choose_types, is_matrix, requires_importance
from shortstack.export.gguf_types import FALLBACK, PRECISIONS, TYPES, WITHOUT_FALLBACK

OPTIONS = ("head", "embedding", "tensors", "imatrix")
SWITCH = {"yes": True, "no": False}

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor in the GGUF file -> its shape, row length last."""


def check_options(checkpoint: Checkpoint, spec: ExportSpec, shapes: Shapes) -> None:
    """Raise ShortstackError for an option that is unknown or that the tensors do not allow."""
    for option in dict(spec.options):
        if option not in OPTIONS:
            raise unknown("option of the gguf export", option, OPTIONS)
    if spec.option("imatrix", "no") not in SWITCH:
        raise unknown("value of the option imatrix", str(spec.option("imatrix")), SWITCH)
    head, embedding = spec.option("head"), spec.option("embedding")
    for option, kind in (("head", head), ("embedding", embedding)):
        if kind is not None:
            _check_type(option, kind, {option: (checkpoint.dims["d"],)})
    if checkpoint.tied and head and embedding and head != embedding:
        raise ShortstackError(
            f"head {head} and embedding {embedding} differ, but this model's head is its "
            "embedding: one table, one type. Give only one of them."
        )
    chosen = types_of(checkpoint, spec, shapes)
    if spec.option("imatrix") == "yes" and not any(
        TYPES[c.type].block > 1 for c in chosen.values()
    ):
        raise ShortstackError(
            f"imatrix=yes does nothing for {spec.precision}: no tensor is quantized. Leave it out."
        )
    _check_misfits(spec, chosen, shapes)
    if spec.option("imatrix") == "no":
        refuse_without_importance(spec, chosen)


def overrides(spec: ExportSpec, shapes: Shapes) -> dict[str, str]:
    """Tensor -> type, from `tensors=PATTERN=TYPE,...`; the first pattern that matches counts.

    A pattern is a glob over the name without `.weight` (`blk.0.*`), or a tensor's last name, which
    then is meant in every layer (`ffn_down`). Only matrices can be named: llama.cpp keeps vectors
    in F32. Raises ShortstackError for a pattern that decides nothing and a type that does not fit.
    """
    text = spec.option("tensors")
    matrices = {name: shape for name, shape in shapes.items() if is_matrix(name, shape)}
    chosen: dict[str, str] = {}
    for part in text.split(",") if text else ():
        pattern, equals, kind = part.strip().partition("=")
        if not (pattern and equals and kind):
            raise ShortstackError(
                f"tensors: {part.strip()!r} is not PATTERN=TYPE, e.g. tensors=ffn_down=Q8_0,"
                "blk.0.*=F16"
            )
        matched = [name for name in matrices if _matches(pattern, name)]
        decided = {name: matrices[name] for name in matched if name not in chosen}
        if not decided:
            _refuse_pattern(pattern, bool(matched), matrices)
        _check_type(f"tensors: {pattern}", kind, decided)
        chosen.update(dict.fromkeys(decided, kind))
    return chosen


def types_of(checkpoint: Checkpoint, spec: ExportSpec, shapes: Shapes) -> dict[str, Choice]:
    """The types that libllama will give the file's matrices."""
    wish = _wish(checkpoint, spec, shapes, importance=spec.option("imatrix") == "yes")
    chosen = choose_types(shapes, wish)
    if wish.importance or not requires_importance(chosen, spec.precision):
        return chosen
    return choose_types(shapes, _wish(checkpoint, spec, shapes, importance=True))


def wants_importance(checkpoint: Checkpoint, spec: ExportSpec, shapes: Shapes) -> bool:
    """Whether an importance matrix is made: asked for, or libllama would refuse without."""
    if spec.option("imatrix") is not None:
        return SWITCH[str(spec.option("imatrix"))]
    chosen = choose_types(shapes, _wish(checkpoint, spec, shapes, importance=False))
    return bool(requires_importance(chosen, spec.precision))


def refuse_without_importance(spec: ExportSpec, chosen: Mapping[str, Choice]) -> None:
    """Raise ShortstackError if libllama would not write these types without importance."""
    needing = requires_importance(chosen, spec.precision)
    if needing:
        raise ShortstackError(
            f"{spec.precision} gives {needing[0]} the type {chosen[needing[0]].type}, which needs "
            f"an importance matrix ({len(needing)} such tensors). Leave out imatrix=no, and give "
            "text to compute it on."
        )


def refuse_without_text(spec: ExportSpec, chosen: Mapping[str, Choice]) -> NoReturn:
    """Raise ShortstackError: an importance matrix is wanted and there is no text for it."""
    needing = requires_importance(chosen, spec.precision)
    why = f"{chosen[needing[0]].type} needs one" if needing else "imatrix=yes asks for one"
    raise ShortstackError(
        f"{spec.precision}: no calibration text to compute an importance matrix on, and {why}. "
        "Give calibration windows, or choose another precision."
    )


def _wish(checkpoint: Checkpoint, spec: ExportSpec, shapes: Shapes, *, importance: bool) -> Wish:
    sizes = checkpoint.dims
    head, embedding = spec.option("head"), spec.option("embedding")
    if checkpoint.tied:  # one table: llama.cpp knows it as the embedding
        head = embedding = head or embedding
    grouped = sizes["heads"] != sizes["kv_heads"]
    return Wish(
        spec.precision,
        groups=sizes["heads"] // sizes["kv_heads"],
        n_layers=checkpoint.n_layers,
        large_llama=checkpoint.family.gguf_arch == "llama"
        and checkpoint.n_layers == 80
        and grouped,
        head=head,
        embedding=embedding,
        overrides=overrides(spec, shapes),
        importance=importance,
    )


def _matches(pattern: str, name: str) -> bool:
    stem = name.removesuffix(".weight")
    return fnmatch.fnmatchcase(stem, pattern) or stem.rpartition(".")[2] == pattern


def _refuse_pattern(pattern: str, taken: bool, matrices: Shapes) -> NoReturn:
    if taken:
        raise ShortstackError(
            f"tensors: {pattern} decides nothing: earlier patterns took all that it matches. "
            "Put it before them, or leave it out."
        )
    known = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in matrices})
    raise ShortstackError(
        f"tensors: {pattern} matches no matrix of this model. Name one of {', '.join(known)}, or "
        "a glob such as blk.0.*"
    )


def _check_type(option: str, kind: str, decided: Shapes) -> None:
    if kind not in TYPES:
        raise unknown(f"GGUF type for {option}", kind, TYPES)
    block = TYPES[kind].block
    for name, shape in decided.items():
        width = shape[-1]
        if width % block:
            fits = [other for other, facts in TYPES.items() if width % facts.block == 0]
            whose = "this model's" if name == option else f"{name}'s"
            raise ShortstackError(
                f"{option}: {kind} needs rows that are multiples of {block}, {whose} have "
                f"{width}. Choose one of: {', '.join(fits)}."
            )


def _check_misfits(spec: ExportSpec, chosen: Mapping[str, Choice], shapes: Shapes) -> None:
    """Types without a fallback stop libllama in mid-file: refuse them before."""
    for name, choice in chosen.items():
        width, block = shapes[name][-1], TYPES[choice.wanted].block
        if choice.wanted in WITHOUT_FALLBACK and width % block and choice.type != "Q8_0":
            fits = [
                other
                for other, facts in PRECISIONS.items()
                if width % TYPES[facts.body].block == 0 or facts.body in FALLBACK
            ]
            raise ShortstackError(
                f"{spec.precision} needs rows that are multiples of {block}, {name}'s have "
                f"{width}, and llama.cpp has no other type for them. Choose one of: "
                f"{', '.join(fits)}."
            )
