"""Rotation as both majors of transformers spell it, so that either opens the folder right.

transformers 5 reads `rope_parameters`, and the older fields where it is absent. transformers 4.57
reads the older fields only: without them it rotates by its defaults and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.families.fields import FULL, SLIDING, Config, family_of, rope_parameters
from shortstack.families.table import FAMILIES

THETA, PART, TRAINED = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"


def both_spellings(config: Config, *, strict: bool = False) -> dict[str, Any]:
    """Add the older fields to a config that has only `rope_parameters`.

    A rotation that the older fields cannot express is left alone; `strict` refuses it.
    """
    nested = family_of(config).nested
    if nested is None:
        return {**config, **_older(config, strict=strict)}
    level = config[nested]
    return {**config, nested: {**level, **_older(level, strict=strict)}}


def _older(level: Config, *, strict: bool) -> dict[str, Any]:
    given = level.get("rope_parameters")
    if not isinstance(given, Mapping):
        if strict and given is not None:
            rope_parameters(level)  # says what is wrong with it
        return {}
    whole = given.get(FULL) or ({} if SLIDING in given else given)
    local = given.get(SLIDING) or whole
    made = _fields(whole, str(level.get("model_type")))
    family = FAMILIES.get(str(level.get("model_type")))
    own = family.local_theta if family is not None else None
    if own is not None and THETA in local:
        made.setdefault(own, local[THETA])
    scaled = own is not None and _scaling(local, "") is not None
    if not scaled and (local == whole or (own is not None and made.get(own) == local.get(THETA))):
        return made
    if not strict:
        return {}
    raise ShortstackError(
        f"transformers 4 cannot give the sliding layers a rotation of their own ({local!r}; the "
        f"others have {whole!r}). Use transformers 5: pip install 'shortstack[prune,onnx]'."
    )


def _fields(given: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The older fields of one set of `rope_parameters`."""
    made = {name: given[name] for name in (THETA, PART) if name in given}
    if TRAINED in given and given.get("rope_type") == "longrope" and model_type != "phi3":
        made[TRAINED] = given[TRAINED]  # Phi-3 has the field beside them in both spellings
    return {**made, "rope_scaling": _scaling(given, model_type)}


def _scaling(given: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return None
    if model_type == "phi3":  # its older class wants these three fields and no other
        return {"type": kind, **{n: given.get(n) for n in ("short_factor", "long_factor")}}
    rest = {name: value for name, value in given.items() if name not in (THETA, PART, "type")}
    return {**rest, "rope_type": kind}
