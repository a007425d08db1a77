"""Shards and data order, against plain references written here from the description, not from the code.

Each test names the bug it guards. Most data sets count upwards (token i of the stream is i), so
what a row holds says where it was read.
"""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_processing_fineweb as data
from data_processing_fineweb import (
    FineWebBatchIterator,
    FineWebDataLoader,
    FineWebDataset,
    ShardWriter,
    first_windows,
    key64,
    mix64,
    open_shard,
    permutation,
    refuse_overlap,
    verify_shards,
)
from support import files
from support.cli import UserError, run

ROOT = Path(__file__).resolve().parent.parent
IGNORE = -100
bounded = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Speed: nothing here waits for the disk. That files ARE flushed, test_manifest_is_written_last shows."""
    monkeypatch.setattr(files.os, "fsync", lambda fd: None)


# ---------------------------------------------------------------------------------------
# Plain references and helpers.

M64 = 2**64 - 1


def slow_mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


@functools.cache
def slow_key(*numbers):
    key = 0
    for number in numbers:
        key = slow_mix((key + number + 0x9E3779B97F4A7C15) & M64)
    return key


def slow_permute(i, n, seed, epoch):
    """Eight Feistel rounds over the smallest 4^h >= n, repeated until the image is below n; one Python int."""
    h = 1
    while 4**h < n:
        h += 1
    while True:
        left, right = divmod(i, 2**h)
        for r in range(8):
            left, right = right, left ^ (slow_mix(right ^ slow_key(seed, epoch, r)) % 2**h)
        i = left * 2**h + right
        if i < n:
            return i


def slow_order(n, seed, start, count, shuffle=True):
    """Windows number start ... start+count-1 of an endless run."""
    places = [divmod(g, n) for g in range(start, start + count)]
    return [slow_permute(i, n, seed, e) if shuffle else i for e, i in places]


def slow_windows(stream, T):
    """Every (x, y) of one epoch, from the whole stream in memory."""
    out = []
    for at in range(0, len(stream) - 1, T):
        x, y = list(stream[at : at + T]), list(stream[at + 1 : at + T + 1])
        x = x[: len(y)]  # the stream's last token is no input
        out.append((x + [0] * (T - len(x)), y + [IGNORE] * (T - len(y))))
    return out


def save(path, ids, dtype="<u2"):
    """One shard, as other projects write it: numpy's .npy, or llm.c's .bin."""
    ids = np.asarray(ids, dtype)
    if path.suffix == ".npy":
        return np.save(path, ids)
    header = np.zeros(256, "<i4")
    header[:3] = {"<u2": (20240520, 1), "<u4": (20240801, 7)}[dtype] + (len(ids),)
    path.write_bytes(header.tobytes() + ids.tobytes())


def counting(directory, lengths, kinds=(("npy", "<u2"),)):
    """Shards of these lengths, of these kinds in turn, holding 0, 1, 2, ...; returns the stream."""
    at, turn = 0, itertools.cycle(kinds)
    for i, length in enumerate(lengths):
        suffix, dtype = next(turn)
        save(Path(directory) / f"shard_{i}.{suffix}", range(at, at + length), dtype)
        at += length
    return list(range(at))


def written(directory, ids, vocab_size=50257, shard_tokens=40, **facts):
    """Shards with a manifest."""
    writer = ShardWriter(directory, vocab_size, shard_tokens)
    writer.add(ids, 3 * len(ids))
    return writer.close(**facts)


def edit_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip(path):
    """Changes the last token of a shard, keeping the size."""
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def within(seconds, function):
    """function(), failing instead of hanging the suite when it takes longer."""
    outcome = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still busy after {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------
# Order.


def test_golden_mix_and_key():
    """Bug: a refactor, a numpy release or a platform changes the mix, and with it every run's data order."""
    assert int(key64(0)[0]) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0
    inputs = [0, 1, 2, 2**32, 2**63, M64, 0x9E3779B97F4A7C15]
    golden = [
        0,
        0x5692161D100B05E5,
        0xDBD238973A2B148A,
        0xD820B7E910B0F93F,
        0x25C26EA579CEA98A,
        0xB4D055FCF2CBBD7B,
        0xE220A8397B1DCDAF,
    ]
    assert [int(v) for v in mix64(np.array(inputs, np.uint64))] == golden == [slow_mix(x) for x in inputs]
    keys = [(1337,), (1337, 0), (0, 1337), (1337, 1, 7), (2**64 - 1,), (2**63, 2**40, 3)]
    golden = [
        0xB6A8A9B313CAA00B,
        0x317D308973B9C082,
        0xCDFB6D10C87478EC,
        0xB4AB03D3D5527EE5,
        0xE4D971771B652C20,
        0x931052DE9521AA3F,
    ]
    assert [int(key64(*k)[0]) for k in keys] == golden == [slow_key(*k) for k in keys]
    assert key64(-1) == key64(2**64 - 1)


GOLDEN_PERMUTATIONS = {  # (n, seed, epoch): images of 0, 1, 2, ...
    (10, 1337, 0): [5, 8, 2, 7, 6, 4, 9, 0],
    (10, 1337, 1): [0, 6, 9, 1, 3, 7, 8, 4],
    (1000, 0, 0): [909, 669, 776, 300, 41, 160, 345, 183],
    (9765625, 1337, 3): [2285218, 9385811, 3715635, 6644360, 7303588, 7178393, 1356579, 309350],
    (2**33 + 1, 2**63, 10**6): [1080940658, 128103597, 6699180600, 4032966274, 1748305677, 2458608317],
}


@pytest.mark.parametrize("case", GOLDEN_PERMUTATIONS)
def test_golden_permutation(case):
    """Bug: the order of a run in progress changes under a new version of the code or of numpy."""
    n, seed, epoch = case
    golden = GOLDEN_PERMUTATIONS[case]
    found = permutation(np.arange(len(golden)), n, seed, epoch)
    assert found.tolist() == golden == [slow_permute(i, n, seed, epoch) for i in range(len(golden))]
    assert found.dtype == np.int64


def test_golden_loader(tmp_path):
    """Bug: windows, rows, epochs or checksums come out differently after a refactor, so a resumed run repeats data."""
    counting(tmp_path, (400, 1, 599))
    loader = FineWebDataLoader(FineWebDataset(tmp_path, 7), 4, 8, seed=1337)
    assert loader.dataset.n_windows == 143
    golden = {
        0: [10, 64, 28, 63, 100, 80, 115, 71],
        8: [66, 1, 88, 89, 12, 52, 4, 65],
        136: [106, 92, 142, 27, 123, 29, 68, 86],  # seven of epoch 0, one of epoch 1
        1430000: [76, 1, 132, 92, 86, 90, 98, 26],  # epoch 10,000
    }
    for start, windows in golden.items():
        assert loader.windows(start).tolist() == windows == slow_order(143, 1337, start, 8)
    batch = loader.batch(136)
    assert batch.x[0, :, 0].tolist() == [7 * w for w in golden[136][:4]]
    assert (batch.samples_seen, batch.epoch, batch.n_targets, batch.checksum) == (136, 0, 54, 16249028102)
    assert loader.batch(1430000).epoch == 10000


