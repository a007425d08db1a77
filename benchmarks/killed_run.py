"""A run that is killed again and again, beside the same run undisturbed: are all numbers the same?

    python benchmarks/killed_run.py --kills 20              # the demo, twice: about six minutes on two cores
    python docs/figures.py --only killed                    # draws what this has written

The flags of the run are those of --flags. The second run gets SIGKILL at random steps, at a random moment of the step,
and the same command is started again each time. At the end every row of metrics.jsonl (less the times in it) must be
equal, and so must every file of the last checkpoint be, but for state.json, which holds seconds, and MANIFEST.json,
which holds the hash of state.json. The losses of each start are kept in --output, also those of steps that were trained
again because the kill came before their checkpoint.
"""

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, parse, run  # isort: split

from checkpoint import newest, step_of
from support.files import sha256, write_json
from support.tracking import read_rows

TRAIN = Path(__file__).parent.parent / "train.py"
WITH_TIMES = ("state.json", "MANIFEST.json")  # the seconds of training, and the hash of the first
TIMES = ("seconds", "tokens_per_second", "memory", "mfu")  # of a row; they differ between two runs of anything


@dataclass(frozen=True)
class Config:
    flags: str = flag("--preset demo --save_interval 25 --device cpu --dtype float32", "of the run", unit="flags")
    kills: int = flag(20, "moments of SIGKILL, at random steps", at_least=1)
    seed: int = flag(1, "of these moments")
    directory: str = flag("killed", "for the two runs; removed first", unit="folder")
    output: str = flag("benchmarks/results/killed.json", "losses of every start, and what was compared", unit="file")


def start(directory, name, flags):
    own = ["--checkpoint_dir", str(directory), "--run_name", name]
    with open(Path(directory) / f"{name}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(TRAIN), *flags, *own], stdout=log, stderr=log)


def rows_of(directory, name) -> list[dict]:
    return list(read_rows(Path(directory) / name / "metrics.jsonl"))


def losses_after(rows, step) -> list[list]:
    """[step, loss] of each training step after `step`."""
    return [[row["step"], row["loss"]] for row in rows if row["kind"] == "train" and row["step"] > step]


def last_step(rows) -> int:
    return max((row["step"] for row in rows), default=0)


def saved_step(run_dir) -> int:
    """The step that the next start continues from."""
    found = newest(run_dir)
    return step_of(found) if found else 0


def finish(process, name):
    if process.wait():
        raise UserError(f"the run {name} ended with exit code {process.returncode}; its log is beside it")


def killed_run(c: Config, flags, max_steps) -> list[list]:
    """Trains with kills; returns the losses of each start."""
    draw, name, starts = random.Random(c.seed), "killed", []
    run_dir = Path(c.directory) / name
    for target in sorted(draw.sample(range(1, max_steps), c.kills)):
        begin = saved_step(run_dir)
        process = start(c.directory, name, flags)
        while last_step(rows_of(c.directory, name)) < target and process.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        starts.append(losses_after(rows_of(c.directory, name), begin))
        print(f"killed at step {last_step(rows_of(c.directory, name))}, begun at {begin}", flush=True)
    begin = saved_step(run_dir)
    finish(start(c.directory, name, flags), name)
    return [*starts, losses_after(rows_of(c.directory, name), begin)]


def compared(directory) -> dict:
    """UserError where the two runs differ; else how much was compared."""
    one, other = rows_of(directory, "undisturbed"), rows_of(directory, "killed")
    strip = [[json.dumps({k: v for k, v in row.items() if k not in TIMES}) for row in rows] for rows in (one, other)]
    if strip[0] != strip[1]:
        step = next((a["step"] for a, b, x, y in zip(one, other, *strip) if x != y), "of another number of rows")
        raise UserError(f"the killed run differs from the undisturbed one from step {step} on")
    ends = [hashes_of(newest(Path(directory) / name)) for name in ("undisturbed", "killed")]
    different = sorted({f for f, _ in ends[0].items() ^ ends[1].items()})
    if different:
        raise UserError(f"the last checkpoints differ in {', '.join(different)}")
    return {"rows": len(one), "files": ends[0]}


def hashes_of(checkpoint) -> dict[str, str]:
    """{name: sha256} of the files in a checkpoint that two equal runs share."""
    return {p.name: sha256(p) for p in sorted(checkpoint.iterdir()) if p.name not in WITH_TIMES}


def main(argv=None):
    c = parse(Config, argv, __doc__)
    flags = shlex.split(c.flags)
    shutil.rmtree(c.directory, ignore_errors=True)
    Path(c.directory).mkdir(parents=True)
    finish(start(c.directory, "undisturbed", flags), "undisturbed")
    undisturbed = losses_after(rows_of(c.directory, "undisturbed"), 0)
    starts = killed_run(c, flags, undisturbed[-1][0])
    equal = compared(c.directory)
    trained = sum(map(len, starts))
    print(
        f"{c.kills} kills, {trained:,} steps trained for {len(undisturbed):,}: all {equal['rows']} rows of metrics and "
        f"{len(equal['files'])} files are equal to those of the undisturbed run"
    )
    write_json(c.output, {"flags": c.flags, "equal": equal, "undisturbed": undisturbed, "starts": starts})


if __name__ == "__main__":
    sys.exit(run(main))
