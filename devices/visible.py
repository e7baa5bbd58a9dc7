"""Characters that nobody sees but a terminal, a browser or a table obeys: written out."""

from __future__ import annotations

import re
from typing import Any

UNSEEN = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # controls, but tab and new line
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # direction of text
    "\u2028\u2029]"  # new lines that are none in JSON or CSV
)


def visible(value: Any) -> Any:
    r"""`value` with the control characters of all its texts, keys included, as `\x1b`, `\u202e`.

    Not dropped or replaced by one sign: two labels that differ in such a character alone would
    then be one label.
    """
    if isinstance(value, str):
        return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), value)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    return value
