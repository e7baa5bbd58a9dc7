"""Killed at any step, a run goes on to the same bytes; two processes do what one does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.healing import LENGTH, Windows, read, settings

from shortstack import cli
from shortstack.checkpoint import Checkpoint
from shortstack.prune.heal import state
from shortstack.prune.heal.train import heal

STEPS = 12


@pytest.fixture(scope="module")
def arguments(cut: Checkpoint, tiny: Path) -> list[str]:
    return [
        *("heal", str(cut.path), "--teacher", str(tiny), "--text", "spdx", "--device", "cpu"),
        *("--tokens", str(STEPS * 8 * LENGTH), "--window-tokens", str(LENGTH)),
        *("--batch-windows", "8", "--selection-windows", "8", "--eval-steps", "3", "--json"),
        *("--save-steps", "1", "--keep-float32", "--dtype", "float32", "--rate", "1e-3"),
    ]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "healed"
    assert cli.main([*arguments, "-o", str(out)]) == 0
    return out


@pytest.mark.parametrize("kill_after", [1, 7])
def test_a_killed_run_goes_on_to_the_same_result(
    arguments: list[str], undisturbed: Path, tmp_path: Path, kill_after: int
) -> None:
    out, states = tmp_path / "healed", tmp_path / ".healed.healing"
    command = [sys.executable, "-m", "shortstack", *arguments, "-o", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not any(int(p.name[5:]) >= kill_after for p in states.glob("step-*[0-9]")):
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    assert not [p for p in states.rglob("*") if p.suffix not in (".safetensors", ".json", "")]
    second = subprocess.run([*command], capture_output=True, text=True, check=True)
    facts = json.loads(second.stdout)
    assert facts["steps"] == STEPS
    assert [entry["step"] for entry in facts["history"]] == [0, 3, 6, 9, 12]
    assert read(Checkpoint.open(out)) == read(Checkpoint.open(undisturbed))
    assert not states.exists()


def test_a_state_of_another_run_is_not_gone_on_from(
    cut: Checkpoint, original: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    def run(name: str, seed: int, tokens: int) -> Checkpoint:
        (tmp_path / name).mkdir()
        chosen = settings(seed=seed, save_steps=1, tokens=tokens)
        return heal(cut, original, *windows, tmp_path / name, chosen, state=tmp_path / "state")[0]

    alone = read(run("alone", 1, 4 * 8 * LENGTH))
    stopped = tmp_path / "stopped"
    stopped.mkdir()

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(
            *(cut, original, *windows, stopped, settings(save_steps=1)),
            state=tmp_path / "state",
            progress=stop,
        )
    assert list((tmp_path / "state").glob("step-*"))
    assert read(run("after", 1, 4 * 8 * LENGTH)) == alone


def test_a_state_that_was_cut_short_is_passed_by(tmp_path: Path) -> None:
    tensors = {"model": {"weight": torch.ones(3)}}
    state.save(tmp_path, "key", state.Position(step=1), tensors)
    assert state.load(tmp_path, "key") is not None
    (file,) = tmp_path.glob("step-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert state.load(tmp_path, "key") is None


@pytest.mark.parametrize("train", ["all", "lora:4"])
def test_two_processes_give_what_one_gives(
    arguments: list[str], cut: Checkpoint, tiny: Path, tmp_path: Path, train: str
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    changed = [*arguments, "--train", train]
    assert cli.main([*changed, "-o", str(alone)]) == 0
    # `accelerate launch --cpu` starts a single process unless there is MPI; torchrun starts two
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "shortstack"),
    ]
    done = subprocess.run(
        [*launch, *changed, "-o", str(together)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert facts[0]["processes"] == 2
    one, two = Checkpoint.open(alone), Checkpoint.open(together)
    for name, data in read(one).items():
        if one.tensors[name].dtype == "F32":
            np.testing.assert_allclose(
                np.frombuffer(data, np.float32),
                np.frombuffer(read(two)[name], np.float32),
                atol=2e-4,
            )


def test_shards_have_the_gradients_of_the_whole(cut: Checkpoint) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("-m", "tests.sharded_healing", str(cut.path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["split"]
    assert facts["kept"]
    assert facts["worst"] < 1e-5 * facts["largest"]
