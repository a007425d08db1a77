"""What tests of whole runs share: the trace that must not change, and the real command line in another process."""

import os
import subprocess
import time
from pathlib import Path

from tracking import read_rows
from train import PRESETS

ROOT = Path(__file__).parent.parent
TRACE = ("step", "loss", "grad_norm", "lr", "checksum", "samples_seen")


def trace(config) -> list[tuple]:
    """Per step everything that must not change, floats to the last bit."""
    rows = [r for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    return [tuple(v.hex() if isinstance(v := row[k], float) else v for k in TRACE) for row in rows]


def losses(config):
    return [r["loss"] for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] == "train"]


def vals(config):
    return {r["step"]: r["loss"] for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] == "val"}


def as_flags(config) -> list[str]:
    changed = {k: v for k, v in vars(config).items() if v != getattr(PRESETS["gpt2-124m"], k)}
    return [part for k, v in changed.items() for part in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def start(config, *before, process_group=None, **environment):
    """The real command line in another process."""
    command = [*before, str(ROOT / "train.py"), *as_flags(config)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, **pipes, env=env, cwd=ROOT, process_group=process_group)


def wait_for_step(config, step, process):
    for _ in range(1200):
        if process.poll() is not None or any(r["step"] >= step for r in read_rows(config.run_dir / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")
