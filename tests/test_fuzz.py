"""Hostile and damaged input: whatever a file or a command line holds, the answer is success or one line.

The files are valid ones with random damage, and those of a checkpoint are sealed anew, because a
hostile file comes with a hash that matches. Every case runs in this process, under a limit on its address
space a little above what it uses: memory taken because a header announces it is a failure, even where
nothing is ever written to it. The last part is fast and keeps what was found, one case each.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import re
import shutil
import struct
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint
import data_processing_fineweb as data
import hellaswag_eval
import inference
import pieces
import plot_run
import prepare_fineweb
import train as train_module
from checkpoint import CONFIG, MANIFEST, MODEL, OPTIMIZER, STATE, Position, Saver
from data_processing_fineweb import FineWebDataLoader, FineWebDataset, ShardWriter
from support import files, runtime
from support.cli import UserError, run
from support.tracking import Log, Metrics
from tokenizer import load_tokenizer
from train import TrainConfig

SECONDS = 10.0  # for one case; what is slower than that hangs
HEADROOM = 2**30  # bytes of address space for one module's cases; every file here is smaller than 10 MB
LINE = 4200  # characters of a message, with the script's name


def cases(n):
    return settings(max_examples=n, suppress_health_check=list(HealthCheck), database=None)


def refusal(function) -> str | None:
    """The one line with which function() is refused; None where it succeeds. Anything else fails the test."""

    def watched():
        try:
            function()
        except UserError as error:
            cause = error
            while cause is not None:
                assert not isinstance(cause, MemoryError), "memory was taken because the input asked for it"
                cause = cause.__cause__ or cause.__context__
            raise

    began, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(out):
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(err):
            code = run(watched)
    assert time.monotonic() - began < SECONDS
    assert not warned, f"a warning is a line too: {warned[0].message}"
    if code == 0:
        return None
    lines = [line for line in err.getvalue().splitlines() if not re.match("checkpoint |the first ", line)]
    assert code == 2 and len(lines) == 1 and "error: " in lines[0] and len(lines[0]) < LINE, (code, lines)
    return lines[0]


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Speed: nothing here waits for the disk."""
    monkeypatch.setattr(files.os, "fsync", lambda fd: None)


@pytest.fixture
def little_memory():
    """The address space of this process ends HEADROOM above what it holds now."""
    resource = pytest.importorskip("resource")
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("only Linux tells and limits the address space")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + HEADROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---------------------------------------------------------------------------------------
# Valid files, to be damaged.


def write_shards(folder, byte_tokenizer, seed=0, sizes=(40, 25)):
    writer = ShardWriter(folder, 512, 1000)
    for size in sizes:
        writer.add(np.random.default_rng(seed).integers(0, 512, size), size * 3)
        writer.flush()
        seed += 1
    facts = {"name": "byte", "vocab_size": 512, "fingerprint": byte_tokenizer.fingerprint()}
    return writer.close(tokenizer=facts, source={"files": {"a.txt": 3}}, arguments={"shard_tokens": 1000})


@pytest.fixture
def shards(tmp_path, byte_tokenizer):
    """data/ and data_val/ with a tokenizer, as train.py wants them."""
    for seed, name in enumerate(("data", "data_val")):
        write_shards(tmp_path / name, byte_tokenizer, 10 * seed)
        (tmp_path / name / "tokenizer").mkdir()
        byte_tokenizer.save(tmp_path / name / "tokenizer")
    return tmp_path / "data"


@pytest.fixture
def toy(shards, tmp_path):
    """A run at step 0 whose directory holds the checkpoint of step 3."""
    config = TrainConfig(
        run_name="toy", checkpoint_dir=str(tmp_path / "runs"), data_dir=str(shards), block_size=8, n_layer=1, n_head=1,
        n_embd=8, sample_interval=0, max_steps=10, batch_size=2, total_batch_tokens=16, hellaswag_interval=0,
        device="cpu", dtype="float32", compile="off",
    )  # fmt: skip
    rt = runtime.Runtime(torch.device("cpu"), "float32")
    toy_data = train_module.open_data(config, rt)
    net = train_module.build(config, rt, toy_data.tokenizer.vocab_size)
    net.model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    net.optimizer.step()
    net.optimizer.zero_grad()
    about = train_module.describe_run(config, net, toy_data)
    log, saver = Log(config, rt, about), Saver(config, rt, about["identity"], toy_data.tokenizer)
    with saver:
        log.open(Position())
        saver.save(net, Position(3, 6, 1.5), log)
    log.metrics.close()
    for name in ("latest.json", "best.json", "run.json"):  # hints and records; nothing may depend on them
        (config.run_dir / name).write_bytes(b'{"step": "\xff')
    return SimpleNamespace(config=config, rt=rt, net=net, log=log, saver=saver)


@pytest.fixture
def saved(toy) -> Path:
    """The checkpoint of the toy run."""
    return checkpoint.steps(toy.config.run_dir)[0]