@bounded
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_token_once_per_epoch(lengths, T, seed, rows, shuffle):
    """Bugs: tokens dropped at the end of a shard, a batch or an epoch; x and y off by one at a shard's border;
    windows read twice; padding anywhere but in the last window."""
    lengths[-1] += max(0, T + 1 - sum(lengths))
    with tempfile.TemporaryDirectory() as directory:
        stream = counting(directory, lengths, [("npy", "<u2"), ("bin", "<u4"), ("npy", "<u4"), ("bin", "<u2")])
        dataset = FineWebDataset(directory, T)
        reference = slow_windows(stream, T)
        W = len(reference)
        assert (dataset.n_tokens, len(dataset), dataset.n_windows) == (len(stream), W, W)
        loader = FineWebDataLoader(dataset, rows, 2 * rows, seed=seed, shuffle=shuffle)
        batches = [loader.batch(start) for start in range(0, 3 * W, 2 * rows)]
    x = np.concatenate([b.x.reshape(-1, T) for b in batches])[: 3 * W]
    y = np.concatenate([b.y.reshape(-1, T) for b in batches])[: 3 * W]
    assert x.dtype == y.dtype == np.int64
    for epoch in range(3):
        ex, ey = x[epoch * W : epoch * W + W], y[epoch * W : epoch * W + W]
        real = ey != IGNORE
        assert sorted(ex[real].tolist()) == stream[:-1]  # every token but the last an input once
        assert sorted(ey[real].tolist()) == stream[1:]  # every token but the first a target once
        assert (ey[real] == ex[real] + 1).all()
        order = slow_order(W, seed, epoch * W, W, shuffle)
        assert [(a.tolist(), b.tolist()) for a, b in zip(ex, ey)] == [reference[w] for w in order]
        padded = np.flatnonzero((~real).any(axis=1))
        assert [order[i] for i in padded] == ([W - 1] if (len(stream) - 1) % T else [])


def test_permutation_is_a_bijection():
    """Bug: a window repeated or never read, at sizes just above or below the powers of four."""
    for n in range(1, 301):
        found = permutation(np.arange(n), n, seed=n, epoch=n % 3)
        assert np.array_equal(np.sort(found), np.arange(n)), n


