"""Does a change help? Runs that differ in one thing, several seeds of each, and a table with error bars.

    python compare.py --name rates --seeds 3 --sweep lr=3e-3,1e-2,3e-2 -- --preset demo
    python compare.py --name optimizers --seeds 3 --arm "adamw: --optimizer adamw" --arm "muon:" -- --preset demo
    python compare.py --name qk --seeds 3 --arm "base:" --arm "qk-norm: code=arms/qk_norm.patch" -- --preset demo

An arm is a set of flags, or changed code, or both; the first one is the base. What follows `--` are flags that all arms
share. Each arm is trained with each seed, as an ordinary run of train.py below comparisons/NAME/. One seed decides
the order of the data and the first weights, in every arm alike, so arms are compared seed by seed (in pairs): what a
seed does to all arms cancels in the difference. The same command goes on after a kill, and makes no finished run again.

The code of all arms is copied when the comparison begins, so it may be edited while the runs go on.
"""

from support import cli  # isort: split

import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import plot_run
import report
import train
from support import runtime
from support.cli import UserError, flag
from support.files import locked, read_json, write_json
from support.tracking import Progress, duration, read_rows

HERE = Path(__file__).parent
EXAMPLES = (
    "python compare.py --name rates --sweep lr=3e-3,1e-2 -- --preset demo",
    'python compare.py --name qk --arm "base:" --arm "qk-norm: code=arms/qk_norm.patch" -- --preset demo',
)


@dataclass(frozen=True)
class CompareConfig:
    """One comparison; the flags of its runs follow `--`."""

    name: str = flag(cli.REQUIRED, "name of the comparison: its runs and its report are in DIR/NAME")
    arm: tuple[str, ...] = flag((), '"NAME: FLAGS" or "NAME: code=FOLDER|REVISION|PATCH FLAGS"; the first is the base')
    sweep: tuple[str, ...] = flag((), "FLAG=VALUE,VALUE,...: each arm once with each value; several: with each pair")
    seeds: str = flag("3", "how many seeds (1, 2, ...), or a list of them: 1337,7")
    jobs: int = flag(0, "runs at the same time; 0: one per CUDA device, or one per two cores of a CPU", at_least=0)
    dir: str = flag("comparisons", "folder of all comparisons")
    dry_run: bool = flag(False, "say what would run, and for how long, and stop")


# ---------------------------------------------------------------------------------------
# Arms.


@dataclass(frozen=True)
class Arm:
    name: str
    flags: tuple[str, ...] = ()
    code: str | None = None  # a folder, a git revision or a patch; None: the code beside this file

    @property
    def folder(self) -> str:
        return plot_run.arm_folder(self.name)


def parse_arm(text) -> Arm:
    """ "NAME: code=... FLAGS", as a shell would split it."""
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise UserError(f'--arm {text!r}: expected "NAME: FLAGS", for example "lr x2: --lr 1.2e-3"')
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"--arm {text!r}: {error}") from error
    codes = [word.removeprefix("code=") for word in words if word.startswith("code=")]
    flags = tuple(word for word in words if not word.startswith("code="))
    return Arm(name.strip(), flags, codes[-1] if codes else None)


def sweeps(c: CompareConfig) -> list[tuple[str, list[str]]]:
    """(flag, its values) of each --sweep."""
    found = []
    for text in c.sweep:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise UserError(f"--sweep {text!r}: expected FLAG=VALUE,VALUE, for example lr=3e-3,1e-2")
        found.append((name.removeprefix("--"), values.split(",")))
    return found


def all_arms(c: CompareConfig) -> list[Arm]:
    """Each arm with each combination of the swept values."""
    arms, swept = [parse_arm(text) for text in c.arm], []
    axes = [[(name, value) for value in values] for name, values in sweeps(c)]
    for arm, values in itertools.product(arms or [Arm("")], itertools.product(*axes)):
        name = ", ".join(([arm.name] if arm.name else []) + [f"{k}={v}" for k, v in values])
        flags = itertools.chain(*((f"--{k}", v) for k, v in values))
        swept.append(Arm(name, (*arm.flags, *flags), arm.code))
    if len(swept) < 2:
        raise UserError("a comparison needs two arms: name them with --arm or --sweep")
    for one, other in itertools.combinations(swept, 2):
        if one.folder == other.folder:
            raise UserError(f"arms {one.name!r} and {other.name!r}: their names must differ in letters or digits")
    return swept


def all_seeds(c: CompareConfig) -> list[int]:
    try:
        listed = [int(s) for s in c.seeds.split(",")]
    except ValueError:
        listed = []
    seeds = listed if "," in c.seeds else list(range(1, (listed or [0])[0] + 1))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds is {c.seeds!r}; expected a number from 1, or different seeds with commas between")
    return seeds


# ---------------------------------------------------------------------------------------
# The code of an arm.


