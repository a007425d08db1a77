"""Does a change help? Runs that differ in one thing, several seeds of each, and a table with error bars.

    python compare.py --name rates --seeds 3 --sweep lr=3e-3,1e-2,3e-2 -- --preset demo
    python compare.py --name optimizers --seeds 3 --arm "adamw: --optimizer adamw" --arm "muon:" -- --preset demo
    python compare.py --name qk-demo --seeds 3 --arm "base:" --arm "qk-norm: code=arms/qk_norm.patch" -- --preset demo
    python compare.py @benchmarks/recipe.args                  # all of that from a file

An arm is a set of flags, or changed code, or both; the first one is the base. What follows `--` are flags that all arms
share. Each arm is trained with each seed, as an ordinary run of train.py below comparisons/NAME/. One seed decides
the order of the data and the first weights, in every arm alike, so arms are compared seed by seed (in pairs): what a
seed does to all arms cancels in the difference. The same command goes on after a kill, and makes no finished run again.
The code of all arms is copied when the comparison begins, so it may be edited while the runs go on. A patch that a
later call adds changes that copy too.
"""

from support import cli  # isort: split

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import report
import train
from plot_run import arm_folder
from support import runtime
from support.cli import UserError, flag
from support.files import locked, read_json, write_json
from support.tracking import Progress, duration, read_rows
from support.workers import cores

HERE = Path(__file__).parent
UNCHANGED = "unchanged"  # in the folder code of a comparison: the code beside this file, as it was when it began


@dataclass(frozen=True)
class CompareConfig:
    """One comparison; the flags of its runs follow `--`."""

    name: str = flag(cli.REQUIRED, "name of the comparison: its runs and its report are in DIR/NAME")
    arm: tuple[str, ...] = flag((), '"NAME: FLAGS" or "NAME: code=FOLDER|REVISION|PATCH FLAGS"; the first is the base')
    sweep: tuple[str, ...] = flag((), "FLAG=VALUE,VALUE,...: each arm once with each value; several: with each pair")
    seeds: str = flag("3", "how many seeds (1, 2, ...), or a list of them: 1337,7")
    jobs: int = flag(0, "runs at once; 0: one per CUDA device, else one on MPS, else one per two cores", at_least=0)
    dir: str = flag("comparisons", "folder of all comparisons")
    dry_run: bool = flag(False, "say what would run, and for how long, and stop")


# ---------------------------------------------------------------------------------------
# Arms.


@dataclass(frozen=True)
class Arm:
    name: str
    flags: tuple[str, ...] = ()
    code: str | None = None  # a folder, a git revision or a patch; None: the code beside this file


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
    if "" in codes:
        raise UserError(f"--arm {text!r}: code= names nothing")
    flags = tuple(word for word in words if not word.startswith("code="))
    return Arm(name.strip(), flags, codes[-1] if codes else None)


def all_arms(c: CompareConfig) -> list[Arm]:
    """Each arm with each combination of the swept values."""
    axes = []
    for text in c.sweep:
        name, equals, values = text.removeprefix("--").partition("=")
        if not (name and equals and values):
            raise UserError(f"--sweep {text!r}: expected FLAG=VALUE,VALUE, for example lr=3e-3,1e-2")
        axes.append([(name, value) for value in values.split(",")])
    arms = []
    for arm, pairs in itertools.product(map(parse_arm, c.arm) if c.arm else [Arm("")], itertools.product(*axes)):
        named = [arm.name] if arm.name else []
        name = ", ".join(named + [f"{flag}={value}" for flag, value in pairs])
        swept = [word for flag, value in pairs for word in (f"--{flag}", value)]
        arms.append(Arm(name, (*arm.flags, *swept), arm.code))
    if len(arms) < 2:
        raise UserError("a comparison needs two arms: name them with --arm or --sweep")
    names = {}
    for arm in arms:
        folder = arm_folder(arm.name).casefold()  # on macOS and Windows, ABC and abc are one folder
        if arm.code and folder == UNCHANGED:
            raise UserError(f"arm {arm.name!r}: that name is kept for the code that no arm changes; rename the arm")
        if folder in names:
            both = f"arms {names[folder]!r} and {arm.name!r}"
            raise UserError(f"{both}: names must differ in letters or digits, not only in upper and lower case")
        names[folder] = arm.name
    return arms


