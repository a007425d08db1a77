"""Text in, token shards out: FineWeb-Edu from the hub, files of your own, or a demo corpus made offline.

Notable: one pass in flat memory, and nothing is lost. Documents are read in order, tokenized elsewhere in batches of
about 1 MB, and consumed in order again, so the shards are the same bytes for any number of processes. A journal
says every few seconds how far that is; after a crash the same command goes on from there, and the bytes are those of
a run that was never disturbed. manifest.json, written last, says what is inside; the tokenizer is saved beside it, so
that training needs no network. A document is <|endoftext|> and then its text.

Which documents are for validation is a property of each: the hash of its id, so it does not depend on how much is
prepared. What is not ordinary text: None, "" and whitespace alone are skipped and counted; half a surrogate pair
becomes U+FFFD and is counted; NUL stays; a literal "<|endoftext|>" stays text; anything that is not a string is an
error.
"""

import math
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from data_processing_fineweb import MANIFEST, open_shard, permutation
from engines import digest, in_order, open_engine
from journal import (
    PICTURE,
    alone,
    already_prepared,
    begin,
    begin_anew,
    errors_of_the_disk,
    go_on,
    read_journal,
    split_directories,
)
from sources import READERS, HubFiles, Texts, find_files
from support.cli import Parser, UserError, run
from support.demo_corpus import help_topics, library_docstrings, train_tokenizer
from support.download import download
from tokenizer import load_tokenizer

OUT_DIR, DEMO_DIR = "edu_fineweb10B", "demo_corpus"
DATASET, SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
SHARD_TOKENS = 100_000_000
VAL_SHARE = 0.001  # of the documents: 10M of 10B tokens
MOST_SHARD_TOKENS, MOST_PROCESSES = 2**31, 1024  # files of 4 to 8 GB; a system has only so many semaphores
BATCH_CHARS, BATCH_ROWS = 1_000_000, 10_000  # one errand of a worker, about a third of a second


# ---------------------------------------------------------------------------------------
# Rows -> batches -> documents, in order.


@dataclass(frozen=True)
class Filters:
    """Which rows with text are taken."""

    min_score: float | None = None
    language: str | None = None

    def needed(self) -> tuple:
        """The columns they look at."""
        return ("score",) * (self.min_score is not None) + ("language",) * (self.language is not None)


TAKE_ALL = Filters()


class Verdict(NamedTuple):
    """What is known of a row before it is tokenized."""

    skipped: str | None  # the reason
    split: str | None  # None: the hash decides
    id: object


@dataclass
class Batch:
    first: str  # where its first and last row are, for messages
    last: str = ""
    verdicts: list = field(default_factory=list)  # one per row
    texts: list = field(default_factory=list)  # of the rows that are not skipped
    after: tuple = (0, 0)  # (file, row) from where to read on: files are counted over all sources
    read: int = 0  # bytes of all sources up to there


def skip_reason(row, filters, origin):
    if row.text is None:
        return "none"
    if not isinstance(row.text, str):
        raise UserError(f"{origin}, row {row.number}: the text is of type {type(row.text).__name__}, expected a string")
    if not row.text or row.text.isspace():
        return "whitespace" if row.text else "empty"
    if filters.language is not None and row.language != filters.language:
        return "language"
    if filters.min_score is None:
        return None
    if row.score is None:  # not known to be good enough
        return "no_score"
    if not isinstance(row.score, int | float):
        raise UserError(f"{origin}, row {row.number}: the score is of type {type(row.score).__name__}, not a number")
    return None if row.score >= filters.min_score else "low_score"


def rows_from(sources, start):
    """(split, source, file, row, bytes read) of all sources, [(split, source), ...], from position `start` on."""
    file = before = 0
    for split, source in sources:
        for i, size in enumerate(source.sizes):
            if file >= start[0]:
                for row in source.rows(i, start[1] if file == start[0] else 0):
                    yield split, source.name(i), file, row, before + row.read
            file, before = file + 1, before + size