def git(*words, cwd=HERE, ceiling="") -> bytes:
    """What git answers; UserError with its last line where it refuses."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(ceiling).resolve())}
    done = subprocess.run(["git", *words], capture_output=True, cwd=cwd, env=env)
    if done.returncode:
        raise UserError(f"git {shlex.join(words)}: {last_line(done.stderr.decode(errors='replace'))}")
    return done.stdout


def sources(folder) -> list[Path]:
    return sorted([*Path(folder).glob("*.py"), *Path(folder).glob("support/*.py")])


def identity(arm: Arm) -> str | None:
    """What the arm's `code=` means now, to be found changed later; None for the code beside this file."""
    if arm.code is None:
        return None
    if Path(arm.code).is_dir():
        return hashlib.sha256(b"\0".join(p.read_bytes() for p in sources(arm.code))).hexdigest()
    if Path(arm.code).is_file():
        return hashlib.sha256(Path(arm.code).read_bytes()).hexdigest()
    return git("rev-parse", "--verify", f"{arm.code}^{{commit}}").decode().strip()


def copy_code(arm: Arm, target: Path):
    """Writes the arm's code into `target`, whole or not at all."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if arm.code is None or Path(arm.code).exists():
        root = Path(arm.code) if arm.code and Path(arm.code).is_dir() else HERE
        for path in sources(root):
            copy = temporary / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    else:  # a revision: all of its files
        with tarfile.open(fileobj=io.BytesIO(git("archive", arm.code))) as archive:
            archive.extractall(temporary, filter="data")
    if arm.code and Path(arm.code).is_file():
        # the ceiling keeps git from taking the folder for a part of the repository around it
        git("apply", str(Path(arm.code).resolve()), cwd=temporary, ceiling=temporary.parent)
    if not (temporary / "train.py").is_file():
        raise UserError(f"arm {arm.name!r}: no train.py in {arm.code}")
    os.rename(temporary, target)


def set_up(folder: Path, arms, common) -> dict:
    """The content of comparison.json: common flags, and what each arm is. Copies the code of every arm.

    UserError where an arm is not what it was in an earlier call. A folder without comparison.json has not begun."""
    file = folder / "comparison.json"
    if not file.exists():
        shutil.rmtree(folder / "code", ignore_errors=True)
    facts = read_json(file) if file.exists() else {"common": common, "arms": {}}
    if facts["common"] != common:
        raise UserError(f"{folder}: its runs have the flags {shlex.join(facts['common'])!r}; give a new --name")
    for arm in arms:
        now = {"flags": list(arm.flags), "code": arm.code, "identity": identity(arm)}
        if facts["arms"].setdefault(arm.name, now) != now:
            raise UserError(f"{folder}: arm {arm.name!r} is not what it was ({facts['arms'][arm.name]}); rename it")
        copy_code(arm, code_of(folder, arm))
    return facts


def code_of(folder, arm) -> Path:
    return folder / "code" / (arm.folder if arm.code else "unchanged")


# ---------------------------------------------------------------------------------------
# Runs.


@dataclass
class Run:
    """One arm with one seed. Its directory is an ordinary run's, below the folder of its arm."""

    arm: Arm
    seed: int
    parent: Path  # DIR/NAME/ARM
    command: list[str]
    max_steps: int
    tokens: int
    error: str | None = None

    @property
    def directory(self) -> Path:
        return self.parent / f"seed_{self.seed}"

    @property
    def done_file(self) -> Path:
        return self.directory / "finished.json"

    @property
    def finished(self) -> bool:
        return self.done_file.exists()


def all_runs(folder, arms, seeds, common) -> list[Run]:
    """Seed by seed, so that a comparison that is stopped early has whole pairs."""
    configs = {arm.name: config_of(folder, arm, common) for arm in arms}
    runs = []
    for seed, arm in itertools.product(seeds, arms):
        c, parent = configs[arm.name], folder / arm.folder
        own = ["--seed", str(seed), "--run_name", f"seed_{seed}", "--checkpoint_dir", str(parent)]
        command = [sys.executable, str(code_of(folder, arm) / "train.py"), *common, *arm.flags, *own]
        runs.append(Run(arm, seed, parent, command, c["max_steps"], c["max_steps"] * c["total_batch_tokens"]))
    return runs


def config_of(folder, arm, common) -> dict:
    """The values of TrainConfig that the arm's flags mean to the arm's own code. UserError where they are wrong."""
    flags = [*common, *arm.flags]
    fixed = {"--seed", "--run_name", "--checkpoint_dir", "--resume"} & {word.partition("=")[0] for word in flags}
    if fixed:
        raise UserError(f"{', '.join(sorted(fixed))}: set by the comparison itself; remove it")
    try:
        if arm.code is None:
            return vars(train.parse(flags))
        program = "import json, sys, train; print(json.dumps(vars(train.parse(sys.argv[1:]))))"
        code = code_of(folder, arm).resolve()
        command = [sys.executable, "-c", program, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(code)})
        if done.returncode:
            raise UserError(last_line(done.stderr))
        return json.loads(done.stdout.splitlines()[-1])
    except UserError as error:
        raise UserError(f"arm {arm.name!r}: {error}") from error


