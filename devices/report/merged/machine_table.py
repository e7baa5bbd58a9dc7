"""The table of machines: what each is, as far as its records say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shortstack.devices.report.charts import number
from shortstack.devices.report.merged.machines import Machine, amount, part
from shortstack.devices.report.view import NONE, Table


def machine_table(machines: Iterable[Machine]) -> Table:
    rows = tuple(
        (
            machine.name,
            _cpu(machine),
            _ram(machine),
            "; ".join(_gpu(id_, facts) for id_, facts in machine.gpus) or NONE,
            _every(machine, _system),
            _every(machine, _boxed),
            "; ".join(_ceiling(id_, facts) for id_, facts in machine.ceilings.items()) or NONE,
            ", ".join(map(str, machine.runs)),
        )
        for machine in machines
    )
    columns = (
        *("Machine", "CPU", "RAM, GB", "Accelerators", "System", "Runs inside"),
        *("Measured ceilings", "Runs"),
    )
    return Table("The machines", columns, rows, 8)


def _cpu(machine: Machine) -> str:
    cpu = part(machine.hosts[0], "cpu")
    words = [str(cpu.get("model") or "unknown")]
    for name, what in (("physical_cores", "cores"), ("logical_cores", "threads")):
        words += [f"{cpu[name]} {what}"] if cpu.get(name) else []
    isa = cpu.get("isa")
    words += [" ".join(map(str, isa))] if isinstance(isa, list) and isa else []
    return ", ".join(words)


def _ram(machine: Machine) -> str:
    host = machine.hosts[0]
    ram, limit = amount(host.get("ram_bytes")), amount(part(host, "cgroup").get("memory_bytes"))
    if ram is None:
        return NONE
    words = number(ram / 1e9)
    if limit is None or limit >= ram:
        return words
    return f"{words}, {number(limit / 1e9)} of it allowed"


def _gpu(id_: str, facts: Mapping[str, Any]) -> str:
    words = [f"{id_}: {facts.get('name') or 'unknown'}"]
    if (vram := amount(facts.get("vram_bytes"))) is not None:
        words.append(f"{number(vram / 1e9)} GB")
    if (limit := amount(facts.get("power_limit_w"))) is not None:
        words.append(f"{number(limit)} W")
    words += [f"driver {facts['driver']}"] if facts.get("driver") else []
    return ", ".join(words)


def _ceiling(id_: str, facts: Mapping[str, Any]) -> str:
    words = []
    if (read := amount(facts.get("read_bytes_per_s"))) is not None:
        words.append(f"reads {number(read / 1e9)} GB/s")
    flops = facts.get("matmul_flops_per_s")
    for kind, found in flops.items() if isinstance(flops, Mapping) else ():
        if (value := amount(found)) is not None:
            words.append(f"{kind} {number(value / 1e12)} TFLOP/s")
    return f"{id_}: {', '.join(words) or 'none'}"


def _system(host: Mapping[str, Any]) -> str:
    return ", ".join(str(host[name]) for name in ("os", "kernel") if host.get(name))


def _boxed(host: Mapping[str, Any]) -> str:
    container = host.get("container")
    words = [f"{container} container"] if container else []
    words += ["virtual machine"] if host.get("hypervisor") else []
    return ", ".join(words)


def _every(machine: Machine, say: Any) -> str:
    """What all of its records say, each wording once."""
    return "; ".join(dict.fromkeys(filter(None, map(say, machine.hosts)))) or NONE