def batches(sources, filters=TAKE_ALL, start=(0, 0)):
    """Groups rows until a batch holds BATCH_CHARS characters; where batches end changes no byte of the output."""
    batch, chars = None, 0
    for split, origin, file, row, read in rows_from(sources, start):
        batch = batch or Batch(first=f"{origin}, row {row.number}")
        reason = skip_reason(row, filters, origin)
        batch.verdicts.append(Verdict(reason, split, row.id))
        if reason is None:
            batch.texts.append(row.text)
            chars += len(row.text)
        if chars >= BATCH_CHARS or len(batch.verdicts) >= BATCH_ROWS:
            batch.last, batch.after, batch.read = f"{origin}, row {row.number}", (file, row.number), read
            yield batch
            batch, chars = None, 0
    if batch:
        batch.last, batch.after, batch.read = f"{origin}, row {row.number}", (file, row.number), read
        yield batch


class Document(NamedTuple):
    ids: np.ndarray  # marker first; none if skipped
    text_bytes: int
    replaced: int  # halves of surrogate pairs
    skipped: str | None  # the reason
    split: str
    digest: bytes  # of the text


def documents(batch, encoded, val_share):
    """The documents of a batch in order, the skipped ones too."""
    end, taken = 0, zip(encoded.sizes.tolist(), encoded.digests)
    for reason, split, name in batch.verdicts:
        start, (length, text_bytes, replaced), of_text = end, (0, 0, 0), digest(b"")
        if reason is None:
            (length, text_bytes, replaced), of_text = next(taken)
            of_text = of_text.tobytes()
        end += length
        split = split or split_by_hash(
            of_text if name is None else digest(str(name).encode(errors="replace")), val_share
        )
        yield Document(encoded.ids[start:end], text_bytes, replaced, reason, split, of_text)


def split_by_hash(of_id, val_share) -> str:
    """A document is for validation if 64 bits of its id's digest, as a fraction of 2^64, lie below `val_share`."""
    return "val" if int.from_bytes(of_id[:8], "little") < int(val_share * 2**64) else "train"


# ---------------------------------------------------------------------------------------
# Documents -> the two directories.


def write_splits(output, sources, engine, filters, progress):
    """Fills both splits from the output's position on, until the sources end or training has its tokens."""
    arguments = output.recipe["train"]["arguments"]
    val_share, limit = arguments["val_share"] or 0, arguments["max_tokens"] or float("inf")
    output.save(output.position)
    release(sources, output.position[0])
    progress.begin(output.tallies, read_before(sources, output.position[0]))
    for batch, encoded in in_order(batches(sources, filters, output.position), engine):
        for document in documents(batch, encoded, val_share):
            output.add(document)
            if output.tallies["train"].tokens >= limit:
                return
        progress.update(output.tallies, batch.read)
        if output.due():
            output.save(batch.after)
            release(sources, batch.after[0])


def read_before(sources, file):
    return sum([size for _, source in sources for size in source.sizes][:file])


def release(sources, file):
    """The journal tells that what lies before that file is not needed any more."""
    for _, source in sources:
        source.release(max(0, min(file, len(source.sizes))))
        file -= len(source.sizes)


# ---------------------------------------------------------------------------------------
# The command.


class Progress:
    """A bar on a terminal, else a line every ten seconds: documents, tokens, rates and, where known, time left."""

    def __init__(self, source_bytes=None, target_tokens=None, shown=True):
        self.source_bytes, self.target_tokens, self.shown = source_bytes, target_tokens, shown
        self.documents = self.tokens = self.text_bytes = self.read = 0
        self.bar, self.start, self.before = None, time.monotonic(), (0, 0, 0.0)
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

    def begin(self, tallies, read):
        """What an earlier run has done counts as done, but says nothing of this one's speed."""
        self.count(tallies, read)
        self.before = self.tokens, self.text_bytes, self.done()

    def update(self, tallies, read):
        self.count(tallies, read)
        if self.shown and time.monotonic() >= self.next:
            self.next = time.monotonic() + self.interval
            self.show()

    def count(self, tallies, read):
        self.documents = sum(tally.documents for tally in tallies.values())
        self.tokens = sum(tally.tokens for tally in tallies.values())
        self.text_bytes = sum(tally.text_bytes for tally in tallies.values())
        self.read = read

    def done(self):
        """The part of all work that is done, 0 where it cannot be known."""
        by_bytes = self.read / self.source_bytes if self.source_bytes else 0.0
        by_tokens = self.tokens / self.target_tokens if self.target_tokens else 0.0
        return min(1.0, max(by_bytes, by_tokens))

    def show(self):
        done, line = self.done(), f"{self.documents:,} documents, {self.tokens / 1e6:,.1f}M tokens, {self.rates()}"
        if done > self.before[2]:
            left = (time.monotonic() - self.start) * (1 - done) / (done - self.before[2])
            line += f", {timedelta(seconds=round(left))} left"
        if self.bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.n = done
            self.bar.set_description_str(line)

    def rates(self):
        seconds, tokens, text_bytes = time.monotonic() - self.start, *self.before[:2]
        speed = (self.text_bytes - text_bytes) / seconds / 1e6
        return f"{(self.tokens - tokens) / seconds:,.0f} tokens/s, {speed:.2f} MB/s"


