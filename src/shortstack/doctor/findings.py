"""What the doctor says of one thing it looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. A `problem` stops work, a `warning` limits it."""

    name: str
    status: Status
    fact: str
    next_step: str = ""

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing is a problem; warnings do not count."""
    return all(finding.status != "problem" for finding in findings)
