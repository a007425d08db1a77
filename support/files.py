"""Writing files that are complete or absent, also after a crash or a power cut; locks; JSON; hashes.

Network, FUSE and shared file systems lack some calls. There the work goes on without the call, with one warning.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from support.cli import UserError

UNFINISHED = ".tmp"  # suffix of a file that is being written
JSON_LIMIT = 64 * 2**20  # bytes, far more than a JSON file of this project has; the facts of a piece may have more

# The errors of a call that a file system does not know or does not allow; not those of a full or failing disk.
UNSUPPORTED = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF,
}  # fmt: skip
TAKEN = {errno.EWOULDBLOCK, errno.EACCES}  # the errors of a lock that another process holds


@cache  # each text is printed once
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def done_without(path, what):
    """Context of a call that a file system may lack: then it prints the warning `what` and goes on."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"this file system {what} ({error.strerror})")


def write_whole(path, *parts):
    """Writes bytes-like parts to a temporary file, flushes it to the disk, renames it: nobody sees half a file."""
    path = Path(path)
    if not path.name:  # "." or "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device is written to, not replaced
        with open(path, "wb") as f:
            f.writelines(parts)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(temporary, "wb") as f:
            f.writelines(parts)
            f.flush()
            sync(f)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync(file):
    """Flushes the operating system's buffers of an open file to the disk."""
    with done_without(file.name, "does not flush files: a power cut may lose those that were written last"):
        flush(file.fileno())


def flush(descriptor):
    """os.fsync; on macOS F_FULLFSYNC, because fsync leaves the data in the drive's cache there, which a power cut
    empties."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_directory(directory):
    """Makes renames and new names in a directory survive a power cut; no-op where directories cannot be opened."""
    if os.name == "nt":
        return
    with done_without(directory, "does not flush folders: a power cut may undo the newest renames"):
        fd = os.open(directory, os.O_RDONLY)
        try:
            flush(fd)
        finally:
            os.close(fd)


def allow_open_files(n):
    """Lets this process have n files open if the system permits it. The usual limit is 256 on macOS, 1,024 on Linux."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (n if hard == resource.RLIM_INFINITY else min(n, hard), hard))


def copy_permissions(source, path):
    """Gives `path` the permissions of `source`."""
    with done_without(path, "does not set permissions: files keep those that it gives them"):
        shutil.copymode(source, path)


@contextmanager
def locked(file, taken, wait=0.0):
    """Context in which this process alone holds the lock of an open file or directory; a crash frees it too.

    UserError with the text of `taken()` where another process still holds it after `wait` seconds. Only a warning where
    the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there the lock is not kept
        yield
        return
    give_up = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in TAKEN:
                warn_once(f"this file system keeps no locks: let only one process write here ({error.strerror})")
                break
            if time.monotonic() >= give_up:
                raise UserError(taken()) from error
            time.sleep(0.1)
    yield


def write_json(path, value):
    """Writes a JSON file, unless the file has this content already."""
    content = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    path = Path(path)
    if not (path.is_file() and path.read_bytes() == content):
        write_whole(path, content)


def read_json(path, limit=JSON_LIMIT) -> dict:
    """The JSON object in a file. UserError names the file if it is missing, not an object, or above `limit` bytes."""
    path = Path(path)
    try:
        size = path.stat().st_size
        value = json.loads(path.read_bytes()) if size <= limit else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if size > limit:
        raise UserError(f"{path}: {size:,} bytes; expected at most {limit:,}")
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def natural(path):
    """Sort key under which shard_2 comes before shard_10, and shard_01 before shard_1."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)], path.name