def prepare(
    out_dir=OUT_DIR,
    *,
    dataset=None,
    subset=None,
    revision=None,
    keep_downloads=False,
    local_files=None,
    val_files=None,
    val_share=None,
    text_column="text",
    min_score=None,
    language=None,
    dedup=False,
    tokenizer="gpt2",
    max_tokens=None,
    shard_tokens=SHARD_TOKENS,
    num_proc=None,
    start_method=None,
    engine="local",
    ray_address=None,
    restart=False,
) -> dict[str, dict]:
    """Writes `out_dir` (training) and `<out_dir>_val` (validation) and returns their manifests by split.

    The arguments are the flags of the same names. Where both directories are complete and were made
    from the same arguments, nothing is done; where an earlier call was interrupted, this one goes on.
    UserError for what the user can mend, all faulty arguments in one. With several processes, a script
    that calls this needs the usual `if __name__ == "__main__":`.
    """
    num_proc = cores() if num_proc is None else num_proc
    numbers = {"max_tokens": max_tokens, "shard_tokens": shard_tokens, "num_proc": num_proc}
    hub = {"dataset": dataset, "subset": subset, "revision": revision}
    filters, files = Filters(min_score, language), {"local_files": local_files, "val_files": val_files}
    problems = check(numbers, hub, files, filters, val_share, start_method, engine, ray_address)
    directories, folder = split_directories(out_dir), Path(f"{Path(out_dir)}_downloads")
    sources = find_sources(hub, files, text_column, filters.needed(), folder, keep_downloads, problems)
    val_share = None if val_files else VAL_SHARE if val_share is None else val_share
    arguments = {"shard_tokens": shard_tokens, "max_tokens": max_tokens, "val_share": val_share}
    arguments |= {"min_score": min_score, "language": language, "dedup": dedup}
    tokenizer = load_tokenizer(tokenizer)
    recipe = {split: decisive(source, arguments, tokenizer) for split, source in sources.items()}
    manifests = None if restart else already_prepared(directories, recipe)
    how = {"name": engine, "num_proc": num_proc, "start_method": start_method, "ray_address": ray_address}
    if manifests:
        print("already prepared, nothing to do")
    else:
        manifests = fill(directories, sources, recipe, tokenizer, filters, restart, **how)
    summarize(directories, manifests)
    return manifests


def decisive(source, arguments, tokenizer):
    """What decides the bytes of the shards, in the manifest's words."""
    keys = ("name", "vocab_size", "eot_token")
    described = {key: getattr(tokenizer, key) for key in keys} | {"fingerprint": tokenizer.fingerprint()}
    return {"tokenizer": described, "source": source.facts(), "arguments": arguments}


def fill(directories, sources, recipe, tokenizer, filters=TAKE_ALL, restart=False, shown=True, **how) -> dict:
    """Writes both splits, from where an earlier run stopped unless `restart`; returns their manifests.

    The dicts have a key per split. `shown`: with progress and a picture. `how` goes to `open_engine`."""
    reading = [(None, sources["train"])] if sources["val"] is sources["train"] else list(sources.items())
    done = False
    with errors_of_the_disk(directories["train"]), alone(directories):
        journal = None if restart else read_journal(directories, recipe)
        for split, source in reading:
            source.open((journal or {}).get("versions", {}).get(split or "train"))
        try:
            (go_on if journal else begin_anew)(directories)
            versions = {split: source.version for split, source in sources.items()}
            output = begin(directories, recipe, versions, tokenizer, journal)
            target = recipe["train"]["arguments"]["max_tokens"]
            progress = Progress(sum(sum(source.sizes) for _, source in reading), target, shown)
            with progress, open_engine(tokenizer=tokenizer, folder=directories["train"] / "tokenizer", **how) as engine:
                write_splits(output, reading, engine, filters, progress)
            if shown:
                print(f"tokenized in {time.monotonic() - progress.start:,.1f} s: {progress.rates()}")
            manifests = output.close(picture=shown)
            done = True
        finally:
            for _, source in reading:
                source.close(done)
    return manifests


