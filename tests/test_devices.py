"""Many processes give the numbers of one, and each of them may die, hang, disagree or be told to stop."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import checkpoint
from support.tracking import read_rows
from toy import ROOT, as_flags, finished, free_port, losses, torchrun, trace, vals, wait_for_step
from train import train

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def rank_of(process, rank) -> int:
    """The process id of one rank under a torchrun."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {rank}")


def assert_same_to_rounding(config, reference):
    assert [row[4] for row in trace(config)] == [row[4] for row in trace(reference)], "same batches"
    assert losses(config) == pytest.approx(losses(reference), abs=1e-5)
    assert vals(config) == pytest.approx(vals(reference), abs=1e-5)


@pytest.fixture
def plain(toy):
    """Without dropout, whose masks follow the rank, so that worlds can be compared."""
    return replace(toy, dropout=0.0, batch_size=2, save_interval=10, max_steps=30, keep_last=9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_worlds_1_2_1_and_sharded_weights_continue_each_other(plain, scenes, forks, tally, optimizer):
    """Each session of a run may have another number of processes, with weights sharded or not."""
    plain = replace(plain, optimizer=optimizer, hellaswag_interval=30, hellaswag_data=scenes)
    plain = replace(plain, embed_lr=9e-3, vector_lr=1e-3)
    one = replace(plain, run_name="one")
    train(one)
    two = replace(plain, run_name="two")
    for said in forks.ranks(two):
        assert "Warning" not in said, said
    fsdp = replace(plain, run_name="fsdp", fsdp=True)
    forks.ranks(fsdp)
    assert_same_to_rounding(two, one)
    assert_same_to_rounding(fsdp, one)
    scores = [[r for r in read_rows(c.run_dir / "metrics.jsonl") if r["kind"] == "hellaswag"] for c in (one, two, fsdp)]
    names = [k for k in scores[0][0] if "acc" in k or k == "examples"]
    assert all(rows[0][k] == scores[0][0][k] for rows in scores for k in names), "HellaSwag depends on the world"

    mixed = replace(plain, run_name="mixed")
    for kind, step in ((replace(mixed, fsdp=True), 10), (mixed, 20), (replace(mixed, fsdp=True), 30)):
        shutil.rmtree(mixed.run_dir / f"step_{step:08d}", ignore_errors=True)
        forks.ranks(kind) if kind.fsdp else train(kind)
        for path in checkpoint.steps(mixed.run_dir):  # as if it had been stopped at this step
            if checkpoint.step_of(path) > step:
                shutil.rmtree(path)
    assert_same_to_rounding(mixed, one)
    tally("worlds compared", 6)


def test_a_rank_that_dies_is_started_again(toy, whole, tally):
    """torchrun starts all ranks anew; they must find the checkpoint, and the lock that the dead have left."""
    process = torchrun(toy, "--max-restarts=1")
    wait_for_step(toy, 12, process)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    output = finished(process)
    assert "continued at step" in output, output
    assert trace(toy) == trace(whole)
    tally("kills survived")


def test_a_rank_that_hangs_is_given_up_after_the_timeout(toy, whole, forks):
    """Without a time-out a frozen machine holds all the others, for ever and silently."""
    toy = replace(toy, timeout=10.0)
    process = torchrun(toy)
    wait_for_step(toy, 12, process)
    frozen = rank_of(process, 1)
    os.kill(frozen, signal.SIGSTOP)
    began, relief = time.monotonic(), threading.Timer(60, os.kill, (frozen, signal.SIGKILL))
    relief.start()  # or this test would wait for ever too
    line = next((line for line in process.stdout if "has not answered" in line), "")
    assert time.monotonic() - began < 50, "it was not given up"
    assert "--timeout 10 seconds" in line and "saved checkpoints are intact" in line
    relief.cancel()
    os.kill(frozen, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    forks.ranks(toy)
    assert trace(toy) == trace(whole)


def test_a_signal_to_one_rank_stops_all_at_one_step(toy, whole, forks):
    """Slurm may signal one task only; the others would wait in the next reduction for ever."""
    process = torchrun(toy)
    wait_for_step(toy, 12, process)
    os.kill(rank_of(process, 1), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and output.count("saved in") == 1, output
    newest = checkpoint.steps(toy.run_dir)[0]
    assert checkpoint.step_of(newest) == len(trace(toy)) < 40, "saved at the step where all stopped"
    forks.ranks(toy)
    assert trace(toy) == trace(whole)


def by_hand(config, rank, port, **environment):
    """One of two ranks, started without torchrun."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    env = os.environ | address | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)} | environment
    command = [sys.executable, ROOT / "train.py", *as_flags(config)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, **pipes, env=env, cwd=ROOT)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="faults.c needs Linux and a C compiler")
def test_rank_0_that_cannot_save_tells_the_others(toy, tmp_path):
    """They would wait at the next step for a rank that has gone. Without torchrun, which would end them."""
    library = tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    checkpoints = str(toy.run_dir / checkpoint.LEFTOVER)  # only these find the disk full
    faults = {"LD_PRELOAD": str(library), "FAULTS_DIRECTORY": checkpoints, "FAULTS_AT": "1"}
    port = free_port()
    main, other = (finished(p, code=2, timeout=90) for p in [by_hand(toy, rank, port, **faults) for rank in (0, 1)])
    assert main.count("No space left on device") == 1 and "Traceback" not in main, main
    assert "error" not in other, "one process says it, for all"


def test_ranks_with_different_flags_or_data_refuse_to_start(toy, forks, tmp_path):
    """Two machines with two versions of a script or of the data train something that no one can repeat."""
    for said in forks.ranks(toy, replace(toy, lr=4e-3), code=2):
        assert "lr is 0.003 on rank 0, 0.004 on rank 1" in said
    for place, source in (("a", toy.data_dir), ("b", toy.data_dir + "_val")):
        shutil.copytree(source, tmp_path / place / "data")
        shutil.copytree(toy.data_dir if place == "b" else toy.data_dir + "_val", tmp_path / place / "data_val")
    for said in forks.ranks(replace(toy, data_dir="data"), code=2, places=(tmp_path / "a", tmp_path / "b")):
        assert re.search(r"data is \w+ on rank 0, \w+ on rank 1", said)
    assert not toy.run_dir.exists()
