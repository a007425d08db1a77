"""Poor surroundings: closed pipes, other encodings, no git, no compiler, file systems that lack calls or are read-only.

None of it may cost the work. What cannot be had is done without, with one warning, or is one line and exit code 2.
"""

import errno
import fcntl
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train as train_module
from data_processing_fineweb import FineWebBatchIterator, FineWebDataLoader, FineWebDataset, ShardWriter
from support import files, runtime
from support.cli import UserError, run
from support.files import locked, read_json, sync_directory, write_whole
from support.runtime import StopSignals
from support.tracking import read_rows
from toy import ROOT, as_flags, wait_for_step

HERE = Path(__file__).parent
ALL_REFUSED = "flock=38,fsync=22,file_fsync=95,chmod=1,madvise=22"  # ENOSYS, EINVAL, EOPNOTSUPP, EPERM, EINVAL
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library, or mounts")


@pytest.fixture(autouse=True)
def new_warnings():
    """As in a new process: nothing has been warned of."""
    files.warn_once.cache_clear()


# --- standard output and error

TALKER = """
import subprocess, sys
from support.cli import run

def main():
    for i in range(3000):
        print("out ± ü \\ud800", i)
        print("err ± ü \\ud800", i, file=sys.stderr)
    with open(sys.argv[1], "w") as f:
        f.write(f"{f.fileno()}")
    subprocess.run([sys.executable, "-ISc", "import os; os.fstat(1), os.fstat(2)"], check=True)
    return 7

sys.exit(run(main))
"""


def talker(tmp_path, before="", after="", **environment):
    """(exit code, what stands in the file that it writes, its standard error) of a program that talks much."""
    path, script = tmp_path / "work", tmp_path / "talker.py"
    script.write_text(TALKER)
    command = f'{before} "{sys.executable}" "{script}" "{path}" {after}'
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=60)
    return done.returncode, path.read_text() if path.exists() else None, done.stderr.decode(errors="replace")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "after",
    [
        "| true; exit ${PIPESTATUS[0]}",
        "| head -3 >&2; exit ${PIPESTATUS[0]}",
        "2>&1 >&3 | true; exit ${PIPESTATUS[0]}",
        "2>&1 | true; exit ${PIPESTATUS[0]}",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        ">/dev/full",
        ">/dev/full 2>&1",
    ],
)
def test_a_closed_stream_ends_the_talking_never_the_work(tmp_path, after, unbuffered):
    """Bugs: `| head -3` ends a training with exit code 0 and no checkpoint; with `>&-` a data file becomes stdout."""
    before = "exec 3>/dev/null;"
    code, work, error = talker(tmp_path, before, after, PYTHONUNBUFFERED=unbuffered)
    assert (code, work is not None) == (7, True), error
    assert int(work) > 2, "a file got the number of a standard stream, or a child got no such stream"
    assert "Traceback" not in error and "Exception ignored" not in error, error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "ascii:strict", "utf-16"])
def test_any_encoding_of_the_terminal_will_do(tmp_path, encoding):
    """Bug: a training dies at a sample, an evaluation at "±", because the terminal is not UTF-8."""
    code, work, error = talker(tmp_path, after=">/dev/null", PYTHONIOENCODING=encoding)
    assert (code, work is not None) == (7, True), error
    assert encoding == "utf-16" or "err " in error


def test_c_locale(tmp_path):
    """Bug: the same under LC_ALL=C without Python's UTF-8 mode, as in cron and in containers."""
    code, work, error = talker(tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (code, work is not None) == (7, True), error
    assert r"err \xb1 \xfc \ud800 2999" in error


def test_a_terminal_that_is_closed(tmp_path):
    """Bug: after the terminal is gone a write answers EIO, not EPIPE, and that ends the run."""
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TALKER, str(tmp_path / "work")]
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=60) == 7 and (tmp_path / "work").exists()


