"""The pieces of a preparation: each takes rows of text and makes documents, token shards and a file of facts of them.

`make_piece` makes one piece in any process, on any machine that sees the folder. It writes the facts last, when the
shards are on the disk: a piece that has its facts is done. `make_all` makes the pieces that have none.
"""

import hashlib
import itertools
import json
import os
import re
import socket
import time
from bisect import bisect
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_processing_fineweb import ShardWriter, open_shard
from support.cli import UserError
from support.files import read_json, write_json
from support.rows import Wanted, format_of, rows_of
from support.tracking import Progress
from support.workers import LOST, cores, open_workers, stopped
from tokenizer import load_tokenizer, replace_surrogates

BYTES_PER_TOKEN = 2  # of a source file, at the least: 2.8 in FineWeb-Edu's parquet, 4.6 in plain English text
BATCH_CHARS = 1_000_000  # tokenized at a time
CHECK_CHARS = 100_000  # longest text of which the fast tokenizer's ids are compared with the library's
CHECKED = 0.001  # part of the documents
BAR_SECONDS, LINE_SECONDS = 1, 60  # between two signs of progress: on a terminal, and in a log
REASONS = ("none", "empty", "whitespace", "language", "no_score", "low_score", "in_validation")  # to leave a text out
FACTS_LIMIT = 2**32  # bytes of a piece's facts; 38 of them are the digest of a document that validates
LENGTHS = sorted({round(2 ** (i / 4)) for i in range(128)})  # tokens; lower ends of the histogram's bins


class Piece(NamedTuple):
    number: int
    role: str  # "train" or "val": all of its documents; "both": their hashes decide
    paths: list[str]
    part: int = 0  # of the row groups of the only path, part `part` of `parts` equal ones
    parts: int = 1


class Document(NamedTuple):
    skipped: str | None  # why it is left out
    split: str = "train"
    text: str = ""
    text_bytes: int = 0
    digest: bytes = b""  # of the text
    replaced: int = 0  # halves of surrogate pairs
    where: str = ""