@pytest.mark.parametrize("n", [4**8 - 1, 4**8, 4**8 + 1, 9765625, 10**12 + 39, 2**61 + 1])
def test_big_permutation_keeps_distinct_windows_distinct(n):
    """Bug: overflow in the shifts or masks for a large n maps two windows to one, or outside the data."""
    edges = [np.arange(k, k + 4000) for k in (0, n // 2, n - 4000)]
    found = permutation(np.concatenate(edges), n, 5, 6)
    assert len(np.unique(found)) == 12000 and found.min() >= 0 and found.max() < n
    assert int(found[7]) == slow_permute(7, n, 5, 6)
    assert int(found[-1]) == slow_permute(n - 1, n, 5, 6)


def test_small_permutations_in_full():
    """Bug: a size without an order (n = 1), or an input array that is changed in place."""
    assert permutation(np.array([0]), 1, 3, 4).tolist() == [0]
    index = np.arange(50)
    assert permutation(index, 50, 3, 4).tolist() == [slow_permute(i, 50, 3, 4) for i in range(50)]
    assert index.tolist() == list(range(50))
    assert permutation(index[::-1], 50, 3, 4).tolist() == permutation(index, 50, 3, 4)[::-1].tolist()


def test_epochs_and_seeds_differ():
    """Bug: `seed + epoch`, so epoch 1 of seed 0 is epoch 0 of seed 1; or seed and epoch exchanged."""
    seeds = [0, 1, 2, 3, 4, 5, 1337, 1338, 2**32, 2**40]
    orders = {tuple(permutation(np.arange(64), 64, s, e).tolist()) for s in seeds for e in range(6)}
    assert len(orders) == len(seeds) * 6
    assert tuple(range(64)) not in orders


@pytest.mark.parametrize("n", [10, 16, 23])
def test_shuffle_is_even(n):
    """Bug: too few rounds or a weak mix, so that some windows come first more often than others."""
    trials = 900
    orders = np.array([permutation(np.arange(n), n, s, e) for s in range(30) for e in range(trials // 30)])
    for position in range(n):
        counts = np.bincount(orders[:, position], minlength=n)
        chi2 = ((counts - trials / n) ** 2).sum() / (trials / n)
        df = n - 1
        assert df - 3.2 * (2 * df) ** 0.5 < chi2 < df + 5.5 * (2 * df) ** 0.5, (position, chi2)
    neighbours = (np.diff(orders, axis=1) == 1).sum() / trials  # expected (n-1)/n pairs in order per shuffle
    assert 0.85 < neighbours / ((n - 1) / n) < 1.15


# ---------------------------------------------------------------------------------------
# The same steps on any machine.


@pytest.mark.parametrize("n_tokens", [61 * 5 + 3, 10 * 5 - 2, 6])  # straddling; smaller than a batch; one window
@pytest.mark.parametrize("shuffle", [True, False])
def test_same_global_batches_for_every_world_and_accumulation(tmp_path, n_tokens, shuffle):
    """Bugs: the number of devices or the micro-batch changes which sequences form a step, or their order;
    n_targets counts one rank, or forgets the padding, or counts it once where epochs are straddled."""
    T, G = 5, 24
    dataset = FineWebDataset(write_one(tmp_path, n_tokens), T)
    reference = slow_windows(range(n_tokens), T)
    W = len(reference)
    for start in (0, 24, 48, 5 * W - 7):
        order = slow_order(W, 9, start, G, shuffle)
        rows = [reference[w] for w in order]
        targets = sum(t != IGNORE for _, y in rows for t in y)
        checksum = sum(zlib.crc32(np.array(x, "<i8").tobytes(), r) for r, (x, _) in enumerate(rows))
        for world, A in itertools.product((1, 2, 3, 4, 6), (1, 2)):
            B = G // (world * A)
            found, sums = [None] * G, []
            for k in range(world):
                batch = FineWebDataLoader(dataset, B, G, 9, shuffle, rank=k, world=world).batch(start)
                assert batch.x.shape == batch.y.shape == (A, B, T)
                assert (batch.samples_seen, batch.epoch, batch.n_targets) == (start, start // W, targets)
                sums.append(batch.checksum)
                for m, b in itertools.product(range(A), range(B)):
                    found[m * world * B + k * B + b] = (batch.x[m, b].tolist(), batch.y[m, b].tolist())
            assert found == rows
            assert sum(sums) == checksum


def write_one(directory, n_tokens):
    counting(directory, [n_tokens])
    return directory


def test_more_shards_than_files_may_be_open(tmp_path):
    """Bug: a mapped shard keeps its file open; beyond 256 of them, a Mac's limit, training ended with an OSError."""
    resource = pytest.importorskip("resource")
    counting(tmp_path, [20] * 200)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        dataset = FineWebDataset(tmp_path, 5)
        assert dataset.tokens(0, dataset.n_tokens).tolist() == list(range(dataset.n_tokens))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_checksum_tells_batches_apart(tmp_path):
    """Bug: a checksum blind to the order of rows, so a wrong order on another world size goes unnoticed."""
    dataset = FineWebDataset(write_one(tmp_path, 300), 5)
    sums = {FineWebDataLoader(dataset, 4, 4, seed=s).batch(4 * i).checksum for s in range(4) for i in range(10)}
    assert len(sums) == 40
    loader = FineWebDataLoader(dataset, 2, 2, shuffle=False)
    windows = loader.windows(0)
    loader.windows = lambda start: windows[::-1]
    assert loader.batch(0).checksum != FineWebDataLoader(dataset, 2, 2, shuffle=False).batch(0).checksum


def test_global_batch_must_divide(tmp_path):
    """Bug: rows silently dropped where the global batch is no multiple of rows x ranks."""
    dataset = FineWebDataset(write_one(tmp_path, 100), 5)
    for total, rows, world in ((10, 4, 1), (8, 4, 3), (12, 3, 3), (2, 4, 1)):
        with pytest.raises(ValueError, match=f"{total} .*{rows} rows x {world} ranks"):
            FineWebDataLoader(dataset, rows, total, world=world)


@bounded
@given(st.integers(0, 500), st.integers(1, 30), st.integers(0, 99), st.booleans())
def test_seek_is_reading_up_to_it(position, size, seed, shuffle):
    """Bug: a loader with hidden state, so a resumed run sees other data than the one that was not stopped."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = FineWebDataset(write_one(directory, 200), 9)  # 23 windows: positions reach epoch 21
        one = FineWebDataLoader(dataset, 1, 1, seed, shuffle)
        read = np.concatenate([one.windows(g) for g in range(position, position + size)])
        loader = FineWebDataLoader(dataset, 1, size, seed, shuffle)
        loader.batch(0), loader.batch(31 * size)  # reading elsewhere first moves nothing
        batch = loader.batch(position)
        assert loader.windows(position).tolist() == read.tolist()
        assert batch.x[:, 0, 0].tolist() == [9 * w for w in read]


@bounded
@given(st.lists(st.integers(1, 12), min_size=1, max_size=15), st.integers(0, 99))
def test_changing_the_global_batch_loses_nothing(sizes, seed):
    """Bug: a position counted in steps or batches, so a run that resumes with another batch size skips or repeats."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = FineWebDataset(write_one(directory, 150), 7)
        at, seen = 0, []
        for size in sizes:
            seen += (FineWebDataLoader(dataset, 1, size, seed).batch(at).x[:, 0, 0] // 7).tolist()
            at += size
    assert seen == slow_order(22, seed, 0, sum(sizes))


# ---------------------------------------------------------------------------------------
# Reading ahead.


def plain(batch):
    return (batch.samples_seen, batch.epoch, batch.n_targets, batch.checksum, batch.x.tolist(), batch.y.tolist())


def reading_ahead() -> bool:
    """Whether a thread of an iterator is there."""
    return any(thread.name.startswith("read_ahead") for thread in threading.enumerate())


def toy_loader(directory, **keywords):
    counting(directory, [100, 1, 3, 97])
    return FineWebDataLoader(FineWebDataset(directory, 8), 2, 4, seed=3, **keywords)


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_iterator_resumes_where_the_consumer_was(tmp_path, prefetch):
    """Bug: batches that were read ahead but never used are lost at a resume (or used ones come again)."""
    loader = toy_loader(tmp_path)
    direct = [plain(loader.batch(start)) for start in range(0, 80, 4)]  # 25 windows: three epochs
    with FineWebBatchIterator(loader, 0, prefetch=prefetch) as stream:
        whole = [plain(batch) for batch in itertools.islice(stream, 20)]
    assert whole == direct
    for used in (0, 1, 9):
        with FineWebBatchIterator(loader, 0, prefetch=prefetch) as stream:
            head = [plain(next(stream)) for _ in range(used)]
            until(lambda stream=stream: all(future.done() for future in stream.ahead))  # read ahead, and thrown away
        with FineWebBatchIterator(loader, 4 * used, prefetch=prefetch) as stream:
            tail = [plain(next(stream)) for _ in range(20 - used)]
        assert head + tail == direct


def test_iterator_yields_tensors(tmp_path):
    """Bug: the model is handed numpy arrays, or int32, or a batch on another device."""
    with FineWebBatchIterator(toy_loader(tmp_path), 0, device="cpu") as stream:
        assert iter(stream) is stream
        batch = next(stream)
    assert batch.x.dtype == batch.y.dtype == torch.int64
    assert batch.x.device == batch.y.device == torch.device("cpu") and batch.x.shape == (2, 2, 8)


def test_error_while_reading_reaches_the_consumer(tmp_path):
    """Bug: an exception in the thread ends it silently and training waits for ever; or it comes too early."""
    loader = toy_loader(tmp_path)
    original, read = RuntimeError("disk on fire"), loader.batch

    def batch(start):
        if start == 12:
            raise original
        return read(start)

    loader.batch = batch
    stream = FineWebBatchIterator(loader, 0)
    assert [within(30, lambda: next(stream)).samples_seen for _ in range(3)] == [0, 4, 8]
    with pytest.raises(RuntimeError) as caught:
        within(30, lambda: next(stream))
    assert caught.value is original
    assert not reading_ahead()
    within(30, stream.close)


@pytest.mark.parametrize("error", [SystemExit("stop"), MemoryError("full"), KeyboardInterrupt()])
def test_no_kind_of_error_is_swallowed(tmp_path, error):
    """Bug: `except Exception` in the thread: what is not an Exception ends it, and the consumer hangs."""
    loader = toy_loader(tmp_path)

    def batch(start):
        raise error

    loader.batch = batch
    stream = FineWebBatchIterator(loader, 0)
    with pytest.raises(type(error)) as caught:
        within(30, lambda: next(stream))
    assert caught.value is error


def test_deleted_shard_is_named_by_the_iterator(tmp_path):
    """Bug: a shard that vanishes during the run hangs training, or the error does not say which it was."""
    loader = toy_loader(tmp_path)
    loader.shuffle = False
    (tmp_path / "shard_3.npy").unlink()
    stream = FineWebBatchIterator(loader, 0)
    assert [within(30, lambda: next(stream)).samples_seen for _ in range(3)] == [0, 4, 8]
    with pytest.raises((OSError, UserError), match=r"shard_3\.npy"):
        within(30, lambda: next(stream))
    assert not reading_ahead()


@pytest.mark.parametrize("size", [0, 200])
def test_shard_shortened_after_opening_is_named(tmp_path, size):
    """Bug: a shard replaced by a shorter one during the run gives numpy's or mmap's error, without a name."""
    loader = toy_loader(tmp_path)
    os.truncate(tmp_path / "shard_0.npy", size)
    stream = FineWebBatchIterator(loader, 0)
    with pytest.raises(Exception, match=r"shard_0\.npy"):
        within(30, lambda: next(stream))
    assert not reading_ahead()


def test_bad_token_stops_the_iterator(tmp_path):
    """Bug: a token outside the vocabulary found in the thread is lost, and reaches the device as a bare assert."""
    counting(tmp_path, [100])
    loader = FineWebDataLoader(FineWebDataset(tmp_path, 8, valid_vocab_size=50), 2, 2, shuffle=False)
    stream = FineWebBatchIterator(loader, 0)
    assert [within(30, lambda: next(stream)).samples_seen for _ in range(3)] == [0, 2, 4]
    with pytest.raises(UserError, match=r"token 5[0-9] at offset"):
        within(30, lambda: next(stream))


def test_after_the_error_or_the_end_the_iterator_does_not_hang(tmp_path):
    """Bug: next() after an error, or after close(), waits for a thread that is gone."""
    loader = toy_loader(tmp_path)

    def batch(start):
        raise RuntimeError("disk on fire")

    loader.batch = batch
    failed = FineWebBatchIterator(loader, 0)
    for _ in range(3):
        with pytest.raises((RuntimeError, StopIteration)):
            within(10, lambda: next(failed))
    closed = FineWebBatchIterator(toy_loader(tmp_path), 0)
    closed.close()
    with pytest.raises((RuntimeError, ValueError, StopIteration)):
        within(30, lambda: [next(closed) for _ in range(9)])


@pytest.mark.parametrize("prefetch", [1, 3])
def test_close_ends_the_thread(tmp_path, prefetch):
    """Bug: close() waits for ever for a thread that waits for its consumer; or leaves the thread behind."""
    before = threading.active_count()
    stream = FineWebBatchIterator(toy_loader(tmp_path), 0, prefetch=prefetch)
    until(lambda: all(future.done() for future in stream.ahead))
    within(30, stream.close)
    assert not reading_ahead()
    within(30, stream.close)  # twice is no error
    assert threading.active_count() <= before


def test_leaving_the_with_block_ends_the_thread(tmp_path):
    """Bug: an exception in the training loop leaves the reading thread running."""
    with pytest.raises(ZeroDivisionError), FineWebBatchIterator(toy_loader(tmp_path), 0):
        raise ZeroDivisionError
    assert not reading_ahead()


# ---------------------------------------------------------------------------------------
# Size: 10B tokens open and seek like 10M, and memory stays flat.


def bytes_read():
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(io["rchar"])


def test_ten_billion_tokens_open_and_seek_at_once(tmp_path):
    """Bugs: opening reads the data, or builds an index or a shuffle of it; seeking replays what came before."""
    each, T = 100_000_000, 1024
    shape = {"descr": "<u2", "fortran_order": False, "shape": (each,)}
    for i in range(100):
        with open(tmp_path / f"shard_{i}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, shape)
            offset = f.tell()
            f.truncate(offset + 2 * each)  # sparse: sizes only
            if i == 43:
                f.write(np.arange(1, 3001, dtype="<u2"))
            if i == 42:
                f.seek(-4, os.SEEK_END)
                f.write(np.array([7001, 7002], "<u2"))
    proc = os.access("/proc/self/io", os.R_OK)
    read = bytes_read() if proc else 0
    start = time.process_time()
    dataset = FineWebDataset(tmp_path, T)
    shuffled = FineWebDataLoader(dataset, 8, 64, seed=1)
    assert dataset.n_tokens == 10**10 and dataset.n_windows == -(-(10**10 - 1) // T) == 9765625
    assert not dataset.maps  # no data touched yet
    batch = shuffled.batch(7 * dataset.n_windows + 5_000_001)
    assert batch.epoch == 7 and batch.x.shape == (8, 8, T)
    assert len(dataset.maps) <= 2 * 64
    border = 43 * each // T
    ordered = FineWebDataLoader(FineWebDataset(tmp_path, T), 1, 1, shuffle=False)
    row = ordered.batch(3 * dataset.n_windows + border).x.reshape(-1)
    assert len(ordered.dataset.maps) == 2
    assert row[43 * each % T - 2 :][:6].tolist() == [7001, 7002, 1, 2, 3, 4]
    assert time.process_time() - start < 2
    if proc:
        assert bytes_read() - read < 8_000_000  # 2 x 100 headers, of 20 GB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_epochs(tmp_path):
    """Bug: mapped pages stay resident, so memory grows to the size of the data over an epoch."""
    tokens = 100_000_000  # 200 MB: one shard of the default size
    with open(tmp_path / "shard.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
        f.truncate(f.tell() + 2 * tokens)
    script = """
import os, sys
import numpy as np
from data_processing_fineweb import FineWebDataset, permutation
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
dataset = FineWebDataset(sys.argv[1], 16384)
base = peak = resident()
for epoch in range(3):
    order = permutation(np.arange(dataset.n_windows), dataset.n_windows, 0, epoch)
    for window in order:
        dataset.rows([window])
        peak = max(peak, resident())
print((peak - base) // 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 130, f"grew by {done.stdout} MiB while reading 190 MiB three times"


# ---------------------------------------------------------------------------------------
# Shards of other projects.


@pytest.mark.parametrize(
    "name, kind", [("edufineweb_{}_{:06d}.npy", "<u2"), ("fineweb_{}_{:06d}.bin", "<u2"), ("fineweb_{}_{}.bin", "<u4")]
)
def test_shards_of_other_projects_are_read_as_they_are(tmp_path, name, kind):
    """Bugs: build-nanogpt's and llm.c's folders refused, their validation shard trained on, a header read as tokens; a
    hidden file of the system taken for a shard."""
    top = 100_000 if kind == "<u4" else 0
    save(tmp_path / name.format("val", 0), range(top + 500, top + 540), kind)
    save(tmp_path / name.format("train", 1), range(top, top + 30), kind)
    save(tmp_path / name.format("train", 2), range(top + 30, top + 61), kind)
    (tmp_path / "README.txt").write_text("not a shard")
    (tmp_path / f"._{name.format('train', 1)}").write_text("not a shard either")
    for split, stream in (("train", range(top, top + 61)), ("val", range(top + 500, top + 540))):
        dataset = FineWebDataset(tmp_path, 8, split=split)
        assert dataset.manifest == {} and dataset.n_tokens == len(stream)
        x, y = dataset.rows(np.arange(len(dataset)))
        assert list(zip(x.tolist(), y.tolist())) == slow_windows(stream, 8)
        assert all(split in shard.path.name for shard in dataset.shards)
    refuse_overlap(FineWebDataset(tmp_path, 8), FineWebDataset(tmp_path, 8, split="val"))


def test_missing_split_is_said(tmp_path):
    """Bug: a folder without validation shards gives its training shards for validation."""
    save(tmp_path / "edufineweb_train_000001.npy", range(50))
    with pytest.raises(UserError, match=r"val .*edufineweb_train_000001\.npy.*prepare_fineweb"):
        FineWebDataset(tmp_path, 8, split="val")


def test_shards_in_natural_order(tmp_path):
    """Bug: shard_10 read before shard_2."""
    for i in (10, 2, 1, 11, 9, 100):
        save(tmp_path / f"shard_{i}.npy", [i] * 3)
    assert FineWebDataset(tmp_path, 4).tokens(0, 18)[::3].tolist() == [1, 2, 9, 10, 11, 100]


def test_order_of_shards_does_not_come_from_the_disk(tmp_path, monkeypatch):
    """Bug: names that sort as equal (shard_1, shard_01) come in the file system's order, another on each machine."""
    for name in ("shard_1", "shard_01", "shard_001", "shard_2"):
        save(tmp_path / f"{name}.npy", range(9))
    listed = sorted(tmp_path.iterdir())
    orders = set()
    for names in itertools.permutations(listed):
        monkeypatch.setattr(Path, "iterdir", lambda self, names=names: iter(names))
        orders.add(tuple(s.path.name for s in FineWebDataset(tmp_path, 4).shards))
    assert len(orders) == 1


# ---------------------------------------------------------------------------------------
# Bad shards.


class Payload:
    """What a pickle can do: run anything when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def header(text, ids=b"\1\0\2\0", version=1):
    text = text.encode("latin1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + ids


def fields(shape, descr="'<u2'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def llmc(magic, version, count, size):
    raw = np.array([magic, version, count] + [0] * 253, "<i4").tobytes() + bytes(max(0, size - 1024))
    return raw[:size]


def npz(path):
    with open(path, "wb") as f:
        np.savez(f, a=np.arange(9, dtype="<u2"))


def array(value):
    return lambda path: np.save(path, value)


GOOD = header(fields("(2,)"))
U2 = np.arange(12, dtype="<u2")
BAD_SHARDS = {  # name: what is written (bytes, or a function of the path), what the message must say
    "zero bytes": (b"", "0 bytes, expected .*uint16 or uint32"),
    "cut in the magic": (GOOD[:4], "no .npy header"),
    "cut in the length": (GOOD[:9], "header is damaged"),
    "cut in the header": (GOOD[:40], "header is damaged"),
    "cut in the data": (GOOD[:-1], r"71 bytes, but its header announces 2 tokens \(72 bytes\)"),
    "no data": (GOOD[:-4], r"68 bytes, but its header announces 2 tokens \(72 bytes\)"),
    "trailing bytes": (GOOD + b"\0", r"73 bytes, but its header announces 2 tokens \(72 bytes\)"),
    "raw tokens": (U2.tobytes(), "no .npy header .*numpy.save"),
    "raw zeros": (bytes(4096), "no .npy header .*numpy.save"),
    "npz": (npz, "zip archive"),
    "float": (array(np.zeros(9)), "float64.*expected little-endian uint16 or uint32"),
    "int64": (array(np.arange(9)), "int64.*expected little-endian uint16 or uint32"),
    "int16": (array(np.arange(9, dtype="<i2")), "int16.*expected little-endian uint16 or uint32"),
    "uint8": (array(np.arange(9, dtype="u1")), "uint8.*expected little-endian uint16 or uint32"),
    "uint64": (array(np.arange(9, dtype="<u8")), "uint64.*expected little-endian uint16 or uint32"),
    "bool": (array(np.zeros(9, bool)), "bool.*expected little-endian uint16 or uint32"),
    "text": (array(np.array(["a", "b"])), "U1.*expected little-endian uint16 or uint32"),
    "records": (array(np.zeros(3, [("a", "<u2")])), "expected little-endian uint16 or uint32"),
    "big-endian": (array(U2.astype(">u2")), ">u2.*expected little-endian uint16 or uint32"),
    "2-D": (array(U2.reshape(3, 4)), r"2-D array of shape \(3, 4\), expected one dimension"),
    "0-D": (array(U2[3]), r"0-D array of shape \(\), expected one dimension"),
    "empty array": (array(U2[:0]), "no token"),
    "unknown version": (header(fields("(2,)"), version=9), r"version \(9, 0\), expected"),
    "huge shape": (header(fields("(10000000000,)")), "announces 10,000,000,000 tokens"),
    "beyond 64 bits": (header(fields(f"({10**25},)")), "no file holds"),
    "a number of 4300 digits": (header(fields(f"({'9' * 4300},)")), "announces|damaged"),
    "negative shape": (header(fields("(-2,)")), "no file holds"),
    "shape of text": (header(fields("('a',)")), "header is damaged"),
    "long header": (header(fields("(2,)") + " " * 60000), "header is damaged"),
    "very long header": (header(fields("(2,)") + " " * 3_000_000, version=2), "header is damaged"),
    "header length of 4 GB": (header("", version=2)[:8] + b"\xff" * 4 + b"{", "header is damaged"),
    "expression": (header("__import__('pathlib').Path('TRACE').touch()"), "header is damaged"),
    "expression as shape": (header(fields("(len('ab'),)")), "header is damaged"),
    "nested too deeply": (header("-" * 9000 + "1"), "header is damaged"),
    "brackets": (header("(" * 9000), "header is damaged"),
    "zeros as header": (header("\0" * 64), "header is damaged"),
    "list as header": (header("[]"), "header is damaged"),
    "no keys": (header("{}"), "header is damaged"),
    "sub-array type": (header(fields("(2,)", "('<u2', (1,))")), "expected little-endian uint16 or uint32"),
}
BAD_BINS = {
    "zero bytes": (b"", "0 bytes"),
    "raw tokens": (bytes(range(1, 65)) * 40, r"magic 67305985, version 134678021; expected .*20240520, 1.*numpy.save"),
    "other version": (llmc(20240520, 2, 8, 1040), "magic 20240520, version 2; expected"),
    "big-endian header": (np.array([20240520, 1, 8], ">i4").tobytes() + bytes(1028), "expected .*20240520"),
    "cut in the header": (llmc(20240520, 1, 8, 600), r"600 bytes, but its header announces 8 tokens \(1,040 bytes\)"),
    "cut in the magic": (llmc(20240520, 1, 8, 6), r"6 bytes|expected"),
    "cut in the data": (llmc(20240520, 1, 8, 1039), r"1,039 bytes, but its header announces 8 tokens \(1,040 bytes\)"),
    "trailing bytes": (llmc(20240520, 1, 8, 1041), r"1,041 bytes, but its header announces 8 tokens"),
    "uint32 header, uint16 data": (llmc(20240801, 7, 8, 1040), r"announces 8 tokens \(1,056 bytes\)"),
    "no token": (llmc(20240520, 1, 0, 1024), "no token"),
    "negative count": (
        llmc(20240520, 1, -506, 12),
        "no file holds",
    ),  # 1,024 - 2 x 506 = 12: the size agrees
    "negative count, one": (llmc(20240520, 1, -1, 1022), "no file holds"),
}


@pytest.mark.parametrize(
    "suffix, what", [*(("npy", what) for what in BAD_SHARDS), *(("bin", what) for what in BAD_BINS)]
)
def test_bad_shard_is_refused_by_name(tmp_path, suffix, what, monkeypatch):
    """Bugs: numpy takes most of these silently as tokens; its advice for the rest is allow_pickle; a hostile header
    costs memory, runs code, or ends in a traceback of numpy's parser."""
    monkeypatch.chdir(tmp_path)
    content, message = (BAD_SHARDS if suffix == "npy" else BAD_BINS)[what]
    path = tmp_path / f"shard_7.{suffix}"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    save(tmp_path / "shard_6.npy", range(50))  # a good one beside it hides nothing
    start = time.process_time()
    for opened in (lambda: open_shard(path), lambda: FineWebDataset(tmp_path, 4)):
        with pytest.raises(UserError, match=message) as caught, warnings.catch_warnings():
            warnings.simplefilter("error")
            opened()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        said = str(caught.value).replace(str(tmp_path), "")
        assert "pickle" not in said and len(said) < 400
    assert time.process_time() - start < 2
    assert not Path("TRACE").exists()


def test_good_headers_are_accepted(tmp_path):
    """Bug: the checks above refuse good files too (then each of them proves nothing)."""
    for content in (GOOD, header(fields("(2,)"), version=2), header(fields("(1,)", "'<u4'"))):
        (tmp_path / "a.npy").write_bytes(content)
        shard = open_shard(tmp_path / "a.npy")
        assert (shard.tokens * int(shard.dtype[2:]), len(content) - shard.offset) == (4, 4)
    (tmp_path / "a.bin").write_bytes(llmc(20240520, 1, 8, 1040))
    assert open_shard(tmp_path / "a.bin") == data.Shard(tmp_path / "a.bin", 8, "<u2", 1024)
    (tmp_path / "a.bin").write_bytes(llmc(20240801, 7, 8, 1056))
    assert open_shard(tmp_path / "a.bin") == data.Shard(tmp_path / "a.bin", 8, "<u4", 1024)


def test_pickle_in_a_shard_is_not_run(tmp_path):
    """Bug: an object array is unpickled, and its payload runs."""
    trace = tmp_path / "payload_ran"
    bad = np.empty(3, object)
    bad[:] = Payload(trace)
    np.save(tmp_path / "shard_0.npy", bad, allow_pickle=True)
    for opened in (lambda: open_shard(tmp_path / "shard_0.npy"), lambda: FineWebDataset(tmp_path, 1)):
        with pytest.raises(UserError, match=r"shard_0\.npy: found an array of object") as caught:
            opened()
        assert "pickle" not in str(caught.value).replace(str(tmp_path), "")
    assert not trace.exists()
    np.load(tmp_path / "shard_0.npy", allow_pickle=True)
    assert trace.exists()  # the payload was a live one


def test_unreadable_shard(tmp_path):
    """Bug: a bare OSError where the person can mend it."""
    with pytest.raises(UserError, match=r"shard_0\.npy: cannot be read \(No such file"):
        open_shard(tmp_path / "shard_0.npy")
    (tmp_path / "shard_1.npy").mkdir()
    with pytest.raises(UserError, match=r"shard_1\.npy: cannot be read \(Is a directory"):
        open_shard(tmp_path / "shard_1.npy")


def test_directory_missing_empty_or_a_file(tmp_path):
    """Bug: a message that does not say what was looked for, what is there and how to make it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    cases = {
        "absent": "does not exist",
        "file": "is a file",
        "empty": "neither manifest.json nor train .*nothing",
        "other": "neither manifest.json nor train .*notes.txt",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            FineWebDataset(tmp_path / name, 4)
        assert str(tmp_path / name) in str(caught.value)
        assert "prepare_fineweb.py" in str(caught.value) and "--data_dir" in str(caught.value)


@pytest.mark.parametrize("n_tokens, T", [(8, 8), (1, 1), (5, 1000)])
def test_too_few_tokens_for_a_window(tmp_path, n_tokens, T):
    """Bug: no batch at all, or a batch of padding only, instead of the two numbers that disagree."""
    counting(tmp_path, [n_tokens])
    with pytest.raises(UserError, match=f"{n_tokens:,} tokens in all.*block_size {T} needs {T + 1:,}"):
        FineWebDataset(tmp_path, T)


def test_one_window_is_enough(tmp_path):
    """Bug: the check above is off by one."""
    counting(tmp_path, [8, 1])
    x, y = FineWebDataset(tmp_path, 8).rows([0])
    assert (x.tolist(), y.tolist()) == ([list(range(8))], [list(range(1, 9))])


@pytest.mark.parametrize("at, shard, offset", [(0, 0, 0), (9, 0, 9), (10, 1, 0), (11, 2, 0), (29, 2, 18)])
def test_token_outside_the_vocabulary(tmp_path, at, shard, offset):
    """Bug: such a token reaches the embedding, and the device reports a bare assert with no file and no place."""
    stream = [50256] * 30
    stream[at] = 50257
    for i, (a, b) in enumerate([(0, 10), (10, 11), (11, 30)]):
        save(tmp_path / f"shard_{i}.npy", stream[a:b])
    dataset = FineWebDataset(tmp_path, 29, valid_vocab_size=50257)
    with pytest.raises(UserError, match=rf"shard_{shard}\.npy: token 50257 at offset {offset}, .*50,257"):
        dataset.rows([0])
    FineWebDataset(tmp_path, 29, valid_vocab_size=50258).rows([0])


# ---------------------------------------------------------------------------------------
# The manifest.

ENTRY = {"name": "shard_000000.npy", "tokens": 40, "dtype": "<u2", "text_bytes": 1, "sha256": "0" * 64}
BAD_MANIFESTS = {  # name: text of manifest.json, what the message must say
    "empty": ("", "not JSON"),
    "cut": ('{"format_version": 1, "sha', "not JSON"),
    "not UTF-8": (b'{"a": "\xff\xfe\xfa"}', "not JSON"),
    "list": ("[]", "JSON list, expected an object"),
    "nested": ("[" * 100_000, "not JSON"),
    "no version": ({"shards": [ENTRY]}, "format_version"),
    "wrong version": ({"format_version": 2, "shards": [ENTRY]}, "version 2, expected 1"),
    "no shards": ({"format_version": 1}, "missing or wrong: 'shards'"),
    "shards null": ({"format_version": 1, "shards": None}, "missing or wrong"),
    "shards a number": ({"format_version": 1, "shards": 3}, "missing or wrong"),
    "shards an object": ({"format_version": 1, "shards": ENTRY}, "missing or wrong"),
    "lists none": ({"format_version": 1, "shards": []}, "lists no shards"),
    "shard not an object": ({"format_version": 1, "shards": ["shard_000000.npy"]}, "missing or wrong"),
    "tokens not a number": ({"format_version": 1, "shards": [ENTRY | {"tokens": "many"}]}, "missing or wrong"),
    "tokens infinite": ({"format_version": 1, "shards": [ENTRY | {"tokens": float("inf")}]}, "missing or wrong"),
    "name with NUL": (
        {"format_version": 1, "shards": [ENTRY | {"name": "a\0b.npy"}]},
        "shard name|cannot be read|missing or wrong",
    ),
    "name with half a character": (
        {"format_version": 1, "shards": [ENTRY | {"name": "\ud800.npy"}]},
        "shard name|cannot be read",
    ),
    "name too long": ({"format_version": 1, "shards": [ENTRY | {"name": "a" * 300}]}, "cannot be read"),
    **{
        f"no {key}": ({"format_version": 1, "shards": [{k: v for k, v in ENTRY.items() if k != key}]}, f"'{key}'")
        for key in ("name", "tokens", "dtype", "sha256")
    },
    **{
        f"name {name!r}": ({"format_version": 1, "shards": [ENTRY | {"name": name}]}, "manifest.json: shard name")
        for name in ("../outside.npy", "/etc/hostname", "sub/shard.npy", "..", ".", "", "./shard_000000.npy")
    },
}


@pytest.mark.parametrize("what", BAD_MANIFESTS)
def test_bad_manifest_is_refused_by_name(tmp_path, what):
    """Bugs: a traceback of json or of a missing key; a manifest that makes us read files outside its folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "sub").mkdir()
    for good in (folder / "shard_000000.npy", folder / "sub" / "shard.npy", tmp_path / "outside.npy"):
        save(good, range(40))
    content, message = BAD_MANIFESTS[what]
    content = json.dumps(content) if isinstance(content, dict) else content
    (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for opened in (lambda: FineWebDataset(folder, 4), lambda: verify_shards(folder)):
        with pytest.raises(UserError, match=message) as caught:
            opened()
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_manifest_and_disk_disagree(tmp_path):
    """Bug: a shard missing, or of another size or type than recorded, shifts the whole order silently."""
    written(tmp_path, range(100))
    shard = tmp_path / "shard_000001.npy"
    good = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard_000001\.npy: cannot be read"):
        FineWebDataset(tmp_path, 4)
    save(shard, range(39))
    with pytest.raises(UserError, match=r"shard_000001\.npy: holds 39 tokens.* says 40"):
        FineWebDataset(tmp_path, 4)
    save(shard, range(40), "<u4")
    with pytest.raises(UserError, match=r"shard_000001\.npy: holds 40 tokens of <u4.* says 40 of <u2"):
        FineWebDataset(tmp_path, 4)
    shard.write_bytes(good)
    save(tmp_path / "shard_000099.npy", range(5))  # not listed: not read
    dataset = FineWebDataset(tmp_path, 4)
    assert dataset.n_tokens == 100 and dataset.tokens(0, 100).tolist() == list(range(100))


def test_a_shard_that_is_listed_twice_is_refused(tmp_path):
    """Its tokens would be trained on twice an epoch, and no count would say so."""
    written(tmp_path, range(100))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"].append(manifest["shards"][0])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"lists shard_000000\.npy twice"):
        FineWebDataset(tmp_path, 4)


def test_manifest_order_is_the_order(tmp_path):
    """Bug: shards sorted by name although the manifest lists them otherwise."""
    written(tmp_path, range(100))
    edit_manifest(tmp_path, lambda m: m["shards"].reverse())
    tokens = FineWebDataset(tmp_path, 4).tokens(0, 100).tolist()
    assert tokens == [*range(80, 100), *range(40, 80), *range(40)]


def test_verify_finds_one_changed_token(tmp_path):
    """Bug: damage that keeps the size is not found, or the wrong shard is named."""
    written(tmp_path, range(100))
    assert verify_shards(tmp_path) == 3
    flip(tmp_path / "shard_000002.npy")
    FineWebDataset(tmp_path, 4)  # opening reads headers only
    with pytest.raises(UserError, match=r"shard_000002\.npy: .*sha256"):
        verify_shards(tmp_path)


def test_verify_command(tmp_path, capsys):
    """Bug: the command says that all is well without looking, or ends in a traceback."""
    written(tmp_path, range(100))
    assert run(lambda: data.main(["verify", str(tmp_path)])) == 0
    assert "3 shards" in capsys.readouterr().out
    flip(tmp_path / "shard_000001.npy")
    assert run(lambda: data.main(["verify", str(tmp_path)])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "shard_000001.npy" in err
    command = [sys.executable, "data_processing_fineweb.py", "verify"]
    for folder, named in ((tmp_path, "shard_000001.npy"), (tmp_path / "absent", "absent")):
        done = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("data_processing_fineweb.py: error: ") and named in done.stderr


def test_shard_of_both_splits_is_refused(tmp_path):
    """Bug: validation on text that is trained on, through a copy, a link, or one folder given twice."""
    train = written(tmp_path / "train", range(100)) and FineWebDataset(tmp_path / "train", 4)
    written(tmp_path / "val", range(500, 600))
    refuse_overlap(train, FineWebDataset(tmp_path / "val", 4))
    with pytest.raises(UserError, match=r"shard_000000\.npy: also a training shard"):
        refuse_overlap(train, FineWebDataset(tmp_path / "train", 4))
    written(tmp_path / "copy", [*range(500, 540), *range(40, 80)])  # its second shard is a training shard's copy
    with pytest.raises(UserError, match=r"copy.shard_000001\.npy"):
        refuse_overlap(train, FineWebDataset(tmp_path / "copy", 4))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.npy").symlink_to(tmp_path / "train" / "shard_000000.npy")
    with pytest.raises(UserError, match="also a training shard"):
        refuse_overlap(train, FineWebDataset(tmp_path / "linked", 4))
    (tmp_path / "plain").mkdir()
    counting(tmp_path / "plain", [50])
    with pytest.raises(UserError, match="also a training shard"):
        refuse_overlap(FineWebDataset(tmp_path / "plain", 4), FineWebDataset(tmp_path / "plain", 4, split="val"))
    refuse_overlap(train, FineWebDataset(tmp_path / "plain", 4, split="val"))
    (tmp_path / "alias").symlink_to(tmp_path / "plain")
    with pytest.raises(UserError, match="also a training shard"):
        refuse_overlap(FineWebDataset(tmp_path / "alias", 4), FineWebDataset(tmp_path / "plain", 4, split="val"))


@pytest.mark.parametrize("manifest", [True, False])
def test_fingerprint_is_of_the_tokens(tmp_path, manifest):
    """Bugs: moved data is refused at a resume; changed data is not."""

    def made(name, ids, shard_tokens=40):
        written(tmp_path / name, ids, shard_tokens=shard_tokens)
        if not manifest:
            (tmp_path / name / "manifest.json").unlink()
        return FineWebDataset(tmp_path / name, 4)

    one = made("one", range(100)).fingerprint()
    assert made("same", range(100)).fingerprint() == one
    (tmp_path / "one").rename(tmp_path / "moved")
    assert FineWebDataset(tmp_path / "moved", 8).fingerprint() == one
    others = [[99, *range(1, 100)], [*range(99), 98], [*range(50), 3, *range(51, 100)], range(99), range(101)]
    fingerprints = [made(f"other{i}", ids).fingerprint() for i, ids in enumerate(others)]
    assert len({one, *fingerprints}) == 6
    assert len(one) == 64 and int(one, 16) >= 0


def test_fingerprint_without_manifest_sees_both_ends_of_a_large_shard(tmp_path):
    """Bug: only the beginning of each file is looked at, so a shard that was appended to or rewritten passes."""
    found = set()
    for at in (None, 0, 69_999):
        ids = np.arange(70_000) % 50257
        if at is not None:
            ids[at] += 1
        save(tmp_path / "shard_0.npy", ids)
        found.add(FineWebDataset(tmp_path, 4).fingerprint())
    assert len(found) == 3


def test_fingerprint_of_the_order_of_shards(tmp_path):
    """Bug: shards exchanged in the manifest give another order and the same fingerprint."""
    written(tmp_path, range(100))
    one = FineWebDataset(tmp_path, 4).fingerprint()
    edit_manifest(tmp_path, lambda m: m["shards"].reverse())
    assert FineWebDataset(tmp_path, 4).fingerprint() != one


# ---------------------------------------------------------------------------------------
# Writing.


@settings(bounded, max_examples=25)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(3, 25), st.sampled_from([50257, 65536, 65537, 128256]))
def test_written_shards_hold_the_ids(lengths, shard_tokens, vocab_size):
    """Bugs: ids lost or repeated at a shard's border; uint16 where the vocabulary needs more; wrong hash or count."""
    ids = [(i * 7919 + vocab_size - 1) % vocab_size for i in range(sum(lengths))]  # the first is the largest id
    documents, at = [], 0
    for length in lengths:
        documents.append(ids[at : at + length])
        at += length
    with tempfile.TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory) / "new" / "folder", vocab_size, shard_tokens, prefix="edu")
        for document in documents:
            writer.add(document, 10)
        manifest = writer.close(tokenizer={"name": "x"}, documents=len(documents))
        folder = Path(directory) / "new" / "folder"
        shards = [ids[i : i + shard_tokens] for i in range(0, len(ids), shard_tokens)]
        dtype = "<u2" if vocab_size <= 65536 else "<u4"
        assert manifest == json.loads((folder / "manifest.json").read_text())
        assert (manifest["format_version"], manifest["tokens"]) == (1, len(ids))
        assert (manifest["tokenizer"], manifest["documents"]) == ({"name": "x"}, len(documents))
        names = [f"edu_{i:06d}.npy" for i in range(len(shards))]
        assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "manifest.json"])
        for name, expected, entry in zip(names, shards, manifest["shards"], strict=True):
            found = np.load(folder / name)  # plain numpy reads them
            assert found.dtype.str == dtype and found.tolist() == expected
            assert (entry["name"], entry["tokens"], entry["dtype"]) == (name, len(expected), dtype)
            assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if shards:
            assert verify_shards(folder) == len(shards)


def test_text_bytes_count_where_a_document_begins(tmp_path):
    """Bug: bits per byte from the wrong number: source bytes lost or counted twice at a shard's border."""
    writer = ShardWriter(tmp_path, 50257, 10)
    for length, text_bytes in [(4, 1), (5, 10), (3, 100), (8, 1000), (25, 10000), (1, 100000)]:
        writer.add([0] * length, text_bytes)
    manifest = writer.close()
    # documents begin at tokens 0, 4, 9, 12, 20 and 45 of shards of ten
    assert [s["text_bytes"] for s in manifest["shards"]] == [111, 1000, 10000, 0, 100000]
    assert [s["tokens"] for s in manifest["shards"]] == [10, 10, 10, 10, 6]


@pytest.mark.parametrize("vocab_size, bad", [(50257, 50257), (50257, 65536), (65536, 65536), (65537, 65537), (9, -1)])
@pytest.mark.parametrize("kind", [list, np.array])
def test_id_outside_the_vocabulary_never_wraps(tmp_path, vocab_size, bad, kind):
    """Bug: 65536 stored in uint16 becomes 0, which is a good token."""
    writer = ShardWriter(tmp_path, vocab_size, 4)
    writer.add([1, 2], 2)
    with pytest.raises(ValueError, match=f"outside .*{bad}"):
        writer.add(kind([3, bad, 5]), 3)
    writer.add([vocab_size - 1], 1)
    writer.close()
    assert FineWebDataset(tmp_path, 2).tokens(0, 3).tolist() == [1, 2, vocab_size - 1]  # nothing of the bad one


def test_ids_must_be_integers(tmp_path):
    """Bug: 1.5 becomes 1 without a word."""
    with pytest.raises((ValueError, TypeError)):
        ShardWriter(tmp_path, 50257, 4).add([1.5, 2.0], 3)


def test_shards_of_no_tokens_are_refused(tmp_path):
    """Bug: a shard size of 0 goes round for ever without writing anything."""

    def write():
        writer = ShardWriter(tmp_path, 50257, 0)
        end = time.monotonic() + 0.5
        writer.flush = lambda: time.monotonic() < end or pytest.fail("add() never ends")
        writer.add([1, 2, 3], 3)

    with pytest.raises(ValueError):
        within(30, write)


def test_manifest_is_written_last(tmp_path, monkeypatch):
    """Bugs: a manifest that names shards not yet there; a name that appears before its bytes are on the disk."""
    events, replace = [], os.replace

    def record_replace(source, target):
        replace(source, target)
        events.append(("appears", Path(target).name))

    def record_fsync(fd):
        events.append(("flushed, with these there", *sorted(p.name for p in tmp_path.glob("[!.]*"))))

    monkeypatch.setattr(files.os, "replace", record_replace)
    monkeypatch.setattr(files.os, "fsync", record_fsync)
    written(tmp_path, range(100))
    expected, there = [], []
    for name in ("shard_000000.npy", "shard_000001.npy", "shard_000002.npy", "manifest.json"):
        if name.startswith("shard") and os.name != "nt":
            expected.append(("flushed, with these there", *there))  # the folder, which has the unfinished file now
        expected += [("flushed, with these there", *there), ("appears", name)]
        there = sorted([*there, name])
        if os.name != "nt":
            expected.append(("flushed, with these there", *there))  # the folder
    assert events == expected


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_failed_write_leaves_nothing_under_a_final_name(tmp_path, monkeypatch, call, nth):
    """Bug: a full disk leaves half a shard under its final name, or temporary files for ever, or a manifest. What is
    not finished stays, under one hidden name, for a writer that goes on."""
    real, calls = getattr(os, call), itertools.count(1)
    fail_at = 3 * nth - 1 if call == "fsync" else nth  # each shard: its folder's fsync, its own, its folder's again

    def fail(*args):
        if next(calls) == fail_at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, range(100))
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".shard.unfinished", *(f"shard_{i:06d}.npy" for i in range(nth - 1))]
    monkeypatch.undo()
    written(tmp_path, range(100))  # and a second run mends it
    assert verify_shards(tmp_path) == 3


# ---------------------------------------------------------------------------------------
# Validation.


@pytest.mark.parametrize("n_tokens", [0, 1, 7, 8, 9, 100, 207, 10**9])
def test_first_windows_are_the_same_for_every_world_and_batch(tmp_path, n_tokens):
    """Bugs: the validation loss depends on the micro-batch or the number of devices; a tail is dropped; windows
    are read twice on some rank; more or fewer tokens than asked for; ranks that cannot act together, because they
    have different numbers of batches."""
    dataset = FineWebDataset(write_one(tmp_path, 209), 8)  # 26 windows: 208 targets
    every = slow_windows(range(209), 8)
    expected = every[: -(-n_tokens // 8)]  # all of them where there are fewer
    for world, batch_size in itertools.product((1, 2, 3, 5, 30), (1, 4, 100)):
        found, batches = [], []
        for rank in range(world):
            mine = list(first_windows(dataset, n_tokens, batch_size, rank, world))
            batches.append(len(mine))
            for x, y in mine:
                assert len(x) <= batch_size and x.shape == y.shape == (len(x), 8)
                found += zip(x.tolist(), y.tolist())
        assert sorted(found) == expected
        assert len(set(batches)) == 1
        targets = sum(target != IGNORE for _, y in found for target in y)
        assert min(n_tokens, 208) <= targets < n_tokens + 8


def test_first_windows_of_a_padded_end(tmp_path):
    """Bug: the last, short window left out of validation, or its padding counted."""
    dataset = FineWebDataset(write_one(tmp_path, 20), 8)
    batches = list(first_windows(dataset, 1000, 2))
    assert [x.shape for x, _ in batches] == [(2, 8), (1, 8)]
    targets = np.concatenate([y.reshape(-1) for _, y in batches])
    assert targets[targets != IGNORE].tolist() == list(range(1, 20))