def test_a_pipe_that_does_not_block(tmp_path):
    """Bug: another program made the pipe non-blocking, and a full pipe raises BlockingIOError instead of waiting."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TALKER.replace("3000", "20000"), str(tmp_path / "work")]  # much more than it holds
    with subprocess.Popen(command, env=env, stdout=write, stderr=subprocess.DEVNULL) as process:
        os.close(write)
        time.sleep(0.3)  # while it fills up
        with open(read, "rb") as f:
            said = f.read().decode(errors="replace")
    assert process.returncode == 7 and said.count("out ") == 20000


def test_a_file_that_cannot_hold_the_output_is_said_after_the_work(tmp_path):
    """Bug: `> log` on a full disk ends the run; or the output is cut and the exit code 0 says that all is well."""
    code = TALKER.replace("return 7", "return 0")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "work")], env=env, stdout=log, stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)), timeout=60,
        )  # fmt: skip
    assert done.returncode == 2 and (tmp_path / "work").exists()
    assert done.stderr.splitlines()[-1].endswith(b"error: standard output: File too large")


def test_a_broken_socket_is_no_closed_terminal(capsys):
    """Bug: a BrokenPipeError of a socket or of a worker's pipe was taken for `| head -1`, and the exit code was 0."""
    assert run(lambda: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 2
    assert "Broken pipe" in capsys.readouterr().err


# --- calls that a file system lacks


def test_only_a_taken_lock_is_a_lock(tmp_path, monkeypatch, capsys):
    """Bug: a file system without locks (Lustre, NFS, FUSE) gave "is in use by another process", and nothing ran."""

    def answer(number):
        def flock(*args):
            raise OSError(number, os.strerror(number))

        return flock

    with open(tmp_path / "lock", "w") as f:
        for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
            files.warn_once.cache_clear()
            monkeypatch.setattr(fcntl, "flock", answer(number))
            for _ in range(2):
                with locked(f, lambda: "taken"):
                    pass
            said = capsys.readouterr().err
            assert said.count("warning: ") == 1 and os.strerror(number) in said
        for number in (errno.EWOULDBLOCK, errno.EACCES):
            monkeypatch.setattr(fcntl, "flock", answer(number))
            with pytest.raises(UserError, match="taken"), locked(f, lambda: "taken"):
                pass


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_flush_that_a_file_system_lacks_is_done_without(tmp_path, monkeypatch, capsys, kind):
    """Bug: fsync of a folder on CIFS ended everything with a bare "[Errno 22] Invalid argument"."""
    real, number = os.fsync, 0

    def fsync(fd):
        if number and os.path.isdir(f"/proc/self/fd/{fd if type(fd) is int else fd.fileno()}") == (kind == "folder"):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for number in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF, errno.ENOSYS, errno.EPERM):
        files.warn_once.cache_clear()
        for i in range(3):
            write_whole(tmp_path / "file", str(i).encode())
            assert (tmp_path / "file").read_bytes() == str(i).encode()
        said = capsys.readouterr().err
        assert said.count("warning: ") == 1 and os.strerror(number) in said
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # a disk that fails is no file system that lacks a call
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            write_whole(tmp_path / "file", b"other")
        assert str(tmp_path) in str(caught.value), "the error names the place"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Bug: the temporary name held only the process id, and processes in two containers often have the same."""
    with ThreadPoolExecutor(2) as pool:
        writes = [pool.submit(write_whole, tmp_path / "file", bytes(10_000)) for _ in range(100)]
        assert [done.result() for done in writes] == [None] * 100


def test_macos_writes_the_cache_of_the_drive(tmp_path, monkeypatch):
    """Bug: fsync leaves the data in the drive there, and a power cut could take what a renamed checkpoint holds."""
    fcntl, done = pytest.importorskip("fcntl"), []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, what: done.append(what))
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("not enough"))
    write_whole(tmp_path / "file", b"whole")
    assert done == [51, 51]  # the file, and its folder


def test_a_pipe_that_is_named_as_a_file_is_written_to(tmp_path):
    """Bug: it was replaced by a file, and its reader waited for ever."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        write_whole(tmp_path / "pipe", b"whole")
        assert reader.communicate(timeout=60)[0] == b"whole"
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_cannot_be_flushed_leaves_nothing(tmp_path, monkeypatch):
    """Bug: each attempt on a full disk leaves one more hidden file there."""
    monkeypatch.setattr(files, "sync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_whole(tmp_path / "scores.jsonl", b"text")
    assert not list(tmp_path.iterdir())


def test_as_many_files_may_be_open_as_the_system_permits(monkeypatch):
    """Bug: a limit above the permitted one is refused, and the usual one of 256 stayed."""
    resource, limits = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.append(both))
    files.allow_open_files(5000)
    assert limits == [(1024, 1024)]


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch, capsys):
    """Bug: a folder that one may write to and not read (a drop box) could not be written to."""

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    sync_directory(tmp_path)
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_permissions_that_cannot_be_set(tmp_path, monkeypatch, capsys, number):
    """Bug: chmod is refused on CIFS, FAT and exFAT, and no checkpoint could be saved there."""

    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    (tmp_path / checkpoint.CONFIG).write_text("{}")
    monkeypatch.setattr(os, "chmod", refuse)
    for name in ("a.safetensors", "b.safetensors"):
        checkpoint.write_tensors(tmp_path / name, {"x": torch.ones(2)})
        with checkpoint.open_tensors(tmp_path / name) as f:
            assert f.get_tensor("x").tolist() == [1, 1]
    assert capsys.readouterr().err.count("warning: ") == 1


