"""Text in, token shards out: FineWeb-Edu from the Hugging Face hub, or files of your own.

    python prepare_fineweb.py                                                       # FineWeb-Edu sample-10BT
    python prepare_fineweb.py --dataset roneneldan/TinyStories --out_dir stories
    python prepare_fineweb.py --local_files 'texts/*.txt' --train_tokenizer 16384 --out_dir my_corpus

The source is cut into pieces, each about one shard. A piece is read, tokenized and written by itself; last comes a
small file of facts about it, pieces/000012.json. What has its facts is done. So any number of processes or machines
can make pieces, in any order, with the same bytes, and after a crash the same command makes the rest. manifest.json,
written last of all, says what is inside, and the tokenizer is saved beside it.

A document is <|endoftext|> and then its text. It validates if the hash of its text says so: that depends on no other
document, and equal texts are never in both splits. None, "" and whitespace alone are left out and counted. Half of a
surrogate pair becomes U+FFFD and is counted. NUL stays. A literal "<|endoftext|>" stays text, unless --split_on names
it. A value that is not text is an error.
"""

import multiprocessing
import os
import platform
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

from support.cli import UserError, flag, range_problems, read_flags, refuse, run, type_problems  # isort: split

import numpy as np

from data_processing_fineweb import FORMAT_VERSION, MANIFEST, open_shard, permutation
from pieces import LENGTHS, REASONS, Document, Split, cut_into_pieces, documents, make_all, part_of, split_directories
from prepared import (
    DATASET,
    PICTURE,
    SUBSET,
    already_prepared,
    describe_tokenizer,
    forget_pieces,
    only_writer,
    read_plan,
    refuse_empty,
    remove_files,
    write_plan,
)
from support import demo_corpus
from support.download import download
from support.files import write_json
from support.rows import FORMATS, find_files, hub_files, stamps
from tokenizer import load_tokenizer, replace_surrogates, train_tokenizer

OUT_DIR, DEMO_DIR = "edu_fineweb10B", "demo_corpus"
VAL_SHARE, OWN_VAL_SHARE = 0.001, 0.05  # of the hub's documents, 10M of 10B tokens; of your own files
SAMPLE_CHARS, SAMPLE_PIECES = 50_000_000, 16  # what a tokenizer is trained on: so much text from so many pieces
LOCK_SECONDS = 5  # to wait for the processes of a run that was just killed
LITTLE = 20_000_000  # tokens; the steps of the default preset are too large for so few
WAIT_SECONDS = 3600  # for the first of several --pieces, which may be training a tokenizer