def steps_done(r: Run) -> int:
    """The last step in the run's metrics.jsonl, read from its end."""
    try:
        with open(r.directory / "metrics.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 8192))
            found = re.findall(rb'"step": (\d+)', f.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def last_line(text) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def start(r: Run, slot, jobs, cuda, lock) -> subprocess.Popen:
    """The run's process; what it says is added to seed_N.log."""
    r.parent.mkdir(parents=True, exist_ok=True)
    share = max(1, (os.cpu_count() or 1) // jobs)
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": str(slot % cuda)} if cuda else {"OMP_NUM_THREADS": str(share)})
    with open(r.parent / f"seed_{r.seed}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            r.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            pass_fds=[lock.fileno()], preexec_fn=runtime.end_with_parent,
        )  # fmt: skip


def run_all(runs, jobs, cuda, lock) -> int:
    """Makes the runs that are not finished, `jobs` at a time. Returns the signal that ended it early, or 0.

    A run that fails keeps the last line that it said in `error`; the others go on."""
    waiting, going = [r for r in runs if not r.finished], {}
    shown = sum(steps_done(r) for r in runs)
    progress = Progress(shown, sum(r.max_steps for r in runs), True)
    with runtime.StopSignals() as signals:
        while (waiting and not signals.received) or going:
            free = sorted(set(range(jobs)) - going.keys())
            while waiting and free and not signals.received:
                r, slot = waiting.pop(0), free.pop(0)
                going[slot] = (r, start(r, slot, jobs, cuda, lock))
            time.sleep(0.2)
            for slot, (r, process) in list(going.items()):
                if signals.received:
                    process.send_signal(signal.SIGTERM)  # it saves and ends
                if process.poll() is not None:
                    del going[slot]
                    conclude(r, process.returncode, progress)
            steps = sum(steps_done(r) for r in runs)
            if going and steps > shown:
                progress.show(steps, ", ".join(f"{r.arm.name} seed {r.seed}" for r, _ in going.values()))
                shown = steps
        progress.close()
        return signals.received


def conclude(r: Run, code, progress):
    if code == 0:
        write_json(r.done_file, {"exit_code": 0})
    elif code not in (128 + signal.SIGTERM, 128 + signal.SIGINT):  # stopped by us, to go on later
        log = r.parent / f"seed_{r.seed}.log"
        r.error = last_line(log.read_text(encoding="utf-8", errors="replace"))
        progress.say(f"{r.arm.name}, seed {r.seed}: failed with exit code {code}: {r.error} (all of it: {log})")


def dry_run(runs, jobs) -> int:
    """What will run; how long by the speed of the runs there are."""
    speeds = [report.median_speed(read_rows(r.directory / "metrics.jsonl")) for r in runs]
    known = [speed for speed in speeds if not math.isnan(speed)]
    for r in runs:
        state = "finished" if r.finished else f"{r.tokens:,} tokens"
        print(f"{r.arm.name}, seed {r.seed}: {state}")
    left = sum(r.tokens for r in runs if not r.finished)
    time_left = f"about {duration(left / statistics.median(known) / jobs)}" if known else "unknown before the first run"
    print(f"in all {left:,} tokens, {jobs} run(s) at the same time; time {time_left}")
    return 0


# ---------------------------------------------------------------------------------------


def compare(c: CompareConfig, common) -> int:
    """Makes the runs of a comparison and its report; returns the exit code."""
    arms, seeds = all_arms(c), all_seeds(c)
    if not c.name or Path(c.name).name != c.name:
        raise UserError(f"--name is {c.name!r}; give the comparison a name that can be a folder's")
    folder = Path(c.dir) / c.name
    cuda = runtime.cuda_devices()
    jobs = c.jobs or cuda or max(1, (os.cpu_count() or 1) // 2)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock, locked(lock, lambda: f"{folder} is in use: runs of it are going on", 30):
        facts = set_up(folder, arms, common)
        runs = all_runs(folder, arms, seeds, common)
        if c.dry_run:
            return dry_run(runs, jobs)
        write_json(folder / "comparison.json", facts)
        received = run_all(runs, jobs, cuda, lock)
        if received:
            print(f"signal {received}: stopped; the same command goes on")
            return 128 + received
        rows = report.summarize(
            {a.name: {r.seed: report.outcome(r.directory) for r in runs if r.arm == a and r.finished} for a in arms},
            {a.name: {r.seed: r.error for r in runs if r.arm == a and r.error} for a in arms},
        )
        report.write(folder, rows, report.notes(rows, dict(sweeps(c))))
    return 1 if any(row["failed"] for row in rows) else 0


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    c = cli.parse(
        CompareConfig, argv[:split], "Compare changes over several seeds; flags of all runs follow --.", EXAMPLES
    )
    return compare(c, argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(cli.run(main))