def check(numbers, hub, files, filters, val_share, start_method, engine, ray_address):
    """All that is wrong with the arguments themselves, as a list of messages; `files` by flag."""
    problems = [f"--{k} {v}: must be 1 or more" for k, v in numbers.items() if v is not None and v < 1]
    most = {"shard_tokens": MOST_SHARD_TOKENS, "num_proc": MOST_PROCESSES}
    problems += [f"--{k} {numbers[k]}: must be {n:,} or less" for k, n in most.items() if (numbers[k] or 0) > n]
    if files["local_files"]:
        problems += [f"--{k} is for the hub: not together with --local_files" for k, v in hub.items() if v]
    if files["val_files"] and val_share is not None:
        problems.append("--val_share: not together with --val_files, which are taken whole")
    if val_share is not None and not 0 < val_share < 1:
        problems.append(f"--val_share {val_share}: must lie between 0 and 1")
    if filters.min_score is not None and not math.isfinite(filters.min_score):
        problems.append(f"--min_score {filters.min_score}: must be a number")
    if start_method not in (None, *multiprocessing.get_all_start_methods()):
        here = ", ".join(multiprocessing.get_all_start_methods())
        problems.append(f"--start_method {start_method}: this system has {here}")
    if ray_address and engine != "ray":
        problems.append("--ray_address: only together with --engine ray")
    return problems


def find_sources(hub, files, text_column, needed, folder, keep, problems) -> dict:
    """The sources by split. UserError with what is wrong with them and the `problems` found before."""
    found = {}
    for flag, patterns in files.items():
        try:
            columns = needed if flag == "val_files" or files["val_files"] else (*needed, "id")
            found[flag] = find_files(patterns, text_column, columns) if patterns else None
        except UserError as error:
            problems.append(f"--{flag} {error}")
    if found.get("local_files") and found.get("val_files"):
        paths = [{path.resolve() for path in files.paths} for files in found.values()]
        problems += [f"{path}: both in --local_files and in --val_files" for path in sorted(paths[0] & paths[1])]
    if problems:
        raise UserError("; ".join(problems))
    dataset, subset = (hub["dataset"], hub["subset"]) if hub["dataset"] else (DATASET, hub["subset"] or SUBSET)
    needed = needed if files["val_files"] else (*needed, "id")
    train = found["local_files"] or HubFiles(dataset, subset, hub["revision"], folder, keep, text_column, needed)
    return {"val": found["val_files"] or train, "train": train}


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
    if (directories["train"] / PICTURE).exists():
        print(f"lengths of the documents: {directories['train'] / PICTURE}")
    train, val = (shlex.quote(str(directories[split])) for split in ("train", "val"))
    print(f"next: python train.py --data_dir {train} --val_data_dir {val}")


# ---------------------------------------------------------------------------------------
# The demo corpus.

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
    source = Texts([], "CPython's help topics and docstrings", platform.python_version(), settings)
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
        arguments = {"shard_tokens": SHARD_TOKENS, "max_tokens": None, "val_share": None, "dedup": False}
        recipe = {split: decisive(part, arguments, tokenizer) for split, part in sources.items()}
        manifests = fill(directories, sources, recipe, tokenizer, restart=True, shown=False)
        made = "made"
    train, val = manifests["train"], manifests["val"]
    documents, tokens = (f"{train[k]:,} + {val[k]:,} {k}" for k in ("documents", "tokens"))
    print(f"corpus     {directory} {made}: {documents}, {tokens} (training + validation)")
    return manifests


# ---------------------------------------------------------------------------------------
# Shards that others have made.


def fetch_shards(urls, out_dir) -> list[Path]:
    """Fetches token shards, build-nanogpt's .npy or llm.c's .bin, which training reads as they are. UserError."""
    names = [urlsplit(url).path.rsplit("/", 1)[-1] for url in urls]
    problems = [
        f"{url}: expected http(s)://.../NAME.npy or .bin" for url, n in zip(urls, names) if not is_shard(url, n)
    ]
    problems += [f"{name}: named twice" for name, n in Counter(names).items() if n > 1]
    if (Path(out_dir) / MANIFEST).exists():
        problems.append(f"{out_dir}: holds shards with a manifest already; name another --out_dir")
    if problems:
        raise UserError("; ".join(problems))
    paths = [Path(out_dir, name) for name in names]
    with errors_of_the_disk(out_dir):
        for i, (url, path) in enumerate(zip(urls, paths), 1):
            download(url, path)
            try:
                tokens = open_shard(path).tokens
            except UserError:
                path.unlink()  # or it would be taken for a shard
                raise
            print(f"{i} of {len(urls)}: {path}, {tokens:,} tokens", flush=True)
    print(f"next: python train.py --data_dir {shlex.quote(str(out_dir))}")
    return paths