@dataclass(frozen=True)
class PrepareConfig:
    """One preparation. Every field is a flag."""

    out_dir: str = flag(OUT_DIR, "training shards; FOLDER_val gets those for validation", unit="folder", group="files")
    local_files: tuple[str, ...] = flag((), f"read these instead of the hub: {', '.join(FORMATS)}, also .gz and .zst;"
        " a .txt is one document", unit="glob")  # fmt: skip
    val_files: tuple[str, ...] = flag((), "files that validate as a whole", unit="glob")
    dataset: str | None = flag(None, f"dataset on the Hugging Face hub; default: {DATASET}", group="hub")
    subset: str | None = flag(None, f"configuration of the dataset; default: {SUBSET} of {DATASET}")
    split: str = flag("train", "split of the dataset")
    revision: str | None = flag(None, "commit, tag or branch; default: the newest commit, which the manifest names")
    text_column: str = flag("text", "column or key of the text", group="documents")
    split_on: str | None = flag(None, "cut each text into documents here, for example at '<|endoftext|>'")
    min_score: float | None = flag(None, "only rows with so much in the column score, else int_score; default: all")
    language: str | None = flag(None, "only rows with this in the column language, such as en; default: all")
    val_share: float | None = flag(None, "part of the documents that validates, by the hash of the text; where that is"
        " none, the last part of each document; default: 0.001, of your own files 0.05", above=0, below=1)  # fmt: skip
    max_tokens: int | None = flag(None, "end with the document that reaches so many training tokens", at_least=1)
    tokenizer: str = flag("gpt2", "folder, tokenizer.json, or model on the hub", group="tokens")
    eot_token: str | None = flag(None, "the tokenizer's end-of-text token; default: the one it names")
    train_tokenizer: int | None = flag(None, "train a byte-level BPE of so many ids", at_least=257, at_most=2**20)
    shard_tokens: int = flag(100_000_000, "tokens per shard, at most", at_least=1, at_most=2**31)
    num_proc: int | None = flag(None, "processes; default: one per core", at_least=1, at_most=1024, group="machine")
    start_method: str = flag("spawn", "how they start", choices=("spawn", "fork", "forkserver"))
    engine: str = flag("local", "this machine, or a Ray cluster that sees the folders", choices=("local", "ray"))
    ray_address: str | None = flag(None, "of the cluster; default: RAY_ADDRESS, else Ray on this machine")
    pieces: str | None = flag(None, "make only part I of N equal parts, for job arrays; afterwards the same command"
        " without it finishes", unit="i:n")  # fmt: skip
    restart: bool = flag(False, "delete what an earlier run left in the folders, finished or not, and begin anew")
    token_shards: tuple[str, ...] = flag((), "fetch shards that others made, .npy or .bin, into FOLDER", unit="url",
        group="instead")  # fmt: skip
    demo: bool = flag(False, f"2 MB of Python's documentation, made offline in {DEMO_DIR}")

    def __post_init__(self):
        for name in "local_files", "val_files", "token_shards":  # "x.parquet", Path("x.parquet") and lists will do
            value = getattr(self, name)
            value = (value,) if isinstance(value, (str, os.PathLike)) else value
            object.__setattr__(self, name, tuple(os.fspath(v) for v in value or ()))
        for name in "out_dir", "tokenizer":
            object.__setattr__(self, name, os.fspath(getattr(self, name)))


def problems(c: PrepareConfig) -> list[str]:
    """Everything wrong with the flags, a line each; [] if nothing."""
    found = range_problems(c)
    if type_problems(c):
        return found
    for instead in (name for name in ("demo", "token_shards") if getattr(c, name)):
        allowed = ("out_dir", instead, "restart" if instead == "demo" else "")
        others = (f for f in fields(c) if f.name not in allowed and getattr(c, f.name) != f.default)
        found += [f"--{f.name}: not together with --{instead}" for f in others]
    hub = [name for name in ("dataset", "subset", "revision") if getattr(c, name)]
    found += [f"--{name} is for the hub: not together with --local_files" for name in hub if c.local_files]
    if c.val_files and c.val_share is not None:
        found.append("--val_share: not together with --val_files, which are taken whole")
    if c.train_tokenizer and (c.tokenizer != "gpt2" or c.eot_token):
        found.append("--train_tokenizer: not together with --tokenizer or --eot_token")
    if c.ray_address and c.engine != "ray":
        found.append("--ray_address: only together with --engine ray")
    if c.start_method not in multiprocessing.get_all_start_methods():
        found.append(f"--start_method {c.start_method}: this system has no such way")
    if c.pieces and c.restart:
        found.append("--restart: not together with --pieces, which others may be making too")
    if c.split_on == "":
        found.append("--split_on: expected some text")
    if c.pieces is not None and not 0 <= part_of(c)[0] < part_of(c)[1]:
        found.append(f"--pieces {c.pieces}: expected I:N with I from 0 to N - 1, for example 0:16")
    return found


# ---------------------------------------------------------------------------------------
# The beginning and the end of a preparation.


def recipe_of(c, files) -> dict:
    """What decides the bytes of the shards, in the manifest's words; a tokenizer to be trained is not known yet."""
    keys = ("shard_tokens", "max_tokens", "val_share", "min_score", "language", "split_on", "train_tokenizer")
    if c.local_files:
        source = {name: stamps(found) for name, found in files.items() if found}
    else:
        source = {key: getattr(c, key) for key in ("dataset", "subset", "split", "revision")}
        source |= {"val_files": stamps(files["val_files"])} if files["val_files"] else {}
    recipe = {"source": source | {"text_column": c.text_column}, "arguments": {key: getattr(c, key) for key in keys}}
    if c.train_tokenizer:
        return recipe
    return {"tokenizer": describe_tokenizer(load_tokenizer(c.tokenizer, c.eot_token)), **recipe}


