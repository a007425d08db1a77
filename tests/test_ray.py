"""A preparation on a Ray cluster: the bytes of a local one, also when a worker dies on the way."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import plot_run
import prepare_fineweb
from prepare_fineweb import PrepareConfig, prepare
from support import workers
from support.cli import UserError, run
from test_prepare import contents, write_parquet


def test_without_ray_the_error_says_what_to_install(tmp_path, byte_tokenizer, monkeypatch, capsys):
    """Bug: a traceback for what few people have installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    byte_tokenizer.save(tmp_path)
    Path("a.txt").write_text("text")
    assert run(lambda: prepare_fineweb.main(["--local_files", "a.txt", "--tokenizer", ".", "--engine", "ray"])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--engine ray needs Ray" in line and "pip install ray" in line


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one worker each, on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def busy_workers():
    """Processes of this user's Ray that run a task of ours; Ray writes the task's name where the command was."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::on_one_thread"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_two_ray_workers_one_of_them_killed_make_the_bytes_of_a_local_run(
    cluster, tmp_path, byte_tokenizer, monkeypatch, tally
):
    """Bugs: pieces in the order in which they are ready; one lost, or taken twice, when its worker dies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_run, "plot_lengths", lambda *arguments: None)
    byte_tokenizer.save(tmp_path)
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 10**6, rng.integers(10, 30_000)))) for _ in range(60)]
    write_parquet("a.parquet", [*texts, None, "", "half \ufffd pair"], row_group_size=4)
    options = dict(local_files="a.parquet", tokenizer=".", val_share=0.2, shard_tokens=200_000)
    prepare(PrepareConfig(out_dir="local", num_proc=1, **options))
    killed = []

    def kill_one():
        while not killed and threading.main_thread().is_alive():
            for pid in busy_workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    prepare(PrepareConfig(out_dir="ray", engine="ray", ray_address=cluster, **options))
    assert killed, "no worker was ever seen at work"
    assert contents("ray") == contents("local") and contents("ray_val") == contents("local_val")
    tally("Ray workers killed")


def test_a_cluster_that_does_not_answer():
    """Bug: minutes without a word, then Ray's own traceback."""
    for address in "127.0.0.1:9", "127.0.0.1:99999999":
        with pytest.raises(UserError, match=f"--ray_address {address}: nothing answers there"):
            workers.refuse_silence(address)
    for address in None, "auto", "local", "ray://127.0.0.1:9":  # Ray's to understand
        workers.refuse_silence(address)
