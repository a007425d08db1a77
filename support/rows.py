"""Rows of text from files on this machine or on the Hugging Face hub.

`datasets` reads tables, `fsspec` opens and decompresses text and JSON; both repeat what fails on the network. A row is
a dict with text, and with score and language where they are wanted. A mistake in a file is one line that names it.
"""

import errno
import glob
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from support.cli import UserError, one_line
from support.files import natural

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv",
           ".arrow": "arrow", ".txt": "text"}  # fmt: skip
COMPRESSED = (".gz", ".zst")
MOST_STAMPS = 500_000  # files that a manifest names one by one: 54 MB; of a million, read_json would refuse it
SPLIT_CHARS = 2**24  # of a text file, searched for --split_on at once


class File(NamedTuple):
    path: str  # or hf://datasets/NAME@COMMIT/PATH
    size: int  # bytes


class Wanted(NamedTuple):
    """What is read of each row."""

    text_column: str = "text"
    score: bool = False
    language: bool = False
    split_on: str | None = None  # between the documents of a .txt


# ---------------------------------------------------------------------------------------
# Which files there are.


def format_of(path) -> str | None:
    """Which of READERS reads it; for tables also the name of the loader in `datasets`."""
    path = path.lower()
    ending = Path(next((path.removesuffix(e) for e in COMPRESSED if path.endswith(e)), path)).suffix
    return FORMATS.get(ending)


def find_files(flag_name, patterns) -> list[File]:
    """The files that the patterns match in natural order, each once, whatever its names. UserError."""
    found = {}
    for pattern in map(os.path.expanduser, patterns):
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            folder = next((p for p in Path(pattern).parents if p.is_dir()), Path())
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise UserError(f"--{flag_name} {pattern}: no such file; {folder.resolve()} holds {there}")
        for path in sorted(matches, key=in_natural_order):
            if os.path.isdir(path) and path == pattern:
                raise UserError(f"--{flag_name} {path}: a folder; name the files in it, for example '{path}/*.parquet'")
            if not os.path.isdir(path):
                try:
                    about = os.stat(path)
                except OSError as error:
                    if error.errno == errno.ELOOP:  # a link that leads back to its own folder: a circle
                        continue
                    raise UserError(f"--{flag_name} {path}: cannot be read ({error.strerror})") from error
                found.setdefault((about.st_dev, about.st_ino), File(path, about.st_size))
    for file in found.values():
        if format_of(file.path) is None:
            raise UserError(f"--{flag_name} {file.path}: cannot read this kind of file, expected {', '.join(FORMATS)}")
    return sorted(found.values(), key=lambda file: in_natural_order(file.path))


def in_natural_order(path):
    return [natural(Path(part)) for part in Path(path).parts]


def hub_files(name, subset, split, revision) -> tuple[list[File], str]:
    """The files of one split of a dataset, as `datasets` finds them, and the commit. UserError."""
    try:
        import datasets
        from huggingface_hub import HfFileSystem

        builder = datasets.load_dataset_builder(name, subset, revision=revision)
        splits = builder.config.data_files or {}
        paths, system = list(splits.get(split, ())), HfFileSystem()
        listed = [e for folder in sorted({os.path.dirname(p) for p in paths}) for e in system.ls(folder, detail=True)]
    except Exception as error:  # a hub has many ways to be out of reach
        raise UserError(
            f"dataset {name}: the hub could not be read ({type(error).__name__}: {one_line(error)}). Check the network "
            "and the names, or fetch its parquet files by other means and name them with --local_files"
        ) from error
    if not paths:
        raise UserError(f"dataset {name}: no split {split!r}; --split takes {', '.join(splits) or 'none'}")
    sizes = {entry["name"]: entry["size"] for entry in listed}
    unknown = [path for path in paths if format_of(path) is None]
    if unknown:
        raise UserError(f"{unknown[0]}: cannot read this kind of file, expected {', '.join(FORMATS)}")
    commit = re.match(r"hf://datasets/[^@]+@([^/]+)/", paths[0])[1]
    return [File(path, sizes[path.removeprefix("hf://")]) for path in paths], commit