def shim(folder):
    """Environment that preloads refuse.c; none where there is no C compiler or no Linux."""
    if sys.platform != "linux" or not shutil.which("cc"):
        return {}
    library = folder / "refuse.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "refuse.c", "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "REFUSE": ALL_REFUSED}


def test_ctrl_c_saves_on_a_machine_that_lacks_everything(toy, tmp_path):
    """Bug: `train.py | tee log` and Ctrl-C: tee dies first, and the run with it: no checkpoint, and exit code 0.

    Here on a file system that lacks locks, flushes and permissions, with an ASCII terminal and without git."""
    toy = replace(toy, max_steps=1500, eval_interval=5, sample_interval=5, save_interval=0, sample_prompt="Über")
    shimmed = shim(tmp_path)
    machine = {"PYTHONIOENCODING": "ascii", "PATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(toy)]
    with open(tmp_path / "error", "w+") as error:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=error, env=os.environ | shimmed | machine, cwd=ROOT
        )
        assert process.stdout.readline().startswith(b"model ")
        process.stdout.close()
        wait_for_step(toy, 12, process)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
        error.seek(0)
        said = error.read()
    assert code == 130 and "Traceback" not in said, said
    assert len({row["step"] for row in read_rows(toy.run_dir / "metrics.jsonl") if row["kind"] == "sample"}) >= 2
    [path] = checkpoint.steps(toy.run_dir)
    checkpoint.verify(path)
    assert read_json(toy.run_dir / "run.json")["git_commit"] is None
    warnings = [line for line in said.splitlines() if line.startswith("warning: this file system")]
    if shimmed:
        assert len(warnings) == len(set(warnings)) == 4, said


@pytest.mark.slow
@linux_only
def test_preparation_and_evaluation_end_their_work_unheard(tmp_path):
    """Bug: a preparation piped into `true` left no manifest. Here also on a file system that lacks calls."""
    pipe = "| true; exit ${PIPESTATUS[0]}"
    flags = "--block_size 16 --n_layer 1 --n_head 1 --n_embd 16 --total_batch_tokens 256 --batch_size 4 --val_tokens 64"
    commands = [
        "prepare_fineweb.py --demo --out_dir corpus",
        f"train.py --data_dir corpus --max_steps 2 --hellaswag_interval 0 {flags} --device cpu --dtype float32",
        "train.py --eval_only --checkpoint checkpoints/gpt2-124m --data_dir corpus --hellaswag_interval 0 --device cpu",
        "export_hf.py --checkpoint checkpoints/gpt2-124m --out_dir exported",
    ]
    env = os.environ | shim(tmp_path) | {"OMP_NUM_THREADS": "1"}
    for command in commands:
        name, _, rest = command.partition(" ")
        line = f'"{sys.executable}" "{ROOT / name}" {rest} {pipe}'
        done = subprocess.run(["bash", "-c", line], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
    for path in ("corpus/manifest.json", "checkpoints/gpt2-124m/step_00000002", "exported/config.json"):
        assert (tmp_path / path).exists(), path


# --- git, compilers, signals


@pytest.mark.parametrize(
    "script, seconds",
    [
        (None, 10),
        ("sleep 60", 0.3),
        ('echo "fatal: detected dubious ownership in repository" >&2; exit 128', 10),
        ("echo HEAD; exit 128", 10),  # a repository without a commit
        ("kill -9 $$", 10),
    ],
)
def test_no_git_is_no_commit(tmp_path, monkeypatch, script, seconds):
    """Bug: on a slim image without git, training ended before its first step; a git that hangs would hang it."""
    if script is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runtime, "GIT_SECONDS", seconds)
    assert runtime.git_commit() is None


