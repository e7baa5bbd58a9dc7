"""Enough of JSON Schema 2020-12 to hold a record against ours; unknown keywords are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
SAYING = {"$schema", "$id", "$defs", "title", "description", "default"}
CHECKED = {
    *("$ref", "type", "const", "pattern", "minimum", "maximum", "minItems", "items", "required"),
    *("properties", "additionalProperties", "anyOf"),
}


def errors(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    """Every fault, with its place."""
    return list(_errors(value, schema, root, at))


def _errors(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    assert set(schema) <= SAYING | CHECKED, f"{at}: unknown keyword in {sorted(schema)}"
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        yield from _errors(value, root["$defs"][name], root, at)
    if "anyOf" in schema and all(errors(value, s, root, at) for s in schema["anyOf"]):
        yield f"{at}: none of anyOf"
    if "type" in schema and not _is(value, schema["type"]):
        yield f"{at}: is no {schema['type']}"
        return
    yield from _scalar(value, schema, at)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at}: too short"
        for index, item in enumerate(value):
            yield from _errors(item, schema.get("items", {}), root, f"{at}[{index}]")
    if isinstance(value, dict):
        yield from _object(value, schema, root, at)


def _object(
    value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], at: str
) -> Iterator[str]:
    yield from (f"{at}: lacks {name}" for name in schema.get("required", ()) if name not in value)
    known = schema.get("properties", {})
    for name, item in value.items():
        part = known.get(name, schema.get("additionalProperties", {}))
        yield from _errors(item, part, root, f"{at}.{name}")


def _scalar(value: Any, schema: dict[str, Any], at: str) -> Iterator[str]:
    if "const" in schema and value != schema["const"]:
        yield f"{at}: is not {schema['const']!r}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: does not match"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            yield f"{at}: below the minimum"
        if value > schema.get("maximum", value):
            yield f"{at}: above the maximum"


def _is(value: Any, wanted: str | list[str]) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, TYPES[name]) for name in names)