def reseal(path):
    """Writes a manifest that agrees with the files: what is then refused is refused for its content."""
    listed = {
        p.name: {"size": p.stat().st_size, "sha256": checkpoint.sha256(p)} for p in path.iterdir() if p.name != MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps({"format_version": 1, "files": listed}))


def unpack(path):
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def pack(header: bytes, content: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + content


# ---------------------------------------------------------------------------------------
# Damage.


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


WEIRD = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**9, 10**400, -(10**400), 1.5, -0.0, 1e-300, 1e308,
    float("nan"), float("inf"), "", "1", "x", "../../etc/passwd", "/etc/passwd", "..", "\0", "a\nb", "\x1b[2J",
    "\ud800", "x" * 5000, [], {}, [[]], [None], [1, 2], {"a": 1}, nested(50), nested(400),
]  # fmt: skip
NUMBERS = [0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]


@st.composite
def damaged(draw, content: bytes, most=4):
    """The bytes after 1 to `most` accidents, half of them near the beginning, where the headers are."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, min(len(content), 160) if draw(st.booleans()) else len(content)))
        n = draw(st.integers(1, 40))
        match draw(st.sampled_from(["set", "cut", "insert", "delete", "number", "repeat"])):
            case "set":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del content[at : at + n]
            case "repeat":
                content[at:at] = content[at : at + n]
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
                content[at : at + size] = number.to_bytes(size, "little")
    return bytes(content)


@st.composite
def altered(draw, value, most=3):
    """The JSON value as bytes, after 1 to `most` changes somewhere in the tree; now and then no longer JSON."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, most))):
        container, key = root, 0
        while isinstance(container[key], dict | list) and container[key] and draw(st.integers(0, 3)):
            container = container[key]
            key = draw(st.sampled_from(list(container) if isinstance(container, dict) else range(len(container))))
        match draw(st.sampled_from(["replace", "replace", "delete", "rename", "repeat"])):
            case "replace":
                container[key] = copy.deepcopy(draw(st.sampled_from(WEIRD)))
            case "delete" if container is not root:
                del container[key]
            case "rename" if isinstance(container, dict):
                container[draw(st.sampled_from([k for k in WEIRD if isinstance(k, str)]))] = container.pop(key)
            case "repeat" if isinstance(container, list) and container is not root:
                container.append(copy.deepcopy(container[key]))
    text = json.dumps(root[0]).encode()
    if isinstance(root[0], dict) and root[0] and draw(st.integers(0, 7)) == 0:  # the first key twice
        first, other = json.dumps(next(iter(root[0]))), json.dumps(draw(st.sampled_from(WEIRD)))
        text = f"{{{first}: {other}, ".encode() + text[1:]
    return draw(damaged(text, 2)) if draw(st.integers(0, 7)) == 0 else text


# ---------------------------------------------------------------------------------------
# Shards and their manifests.


