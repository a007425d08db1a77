"""Token shards on disk, and the order in which training reads them.

    python data_processing_fineweb.py verify edu_fineweb10B     # compares every shard with its recorded hash

The order is a pure function of (seed, samples seen). So a run's place in the data is one integer and resuming needs no
search, and neither the number of devices nor the micro-batch changes which sequences form a step. Windows cross the
borders of shards, so no token is left out. This file knows nothing of the model.

Shapes: N tokens in all, T = block_size, W windows in an epoch, A micro-steps, B rows.
"""

import hashlib
import io
import mmap
import os
import re
import sys
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.cli import REQUIRED, UserError, flag, one_line, parse, run  # isort: split

import numpy as np

from support.files import allow_open_files, natural, read_json, sha256, sync, sync_directory, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
IGNORE = -100  # the target of a position that has none
HOW_TO_PREPARE = "create shards with `python prepare_fineweb.py`, or name their folder with --data_dir"
LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # llm.c's (magic, version) -> token type
LLMC_HEADER = 1024  # bytes: 256 little-endian int32, of which the third is the token count
OUR_HEADER = 128  # bytes: numpy's header of a .npy with one dimension, for any number of tokens
UNFINISHED_SHARD = ".unfinished"  # suffix of a shard that is being written
NPY_HEADER = 2**12  # bytes read of a .npy for its header; ours has 128, and Python's parser copes with 6,000 brackets
RELEASE_BYTES = 64 * 2**20  # the kernel may drop mapped pages after this much reading
ENTRY = {"name": str, "tokens": int, "dtype": str, "sha256": str}  # what a manifest says of each shard

# ---------------------------------------------------------------------------------------
# Shards: one-dimensional little-endian .npy files of uint16 or uint32.


@dataclass(frozen=True)
class Shard:
    path: Path
    tokens: int
    dtype: str  # "<u2" or "<u4"
    offset: int  # bytes before the first token


def open_shard(path: Path) -> Shard:
    """Reads only the header, and compares it with the file's size. UserError where this is no shard of tokens."""
    try:
        size = path.stat().st_size
        if size == 0:  # also a named pipe, whose opening would wait for a writer
            raise UserError(f"{path}: 0 bytes, expected a .npy of uint16 or uint32 tokens")
        with open(path, "rb") as f:
            shape, dtype, offset = (read_llmc_header if path.suffix == ".bin" else read_npy_header)(path, f)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not all(0 <= n < 2**63 for n in shape):
        raise UserError(f"{path}: its header announces a number of tokens that no file holds")
    if len(shape) != 1:
        raise UserError(f"{path}: found a {len(shape)}-D array of shape {shape}, expected one dimension")
    expected = offset + shape[0] * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(f"{path}: {size:,} bytes, but its header announces {shape[0]:,} tokens ({expected:,} bytes)")
    if shape[0] == 0:
        raise UserError(f"{path}: holds no token")
    return Shard(path, shape[0], dtype, offset)


def read_npy_header(path, f):
    start = f.read(6)
    if start[:2] == b"PK":
        raise UserError(f"{path}: found a zip archive (.npz?), expected one .npy array of uint16 or uint32")
    if start != b"\x93NUMPY":
        raise UserError(f"{path}: no .npy header (starts with {start!r}); raw tokens must be saved with numpy.save")
    f.seek(0)
    f = io.BytesIO(f.read(NPY_HEADER))  # a hostile header may announce 4 GB of itself
    try:
        version = np.lib.format.read_magic(f)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        with warnings.catch_warnings(action="ignore"):  # of Python's parser, about damaged headers
            shape, _, dtype = read(f)
    except KeyError as error:
        raise UserError(f"{path}: .npy version {version}, expected 1.0 or 2.0") from error
    except Exception as error:  # numpy raises ValueError, SyntaxError, EOFError, ... for damaged headers
        raise UserError(f"{path}: the .npy header is damaged ({one_line(error) or type(error).__name__})") from error
    if dtype.str not in ("<u2", "<u4"):
        raise UserError(f"{path}: found an array of {dtype} ({dtype.str}), expected little-endian uint16 or uint32")
    return shape, dtype.str, f.tell()


def read_llmc_header(path, f):
    header = np.frombuffer(f.read(12).ljust(12, b"\0"), "<i4")
    dtype = LLMC.get((int(header[0]), int(header[1])))
    if dtype is None:
        raise UserError(
            f"{path}: magic {header[0]}, version {header[1]}; expected llm.c's {list(LLMC)}. Tokens without header, as "
            f"nanoGPT has them, train as .npy: numpy.save('train.npy', numpy.fromfile({path.name!r}, 'uint16'))"
        )
    return (int(header[2]),), dtype, LLMC_HEADER


