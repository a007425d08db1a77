"""Text in, token shards out: FineWeb-Edu from the hub, files of your own, or a demo corpus made offline.

Notable: one pass in flat memory. Documents are read in order, tokenized by worker processes in
batches of about 1 MB, and consumed in order again, so the shards are the same bytes for any
number of workers. manifest.json, written last, says what is inside; the tokenizer is saved beside
it, so that training needs no network. A document is <|endoftext|> and then its text.

What is not ordinary text: None, "" and whitespace alone are skipped and counted; half a surrogate
pair becomes U+FFFD and is counted; NUL stays; a literal "<|endoftext|>" stays text; anything that
is not a string is an error. One split ends and the next begins at a document border.
"""

import ast
import glob
import gzip
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import sysconfig
import threading
import time
import warnings
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data_processing_fineweb import MANIFEST, ShardWriter, find_shards, natural, permutation
from errors import Parser, UserError, run
from tokenizer import END_OF_TEXT, FILE, TextTokenizer, load_tokenizer, replace_surrogates

OUT_DIR, DEMO_DIR = "edu_fineweb10B", "demo_corpus"
DATASET, SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
SHARD_TOKENS, VAL_TOKENS = 100_000_000, 10_000_000
MOST_SHARD_TOKENS, MOST_PROCESSES = 2**31, 1024  # a shard is built in memory; a system has so many semaphores
BATCH_CHARS, BATCH_ROWS = 1_000_000, 10_000  # one errand of a worker, about a third of a second
AHEAD = 3  # batches in flight per worker
REASONS = ("none", "empty", "whitespace")  # why a row is skipped


# ---------------------------------------------------------------------------------------
# Sources. rows() yields (text, where it is from, row number counted from 1, bytes of the source read so far).


@dataclass
class LocalFiles:
    paths: tuple
    text_column: str
    version = None

    def size(self):
        """Bytes on disk, the measure of what is left to do."""
        return sum(path.stat().st_size for path in self.paths)

    def facts(self) -> dict:
        names = (str(path).encode(errors="replace").decode() for path in self.paths)  # any name fits into JSON
        return {"files": {n: p.stat().st_size for n, p in zip(names, self.paths)}, "text_column": self.text_column}

    def rows(self):
        before = 0
        for path in self.paths:
            try:
                for text, row, read in reader_of(path)(path, self.text_column):
                    yield text, path, row, before + read
                before += path.stat().st_size
            except UserError:
                raise
            except ImportError as error:
                raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
            except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
                raise UserError(f"{path}: cannot be read ({one_line(error)})") from error


def read_parquet(path, column):
    import pyarrow.parquet

    try:
        yield from rows_of_parquet(pyarrow, path, column)
    except pyarrow.ArrowException as error:  # some of them are no ValueErrors
        raise ValueError(error) from error


def rows_of_parquet(pyarrow, path, column):
    with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            there = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {column!r}, but {there}; see --text_column")
        size, n_rows, row = path.stat().st_size, file.metadata.num_rows, 0
        for part in file.iter_batches(256, columns=[column]):  # within row groups: memory stays flat in large ones too
            for text in part.column(0).to_pylist():
                row += 1
                yield text, row, size * row // n_rows


def read_jsonl(path, column):
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a JSON {type(row).__name__}, expected an object")
            if column not in row:
                there = ", ".join(row) or "none"
                raise UserError(f"{path}, line {number}: no key {column!r}, but {there}; see --text_column")
            yield row[column], number, raw.tell()


def read_txt(path, column):
    data = path.read_bytes()
    yield data.decode("utf-8-sig"), 1, len(data)


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".jsonl.gz": read_jsonl, ".txt": read_txt}


def reader_of(path):
    return next((reader for ending, reader in READERS.items() if path.name.endswith(ending)), None)


def find_files(patterns, text_column) -> LocalFiles:
    """The files that the patterns match, each once, in natural order. UserError if a pattern matches none."""
    found = set()
    for pattern in map(os.path.expanduser, patterns):
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            folder = next((p for p in Path(pattern).parents if p.is_dir()), Path())
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise UserError(f"{pattern}: no such file; {folder.resolve()} holds {there}")
        found.update(map(Path, matches))
    paths = sorted(found, key=lambda path: [natural(Path(part)) for part in path.parts])
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: a folder; name the files in it, for example '{path}/*.parquet'")
        if reader_of(path) is None:
            raise UserError(f"{path}: cannot read this kind of file, expected {', '.join(READERS)}")
    return LocalFiles(tuple(paths), text_column)


