"""Where text comes from: parquet, JSON lines and text files of your own, or of a dataset on the Hugging Face hub.

Notable: a source is a list of files, and reading can begin after any row of any of them, so that a
preparation which was stopped goes on where it was. The hub's files are fetched one after the other, of one
commit, and can be deleted as soon as they are no longer needed: 28 GB of FineWeb-Edu pass through a few GB of disk.
"""

import glob
import gzip
import io
import json
import os
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_processing_fineweb import natural
from support.cli import UserError, one_line
from support.download import PART, download, patiently

COLUMNS = {"id": ("id",), "score": ("score", "int_score"), "language": ("language",)}  # the first that is there
PARQUET_ROWS = 256  # decoded at a time


class Row(NamedTuple):
    text: object  # a string where all is well
    id: object  # None where there is none, as for score and language
    score: object
    language: object
    number: int  # in its file, from 1 (in a file of lines, the line); reading can begin again after it
    read: int  # bytes of its file read so far


# ---------------------------------------------------------------------------------------
# Files. A reader yields the rows of one file after the first `skip`; `needed` are the COLUMNS that must be there.


def read_parquet(path, text_column, needed, skip):
    import pyarrow.parquet

    try:
        yield from rows_of_parquet(pyarrow, path, text_column, needed, skip)
    except (pyarrow.ArrowException, KeyError) as error:  # some of them are no ValueErrors
        raise ValueError(error) from error


def rows_of_parquet(pyarrow, path, text_column, needed, skip):
    with pyarrow.parquet.ParquetFile(path) as file:
        names = names_of(path, file.schema_arrow.names, text_column, needed)
        group, row = 0, 0
        while group < file.num_row_groups and row + file.metadata.row_group(group).num_rows <= skip:
            row += file.metadata.row_group(group).num_rows  # passed over unread
            group += 1
        size, n_rows, groups = path.stat().st_size, file.metadata.num_rows, range(group, file.num_row_groups)
        wanted = [name for name in names if name]
        for part in file.iter_batches(PARQUET_ROWS, groups, wanted):  # less than a group: some are large
            values = [part.column(name).to_pylist() if name else [None] * part.num_rows for name in names]
            for columns in zip(*values):
                row += 1
                if row > skip:
                    yield Row(*columns, row, size * row // n_rows)


def names_of(path, there, text_column, needed) -> list:
    """The names of the columns text, id, score, language, None where not needed. UserError if one is missing."""
    names = [text_column if text_column in there else None]
    if names[0] is None:
        raise UserError(f"{path}: no column {text_column!r}, but {', '.join(there)}; see --text_column")
    for key, candidates in COLUMNS.items():
        names.append(next((c for c in candidates if c in there and key in needed), None))
        if names[-1] is None and key in needed and key != "id":
            raise UserError(f"{path}: no column {' or '.join(candidates)}, but {', '.join(there)}")
    return names


def read_jsonl(path, text_column, needed, skip):
    with open(path, "rb") as raw, decompressed(raw, path.suffix) as lines:
        for number, line in enumerate(lines, 1):
            if number <= skip or line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a JSON {type(row).__name__}, expected an object")
            if text_column not in row:
                there = ", ".join(row) or "none"
                raise UserError(f"{path}, line {number}: no key {text_column!r}, but {there}; see --text_column")
            others = (next((row[c] for c in names if c in row), None) for names in COLUMNS.values())
            yield Row(row[text_column], *others, number, raw.tell())


def decompressed(raw, suffix):
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**20)  # which knows lines
    return raw


def read_txt(path, text_column, needed, skip):
    data = path.read_bytes()
    if not skip:
        yield Row(data.decode("utf-8-sig"), None, None, None, 1, len(data))


READERS = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".txt": read_txt,
}


def reader_of(name):
    return next((reader for ending, reader in READERS.items() if str(name).endswith(ending)), None)


def read_file(path, text_column, needed, skip):
    """The rows of one file; whatever is wrong with it is a UserError that names it."""
    try:
        yield from reader_of(path)(path, text_column, needed, skip)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pyarrow; pip install pyarrow") from error
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error


# ---------------------------------------------------------------------------------------
# Sources: facts() decide what comes out; open() finds the files; rows(i, skip) reads the i-th; release(i) says that
# those before the i-th are not needed any more; close() ends what goes on in the background.


@dataclass
class LocalFiles:
    paths: tuple
    text_column: str = "text"
    needed: tuple = ()
    version = None

    def facts(self) -> dict:
        names = (str(path).encode(errors="replace").decode() for path in self.paths)  # any name fits into JSON
        return {"files": {n: p.stat().st_size for n, p in zip(names, self.paths)}, "text_column": self.text_column}

    def open(self, version=None):
        self.sizes = [path.stat().st_size for path in self.paths]

    def name(self, i):
        return str(self.paths[i])

    def rows(self, i, skip=0):
        return read_file(self.paths[i], self.text_column, self.needed, skip)

    def release(self, i):
        pass

    def close(self, done):
        pass


def find_files(patterns, text_column="text", needed=()) -> LocalFiles:
    """The files that the patterns match, each once, in natural order. UserError if a pattern matches none."""
    found = set()
    for pattern in map(os.path.expanduser, patterns):
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            folder = next((p for p in Path(pattern).parents if p.is_dir()), Path())
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise UserError(f"{pattern}: no such file; {folder.resolve()} holds {there}")
        found.update(map(Path, matches))
    paths = sorted(found, key=in_natural_order)
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: a folder; name the files in it, for example '{path}/*.parquet'")
        if reader_of(path) is None:
            raise UserError(f"{path}: cannot read this kind of file, expected {', '.join(READERS)}")
    return LocalFiles(tuple(paths), text_column, needed)