def plan_and_pieces(c, directories, recipe, files) -> tuple[dict, list]:
    """(plan, pieces): those of an unfinished preparation of the same recipe, or of a new one."""
    plan = None if c.restart else read_plan(directories, recipe)
    commit = None
    if not c.local_files:
        revision = plan.get("commit") if plan else c.revision
        files["local_files"], commit = hub_files(c.dataset, c.subset, c.split, revision)
    pieces = cut_into_pieces(files["val_files"], "val", c.shard_tokens)
    pieces += cut_into_pieces(files["local_files"], "train" if pieces else "both", c.shard_tokens, len(pieces))
    if plan is None:
        tokenizer = train_tokenizer_on(pieces, c) if c.train_tokenizer else load_tokenizer(c.tokenizer, c.eot_token)
        plan = {"tokenizer": describe_tokenizer(tokenizer), **recipe, "commit": commit}
        write_plan(directories, plan, tokenizer)
    elif not c.pieces:
        # what a killed run left half-written
        remove_files(directories, lambda name: name.rpartition("/")[2].startswith("."))
    return plan, pieces


def train_tokenizer_on(pieces, c):
    """A tokenizer trained on the beginnings of some pieces, the same whoever makes it."""
    some = [p for p in pieces if p.role != "val"][:: -(-len(pieces) // SAMPLE_PIECES)]
    print(f"training a tokenizer of {c.train_tokenizer:,} ids", flush=True)

    def texts():
        for piece in some:
            chars = 0
            for document in documents(piece, c):
                if document.split == "train" and not document.skipped:
                    chars += len(document.text)
                    yield document.text[: SAMPLE_CHARS // len(some)]
                if chars > SAMPLE_CHARS // len(some):
                    break

    return train_tokenizer(texts(), c.train_tokenizer)


def finish(c, directories, plan, kept, picture=True) -> dict:
    """The picture and the manifests, from the facts of all pieces in order. UserError where a split is empty."""
    manifests, facts = {}, {key: plan[key] for key in ("tokenizer", "source", "arguments")}
    for split in directories:
        parts = [f[split] for f in kept if split in f]
        lengths = sum((Counter(part["lengths"]) for part in parts), Counter())
        counts = {key: sum(part[key] for part in parts) for key in ("documents", "text_bytes", "replaced_surrogates")}
        left_out = sum((Counter(f["skipped"]) for f in kept if ("train" in f) == (split == "train")), Counter())
        manifests[split] = {"format_version": FORMAT_VERSION, "split": split, **facts, "source_version": plan["commit"],
                            **counts, "skipped": {r: left_out[r] for r in REASONS}, "lengths": lengths,
                            "last_parts": any(f["last_parts"] for f in kept),
                            "tokens": sum(part["tokens"] for part in parts),
                            "shards": [entry for part in parts for entry in part["shards"]]}  # fmt: skip
    try:
        refuse_empty(c, manifests)
    except UserError:
        remove_files(directories, lambda name: name.startswith("pieces/"))  # nobody wants to go on with this
        raise
    keep = {entry["name"] for m in manifests.values() for entry in m["shards"]}
    remove_files(directories, lambda name: name.endswith(".npy") and name not in keep)
    if picture:
        import plot_run  # here: only this needs matplotlib

        lengths = {split: m["lengths"] for split, m in manifests.items()}
        plot_run.plot_lengths(lengths, LENGTHS, directories["train"] / PICTURE)
    for split, directory in directories.items():
        write_json(directory / MANIFEST, manifests[split])
    forget_pieces(directories)
    return manifests


# ---------------------------------------------------------------------------------------
# The whole of it.


def prepare(c: PrepareConfig) -> dict[str, dict]:
    """Writes `out_dir` (training) and `<out_dir>_val` (validation) and returns their manifests by split.

    Where both are complete and were made from the same flags, nothing is done; where an earlier call was interrupted,
    this one goes on. UserError for what the user can mend. With several processes, a script that calls this needs
    the usual `if __name__ == "__main__":`. With c.pieces the result is {}: the rest is still to be made.
    """
    found, files = problems(c), {}
    for name in "local_files", "val_files":
        try:
            files[name] = find_files(name, getattr(c, name))
        except UserError as error:
            found.append(str(error))
    named = [{os.path.realpath(file.path) for file in files.get(name, ())} for name in ("local_files", "val_files")]
    found += [f"{path}: both in --local_files and in --val_files" for path in sorted(named[0] & named[1])]
    refuse(found)
    if not c.val_files and c.val_share is None:
        c = replace(c, val_share=OWN_VAL_SHARE if c.local_files else VAL_SHARE)
    if not c.local_files and not c.dataset:
        c = replace(c, dataset=DATASET, subset=c.subset or SUBSET)  # the manifest names them
    directories, recipe = split_directories(c.out_dir), recipe_of(c, files)
    manifests = None if c.restart else already_prepared(directories, recipe)
    if manifests:
        print("already prepared, nothing to do")
        forget_pieces(directories)  # there are some if that run was killed at the very end
        return summarize(directories, manifests)
    with only_writer(directories, WAIT_SECONDS if c.pieces else LOCK_SECONDS):
        # another command may have finished while this one waited for the lock
        manifests = None if c.restart else already_prepared(directories, recipe)
        if manifests:
            return summarize(directories, manifests)
        plan, pieces = plan_and_pieces(c, directories, recipe, files)
        if not c.pieces:
            return summarize(directories, finish(c, directories, plan, make_all(c, pieces, plan)))
    make_all(c, pieces, plan)  # side by side with the other parts
    print(f"made part {c.pieces} of {len(pieces)} pieces; when all are made, run the same command without --pieces")
    return {}


def summarize(directories, manifests) -> dict:
    """Prints what was made and what to do next; returns the manifests."""
    for split in ("train", "val"):
        m = manifests[split]
        print(f"{directories[split]} ({split}): {m['documents']:,} documents, {m['tokens']:,} tokens, "
              f"{m['text_bytes'] / m['tokens']:.3f} bytes of text per token, shards: {len(m['shards'])}")  # fmt: skip
        notes = [f"{n:,} {reason}" for reason, n in m["skipped"].items() if n]
        if notes:
            print(f"  skipped documents: {', '.join(notes)}")
        if m["replaced_surrogates"]:
            print(f"  halves of surrogate pairs replaced by U+FFFD: {m['replaced_surrogates']:,}")
    if manifests["val"].get("last_parts"):
        print("validation: the last part of each document, as no document's hash said that it validates")
    if (directories["train"] / PICTURE).exists():
        print(f"lengths of the documents: {directories['train'] / PICTURE}")
    train, val = (shlex.quote(str(directories[split])) for split in ("train", "val"))
    preset = "--preset small " if manifests["train"]["tokens"] < LITTLE else ""
    print(f"next: python train.py {preset}--data_dir {train} --val_data_dir {val}")
    return manifests


# ---------------------------------------------------------------------------------------
# The demo corpus, and shards that others have made.

DEMO_LEAST = 500_000  # characters; below it there is too little to learn from
VAL_EVERY = 20  # of the demo's documents, one is for validation


def prepare_demo(directory=DEMO_DIR, vocab_size=2048, restart=False) -> dict[str, dict]:
    """Makes the demo corpus in `directory` and `<directory>_val` unless it is there; returns the manifests.

    About 2 MB of text: the language reference that help() shows, and the standard library's docstrings, one document
    per module. The tokenizer is a byte-level BPE of `vocab_size` ids trained on the training part. The same for the
    same installation of Python. UserError if `directory` holds anything else; with `restart` a preparation of another
    recipe is replaced.
    """
    directories, c = split_directories(directory), PrepareConfig(out_dir=directory)
    source = {"texts": "CPython's help topics and docstrings", "vocab_size": vocab_size, "val_every": VAL_EVERY}
    recipe, made = {"source": source}, "there already"
    manifests = None if restart else already_prepared(directories, recipe)
    if not manifests:
        texts = [*demo_corpus.help_topics(), *demo_corpus.library_docstrings()]
        if sum(map(len, texts)) < DEMO_LEAST:
            raise UserError("this Python comes without its documentation; prepare text of yours with --local_files")
        texts = [texts[i] for i in permutation(np.arange(len(texts)), len(texts), 0, 0)]
        parts = {"val": texts[::VAL_EVERY], "train": [text for n, text in enumerate(texts) if n % VAL_EVERY]}
        tokenizer = train_tokenizer(parts["train"], vocab_size, "demo")
        with only_writer(directories, LOCK_SECONDS):
            if not restart:
                manifests = already_prepared(directories, recipe)  # by another run, while this one waited
                read_plan(directories, recipe)  # refuses where pieces of an unfinished preparation would be lost
            if not manifests:
                manifests, made = write_demo(c, directories, parts, tokenizer, source), "made"
    train, val = manifests["train"], manifests["val"]
    counts, tokens = (f"{train[k]:,} + {val[k]:,} {k}" for k in ("documents", "tokens"))
    print(f"corpus     {directory} {made}: {counts}, {tokens} (training + validation)")
    return manifests


def write_demo(c, directories, parts, tokenizer, source) -> dict[str, dict]:
    """The shards of the demo corpus and their manifests. parts: texts by split."""
    facts = {}
    plan = {"tokenizer": describe_tokenizer(tokenizer), "source": source, "commit": platform.python_version()}
    write_plan(directories, plan, tokenizer)
    for split, folder in directories.items():
        output = Split(folder, tokenizer, c.shard_tokens, f"fineweb_{split}")
        for text in map(replace_surrogates, parts[split]):
            output.add(Document(None, split, text, len(text.encode())), tokenizer.encode_arrays([text])[0])
        facts[split] = output.close()
    kept = [facts | {"skipped": {}, "last_parts": False}]
    return finish(c, directories, plan | {"arguments": {}}, kept, picture=False)


def fetch_shards(urls, out_dir):
    """Fetches token shards, build-nanogpt's .npy or llm.c's .bin, which training reads as they are. UserError."""
    matches = [re.fullmatch(r"(?i:https?)://[^?#]+/([\w-][\w.+-]*\.(npy|bin))([?#].*)?", url, re.ASCII) for url in urls]
    names = [match[1] for match in matches if match]
    found = [f"{url}: expected http(s)://.../NAME.npy or .bin" for url, match in zip(urls, matches) if not match]
    found += [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]
    if (Path(out_dir) / MANIFEST).exists():
        found.append(f"{out_dir}: holds shards with a manifest already; name another --out_dir")
    refuse(found)
    paths = [Path(out_dir, name) for name in names]
    for i, (url, path) in enumerate(zip(urls, paths), 1):
        download(url, path)
        try:
            tokens = open_shard(path).tokens
        except UserError:
            path.unlink()  # or it would be taken for a shard
            raise
        print(f"{i} of {len(urls)}: {path}, {tokens:,} tokens", flush=True)
    print(f"next: python train.py --data_dir {shlex.quote(str(out_dir))}")


# ---------------------------------------------------------------------------------------


def main(argv=None):
    c = PrepareConfig(**read_flags(PrepareConfig, argv, __doc__))
    if c.demo or c.token_shards:
        refuse(problems(c))
    if c.demo:
        prepare_demo(DEMO_DIR if c.out_dir == OUT_DIR else c.out_dir, restart=c.restart)
    elif c.token_shards:
        fetch_shards(c.token_shards, c.out_dir)
    else:
        try:
            prepare(c)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise


if __name__ == "__main__":
    sys.exit(run(main))