@dataclass
class HubDataset:
    dataset: str
    subset: str | None
    revision: str | None
    text_column: str
    version: str | None = None  # the commit, known once reading has begun

    def size(self):
        return None

    def facts(self) -> dict:
        keys = ("dataset", "subset", "revision", "text_column")
        return {key: getattr(self, key) for key in keys}

    def rows(self):
        try:
            for number, row in enumerate(self.stream(), 1):
                if self.text_column not in row:
                    raise UserError(f"{self.dataset}: no column {self.text_column!r}, but {', '.join(row)}")
                yield row[self.text_column], self.dataset, number, 0
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"the hub is read with the datasets library ({error}); pip install datasets") from error
        except Exception as error:  # a hub has many ways to be out of reach
            raise UserError(
                f"dataset {self.dataset} ({self.subset}): the hub could not be read "
                f"({type(error).__name__}: {one_line(error)}). Check the network and the names, "
                "or fetch its parquet files by other means and name them with --local_files"
            ) from error

    def stream(self):
        """The rows, of one commit from the first to the last whatever is uploaded meanwhile."""
        import datasets
        import huggingface_hub

        if not Path(self.dataset).exists():
            info = huggingface_hub.HfApi().dataset_info(self.dataset, revision=self.revision, timeout=30)
            self.version = info.sha
        revision = self.version or self.revision
        return datasets.load_dataset(self.dataset, self.subset, split="train", revision=revision, streaming=True)


@dataclass
class Texts:
    """Documents already in memory."""

    texts: tuple
    name: str
    version: str
    settings: dict

    def size(self):
        return None

    def facts(self) -> dict:
        return {"texts": self.name, **self.settings}

    def rows(self):
        for number, text in enumerate(self.texts, 1):
            yield text, self.name, number, 0


def one_line(error):
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------
# Rows -> batches -> ids, in order.


@dataclass
class Batch:
    first: str  # where its first and last row are, for messages
    last: str = ""
    reasons: list = field(default_factory=list)  # one per row: why it is skipped, or None
    texts: list = field(default_factory=list)  # of the rows that are not
    read: int = 0  # bytes of the source


def skip_reason(text, origin, row):
    if text is None:
        return "none"
    if not isinstance(text, str):
        raise UserError(f"{origin}, row {row}: the text is of type {type(text).__name__}, expected a string")
    return "empty" if not text else "whitespace" if text.isspace() else None


def batches(rows):
    """Groups rows until a batch holds BATCH_CHARS characters; where batches end changes no byte of the output."""
    batch, chars, before, read = None, 0, 0, 0
    for text, origin, row, read in rows:
        batch = batch or Batch(first=f"{origin}, row {row}")
        reason = skip_reason(text, origin, row)
        batch.reasons.append(reason)
        if reason is None:
            batch.texts.append(text)
            chars += len(text)
        if chars >= BATCH_CHARS or len(batch.reasons) >= BATCH_ROWS:
            batch.last, batch.read = f"{origin}, row {row}", read - before
            yield batch
            batch, chars, before = None, 0, read
    if batch:
        batch.last, batch.read = f"{origin}, row {row}", read - before
        yield batch


def clean(text):
    """The text as it is tokenized, and how many halves of surrogate pairs became U+FFFD."""
    cleaned = replace_surrogates(text)
    return cleaned, 0 if cleaned is text else cleaned.count("\ufffd") - text.count("\ufffd")


def encode(tokenizer, texts):
    """All ids in one array, each document's after its marker, and per document a row (ids, text bytes, replaced).

    Arrays, because they travel between processes as plain bytes; OverflowError for an id that does not fit."""
    cleaned = [clean(text) for text in texts]
    encoded = tokenizer.encode_arrays([text for text, _ in cleaned])
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    marker = np.array([tokenizer.eot_token], np.uint32)
    ids = np.concatenate([marker[:0], *(part for ids in encoded for part in (marker, ids))])
    if ids.max(initial=0) > np.iinfo(dtype).max:
        raise OverflowError(f"token id {ids.max()} does not fit into {dtype}")
    sizes = [(len(ids) + 1, len(text.encode()), n) for ids, (text, n) in zip(encoded, cleaned)]
    return ids.astype(dtype), np.array(sizes, np.int64).reshape(-1, 3)