def is_shard(url, name):
    plain = re.fullmatch(r"[\w-][\w.+-]*\.(npy|bin)", name, re.ASCII)
    return plain and urlsplit(url).scheme in ("http", "https")


# ---------------------------------------------------------------------------------------


def build_parser():
    parser = Parser(description="Tokenize text into shards to train on.")
    kinds = ", ".join(READERS)

    def add(flag, metavar, text, **more):
        parser.add_argument(f"--{flag}", metavar=metavar, help=text, **more)

    def switch(flag, text):
        parser.add_argument(f"--{flag}", action="store_true", help=f"{text} (default: off)")

    add("out_dir", "FOLDER", f"training shards; FOLDER_val gets those for validation (default: {OUT_DIR})")
    add("dataset", "NAME", f"dataset on the Hugging Face hub (default: {DATASET})")
    add("subset", "NAME", f"configuration of the dataset, or a folder in it (default: {SUBSET}; of others: the first)")
    add("revision", "COMMIT", "commit, tag or branch of the dataset (default: the newest commit)")
    switch("keep_downloads", "keep the hub's files in FOLDER_downloads; else each goes when its tokens are safe")
    add("local_files", "GLOB", f"read files instead of the hub: {kinds} (one document) (default: none)", nargs="+")
    add("val_files", "GLOB", "files that go to validation as a whole (default: none, see --val_share)", nargs="+")
    share = f"part of the documents that goes to validation, chosen by the hash of their id (default: {VAL_SHARE})"
    add("val_share", "X", f"without --val_files, {share}", type=float)
    add("text_column", "NAME", "column or key of the text (default: text)", default="text")
    add(
        "min_score",
        "X",
        "take only rows with X or more in their column score, else int_score (default: all)",
        type=float,
    )
    add("language", "NAME", "take only rows with NAME in their column language, such as en (default: all)")
    switch("dedup", "take a text only the first time; about 100 bytes of memory for each document")
    add("tokenizer", "NAME", "folder, tokenizer.json, or model on the hub (default: gpt2)", default="gpt2")
    add("max_tokens", "N", "all ends with the document that reaches N tokens for training (default: no end)", type=int)
    add("shard_tokens", "N", f"tokens per shard (default: {SHARD_TOKENS:,})", type=int, default=SHARD_TOKENS)
    add("num_proc", "N", "processes that tokenize (default: one per core)", type=int)
    add("start_method", "NAME", "how they start: spawn, fork or forkserver (default: spawn)")
    add("engine", "NAME", "local, or ray: on a Ray cluster (default: local)", choices=("local", "ray"), default="local")
    add("ray_address", "ADDRESS", "of the cluster (default: RAY_ADDRESS, else Ray on this machine)")
    switch("restart", "delete what an earlier run left in the folders, finished or not, and begin anew")
    add(
        "token_shards", "URL", "instead: fetch shards others made, .npy or .bin, into FOLDER (default: none)", nargs="+"
    )
    switch("demo", f"instead: 2 MB of Python's documentation, made offline, by default in {DEMO_DIR}")
    return parser


def main(argv=None):
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    out_dir = options.pop("out_dir")
    urls, demo = options.pop("token_shards"), options.pop("demo")
    if not urls and not demo:
        try:
            prepare(out_dir or OUT_DIR, **options)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise
        return
    others = [f"--{name}" for name, value in options.items() if value != parser.get_default(name)]
    others += ["--token_shards"] if urls and demo else []
    if others:
        raise UserError(f"{', '.join(others)}: not together with {'--demo' if demo else '--token_shards'}")
    if demo:
        prepare_demo(out_dir or DEMO_DIR)
    else:
        fetch_shards(urls, out_dir or OUT_DIR)


if __name__ == "__main__":
    sys.exit(run(main))
