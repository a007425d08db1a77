"""Batches of text to token ids, in order: in this process, in several, or on a Ray cluster.

Notable: every engine runs the same function, `encode`, and its results are taken in the order in which the batches
were given, so the number of processes or machines changes no byte. A batch travels as plain text and comes back
as arrays.
"""

import functools
import hashlib
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.cli import UserError, one_line
from tokenizer import FILE, load_tokenizer, replace_surrogates

AHEAD = 3  # batches in flight per process
DIGEST_BYTES = 16  # two of 10^12 different texts share one with a probability below 10^-14


class Encoded(NamedTuple):
    """A batch of n texts as `encode` gives it."""

    ids: np.ndarray  # of all texts, each one's after its marker; uint16 or uint32
    sizes: np.ndarray  # (n, 3) int64: ids with the marker, bytes of text, halves of surrogate pairs replaced
    digests: np.ndarray  # (n, DIGEST_BYTES) uint8, of the texts


class Engine(NamedTuple):
    submit: object  # texts -> a function that waits for their Encoded
    ahead: int  # batches to submit before waiting for the first
    lost: tuple  # the exceptions that say that a process died


def clean(text):
    """The text as it is tokenized, and how many halves of surrogate pairs became U+FFFD."""
    cleaned = replace_surrogates(text)
    return cleaned, 0 if cleaned is text else cleaned.count("\ufffd") - text.count("\ufffd")


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def encode(tokenizer, texts) -> Encoded:
    """The ids of all texts. OverflowError for an id that does not fit."""
    cleaned = [clean(text) for text in texts]
    encoded = tokenizer.encode_arrays([text for text, _ in cleaned])
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    marker = np.array([tokenizer.eot_token], np.uint32)
    ids = np.concatenate([marker[:0], *(part for ids in encoded for part in (marker, ids))])
    if ids.max(initial=0) > np.iinfo(dtype).max:
        raise OverflowError(f"token id {ids.max()} does not fit into {dtype}")
    data = [text.encode() for text, _ in cleaned]
    sizes = [(len(ids) + 1, len(d), n) for ids, d, (_, n) in zip(encoded, data, cleaned)]
    digests = np.frombuffer(b"".join(map(digest, data)), np.uint8).reshape(-1, DIGEST_BYTES)
    return Encoded(ids.astype(dtype), np.array(sizes, np.int64).reshape(-1, 3), digests)


def in_order(batches, engine):
    """(batch, its Encoded) in the order of the batches, each of which has texts, first and last."""
    flying, batch = deque(), None
    try:
        for batch in batches:
            flying.append((batch, engine.submit(batch.texts)))
            if len(flying) > engine.ahead:
                yield flying[0][0], flying[0][1]()
                flying.popleft()
        while flying:
            yield flying[0][0], flying[0][1]()
            flying.popleft()
    except UserError:
        raise
    except engine.lost as error:
        lost = flying[0][0] if flying else batch
        raise UserError(
            f"a tokenizer process died (killed, or out of memory) before it had finished {lost.first} to {lost.last}; "
            "the same command goes on from there, with a lower --num_proc if memory was short"
        ) from error


@contextmanager
def open_engine(tokenizer, folder, name="local", num_proc=1, start_method=None, ray_address=None):
    """The Engine `name`, "local" or "ray", for the tokenizer that is saved in `folder`."""
    if name == "ray":
        with ray_cluster(folder, ray_address) as engine:
            yield engine
    elif num_proc > 1:
        with processes(folder, num_proc, start_method) as engine:
            yield engine
    else:
        yield Engine(lambda texts: functools.partial(encode, tokenizer, texts), 0, ())


# ---------------------------------------------------------------------------------------
# Processes of this machine.

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
def processes(folder, num_proc, start_method):
    """Spawned, not forked, unless asked: libraries may have started threads, and a fork beside threads can
    deadlock. Not multiprocessing.Pool, which waits for ever for a worker that was killed."""
    context = multiprocessing.get_context(start_method or "spawn")
    pool = ProcessPoolExecutor(num_proc, context, start_worker, (str(folder),))
    try:
        yield Engine(lambda texts: pool.submit(encode_in_worker, texts).result, AHEAD * num_proc, (BrokenProcessPool,))
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------
# Machines: tasks on a Ray cluster (https://docs.ray.io). Ray repeats a task whose process died.


@contextmanager
def ray_cluster(folder, address):
    """The cluster at `address`, or the one that RAY_ADDRESS names, or else one on this machine alone."""
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}); pip install ray, the version of the cluster") from error
    reach(address)
    with tempfile.TemporaryDirectory() as code:  # what a worker needs of this repository, which may hold shards too
        for name in ("engines.py", "tokenizer.py", "support/__init__.py", "support/cli.py"):
            Path(code, name).parent.mkdir(exist_ok=True)
            Path(code, name).write_bytes((Path(__file__).parent / name).read_bytes())
        try:
            ray.init(address, runtime_env={"working_dir": code}, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(f"--ray_address {address}: {one_line(error)}") from error
    try:
        remote, saved = ray.remote(encode_on_ray), ray.put(Path(folder, FILE).read_bytes())
        ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        get = functools.partial(functools.partial, ray.get)
        yield Engine(lambda texts: get(remote.remote(saved, texts)), ahead, (ray.exceptions.RayError,))
    finally:
        ray.shutdown()


def reach(address):
    """UserError within seconds where nothing answers at HOST:PORT; Ray itself would try for many minutes."""
    host, _, port = (address or "").rpartition(":")
    if not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray_address {address}: nothing answers there ({error})") from error


def encode_on_ray(saved, texts):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one task per core
    return encode(tokenizer_from(saved), texts)


@functools.lru_cache(1)
def tokenizer_from(saved: bytes):
    """The tokenizer of a tokenizer.json; a worker keeps it from task to task."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FILE).write_bytes(saved)
        return load_tokenizer(folder)