worker_tokenizer = None  # one per worker process; a pool offers no other place for what its initializer made


def start_worker(folder):
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already are one per core
    worker_tokenizer = load_tokenizer(folder)


def leave_with_parent():
    """A killed parent cannot stop its workers, and they would wait for the next batch for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(texts):
    return encode(worker_tokenizer, texts)


@contextmanager
def worker_pool(folder, num_proc, start_method):
    """Processes with the tokenizer of `folder` loaded; None for one process, which is this one.

    Spawned, not forked, unless asked: libraries may have started threads, and a fork beside threads can
    deadlock. Not multiprocessing.Pool, which waits for ever for a worker that was killed."""
    if num_proc == 1:
        yield None
        return
    context = multiprocessing.get_context(start_method or "spawn")
    pool = ProcessPoolExecutor(num_proc, context, start_worker, (str(folder),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def tokenize(source, tokenizer, pool, ahead):
    """(batch, its encoding) in the order of the source, with up to `ahead` batches in the pool."""
    if pool is None:
        for batch in batches(source.rows()):
            yield batch, encode(tokenizer, batch.texts)
        return
    flying, batch = deque(), None
    try:
        for batch in batches(source.rows()):
            flying.append((batch, pool.submit(encode_in_worker, batch.texts)))
            if len(flying) > ahead:
                yield flying[0][0], flying[0][1].result()
                flying.popleft()
        while flying:
            yield flying[0][0], flying[0][1].result()
            flying.popleft()
    except BrokenProcessPool as error:
        lost = flying[0][0] if flying else batch
        raise UserError(
            f"a tokenizer process died (killed, or out of memory) before it had finished {lost.first} to {lost.last}; "
            "start again, with a lower --num_proc if memory was short"
        ) from error


class Document(NamedTuple):
    ids: np.ndarray  # marker first; none if skipped
    text_bytes: int
    replaced: int  # halves of surrogate pairs
    skipped: str | None  # the reason
    read: int  # bytes of the source, all of a batch's counted to its first document


def documents(source, tokenizer, pool, ahead):
    """The source's documents in order, the skipped ones too."""
    for batch, (ids, sizes) in tokenize(source, tokenizer, pool, ahead):
        end, read, sizes = 0, batch.read, iter(sizes.tolist())
        for reason in batch.reasons:
            start, (length, text_bytes, replaced) = end, (0, 0, 0) if reason else next(sizes)
            end += length
            yield Document(ids[start:end], text_bytes, replaced, reason, read)
            read = 0


# ---------------------------------------------------------------------------------------
# Documents -> the two directories.


@dataclass
class Tally:
    """What went into one split, in the manifest's words."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: dict = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    replaced_surrogates: int = 0


def fill(writer, stream, limit, progress) -> Tally:
    """Takes documents from the stream until it ends or `limit` tokens are reached (None: no limit)."""
    tally = Tally()
    for document in stream:
        if document.skipped:
            tally.skipped[document.skipped] += 1
        else:
            writer.add(document.ids, document.text_bytes)
            tally.documents += 1
            tally.tokens += len(document.ids)
            tally.text_bytes += document.text_bytes
            tally.replaced_surrogates += document.replaced
        progress.add(document)
        if limit is not None and tally.tokens >= limit:
            break
    return tally


def write_splits(directories, sources, arguments, tokenizer, progress, num_proc=1, start_method=None):
    """Fills validation, then training, which goes on in the same stream where both have the same source.

    The dicts have a key per split. Manifests come last, so both splits are complete or neither is; returns them."""
    writers, tallies, stream = {}, {}, None
    for split, directory in directories.items():
        clear(directory, prefix(split))
        (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.save(directory / "tokenizer")
        writers[split] = ShardWriter(directory, tokenizer.vocab_size, arguments["shard_tokens"], prefix(split))
    with worker_pool(directories["train"] / "tokenizer", num_proc, start_method) as pool, progress:
        for split, limit in ("val", arguments["val_tokens"]), ("train", arguments["max_tokens"]):
            if split == "val" or sources["train"] is not sources["val"]:
                stream = documents(sources[split], tokenizer, pool, AHEAD * num_proc)
            tallies[split] = fill(writers[split], stream, limit, progress)
    refuse_empty(tallies)
    manifests = {}
    for split, writer in writers.items():
        facts = decisive(sources[split], arguments, tokenizer) | {"source_version": sources[split].version}
        manifests[split] = writer.close(split=split, **facts, **vars(tallies[split]))
    return manifests


@contextmanager
def errors_of_the_disk(directory):
    try:
        yield
    except OSError as error:  # those of reading have become UserErrors
        raise UserError(f"{error.filename or directory}: cannot be written ({error.strerror})") from error


def decisive(source, arguments, tokenizer):
    """What decides the bytes of the shards, in the manifest's words."""
    keys = ("name", "vocab_size", "eot_token")
    described = {key: getattr(tokenizer, key) for key in keys} | {"fingerprint": tokenizer.fingerprint()}
    return {"tokenizer": described, "source": source.facts(), "arguments": arguments}


