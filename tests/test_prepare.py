"""prepare_fineweb.py: the right ids in the right order, whatever the workers, the file format or the accident."""

import ast
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import engines
import journal
import prepare_fineweb
from data_processing_fineweb import MANIFEST, FineWebDataset, verify
from prepare_fineweb import prepare, prepare_demo
from support import demo_corpus
from support.cli import UserError, run
from tokenizer import load_tokenizer

ROOT = Path(prepare_fineweb.__file__).parent
VAL_SHARE = 0.15
DOCS = [f"Document {i}. " + "The quick brown fox, naïve 🦊, jumps. " * (i % 7 + 1) for i in range(60)]


@pytest.fixture(scope="session")
def vocabulary(byte_tokenizer, tmp_path_factory):
    """Folder with a small tokenizer."""
    folder = tmp_path_factory.mktemp("vocabulary")
    byte_tokenizer.save(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; no pictures, which take longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "draw_lengths", lambda lengths, path: None)
    return tmp_path


def write_jsonl(path, texts, opened=open):
    with opened(path, "wt") as f:
        f.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    return str(path)


def zstd_open(path, mode):
    return io.TextIOWrapper(pyarrow.output_stream(path, compression="zstd"))


def write_parquet(path, texts, **kwargs):
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, **kwargs)
    return str(path)


def by_hash(texts, ids=None, share=VAL_SHARE):
    """(training texts, validation texts) by the rule, written down once more; without ids by the texts themselves."""
    split = [], []
    for text, name in zip(texts, ids or texts):
        hashed = hashlib.blake2b(str(name).encode(), digest_size=16).digest()
        split[int.from_bytes(hashed[:8], "little") / 2**64 < share].append(text)
    return split


def ids_of(tokenizer, texts):
    if not texts:
        return np.empty(0, int)
    return np.concatenate([[tokenizer.eot_token, *tokenizer.encode(text)] for text in texts])


def stream(directory):
    """All shards of a directory, one after the other."""
    return np.concatenate([np.load(p) for p in sorted(Path(directory).glob("*.npy"))])


def contents(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir() if p.is_file()}


def command(capsys, *argv):
    """Exit code and stderr of the command line."""
    capsys.readouterr()
    code = run(lambda: prepare_fineweb.main([str(a) for a in argv]))
    return code, capsys.readouterr().err


def refused(capsys, *argv):
    """The one line of an error that exits with 2."""
    code, err = command(capsys, *argv)
    assert code == 2
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


# --- the ids


def test_ids_are_tiktokens_with_the_marker_before_each_document(test_data, here):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = test_data / "gpt2_tokenizer"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "merges.txt"), str(folder / "vocab.json"))
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    reference = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})

    [path] = (test_data / "corpus" / "val").glob("*.parquet")
    made = prepare("d", local_files=[str(path)], val_share=0.1, shard_tokens=300_000, tokenizer=folder, num_proc=1)
    table = pyarrow.parquet.read_table(path)
    for directory, texts in zip(("d", "d_val"), by_hash(table["text"].to_pylist(), table["id"].to_pylist(), 0.1)):
        expected = [[50256, *reference.encode_ordinary(text)] for text in texts]
        assert np.array_equal(stream(directory), np.concatenate(expected))
    total = sum(table["token_count"].to_pylist()) + table.num_rows  # counted by those who made the corpus
    assert made["train"]["tokens"] + made["val"]["tokens"] == total


@pytest.mark.parametrize("make", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "mixed"])
def test_every_file_format_gives_the_same_ids(make, here, vocabulary, byte_tokenizer):
    middle = len(DOCS) // 2
    if make == "parquet":
        write_parquet("a_2.parquet", DOCS[:middle], row_group_size=7)
        write_parquet("a_10.parquet", DOCS[middle:])  # natural order: after a_2
    elif make == "txt":
        for i, text in enumerate(DOCS):
            Path(f"a_{i}.txt").write_bytes(text.encode())
    elif make == "mixed":
        write_parquet("a_1.parquet", DOCS[:middle])
        write_jsonl("a_2.jsonl", DOCS[middle:])
    else:
        write_jsonl(f"a_1.{make}", DOCS, {"jsonl.gz": gzip.open, "jsonl.zst": zstd_open}.get(make, open))
    ids = None if make == "txt" else [*range(60)] if make.startswith("jsonl") else [*range(30), *range(30)]
    made = prepare("d", local_files=["a_*"], val_share=VAL_SHARE, tokenizer=vocabulary, num_proc=1)
    for directory, texts in zip(("d", "d_val"), by_hash(DOCS, ids)):
        assert texts and np.array_equal(stream(directory), ids_of(byte_tokenizer, texts))
    assert sum(m["text_bytes"] for m in made.values()) == sum(len(text.encode()) for text in DOCS)