def cut_into_pieces(files, role, shard_tokens, first=0) -> list[Piece]:
    """Pieces of about one shard: parts of a large parquet file, or several small files. A function of sizes alone."""
    target, found, small, size = shard_tokens * BYTES_PER_TOKEN, [], [], 0
    for path, n in files:
        parts = max(1, -(-n // target)) if format_of(path) == "parquet" else 1
        if small and (parts > 1 or size + n > target):
            found, small, size = [*found, (small, 0, 1)], [], 0
        if parts > 1:
            found += [([path], part, parts) for part in range(parts)]
        else:
            small.append(path)
            size += n
    found += [(small, 0, 1)] if small else []
    return [Piece(i, role, *piece) for i, piece in enumerate(found, first)]


def documents(piece, c, last_parts=False, known=frozenset()):
    """The documents of a piece in order, with those that are skipped. `last_parts`: the last part of each validates.
    `known`: digests of texts that validate, so nothing trains on them."""
    wanted = Wanted(c.text_column, c.min_score is not None, c.language is not None, c.split_on)
    for where, row in rows_of(piece.paths, wanted, piece.part, piece.parts):
        text = text_of(row["text"], where)
        if text is None or c.split_on is None:
            texts = [text]
        else:  # nothing stands before the first marker or behind the last one
            texts = filter(None, (part.strip("\n") for part in text.split(c.split_on)))
        for text in texts:
            skipped = reason_to_skip(text, row, where, c)
            if skipped:
                yield Document(skipped)
                continue
            clean = replace_surrogates(text)
            replaced = 0 if clean is text else clean.count("\ufffd") - text.count("\ufffd")
            data = clean.encode()
            of_text = digest(data)
            if of_text.hex() in known:
                yield Document("in_validation")
            elif last_parts and piece.role == "both":
                at = int(len(clean) * (1 - c.val_share))
                for split, part in ("train", clean[:at]), ("val", clean[at:]):
                    if part and not part.isspace():
                        yield Document(None, split, part, len(part.encode()), digest(part.encode()), replaced, where)
                        replaced = 0
            else:
                split = piece.role if piece.role != "both" else ("val" if lies_below(of_text, c.val_share) else "train")
                yield Document(None, split, clean, len(data), of_text, replaced, where)


def text_of(value, where) -> str | None:
    """A row's text. UserError if it is something else, which would become a wrong text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: the text is not UTF-8 ({error})") from error
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: the text is of type {type(value).__name__}, expected a string")
    return value


def reason_to_skip(text, row, where, c) -> str | None:
    if not text or text.isspace():
        return "none" if text is None else "whitespace" if text else "empty"
    if c.language is not None and row["language"] != c.language:
        return "language"
    if c.min_score is None:
        return None
    if row["score"] in (None, ""):  # not known to be good enough
        return "no_score"
    try:
        return None if float(row["score"]) >= c.min_score else "low_score"
    except (TypeError, ValueError) as error:
        kind = type(row["score"]).__name__
        raise UserError(f"{where}: the score is of type {kind}, expected a number") from error


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def lies_below(of_text: bytes, share: float) -> bool:
    """Whether 64 bits of a digest, as a fraction of 2^64, lie below `share`."""
    return int.from_bytes(of_text[:8], "little") < int(share * 2**64)


# ---------------------------------------------------------------------------------------
# Making a piece: in any process, on any machine that sees the folder.


class Job(NamedTuple):
    config: object  # a PrepareConfig
    piece: Piece
    plan: str  # what its facts will name: facts of another plan do not count
    limit: int | None = None  # training tokens that end it
    last_parts: bool = False
    n_val: int = 0  # the first so many pieces are --val_files


class Split:
    """The documents of one split in one piece. Their tokens go to its shards, and counts to its facts."""

    def __init__(self, directory, tokenizer, shard_tokens, name):
        owner = f".{socket.gethostname()}.{os.getpid()}"  # Ray may have one piece made twice at once
        self.writer = ShardWriter(directory, tokenizer.vocab_size, shard_tokens, name, owner)
        self.marker = np.array([tokenizer.eot_token], np.uint32)
        self.counts = dict.fromkeys(("documents", "tokens", "text_bytes", "replaced_surrogates"), 0)
        self.lengths = Counter()

    def add(self, document, ids):
        """`ids`: of the text alone; the marker comes before them."""
        ids = np.concatenate([self.marker, ids])
        self.writer.add(ids, document.text_bytes)
        self.counts["documents"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["text_bytes"] += document.text_bytes
        self.counts["replaced_surrogates"] += document.replaced
        self.lengths[str(LENGTHS[bisect(LENGTHS, len(ids)) - 1])] += 1

    def close(self) -> dict:
        self.writer.flush()
        return {**self.counts, "lengths": self.lengths, "shards": self.writer.shards}


def make_piece(job: Job) -> dict:
    """Writes the shards of a piece, and last its facts, which are returned. UserError."""
    c, piece, directories = job.config, job.piece, split_directories(job.config.out_dir)
    tokenizer = saved_tokenizer(directories["train"] / "tokenizer", job.plan)
    known = digests_of(c.out_dir, job.n_val, job.plan) if piece.role == "train" else frozenset()
    names = ("train", "val") if piece.role == "both" else (piece.role,)
    splits, skipped, digests = {}, Counter(), []
    try:
        for name in names:
            splits[name] = Split(directories[name], tokenizer, c.shard_tokens, f"fineweb_{name}_{piece.number:06d}")
        for document, ids in encoded(documents(piece, c, job.last_parts, known), tokenizer):
            if document.skipped:
                skipped[document.skipped] += 1
                continue
            splits[document.split].add(document, ids)
            if piece.role == "val":
                digests.append(document.digest.hex())
            if job.limit is not None and document.split == "train" and splits["train"].counts["tokens"] >= job.limit:
                break
        facts = {name: split.close() for name, split in splits.items()} | {"skipped": skipped, "digests": digests}
        facts |= {"plan": job.plan, "limit": job.limit, "last_parts": job.last_parts}
        write_json(facts_path(c.out_dir, piece.number), facts)
    except OSError as error:  # those of reading have become UserErrors
        raise UserError(f"{error.filename or c.out_dir}: cannot be written ({error.strerror})") from error
    finally:
        for split in splits.values():
            split.writer.discard()
    return facts


def encoded(documents, tokenizer):
    """(document, its ids), tokenized about 1 MB of text at a time. The ids of a sample are compared with those that
    the library `tokenizers` gives."""
    checked = tokenizer.fast is None
    for batch in batches(documents):
        for document, ids in zip(batch, tokenizer.encode_arrays([document.text for document in batch])):
            sampled = lies_below(document.digest[8:], CHECKED) or not checked  # the first too
            if tokenizer.fast is not None and sampled and 0 < len(document.text) <= CHECK_CHARS:
                checked = True
                if ids.tolist() != tokenizer.encode(document.text):
                    raise UserError(
                        f"{document.where}: the fast tokenizer gives other ids than the library `tokenizers` for the "
                        f"text {document.text[:200]!r}; please report it, and uninstall fastokens meanwhile"
                    )
            yield document, ids


def batches(documents):
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text) + 100
        if chars >= BATCH_CHARS:
            if stopped():
                raise UserError("stopped")
            yield batch
            batch, chars = [], 0
    yield batch


@lru_cache(1)
def saved_tokenizer(folder, plan):
    return load_tokenizer(folder)


@lru_cache(1)
def digests_of(out_dir, n_val, plan) -> frozenset:
    """The digests of the texts in the first `n_val` pieces, those of --val_files."""
    return frozenset(d for i in range(n_val) for d in read_facts(out_dir, i)["digests"])


def split_directories(out_dir) -> dict[str, Path]:
    return {"val": Path(f"{Path(out_dir)}_val"), "train": Path(out_dir)}


def facts_path(out_dir, number) -> Path:
    return Path(out_dir, "pieces", f"{number:06d}.json")


def read_facts(out_dir, number) -> dict:
    return read_json(facts_path(out_dir, number), FACTS_LIMIT)


def facts_of(c, number, plan, last_parts) -> dict | None:
    """The facts of a piece that is done and whose shards are there, else None."""
    try:
        facts = read_facts(c.out_dir, number)
        for split, directory in split_directories(c.out_dir).items():
            for entry in facts.get(split, {}).get("shards", []):
                shard = open_shard(directory / entry["name"])
                if (shard.tokens, shard.dtype) != (entry["tokens"], entry["dtype"]):
                    return None
        return facts if (facts["plan"], facts["last_parts"]) == (plan, last_parts) else None
    except (UserError, KeyError, TypeError, AttributeError):
        return None


# ---------------------------------------------------------------------------------------
# Making all of them, in this process, in several, or on a Ray cluster.


def tokens_left(c, pieces, facts) -> int | None:
    """How many training tokens may still come, after the pieces that are done from the first on without a gap."""
    if c.max_tokens is None:
        return None
    done = itertools.takewhile(lambda p: p.number in facts, (p for p in pieces if p.role != "val"))
    return max(0, c.max_tokens - sum(facts[p.number]["train"]["tokens"] for p in done))


def make_missing(job, pieces, facts, executor, n):
    """Adds to `facts`, by number, those of the pieces that have none yet, until training has its tokens."""
    todo, running, printed = [p for p in pieces if p.number not in facts], {}, time.monotonic()
    progress = Progress(len(facts), len(pieces), unit="piece", plain=False)
    try:
        while todo or running:
            while todo and len(running) < n and (left := tokens_left(job.config, pieces, facts)) != 0:
                if todo[0].role == "train" and any(p.role == "val" for p in running.values()):
                    break  # what validates must be known before
                piece = todo.pop(0)
                running[executor.submit(make_piece, job._replace(piece=piece, limit=left))] = piece
            if not running:
                return
            done = wait(running, BAR_SECONDS, FIRST_COMPLETED).done
            for future in done:
                facts[running[future].number] = made = future.result()
                del running[future]
                if not progress.live:
                    print(f"{len(facts)} of {len(pieces)} pieces made, the last of {summary_of(made)}", flush=True)
            so_far = f"{megabytes(job.config):,.0f} MB of shards so far"
            progress.show(len(facts), so_far)
            if not progress.live and not done and time.monotonic() - printed >= LINE_SECONDS:
                print(so_far, flush=True)
                printed = time.monotonic()
    except LOST as error:
        lost = "; ".join(f"{p.paths[0]}, part {p.part + 1} of {p.parts}" for p in running.values())
        raise UserError(
            f"a process died (killed, or out of memory) while it made one of these pieces: {lost}; the same command "
            "goes on, with a lower --num_proc if memory was short"
        ) from error
    finally:
        progress.close()


def megabytes(c) -> float:
    """What all shards have on the disk, unfinished ones too: it grows while a piece is made, wherever that is."""
    total = 0
    for directory in split_directories(c.out_dir).values():
        for path in directory.glob("*fineweb_*"):
            with suppress(FileNotFoundError):  # it was renamed meanwhile
                total += path.stat().st_size
    return total / 1e6


def summary_of(facts) -> str:
    parts = [facts[split] for split in ("train", "val") if split in facts]
    documents, tokens, size = (sum(part[key] for part in parts) for key in ("documents", "tokens", "text_bytes"))
    return f"{documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB of text"


def up_to_the_limit(job, pieces, facts, executor) -> list[dict]:
    """The facts of the pieces in order, up to the one in which training gets its last token. That one may have been
    made before it was known how many tokens it may add; then it is made again."""
    left, kept = job.config.max_tokens, []
    for piece in pieces:
        found = facts.get(piece.number)
        if left is not None and piece.role != "val":
            if left <= 0:
                break
            if found["train"]["tokens"] >= left != found["limit"]:
                found = executor.submit(make_piece, job._replace(piece=piece, limit=left)).result()
            left -= found["train"]["tokens"]
        kept.append(found)
    return kept


def make_all(c, pieces, plan) -> list[dict] | None:
    """The facts of all pieces in order; None if only --pieces of them were to be made."""
    if c.engine == "ray":  # tasks have a working directory of their own
        pieces = [p._replace(paths=[f if "://" in f else os.path.abspath(f) for f in p.paths]) for p in pieces]
        c = replace(c, out_dir=os.path.abspath(c.out_dir))
    mine = pieces
    if c.pieces:
        i, n = part_of(c)
        mine = [p for p in pieces if p.role == "val" or p.number * n // len(pieces) == i]
    name = digest(json.dumps(plan, sort_keys=True).encode()).hex()
    job = Job(c, None, name, n_val=sum(p.role == "val" for p in pieces))
    n_proc = min(c.num_proc or cores(), max(1, len(mine)))
    with open_workers(c.engine, n_proc, c.start_method, c.ray_address) as (executor, n):
        for last_parts in (False, True):  # the second time where no document's hash says that it validates
            job = job._replace(last_parts=last_parts)
            facts = {p.number: f for p in mine if (f := facts_of(c, p.number, name, last_parts)) is not None}
            make_missing(job, mine, facts, executor, n)
            if c.pieces:
                return None
            kept = up_to_the_limit(job, pieces, facts, executor)
            if any(f.get("val", {}).get("documents") for f in kept) or c.val_files:
                break
    return kept


def part_of(c) -> tuple[int, int]:
    """--pieces I:N as numbers; (0, 0) if it is something else."""
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", c.pieces)
    return (int(found[1]), int(found[2])) if found else (0, 0)