def prefix(split):
    return f"fineweb_{split}"  # of the shards' names; nobody else's files begin with it


def refuse_empty(tallies):
    val, train = tallies["val"], tallies["train"]
    if not val.documents:
        raise UserError("the validation source holds no document with text in it")
    if not train.documents:
        raise UserError(
            f"nothing is left to train on: all {val.documents:,} documents ({val.tokens:,} tokens) went to validation; "
            f"lower --val_tokens (for example {max(1, val.tokens // 20):,}) or name validation files with --val_files"
        )


def clear(directory, prefix):
    """Removes what an unfinished run left behind. UserError, and nothing removed, if there is anything else."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: a file; name another --out_dir")
    shard = rf"{prefix}_\d{{6}}\.npy"
    ours = re.compile(rf"{shard}|{re.escape(MANIFEST)}|\.({shard}|{re.escape(MANIFEST)})\.\d+\.tmp")
    leftovers = [p for p in directory.iterdir() if p.name != "tokenizer"]
    saved = directory / "tokenizer"
    foreign = [p.name for p in leftovers if not ours.fullmatch(p.name) or not p.is_file()]
    foreign += [p.name for p in (saved.iterdir() if saved.is_dir() else ()) if p.name != FILE]
    if foreign:
        there = ", ".join(sorted(foreign)[:5])
        raise UserError(f"{directory}: holds files that this script did not write ({there}); name another --out_dir")
    for path in sorted(leftovers, key=lambda p: p.name != MANIFEST):  # the manifest first: it vouches for the rest
        path.unlink()


def differences(there, now, name=""):
    """The leaves in which two nested dicts differ, as text; a name (of a tokenizer) decides nothing."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in (there | now).keys() - {"name"}:
            yield from differences(there.get(key), now.get(key), f"{name} {key}")
    elif there != now:
        yield f"{name.strip()} there {there!r}, now {now!r}"


def already_prepared(directories, wanted) -> dict | None:
    """The manifests if both splits are complete, else None. UserError if one was made otherwise than `wanted`."""
    manifests = {}
    for split, directory in directories.items():
        if not (directory / MANIFEST).exists():
            continue
        manifests[split] = find_shards(directory, split)[1]
        found = {key: manifests[split].get(key) for key in wanted[split]}
        differing = sorted(differences(found, wanted[split]))
        if differing:
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise UserError(
                f"{directory}: already holds shards made otherwise: {'; '.join(differing[:5])}{more}. "
                "Name another --out_dir, or delete that folder"
            )
        check_counts(directory / MANIFEST, manifests[split])
    return manifests if len(manifests) == len(directories) else None


def check_counts(path, manifest):
    """UserError unless a manifest counts, as `write_splits` left it, what `summarize` tells."""
    numbers, skipped = [manifest.get(f.name) for f in fields(Tally) if f.name != "skipped"], manifest.get("skipped")
    counts = [*numbers, *skipped.values()] if isinstance(skipped, dict) else [None]
    if not all(type(n) is int and n >= 0 for n in counts) or not manifest["tokens"]:
        raise UserError(f"{path}: its counts of documents and tokens are damaged; delete that folder, start again")