def all_seeds(c: CompareConfig) -> list[int]:
    try:
        listed = [int(seed) for seed in c.seeds.split(",")]
    except ValueError:
        listed = [0]
    seeds = listed if len(listed) > 1 else list(range(1, listed[0] + 1))
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


def version_of(arm: Arm) -> str | None:
    """What the arm's `code=` means now, to be found changed later; None for the code beside this file."""
    if arm.code is None:
        return None
    path = Path(arm.code)
    if not path.exists():
        try:
            return git("rev-parse", "--verify", f"{arm.code}^{{commit}}").decode().strip()
        except UserError as error:
            found = "found no file, no folder and no git revision of that name"
            raise UserError(f"arm {arm.name!r}: code={arm.code}: {found} ({error})") from error
    files = sources(path) if path.is_dir() else [path]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def copy_code(arm: Arm, target: Path, base: Path):
    """Writes the arm's code into `target`, whole or not at all. `base`: the code that a patch changes, a folder."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    code = Path(arm.code or base)
    if code.exists():
        root = code if code.is_dir() else base
        for path in sources(root):
            copy = temporary / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    else:  # a revision: all of its files
        with tarfile.open(fileobj=io.BytesIO(git("archive", arm.code))) as archive:
            archive.extractall(temporary, filter="data")
    if code.is_file():
        # the ceiling keeps git from taking the folder for a part of the repository around it
        git("apply", str(code.resolve()), cwd=temporary, ceiling=temporary.parent)
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
    unchanged = folder / "code" / UNCHANGED
    copy_code(Arm(UNCHANGED), unchanged, HERE)
    for arm in arms:
        now = {"flags": list(arm.flags), "code": arm.code, "identity": version_of(arm)}
        if facts["arms"].setdefault(arm.name, now) != now:
            raise UserError(f"{folder}: arm {arm.name!r} is not what it was ({facts['arms'][arm.name]}); rename it")
        copy_code(arm, code_of(folder, arm), unchanged)
    return facts


def code_of(folder, arm) -> Path:
    return folder / "code" / (arm_folder(arm.name) if arm.code else UNCHANGED)


# ---------------------------------------------------------------------------------------
# Runs.


@dataclass
class Run:
    """One arm with one seed, an ordinary run."""

    arm: Arm
    seed: int
    directory: Path  # DIR/NAME/ARM/seed_N; beside it lies its log
    command: list[str]
    max_steps: int
    tokens: int
    device: str  # as --device has it
    error: str | None = None

    @property
    def finished(self) -> bool:
        return (self.directory / report.FINISHED).exists()


def all_runs(folder, arms, seeds, common) -> list[Run]:
    """Seed by seed, so that a comparison that is stopped early has whole pairs."""
    configs = {arm.name: config_of(folder, arm, common) for arm in arms}
    for name, c in configs.items():
        if c["eval_interval"] == 0:
            raise UserError(f"arm {name!r}: nothing is validated; compare with an --eval_interval above 0")
    runs = []
    for seed, arm in itertools.product(seeds, arms):
        c, directory = configs[arm.name], folder / arm_folder(arm.name) / f"seed_{seed}"
        own = ["--seed", str(seed), "--run_name", directory.name, "--checkpoint_dir", str(directory.parent)]
        command = [sys.executable, str(code_of(folder, arm) / "train.py"), *common, *arm.flags, *own]
        tokens = c["max_steps"] * c["total_batch_tokens"]
        runs.append(Run(arm, seed, directory, command, c["max_steps"], tokens, c["device"]))
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
        env = os.environ | {"PYTHONPATH": str(code_of(folder, arm).resolve())}
        # -P: without it the current folder comes before PYTHONPATH, and may be the repository
        done = subprocess.run([sys.executable, "-P", "-c", program, *flags], capture_output=True, text=True, env=env)
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


def cuda_names() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    n, given = runtime.cuda_devices(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:n] if given else [str(i) for i in range(n)]


def jobs_at_once(cuda) -> int:
    """What --jobs 0 means: a run per CUDA device, else one on MPS, else one per two cores."""
    if cuda:
        return len(cuda)
    return 1 if torch.backends.mps.is_available() else max(1, cores() // 2)


def start_run(r: Run, slot, jobs, cuda, lock) -> subprocess.Popen:
    """The run's process; what it says is added to seed_N.log. cuda: `cuda_names`."""
    r.directory.parent.mkdir(parents=True, exist_ok=True)
    share = max(1, cores() // jobs)
    own = {"CUDA_VISIBLE_DEVICES": cuda[slot % len(cuda)]} if cuda else {"OMP_NUM_THREADS": str(share)}
    with open(r.directory.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(
            r.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | own,
            pass_fds=[lock.fileno()], preexec_fn=runtime.end_with_parent,
        )  # fmt: skip


def run_all(runs, jobs, cuda, lock) -> int:
    """Makes the runs that are not finished, `jobs` at a time. Returns the signal that ended it early, or 0.

    A run that fails keeps the last line that it said in `error`; the others go on."""
    waiting, going = [r for r in runs if not r.finished], {}
    shown = sum(steps_done(r) for r in runs)
    progress = Progress(shown, sum(r.max_steps for r in runs), True)
    with runtime.StopSignals() as signals:
        while (waiting or going) and not signals.received:
            for slot in range(jobs):
                if slot not in going and waiting and not signals.received:
                    r = waiting.pop(0)
                    going[slot] = (r, start_run(r, slot, jobs, cuda, lock))
            time.sleep(0.2)
            for slot, (r, process) in list(going.items()):
                if process.poll() is not None:
                    del going[slot]
                    conclude(r, process.returncode, progress)
            steps = sum(steps_done(r) for r in runs)
            if going and steps > shown:
                progress.show(steps, ", ".join(f"{r.arm.name} seed {r.seed}" for r, _ in going.values()))
                shown = steps
        for _, process in going.values():  # once is enough: a run then ends its step and saves
            process.send_signal(signal.SIGTERM)
        for r, process in going.values():
            conclude(r, process.wait(), progress)
        progress.close()
        return signals.received


def conclude(r: Run, code, progress):
    if code == 0:
        write_json(r.directory / report.FINISHED, {"exit_code": 0})
    elif code not in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM):  # stopped by us, to go on later
        log = r.directory.with_suffix(".log")
        r.error = last_line(log.read_text(encoding="utf-8", errors="replace"))
        if code < 0:
            often = " (often for lack of memory)" if -code == signal.SIGKILL else ""
            r.error = f"killed by signal {-code}{often}, after: {r.error}"
        how = f"failed with exit code {code}: {r.error}" if code > 0 else r.error
        progress.say(f"{r.arm.name}, seed {r.seed}: {how} (all of it: {log})")


def dry_run(runs, jobs) -> int:
    """What will run; how long by the speed of the runs there are."""
    for r in runs:
        print(f"{r.arm.name}, seed {r.seed}: {'finished' if r.finished else f'{r.tokens:,} tokens'}")
    known = [s for r in runs if (s := report.median_speed(read_rows(r.directory / "metrics.jsonl"))) > 0]  # not NaN
    left = sum(r.tokens for r in runs if not r.finished)
    time_left = f"about {duration(left * len(known) / sum(known) / jobs)}" if known else "unknown before the first run"
    print(f"in all {left:,} tokens, {jobs} run(s) at the same time; time {time_left}")
    return 0


# ---------------------------------------------------------------------------------------


def compare(c: CompareConfig, common) -> int:
    """Makes the runs of a comparison and its report; returns the exit code."""
    arms, seeds = all_arms(c), all_seeds(c)
    if not c.name or Path(c.name).name != c.name:
        raise UserError(f"--name is {c.name!r}; give the comparison a name that can be a folder's")
    folder = Path(c.dir) / c.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock, locked(lock, lambda: f"{folder} is in use: runs of it are going on", 30):
        facts = set_up(folder, arms, common)
        runs = all_runs(folder, arms, seeds, common)
        cuda = [] if all(r.device == "cpu" for r in runs) else cuda_names()
        jobs = c.jobs or jobs_at_once(cuda)
        if c.dry_run:
            return dry_run(runs, jobs)
        write_json(folder / "comparison.json", facts)
        if received := run_all(runs, jobs, cuda, lock):
            print(f"signal {received}: stopped; the same command goes on")
            return 128 + received
        finished = {a.name: {r.seed: r.directory for r in runs if r.arm == a and r.finished} for a in arms}
        failed = {a.name: {r.seed: r.error for r in runs if r.arm == a and r.error} for a in arms}
        report.write(folder, finished, failed)
    return 1 if any(failed.values()) else 0


def main(argv=None) -> int:
    words = cli.words_of(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    return compare(cli.parse(CompareConfig, words[:split], __doc__), words[split + 1 :])


if __name__ == "__main__":
    sys.exit(cli.run(main))
