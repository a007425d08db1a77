"""Weights & Biases and trackio, the real libraries without a network: they show a run, and cannot stop or change it."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest

from toy import eventually, trace
from train import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALONE = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
    "--window-size=1280,1000",
]


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
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_trackios_dashboard_shows_a_run_in_a_browser(toy, monkeypatch, tmp_path):
    """The real library and a real browser: one run, though it was trained in two sessions, with its curves."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    environment = os.environ | {"HOME": str(tmp_path), "GRADIO_ANALYTICS_ENABLED": "0"}
    for steps in (20, 40):  # in processes of their own: the library reads its folder's name once
        code = (
            f"import train; train.train(train.TrainConfig(**{vars(replace(toy, tracker='trackio', max_steps=steps))}))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=200)
    show = [sys.executable, "-u", "-c", "import trackio; trackio.show('gpt', open_browser=False, block_thread=True)"]
    server = subprocess.Popen(show, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        assert urllib.request.urlopen(address, timeout=30).status == 200
        browser = [CHROMIUM, *ALONE, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", f"{address}/?project=gpt"]
        page = subprocess.run(browser, capture_output=True, text=True, timeout=120).stdout
    finally:
        server.kill()
        server.wait()
    assert "Runs (1)" in page and "toy" in page
    for curve in ("train/loss", "train/lr", "val/loss", "val/perplexity"):
        assert f'"{curve}"' in page, f"{curve} is not on the dashboard"
    assert page.count("<canvas") + page.count('class="marks"') >= 4, "no curve is drawn"