def test_same_bytes_for_any_workers_start_method_and_batch_size(here, vocabulary, monkeypatch):
    write_parquet("a.parquet", DOCS[:20])
    write_jsonl("b.jsonl", [*DOCS[20:40], "", None, "half \ud800 pair"])
    Path("c.txt").write_text(DOCS[40])

    def make(name, chars, **kwargs):
        monkeypatch.setattr(prepare_fineweb, "BATCH_CHARS", chars)
        prepare(name, local_files=["*.*"], tokenizer=vocabulary, val_share=VAL_SHARE, shard_tokens=500, **kwargs)
        return contents(name), contents(f"{name}_val")

    expected = make("one", 10**6, num_proc=1)
    assert len(expected[0]) > 4 and len(expected[1]) > 2  # shards
    for method in {"fork", "spawn"} & set(prepare_fineweb.multiprocessing.get_all_start_methods()):
        assert make(f"two_{method}", 300, num_proc=2, start_method=method) == expected
    assert make("four", 100, num_proc=4, start_method="spawn" if os.name == "nt" else "fork") == expected


def test_what_is_made_is_what_training_opens(here, vocabulary, byte_tokenizer):
    write_jsonl("a.jsonl", DOCS)
    made = prepare("d", local_files=["a.jsonl"], val_share=0.2, shard_tokens=1000, tokenizer=vocabulary, num_proc=1)
    for split, directory in ("train", "d"), ("val", "d_val"):
        data = FineWebDataset(directory, 32, split, byte_tokenizer.vocab_size)
        assert verify(directory) == len(data.shards)
        assert data.manifest == made[split] and data.n_tokens == made[split]["tokens"]
        assert data.manifest["tokenizer"]["fingerprint"] == byte_tokenizer.fingerprint()
        assert data.manifest["tokenizer"]["eot_token"] == byte_tokenizer.eot_token
        assert load_tokenizer(Path(directory, "tokenizer")).fingerprint() == byte_tokenizer.fingerprint()
        assert sum(s["text_bytes"] for s in data.manifest["shards"]) == data.manifest["text_bytes"]


def test_ids_that_do_not_fit_never_wrap():
    fake = SimpleNamespace(eot_token=0, vocab_size=70_000)
    fake.encode_arrays = lambda texts: [np.array([69_999], np.uint32) for _ in texts]
    ids, sizes, _ = engines.encode(fake, ["x", "yé"])
    assert ids.dtype == np.uint32 and ids.tolist() == [0, 69_999, 0, 69_999]
    assert sizes.tolist() == [[2, 1, 0], [2, 3, 0]]
    fake.vocab_size = 60_000  # a tokenizer that does not keep its word
    with pytest.raises(OverflowError):
        engines.encode(fake, ["x"])


# --- what is not ordinary text


def skipped(**counts):
    return dict.fromkeys(journal.REASONS, 0) | counts


def test_policies_are_applied_and_counted(here, vocabulary, byte_tokenizer):
    odd = [
        "first",
        None,
        "",
        " \n\t\u3000",
        "a\0b",
        "x\ud800y\udc00\ud83d\ude00",
        "say <|endoftext|> twice",
        None,
        "last",
    ]
    write_jsonl("a.jsonl", odd)
    write_jsonl("val.jsonl", ["", "validation"])
    options = {"local_files": ["a.jsonl"], "val_files": ["val.jsonl"], "tokenizer": vocabulary, "num_proc": 1}
    made = prepare("d", **options)
    kept = ["first", "a\0b", "x\ufffdy\ufffd\U0001f600", "say <|endoftext|> twice", "last"]
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, kept))
    assert np.count_nonzero(stream("d") == byte_tokenizer.eot_token) == len(kept)  # the literal is no boundary
    assert made["train"]["documents"] == len(kept)
    assert made["train"]["skipped"] == skipped(none=2, empty=1, whitespace=1)
    assert made["train"]["replaced_surrogates"] == 2
    assert made["train"]["text_bytes"] == sum(len(text.encode()) for text in kept)
    assert made["val"]["skipped"] == skipped(empty=1)
    assert made["val"]["documents"] == 1
    assert json.loads(Path("d", MANIFEST).read_text()) == made["train"]


