"""What is measured and in which order: rounds, shuffled groups, members taking turns to lead."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shortstack.artifact import Artifact
from shortstack.devices.workload import Prompt, Workload

Kind = Literal["memory", "timing", "energy"]
ORDER = (
    "memory trials first (they leave the files in the page cache), then timed rounds; within a "
    "round original and pruned of one export follow each other, who goes first alternates"
)


@dataclass(frozen=True)
class Case:
    """One thing to measure: an artifact in a runtime on a device. `label`: original, pruned.

    `workload` and `prompt`: those of the campaign, where they are not given.
    """

    label: str
    artifact: Artifact
    runtime: str
    device: str = "cpu"
    options: tuple[tuple[str, str], ...] = ()
    """The runtime's own, as its capability lists them."""
    device_info: Mapping[str, Any] = field(default_factory=dict)
    workload: Workload | None = None
    prompt: Prompt | None = None

    @property
    def group(self) -> tuple[str, ...]:
        """Cases of one group are compared, so they run next to each other."""
        work = self.workload
        counts = (work.prompt_tokens, work.depth_tokens, work.batch) if work else ()
        options = (f"{name}={value}" for name, value in self.options)
        return (self.artifact.spec.slug, self.runtime, self.device, *options, *map(str, counts))


@dataclass(frozen=True)
class Step:
    """One trial to run: `case` counts in the order that the cases were given."""

    kind: Kind
    round: int
    case: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.kind, self.round, self.case


def schedule(
    cases: Sequence[Case],
    workload: Workload,
    seed: int,
    energy: Sequence[int] = (),
    *,
    cold: bool = False,
) -> list[Step]:
    """The order of all trials: groups shuffled anew each round, members taking turns to lead.

    `energy`: the cases that have a trial for their energy, behind all others. `cold`: every second
    timed round loads from the disk, so the lead is kept for two rounds: it alternates among the
    warm and among the cold ones.
    """
    rng = random.Random(seed)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(case.group, []).append(index)
    first = {key: rng.randrange(len(members)) for key, members in groups.items()}
    rounds: list[tuple[Kind, int]] = [
        *(("memory", r) for r in range(workload.memory_repeats)),
        *(("timing", r) for r in range(workload.repeats)),
    ]
    steps = []
    for kind, number in rounds:
        keys = list(groups)
        rng.shuffle(keys)
        for key in keys:
            members = groups[key]
            lead = number // 2 if cold and kind == "timing" else number
            turn = (first[key] + lead) % len(members)
            steps += [Step(kind, number, i) for i in members[turn:] + members[:turn]]
    return steps + [Step("energy", 0, index) for index in energy]
