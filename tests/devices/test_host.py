"""Facts about this machine, and none about who owns it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from pathlib import Path

import pytest

from shortstack.devices import host


def test_the_description_is_json_and_names_nobody() -> None:
    facts = host.describe()
    text = json.dumps(facts)
    assert facts["cpu"]["logical_cores"] >= facts["cpu"]["usable_cores"] >= 1
    assert facts["ram_bytes"] > 100_000_000
    assert facts["libraries"]["numpy"]
    assert facts["devices"][0]["id"] == "cpu"
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    node = platform.node()
    assert len(node) < 4 or node not in text
    user = getpass.getuser()
    assert len(user) < 5 or user not in text


def test_conditions_are_read_now() -> None:
    now = host.conditions()
    assert now["available_ram_bytes"] > 0
    assert set(now) == {"load_average_1min", "cpu_mhz", "available_ram_bytes"}


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is set through Linux calls")
def test_usable_cores_follow_affinity() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert host.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1073741824"}, 1.5, 1 << 30),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ({}, None, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "200000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            2.0,
            None,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
    ],
)
def test_container_limits_are_read_in_both_dialects(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    cores: float | None,
    memory: int | None,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    limits = host.describe()["cgroup"]
    assert limits == {"cpu_cores": cores, "memory_bytes": memory}