def test_null_text_in_parquet_is_skipped(here, vocabulary, byte_tokenizer):
    write_parquet("a.parquet", ["v" * 50, None, "b\0", "<|endoftext|>", ""])
    Path("val.txt").write_text("validation")
    files = dict(local_files=["a.parquet"], val_files=["val.txt"])
    made = prepare("d", **files, tokenizer=vocabulary, num_proc=1)
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, ["v" * 50, "b\0", "<|endoftext|>"]))
    assert made["train"]["skipped"] == skipped(none=1, empty=1)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', ["a.jsonl, row 3", "int"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl, line 2", "not JSON"]),
        ("a.jsonl", b'{"content": "x"}\n', ["line 1", "content", "--text_column"]),
        ("a.jsonl", b"[1]\n", ["line 1", "a JSON list"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["line 1"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-9], ["a.jsonl.gz", "cannot be read"]),
        ("a.parquet", b"PAR1 but no more", ["a.parquet", "cannot be read"]),
        ("a.txt", b"caf\xe9", ["a.txt", "cannot be read"]),
    ],
)
def test_bad_input_is_named(name, data, says, here, vocabulary, capsys):
    Path(name).write_bytes(data)
    write_jsonl("val.jsonl", ["validation"])
    line = refused(
        capsys, "--local_files", name, "--val_files", "val.jsonl", "--tokenizer", vocabulary, "--num_proc", 1
    )
    assert all(word in line for word in says), line
    assert not list(here.glob(f"edu*/{MANIFEST}"))


def test_parquet_without_the_column_or_with_numbers(here, vocabulary, capsys):
    write_parquet("a.parquet", DOCS)
    start = ("--local_files", "a.parquet", "--tokenizer", vocabulary, "--num_proc", 1, "--text_column")
    assert "id, text" in refused(capsys, *start, "content")
    assert "row 1" in refused(capsys, *start, "id")


# --- limits and splits


def test_limits_fall_on_document_borders_and_documents_cross_shards(here, vocabulary, byte_tokenizer):
    write_jsonl("a.jsonl", DOCS)
    lengths = {text: len(byte_tokenizer.encode(text)) + 1 for text in DOCS}
    train, _ = by_hash(DOCS, range(60))
    n = next(i for i in range(len(train)) if sum(lengths[text] for text in train[:i]) >= 1000)
    _, val = by_hash(DOCS[: DOCS.index(train[n - 1])], range(60))
    options = dict(local_files=["a.jsonl"], shard_tokens=64, tokenizer=vocabulary, num_proc=1)
    made = prepare("d", val_share=VAL_SHARE, max_tokens=1000, **options)
    assert val and np.array_equal(stream("d_val"), ids_of(byte_tokenizer, val))
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, train[:n]))
    total = sum(lengths[text] for text in train[:n])
    assert [s["tokens"] for s in made["train"]["shards"]] == [64] * (total // 64) + [total % 64]
    said = {"shard_tokens": 64, "max_tokens": 1000, "val_share": VAL_SHARE}
    assert made["train"]["arguments"] == said | {"min_score": None, "language": None, "dedup": False}
    assert max(lengths.values()) > 64


def test_validation_documents_do_not_depend_on_how_much_is_prepared(here, vocabulary):
    """Bug: with the first N tokens as validation, a larger preparation trained on what a smaller one validated on."""
    write_jsonl("a.jsonl", DOCS[:30])
    write_jsonl("b.jsonl", DOCS)
    options = dict(val_share=VAL_SHARE, tokenizer=vocabulary, num_proc=1)
    prepare("all", local_files=["b.jsonl"], **options)
    for name, how in ("half", dict(local_files=["a.jsonl"])), ("part", dict(local_files=["b.jsonl"], max_tokens=2000)):
        prepare(name, **how, **options)
        for suffix in "", "_val":
            less, more = stream(name + suffix), stream(f"all{suffix}")
            assert len(less) < len(more) and np.array_equal(less, more[: len(less)])


def test_exact_duplicates_are_dropped_over_files_and_splits(here, vocabulary, byte_tokenizer):
    """Bugs: a text seen in training again in validation; duplicates found within a batch only."""
    write_jsonl("a.jsonl", [*DOCS[:20], *DOCS[5:9]])
    write_parquet("b.parquet", [*DOCS[10:40], DOCS[0] + " "])
    options = dict(local_files=["a.jsonl", "b.parquet"], tokenizer=vocabulary, num_proc=1, val_share=VAL_SHARE)
    made = prepare("d", dedup=True, **options)
    assert sum(m["skipped"]["duplicate"] for m in made.values()) == 14
    texts, ids = [*DOCS[:40], DOCS[0] + " "], [*range(20), *range(10, 31)]
    for directory, expected in zip(("d", "d_val"), by_hash(texts, ids)):
        assert np.array_equal(stream(directory), ids_of(byte_tokenizer, expected))
    assert sum(m["documents"] for m in prepare("e", **options).values()) == 55
    assert not list(here.glob("*/.*"))


SCORED = [("en", 3.5), ("en", 2.0), ("de", 4.0), ("en", None), (None, 5.0), ("en", 3.0), ("en", float("nan"))]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_filters_take_what_they_say_and_count_the_rest(kind, here, vocabulary, byte_tokenizer):
    """Bugs: a null score taken for a good one; what was left out not counted."""
    rows = [{"text": f"text {i}", "language": lang, "score": x} for i, (lang, x) in enumerate(SCORED)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    else:
        Path("a.jsonl").write_text(
            "".join(json.dumps({k: v for k, v in r.items() if v is not None}) + "\n" for r in rows)
        )
    write_jsonl("plain.jsonl", ["validation"])
    Path("val.jsonl").write_text(json.dumps({"text": "v", "language": "en", "score": 9}))
    options = dict(local_files=[f"a.{kind}"], val_files=["val.jsonl"], tokenizer=vocabulary, num_proc=1)
    made = prepare("d", min_score=3, language="en", **options)
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, ["text 0", "text 5"]))
    assert made["train"]["skipped"] == skipped(language=2, no_score=1, low_score=2)
    assert prepare("e", min_score=3, **options)["train"]["documents"] == 4
    assert prepare("f", language="en", **options)["train"]["documents"] == 5