class Progress:
    """A bar on a terminal, else a line every ten seconds: documents, tokens, rates and, where known, time left."""

    def __init__(self, source_bytes=None, target_tokens=None, shown=True):
        self.source_bytes, self.target_tokens, self.shown = source_bytes, target_tokens, shown
        self.documents = self.tokens = self.text_bytes = self.read = 0
        self.bar, self.start = None, time.monotonic()
        self.interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds between two updates
        self.next = self.start + self.interval

    def __enter__(self):
        if self.shown and sys.stderr.isatty():
            known = self.source_bytes or self.target_tokens
            self.bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {desc}" if known else "{desc}")
        return self

    def __exit__(self, *exc):
        if self.bar is not None:
            self.show()
            self.bar.close()

    def add(self, document):
        self.documents += document.skipped is None
        self.tokens += len(document.ids)
        self.text_bytes += document.text_bytes
        self.read += document.read
        if self.shown and time.monotonic() >= self.next:
            self.next = time.monotonic() + self.interval
            self.show()

    def show(self):
        by_bytes = self.read / self.source_bytes if self.source_bytes else 0.0
        by_tokens = self.tokens / self.target_tokens if self.target_tokens else 0.0
        done = min(1.0, max(by_bytes, by_tokens))  # 0 where it cannot be known
        line = f"{self.documents:,} documents, {self.tokens / 1e6:,.1f}M tokens, {self.rates()}"
        if done:
            left = (time.monotonic() - self.start) * (1 - done) / done
            line += f", {timedelta(seconds=round(left))} left"
        if self.bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.n = done
            self.bar.set_description_str(line)

    def rates(self):
        seconds = time.monotonic() - self.start
        return f"{self.tokens / seconds:,.0f} tokens/s, {self.text_bytes / seconds / 1e6:.2f} MB/s"


# ---------------------------------------------------------------------------------------
# The command.


def prepare(
    out_dir=OUT_DIR,
    *,
    dataset=None,
    subset=None,
    revision=None,
    local_files=None,
    val_files=None,
    text_column="text",
    tokenizer="gpt2",
    max_tokens=None,
    val_tokens=None,
    shard_tokens=SHARD_TOKENS,
    num_proc=None,
    start_method=None,
) -> dict[str, dict]:
    """Writes `out_dir` (training) and `<out_dir>_val` (validation) and returns their manifests by split.

    The arguments are the flags of the same names. Where both directories are complete and were made
    from the same arguments, nothing is done. UserError for what the user can mend, all faulty
    arguments in one. With several processes, a script that calls this needs the usual
    `if __name__ == "__main__":`.
    """
    num_proc = cores() if num_proc is None else num_proc
    numbers = {"max_tokens": max_tokens, "val_tokens": val_tokens, "shard_tokens": shard_tokens, "num_proc": num_proc}
    hub = {"dataset": dataset, "subset": subset, "revision": revision}
    sources = check(numbers, hub, local_files, val_files, text_column, start_method)
    if not val_files:
        val_tokens = val_tokens or VAL_TOKENS
    arguments = {"shard_tokens": shard_tokens, "max_tokens": max_tokens, "val_tokens": val_tokens}
    directories = split_directories(out_dir)
    tokenizer = load_tokenizer(tokenizer)
    manifests = already_prepared(directories, {s: decisive(sources[s], arguments, tokenizer) for s in sources})
    if manifests:
        print("already prepared, nothing to do")
    else:
        sizes = [source.size() for source in {id(s): s for s in sources.values()}.values()]
        target = max_tokens and max_tokens + (val_tokens or 0)
        progress = Progress(None if None in sizes else sum(sizes), target)
        with errors_of_the_disk(out_dir):
            manifests = write_splits(directories, sources, arguments, tokenizer, progress, num_proc, start_method)
        print(f"tokenized in {time.monotonic() - progress.start:,.1f} s (processes: {num_proc}): {progress.rates()}")
    summarize(directories, manifests)
    return manifests


