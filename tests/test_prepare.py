"""prepare_fineweb.py: the right ids in the right order, whatever the workers, the file format or the accident."""

import ast
import csv
import datetime
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import pieces
import plot_run
import prepare_fineweb
from data_processing_fineweb import MANIFEST, FineWebDataset, verify_shards
from prepare_fineweb import PrepareConfig, prepare_demo
from support import demo_corpus, rows, workers
from support.cli import UserError, run
from support.files import JSON_LIMIT
from support.rows import File, stamps
from test_tokenizer import tiktoken_from
from tokenizer import load_tokenizer, train_tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(prepare_fineweb.__file__).parent
VAL_SHARE = 0.15
DOCS = [f"Document {i}. " + "The quick brown fox, naïve 🦊, jumps. " * (i % 7 + 1) for i in range(60)]
A = ("--local_files", "a.jsonl", "--val_share", VAL_SHARE)
needs_fork = pytest.mark.skipif(os.name == "nt", reason="needs fork")


@pytest.fixture
def here(tmp_path, monkeypatch, byte_tokenizer):
    """A working directory with a small tokenizer in `vocabulary`; no pictures, which take longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_run, "plot_lengths", lambda *arguments: None)
    Path("vocabulary").mkdir()
    byte_tokenizer.save(Path("vocabulary"))
    return tmp_path


def prepare(out_dir, local_files, **flags):
    """The manifests of a preparation with that tokenizer, in this process, unless the flags say otherwise."""
    flags = dict(tokenizer="vocabulary", num_proc=1, val_share=None if flags.get("val_files") else VAL_SHARE) | flags
    return prepare_fineweb.prepare(PrepareConfig(out_dir=out_dir, local_files=local_files, **flags))


def command(capsys, *argv):
    """Exit code and stderr of the command line, with that tokenizer and one process."""
    capsys.readouterr()
    argv = ["--tokenizer", "vocabulary", "--num_proc", 1, *argv]
    code = run(lambda: prepare_fineweb.main([str(a) for a in argv]))
    return code, capsys.readouterr().err


def refused(capsys, *argv):
    """The one line of an error that exits with 2."""
    code, err = command(capsys, *argv)
    assert code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


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


def write_csv(path, texts):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([["id", "text"], *enumerate(texts)])


def write_arrow(path, texts):
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def by_hash(texts, share=VAL_SHARE):
    """(training texts, validation texts) by the rule, written down once more."""
    split = [], []
    for text in texts:
        hashed = hashlib.blake2b(text.encode(), digest_size=16).digest()
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


def times(folder):
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def skipped(**counts):
    return dict.fromkeys(pieces.REASONS, 0) | counts


# --- the ids


def test_ids_are_tiktokens_with_the_marker_before_each_document(test_data, here):
    folder = test_data / "gpt2_tokenizer"
    reference = tiktoken_from(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    [path] = (test_data / "corpus" / "val").glob("*.parquet")
    made = prepare("d", str(path), val_share=0.1, shard_tokens=300_000, tokenizer=folder)
    table = pyarrow.parquet.read_table(path)
    for directory, texts in zip(("d", "d_val"), by_hash(table["text"].to_pylist(), 0.1)):
        expected = [[50256, *reference.encode_ordinary(text)] for text in texts]
        assert np.array_equal(stream(directory), np.concatenate(expected))
    total = sum(table["token_count"].to_pylist()) + table.num_rows  # counted by those who made the corpus
    assert made["train"]["tokens"] + made["val"]["tokens"] == total


WRITERS = {  # by name of the format: what writes the texts into a file of that name
    "parquet": lambda path, texts: write_parquet(path, texts, row_group_size=7),
    "jsonl": write_jsonl,
    "jsonl.gz": lambda path, texts: write_jsonl(path, texts, gzip.open),
    "jsonl.zst": lambda path, texts: write_jsonl(path, texts, zstd_open),
    "ndjson": write_jsonl,
    "json": lambda path, texts: Path(path).write_text(json.dumps([{"text": text} for text in texts], indent=1)),
    "json.gz": lambda path, texts: write_jsonl(path, texts, gzip.open),
    "JSONL": write_jsonl,
    "csv": write_csv,
    "arrow": write_arrow,
}


@pytest.mark.parametrize("make", [*WRITERS, "txt", "txt.gz", "mixed"])
def test_every_file_format_gives_the_same_ids(make, here, byte_tokenizer):
    """Bugs: a format or compression refused, upper case refused, files out of natural order."""
    middle = len(DOCS) // 2
    if make.startswith("txt"):
        for i, text in enumerate(DOCS):
            (gzip.open if make.endswith("gz") else open)(f"a_{i}.{make}", "wb").write(text.encode())
    elif make == "mixed":
        write_parquet("a_2.parquet", DOCS[:middle])
        write_jsonl("a_10.jsonl", DOCS[middle:])
    else:
        WRITERS[make](f"a_2.{make}", DOCS[:middle])
        WRITERS[make](f"a_10.{make}", DOCS[middle:])  # natural order: after a_2
    made = prepare("d", ["a_10.jsonl", "a_2.parquet"] if make == "mixed" else "a_*")
    for directory, texts in zip(("d", "d_val"), by_hash(DOCS)):
        assert texts and np.array_equal(stream(directory), ids_of(byte_tokenizer, texts))
    assert sum(m["text_bytes"] for m in made.values()) == sum(len(text.encode()) for text in DOCS)


@pytest.mark.parametrize("kind", ["large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_every_type_of_text_column(kind, here, byte_tokenizer):
    """Bugs: text kept as bytes refused; an id that Python cannot express (a year beyond 9999) ends the run; a null
    taken for a text."""
    texts = [*DOCS, None, "b\0", "<|endoftext|>", ""]
    ids = pyarrow.array([2**60] * len(texts), pyarrow.timestamp("us"))
    column = pyarrow.array([t and t.encode() for t in texts] if "binary" in kind else texts)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "text": column}), "a.parquet")
    made = prepare("d", "a.parquet")
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, by_hash(filter(None, texts))[0]))
    assert made["train"]["skipped"] == skipped(none=1, empty=1)


def test_odd_names_and_one_file_under_two_names(here, byte_tokenizer):
    """Bugs: `[1]` in a folder's name is a pattern; one file read twice, or 41 times through a loop of links."""
    Path("runs [1]").mkdir()
    write_jsonl("runs [1]/a,=::b.jsonl", DOCS)
    os.symlink("a,=::b.jsonl", "runs [1]/b.jsonl")
    os.symlink(".", "runs [1]/loop")
    prepare("d", ["runs [1]/a,=::b.jsonl", str(here / "runs [1]" / "a,=::b.jsonl"), "**/*.jsonl"])
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, by_hash(DOCS)[0]))


