"""A preparation's two directories: while they are filled, after a crash, and once they are complete.

Notable: tokens, digests and shards are brought to the disk first, and only then does the journal, a small file that
is replaced in one piece, say how far that is. Whatever a crash leaves behind beyond that is undone, so the same
command goes on as if nothing had happened; the manifests come last and say nothing of interruptions.
"""

import os
import re
import sys
import time
from bisect import bisect
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from data_processing_fineweb import MANIFEST, UNFINISHED_SHARD, ShardWriter, find_shards
from engines import DIGEST_BYTES
from support.cli import UserError
from support.files import UNFINISHED, locked, read_json, write_json
from tokenizer import CONFIG, FILE

REASONS = ("none", "empty", "whitespace", "language", "no_score", "low_score", "duplicate")  # why a row is skipped
JOURNAL, JOURNAL_VERSION, JOURNAL_SECONDS = ".journal.json", 1, 10  # the last is what a crash costs
LOCK_SECONDS = 5  # to wait for the processes of a run that was just killed
ANEW = "begin anew with --restart"
DIGESTS, PICTURE = ".digests", "document_lengths.png"
LENGTHS = sorted({round(2 ** (i / 4)) for i in range(128)})  # tokens; lower ends of the histogram's bins


def split_directories(out_dir) -> dict:
    return {"val": Path(f"{Path(out_dir)}_val"), "train": Path(out_dir)}


def prefix(split):
    return f"fineweb_{split}"  # of the shards' names; nobody else's files begin with it


# ---------------------------------------------------------------------------------------
# While they are filled.