class ShardWriter:
    """Writes documents to `<prefix>_000000.npy`, ... of `shard_tokens` tokens each, and at the end a manifest.

    Tokens go into one file with a hidden name. When it is complete and on the disk, it is renamed and so becomes a
    shard. `owner` is part of the hidden name: two writers of the same shard at one time need different ones.
    """

    def __init__(self, directory, vocab_size, shard_tokens, prefix="shard", owner=""):
        self.directory, self.prefix, self.vocab_size = Path(directory), prefix, vocab_size
        self.directory.mkdir(parents=True, exist_ok=True)
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens is {shard_tokens}; it must be at least 1")
        self.shard_tokens, self.dtype = shard_tokens, np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.unfinished, self.file = self.directory / f".{prefix}{owner}{UNFINISHED_SHARD}", None
        self.filled = self.text_bytes = 0
        self.shards = []

    def add(self, ids, text_bytes):
        """Appends one document's ids; its `text_bytes` count to the shard in which it begins."""
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"token ids must be integers, not {ids.dtype}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token id outside [0, {self.vocab_size}): {ids.min()} to {ids.max()}")
        self.text_bytes += text_bytes
        ids = np.ascontiguousarray(ids, self.dtype)
        while ids.size:
            if self.file is None:
                self.file = open(self.unfinished, "wb", 2**20)  # noqa: SIM115 (until the shard is complete)
                self.file.write(bytes(OUR_HEADER))  # room for the header, which holds the number of tokens
                sync_directory(self.directory)
            part = ids[: self.shard_tokens - self.filled]
            self.file.write(part)
            self.filled += part.size
            ids = ids[part.size :]
            if self.filled == self.shard_tokens:
                self.flush()

    def flush(self):
        """Makes a shard of the tokens that are not in one yet, if there are any."""
        if not self.filled:
            return
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.filled,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.file.flush()
        sync(self.file)
        self.file.close()
        self.file, path = None, self.directory / f"{self.prefix}_{len(self.shards):06d}.npy"
        os.replace(self.unfinished, path)
        sync_directory(self.directory)
        entry = {"name": path.name, "tokens": self.filled, "dtype": self.dtype.str, "text_bytes": self.text_bytes}
        self.shards.append(entry | {"sha256": sha256(path)})
        self.filled = self.text_bytes = 0

    def discard(self):
        """Removes the unfinished file, after a failure."""
        if self.file is not None:
            with suppress(OSError):  # a full disk fails here once more
                self.file.close()
        self.unfinished.unlink(missing_ok=True)

    def close(self, **facts) -> dict:
        """Writes the last shard, then manifest.json with `facts` in it. Returns the manifest."""
        self.flush()
        tokens = sum(entry["tokens"] for entry in self.shards)
        manifest = {"format_version": FORMAT_VERSION, **facts, "tokens": tokens, "shards": self.shards}
        write_json(self.directory / MANIFEST, manifest)
        return manifest