def test_a_parquet_file_of_no_rows_and_an_empty_text_file(here):
    """Bug: a footer that says 0 rows: ZeroDivisionError."""
    write_parquet("a.parquet", pyarrow.array([], pyarrow.string()))
    for name, text in ("b.jsonl", ""), ("c.txt", ""), ("d.csv", "text\n"):
        Path(name).write_text(text)
    write_jsonl("e.jsonl", DOCS)
    made = prepare("d", "[a-e].*")
    assert made["train"]["skipped"] == skipped(empty=1) and sum(m["documents"] for m in made.values()) == len(DOCS)


def test_text_that_looks_like_something_else_stays_as_it_is(here, byte_tokenizer):
    """Bugs: dates and numbers guessed from text, "NA" taken for nothing, carriage returns, a byte order mark, a line
    cut at a character that only other programs take for the end of one."""
    texts = ["2020-01-01", "007", "1.50", "NA", "null", "true", "a\r\nb", '"x", y', "2021-01-01 00:00:00", "a\u2028b"]
    write_csv("a.csv", texts)
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts)
    Path("b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    Path("v.txt").write_text("validation")
    for name in "a.csv", "b.jsonl":
        prepare(name[0], name, val_files="v.txt")
        assert np.array_equal(stream(name[0]), ids_of(byte_tokenizer, texts)), name


def test_split_on_cuts_texts_at_a_literal_marker(here, byte_tokenizer, monkeypatch):
    """Bugs: stories with <|endoftext|> lines between them, as TinyStories ships, are one document; a marker that lies
    across two reads of the file is not found."""
    from support import rows

    monkeypatch.setattr(rows, "SPLIT_CHARS", 100)
    eot = "\n<|endoftext|>\n"
    Path("a.txt").write_text(eot.join(DOCS) + eot)
    write_jsonl("b.jsonl", [eot.join(DOCS)])
    for name in "a.txt", "b.jsonl":
        made = prepare(name[0], name, split_on="<|endoftext|>")
        assert np.array_equal(stream(name[0]), ids_of(byte_tokenizer, by_hash(DOCS)[0])), name
        assert made["train"]["skipped"] == skipped()
    assert prepare("c", "b.jsonl")["train"]["documents"] == 1  # without it, text


def test_one_document_trains_with_its_first_part_and_validates_with_its_last(here, byte_tokenizer):
    """Bugs: one text file, for which no value of --val_share works; what was replaced in it counted twice."""
    text = DOCS[0] * 100
    Path("a.txt").write_text(text)
    made = prepare("d", Path("a.txt"), val_share=None)
    at = int(len(text) * 0.95)
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, [text[:at]]))
    assert np.array_equal(stream("d_val"), ids_of(byte_tokenizer, [text[at:]]))
    assert made["val"]["text_bytes"] + made["train"]["text_bytes"] == len(text.encode())
    made = prepare("e", write_jsonl("a.jsonl", ["\ud800" + text]), val_share=None)
    assert sum(m["replaced_surrogates"] for m in made.values()) == 1


def test_a_tokenizer_trained_on_the_same_text(here):
    """From a folder of text to shards in one command; the same tokenizer on every run, kept beside the shards."""
    for i, text in enumerate(DOCS):
        Path(f"{i}.txt").write_text(text)
    for name in "d", "e":
        made = prepare(name, "*.txt", tokenizer="gpt2", train_tokenizer=400)
    assert contents("d") == contents("e")
    assert made["train"]["tokenizer"]["vocab_size"] == load_tokenizer("d/tokenizer").vocab_size <= 400
    assert "quick" in load_tokenizer("d/tokenizer").decode(stream("d"))


def test_a_tokenizer_sees_a_bounded_part_of_the_training_text_alone(here, monkeypatch):
    """Bugs: a tokenizer that knows the validation text; one document of 10 GB is trained on as a whole."""
    seen, train = [], prepare_fineweb.train_tokenizer
    monkeypatch.setattr(
        prepare_fineweb, "train_tokenizer", lambda texts, n: seen.append([*texts]) or train(seen[-1] * 9, n)
    )
    for name, limit in ("d", 10**6), ("e", 60):
        monkeypatch.setattr(prepare_fineweb, "SAMPLE_CHARS", limit)
        prepare(name, write_jsonl("a.jsonl", DOCS), tokenizer="gpt2", train_tokenizer=300)
    assert seen[0] == by_hash(DOCS)[0] and seen[1] and all(len(text) <= 60 for text in seen[1]) and len(seen[1]) < 9


def test_same_bytes_for_any_workers_start_method_and_batch_size(here, monkeypatch):
    write_parquet("a.parquet", DOCS[:20], row_group_size=3)
    write_jsonl("b.jsonl", [*DOCS[20:40], "", None, "half \ud800 pair"])
    Path("c.txt").write_text(DOCS[40])
    write_parquet("d.parquet", DOCS[41:], row_group_size=2)

    def make(name, chars, **kwargs):
        monkeypatch.setattr(pieces, "BATCH_CHARS", chars)
        prepare(name, "*.*", shard_tokens=500, **kwargs)
        return contents(name), contents(f"{name}_val")

    for limit in None, 1500:
        expected = make(f"one{limit}", 10**6, max_tokens=limit)
        assert len(expected[0]) > 4 and len(expected[1]) > 2  # shards
        if limit is None:
            assert make(f"two{limit}", 300, num_proc=2, start_method="spawn", max_tokens=limit) == expected
        if os.name != "nt":
            assert make(f"four{limit}", 100, num_proc=4, start_method="fork", max_tokens=limit) == expected