def in_natural_order(path):
    return [natural(Path(part)) for part in path.parts]


@dataclass
class Texts:
    """Documents already in memory."""

    texts: list
    description: str
    version: str
    settings: dict

    def facts(self) -> dict:
        return {"texts": self.description, **self.settings}

    def open(self, version=None):
        self.sizes = [sum(map(len, self.texts))]

    def name(self, i):
        return self.description

    def rows(self, i, skip=0):
        for number, text in enumerate(self.texts[skip:], skip + 1):
            yield Row(text, None, None, None, number, 0)

    def release(self, i):
        pass

    def close(self, done):
        pass


# ---------------------------------------------------------------------------------------
# The hub.


class HubFile(NamedTuple):
    name: str
    size: int
    sha256: str | None  # None for small files, which the hub keeps in git


@dataclass
class HubFiles:
    """The files of one configuration of a dataset at one commit, fetched into `folder` when their turn comes."""

    dataset: str
    subset: str | None
    revision: str | None
    folder: Path
    keep: bool = False
    text_column: str = "text"
    needed: tuple = ()
    version: str | None = None  # the commit, known once open

    def facts(self) -> dict:
        keys = ("dataset", "subset", "revision", "text_column")
        return {key: getattr(self, key) for key in keys}

    def open(self, version=None):
        """Lists the files at the commit `version`, or at the newest of `revision`."""
        info = dataset_info(self.dataset, version or self.revision)
        self.version, self.files = info.sha, files_of(self.dataset, self.subset, info)
        self.sizes = [file.size for file in self.files]
        self.stop, self.pool, self.flying = threading.Event(), ThreadPoolExecutor(1), {}

    def name(self, i):
        return f"{self.dataset}/{self.files[i].name}"

    def path(self, i) -> Path:
        return self.folder / self.version[:12] / self.files[i].name

    def rows(self, i, skip=0):
        """Reads file i while the next is fetched."""
        begun = self.flying.pop(i, None)
        if begun is None or begun.exception():  # there may be room on the disk now, or the network is back
            self.fetch(i)
        if i + 1 < len(self.files):
            self.flying[i + 1] = self.pool.submit(self.fetch, i + 1)
        return read_file(self.path(i), self.text_column, self.needed, skip)

    def fetch(self, i):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        file = self.files[i]
        url = hf_hub_url(self.dataset, file.name, repo_type="dataset", revision=self.version)
        download(url, self.path(i), file.size, file.sha256, build_hf_headers(), self.stop)

    def release(self, i):
        if not self.keep:
            for j in range(i):
                self.path(j).unlink(missing_ok=True)

    def close(self, done):
        """Ends a download that nobody waits for. After a finished preparation nothing of them is left, unless kept."""
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)
        if done and not self.keep and self.folder.is_dir():
            paths = [self.path(i) for i in range(len(self.files))]
            for path in paths:
                path.unlink(missing_ok=True)
                path.with_name(path.name + PART).unlink(missing_ok=True)
            for folder, _, _ in os.walk(self.folder, topdown=False):
                if not os.listdir(folder):
                    os.rmdir(folder)


def dataset_info(dataset, revision):
    """What the hub says of a dataset at one commit: its id, its card and all its files. UserError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
        from huggingface_hub.errors import RevisionNotFoundError as NoSuchRevision
    except ImportError as error:
        raise UserError(f"the hub is read with huggingface_hub ({error}); pip install huggingface_hub") from error
    final = HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError, NoSuchRevision
    ask = huggingface_hub.HfApi().dataset_info
    try:
        return patiently(lambda: ask(dataset, revision=revision, timeout=30, files_metadata=True), final)
    except Exception as error:  # a hub has many ways to be out of reach
        raise UserError(
            f"dataset {dataset}: the hub could not be read ({type(error).__name__}: {one_line(error)}). Check the "
            "network and the names, or fetch its parquet files by other means and name them with --local_files"
        ) from error


def files_of(dataset, subset, info) -> list[HubFile]:
    """The training files of the configuration `subset`, which a dataset's card describes; else of the folder `subset`;
    all files for None where the card describes nothing."""
    card = info.card_data.to_dict() if info.card_data else {}
    configs = {c["config_name"]: c for c in card.get("configs") or [] if isinstance(c, dict) and "config_name" in c}
    if subset is None and configs:
        subset = "default" if "default" in configs else next(iter(configs))
    patterns = training_patterns(configs[subset]) if subset in configs else [f"{subset}/**" if subset else "**"]
    files = [f for f in info.siblings or [] if any(matches(p, f.rfilename) for p in patterns)]
    files = sorted((f for f in files if reader_of(f.rfilename)), key=lambda f: in_natural_order(Path(f.rfilename)))
    if not files:
        known = ", ".join(configs) or "none"
        raise UserError(
            f"dataset {dataset} ({subset}): no {', '.join(READERS)} among its files at {info.sha[:12]}; "
            f"--subset takes a folder of it, or a configuration: {known[:500]}"
        )
    return [HubFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None) for f in files]


def training_patterns(config) -> list[str]:
    """A card's data_files is a pattern, a list of them, or a list of {split, path: pattern or patterns}."""
    found = []
    entries = config.get("data_files") or "**"
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, dict):
            entry = entry.get("path", []) if entry.get("split", "train") == "train" else []
        found += entry if isinstance(entry, list) else [entry]
    return found


def matches(pattern, name) -> bool:
    """`*` and `?` stay within a folder, `**` does not."""
    parts = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = re.sub(r"\*\*/|\*\*|\*|\?|[^*?]+", lambda m: parts.get(m[0]) or re.escape(m[0]), pattern)
    return re.fullmatch(regex, name) is not None
