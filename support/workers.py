"""Functions called in this process, in several, or on a Ray cluster: three executors with one interface."""

import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from support.cli import ROOT, UserError, one_line

LOST = BrokenProcessPool  # what a future raises when a process of this machine died
stopping = None  # the event that says that nobody waits for a function's result any more


def open_workers(engine="local", n=1, start_method="spawn", ray_address=None):
    """Context of (executor, how many functions it runs at once)."""
    return ray_cluster(ray_address) if engine == "ray" else on_this_machine(n, start_method)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stopped() -> bool:
    """Whether a function that takes long may end: its result is not wanted any more."""
    return stopping is not None and stopping.is_set()


# ---------------------------------------------------------------------------------------
# This machine: a thread, from which the caller's stays free to show progress, or processes.


@contextmanager
def on_this_machine(n, start_method):
    """Processes are spawned unless asked otherwise: libraries may have started threads, and a fork beside threads can
    deadlock. Not multiprocessing.Pool, which waits for ever for a worker that was killed."""
    global stopping
    if n == 1:
        stopping = stop = threading.Event()
        pool = ThreadPoolExecutor(1)
    else:
        context = multiprocessing.get_context(start_method)
        stop = context.Event()
        pool = ProcessPoolExecutor(n, context, begin_worker, (stop,))
    try:
        yield pool, n
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        stopping = None


def begin_worker(stop):
    global stopping
    stopping = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=leave_with_parent, daemon=True).start()
    one_thread()


def leave_with_parent():
    """A killed parent cannot stop its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def one_thread():
    """Tokenizers start no threads: there is a process for each core already."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


# ---------------------------------------------------------------------------------------
# Machines: tasks on a Ray cluster (https://docs.ray.io). Ray repeats a task whose process died.


@contextmanager
def ray_cluster(address):
    """The cluster at `address`, or the one that RAY_ADDRESS names, or else one on this machine alone.

    Its workers get a copy of the repository's Python files, without data and checkpoints."""
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}); pip install ray, the version of the cluster") from error
    refuse_silence(address)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "support", f"{folder}/support")
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        try:
            ray.init(address, runtime_env={"working_dir": folder}, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(f"--ray_address {address}: {one_line(error)}") from error
    n = max(1, int(ray.cluster_resources().get("CPU", 1)))
    threads = ThreadPoolExecutor(n)  # each waits for one task
    try:
        yield RayTasks(ray, threads), n
    finally:
        ray.shutdown()
        threads.shutdown(cancel_futures=True)


class RayTasks(Executor):
    def __init__(self, ray, threads):
        self.ray, self.threads = ray, threads

    def submit(self, function, *arguments):
        return self.threads.submit(self.wait_for, self.ray.remote(on_one_thread).remote(function, *arguments))

    def wait_for(self, task):
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:  # what the function raised
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            raise UserError(f"a task on the Ray cluster was lost ({one_line(error)}); start again") from error


def on_one_thread(function, *arguments):
    one_thread()
    return function(*arguments)


def refuse_silence(address):
    """UserError within seconds where nothing answers at HOST:PORT; Ray itself would try for many minutes."""
    host, _, port = (address or "").rpartition(":")
    if not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray_address {address}: nothing answers there ({error})") from error