def find_shards(directory, split) -> tuple[list[Shard], dict]:
    """The shards of a directory in order, and its manifest ({} where it has none).

    Without a manifest it takes build-nanogpt's .npy and llm.c's .bin files in natural order. These projects keep both
    splits in one folder, so where file names contain "train" or "val", only those of `split` are taken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{directory}: no shards, it {state}; {HOW_TO_PREPARE}")
    if (directory / MANIFEST).exists():
        manifest = read_json(directory / MANIFEST)
        return open_manifest(directory, manifest), manifest
    if (directory / "tokenizer").is_dir():  # prepare_fineweb begins with the tokenizer and ends with the manifest
        raise UserError(f"{directory}: prepare_fineweb.py did not finish here; run it again")
    visible = [p for p in directory.iterdir() if not p.name.startswith(".")]  # a system hides files such as ._x.npy
    paths = sorted((p for p in visible if p.suffix in (".npy", ".bin") and p.is_file()), key=natural)
    marked = {word: [p for p in paths if word in re.split(r"[^a-z]+", p.name)] for word in ("train", "val")}
    if any(marked.values()):
        paths = marked[split]
    if not paths:
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) or "nothing"
        wanted = f"neither {MANIFEST} nor {split} *.npy or *.bin"
        raise UserError(f"{directory}: found {wanted} in it, but {there}; {HOW_TO_PREPARE}")
    return [open_shard(p) for p in paths], {}


def open_manifest(directory, manifest):
    where = directory / MANIFEST
    try:
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{where}: format version {manifest['format_version']}, expected {FORMAT_VERSION}")
        for entry in manifest["shards"]:
            for key, kind in ENTRY.items():
                if type(entry[key]) is not kind:
                    raise TypeError(f"{key} is a {type(entry[key]).__name__}, expected {kind.__name__}")
        if not isinstance(manifest.get("tokenizer") or {}, dict):
            raise TypeError("tokenizer is not an object")
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: not a manifest of token shards (missing or wrong: {error})") from error
    if not manifest["shards"]:
        raise UserError(f"{where}: lists no shards")
    shards, seen = [], set()
    for name, tokens, dtype in ((entry["name"], entry["tokens"], entry["dtype"]) for entry in manifest["shards"]):
        if not re.fullmatch(r"[\w-][\w .+-]*", name, re.ASCII):
            raise UserError(f"{where}: shard name {name!r} is not a plain file name")
        if name in seen:
            raise UserError(f"{where}: lists {name} twice")
        seen.add(name)
        shard = open_shard(directory / name)
        if (shard.tokens, shard.dtype) != (tokens, dtype):
            found = f"{shard.tokens:,} tokens of {shard.dtype}"
            raise UserError(f"{shard.path}: holds {found}, but {MANIFEST} says {tokens:,} of {dtype}")
        shards.append(shard)
    return shards


def verify_shards(directory) -> int:
    """Compares the sha256 of every shard with the manifest; returns the number of shards. UserError names a bad one."""
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    for shard, entry in zip(open_manifest(directory, manifest), manifest["shards"]):
        if sha256(shard.path) != entry["sha256"]:
            raise UserError(f"{shard.path}: its content is not what {MANIFEST} recorded (sha256 differs)")
    return len(manifest["shards"])


# ---------------------------------------------------------------------------------------
# Order. The shuffle is computed, not stored, by code of this file: no new version of a library changes it.


def mix64(x):
    """A bijection of 64-bit integers in which every input bit reaches every output bit (splitmix64's)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key64(*numbers) -> np.ndarray:
    """One 64-bit key, shape (1,), from several integers. A change of any of them changes about half of its bits."""
    key = np.zeros(1, np.uint64)  # arrays, not scalars: numpy warns when scalars wrap
    for number in numbers:
        key = mix64(key + np.uint64(number % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permutation(index, n, seed, epoch, rounds=8):
    """Where a shuffle of range(n) puts `index` (an integer array in [0, n)), computed in O(1) memory.

    A Feistel network (Luby & Rackoff 1988) permutes the smallest range of 4^h numbers that contains range(n). A result
    outside [0, n) is permuted again until it falls inside (cycle walking, Black & Rogaway 2002): fewer than four passes
    on average.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits in each half
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    keys = [key64(seed, epoch, r) for r in range(rounds)]
    out = np.array(index, dtype=np.uint64)
    walking = np.ones(out.shape, bool)
    while walking.any():
        left, right = out[walking] >> shift, out[walking] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        out[walking] = (left << shift) | right
        walking = out >= n
    return out.astype(np.int64)


# ---------------------------------------------------------------------------------------
# Reading.


def advise(mapping, advice):
    """Tells the kernel how mapped memory is used; no effect where system or file system lack this call."""
    with suppress(AttributeError, OSError):
        mapping.madvise(getattr(mmap, advice))


class FineWebDataset:
    """All shards of a directory as one memory-mapped stream S of N tokens, divided into W windows.

    Window w is x = S[wT : wT+T] and y = the same shifted by one; the last window is padded, with targets IGNORE. So in
    one epoch every token but the last is an input exactly once, and every token but the first a target exactly once.
    """

    def __init__(self, directory, block_size, split="train", valid_vocab_size=None):
        self.shards, self.manifest = find_shards(directory, split)
        self.directory, self.block_size, self.valid_vocab_size = Path(directory), block_size, valid_vocab_size
        self.ends = np.cumsum([s.tokens for s in self.shards], dtype=np.int64)
        self.n_tokens = int(self.ends[-1])
        self.n_windows = -(-(self.n_tokens - 1) // block_size)
        if self.n_tokens < block_size + 1:
            need = f"one window of block_size {block_size} needs {block_size + 1:,}"
            raise UserError(f"{directory}: {self.n_tokens:,} tokens in all, {need}")
        self.maps, self.unreleased = {}, 0
        allow_open_files(512 + len(self.shards))  # a mapped shard is an open file

    def __len__(self):
        return self.n_windows

    def tokens(self, start, stop):
        """S[start:stop] as a new int64 array, read from as many shards as it spans."""
        out = np.empty(stop - start, np.int64)
        at = start
        while at < stop:
            i, offset = self.locate(at)
            part = self.mapped(i)[offset : offset + stop - at]
            out[at - start : at - start + part.size] = part
            at += part.size
        if self.valid_vocab_size is not None and out.max() >= self.valid_vocab_size:
            i, offset = self.locate(start + int(out.argmax()))
            raise UserError(
                f"{self.shards[i].path}: token {out.max()} at offset {offset:,}, but the vocabulary has "
                f"{self.valid_vocab_size:,}; these shards were made with another tokenizer"
            )
        return out

    def mapped(self, i):
        """Shard i's tokens, mapped into memory at first use.

        Pages that were read are released now and then, or resident memory would grow to the size of the data over an
        epoch. UserError where the file has become shorter: reading behind the end of a mapped file kills the process
        without a message."""
        shard = self.shards[i]
        if i not in self.maps:
            if open_shard(shard.path) != shard:  # it may have changed since it was opened
                raise UserError(f"{shard.path}: changed while it was in use; start again")
            with open(shard.path, "rb") as f:
                self.maps[i] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            advise(self.maps[i], "MADV_RANDOM")  # windows are shuffled: what lies ahead is not needed next
        if self.maps[i].size() < shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize:  # the file's size now
            raise UserError(f"{shard.path}: was cut short while it was in use")
        self.unreleased += max(16 * mmap.PAGESIZE, 8 * self.block_size)  # 16: what the kernel maps around one fault
        if self.unreleased > RELEASE_BYTES:
            self.unreleased = 0
            for m in self.maps.values():
                advise(m, "MADV_DONTNEED")
        return np.frombuffer(self.maps[i], shard.dtype, shard.tokens, shard.offset)

    def locate(self, at) -> tuple[int, int]:
        """The shard in which token `at` of the stream lies, and its place there."""
        i = int(np.searchsorted(self.ends, at, side="right"))
        return i, at - (int(self.ends[i]) - self.shards[i].tokens)

    def rows(self, windows):
        """Inputs and targets of the windows (n,): x, y (n, T) int64."""
        T = self.block_size
        x = np.zeros((len(windows), T), np.int64)
        y = np.full((len(windows), T), IGNORE, np.int64)
        for row, w in enumerate(windows):
            s = self.tokens(int(w) * T, min(int(w) * T + T + 1, self.n_tokens))
            x[row, : len(s) - 1], y[row, : len(s) - 1] = s[:-1], s[1:]
        return x, y

    def count_targets(self, windows) -> int:
        """How many targets the windows hold, without reading them: only the last one can be short."""
        last = self.n_windows - 1
        missing = self.n_windows * self.block_size - (self.n_tokens - 1)
        return len(windows) * self.block_size - missing * int(np.count_nonzero(windows == last))

    def fingerprint(self) -> str:
        """Equal for equal tokens: of the manifest's hashes, else of the sizes and both ends of each file."""
        h = hashlib.sha256()
        listed = self.manifest.get("shards")
        for i, shard in enumerate(self.shards):
            if listed:
                h.update(listed[i]["sha256"].encode())
            else:
                ends = np.concatenate((self.mapped(i)[:32768], self.mapped(i)[-32768:]))
                h.update(f"{shard.tokens} {shard.dtype} {zlib.crc32(ends.tobytes())} ".encode())
        return h.hexdigest()


@dataclass
class Batch:
    """The part of one optimizer step's global batch that one rank trains on."""

    samples_seen: int  # before it
    epoch: int  # of its first row
    x: object  # (A, B, T) int64
    y: object  # (A, B, T) int64, IGNORE where there is no target
    n_targets: int  # in the GLOBAL batch: the divisor of the true loss
    checksum: int  # sum over this rank's rows of crc32(tokens, row); the sum over ranks names the batch


class FineWebDataLoader:
    """Global batches by position.

    Row r = m·(world·B) + k·B + b of the global batch goes to micro-step m, rank k, row b. So neither the world size nor
    the accumulation changes which rows form a step."""

    def __init__(self, dataset, batch_size, global_batch, seed=0, shuffle=True, rank=0, world=1):
        if global_batch % (batch_size * world):
            raise ValueError(f"global batch {global_batch} does not divide by {batch_size} rows x {world} ranks")
        self.dataset, self.batch_size, self.global_batch = dataset, batch_size, global_batch
        self.seed, self.shuffle = seed, shuffle
        mine = np.arange(global_batch).reshape(-1, world, batch_size)[:, rank]
        self.mine = mine.reshape(-1)  # this rank's rows of a global batch, in micro-step order

    def windows(self, samples_seen) -> np.ndarray:
        """The windows of the global batch that follows so many samples; it may straddle epochs."""
        g = np.arange(samples_seen, samples_seen + self.global_batch)
        epoch, index = np.divmod(g, self.dataset.n_windows)
        if not self.shuffle:
            return index
        for e in np.unique(epoch):
            index[epoch == e] = permutation(index[epoch == e], self.dataset.n_windows, self.seed, int(e))
        return index

    def batch(self, samples_seen) -> Batch:
        """This rank's rows of the global batch that follows so many samples."""
        windows = self.windows(samples_seen)
        x, y = self.dataset.rows(windows[self.mine])
        checksum = sum(zlib.crc32(row, int(r)) for row, r in zip(x, self.mine))
        shape = (-1, self.batch_size, self.dataset.block_size)
        epoch, n_targets = samples_seen // self.dataset.n_windows, self.dataset.count_targets(windows)
        return Batch(samples_seen, epoch, x.reshape(shape), y.reshape(shape), n_targets, checksum)


class FineWebBatchIterator:
    """Batches from the position `samples_seen` on, epoch after epoch, read ahead in a background thread.

    Yields `Batch` with x and y on `device`. Reading ahead does not move the run's position, which the caller keeps. An
    error in the thread is raised here, at the batch where it happened. Use as a context manager, or call close().
    """

    def __init__(self, loader, samples_seen, device="cpu", prefetch=2):
        self.loader, self.device, self.samples_read = loader, device, samples_seen
        self.thread = ThreadPoolExecutor(1, "read_ahead")
        self.ahead = deque()  # the futures of the next batches
        for _ in range(prefetch):
            self.read_ahead()

    def read_ahead(self):
        self.ahead.append(self.thread.submit(self.load, self.samples_read))
        self.samples_read += self.loader.global_batch

    def load(self, samples_seen):
        import torch  # here, so that preparing data does not wait for it

        batch = self.loader.batch(samples_seen)
        batch.x, batch.y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        if torch.device(self.device).type == "cuda":
            batch.x, batch.y = batch.x.pin_memory(), batch.y.pin_memory()
        return batch

    def __iter__(self):
        return self

    def __next__(self):
        if not self.ahead:  # closed
            raise StopIteration
        try:
            batch = self.ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self.read_ahead()
        # only from pinned memory: on MPS, torch before 2.13 read what was freed meanwhile (pytorch issue 189690)
        batch.x, batch.y = (t.to(self.device, non_blocking=t.is_pinned()) for t in (batch.x, batch.y))
        return batch

    def close(self):
        self.thread.shutdown(cancel_futures=True)
        self.ahead.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def first_windows(dataset, n_tokens, batch_size, rank=0, world=1):
    """For validation: the unshuffled windows that cover the first n_tokens targets, as numpy batches (x, y) of a rank.

    The windows depend on n_tokens and the block size alone. Every rank gets the same number of batches, because ranks
    run each batch together; the last batch may have no rows."""
    n = min(-(-n_tokens // dataset.block_size), dataset.n_windows)
    mine, most = np.arange(rank, n, world), -(-n // world)
    for i in range(0, most, batch_size):
        yield dataset.rows(mine[i : i + batch_size])


def refuse_overlap(train, val):
    """UserError if a shard serves both training and validation."""
    seen = {entry["sha256"] for entry in train.manifest.get("shards", [])} | {s.path.resolve() for s in train.shards}
    for shard, entry in zip(val.shards, val.manifest.get("shards", [{}] * len(val.shards))):
        if shard.path.resolve() in seen or entry.get("sha256") in seen:
            raise UserError(f"{shard.path}: also a training shard; validate on data that is not trained on")


@dataclass(frozen=True)
class VerifyConfig:
    command: str = flag(REQUIRED, "what to do", unit="verify", choices=("verify",), positional=True)
    directory: str = flag(REQUIRED, "folder with manifest.json and its shards", positional=True)


def main(argv=None):
    args = parse(VerifyConfig, argv, __doc__)
    print(f"{args.directory}: {verify_shards(args.directory)} shards, all as recorded in {MANIFEST}")


if __name__ == "__main__":
    sys.exit(run(main))