def test_git_names_the_commit(tmp_path, monkeypatch):
    (tmp_path / "git").write_text(f"#!/bin/sh\n[ \"$*\" = 'rev-parse HEAD' ] && echo {'a' * 40}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert runtime.git_commit() == "a" * 40


def test_compile_without_a_compiler_is_one_line(toy, tmp_path, monkeypatch, capsys):
    """Bug: 108 lines of traceback at the first step; they end with advice to a developer of torch."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert run(lambda: train_module.main([*as_flags(replace(toy, compile="on"))])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a C++ compiler" in said and "--compile off" in said


def test_a_compiler_that_fails_is_one_line(toy, monkeypatch, capsys):
    """Bug: the same page where a compiler is there and does not work."""

    def broken(model):
        def step(*args):
            raise torch._dynamo.exc.BackendCompilerFailed(torch.compile, RuntimeError("g++: no\nsuch header"), None)

        step.train = step.eval = lambda: None
        return step

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(runtime, "lacks_to_compile", lambda device: None)
    assert run(lambda: train_module.main([*as_flags(replace(toy, compile="on"))])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "g++: no such header" in said and "--compile off" in said


def test_auto_compiles_on_cuda_only_with_what_triton_needs(tmp_path, monkeypatch):
    """Bug: Triton is there and builds its launchers with a C compiler that is not: `auto` failed at the first step."""
    cuda, header = torch.device("cuda"), tmp_path / "Python.h"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(runtime.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not runtime.should_compile("auto", cuda) and "C compiler" in runtime.lacks_to_compile(cuda)
    for name in ("gcc", "mycc"):
        (tmp_path / name).touch(0o755)
    assert not runtime.should_compile("auto", cuda) and "Python.h" in runtime.lacks_to_compile(cuda)
    header.touch()
    assert runtime.should_compile("auto", cuda)
    monkeypatch.setenv("CC", "elsewhere")
    assert not runtime.should_compile("auto", cuda) and "elsewhere" in runtime.lacks_to_compile(cuda)
    monkeypatch.setenv("CC", "mycc")
    assert runtime.should_compile("auto", cuda)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    assert not runtime.should_compile("auto", cuda) and "triton" in runtime.lacks_to_compile(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert not runtime.should_compile("auto", cuda)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_each_signal_asks_for_a_stop(name):
    """Bug: SIGHUP, when the terminal is closed, killed at once; the others saved."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            with pytest.raises(runtime.Stopped):
                signals.check()
        assert signals.received == number and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_stays_in_force():
    """Bug: a run under nohup takes SIGHUP for itself and stops when its user logs out."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- shards and read-only folders


def stream(folder, tokens=4000):
    writer = ShardWriter(folder, 512, tokens // 2)
    writer.add(np.arange(tokens) % 512, 1)
    writer.close()
    return FineWebDataset(folder, 16)


@pytest.mark.parametrize("size", [0, 128, 300, 3000])
def test_a_shard_cut_short_while_it_is_read_is_named(tmp_path, size):
    """Bug: a mapped file that becomes shorter in place kills the process: bus error, exit code 135, no message."""
    dataset = stream(tmp_path)
    batches = FineWebBatchIterator(FineWebDataLoader(dataset, 4, 4, shuffle=False), 0, prefetch=1)
    next(batches)
    os.truncate(tmp_path / "shard_000000.npy", size)
    with pytest.raises(UserError, match=r"shard_000000\.npy: was cut short while it was in use"):
        for _ in range(60):
            next(batches)


READ_ONLY = """
d="$1"; shift
mount --bind "$d" "$d" && mount -o remount,ro,bind "$d" && cd "$d" && ! touch x 2>/dev/null && exec "$@"
"""


@pytest.mark.slow
@linux_only
def test_read_only_folders(toy, tmp_path):
    """Bugs: "[Errno 30] ..." for a finished corpus on a read-only mount; a traceback for a run's folder there."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, "sh", "-c", READ_ONLY, "sh", tmp_path, "true"]).returncode
    ):
        pytest.skip("this machine lets nobody mount a folder read-only")
    toy, env = replace(toy, max_steps=4), os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(folder, script, *flags, code=0):
        command = [*unshare, "sh", "-c", READ_ONLY, "sh", folder, sys.executable, ROOT / script, *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout + done.stderr

    corpus = Path(toy.data_dir).parent
    assert "finished   step 4" in start(corpus, "train.py", *as_flags(toy))
    runs = Path(toy.checkpoint_dir)
    for config in (replace(toy, run_name="new"), replace(toy, max_steps=8)):
        said = start(runs, "train.py", *as_flags(config), code=2)
        assert said.count("\n") == 1 and "Read-only file system" in said and str(config.run_dir) in said
    assert "validation loss" in start(runs, "train.py", *as_flags(replace(toy, eval_only=True)))
    branch = replace(toy, checkpoint_dir=str(tmp_path / "others"), resume=str(toy.run_dir), max_steps=6)
    assert "finished   step 6" in start(runs, "train.py", *as_flags(branch))
    assert "greedy" in start(runs, "inference.py", "--checkpoint", toy.run_dir, "--preset", "greedy", "--device", "cpu",
                             "--prompt", "a", "--max_new_tokens", "3")  # fmt: skip
    assert "Read-only file system" in start(runs, "export_hf.py", f"--checkpoint={toy.run_dir}", code=2)

    demo = tmp_path / "demo"
    demo.mkdir()
    subprocess.run([sys.executable, ROOT / "prepare_fineweb.py", "--demo"], env=env, cwd=demo, check=True)
    assert "there already" in start(demo, "prepare_fineweb.py", "--demo")
    short = ["--max_steps", "1", "--checkpoint_dir", tmp_path / "demo_runs", "--val_tokens", "512", "--device", "cpu"]
    assert "finished   step 1" in start(demo, "train.py", "--preset", "demo", *short)