def test_one_id_that_differs_ends_the_run(here, capsys, monkeypatch):
    """Bug: a fast tokenizer that is wrong for some text writes 10B wrong tokens."""
    real = pieces.load_tokenizer

    def wrong(folder):
        tokenizer = real(folder)
        right = tokenizer.encode_arrays
        tokenizer.encode_arrays = lambda texts: [
            ids[::-1] if "Document 0." in t else ids for t, ids in zip(texts, right(texts))
        ]
        return tokenizer

    monkeypatch.setattr(pieces, "load_tokenizer", wrong)
    line = refused(capsys, "--local_files", write_jsonl("a.jsonl", DOCS))
    assert "a.jsonl, row 1: the fast tokenizer gives other ids" in line and "Document 0." in line


def test_what_is_made_is_what_training_opens(here, byte_tokenizer):
    made = prepare("d", write_jsonl("a.jsonl", DOCS), val_share=0.2, shard_tokens=1000)
    for split, directory in ("train", "d"), ("val", "d_val"):
        data = FineWebDataset(directory, 32, split, byte_tokenizer.vocab_size)
        assert verify_shards(directory) == len(data.shards)
        assert data.manifest == made[split] and data.n_tokens == made[split]["tokens"]
        assert data.manifest["tokenizer"]["fingerprint"] == byte_tokenizer.fingerprint()
        assert data.manifest["tokenizer"]["eot_token"] == byte_tokenizer.eot_token
        assert load_tokenizer(Path(directory, "tokenizer")).fingerprint() == byte_tokenizer.fingerprint()
        assert sum(s["text_bytes"] for s in data.manifest["shards"]) == data.manifest["text_bytes"]


# --- what is not ordinary text