def check(numbers, hub, local_files, val_files, text_column, start_method) -> dict:
    """The sources by split. UserError with everything that is wrong with the arguments."""
    problems = [f"--{k} {v}: must be 1 or more" for k, v in numbers.items() if v is not None and v < 1]
    most = {"shard_tokens": MOST_SHARD_TOKENS, "num_proc": MOST_PROCESSES}
    problems += [f"--{k} {numbers[k]}: must be {n:,} or less" for k, n in most.items() if (numbers[k] or 0) > n]
    if local_files:
        problems += [f"--{k} is for the hub: not together with --local_files" for k, v in hub.items() if v]
    if val_files and numbers["val_tokens"]:
        problems.append("--val_tokens: not together with --val_files, which are taken whole")
    if start_method not in (None, *multiprocessing.get_all_start_methods()):
        here = ", ".join(multiprocessing.get_all_start_methods())
        problems.append(f"--start_method {start_method}: this system has {here}")
    found = {}
    for flag, patterns in ("local_files", local_files), ("val_files", val_files):
        try:
            found[flag] = find_files(patterns, text_column) if patterns else None
        except UserError as error:
            problems.append(f"--{flag} {error}")
    if found.get("local_files") and found.get("val_files"):
        paths = [{path.resolve() for path in files.paths} for files in found.values()]
        problems += [f"{path}: both in --local_files and in --val_files" for path in sorted(paths[0] & paths[1])]
    if problems:
        raise UserError("; ".join(problems))
    dataset, subset = (hub["dataset"], hub["subset"]) if hub["dataset"] else (DATASET, hub["subset"] or SUBSET)
    train = found["local_files"] or HubDataset(dataset, subset, hub["revision"], text_column)
    return {"val": found["val_files"] or train, "train": train}


def split_directories(out_dir) -> dict:
    return {"val": Path(f"{Path(out_dir)}_val"), "train": Path(out_dir)}


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summarize(directories, manifests):
    for split in ("train", "val"):
        m = manifests[split]
        print(
            f"{directories[split]} ({split}): {m['documents']:,} documents, {m['tokens']:,} tokens, "
            f"{m['text_bytes'] / m['tokens']:.3f} bytes of text per token, shards: {len(m['shards'])}"
        )
        notes = [f"{n:,} {reason}" for reason, n in m["skipped"].items() if n]
        if notes:
            print(f"  skipped documents: {', '.join(notes)}")
        if m["replaced_surrogates"]:
            print(f"  halves of surrogate pairs replaced by U+FFFD: {m['replaced_surrogates']:,}")
    train, val = (shlex.quote(str(directories[split])) for split in ("train", "val"))
    print(f"next: python train.py --data_dir {train} --val_data_dir {val}")


# ---------------------------------------------------------------------------------------
# A small corpus that needs no network: what every CPython says about itself.

NOT_FOR_READERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_EVERYWHERE = {"distutils", "idlelib", "lib2to3"}  # some versions or systems lack them
DEMO_LEAST = 500_000  # characters; below it there is too little to learn from
VAL_EVERY = 20  # of the demo's documents, one is for validation


def prepare_demo(directory=DEMO_DIR, vocab_size=2048) -> dict[str, dict]:
    """Makes the demo corpus in `directory` and `<directory>_val` unless it is there; returns the manifests.

    About 2 MB of text: the language reference that help() shows, and the standard library's docstrings,
    one document per module. The tokenizer is a byte-level BPE of `vocab_size` ids trained on the training
    part. The same for the same Python version. UserError if `directory` holds anything else.
    """
    directories = split_directories(directory)
    settings = {"vocab_size": vocab_size, "val_every": VAL_EVERY}
    source = Texts((), "CPython's help topics and docstrings", platform.python_version(), settings)
    manifests = already_prepared(directories, {split: {"source": source.facts()} for split in directories})
    made = "there already"
    if not manifests:
        texts = [*help_topics(), *library_docstrings()]
        if sum(map(len, texts)) < DEMO_LEAST:
            raise UserError("this Python comes without its documentation; prepare text of yours with --local_files")
        order = permutation(np.arange(len(texts)), len(texts), 0, 0).tolist()
        parts = {"val": order[::VAL_EVERY], "train": [i for n, i in enumerate(order) if n % VAL_EVERY]}
        sources = {split: replace(source, texts=[texts[i] for i in part]) for split, part in parts.items()}
        tokenizer = train_tokenizer(sources["train"].texts, vocab_size)
        arguments = {"shard_tokens": SHARD_TOKENS, "max_tokens": None, "val_tokens": None}
        with errors_of_the_disk(directory):
            manifests = write_splits(directories, sources, arguments, tokenizer, Progress(shown=False))
        made = "made"
    train, val = manifests["train"], manifests["val"]
    print(
        f"demo corpus {made}: {directory}, {train['documents']:,} documents, {train['tokens']:,} tokens of a "
        f"vocabulary of {vocab_size:,}; for validation {val['documents']:,} documents, {val['tokens']:,} tokens"
    )
    return manifests


