"""Memory of a running packed model and the time of its tokens, form by form and by plan.

    python -m benchmarks.packed_memory MODEL.packed.safetensors -o OUT [--threads 1] [--workers 0]
        [--max-slowdown 1.05] [--memory-budget-mb 78] [--points 6]
    python -m benchmarks.packed_memory --device cuda:0 --shape 7b [--layers 32] -o OUT [--nvcomp]

Of a file, on the CPU: plans are fitted; then every form and plan is opened in a process of its own
for its memory, which the kernel tells (anonymous resident bytes, over those of the same process
before it opens the model), and beside the int8 model, in turns, for its time. Of a shape, on a
card: benchmarks/packed_card.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shortstack.packed.plan import Point
from shortstack.packed.plan_file import PlanFile
from shortstack.runtimes.packed.measuring import INT8, Setting, beside, measure

PROMPT, STEPS = 32, 32


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs (RssAnon)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def idle() -> None:
    """Run a model of next to no size, so that imports and libraries are in the baseline."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shortstack.runtimes.pytorch_packed import return_memory

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.inference_mode():
        model = LlamaForCausalLM(config).bfloat16().eval()
        for n in (PROMPT, 1):
            model(input_ids=torch.ones(1, n, dtype=torch.long))
    del model
    gc.collect()
    return_memory()


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Open, prefill, decode; what is resident then, over what was before."""
    import torch

    from shortstack.runtimes.packed import direct, fit, model, stream  # noqa: F401
    from shortstack.runtimes.pytorch_packed import open_session

    torch.set_num_threads(request["threads"])
    idle()
    before = anonymous_bytes()
    with open_session(
        Path(request["path"]),
        threads=request["threads"],
        context_tokens=PROMPT + STEPS,
        workers=request["workers"],
        **request["options"],
    ) as session:
        session.prefill(list(range(1, PROMPT + 1)))
        for step in range(STEPS):
            session.decode(step + 1)
        gc.collect()
        return {"resident_bytes": anonymous_bytes() - before, "info": session.info}


def resident(given: argparse.Namespace, **options: str) -> dict[str, Any]:
    request = {
        "path": str(given.model),
        "threads": given.threads,
        "workers": given.workers,
        "options": options,
    }
    command = [sys.executable, "-m", "benchmarks.packed_memory", "--child", json.dumps(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def on_cpu(given: argparse.Namespace) -> list[dict[str, Any]]:
    from shortstack.runtimes.packed import fit

    setting = Setting(given.model, given.threads, workers=given.workers)
    plans: dict[str, PlanFile] = {}
    found = measure(setting, lambda: None)
    for name, budget, slowdown in (
        (f"plan, at most x {given.max_slowdown}", None, given.max_slowdown),
        (f"plan, at most {given.memory_budget_mb} MB", given.memory_budget_mb, None),
    ):
        if (budget, slowdown) != (None, None):
            plans[name] = fit.fitted(
                setting, found, memory_budget_mb=budget, max_slowdown=slowdown, points=0
            )
    base = next(iter(plans.values()))
    todo: dict[str, tuple[dict[str, str], Point]] = {
        form: ({"form": form}, found.all_of(form)) for form in (INT8, "direct", "lean", "stream")
    }
    for number, point in enumerate(fit.spread(found.curve(), given.points)):
        file = given.out / f"curve-{number}.json"
        plan = base.model_copy(update={"forms": dict(point.forms)})
        file.write_text(plan.model_dump_json(indent=1), encoding="utf-8")
        todo[f"curve {number}"] = ({"plan": str(file)}, point)
    for number, (name, plan) in enumerate(plans.items()):
        file = given.out / f"plan-{number}.json"
        file.write_text(plan.model_dump_json(indent=1), encoding="utf-8")
        todo[name] = ({"plan": str(file)}, found.total(plan.forms))
    rows = []
    for name, (options, point) in todo.items():
        seconds, ratio = beside(setting, base, point)
        answer = resident(given, **options)
        rows.append(
            {
                "name": name,
                "resident_bytes": answer["resident_bytes"],
                "weight_bytes": answer["info"]["weight_bytes"],
                "predicted_over_int8": point.seconds / found.all_of(INT8).seconds,
                "decode_ms": seconds * 1e3,
                "decode_over_int8": ratio,
                "forms": answer["info"]["forms"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    int8 = next(row for row in rows if row["name"] == INT8)
    lines = [
        "| | resident, MB | of int8 | weights and buffers, MB | ms a token | x int8 | forms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        forms = ", ".join(f"{count} {form}" for form, count in row["forms"].items())
        lines.append(
            f"| {row['name']} | {row['resident_bytes'] / 1e6:.1f} | "
            f"{row['resident_bytes'] / int8['resident_bytes']:.3f} | "
            f"{row['weight_bytes'] / 1e6:.1f} | {row['decode_ms']:.2f} | "
            f"{row['decode_over_int8']:.3f} | {forms} |"
        )
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("packed-memory"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", default="0")
    parser.add_argument("--max-slowdown", type=float, default=1.05)
    parser.add_argument("--memory-budget-mb", type=float)
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", help="7b: a synthetic model, on a card")
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--sigma", type=float, default=4.0, help="of codes, in steps: 4 is 4.05 bits"
    )
    parser.add_argument(
        "--nvcomp", action="store_true", help="also nvCOMP's decoding, if installed"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    given = arguments()
    if given.child:
        print(json.dumps(child(json.loads(given.child))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"arguments": sys.argv[1:]}
    if given.shape:
        from benchmarks.packed_card import nvcomp_rates, run

        record["rows"] = run(given.shape, given.layers, given.device, given.sigma)
        if given.nvcomp:
            try:
                record["nvcomp"] = nvcomp_rates(given.device, given.sigma)
            except ImportError as error:
                record["nvcomp"] = {"missing": str(error)}
            print(json.dumps(record["nvcomp"]))
    else:
        record["rows"] = on_cpu(given)
        (given.out / "packed_memory.md").write_text(table(record["rows"]) + "\n", encoding="utf-8")
        print(table(record["rows"]))
    text = json.dumps(record, indent=1)
    (given.out / "packed_memory.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
