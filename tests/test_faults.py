"""Nothing is lost: real training processes, killed or out of disk at every file-system call, and at random moments.

What counts is always the same: when the run is started again it ends with the trace, the validations,
the samples and the final weights and optimizer state of a run that was never disturbed, to the last bit.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import checkpoint
from support.files import read_json, sha256
from support.tracking import read_rows
from toy import as_flags, trace

HERE = Path(__file__).parent
COUNT, KILL, FULL = 0, 1, 2  # as in faults.c
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("cc"), reason="faults.c needs Linux and a C compiler"
    ),
]


class Server:
    """Starts a script as often as it is asked to, on a disk that fails on demand."""

    def __init__(self, folder):
        library = folder / "faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads cannot be forked
        env = (
            os.environ
            | threads
            | {"LD_PRELOAD": str(library), "PYTHONPATH": f"{HERE / 'children'}{os.pathsep}{HERE.parent}"}
        )
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, HERE / "fork_server.py"], env=env, **pipes)
        self.output = folder / "output.txt"

    def run(self, config, how=COUNT, at=0, kill_after=None) -> dict:
        """train.py with the config's flags; faults strike in its checkpoint_dir."""
        return self.start("train", as_flags(config), config.checkpoint_dir, how, at, kill_after)

    def start(self, script, argv, directory, how=COUNT, at=0, kill_after=None, **constants) -> dict:
        """Faults strike in what begins like `directory`; `constants` replace those of the script."""
        request = {"script": script, "argv": argv, "set": constants, "output": str(self.output)}
        request |= {"directory": str(directory), "how": how, "at": at, "kill_after": kill_after}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline()) | {"output": self.output.read_text()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


def outcome(config):
    """All of a finished run that must not depend on what happened on the way."""
    rows = [r for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] != "train"]
    evaluations = [(r["kind"], r["step"], r.get("loss"), r.get("text")) for r in rows]
    final = checkpoint.steps(config.run_dir)[0]
    hashes = {name: sha256(final / name) for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)}
    pointers = [read_json(config.run_dir / name) for name in ("best.json", "latest.json")]
    return trace(config), sorted(evaluations, key=str), final.name, hashes, pointers


def finish(server, config):
    """Starts the run again; nothing of an unfinished save may be left after it."""
    result = server.run(config)
    assert result["code"] == 0, result["output"]
    left = [p.name for p in config.run_dir.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    assert not left, f"left behind: {left}"
    return outcome(config)


@pytest.fixture
def short(toy):
    """13 steps, 163 windows in batches of 16: an epoch ends within step 11. Saves at 4, 8, 12 and 13; dropout on."""
    changes = dict(
        batch_size=8, total_batch_tokens=512, max_steps=13, save_interval=4, eval_interval=4, sample_interval=0
    )
    return replace(toy, **changes, keep_last=1)


@pytest.fixture
def undisturbed(server, short):
    config = replace(short, run_name="undisturbed", keep_last=9)
    assert server.run(config)["code"] == 0
    return config


def begin_at_step_8(config, undisturbed):
    """A run that was stopped at its second checkpoint."""
    shutil.rmtree(config.run_dir, ignore_errors=True)
    config.run_dir.mkdir(parents=True)
    shutil.copytree(undisturbed.run_dir / "step_00000008", config.run_dir / "step_00000008")
    shutil.copy(undisturbed.run_dir / "metrics.jsonl", config.run_dir)


def test_killed_at_every_file_system_call(server, short, undisturbed, tally):
    """A crash between any two calls or within a write: of two saves, two rotations, all that is written between."""
    begin_at_step_8(short, undisturbed)
    calls, expected = server.run(short)["calls"], outcome(undisturbed)
    assert calls > 100 and outcome(short) == expected
    for at in range(1, calls + 1):
        begin_at_step_8(short, undisturbed)
        killed = server.run(short, KILL, at)
        assert killed["code"] == -9, f"call {at} never came: {killed['output']}"
        assert finish(server, short) == expected, f"killed at call {at}"
        tally("kills survived")


def test_killed_while_going_back(server, short, undisturbed, tally):
    """The steps after the one it goes back to are void, and kept: a crash between two of the renames loses none."""

    def begin():
        shutil.rmtree(short.run_dir, ignore_errors=True)
        shutil.copytree(undisturbed.run_dir, short.run_dir)

    target = short.run_dir / "step_00000004"
    back = replace(short, resume=str(target), lr=1e-3, max_steps=5, keep_last=2)
    begin()
    calls = server.run(back)["calls"]
    expected = outcome(back)
    assert expected[2] == "step_00000005" and len(expected[0]) == 5
    for at in range(1, calls + 1, 2):
        begin()
        assert server.run(back, KILL, at)["code"] == -9
        assert finish(server, back) == expected, f"killed at call {at}"
        aside = checkpoint.those_aside(back.run_dir)
        assert sorted(step for _, step in aside) == [8, 12, 13], f"killed at call {at}"
        for path, _ in aside:
            checkpoint.verify(path)
        tally("kills survived")


def test_disk_full_from_one_of_the_file_system_calls_on(server, short, undisturbed, tally):
    """One line, exit 2, no part of a checkpoint left; with space again the run goes on as if nothing had been."""
    begin_at_step_8(short, undisturbed)
    calls = server.run(short)["calls"]
    for at in range(1, calls + 1, 2):
        begin_at_step_8(short, undisturbed)
        full = server.run(short, FULL, at)
        if full["code"] == 0:  # the calls left over only remove things
            continue
        assert full["code"] == 2, f"full at call {at}: {full}"
        assert "Traceback" not in full["output"] and "No space left on device" in full["output"], full["output"]
        assert not list(short.run_dir.glob(f"{checkpoint.LEFTOVER}*")), (
            f"full at call {at}: {os.listdir(short.run_dir)}"
        )
        for path in checkpoint.steps(short.run_dir):
            checkpoint.verify(path)
        assert finish(server, short) == outcome(undisturbed), f"full at call {at}"
        tally("full disks survived")


def test_killed_at_random_moments_until_done(server, toy, tally):
    """At least 15 kills over whole runs across epochs: resume of a resume of a resume."""
    config = replace(toy, run_name="undisturbed", save_interval=3)
    assert server.run(config)["code"] == 0
    expected, kills, seed = outcome(config), 0, 0
    while kills < 15:
        seed += 1
        victim, moments = replace(config, run_name=f"victim{seed}"), random.Random(seed)
        for _ in range(40):
            result = server.run(victim, kill_after=moments.uniform(0.1, 1.2))
            if result["code"] == 0:
                break
            assert result["code"] == -9, result["output"]
            kills += 1
        assert finish(server, victim) == expected, f"seed {seed}"
    tally("kills survived", kills)