def test_policies_are_applied_and_counted(here, byte_tokenizer):
    odd = ["first", None, "", " \n\t\u3000", "a\0b", "x\ud800y\udc00\ud83d\ude00\ufffd"]
    odd += ["say <|endoftext|> twice", None, "last"]
    write_jsonl("a.jsonl", odd)
    made = prepare("d", "a.jsonl", val_files=write_jsonl("val.jsonl", ["", "validation"]))
    kept = ["first", "a\0b", "x\ufffdy\ufffd\U0001f600\ufffd", "say <|endoftext|> twice", "last"]
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, kept))
    assert np.count_nonzero(stream("d") == byte_tokenizer.eot_token) == len(kept)  # the literal is no boundary
    assert made["train"]["documents"] == len(kept)
    assert made["train"]["skipped"] == skipped(none=2, empty=1, whitespace=1)
    assert made["train"]["replaced_surrogates"] == 2
    assert made["train"]["text_bytes"] == sum(len(text.encode()) for text in kept)
    assert made["val"]["skipped"] == skipped(empty=1)
    assert made["val"]["documents"] == 1
    assert json.loads(Path("d", MANIFEST).read_text()) == made["train"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', ["a.jsonl, row 2", "int"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl", "after row 1"]),
        ("a.jsonl", b'{"content": "x"}\n', ["row 1", "content", "--text_column"]),
        ("a.jsonl", b"[1]\n", ["row 1", "a JSON int"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl", "cannot be read"]),
        ("a.jsonl", b"<html>", ["a.jsonl", "cannot be read"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-9], ["a.jsonl.gz", "cannot be read"]),
        ("a.parquet", b"PAR1 but no more", ["a.parquet", "cannot be read"]),
        ("a.arrow", b"x" * 99, ["a.arrow", "cannot be read"]),
        ("a.csv", b"id,body\n1,x\n", ["a.csv", "text", "id, body"]),
        ("a.txt", b"caf\xe9", ["a.txt", "cannot be read"]),
    ],
)
def test_bad_input_is_named(name, data, says, here, capsys):
    Path(name).write_bytes(data)
    line = refused(capsys, "--local_files", name, "--val_files", write_jsonl("val.jsonl", ["validation"]))
    assert all(word in line for word in says), line
    assert not list(here.glob(f"edu*/{MANIFEST}"))


@pytest.mark.parametrize("texts", [[1], [["a"]], [{"a": 1}], [datetime.date(2020, 1, 1)], [b"\xff"]], ids=str)
def test_a_column_that_is_not_text_is_named(texts, here, capsys):
    """Bug: numbers, dates or lists written as text."""
    write_parquet("a.parquet", texts)
    assert "a.parquet, row 1: the text is " in refused(capsys, "--local_files", "a.parquet")
    line = refused(capsys, "--local_files", "a.parquet", "--text_column", "content")
    assert "no column content, but id, text; see --text_column" in line
    Path("a.jsonl").write_text('{"content": "x"}\n')
    assert "no column text, but content; see --text_column" in refused(capsys, "--local_files", "a.jsonl")


def test_a_manifest_of_very_many_files_can_be_read(here, capsys, monkeypatch):
    """Bug: a preparation of a million small files ended well, with a manifest too large for any program to read."""
    monkeypatch.setattr(rows, "MOST_STAMPS", 5)
    for i in range(20):
        Path(f"{i}.txt").write_text(f"text number {i} " * 20)
    files = ["--local_files", *(f"{i}.txt" for i in range(20))]
    assert command(capsys, *files)[0] == 0
    source = json.loads(Path("edu_fineweb10B", MANIFEST).read_text())["source"]
    assert source["local_files"].keys() == {"files", "sha256"} and source["local_files"]["files"] == 20
    before = times(here)
    assert command(capsys, *files)[0] == 0 and times(here) == before
    Path("7.txt").write_text("another text")
    assert "local_files" in refused(capsys, *files)


# --- limits and splits


def test_limits_fall_on_document_borders_and_documents_cross_shards(here, byte_tokenizer):
    write_jsonl("a.jsonl", DOCS)
    lengths = {text: len(byte_tokenizer.encode(text)) + 1 for text in DOCS}
    train, _ = by_hash(DOCS)
    n = next(i for i in range(len(train)) if sum(lengths[text] for text in train[:i]) >= 1000)
    _, val = by_hash(DOCS[: DOCS.index(train[n - 1])])
    made = prepare("d", "a.jsonl", max_tokens=1000, shard_tokens=64)
    assert val and np.array_equal(stream("d_val"), ids_of(byte_tokenizer, val))
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, train[:n]))
    total = sum(lengths[text] for text in train[:n])
    assert [s["tokens"] for s in made["train"]["shards"]] == [64] * (total // 64) + [total % 64]
    said = {"shard_tokens": 64, "max_tokens": 1000, "val_share": VAL_SHARE, "min_score": None, "language": None}
    assert made["train"]["arguments"] == said | {"split_on": None, "train_tokenizer": None}
    assert max(lengths.values()) > 64


def test_validation_documents_do_not_depend_on_how_much_is_prepared(here):
    """Bug: with the first N tokens as validation, a larger preparation trained on what a smaller one validated on."""
    write_jsonl("a.jsonl", DOCS[:30])
    write_jsonl("b.jsonl", DOCS)
    prepare("all", "b.jsonl")
    prepare("half", "a.jsonl")
    prepare("part", "b.jsonl", max_tokens=2000)
    for name in "half", "half_val", "part", "part_val":
        less, more = stream(name), stream("all_val" if name.endswith("_val") else "all")
        assert len(less) < len(more) and np.array_equal(less, more[: len(less)])


def test_no_text_is_in_both_splits(here, byte_tokenizer):
    """Bugs: a text seen in training again in validation, under another id or from another file; validation files that
    are not taken as a whole."""
    write_jsonl("a.jsonl", [*DOCS, *DOCS[20:40]])
    prepare("d", "a.jsonl")
    for directory, texts in zip(("d", "d_val"), by_hash([*DOCS, *DOCS[20:40]])):
        assert np.array_equal(stream(directory), ids_of(byte_tokenizer, texts))
    val_files = [write_parquet("v.parquet", DOCS[5:7], row_group_size=10), write_jsonl("w.jsonl", DOCS[7:9])]
    how = dict(local_files="a.jsonl", val_files=val_files, shard_tokens=300)  # each file is a piece
    made = prepare("e", **how)
    assert made["train"]["skipped"] == skipped(in_validation=4)
    assert np.array_equal(stream("e"), ids_of(byte_tokenizer, [*DOCS[:5], *DOCS[9:], *DOCS[20:40]]))
    assert np.array_equal(stream("e_val"), ids_of(byte_tokenizer, DOCS[5:9]))
    assert prepare("f", **how, pieces="2:3") == {} and prepare("f", **how) == made


SCORED = [("en", 3.5), ("en", 2.0), ("de", 4.0), ("en", None), (None, 5.0), ("en", 3.0), ("en", float("nan"))]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_filters_take_what_they_say_and_count_the_rest(kind, here, byte_tokenizer):
    """Bugs: a null score taken for a good one; what was left out not counted."""
    rows = [{"text": f"text {i}", "language": lang, "score": x} for i, (lang, x) in enumerate(SCORED)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    elif kind == "csv":
        with open("a.csv", "w", newline="") as f:
            csv.writer(f).writerows([["text", "language", "score"], *(row.values() for row in rows)])
    else:
        rows = ({k: v for k, v in row.items() if v is not None} for row in rows)
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("val.jsonl").write_text(json.dumps({"text": "v", "language": "en", "score": 9}))
    made = prepare("d", f"a.{kind}", val_files="val.jsonl", min_score=3, language="en")
    assert np.array_equal(stream("d"), ids_of(byte_tokenizer, ["text 0", "text 5"]))
    assert made["train"]["skipped"] == skipped(language=2, no_score=1, low_score=2)
    assert prepare("e", f"a.{kind}", val_files="val.jsonl", min_score=3)["train"]["documents"] == 4
    assert prepare("f", f"a.{kind}", val_files="val.jsonl", language="en")["train"]["documents"] == 5


def test_int_score_serves_where_there_is_no_score_and_no_column_is_an_error(here, capsys):
    table = {"text": ["a", "b", "c"], "int_score": [2, 3, 4], "id": ["x", "y", "z"]}
    pyarrow.parquet.write_table(pyarrow.table(table), "a.parquet")
    Path("val.jsonl").write_text('{"text": "v", "score": 9}')
    options = ["--local_files", "a.parquet", "--val_files", "val.jsonl"]
    assert command(capsys, *options, "--min_score", 2.5)[0] == 0
    assert json.loads(Path("edu_fineweb10B", MANIFEST).read_text())["documents"] == 2
    line = refused(capsys, *options, "--language", "en", "--out_dir", "e")
    assert "no column language, but" in line and "int_score" in line
    pyarrow.parquet.write_table(pyarrow.table(table | {"score": ["good"] * 3}), "a.parquet")
    assert "row 1: the score is of type str" in refused(capsys, *options, "--min_score", 2.5, "--out_dir", "f")


def test_a_split_without_documents_is_refused_and_can_be_mended(here, capsys):
    """Bug: what was refused could not be asked for otherwise: the journal held on to the first wish."""
    options = ("--local_files", write_jsonl("a.jsonl", DOCS), "--val_share")
    line = refused(capsys, *options, 1e-9)
    assert "none of the 60 documents went to validation" in line and "raise --val_share, now 1e-09" in line
    line = refused(capsys, *options, 1 - 1e-9)
    assert "nothing is left to train on" in line and "--val_share" in line
    assert command(capsys, *options, VAL_SHARE)[0] == 0
    write_jsonl("a.jsonl", ["", None])
    line = refused(capsys, *A, "--out_dir", "e")
    assert "no document" in line and "1 none, 1 empty" in line


# --- accidents


@needs_fork
def test_a_killed_worker_is_an_error_within_seconds(here, capsys, monkeypatch):
    encode = pieces.encoded

    def dies(documents, tokenizer):
        for document, ids in encode(documents, tokenizer):
            if document.text.startswith("Document 31."):
                os.kill(os.getpid(), signal.SIGKILL)
            yield document, ids

    monkeypatch.setattr(pieces, "encoded", dies)
    files = [write_jsonl(name, DOCS) for name in ("a.jsonl", "b.jsonl")]
    start = time.monotonic()
    options = ("--num_proc", 2, "--shard_tokens", 500, "--start_method", "fork")
    line = refused(capsys, "--local_files", *files, *options)
    assert time.monotonic() - start < 60  # seconds on an idle machine; a hang has no end
    assert "process died" in line and "a.jsonl" in line
    assert not Path("edu_fineweb10B", MANIFEST).exists()


def test_ctrl_c_ends_the_piece_in_this_process_too(here, capsys, monkeypatch):
    """Bug: the prompt comes back when a piece of 100M tokens is made."""
    encode, seen = pieces.encoded, []

    def interrupted(flying, *args, **kwargs):
        while not seen:
            time.sleep(0.001)
        raise KeyboardInterrupt

    def slowly(documents, tokenizer):
        for document, ids in encode(documents, tokenizer):
            seen.append(document)
            time.sleep(0.01)
            yield document, ids

    monkeypatch.setattr(pieces, "BATCH_CHARS", 100)
    monkeypatch.setattr(pieces, "wait", interrupted)
    monkeypatch.setattr(pieces, "encoded", slowly)
    code, err = command(capsys, "--local_files", write_jsonl("a.jsonl", DOCS * 10))
    assert code == 130 and "the same command goes on" in err and len(seen) < 10 * len(DOCS)


@pytest.mark.parametrize("start_method", ["spawn", pytest.param("fork", marks=needs_fork)])
def test_a_worker_does_not_hear_ctrl_c(start_method):
    """Bug: Ctrl-C goes to all processes of a terminal, and ended the work of each, at whatever point it was."""
    with workers.open_workers(n=2, start_method=start_method) as (pool, _):
        assert pool.submit(signal.raise_signal, signal.SIGINT).exception(timeout=60) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("how", ["kill", "ctrl-c"])
def test_workers_leave_when_their_parent_is_killed_or_interrupted(how, here):
    """Bugs: workers that wait for work for ever; a traceback of each worker after Ctrl-C, which goes to all of them."""
    files = [write_jsonl("a.jsonl", DOCS), write_jsonl("b.jsonl", ["many words " * 100_000] * 90)]
    argv = [sys.executable, str(ROOT / "prepare_fineweb.py"), "--tokenizer", "vocabulary", "--local_files", *files]
    argv += ["--num_proc", "2", "--shard_tokens", "1000000"]
    with open("err", "w") as err:
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a shell's background job ignores it)
        parent = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=err, process_group=0, preexec_fn=heard)

    def alive(pids):
        states = (Path(f"/proc/{pid}/stat") for pid in pids)
        return [p for p in states if p.exists() and p.read_text().rsplit(")", 1)[1].split()[0] != "Z"]

    deadline = time.monotonic() + 120
    while not [*here.glob("edu*/pieces/0*")] and time.monotonic() < deadline:  # one works, the other has nothing to do
        assert parent.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 3  # two workers and the tracker of their resources
    parent.kill() if how == "kill" else os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(120) == (-signal.SIGKILL if how == "kill" else 130)
    while alive(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(children)
    assert how == "kill" or Path("err").read_text() == "interrupted; the same command goes on from here\n"


def test_leftovers_without_a_plan_are_begun_anew(here, capsys):
    """Bug: what an older version or a run killed in its first moments left behind became part of the shards."""
    write_jsonl("a.jsonl", DOCS)
    Path("d", "tokenizer").mkdir(parents=True)
    for name in "fineweb_train_000777.npy", ".fineweb_train_000002.host.4711.unfinished", ".manifest.json.47.tmp":
        Path("d", name).write_bytes(b"of a longer run")
    Path("d", "pieces").mkdir()
    Path("d", "pieces", "plan.json").write_text("{}")  # of another recipe, but no piece is made that could be lost
    for directory in "d", "e":
        assert command(capsys, *A, "--out_dir", directory)[0] == 0
    assert contents("d") == contents("e") and contents("d_val") == contents("e_val")


@pytest.mark.slow
def test_a_document_of_50_megabytes_is_one_document(here, byte_tokenizer):
    """Bugs: cut at a batch or a shard; a batch that is taken for lost because it takes long."""
    line = "The quick brown fox, naïve 🦊, jumps.\n"
    text = line * 1_250_000
    assert len(text.encode()) > 50e6
    write_parquet("a.parquet", [DOCS[0], text, DOCS[1]])
    made = prepare("d", "a.parquet", val_files=write_jsonl("val.jsonl", DOCS[2:3]), shard_tokens=10**6)
    assert made["train"]["documents"] == 3 and len(made["train"]["shards"]) > 20
    of_text = np.tile(byte_tokenizer.encode(line), 1_250_000)  # a line ends where a token ends
    before, after = (ids_of(byte_tokenizer, [text]) for text in DOCS[:2])
    assert np.array_equal(stream("d"), np.concatenate([before, [byte_tokenizer.eot_token], of_text, after]))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_inside_a_piece(terminal, here, capsys, monkeypatch):
    """Bugs: minutes without a word while one large piece is made; a bar that stands still until the next is done."""
    monkeypatch.setattr(pieces, "BAR_SECONDS", 0.01)
    monkeypatch.setattr(pieces, "LINE_SECONDS", 0)
    monkeypatch.setattr(pieces, "BYTES_PER_TOKEN", 1e-4)  # of a source file: so each is a piece
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "120")
    encode = pieces.encoded

    def slowly(documents, tokenizer):
        for document, ids in encode(documents, tokenizer):
            time.sleep(0.01)
            yield document, np.tile(ids, 3000)

    monkeypatch.setattr(pieces, "encoded", slowly)
    prepare("d", [write_jsonl("a.jsonl", DOCS), write_jsonl("b.jsonl", DOCS)])
    said = capsys.readouterr()
    second = said.err.split("| 1/2 [", 1)[1] if terminal else said.out.split("1 of 2 pieces made")[1]
    told = [int(n) for n in re.findall(r"(\d+) MB of shards so far", second.split("2/2")[0])]
    assert told == sorted(told) and len(set(told)) > 2
    assert told[-1] <= 1 + sum(p.stat().st_size for p in here.glob("d*/*.npy")) / 1e6


# --- an unfinished run


UNFINISHED = ["--local_files", "a.parquet", "--val_share", VAL_SHARE, "--shard_tokens", 300, "--out_dir"]


@pytest.fixture(scope="module")
def died(byte_tokenizer, tmp_path_factory):
    """A folder with an undisturbed run and one that died, `d`: its first pieces are done, one is half-written."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("died"))
        m.setattr(plot_run, "plot_lengths", lambda *arguments: None)
        Path("vocabulary").mkdir()
        byte_tokenizer.save(Path("vocabulary"))
        write_parquet("a.parquet", DOCS, row_group_size=3)
        argv = [str(a) for a in ("--tokenizer", "vocabulary", "--num_proc", 1, *UNFINISHED)]
        assert run(lambda: prepare_fineweb.main([*argv, "undisturbed"])) == 0

        def dies(documents, tokenizer):
            for document, ids in encoded(documents, tokenizer):
                if document.text == DOCS[40]:
                    raise KeyboardInterrupt
                yield document, ids

        encoded = pieces.encoded
        m.setattr(pieces, "encoded", dies)
        assert run(lambda: prepare_fineweb.main([*argv, "d"])) == 130
        assert len(list(Path("d", "pieces").glob("0*.json"))) > 1 and not Path("d", MANIFEST).exists()
        assert not list(Path("d").glob(".fine*"))  # an error leaves nothing half-written
        return Path.cwd()


@pytest.fixture
def unfinished(died, here, monkeypatch):
    """Flags that go on with a copy of it, in the working directory."""
    monkeypatch.setattr(prepare_fineweb, "LOCK_SECONDS", 0)
    shutil.copytree(died, here, dirs_exist_ok=True)
    return [*UNFINISHED, "d"]


def finished_like_the_undisturbed():
    return all(contents(f"d{suffix}") == contents(f"undisturbed{suffix}") for suffix in ("", "_val"))


def test_an_unfinished_run_goes_on(unfinished, capsys, monkeypatch):
    """Bug: begun anew, which after a night is as bad as an error."""
    done, made, make = set(Path("d", "pieces").glob("0*.json")), [], pieces.make_piece
    with monkeypatch.context() as m:
        m.setattr(pieces, "make_piece", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        code, err = command(capsys, *unfinished)
        assert code == 130 and err.endswith("interrupted; the same command goes on from here\n")
    monkeypatch.setattr(pieces, "make_piece", lambda job: made.append(job.piece.number) or make(job))
    code, err = command(capsys, *unfinished)
    assert code == 0, err
    assert made and not {f"{n:06d}" for n in made} & {path.stem for path in done}
    assert finished_like_the_undisturbed()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_facts_speak_of_nothing_that_a_power_cut_can_take(here, monkeypatch):
    """Bug: what no kill shows: facts on the disk before the shards that they count, a manifest before either."""
    fsync, replace, synced, checked = os.fsync, os.replace, {}, []

    def recorded_fsync(fd):
        fsync(fd)
        fd = fd if isinstance(fd, int) else fd.fileno()
        synced[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size

    def recorded_replace(source, target):
        source, target = (str(Path(p).absolute()) for p in (source, target))
        replace(source, target)
        synced[target] = synced.pop(source)  # KeyError: renamed before it was on the disk
        if "/pieces/0" in target or target.endswith(MANIFEST):
            told = json.loads(Path(target).read_text())
            for shard in [*told.get("shards", []), *told.get("train", {}).get("shards", [])]:
                [path] = [p for p in here.glob(f"d*/{shard['name']}")]
                assert synced[str(path)] == 128 + 2 * shard["tokens"]
                checked.append(path)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    prepare("d", write_parquet("a.parquet", DOCS, row_group_size=3), shard_tokens=300)
    assert len(checked) > 20


def test_an_unfinished_run_is_not_continued_otherwise(unfinished, capsys):
    """Bug: shards whose first half was made with other settings than the second."""
    before = contents("d")
    for change, says in [
        (["--shard_tokens", 700], ["shard_tokens there 300, now 700"]),
        (["--val_share", 0.3], ["val_share there 0.15, now 0.3"]),
        (["--split_on", "fox"], ["split_on there None, now 'fox'"]),
        (["--text_column", "id"], ["text_column there 'text', now 'id'"]),
    ]:
        line = refused(capsys, *unfinished, *change)
        assert all(word in line for word in ["was begun with another recipe", "--restart", *says]), line
    assert contents("d") == before
    train_tokenizer(DOCS, 300).save(Path("d", "tokenizer"))
    assert "d/tokenizer: changed since this preparation began" in refused(capsys, *unfinished)
    assert command(capsys, *unfinished, "--shard_tokens", 700, "--restart")[0] == 0
    assert json.loads(Path("d", MANIFEST).read_text())["arguments"]["shard_tokens"] == 700
    assert command(capsys, *unfinished, "--restart")[0] == 0  # also of what is complete
    assert finished_like_the_undisturbed()


@pytest.mark.parametrize("what", ["facts cut", "no facts", "other plan", "shard gone", "shard cut", "other shard"])
def test_facts_that_cannot_be_right_are_made_again(what, unfinished, capsys):
    """Bugs: tracebacks; shards with a hole where tokens were lost."""
    path, shard = Path("d", "pieces", "000001.json"), Path("d", "fineweb_train_000001_000000.npy")
    if what == "facts cut":
        path.write_text(path.read_text()[:99])
    elif what == "no facts":
        path.write_text("{}")
    elif what == "other plan":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"plan": "x"}))
    elif what == "shard gone":
        shard.unlink()
    elif what == "other shard":
        np.save(shard, np.load(shard)[:-1])
    else:
        shard.write_bytes(b"x")
    assert command(capsys, *unfinished)[0] == 0
    assert finished_like_the_undisturbed()


@pytest.mark.skipif(fcntl is None, reason="no flock")
def test_two_processes_do_not_prepare_the_same_directory(unfinished, capsys):
    """Bugs: one removes what the other is writing; the processes of a run that was just killed are not waited for."""
    with prepare_fineweb.only_writer(pieces.split_directories("d")):
        assert "another process is preparing it" in refused(capsys, *unfinished)
    fd = os.open("d/.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    prepare_fineweb.LOCK_SECONDS = 60  # undone by the fixture
    threading.Timer(0.3, os.close, (fd,)).start()
    assert command(capsys, *unfinished)[0] == 0


def test_parts_made_by_several_hosts(unfinished, capsys):
    """Job arrays: any order, parts of one plan, and the plain command finishes with the bytes of one run."""
    for part in "2:3", "0:3", "1:3":
        assert command(capsys, *unfinished, "--pieces", part)[0] == 0
        assert not Path("d", MANIFEST).exists()
    assert command(capsys, *unfinished)[0] == 0
    assert finished_like_the_undisturbed()


@pytest.mark.parametrize("more", [(), ("--pieces", "0:2")], ids=["", "pieces"])
def test_what_another_command_finishes_meanwhile_is_kept(more, unfinished, capsys, monkeypatch):
    """Bug: a command that had waited for the lock removed all shards and both manifests of the one that had it."""
    only_writer, seen = prepare_fineweb.only_writer, {}

    def while_another_finishes(*args):
        monkeypatch.setattr(prepare_fineweb, "only_writer", only_writer)
        assert command(capsys, *unfinished)[0] == 0
        seen.update(times(Path()))
        return only_writer(*args)

    monkeypatch.setattr(prepare_fineweb, "only_writer", while_another_finishes)
    assert command(capsys, *unfinished, *more)[0] == 0
    assert seen and times(Path()) == seen and finished_like_the_undisturbed()


def test_training_pieces_wait_for_what_validates(tmp_path, monkeypatch):
    """Bug: of two processes one trains on texts of --val_files, because the other has not read them yet."""
    ended, there = [], []

    def make(job):
        there.append((job.piece.role, len(ended)))
        time.sleep(0.5 * (job.piece.number == 1))
        ended.append(job.piece.number)
        return {}

    monkeypatch.setattr(pieces, "make_piece", make)
    todo = [pieces.Piece(i, role, [""]) for i, role in enumerate(("val", "val", "train", "train"))]
    with ThreadPoolExecutor(2) as pool:
        pieces.make_missing(pieces.Job(PrepareConfig(out_dir=str(tmp_path)), None, "plan"), todo, {}, pool, 2)
    assert min(n for role, n in there if role == "train") == 2


def test_tokens_behind_a_gap_do_not_count(tmp_path):
    """Bug: the end of a limited corpus was not made, or cut short, where a later piece was done before an earlier."""
    todo, made = [pieces.Piece(i, "train", [""]) for i in range(4)], {"train": {"tokens": 30}}
    assert pieces.tokens_left(PrepareConfig(max_tokens=100), todo, {0: made, 2: made}) == 70


def test_many_documents_that_validate_are_remembered(here, capsys):
    """Bug: the facts of 1.8 million documents, 64 MiB, were never read again: the piece was made each time anew."""
    flags = ["--local_files", write_jsonl("a.jsonl", DOCS), "--val_files", write_jsonl("v.jsonl", DOCS[:3])]
    flags += ["--out_dir", "d"]
    assert command(capsys, *flags, "--pieces", "0:2")[0] == 0
    facts = Path("d", "pieces", "000000.json")
    with open(facts, "a") as f:
        f.write(" " * JSON_LIMIT)
    assert command(capsys, *flags, "--pieces", "1:2")[0] == 0
    assert facts.stat().st_size > JSON_LIMIT
    assert json.loads(Path("d", "pieces", "000001.json").read_text())["skipped"]["in_validation"] == 3


# --- the same command again


@pytest.mark.skipif(
    os.name == "nt" or (os.geteuid() == 0 and not shutil.which("unshare")), reason="needs a read-only folder"
)
def test_a_rerun_of_the_same_does_nothing_and_needs_no_right_to_write(here, capsys, monkeypatch):
    """Bug: "[Errno 30] Read-only file system" instead of "already prepared"."""
    write_jsonl("a.jsonl", DOCS)
    assert command(capsys, *A)[0] == 0
    before = times(here)

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    for name in "mkdir", "unlink", "replace", "rmdir", "rename":
        monkeypatch.setattr(os, name, read_only)
    argv = [*A, "--tokenizer", "vocabulary", "--num_proc", 2]
    assert run(lambda: prepare_fineweb.main([str(a) for a in argv])) == 0
    out = capsys.readouterr().out
    assert "already prepared" in out and "--data_dir edu_fineweb10B --val_data_dir edu_fineweb10B_val" in out
    assert times(here) == before


CHANGES = [
    (["--shard_tokens", "77"], ["shard_tokens", "77", "100000000"]),
    (["--val_share", "0.2"], ["val_share", "0.2", "0.15"]),
    (["--min_score", "1"], ["min_score", "None", "1.0"]),
    (["--split_on", "x"], ["split_on", "None", "x"]),
    (["--max_tokens", "900"], ["max_tokens", "900"]),
    (["--tokenizer", "other"], ["tokenizer", "fingerprint"]),
    (["--local_files", "b.jsonl"], ["source", "b.jsonl"]),
]


def test_a_rerun_made_otherwise_is_refused(here, capsys):
    for name in "a.jsonl", "b.jsonl":
        write_jsonl(name, DOCS)
    Path("other").mkdir()
    train_tokenizer(DOCS, 300).save("other")
    assert command(capsys, *A)[0] == 0
    before = contents("edu_fineweb10B")
    for change, says in CHANGES:
        line = refused(capsys, *A, *change)
        assert all(word in line for word in says), line
    write_jsonl("a.jsonl", [*DOCS[:-1], DOCS[-1].replace("quick", "quack")])  # of the same size
    line = refused(capsys, *A)
    assert "source" in line and "a.jsonl" in line
    assert contents("edu_fineweb10B") == before


def test_a_change_anywhere_in_a_source_file_is_seen(here):
    """Bug: another text under an old name and of the same size taken for the one that is prepared."""
    for at, time_of_change in (0, 1), (100_000, 2), (199_999, 1):  # in the midst only the time says so
        data, seen = bytearray(200_000), []
        for changed in 0, time_of_change:
            data[at] = changed
            Path("a.txt").write_bytes(data)
            os.utime("a.txt", (1, changed or 1))
            seen.append(stamps([File("a.txt", len(data))]))
        assert seen[0] != seen[1], at


@pytest.mark.parametrize("foreign", ["notes.txt", "fineweb_train_000000.npy.bak", "tokenizer/mine.json", "sub/x.npy"])
@pytest.mark.parametrize("restart", [(), ("--restart",)], ids=["", "restart"])
def test_nothing_is_deleted_from_a_directory_with_other_files(foreign, restart, here, capsys):
    write_jsonl("a.jsonl", DOCS)
    path, leftover = Path("d", foreign), Path("d", "fineweb_train_000000.npy")
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    leftover.write_bytes(b"left")
    line = refused(capsys, *A, "--out_dir", "d", *restart)
    assert Path(foreign).parts[0] in line or path.name in line
    assert path.read_text() == "precious" and leftover.exists()


@pytest.mark.parametrize("name", [".DS_Store", "tokenizer/._x.json", ".git/x.tmp"])
def test_hidden_files_of_the_system_neither_disturb_nor_are_deleted(name, here, capsys):
    """Bug: a look into the folder with the Finder, and the next command is refused."""
    path = Path("d", name)
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert command(capsys, "--local_files", write_jsonl("a.jsonl", DOCS), "--val_share", 0.15, "--out_dir", "d")[0] == 0
    assert path.read_text() == "precious"


# --- arguments


def test_all_problems_with_the_arguments_come_at_once(here, capsys):
    write_jsonl("a.jsonl", DOCS)
    line = refused(
        capsys, "--local_files", "nothing_*.parquet", "--val_files", "a.jsonl", "--dataset", "x", "--max_tokens", 0,
        "--shard_tokens", 0, "--num_proc", -1, "--val_share", 0, "--start_method", "sporn", "--min_score", "nan",
        "--ray_address", "x", "--pieces", "3:3",
    )  # fmt: skip
    words = ["nothing_*.parquet", "sporn", "--val_share is 0.0; it must be above 0", "--pieces 3:3: expected"]
    words += [f"--{x}" for x in ("dataset", "max_tokens", "shard_tokens", "num_proc", "min_score", "ray_address")]
    words += ["--val_share: not together"]
    for word in [*words, "a.jsonl"]:  # the last one is what is there instead
        assert word in line, line
    assert not Path("edu_fineweb10B").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--local_files", "no/such/*.parquet"], ["no/such/*.parquet", "no such file"]),
        (["--local_files", "folder"], ["folder", "*.parquet"]),
        (["--local_files", "a.pdf"], ["a.pdf", ".jsonl"]),
        (["--local_files", ""], ["no such file"]),
        (["--local_files", "a.jsonl", "--val_files", "./a.json*"], ["a.jsonl", "both"]),
        (["--local_files", "a.jsonl", "--tokenizer", "folder"], ["folder", "tokenizer.json"]),
        (["--local_files", "a.jsonl", "--out_dir", "a.pdf", "--val_share", "0.1"], ["a.pdf", "a file"]),
        (["--local_files", "a.jsonl", "--demo"], ["--local_files", "--demo"]),
    ],
)
def test_wrong_paths_exit_with_2_and_one_line(argv, says, here, capsys):
    write_jsonl("a.jsonl", DOCS)
    Path("folder").mkdir()
    Path("a.pdf").write_text("1,2")
    line = refused(capsys, *argv)
    assert all(word in line for word in says), line


def test_the_lengths_of_documents_are_counted_and_drawn(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer.save(tmp_path)
    made = prepare("d", write_jsonl("a.jsonl", DOCS), tokenizer=".")
    picture = Path("d", prepare_fineweb.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG") and not list(Path("d_val").glob("*.png"))
    for split, texts in zip(("train", "val"), by_hash(DOCS)):
        expected = {}
        for n in (len(byte_tokenizer.encode(text)) + 1 for text in texts):
            low = str(max(end for end in pieces.LENGTHS if end <= n))
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
    texts = []
    for tokens in stream(directory), stream(f"{directory}_val"):
        assert tokens.max() < 2048
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token))[1:]
        texts += [tokenizer.decode(part).removeprefix("<|endoftext|>") for part in documents]
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
    before = times(here)
    assert prepare_demo("again") == made
    assert times(here) == before
    with pytest.raises(UserError, match="vocab_size"):
        prepare_demo("again", vocab_size=1024)


def test_demo_corpus_that_another_run_has_made_meanwhile_is_kept(here, monkeypatch):
    """Of two runs that begin at once, the second removed the shards from which the first was already training."""
    monkeypatch.setattr(demo_corpus, "help_topics", lambda: [f"word{i} " * 100 for i in range(40)])
    monkeypatch.setattr(demo_corpus, "library_docstrings", list)
    monkeypatch.setattr(prepare_fineweb, "DEMO_LEAST", 0)
    train, seen = prepare_fineweb.train_tokenizer, {}

    def while_another_makes_it(*args):
        monkeypatch.setattr(prepare_fineweb, "train_tokenizer", train)
        prepare_demo("d", vocab_size=300)
        seen.update(times(here))
        return train(*args)

    monkeypatch.setattr(prepare_fineweb, "train_tokenizer", while_another_makes_it)
    assert prepare_demo("d", vocab_size=300)["train"]["documents"] == 38
    assert seen and times(here) == seen


def test_the_demo_deletes_no_unfinished_preparation(unfinished, capsys):
    """Bug: --demo with the folder of another preparation removed its pieces without a word."""
    before = contents("d")
    assert run(lambda: prepare_fineweb.main(["--demo", "--out_dir", "d"])) == 2
    line = capsys.readouterr().err
    assert "d: was begun with another recipe" in line and "begin anew with --restart" in line
    assert contents("d") == before
    assert run(lambda: prepare_fineweb.main(["--demo", "--out_dir", "d", "--restart"])) == 0
    assert json.loads(Path("d", MANIFEST).read_text())["source"]["vocab_size"] == 2048


def test_demo_needs_no_documentation_elsewhere(here, monkeypatch):
    monkeypatch.setattr(demo_corpus, "help_topics", list)
    monkeypatch.setattr(demo_corpus, "library_docstrings", list)
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