def test_int_score_serves_where_there_is_no_score_and_no_column_is_an_error(here, vocabulary, capsys):
    table = {"text": ["a", "b", "c"], "int_score": [2, 3, 4], "id": ["x", "y", "z"]}
    pyarrow.parquet.write_table(pyarrow.table(table), "a.parquet")
    Path("val.jsonl").write_text('{"text": "v", "score": 9}')
    options = ["--local_files", "a.parquet", "--val_files", "val.jsonl", "--tokenizer", vocabulary, "--num_proc", 1]
    assert command(capsys, *options, "--min_score", 2.5)[0] == 0
    assert json.loads(Path("edu_fineweb10B", MANIFEST).read_text())["documents"] == 2
    line = refused(capsys, *options, "--language", "en", "--out_dir", "e")
    assert "no column language, but" in line and "int_score" in line
    pyarrow.parquet.write_table(pyarrow.table(table | {"score": ["good"] * 3}), "a.parquet")
    assert "row 1: the score is of type str" in refused(capsys, *options, "--min_score", 2.5, "--out_dir", "e")


def test_validation_files_go_to_validation_as_a_whole(here, vocabulary, byte_tokenizer):
    write_jsonl("a.jsonl", DOCS[:30])
    write_parquet("b.parquet", DOCS[30:])
    prepare("d", local_files=["a.jsonl"], val_files=["b.parquet"], tokenizer=vocabulary, num_proc=1)
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, DOCS[:30]))
    assert np.array_equal(stream("d_val"), ids_of(byte_tokenizer, DOCS[30:]))


def test_a_split_without_documents_is_refused_and_can_be_mended(here, vocabulary, capsys):
    """Bug: what was refused could not be asked for otherwise: the journal held on to the first wish."""
    write_jsonl("a.jsonl", DOCS)
    options = ("--local_files", "a.jsonl", "--tokenizer", vocabulary, "--num_proc", 1)
    line = refused(capsys, *options, "--val_share", 1e-9)
    assert "none of the 60 documents went to validation" in line and "--val_share" in line and "for example 0.2" in line
    line = refused(capsys, *options, "--val_share", 1 - 1e-9)
    assert "nothing is left to train on" in line and "--val_share" in line
    assert command(capsys, *options, "--val_share", VAL_SHARE)[0] == 0
    write_jsonl("a.jsonl", ["", None])
    line = refused(capsys, *options, "--out_dir", "e")
    assert "no document" in line and "1 none, 1 empty" in line