@dataclass
class Tally:
    """What went into one split, in the manifest's words."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: dict = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    replaced_surrogates: int = 0
    lengths: Counter = field(default_factory=Counter)  # documents by LENGTHS, the keys as in JSON


class Digests:
    """The texts that were seen, on disk too. About 100 bytes of memory for each: 1 GB for 10M documents."""

    def __init__(self, path, n):
        """Begins with the first `n` of those in the file."""
        self.file = open(path, "r+b" if n else "wb")  # noqa: SIM115 (until the end)
        data = self.file.read(n * DIGEST_BYTES) if n else b""
        self.seen = {data[i : i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES)}
        if len(self.seen) != n:
            raise UserError(f"{path}: had {n:,} digests of texts, now {len(self.seen):,}; begin anew with --restart")
        self.file.truncate()

    def is_new(self, of_text):
        if of_text in self.seen:
            return False
        self.seen.add(of_text)
        self.file.write(of_text)
        return True

    def save(self) -> int:
        self.file.flush()
        os.fsync(self.file.fileno())
        return len(self.seen)


class Output:
    """Both directories while they are filled. `save` brings everything to the disk and then says in the journal, in
    one piece, how far it is; an Output that is given that journal goes on there, whatever came after it."""

    def __init__(self, directories, recipe, versions, tokenizer, journal=None):
        self.directories, self.recipe, self.versions, self.writers, self.tallies = directories, recipe, versions, {}, {}
        journal = journal or {"splits": {}, "position": (0, 0), "digests": 0}
        self.position = tuple(journal["position"])
        arguments, saved = recipe["train"]["arguments"], journal["splits"]
        for split, directory in directories.items():
            (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
            tokenizer.save(directory / "tokenizer")
            size = tokenizer.vocab_size, arguments["shard_tokens"]
            state, counted = saved.get(split, {}).get("writer"), saved.get(split, {}).get("tally", {})
            self.writers[split] = ShardWriter(directory, *size, prefix(split), state)
            self.tallies[split] = Tally(**counted | {"lengths": Counter(counted.get("lengths"))})
        self.journal, self.saved, self.finished = directories["train"] / JOURNAL, time.monotonic(), self.n_shards()
        kept = directories["train"] / DIGESTS
        self.digests = Digests(kept, journal["digests"]) if arguments["dedup"] else None

    def n_shards(self):
        return sum(len(writer.shards) for writer in self.writers.values())

    def add(self, document):
        tally, reason = self.tallies[document.split], document.skipped
        if reason is None and self.digests and not self.digests.is_new(document.digest):
            reason = "duplicate"
        if reason:
            tally.skipped[reason] += 1
            return
        n = len(document.ids)
        self.writers[document.split].add(document.ids, document.text_bytes)
        tally.documents += 1
        tally.tokens += n
        tally.text_bytes += document.text_bytes
        tally.replaced_surrogates += document.replaced
        tally.lengths[str(LENGTHS[bisect(LENGTHS, n) - 1])] += 1

    def due(self):
        return self.n_shards() > self.finished or time.monotonic() >= self.saved + JOURNAL_SECONDS

    def save(self, position):
        """`position`: the place in the sources after which nothing is in the directories yet."""
        splits = {s: {"writer": w.save(), "tally": vars(self.tallies[s])} for s, w in self.writers.items()}
        digests = self.digests.save() if self.digests else 0
        what = {"journal_version": JOURNAL_VERSION, "recipe": self.recipe, "versions": self.versions}
        write_json(self.journal, what | {"position": position, "digests": digests, "splits": splits})
        self.saved, self.finished = time.monotonic(), self.n_shards()

    def close(self, picture) -> dict:
        """The last shards, a picture if wanted, the manifests at last; returns these by split."""
        try:
            refuse_empty(self.tallies, self.recipe["train"]["arguments"])
        except UserError:
            forget_journal(self.directories)  # nobody wants to go on with this
            raise
        for writer in self.writers.values():
            writer.flush()
        if picture:
            draw_lengths({s: t.lengths for s, t in self.tallies.items()}, self.directories["train"] / PICTURE)
        manifests = {}
        for split, writer in self.writers.items():
            facts = self.recipe[split] | {"source_version": self.versions[split]}
            manifests[split] = writer.close(split=split, **facts, **vars(self.tallies[split]))
        forget_journal(self.directories)
        return manifests


def draw_lengths(lengths, path):
    try:
        import plot_run  # here: only this needs matplotlib
    except ImportError as error:
        print(f"no picture of the documents' lengths ({error}); pip install matplotlib", file=sys.stderr)
        return
    plot_run.draw_lengths(lengths, LENGTHS, path)


def refuse_empty(tallies, arguments):
    val, train = tallies["val"], tallies["train"]
    skipped = Counter(val.skipped) + Counter(train.skipped)
    why = f" (skipped: {', '.join(f'{n:,} {reason}' for reason, n in skipped.items())})" if skipped else ""
    if not val.documents + train.documents:
        raise UserError(f"the source holds no document to take{why}")
    if not val.documents and arguments["val_share"] is None:
        raise UserError(f"--val_files hold no document to take{why}")
    if not val.documents:
        n, share = train.documents, arguments["val_share"]
        raise UserError(
            f"none of the {n:,} documents went to validation; raise --val_share, now {share:g} "
            f"(for example {min(0.5, max(10 * share, 10 / n)):.1g}), or name validation files with --val_files"
        )
    if not train.documents:
        raise UserError(
            f"nothing is left to train on: {val.documents:,} documents went to validation{why}; lower --val_share"
        )


def begin(directories, recipe, versions, tokenizer, journal) -> Output:
    """An Output that goes on where the journal, which may be None, says. UserError if that is not possible."""
    try:
        output = Output(directories, recipe, versions, tokenizer, journal)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directories['train'] / JOURNAL}: damaged (missing or wrong: {error}); {ANEW}") from error
    if journal:
        print(f"going on after {output.tallies['train'].documents:,} documents for training", file=sys.stderr)
    return output


@contextmanager
def errors_of_the_disk(directory):
    try:
        yield
    except OSError as error:  # those of reading have become UserErrors
        raise UserError(f"{error.filename or directory}: cannot be written ({error.strerror})") from error


# ---------------------------------------------------------------------------------------
# What is there already.


@contextmanager
def alone(directories):
    """In it, this process alone writes there. UserError if another does, or something else is there."""
    for directory in directories.values():
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: a file; name another --out_dir")
    for directory in directories.values():
        directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directories["train"], os.O_RDONLY)
    try:
        with locked(fd, lambda: f"{directories['train']}: another process is preparing it", LOCK_SECONDS):
            yield
    finally:
        os.close(fd)


def leftovers(directory, split) -> list[Path]:
    """What an unfinished run may have left there. UserError if there is anything else, which nobody may delete."""
    shard = rf"{prefix(split)}_\d{{6,}}\.npy"
    whole = "|".join([shard, *map(re.escape, (MANIFEST, JOURNAL, PICTURE))])
    more = "|".join(map(re.escape, (f".{prefix(split)}{UNFINISHED_SHARD}", DIGESTS)))
    ours = re.compile(rf"{whole}|{more}|\.({whole})\.\d+{re.escape(UNFINISHED)}")
    found, saved = [p for p in directory.iterdir() if p.name != "tokenizer"], directory / "tokenizer"
    foreign = [p.name for p in found if not ours.fullmatch(p.name) or not p.is_file()]
    foreign += [p.name for p in (saved.iterdir() if saved.is_dir() else ()) if p.name not in (FILE, CONFIG)]
    if foreign:
        there = ", ".join(sorted(foreign)[:5])
        raise UserError(f"{directory}: holds files that this script did not write ({there}); name another --out_dir")
    return sorted(found, key=lambda p: (p.name != MANIFEST, p.name != JOURNAL))  # first what vouches for the rest


def begin_anew(directories):
    for path in [path for split, directory in directories.items() for path in leftovers(directory, split)]:
        path.unlink()


def go_on(directories):
    """Removes what the journal does not speak of; the writers see to the shards."""
    for path in [path for split, directory in directories.items() for path in leftovers(directory, split)]:
        if path.name in (MANIFEST, PICTURE) or path.name.endswith(UNFINISHED):
            path.unlink()


def forget_journal(directories):
    for name in JOURNAL, DIGESTS:  # in this order: a journal needs its digests
        if (directories["train"] / name).exists():  # a read-only folder answers an error even where there is nothing
            (directories["train"] / name).unlink(missing_ok=True)


def read_journal(directories, recipe) -> dict | None:
    """The journal of an unfinished run with this recipe, None if there is none. UserError if the recipe is another."""
    path = directories["train"] / JOURNAL
    if not path.exists():
        return None
    journal = read_json(path)
    if journal.get("journal_version") != JOURNAL_VERSION:
        raise UserError(
            f"{path}: journal version {journal.get('journal_version')!r}, expected {JOURNAL_VERSION}; {ANEW}"
        )
    there = journal.get("recipe")
    if not isinstance(there, dict) or not isinstance(journal.get("versions"), dict):
        raise UserError(f"{path}: damaged (no recipe or no versions); {ANEW}")
    differing = {d for split, wanted in recipe.items() for d in differences(there.get(split), wanted)}
    if differing and journal.get("position") == [0, 0]:
        return None  # nothing to lose yet
    refuse(directories["train"], "was begun otherwise", differing)
    return journal


def refuse(directory, what, differing):
    """UserError if anything differs."""
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        listed = "; ".join(sorted(differing)[:5])
        raise UserError(f"{directory}: {what}: {listed}{more}. Name another --out_dir, or {ANEW}")


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
        refuse(directory, "already holds shards made otherwise", list(differences(found, wanted[split])))
        check_counts(directory / MANIFEST, manifests[split])
    if len(manifests) < len(directories):
        return None
    forget_journal(directories)  # there is one if its run was killed at the very end
    return manifests


def check_counts(path, manifest):
    """UserError unless a manifest counts, as `write_splits` left it, what `summarize` tells."""
    others = ("skipped", "lengths")
    numbers, skipped = [manifest.get(f.name) for f in fields(Tally) if f.name not in others], manifest.get("skipped")
    counts = [*numbers, *skipped.values()] if isinstance(skipped, dict) else [None]
    if not all(type(n) is int and n >= 0 for n in counts) or not manifest["tokens"]:
        raise UserError(f"{path}: its counts of documents and tokens are damaged; delete that folder, start again")
