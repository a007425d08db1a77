"""Weights & Biases and trackio, the real libraries without a network: they show a run, and cannot stop or change it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from toy import eventually, trace
from train import train


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_that_fails_costs_one_warning(toy, monkeypatch, capsys, library):
    """The tracker is a view; it must not be able to stop or change a run."""

    class Broken:
        def __getattr__(self, name):
            raise ConnectionError("no such host")

    monkeypatch.setitem(sys.modules, library, Broken())
    train(replace(toy, tracker=library, max_steps=5))
    train(replace(toy, run_name="without", max_steps=5))
    assert trace(toy) == trace(replace(toy, run_name="without"))
    assert capsys.readouterr().err.count(f"warning: {library} is off") == 1


def test_wandb_without_a_key_logs_offline_and_resumes_by_id(toy, capsys, monkeypatch, tmp_path):
    """The real library: its calls change between releases, and a second session must not become a second run."""
    pytest.importorskip("wandb")
    for name, value in (("WANDB_SILENT", "true"), ("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "netrc"))):
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for steps in (3, 6):
        time.sleep(1 - time.time() % 1)  # wandb names a log by the second in which it starts
        train(replace(toy, wandb_project="p", max_steps=steps))
    output = capsys.readouterr()
    assert "wandb is off" not in output.err and "wandb sync" in output.out, output
    identifier = (toy.run_dir / "wandb_id.txt").read_text().strip()
    logs = list((toy.run_dir / "wandb").glob(f"offline-run-*-{identifier}/*.wandb"))
    assert len(logs) == 2
    for log in logs:  # a process of wandb's own writes them
        assert eventually(
            lambda log=log: {b"train/loss", b"samples"} <= {*re.findall(rb"train/loss|samples", log.read_bytes())}
        )


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_run_made_anew_under_its_old_name_is_another_run(toy, monkeypatch, library):
    """Bug: the folder removed and the name used again, trackio showed both as one run with two curves."""
    begun = []

    class Library:
        Table = object

        def __getattr__(self, name):
            return lambda *args, **options: self

        def init(self, *args, **options):
            begun.append((args, {k: v for k, v in options.items() if k not in ("config", "settings", "dir")}))
            return self

    monkeypatch.setitem(sys.modules, library, Library())
    for steps in (2, 4):
        train(replace(toy, tracker=library, max_steps=steps))
    shutil.rmtree(toy.run_dir)
    train(replace(toy, tracker=library, max_steps=2))
    assert len(begun) == 3 and begun[0] == begun[1] and begun[1] != begun[2]
    assert "toy" in str(begun[0]), "still under its name"


@pytest.mark.slow
def test_trackio_has_one_run_with_its_curves(toy, tmp_path):
    """The real library, without a network: one run, though it was trained in two sessions, with a row for each step."""
    pytest.importorskip("trackio")
    environment = os.environ | {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    configs = [vars(replace(toy, tracker="trackio", max_steps=steps)) for steps in (20, 40)]
    code = f"""
import json, train, trackio
from trackio.sqlite_storage import SQLiteStorage

for config in {configs}:
    train.train(train.TrainConfig(**config))
runs = trackio.Api().runs("gpt")
print(json.dumps([(run.name, SQLiteStorage.get_logs("gpt", run.name, run_id=run.id)) for run in runs]))
"""  # in a process of its own: the library reads its folder's name once
    shown = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert "warning" not in shown.stderr
    [(name, rows)] = json.loads(shown.stdout.splitlines()[-1])
    assert name.startswith("toy")
    steps = {key: [row["step"] for row in rows if key in row] for key in ("train/loss", "train/lr", "val/perplexity")}
    assert steps["train/loss"] == steps["train/lr"] == list(range(1, 41))
    assert steps["val/perplexity"] == [0, 10, 20, 30, 40]
