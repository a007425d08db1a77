"""The only downloader: a file by HTTP, whole and checked, or not at all.

A file gets its name when all bytes that the server announced are on the disk and the caller's check has found nothing
wrong. After a failure there is a pause and another attempt, which continues where the last one stopped.
"""

import os
import shutil
import sys
import time
from pathlib import Path

from support.cli import UserError
from support.files import flush, sync_directory

ATTEMPTS = 10  # that bring nothing, one after the other, before giving up: about five minutes
LONGEST_PAUSE = 60  # seconds; the pauses are 1, 2, 4, ...
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**16  # bytes; what a connection that breaks off loses
PART = ".part"  # ends the name of a file that is not whole yet
LATER = {408, 429, 500, 502, 503, 504}  # status codes after which another attempt may succeed


class Failed(Exception):
    """An attempt failed in a way that another attempt may not."""


def download(url, path, check=None, at_most=None, attempts=None, patience=None):
    """Downloads `url` to `path`, unless a file that passes the check is there.

    check: a function of a path that says what is wrong with that file, or returns None.
    at_most: bytes; a longer answer is not the file.
    attempts: so many that bring nothing, one after the other, end the download; default ATTEMPTS.
    patience: seconds; where no byte has arrived by then there is no further attempt.

    UserError where the server refuses or the attempts are used up. What has arrived is kept for the next call."""
    path, attempts = Path(path), attempts or ATTEMPTS
    if path.exists():
        why = check(path) if check else None
        if why is None:
            return
        print(f"{path}: {why}; downloading it again", file=sys.stderr)
    part = path.with_name(path.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    began, failures, most = time.monotonic(), 0, size_of(part)
    while True:
        try:
            fetch_rest(url, part, at_most)
            if check and (why := check(part)):
                part.unlink()
                raise Failed(why)
            break
        except Failed as error:
            failures = 1 if size_of(part) > most else failures + 1
            most = max(most, size_of(part))
            silent = patience is not None and most == 0 and time.monotonic() - began > patience
            if failures >= attempts or silent:
                times = f"{failures} times in a row; the same command later continues"
                raise UserError(f"{url}: {error}, {times}") from error
            time.sleep(pause(failures))
    os.replace(part, path)
    sync_directory(path.parent)


def pause(failures):
    """Seconds before the next attempt."""
    return min(LONGEST_PAUSE, 2 ** (failures - 1))


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def fetch_rest(url, part, at_most=None):
    """One attempt to complete the file `part`, which is on the disk when this returns. Failed or UserError."""
    import requests

    have = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            have, size = check_answer(response, url, part, have)
            with open(part, "ab" if have else "wb") as f:
                for chunk in response.iter_content(CHUNK):
                    f.write(chunk)
                    if at_most is not None and f.tell() > at_most:
                        break
                flush(f.fileno())
    except requests.ConnectionError as error:
        raise Failed(f"no connection, or it broke off ({type(error).__name__})") from error
    except requests.RequestException as error:
        raise Failed(type(error).__name__) from error
    if at_most is not None and size_of(part) > at_most:
        part.unlink()
        raise Failed(f"no end after {at_most:,} bytes")
    if size is not None and size_of(part) != size:
        raise Failed(f"{size_of(part):,} of {size:,} bytes arrived")


def check_answer(response, url, part, have):
    """(bytes to keep of what is there, size of the whole file or None). Failed or UserError if this is not the file."""
    code = response.status_code
    if code in LATER:
        raise Failed(f"the server answers {code}")
    if code == 416:  # what is there does not go together with what the server has
        part.unlink(missing_ok=True)
        raise Failed("the server has no bytes beyond those that are here")
    if code not in (200, 206):
        reason = {401: " (no such file, or it needs a login; then fetch it by other means)",
                  403: " (its terms may have to be accepted)"}.get(code, "")  # fmt: skip
        raise UserError(f"{url}: the server answers {code}{reason}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise Failed("the server sends a web page instead of the file")
    if code == 200:
        have = 0  # the whole file, whatever was asked for
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise Failed("the server sends another part than was asked for")
    length = response.headers.get("Content-Length")
    size = have + int(length) if length and length.isdecimal() else None
    free = shutil.disk_usage(part.parent).free
    if size is not None and free < size - have:
        raise UserError(f"{part}: needs {size - have:,} more bytes on this disk, which has {free:,}; make room")
    return have, size
