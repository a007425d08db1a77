"""docs/train.sbatch, run as SLURM would run it: a stub starts the tasks, a real SIGUSR1 announces the time limit."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from toy import ROOT, as_flags, finished, trace, wait_for_step

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
ntasks = int(os.environ["SLURM_NTASKS"])
ids = [os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}} for i in range(ntasks)]
tasks = [subprocess.Popen(sys.argv[1:], env=env) for env in ids]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
open(os.environ["STARTED"], "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STARTED.requeued"; fi
"""


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(config) starts the script with two tasks, as if on one node; SLURM's own programs are stubs."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n1"}
    path = f"{bin}{os.pathsep}{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | job | {"PATH": path, "STARTED": str(tmp_path / "srun"), "OMP_NUM_THREADS": "1"}

    def start(config):
        (tmp_path / "srun").unlink(missing_ok=True)
        command = ["bash", str(ROOT / "docs" / "train.sbatch"), *as_flags(config)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, **pipes, env=env, cwd=ROOT)

    return start


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_is_requeued_and_continues_exactly(toy, whole, sbatch, tmp_path):
    """Bugs: a signal that ends srun and leaves the tasks; an exit code that SLURM takes for a failure; a job that is
    queued again after it has finished; ranks that do not find each other without torchrun."""
    cut = replace(toy, run_name="slurm")
    job = sbatch(cut)
    wait_for_step(cut, 7, job)
    assert job.poll() is None, job.stdout.read()
    os.kill(int((tmp_path / "srun").read_text()), signal.SIGUSR1)
    finished(job, 128 + signal.SIGUSR1)
    requeued = tmp_path / "srun.requeued"
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    assert 7 <= len(trace(cut)) < toy.max_steps
    finished(sbatch(cut))
    assert requeued.read_text().count("requeue") == 1
    assert trace(cut) == trace(whole)