def help_topics():
    """The parts of the language reference that help() shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems pack it separately
        return []
    return [topics[name].strip() for name in sorted(topics)]


def library_docstrings():
    """One text per module of the standard library: what help() would say of its public names."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        if (NOT_FOR_READERS | NOT_EVERYWHERE) & set(names) or any(map(is_private, names)):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about old-fashioned escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        name = ".".join(part for part in names if part != "__init__")
        texts.append(replace_surrogates("\n\n".join(docstrings(tree, name))))
    return [text for text in texts if text]


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def docstrings(node, name):
    """Headings and docstrings of a module, class or function and all public ones in it, in source order."""
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    if isinstance(node, (ast.Module, ast.ClassDef)) or is_function:
        text = ast.get_docstring(node)  # indentation removed, as inspect.cleandoc does
        if text:
            yield f"{name}({ast.unparse(node.args)})" if is_function else name
            yield text
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None)
        if isinstance(child, ast.stmt) and not is_private(inner or ""):
            yield from docstrings(child, f"{name}.{inner}" if inner else name)


def train_tokenizer(texts, vocab_size) -> TextTokenizer:
    """A byte-level BPE learnt from the texts, the same for the same texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return TextTokenizer(backend, "demo")


# ---------------------------------------------------------------------------------------


def build_parser():
    parser = Parser(description="Tokenize text into shards to train on.")
    kinds = ", ".join(READERS)

    def add(flag, metavar, text, **more):
        parser.add_argument(f"--{flag}", metavar=metavar, help=text, **more)

    add("out_dir", "FOLDER", f"training shards; FOLDER_val gets those for validation (default: {OUT_DIR})")
    add("dataset", "NAME", f"dataset on the Hugging Face hub (default: {DATASET})")
    add("subset", "NAME", f"configuration of the dataset (default: {SUBSET})")
    add("revision", "COMMIT", "commit, tag or branch of the dataset (default: the newest commit)")
    add("local_files", "GLOB", f"read files instead of the hub: {kinds} (one document) (default: none)", nargs="+")
    add("val_files", "GLOB", "files that go to validation as a whole (default: none, see --val_tokens)", nargs="+")
    add("text_column", "NAME", "column or key of the text (default: text)", default="text")
    add("tokenizer", "NAME", "folder, tokenizer.json, or model on the hub (default: gpt2)", default="gpt2")
    add("max_tokens", "N", "training ends with the document that reaches N tokens (default: all)", type=int)
    first = f"the first documents, until N tokens are reached, go to validation (default: {VAL_TOKENS:,})"
    add("val_tokens", "N", f"without --val_files, {first}", type=int)
    add("shard_tokens", "N", f"tokens per shard (default: {SHARD_TOKENS:,})", type=int, default=SHARD_TOKENS)
    add("num_proc", "N", "processes that tokenize (default: one per core)", type=int)
    add("start_method", "NAME", "how they start: spawn, fork or forkserver (default: spawn)")
    demo = f"instead: 2 MB of Python's documentation, made offline, by default in {DEMO_DIR} (default: off)"
    parser.add_argument("--demo", action="store_true", help=demo)
    return parser


def main(argv=None):
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    demo, out_dir = options.pop("demo"), options.pop("out_dir")
    if not demo:
        prepare(out_dir or OUT_DIR, **options)
        return
    others = [f"--{name}" for name, value in options.items() if value != parser.get_default(name)]
    if others:
        raise UserError(f"{', '.join(others)}: not together with --demo")
    prepare_demo(out_dir or DEMO_DIR)


if __name__ == "__main__":
    sys.exit(run(main))