# --- accidents


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_killed_worker_is_an_error_within_seconds(here, vocabulary, capsys, monkeypatch):
    encode = engines.encode

    def dies(tokenizer, texts):
        if any(text.startswith("Document 31.") for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(tokenizer, texts)

    monkeypatch.setattr(engines, "encode", dies)
    monkeypatch.setattr(prepare_fineweb, "BATCH_CHARS", 100)
    write_jsonl("a.jsonl", DOCS)
    options = ("--local_files", "a.jsonl", "--tokenizer", vocabulary, "--num_proc", 2)
    start = time.monotonic()
    line = refused(capsys, *options, "--start_method", "fork")
    assert time.monotonic() - start < 60  # seconds on an idle machine; a hang has no end
    assert "process died" in line and "a.jsonl, row" in line
    assert not Path("edu_fineweb10B", MANIFEST).exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_workers_leave_when_their_parent_is_killed(here, vocabulary):
    write_jsonl("a.jsonl", ["word " * 200_000] * 30)
    argv = [sys.executable, str(ROOT / "prepare_fineweb.py"), "--local_files", "a.jsonl", "--num_proc", "2"]
    parent = subprocess.Popen(
        [*argv, "--tokenizer", str(vocabulary)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def alive(pids):
        states = (Path(f"/proc/{pid}/stat") for pid in pids)
        return [p for p in states if p.exists() and p.read_text().rsplit(")", 1)[1].split()[0] != "Z"]

    children = ""
    deadline = time.monotonic() + 120
    while len(children.split()) < 3 and time.monotonic() < deadline:  # two workers and the tracker of their resources
        assert parent.poll() is None
        time.sleep(0.05)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
    parent.kill()
    parent.wait()
    while alive(children.split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children.split()) >= 3 and not alive(children.split())


def test_leftovers_without_a_journal_are_begun_anew(here, vocabulary, capsys):
    """Bug: what an older version or a run killed in its first moments left behind became part of the shards."""
    write_jsonl("a.jsonl", DOCS)
    Path("d", "tokenizer").mkdir(parents=True)
    for name in (
        "fineweb_train_000777.npy",
        ".fineweb_train_000002.npy.4711.tmp",
        ".fineweb_train.unfinished",
        ".digests",
    ):
        Path("d", name).write_bytes(b"of a longer run")
    options = ("--local_files", "a.jsonl", "--val_share", VAL_SHARE, "--tokenizer", vocabulary, "--num_proc", 1)
    for directory in "d", "e":
        assert command(capsys, *options, "--out_dir", directory)[0] == 0
    assert contents("d") == contents("e") and contents("d_val") == contents("e_val")


@pytest.mark.slow
def test_a_document_of_50_megabytes_is_one_document(here, vocabulary, byte_tokenizer):
    """Bugs: cut at a batch or a shard; a batch that is taken for lost because it takes long."""
    line = "The quick brown fox, naïve 🦊, jumps.\n"
    text = line * 1_250_000
    assert len(text.encode()) > 50e6
    write_parquet("a.parquet", [DOCS[0], text, DOCS[1]])
    write_jsonl("val.jsonl", DOCS[2:3])
    options = dict(local_files=["a.parquet"], val_files=["val.jsonl"], tokenizer=vocabulary, num_proc=1)
    made = prepare("d", shard_tokens=10**6, **options)
    assert made["train"]["documents"] == 3 and len(made["train"]["shards"]) > 20
    of_text = np.tile(byte_tokenizer.encode(line), 1_250_000)  # a line ends where a token ends
    expected = [
        ids_of(byte_tokenizer, DOCS[:1]),
        [byte_tokenizer.eot_token],
        of_text,
        ids_of(byte_tokenizer, DOCS[1:2]),
    ]
    assert np.array_equal(stream("d"), np.concatenate(expected))


# --- an unfinished run


@pytest.fixture
def unfinished(here, vocabulary, monkeypatch, capsys):
    """Flags of a run that died in the midst; its journal is younger than each batch of three documents."""
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0)
    monkeypatch.setattr(prepare_fineweb, "BATCH_ROWS", 3)
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0)
    write_jsonl("a.jsonl", DOCS)
    options = ["--local_files", "a.jsonl", "--val_share", VAL_SHARE, "--tokenizer", vocabulary, "--num_proc", 1]
    options += ["--shard_tokens", 500, "--out_dir"]
    assert command(capsys, *options, "undisturbed")[0] == 0

    def dies(tokenizer, texts):
        if DOCS[40] in texts:
            raise KeyboardInterrupt
        return encode(tokenizer, texts)

    encode = engines.encode
    with monkeypatch.context() as m:
        m.setattr(engines, "encode", dies)
        code, err = command(capsys, *options, "d")
        assert code == 130 and err.endswith("interrupted; the same command goes on from here\n")
    assert Path("d", journal.JOURNAL).exists() and not Path("d", MANIFEST).exists()
    return [*options, "d"]


def test_an_unfinished_run_goes_on(unfinished, capsys, monkeypatch):
    """Bug: begun anew, which after a night is as bad as an error."""
    seen, encode = [], engines.encode
    monkeypatch.setattr(engines, "encode", lambda tokenizer, texts: seen.extend(texts) or encode(tokenizer, texts))
    code, err = command(capsys, *unfinished)
    assert code == 0 and "going on after" in err and seen == DOCS[39:]
    for suffix in "", "_val":
        assert contents(f"d{suffix}") == contents(f"undisturbed{suffix}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_journal_speaks_of_nothing_that_a_power_cut_can_take(here, vocabulary, monkeypatch):
    """Bug: what no kill shows: a journal on the disk before the tokens, digests and shards that it counts."""
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0)
    monkeypatch.setattr(prepare_fineweb, "BATCH_ROWS", 3)
    fsync, replace, synced, checked = os.fsync, os.replace, {}, []

    def recorded_fsync(fd):
        fsync(fd)
        synced[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size

    def recorded_replace(source, target):
        source, target = (str(Path(p).absolute()) for p in (source, target))
        replace(source, target)
        synced[target] = synced.pop(source)  # KeyError: renamed before it was on the disk
        if target.endswith(journal.JOURNAL):
            told = json.loads(Path(target).read_text())
            assert synced.get(str(here / "d/.digests"), 0) == 16 * told["digests"]
            for split, directory in ("train", "d"), ("val", "d_val"):
                writer = told["splits"][split]["writer"]
                if writer["filled"]:
                    path = here / directory / f".fineweb_{split}.unfinished"
                    assert synced[str(path)] == path.stat().st_size == 128 + 2 * writer["filled"]
                    checked.append(path)
                for shard in writer["shards"]:
                    assert synced[str(here / directory / shard["name"])] == 128 + 2 * shard["tokens"]

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_jsonl("a.jsonl", DOCS)
    options = dict(local_files=["a.jsonl"], val_share=VAL_SHARE, tokenizer=vocabulary, num_proc=1, dedup=True)
    prepare("d", shard_tokens=500, **options)
    assert len(checked) > 30


def test_an_unfinished_run_is_not_continued_otherwise(unfinished, capsys):
    """Bug: shards whose first half was made with other settings than the second."""
    before = contents("d")
    for change, says in [
        (["--shard_tokens", 700], ["shard_tokens there 500, now 700"]),
        (["--val_share", 0.3], ["val_share there 0.15, now 0.3"]),
        (["--dedup"], ["dedup there False, now True"]),
        (["--text_column", "id"], ["text_column there 'text', now 'id'"]),
    ]:
        line = refused(capsys, *unfinished, *change)
        assert all(word in line for word in ["was begun otherwise", "--restart", *says]), line
    assert contents("d") == before
    assert command(capsys, *unfinished, "--shard_tokens", 700, "--restart")[0] == 0
    assert json.loads(Path("d", MANIFEST).read_text())["arguments"]["shard_tokens"] == 700
    assert command(capsys, *unfinished, "--restart")[0] == 0  # also of what is complete
    assert contents("d") == contents("undisturbed")


@pytest.mark.parametrize("what", ["cut", "no splits", "a text for a number", "tokens gone", "shard gone", "shard cut"])
def test_a_journal_that_cannot_be_right_is_refused(what, unfinished, capsys):
    """Bugs: tracebacks; shards with a hole where tokens were lost."""
    path = Path("d", journal.JOURNAL)
    saved = json.loads(path.read_text())
    if what == "cut":
        path.write_text(path.read_text()[:99])
    elif what == "no splits":
        path.write_text(json.dumps({k: v for k, v in saved.items() if k != "splits"}))
    elif what == "a text for a number":
        saved["splits"]["train"]["writer"]["filled"] = "many"
        path.write_text(json.dumps(saved))
    elif what == "tokens gone":
        Path("d", ".fineweb_train.unfinished").write_bytes(b"x")
    elif what == "shard gone":
        Path("d", "fineweb_train_000001.npy").unlink()
    else:
        Path("d", "fineweb_train_000001.npy").write_bytes(b"x")
    line = refused(capsys, *unfinished)
    assert "d/" in line and ("damaged" in line or "--restart" in line or "not JSON" in line), line
    assert command(capsys, *unfinished, "--restart")[0] == 0
    assert contents("d") == contents("undisturbed")


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_two_processes_do_not_prepare_the_same_directory(unfinished, capsys):
    """Bug: both append to the same unfinished shard."""
    with journal.alone(journal.split_directories("d")):
        assert "another process is preparing it" in refused(capsys, *unfinished)
    assert command(capsys, *unfinished)[0] == 0


# --- the same command again


def test_a_rerun_of_the_same_does_nothing(here, vocabulary, capsys):
    write_jsonl("a.jsonl", DOCS)
    options = ("--local_files", "a.jsonl", "--val_share", VAL_SHARE, "--tokenizer", vocabulary, "--num_proc")
    assert command(capsys, *options, 1)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    run(lambda: prepare_fineweb.main([str(o) for o in (*options, 2)]))
    out = capsys.readouterr().out
    assert "already prepared" in out and "--data_dir edu_fineweb10B --val_data_dir edu_fineweb10B_val" in out
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--shard_tokens", "77"], ["shard_tokens", "77", "100000000"]),
        (["--val_share", "0.2"], ["val_share", "0.2", "0.15"]),
        (["--min_score", "1"], ["min_score", "None", "1.0"]),
        (["--dedup"], ["dedup", "False", "True"]),
        (["--max_tokens", "900"], ["max_tokens", "900"]),
        (["--tokenizer", "other"], ["tokenizer", "fingerprint"]),
        (["--local_files", "b.jsonl"], ["source", "a.jsonl", "b.jsonl"]),
        (["--local_files", "grown"], ["source", "a.jsonl"]),
    ],
)
def test_a_rerun_made_otherwise_is_refused(change, says, here, vocabulary, capsys):
    write_jsonl("a.jsonl", DOCS)
    write_jsonl("b.jsonl", DOCS)
    options = ["--local_files", "a.jsonl", "--val_share", VAL_SHARE, "--tokenizer", vocabulary, "--num_proc", 1]
    assert command(capsys, *options)[0] == 0
    before = contents("edu_fineweb10B")
    if change[-1] == "other":
        Path("other").mkdir()
        demo_corpus.train_tokenizer(DOCS, 300).save("other")
    if change[-1] == "grown":
        write_jsonl("a.jsonl", [*DOCS, "one more"])
        change = []
    line = refused(capsys, *options, *change)
    assert all(word in line for word in says), line
    assert contents("edu_fineweb10B") == before