def npy(descr="<u2", shape=(10,), version=(1, 0), order=False, text=None, content=bytes(20)) -> bytes:
    """A .npy file that may say anything in its header."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}, }}\n" if text is None else text
    header = text.encode(errors="surrogatepass")
    return (
        b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", len(header)) + header + content
    )


def llmc(magic=20240520, version=1, n=10, content=bytes(20)) -> bytes:
    return struct.pack("<3i", magic, version, n).ljust(1024, b"\0") + content


def read_everything(folder):
    """All that reading shards of a folder can mean, for a model of 512 ids and windows of 4."""
    dataset = FineWebDataset(folder, 4, "train", 512)
    dataset.fingerprint()
    FineWebDataLoader(dataset, 2, 2).batch(5)
    dataset.tokens(0, dataset.n_tokens)


@pytest.mark.slow
@cases(750)
@given(st.data())
def test_damaged_shards(tmp_path, tally, little_memory, draw):
    kind = draw.draw(st.sampled_from([npy(), npy("<u4", (5,)), npy(version=(2, 0)), llmc(), llmc(20240801, 7, 5)]))
    name = "shard.bin" if b"NUMPY" not in kind[:8] else "shard.npy"
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(draw.draw(damaged(kind)))
    refusal(lambda: read_everything(tmp_path / "d"))
    tally("fuzz cases")


HEADER_WORDS = ["<u2", "<u4", ">u2", "|O", "O", "<f4", "<u8", "u2", "|V4", "<U9999999", "", "<u2,<u2", "(9,)<u2", "\\d",
    [("a", "<u2")], [("a", "<u2", (2**40,))], [], (), None, 1, ("<u2", (2**40,)), "\ud800", "L", "a4"]  # fmt: skip
SHAPES = [(10,), (), (10, 1), (2**62,), (2**64,), (10**400,), (-1,), (True,), (10.0,), ("10",), 10, None, [10], (0,),
    (1,) * 3000, {}]  # fmt: skip
TEXTS = ["", "{", "{}", "(" * 9000, "-" * 9000 + "1", "[" * 99 + "]" * 99, "'" * 50, "{'shape': (10L,)}", "1is 2\n",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (10L,), }", "'\\d'", "\ud800", "0" * 5000, "9" * 5000, "f()",
    "{'descr': '<u2', 'descr': '|O', 'fortran_order': 0, 'shape': (1,)}"]  # fmt: skip


@pytest.mark.slow
@cases(600)
@given(
    st.tuples(
        st.sampled_from(HEADER_WORDS),
        st.sampled_from(SHAPES),
        st.sampled_from([(1, 0), (2, 0), (3, 0), (0, 0), (1, 9)]),
        st.sampled_from([False, True, None, 0, "x"]),
        st.one_of(st.none(), st.none(), st.sampled_from(TEXTS)),
        st.sampled_from([b"", bytes(20), bytes(40), bytes(21)]),
    )
)
def test_shard_headers_that_say_anything(tmp_path, tally, little_memory, header):
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "shard.npy").write_bytes(npy(*header))
    refusal(lambda: read_everything(tmp_path / "d"))
    tally("fuzz cases")


@pytest.mark.slow
@cases(750)
@given(st.data())
def test_altered_shard_manifests(toy, tally, little_memory, draw):
    """Read as data alone, by `verify`, and by training, which compares tokenizers and refuses an overlap."""
    folder = Path(toy.config.data_dir)
    original = (folder / data.MANIFEST).read_bytes()
    try:
        (folder / data.MANIFEST).write_bytes(draw.draw(altered(json.loads(original))))
        refusal(lambda: read_everything(folder))
        refusal(lambda: data.verify_shards(folder))
        refusal(lambda: train_module.open_data(toy.config, toy.rt))
    finally:
        (folder / data.MANIFEST).write_bytes(original)
    tally("fuzz cases")


@pytest.mark.slow
@cases(200)
@given(st.data())
def test_altered_manifests_of_a_finished_preparation(prepared, tally, little_memory, draw):
    """A preparation that is asked for again reads what it wrote; it tells the counts, or what is wrong with them."""
    path = prepared / "out" / data.MANIFEST
    original = path.read_bytes()
    try:
        path.write_bytes(draw.draw(altered(json.loads(original), 2)))
        refusal(lambda: prepare(prepared))
    finally:
        path.write_bytes(original)
    tally("fuzz cases")


def prepare(folder):
    files = dict(local_files=folder / "a.txt", val_files=folder / "b.txt", tokenizer=folder / "tokenizer")
    return prepare_fineweb.prepare(prepare_fineweb.PrepareConfig(out_dir=folder / "out", **files, num_proc=1))


@pytest.fixture
def prepared(tmp_path, byte_tokenizer):
    """A folder with two texts, a tokenizer, and the shards made of them."""
    (tmp_path / "tokenizer").mkdir()
    byte_tokenizer.save(tmp_path / "tokenizer")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 9)
    assert refusal(lambda: prepare(tmp_path)) is None
    return tmp_path


# ---------------------------------------------------------------------------------------
# Checkpoints, opened for sampling and for training.


def load(toy, saved):
    """Both ways to open a checkpoint: by `load_model`, and by a run that continues. What it continues from is sane."""
    refusal(lambda: checkpoint.load_model(saved.parent))
    found = []
    if refusal(lambda: found.append(toy.saver.resume(toy.net))) is None:
        [at] = found
        assert type(at.step) is type(at.samples_seen) is int and at.step >= 0 and 0 <= at.samples_seen < 2**63
        assert 0 <= at.seconds < float("inf")


def change(toy, saved, name, content: bytes, sealed=True):
    """Loads the checkpoint with other bytes in one of its files, then puts the old ones back."""
    before = {file: (saved / file).read_bytes() for file in (name, MANIFEST)}
    try:
        (saved / name).write_bytes(content)
        if sealed:
            reseal(saved)
        load(toy, saved)
    finally:
        for file, old in before.items():
            (saved / file).write_bytes(old)


@pytest.mark.slow
@cases(300)
@given(st.data())
def test_altered_checkpoint_manifests(toy, saved, tally, little_memory, draw):
    change(toy, saved, MANIFEST, draw.draw(altered(json.loads((saved / MANIFEST).read_bytes()))), sealed=False)
    tally("fuzz cases")


@pytest.mark.slow
@pytest.mark.parametrize("name, n", [(CONFIG, 450), (STATE, 450), ("tokenizer.json", 300)])
def test_altered_json_of_a_sealed_checkpoint(toy, saved, tally, little_memory, name, n):
    @cases(n)
    @given(altered(json.loads((saved / name).read_bytes())))
    def check(content):
        change(toy, saved, name, content)
        tally("fuzz cases")

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_altered_headers_of_a_sealed_checkpoint(toy, saved, tally, little_memory, name):
    header, content = unpack(saved / name)

    @cases(450)
    @given(altered(header))
    def check(text):
        change(toy, saved, name, pack(text, content))
        tally("fuzz cases")

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, CONFIG])
def test_damaged_bytes_of_a_checkpoint(toy, saved, tally, little_memory, name):
    @cases(250)
    @given(damaged((saved / name).read_bytes()))
    def check(content):
        change(toy, saved, name, content)
        tally("fuzz cases")

    check()


# ---------------------------------------------------------------------------------------
# Metrics, tokenizers, HellaSwag.

ROWS = [
    {"kind": "train", "step": 1, "tokens": 8, "seconds": 0.1, "loss": 6.2, "lr": 1e-3, "tokens_per_second": 80},
    {"kind": "val", "step": 1, "tokens": 8, "seconds": 0.1, "loss": 6.2, "perplexity": 490.0, "targets": 8},
    {"kind": "train", "step": 2, "tokens": 16, "seconds": 0.2, "loss": 6.0, "lr": 1e-3, "tokens_per_second": 80},
    {"kind": "hellaswag", "step": 2, "tokens": 16, "seconds": 0.2, "completion_acc_norm": 0.25,
     "completion_acc_norm_stderr": 0.01},
    {"kind": "val", "step": 2, "tokens": 16, "seconds": 0.2, "loss": 6.0, "perplexity": 403.4, "targets": 8},
]  # fmt: skip


@st.composite
def altered_lines(draw, rows):
    """Rows as lines of JSON, one or two of them altered, the whole now and then damaged."""
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(draw(st.integers(1, 2))):
        i = draw(st.integers(0, len(rows) - 1))
        lines[i] = draw(altered(rows[i], 2))
    text = b"\n".join(lines) + draw(st.sampled_from([b"\n", b"\n", b"", b"\0\0\0", b"\n\n", b'{"kind": "val", "st']))
    return draw(damaged(text)) if draw(st.integers(0, 3)) == 0 else text


@pytest.mark.slow
@cases(500)
@given(altered_lines(ROWS))
def test_altered_metrics_of_a_run_that_is_resumed(toy, tally, little_memory, content):
    path = toy.config.run_dir / "metrics.jsonl"

    def continue_run():
        at = Position(2, 4, 1.0)
        try:
            toy.log.open(at)
            checkpoint.best_step(toy.config.run_dir, toy.log.metrics.val_losses())
            toy.log.finished(at), toy.log.summary(at)
        finally:
            toy.log.metrics.close()

    path.write_bytes(content)
    refusal(continue_run)
    refusal(lambda: plot_run.read_metrics(path))
    tally("fuzz cases")


@pytest.mark.slow
@cases(40)
@given(altered_lines(ROWS), st.sampled_from(["tokens", "steps", "seconds"]))
def test_altered_metrics_are_drawn(tmp_path, tally, content, x):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    refusal(lambda: plot_run.plot([tmp_path], tmp_path / "curves.png", x))
    tally("fuzz cases")


def use_tokenizer(path):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("Some text, and é \ud83d! " + "a" * 30 + "c ab")
    tokenizer.decode([*ids, 0, tokenizer.eot_token, tokenizer.vocab_size - 1])
    tokenizer.token_bytes(), tokenizer.fingerprint(), tokenizer.save(path.parent / "copy")


@pytest.mark.slow
@cases(450)
@given(st.data())
def test_altered_tokenizers(tmp_path, byte_tokenizer, tally, little_memory, draw):
    (tmp_path / "copy").mkdir(exist_ok=True)
    original = json.loads(byte_tokenizer.backend.to_str())
    (tmp_path / "tokenizer.json").write_bytes(draw.draw(altered(original)))
    refusal(lambda: use_tokenizer(tmp_path / "tokenizer.json"))
    tally("fuzz cases")


EXAMPLE = {"activity_label": "Sitting", "ctx": "A man sits", "ctx_a": "A man sits", "ctx_b": "", "label": 2}
EXAMPLE["endings"] = ["down.", "up.", "é", "on a roof."]


@pytest.mark.slow
@cases(500)
@given(altered_lines([EXAMPLE] * 3))
def test_altered_hellaswag_lines(tmp_path, byte_tokenizer, tally, little_memory, content):
    (tmp_path / "hellaswag.jsonl").write_bytes(content)

    def read():
        hellaswag_eval.prepare(byte_tokenizer, hellaswag_eval.load_examples(tmp_path / "hellaswag.jsonl"), 8)

    refusal(read)
    tally("fuzz cases")


def write_parquet(path):
    import pyarrow.parquet

    table = pyarrow.table({"text": ["hello é", "b" * 50, None] * 5, "n": [1] * 15})
    pyarrow.parquet.write_table(table, path, compression="zstd")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, n", [("a.parquet", 250), ("a.jsonl.gz", 150), ("a.jsonl.zst", 150), ("a.jsonl", 150), ("a.txt", 50)]
)
def test_damaged_sources_of_text(tmp_path, tally, name, n):
    """What prepare_fineweb.py reads: its text is somebody else's."""
    pyarrow = pytest.importorskip("pyarrow")
    path, lines = tmp_path / name, b'{"text": "hello"}\n{"text": null}\n\n{"text": "\\ud83d", "n": 5}\n'
    if name == "a.parquet":
        write_parquet(path)
    elif name == "a.jsonl.zst":
        path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(lines, mtime=0) if name.endswith(".gz") else lines)

    @cases(n)
    @given(damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        refusal(lambda: list(pieces.documents(pieces.Piece(0, "train", [str(path)]), prepare_fineweb.PrepareConfig())))
        tally("fuzz cases")

    check()


# ---------------------------------------------------------------------------------------
# Command lines.

VALUES = [
    "0", "-1", "1", "2", "3", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 21, "9" * 400, "9" * 5000, "", " ", "x",
    "é", "\udcff", "a\nb", "--", "-x", "=", "None", "True", "1.5", "0x10", "1_000", "٣", "x" * 300, "x" * 5000, "[",
    "*", ".", "cuda:0", "cuda:" + "9" * 21, "cpu:1", "cpu:", "mps", "meta", "float16", "greedy", "demo", "on", "never",
]  # fmt: skip


@functools.cache
def flags_of(main):
    """Every flag that a script's --help names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["--help"])
    return sorted(set(re.findall(r"--\w+", out.getvalue())) - {"--help"})


@st.composite
def command_lines(draw, main):
    argv = []
    for _ in range(draw(st.integers(0, 5))):
        flag, value = draw(st.sampled_from(flags_of(main) or ["--none"])), draw(st.sampled_from(VALUES))
        argv += draw(
            st.sampled_from([[flag, value], [flag, value], [flag, value], [f"{flag}={value}"], [flag], [value]])
        )
    return argv


def no_hub(*args):
    raise UserError("no hub here")


@pytest.fixture
def desk(toy, tmp_path, monkeypatch):
    """A working directory with a run, HellaSwag and texts; nothing stands on stdin, and there is no hub."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("a typed line\n"))
    monkeypatch.setattr(prepare_fineweb, "hub_files", no_hub)
    return tmp_path


CPU = ["--device", "cpu", "--dtype", "float32"]
ENDINGS = {  # script -> what ends its command lines, so that no work begins, or little
    "train": [["--data_dir", "missing"], ["--data_dir", "x" * 300]],
    "inference": [
        ["--checkpoint", "missing"],
        ["--checkpoint", "../runs/toy", "--max_new_tokens", "2", "--num_samples", "2", "--prompt_file", "../none.txt"],
        ["--checkpoint", "../runs/toy", "--max_new_tokens", "2", "--num_samples", "2", "--device", "cpu"],
    ],
    "hellaswag_eval": [
        ["--data", "missing.jsonl"],
        ["--checkpoint", "../runs/toy", "--data", "../hellaswag.jsonl", "--device", "cpu"],
    ],
    "prepare_fineweb": [["--local_files", "missing.txt"], ["--local_files", "x" * 300 + ".txt"]],
    "checkpoint": [["verify", "../runs/toy"], ["verify"], []],
    "data_processing_fineweb": [["verify", "../data"], ["verify"], []],
    "plot_run": [["missing"], ["--x", "y"], ["."]],
}


@pytest.mark.slow
@pytest.mark.auto  # one line whatever the device and the dtype
@pytest.mark.parametrize(
    "script, n",
    [("train", 450), ("inference", 300), ("hellaswag_eval", 200), ("prepare_fineweb", 300), ("checkpoint", 50),
     ("data_processing_fineweb", 50), ("plot_run", 150)],
)  # fmt: skip
def test_command_lines(desk, tally, little_memory, script, n):
    main = __import__(script).main

    @cases(n)
    @given(command_lines(main), st.sampled_from(ENDINGS[script]))
    def check(argv, ending):
        refusal(lambda: main([*argv, *ending]))
        tally("fuzz cases")

    check()


# ---------------------------------------------------------------------------------------
# What was found, kept: fast, one case for each fault.


def test_an_error_is_one_printable_line(capsys):
    """Bugs: a name with a newline made two lines, one with an escape sequence cleared the screen, one of
    60 MB was printed whole."""

    def fail():
        raise UserError("tensor a\nb \x1b[2J \udcff é " + "x" * 10**6 + "; do this")

    assert run(fail) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and r"a\nb \x1b[2J \udcff é xxx" in line and len(line) < LINE and "; do this" in line


@pytest.mark.parametrize(
    "script", ["checkpoint", "data_processing_fineweb", "plot_run", "inference", "prepare_fineweb"]
)
def test_a_name_that_no_file_can_have(script, tmp_path, monkeypatch):
    """Bug: the system's "File name too long" came with a traceback, from is_file() and its like."""
    monkeypatch.chdir(tmp_path)
    name = "x" * 300
    argv = {"plot_run": [name], "inference": [*CPU, "--checkpoint", name], "prepare_fineweb": ["--local_files", name]}
    assert name in refusal(lambda: __import__(script).main(argv.get(script, ["verify", name])))


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_as_the_file_to_write(tmp_path, monkeypatch, path):
    """Bug: pathlib's "has an empty name" with a traceback, for `--output .` of plot_run.py, `--json .` of others."""
    monkeypatch.chdir(tmp_path)
    assert "Is a directory" in refusal(lambda: files.write_whole(path, b""))


def test_npy_header_that_announces_4_gigabytes_of_itself(tmp_path, little_memory):
    """Bug: as many bytes were asked of the system as the header announces, for a file of 100."""
    (tmp_path / "shard.npy").write_bytes(npy(version=(2, 0)).replace(b"\x02\x00;\0\0\0", b"\x02\x00\xff\xff\xff\xff"))
    assert "header is damaged" in refusal(lambda: read_everything(tmp_path))


@pytest.mark.parametrize("text", ["{'descr': '<u2', 'fortran_order': False, 'shape': (10L,), }", "1is 2\n", r"'\d'"])
def test_npy_headers_that_made_python_warn(tmp_path, text):
    """Bug: warnings about syntax, on the screen as lines of their own."""
    (tmp_path / "shard.npy").write_bytes(npy(text=text))
    refusal(lambda: read_everything(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_listed_as_a_shard_is_not_waited_for(tmp_path, byte_tokenizer):
    """Bug: opening it waited for ever for somebody to write."""
    write_shards(tmp_path, byte_tokenizer)
    (tmp_path / "shard_000001.npy").unlink()
    os.mkfifo(tmp_path / "shard_000001.npy")
    assert "shard_000001.npy: 0 bytes" in refusal(lambda: read_everything(tmp_path))


BAD_ENTRIES = {
    "sha256 is a number": lambda m: m["shards"][0].update(sha256=5),  # .encode() of it
    "sha256 is a list": lambda m: m["shards"][0].update(sha256=[]),  # cannot be in a set
    "tokens is a text": lambda m: m["shards"][0].update(tokens="40"),
    "tokens is true": lambda m: m["shards"][0].update(tokens=True),
    "tokenizer is a text": lambda m: m.update(tokenizer="fingerprint"),  # holds the word, but not the key
    "tokenizer is a list": lambda m: m.update(tokenizer=["fingerprint"]),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),  # was trained on twice, silently
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_bad_shard_manifest(shards, toy, what):
    """Bug: a traceback from where the value is used: fingerprint, refuse_overlap, train.open_data."""
    path = shards / data.MANIFEST
    manifest = json.loads(path.read_bytes())
    BAD_ENTRIES[what](manifest)
    path.write_text(json.dumps(manifest))
    assert re.search("missing or wrong|twice", refusal(lambda: train_module.open_data(toy.config, toy.rt)))


@pytest.mark.parametrize("key", ["documents", "tokens", "text_bytes", "skipped", "replaced_surrogates"])
@pytest.mark.parametrize("value", [None, "5", 0.5, -1, {}, {"none": "1"}, []])
def test_finished_preparation_with_damaged_counts(prepared, key, value):
    """Bugs: KeyError, ZeroDivisionError and the like in the summary of what is already there."""
    path = prepared / "out" / data.MANIFEST
    manifest = json.loads(path.read_bytes())
    for changed in [manifest | {key: value}, {k: v for k, v in manifest.items() if k != key}]:
        if key != "skipped" or value != {}:
            path.write_text(json.dumps(changed))
            assert "counts of documents and tokens are damaged" in refusal(lambda: prepare(prepared))


@pytest.mark.parametrize("flag, n", [("shard_tokens", 10**30), ("shard_tokens", 10**11), ("num_proc", 10**10)])
def test_numbers_beyond_any_machine(prepared, little_memory, flag, n):
    """Bugs: numpy's ValueError or MemoryError for a buffer, multiprocessing's for a semaphore."""
    argv = ["--local_files", str(prepared / "a.txt"), "--tokenizer", str(prepared / "tokenizer"), f"--{flag}", str(n)]
    assert f"--{flag} is " in refusal(lambda: prepare_fineweb.main(argv))


def test_top_k_beyond_any_vocabulary_is_shown():
    """Bug: OverflowError, because an integer was shown as a float."""
    assert str(inference.Sampling(top_k=10**400)) == "temperature 1, top_k 1" + "0" * 400


def a_tokenizer(model, **parts):
    return {"version": "1.0", "added_tokens": [], "model": model, **parts}


BPE = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": [], "unk_token": "a"}
HOSTILE_TOKENIZERS = {
    "an id of four billion": a_tokenizer(BPE | {"vocab": {"a": 0, "</s>": 2**32 - 1}}, decoder={
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
    "no unknown token": a_tokenizer({"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "?"}),
    "a panic while encoding": a_tokenizer(BPE, pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a pattern without end": a_tokenizer(BPE, pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(a*)*(a*)*b"}, "behavior": "Isolated", "invert": False}),
    "a panic while decoding": a_tokenizer(BPE, decoder={"type": "Strip", "content": "a", "start": 9, "stop": 9}),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_TOKENIZERS)
def test_hostile_tokenizers(tmp_path, little_memory, what):
    """Bugs: a table of as many rows as an id announces; the library's bare Exceptions and panics while it
    encodes or decodes."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps(HOSTILE_TOKENIZERS[what]))
    assert "tokenizer" in refusal(lambda: use_tokenizer(tmp_path / "tokenizer.json"))


BAD_LINES = [b"\xff", b"null", b"[]", b"{}", b'{"step": 1}', b'{"kind": ["val"], "step": 1}',
    b'{"kind": "val", "step": 1}', b'{"kind": "train", "step": "1"}', b'{"kind": "val", "step": 1, "loss": "6"}',
    b'{"kind": "val", "step": 1, "loss": NaN}', b"[" * 100_000, b"1" * 5000,
    b'{"kind": "val", "step": 1, "loss": 1' + b"0" * 400 + b"}"]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_of_metrics(tmp_path, line):
    """Bugs: UnicodeDecodeError, TypeError, KeyError and RecursionError of a run that resumes; and lines that
    were no JSON were dropped from the file, silently."""
    path, good = tmp_path / "metrics.jsonl", json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    before = path.read_bytes()
    assert "metrics.jsonl, line 2: not a row" in refusal(lambda: Metrics(path, 9))
    assert path.read_bytes() == before
    path.write_bytes(good + b"\n" + line)  # as a crash leaves it
    assert refusal(lambda: Metrics(path, 9).close()) is None
    assert path.read_bytes() == good + b"\n"


@pytest.mark.parametrize("facts", [None, "x", [], {}, {"size": 5}, {"sha256": "x"}, {"size": "5", "sha256": "x"}])
def test_checkpoint_manifest_without_a_file_s_facts(saved, facts):
    """Bugs: KeyError, TypeError, and ValueError of a format for numbers given a text."""
    manifest = json.loads((saved / MANIFEST).read_bytes())
    manifest["files"][MODEL] = facts
    (saved / MANIFEST).write_text(json.dumps(manifest))
    assert "does not give size and sha256" in refusal(lambda: checkpoint.verify(saved))


def test_checkpoint_manifest_with_a_name_too_long(saved):
    """Bug: the system's "File name too long" instead of a bad checkpoint, so that the one before it was not tried."""
    manifest = json.loads((saved / MANIFEST).read_bytes())
    manifest["files"]["x" * 300] = manifest["files"][MODEL]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"listed in .*, but not there"):
        checkpoint.verify(saved)


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_verifying_nothing_is_not_success(tmp_path, name):
    """Bug: `checkpoint.py verify` of a mistyped name said nothing and ended with 0, as if all were well."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert name in refusal(lambda: checkpoint.main(["verify", str(tmp_path / name)]))


@pytest.mark.parametrize("name", ["rope_theta", "dropout"])
def test_config_with_an_integer_no_float_can_hold(toy, saved, name):
    """Bug: OverflowError of isfinite()."""
    config = json.loads((saved / CONFIG).read_bytes()) | {name: 10**400}
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{name} is 1000"):
        checkpoint.read_config(saved / CONFIG)


@pytest.mark.parametrize("name, value", [
    ("n_layer", 10**9), ("n_layer", 10**4000), ("n_embd", 10**6), ("vocab_size", 10**12), ("block_size", 10**9),
])  # fmt: skip
def test_config_of_a_gigantic_model(saved, little_memory, name, value):
    """Bug: the model was built, all of it, before anything was compared with the stored weights."""
    (saved / CONFIG).write_text(json.dumps(json.loads((saved / CONFIG).read_bytes()) | {name: value}))
    reseal(saved)
    assert f"larger than the {(saved / MODEL).stat().st_size:,} bytes" in refusal(lambda: checkpoint.load_model(saved))


def test_checkpoint_with_another_tokenizer(saved):
    """Bug: ids that the embedding does not have, an IndexError once such a token occurs."""
    (saved / "tokenizer.json").write_text(json.dumps(a_tokenizer(BPE)))
    reseal(saved)
    assert "tokenizer.json has 2 ids, config.json 512" in refusal(lambda: checkpoint.load_model(saved))


def test_optimizer_state_that_is_no_safetensors_file(toy, saved):
    """Bug: the library's SafetensorError, of the one place that opened such a file without its guard."""
    (saved / OPTIMIZER).write_bytes(b"\xff" * 50)
    reseal(saved)
    assert "optimizer.safetensors: not a safetensors file" in refusal(lambda: toy.saver.resume(toy.net))


def test_optimizer_state_of_another_kind(toy, saved):
    """Bug: it was taken as it is, and the first step of the resumed run ended with KeyError: 'exp_avg'."""
    header, content = unpack(saved / OPTIMIZER)
    renamed = {name.replace("exp_avg_sq", "other"): facts for name, facts in header.items()}
    (saved / OPTIMIZER).write_bytes(pack(json.dumps(renamed).encode(), content))
    reseal(saved)
    assert "exp_avg_sq is missing" in refusal(lambda: toy.saver.resume(toy.net))


@pytest.mark.parametrize("key, value", [
    ("step", "3"), ("step", -3), ("step", True), ("step", 3.0), ("samples_seen", None), ("samples_seen", 2**63),
    ("seconds", float("nan")), ("seconds", "1"), ("identity", None), ("identity", []), ("scaler", 5),
    ("step", nested(9)),
])  # fmt: skip
def test_state_of_a_checkpoint_with_wrong_values(toy, saved, key, value):
    """Bugs: KeyError and TypeError while resuming; a position that is no integer met the data only later."""
    state = json.loads((saved / STATE).read_bytes())
    for changed in [state | {key: value}, {k: v for k, v in state.items() if k != key}]:
        if key in changed or key != "scaler":  # which is null unless the precision is float16
            (saved / STATE).write_text(json.dumps(changed))
            reseal(saved)
            assert f"missing or wrong: {key}" in refusal(lambda: toy.saver.resume(toy.net))
    assert toy.saver.saved_step == 3  # as it was


def test_untouched_toy_run_resumes(toy, saved):
    """The refusals above would mean nothing if this were refused too."""
    found = []
    assert refusal(lambda: found.append(toy.saver.resume(toy.net))) is None
    assert found == [Position(3, 6, 1.5)]


@pytest.mark.parametrize("script, flag", [("train", "lr"), ("inference", "device"), ("hellaswag_eval", "limit")])
def test_two_dashes_as_a_value(script, flag):
    """Bug: argparse makes an empty list of --flag=--, and comparing it with a number was a TypeError."""
    assert f"--{flag}: -- is no value" in refusal(lambda: __import__(script).main([f"--{flag}=--"]))


def swapped(header, a, b):
    header[a]["data_offsets"] = header[b]["data_offsets"]


HOSTILE_HEADERS = {
    "announces 4 exabytes of itself": lambda header, content: b"\xff" * 7 + b"\x3f" + b"{}",
    "announces more than the file": lambda header, content: struct.pack("<Q", 10**6) + b"{}" + content,
    "overlapping tensors": lambda header, content: swapped(header, "ln_f.weight", "h.0.ln_1.weight"),
    "beyond the end": lambda header, content: header["ln_f.weight"].update(data_offsets=[2**40, 2**40 + 32]),
    "backwards": lambda header, content: header["ln_f.weight"].update(data_offsets=[32, 0]),
    "a shape of 2^80": lambda header, content: header["ln_f.weight"].update(shape=[2**40, 2**40]),
    "a negative shape": lambda header, content: header["ln_f.weight"].update(shape=[-8]),
    "a hundred thousand tensors": lambda header, content: header.update(
        {str(i): header["ln_f.weight"] for i in range(10**5)}
    ),
    "empty": lambda header, content: b" ",
}


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("what", HOSTILE_HEADERS)
def test_hostile_safetensors(toy, saved, little_memory, name, what):
    """Guards against trusting a header: the library refuses these, and each way to it must end in one line."""
    header, content = unpack(saved / name)
    header = {key.removesuffix("/exp_avg"): facts for key, facts in header.items()}
    whole = HOSTILE_HEADERS[what](header, content)
    (saved / name).write_bytes(whole or pack(json.dumps(header).encode(), content))
    reseal(saved)
    assert f"{name}: not a safetensors file" in refusal(lambda: toy.saver.resume(toy.net))


@pytest.mark.parametrize("flags", [["--seed", "9" * 20], ["--batch_size", "9" * 4000, "--block_size", "9" * 4000]])
def test_integers_beyond_64_bits(flags):
    """Bugs: torch's ValueError for such a seed, but only after the data was read; Python's, that a product
    has too many digits to be shown."""
    assert "beyond 64 bits" in refusal(lambda: train_module.main([*flags, *CPU, "--data_dir", "missing"]))


DAMAGED_NUMBERS = [  # the first four were a ValueError of matplotlib, the others its and numpy's warnings
    ("train", "loss", 1e308), ("val", "loss", -1e308), ("hellaswag", "completion_acc_norm_stderr", -1.0),
    ("hellaswag", "completion_acc_norm_stderr", -1e308), ("train", "lr", 1e308), ("train", "tokens", 1e308),
    ("train", "tokens_per_second", -1e308), ("val", "perplexity", 0), ("val", "perplexity", -1),
]  # fmt: skip


def test_numbers_that_no_run_has_are_left_out_of_the_picture(tmp_path, monkeypatch):
    """Bugs: "Axis limits cannot be NaN or Inf" and the like with a traceback; warnings about overflows."""
    monkeypatch.setattr(plot_run, "DPI", 50)  # small, for speed
    for kind, key, value in DAMAGED_NUMBERS:
        rows = [row | {key: value} if row["kind"] == kind else row for row in ROWS]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        column = plot_run.read_metrics(tmp_path / "metrics.jsonl")[kind][key]
        assert len(column) and np.isnan(column).all()
        if (kind, key) != ("train", "tokens"):  # without which there is nothing to draw
            assert refusal(lambda: plot_run.plot([tmp_path], tmp_path / "curves.png")) is None