def stamps(files) -> dict:
    """By path [size, time, hash of the first and last 64 KB] of each file: what changes when its content does."""
    found = {}
    for path, size in files:
        with open(path, "rb") as f:
            ends = f.read(2**16)
            f.seek(max(0, size - 2**16))
            ends += f.read(2**16)
        name = path.encode(errors="replace").decode()  # any name fits into JSON
        found[name] = [size, int(os.stat(path).st_mtime), hashlib.sha256(ends).hexdigest()[:16]]
    if len(found) <= MOST_STAMPS:
        return found
    return {"files": len(found), "sha256": hashlib.sha256(json.dumps(found).encode()).hexdigest()}


# ---------------------------------------------------------------------------------------
# What is in them.


def rows_of(paths, wanted, part=0, parts=1):
    """(where it is, row) for each row of the files, in their order; of a parquet file only its row groups of part
    `part` of `parts` equal ones. UserError names the file."""
    for path in paths:
        number = 0
        try:
            for number, row in enumerate(READERS[format_of(path)](path, wanted, part, parts), 1):
                yield f"{path}, row {number}", row
        except UserError as error:
            raise UserError(f"{path}, row {number + 1}: {error}") from error
        except Exception as error:  # each library has errors of its own
            why = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{path}: cannot be read after row {number:,} ({why})") from error


def columns_of(there, wanted, may_lack=()) -> dict:
    """Which column serves as text, score and language, where they are wanted. UserError if one is missing."""
    names_of = {"text": (wanted.text_column,)}
    names_of |= {"score": ("score", "int_score")} if wanted.score else {}
    names_of |= {"language": ("language",)} if wanted.language else {}
    found = {key: next((n for n in names if n in there or n in may_lack), None) for key, names in names_of.items()}
    for key, names in names_of.items():
        if found[key] is None:
            hint = "; see --text_column" if key == "text" else ""
            raise UserError(f"no column {' or '.join(names)}, but {', '.join(there) or 'none'}{hint}")
    return found


def read_table(path, wanted, part, parts):
    """Rows of parquet, arrow and csv."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is raised as well
    kind, name = format_of(path), path if "://" in path else glob.escape(os.path.abspath(path))
    as_text = dict.fromkeys((wanted.text_column, "score", "int_score", "language"), str)  # "007" stays "007"
    how = {"parquet": {"batch_size": 256}, "csv": {"converters": as_text, "na_filter": False}}.get(kind, {})
    dataset = datasets.load_dataset(kind, data_files=[name], split="train", streaming=True, **how)
    there = dataset.features or next(iter(dataset.take(1)), {})
    if not there:
        return
    columns = columns_of(list(there), wanted)
    dataset = dataset.select_columns(list(columns.values())).reshard()
    n = min(parts, dataset.num_shards)
    if part < n:
        for batch in dataset.shard(n, part, contiguous=True).iter(256):
            for values in zip(*(batch[column] for column in columns.values())):
                yield dict(zip(columns, values))


def open_text(path):
    """A file of UTF-8 text, decompressed, with or without a byte order mark."""
    import fsspec
    from huggingface_hub import HfFileSystem

    system, path = (HfFileSystem(), path) if "://" in path else (fsspec.filesystem("file"), os.path.abspath(path))
    return system.open(path, "rt", compression="infer", encoding="utf-8-sig")


def read_json(path, wanted, part, parts):
    """Rows of JSON lines, or of a file that is one object or one list of them. json.loads takes a text as it is,
    where the readers of tables guess that one is a date or a number."""
    with open_text(path) as file:
        for row in json_values(file):
            if not isinstance(row, dict):
                raise UserError(f"a JSON {type(row).__name__}, expected an object")
            columns = columns_of(row, wanted, may_lack=("int_score", "language"))
            yield {key: row.get(name) for key, name in columns.items()}


def json_values(file):
    first = next(file, "")
    try:
        by_line = isinstance(json.loads(first), dict)
    except ValueError:
        by_line = False
    if by_line or first.strip()[:1] not in ("[", "{"):
        yield from (json.loads(line) for line in itertools.chain([first], file) if line and not line.isspace())
    else:
        whole = json.loads("".join([first, *file]))
        yield from whole if isinstance(whole, list) else [whole]


def read_text(path, wanted, part, parts):
    """A text file: one document, or several with a marker between them, read in flat memory."""
    with open_text(path) as file:
        rest = ""
        while wanted.split_on and (chunk := file.read(SPLIT_CHARS)):
            *whole, rest = (rest + chunk).split(wanted.split_on)
            yield from ({"text": text} for text in whole)
        yield {"text": rest + file.read()}


READERS = {"parquet": read_table, "arrow": read_table, "csv": read_table, "json": read_json, "text": read_text}