@pytest.mark.parametrize("foreign", ["notes.txt", "fineweb_train_000000.npy.bak", "tokenizer/mine.json", "sub/x.npy"])
def test_nothing_is_deleted_from_a_directory_with_other_files(foreign, here, vocabulary, capsys):
    write_jsonl("a.jsonl", DOCS)
    path = Path("d", foreign)
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    leftover = Path("d", "fineweb_train_000000.npy")
    leftover.write_bytes(b"left")
    options = ("--local_files", "a.jsonl", "--val_share", VAL_SHARE, "--tokenizer", vocabulary, "--num_proc", 1)
    line = refused(capsys, *options, "--out_dir", "d")
    assert Path(foreign).parts[0] in line or path.name in line
    assert path.read_text() == "precious" and leftover.exists()


# --- arguments


def test_all_problems_with_the_arguments_come_at_once(here, vocabulary, capsys):
    write_jsonl("a.jsonl", DOCS)
    line = refused(
        capsys, "--local_files", "nothing_*.parquet", "--val_files", "a.jsonl", "--dataset", "x", "--max_tokens", 0,
        "--shard_tokens", 0, "--num_proc", -1, "--val_share", 0, "--start_method", "sporn", "--tokenizer", vocabulary,
        "--min_score", "nan", "--ray_address", "x",
    )  # fmt: skip
    for word in (
        "nothing_*.parquet",
        "--dataset",
        "--max_tokens",
        "--shard_tokens",
        "--num_proc",
        "--val_share 0.0: must lie",
        "--val_share: not together",
        "--min_score",
        "--ray_address",
        "sporn",
    ):
        assert word in line, line
    assert "a.jsonl" in line  # what is there instead
    assert not Path("edu_fineweb10B").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--local_files", "no/such/*.parquet"], ["no/such/*.parquet", "no such file"]),
        (["--local_files", "folder"], ["folder", "*.parquet"]),
        (["--local_files", "a.csv"], ["a.csv", ".jsonl"]),
        (["--local_files", ""], ["no such file"]),
        (["--local_files", "a.jsonl", "--val_files", "./a.json*"], ["a.jsonl", "both"]),
        (["--local_files", "a.jsonl", "--tokenizer", "folder"], ["folder", "tokenizer.json"]),
        (["--local_files", "a.jsonl", "--out_dir", "a.csv", "--val_share", "0.1"], ["a.csv", "a file"]),
        (["--local_files", "a.jsonl", "--demo"], ["--local_files", "--demo"]),
    ],
)
def test_wrong_paths_exit_with_2_and_one_line(argv, says, here, vocabulary, capsys):
    write_jsonl("a.jsonl", DOCS)
    Path("folder").mkdir()
    Path("a.csv").write_text("1,2")
    line = refused(capsys, "--num_proc", 1, "--tokenizer", vocabulary, *argv)
    assert all(word in line for word in says), line


def test_every_line_of_help_states_its_default():
    for action in prepare_fineweb.build_parser()._actions[1:]:
        assert "default: " in action.help, action.dest


def test_progress_reports_the_rate_and_the_time_left(capsys):
    """Bug: after a restart, the rate and the time left counted what an earlier run had done."""
    tally = journal.Tally(documents=1, tokens=6_000_000, text_bytes=24_000_000)
    for before in None, journal.Tally(documents=1, tokens=5_400_000, text_bytes=22_000_000):
        progress = prepare_fineweb.Progress(source_bytes=1000)
        progress.start = time.monotonic() - 60
        if before:
            progress.begin({"train": before}, 400)
        progress.update({"train": tally}, 500)
        progress.show()
        line = capsys.readouterr().err
        assert line.startswith("1 documents, 6.0M tokens, ") and "tokens/s" in line and "MB/s" in line
        assert re.search("[ ,](9,9..|10,0..) tokens/s" if before else "(99,9..|100,0..) tokens/s", line), line
        assert re.search("0:0(5:00|4:59) left" if before else "0:0(1:00|0:59) left", line), line
    nothing_known = prepare_fineweb.Progress()
    nothing_known.show()
    assert "left" not in capsys.readouterr().err


def test_the_lengths_of_documents_are_counted_and_drawn(tmp_path, vocabulary, byte_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("a.jsonl", DOCS)
    made = prepare("d", local_files=["a.jsonl"], val_share=VAL_SHARE, tokenizer=vocabulary, num_proc=1)
    picture = Path("d", journal.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG") and not list(Path("d_val").glob("*.png"))
    for split, texts in zip(("train", "val"), by_hash(DOCS, range(60))):
        expected = {}
        for n in (len(byte_tokenizer.encode(text)) + 1 for text in texts):
            low = str(max(end for end in journal.LENGTHS if end <= n))
            expected[low] = expected.get(low, 0) + 1
        assert made[split]["lengths"] == expected


# --- the demo corpus


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    made = prepare_demo(folder / "demo_corpus")
    return folder / "demo_corpus", made


def test_demo_corpus_is_english_of_the_expected_size(demo):
    from pydoc_data.topics import topics

    directory, made = demo
    tokenizer = load_tokenizer(directory / "tokenizer")
    assert tokenizer.vocab_size == 2048
    train, val = stream(directory), stream(f"{directory}_val")
    assert max(train.max(), val.max()) < 2048
    texts = [tokenizer.decode(part) for part in np.split(train, np.flatnonzero(train == tokenizer.eot_token))[1:]]
    texts += [tokenizer.decode(part) for part in np.split(val, np.flatnonzero(val == tokenizer.eot_token))[1:]]
    texts = [text.removeprefix("<|endoftext|>") for text in texts]
    assert len(texts) == made["train"]["documents"] + made["val"]["documents"]
    assert made["val"]["documents"] == -(-len(texts) // 20)
    assert {text.strip() for text in topics.values()} <= set(texts)
    [json_module] = [text for text in texts if text.startswith("json\n\n")]
    assert "JSON (JavaScript Object Notation)" in json_module and "json.dumps(obj, *, skipkeys=False" in json_module
    total = made["train"]["text_bytes"] + made["val"]["text_bytes"]
    assert 1_000_000 < total < 4_000_000
    assert 2.5 < total / (made["train"]["tokens"] + made["val"]["tokens"]) < 5  # the vocabulary has learnt words


def test_demo_corpus_is_the_same_each_time_and_not_remade(demo, here, capsys):
    directory, made = demo
    capsys.readouterr()
    assert run(lambda: prepare_fineweb.main(["--demo", "--out_dir", "again"])) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert contents("again") == contents(directory) and contents("again_val") == contents(f"{directory}_val")
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    assert prepare_demo("again") == made
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before
    with pytest.raises(UserError, match="vocab_size"):
        prepare_demo("again", vocab_size=1024)


def test_demo_needs_no_documentation_elsewhere(here, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "help_topics", list)
    monkeypatch.setattr(prepare_fineweb, "library_docstrings", list)
    with pytest.raises(UserError, match="--local_files"):
        prepare_demo("d")


def test_docstrings_come_in_source_order_with_their_signatures():
    source = '''
"""Module."""
class A(dict):
    """A class."""
    def f(self, x=1):
        """  Indented

             text. """
    def _private(self):
        """Hidden."""
if True:
    async def g(*args):
        """G."""
def nothing(): pass
'''
    tree = ast.parse(source)
    assert list(demo_corpus.docstrings(tree, "m")) == [
        "m", "Module.", "m.A", "A class.", "m.A.f(self, x=1)", "Indented\n\ntext. ", "m.g(*args)", "G.",
    ]  # fmt: skip
