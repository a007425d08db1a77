"""A preparation that is killed, or out of disk, at every file-system call and at random moments goes on when it is
started again, and ends with the bytes of one that was never disturbed."""

import gzip
import json
import random
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_processing_fineweb import MANIFEST, verify_shards
from support.files import sha256
from test_faults import FULL, KILL, pytestmark, server  # noqa: F401 (its marks, and a fixture)


class Job:
    """A command line of prepare_fineweb.py over parquet with several row groups and gzipped JSON lines; with texts
    that are skipped and one that is longer than a shard."""

    def __init__(self, folder, server, tokenizer, n, shard_tokens, *flags):  # noqa: F811
        self.folder, self.server = folder, server
        rng = np.random.default_rng(n)
        texts = [f"Text {i}: " + " ".join(map(str, rng.integers(0, 99, rng.integers(5, 60)))) for i in range(n)]
        texts[n // 3] = texts[n // 3] * 20  # longer than a shard
        texts[1::11] = [None] * len(texts[1::11])
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        half = 2 * n // 3
        pyarrow.parquet.write_table(
            pyarrow.table({"text": texts[:half]}), folder / "a.parquet", row_group_size=half // 4
        )
        with gzip.open(folder / "b.jsonl.gz", "wt") as f:
            f.writelines(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(texts[half:]))
        files = ["--local_files", str(folder / "a.parquet"), str(folder / "b.jsonl.gz")]
        self.argv = [*files, "--tokenizer", str(folder / "tokenizer"), "--val_share", "0.2", *flags]
        self.argv += ["--shard_tokens", str(shard_tokens)]
        self.constants = {"pieces.BATCH_CHARS": 400, "prepare_fineweb.LOCK_SECONDS": 20}

    def run(self, name, *more, **how):
        argv = [*self.argv, *more, "--out_dir", str(self.folder / name)]
        return self.server.start("prepare_fineweb", argv, self.folder / name, **how, **self.constants)

    def outcome(self, name):
        """Every file of both directories, hidden ones too."""
        return {
            f"{suffix}/{p.relative_to(self.folder / (name + suffix))}": sha256(p)
            for suffix in ("", "_val")
            for p in (self.folder / (name + suffix)).rglob("*")
            if p.is_file()
        }

    def check_unfinished(self, name, expected):
        """What has the name of a shard is that shard, and no manifest vouches for less than everything."""
        found = self.outcome(name)
        for path, digest in found.items():
            if path.endswith(".npy") and not path.rsplit("/", 1)[1].startswith("."):
                assert expected[path] == digest, f"{path} is not whole"
        if f"/{MANIFEST}" in found:
            assert {p for p in expected if p.endswith(".npy")} <= found.keys()
            assert verify_shards(self.folder / name) and verify_shards(self.folder / f"{name}_val")

    def remove(self, name):
        for suffix in "", "_val":
            shutil.rmtree(self.folder / (name + suffix), ignore_errors=True)


@pytest.fixture
def job(tmp_path, server, byte_tokenizer):  # noqa: F811
    """Four pieces, one of them of several shards."""
    made = Job(tmp_path, server, byte_tokenizer, 24, 900, "--num_proc", "1")
    result = made.run("undisturbed")
    assert result["code"] == 0, result["output"]
    return made


def test_killed_at_every_file_system_call(job, tally):
    """A crash between any two calls or within a write: of tokens, shards, facts, the plan, the manifests."""
    expected = job.outcome("undisturbed")
    assert len([p for p in expected if p.endswith(".npy")]) > 6 and not any(
        "/." in p for p in expected if not p.endswith("/.lock")
    )
    counted = job.run("counted")
    calls, n_pieces = counted["calls"], counted["output"].count("pieces made")
    assert calls > 100 and n_pieces > 2 and job.outcome("counted") == expected
    again_made = 0
    for at in range(1, calls + 1):
        job.remove("victim")
        killed = job.run("victim", how=KILL, at=at)
        assert killed["code"] == -9, f"call {at} never came: {killed['output']}"
        job.check_unfinished("victim", expected)
        again = job.run("victim")
        assert again["code"] == 0, f"killed at call {at}: {again['output']}"
        again_made += again["output"].count("pieces made")
        assert job.outcome("victim") == expected, f"killed at call {at}"
        tally("kills of a preparation survived")
    assert again_made < 0.7 * n_pieces * calls  # and did not begin anew


def test_disk_full_from_one_of_the_file_system_calls_on(job, tally):
    """One line, exit 2; with space again it goes on."""
    expected, calls = job.outcome("undisturbed"), job.run("counted")["calls"]
    for at in range(1, calls + 1, 2):
        job.remove("victim")
        full = job.run("victim", how=FULL, at=at)
        if full["code"] == 0:  # the calls left over only remove things
            continue
        assert full["code"] == 2, f"full at call {at}: {full}"
        assert "Traceback" not in full["output"] and "No space left on device" in full["output"], full["output"]
        job.check_unfinished("victim", expected)
        again = job.run("victim")
        assert again["code"] == 0 and job.outcome("victim") == expected, f"full at call {at}: {again['output']}"
        tally("full disks survived by a preparation")


@pytest.mark.parametrize("workers", [("--num_proc", "1"), ("--num_proc", "2", "--start_method", "fork")])
def test_killed_at_random_moments_until_done(workers, tmp_path, server, byte_tokenizer, tally):  # noqa: F811
    """10 kills of whole preparations: going on after going on, in the midst of repairing what a kill left behind."""
    job = Job(tmp_path, server, byte_tokenizer, 900, 10_000)
    assert job.run("undisturbed", "--num_proc", "1")["code"] == 0
    expected, kills, seed = job.outcome("undisturbed"), 0, 0
    while kills < 10:
        seed += 1
        moments, name = random.Random(seed), f"victim{seed}"
        for _ in range(60):
            result = job.run(name, *workers, kill_after=moments.uniform(0.05, 1.0))
            if result["code"] == 0:
                break
            assert result["code"] == -9, result["output"]
            job.check_unfinished(name, expected)
            kills += 1
        assert job.run(name, *workers)["code"] == 0
        assert job.outcome(name) == expected, f"seed {seed}"
    tally("kills of a preparation survived", kills)


def test_stopped_with_any_number_of_workers_and_finished_with_another(tmp_path, server, byte_tokenizer):  # noqa: F811
    """Bug: bytes that depend on which pieces were in flight."""
    job = Job(tmp_path, server, byte_tokenizer, 900, 10_000)
    assert job.run("undisturbed", "--num_proc", "1")["code"] == 0
    for first, second in ("1", "4"), ("4", "2"):
        # a worker makes fewer calls than the whole, and is missed within seconds: one line, exit code 2
        at = job.run("counted", "--num_proc", first, "--start_method", "fork")["calls"] * 2 // 3
        killed = job.run("victim", "--num_proc", first, "--start_method", "fork", how=KILL, at=at)
        assert killed["code"] in (-9, 2), killed["output"]
        assert job.run("victim", "--num_proc", second, "--start_method", "fork")["code"] == 0
        assert job.outcome("victim") == job.outcome("undisturbed")
        job.remove("victim"), job.remove("counted")
