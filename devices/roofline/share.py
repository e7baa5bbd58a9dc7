"""Shares of the roofline: how much of what the device allows a run reached (docs/roofline.md).

Records come as the dicts that `bench.json` holds. Nothing is clamped: a share above 1 is shown
with what it may mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shortstack.devices.fit import QUANTIZED_BYTES
from shortstack.devices.flags import BUSY_SHARE
from shortstack.devices.stats import Interval, median_interval

Record = Mapping[str, Any]

COMPUTED_IN = {
    ("cpu", "llama.cpp", "quantized"): "int8",
    ("cpu", "onnxruntime", "quantized"): "int8",
    ("cpu", "onnxruntime-genai", "quantized"): "int8",
    ("gpu", "llama.cpp", "quantized"): "int8",
    ("gpu", "llama.cpp", "bfloat16"): "bfloat16",
    ("gpu", "llama.cpp", "float16"): "float16",
    ("gpu", "onnxruntime", "float16"): "float16",
    ("gpu", "onnxruntime", "quantized"): "float16",
    ("gpu", "onnxruntime-genai", "float16"): "float16",
    ("gpu", "onnxruntime-genai", "quantized"): "float16",
    ("gpu", "pytorch", "float16"): "float16",
    ("gpu", "pytorch", "bfloat16"): "bfloat16",
    ("cpu", "pytorch", "bfloat16"): "bfloat16",
    ("cpu", "pytorch", "bnb-int8"): "int8",
    ("gpu", "pytorch", "bnb-int8"): "int8",
    ("gpu", "pytorch", "torchao-int4"): "bfloat16",
    ("gpu", "pytorch", "awq-int4"): "float16",
}
"""Device kind, runtime, weights -> the type that its matrix products multiply in. llama.cpp brings
activations to 8 bits where weights are quantized, on CPUs and on cards; onnxruntime does on CPUs
(accuracy level 4), on cards it turns such weights into float16. bitsandbytes' NF4 becomes the
session's own type (its option `dtype`). All else: float32."""
HEAD_OF_EVERY_TOKEN = ("onnxruntime", "onnxruntime-genai")
"""Runtimes whose graphs give logits of the whole prompt; the others compute the head for its last
token (llama.cpp: the one whose logits are asked for; pytorch: logits_to_keep=1)."""
FLOATS = {
    **dict.fromkeys(("f32", "fp32", "float32"), "float32"),
    **dict.fromkeys(("f16", "fp16", "float16"), "float16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
}


@dataclass(frozen=True)
class Share:
    """`share` of `ceiling_per_s` that `achieved_per_s` is. None with the `reason`."""

    share: Interval | None
    achieved_per_s: Interval | None
    ceiling_per_s: float | None
    unit: str
    """`bytes` for decode, else the operations' type: `int8`, `float32`, ..."""
    reason: str | None = None
    notes: tuple[str, ...] = ()


def context_tokens(record: Record) -> float:
    """Mean number of tokens that the cache holds while the timed steps run.

    Step i of n, from 1, reads depth + prompt + i of them: its own is the last.
    """
    workload = record["workload"]
    depth = workload.get("depth_tokens", 0)
    return float(depth + workload["prompt_tokens"] + (workload["decode_tokens"] + 1) / 2)


def step_bytes(record: Record) -> float:
    """Bytes that one decode step reads: the weights once, the cache of every row of the batch."""
    cache = (record.get("kv_bytes_per_token") or 0) * context_tokens(record)
    weights: float = record["artifact"]["weight_bytes_per_token"]
    return weights + cache * batch(record)


def batch(record: Record) -> int:
    return int(record["workload"].get("batch", 1))


def steps_per_s(record: Record) -> list[float]:
    """Decode steps a second of every trial; at batch 1 these are tokens a second."""
    steps = (t["decode_step_s"] for t in record["trials"])
    return [len(s) / sum(s) for s in steps if s]


def device_kind(device: str) -> str:
    """`cpu`, `unified` (memory shared by both: Apple's) or `gpu`, of a device id."""
    return {"cpu": "cpu", "metal": "unified", "mps": "unified"}.get(device.partition(":")[0], "gpu")


def decode_share(record: Record, ceilings: Mapping[str, Any]) -> Share:
    """Of the memory bandwidth: bytes that the steps read a second, over what the device can read.

    `ceilings` are those of the record's run, by device id. The interval is that of the trials; the
    ceiling counts as exact.
    """
    own = ceilings.get(record.get("device", "cpu"))
    rates = steps_per_s(record)
    missing = _missing(record, own, rates)
    if own is None or missing:
        return Share(None, None, None, "bytes", missing)
    notes = _ceiling_notes(record, own)
    if record.get("kv_bytes_per_token") is None:
        notes.append(
            "only weights are counted, the cache's bytes are unknown, so the true share is higher"
        )
    achieved = [rate * step_bytes(record) for rate in rates]
    share = _over(achieved, float(own["read_bytes_per_s"]), "bytes", notes)
    if share.share is not None and share.share.estimate > 1:
        return _with_note(share, _above(record, own))
    return share


def prefill_share(
    record: Record, ceilings: Mapping[str, Any], *, computed_in: str | None = None
) -> Share:
    """Of the matrix throughput: the prompt's operations a second, over what was measured.

    `computed_in` is the type of the products, else `COMPUTED_IN`'s.
    """
    own = ceilings.get(record.get("device", "cpu"))
    seconds = [t["prefill_s"] for t in record["trials"]]
    missing = _missing(record, own, seconds)
    if own is None or missing:
        return Share(None, None, None, computed_in or "operations", missing)
    wanted = computed_in or compute_type(record)
    measured = own["matmul_flops_per_s"]
    notes = _ceiling_notes(record, own)
    if wanted not in measured:
        reason = f"the device's {wanted} throughput was not measured"
        return Share(None, None, None, wanted, reason, tuple(notes))
    work = prefill_flops(record)
    if work is None:
        work = 2 * record["artifact"]["n_params"] * _prompts_tokens(record)
        notes.append(
            "all parameters are counted, the embedding table too, so the true share is lower"
        )
    share = _over([work / s for s in seconds], float(measured[wanted]), wanted, notes)
    if share.share is not None and share.share.estimate > 1:
        return _with_note(
            share,
            f"above the ceiling: the runtime's products are faster than torch's {wanted} or "
            "computed in another type, or the ceiling was measured on a busy machine",
        )
    return share


def prefill_flops(record: Record) -> int | None:
    """Operations of all prompts of the batch: 2 a token and parameter that it is multiplied with
    (Kaplan et al. 2020, Scaling Laws for Neural Language Models, table 1: 2 N).

    The head counts for every token in `HEAD_OF_EVERY_TOKEN`, elsewhere for the last one of each
    prompt. Attention's own products are not counted (that table's 2 x layers x context x width).
    None where the record does not have the parameters apart.
    """
    artifact = record["artifact"]
    layers, head = artifact.get("matmul_params"), artifact.get("head_params")
    if layers is None or head is None:
        return None
    tokens = _prompts_tokens(record)
    headed = tokens if record["runtime"] in HEAD_OF_EVERY_TOKEN else batch(record)
    return int(2 * (layers * tokens + head * headed))


def _prompts_tokens(record: Record) -> int:
    return int(record["workload"]["prompt_tokens"] * batch(record))


def compute_type(record: Record) -> str:
    """The type that the runtime multiplies in, as `COMPUTED_IN` has it."""
    precision = record["artifact"]["spec"]["precision"].lower()
    if precision == "bnb-nf4":
        precision = record.get("options", {}).get("dtype", "float32")
    weights = FLOATS.get(precision, "quantized")
    if precision in QUANTIZED_BYTES:
        weights = precision
    kind = "cpu" if device_kind(record.get("device", "cpu")) == "cpu" else "gpu"
    return COMPUTED_IN.get((kind, record["runtime"], weights), "float32")


def _missing(record: Record, own: Mapping[str, Any] | None, samples: list[float]) -> str | None:
    if not samples:
        return "no timed trial ended"
    if own is None:
        return f"no ceilings of {record.get('device', 'cpu')} were measured in this run"
    return None


def _over(achieved: list[float], ceiling: float, unit: str, notes: list[str]) -> Share:
    made = median_interval(achieved)
    share = Interval(
        made.estimate / ceiling, made.low / ceiling, made.high / ceiling, made.n, made.confidence
    )
    return Share(share, made, ceiling, unit, None, tuple(notes))


def _with_note(share: Share, note: str) -> Share:
    return Share(**{**vars(share), "notes": (*share.notes, note)})


def _ceiling_notes(record: Record, own: Mapping[str, Any]) -> list[str]:
    notes = []
    threads = own.get("threads")
    used = record["workload"].get("threads")
    if threads is not None and used is not None and threads != used:
        notes.append(f"the ceiling is that of {threads} threads, the run used {used}")
    busy = own.get("samples", {}).get("foreign_cpu_share")
    if busy is not None and busy > BUSY_SHARE:
        notes.append(
            f"other processes took {100 * busy:.0f} % of the CPU while the ceiling was measured: "
            "it is too low"
        )
    return notes


def _above(record: Record, own: Mapping[str, Any]) -> str:
    cache = own.get("samples", {}).get("read", {}).get("cache_bytes")
    if cache and step_bytes(record) <= 2 * cache:
        return (
            f"above the ceiling: a step reads {step_bytes(record) / 1e6:.0f} MB and the last cache "
            f"holds {cache / 1e6:.0f} MB of it"
        )
    return (
        "above the ceiling: part of what a step reads stays in a cache, or the ceiling was "
        "measured on a busy machine"
    )
