"""Files by HTTP: whole and checked, or not at all; begun ones go on where they stopped.

Notable: what a server sends is believed only when it has the announced length and, where that is known, the
content's hash. Failures are waited out with growing pauses, which begin anew whenever bytes have arrived.
"""

import os
import re
import shlex
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

from support.cli import UserError, refuse
from support.files import sha256, sync_directory

ATTEMPTS = 10  # in a row that bring nothing, before giving up: about five minutes
LONGEST_PAUSE = 60  # seconds; the pauses are 1, 2, 4, ...
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**16  # bytes; what a connection that breaks takes with it
PART = ".part"  # ends the name of a file that is not whole yet
LATER = {408, 429, 500, 502, 503, 504}  # what a server answers that may answer otherwise the next time


class Failed(Exception):
    """An attempt that may succeed if repeated."""


def pause(failures):
    return min(LONGEST_PAUSE, 2 ** (failures - 1))


def download(url, path, size=None, digest=None, headers=None, stop=None):
    """Fetches `url` to `path` unless it is there. `size` in bytes and `digest`, a sha256, are checked where given.

    `headers` go along with every request; `stop`, a threading.Event, ends it early. UserError if the server
    refuses or fails for long; what has arrived by then is kept for another time.
    """
    path, stop = Path(path), stop or threading.Event()
    if path.exists():  # it got this name when it was whole
        return
    part = path.with_name(path.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, most = 0, size_of(part)
    while not stop.is_set():
        try:
            fetch_rest(url, part, size, headers or {}, stop)
            if digest and not stop.is_set() and sha256(part) != digest:
                part.unlink()
                raise Failed("its content is not what was announced (sha256 differs)")
            break
        except Failed as error:
            failures = 1 if size_of(part) > most else failures + 1
            most = max(most, size_of(part))
            if failures >= ATTEMPTS:
                raise UserError(f"{url}: {error}, {ATTEMPTS} times in a row; the same command later goes on") from error
            stop.wait(pause(failures))
    if stop.is_set():
        raise UserError(f"{url}: stopped")
    os.replace(part, path)
    sync_directory(path.parent)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def fetch_rest(url, part, size, headers, stop):
    """One attempt to complete the file `part`, which is on the disk when this returns."""
    import requests

    have = size_of(part)
    if size is not None and have > size:
        part.unlink()
        have = 0
    if have and have == size:
        return
    asked = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=asked, stream=True, timeout=TIMEOUT) as response:
            have, size = check_answer(response, url, part, have, size)
            with open(part, "r+b" if have else "wb") as f:
                f.seek(have)
                for chunk in response.iter_content(CHUNK):
                    f.write(chunk)
                    if stop.is_set():
                        return
                f.truncate()
                os.fsync(f.fileno())
    except requests.RequestException as error:
        raise Failed(type(error).__name__) from error
    if size is not None and size_of(part) != size:
        raise Failed(f"{size_of(part):,} of {size:,} bytes arrived")


def check_answer(response, url, part, have, size):
    """(bytes to keep of what is there, size of the whole file or None). Failed or UserError if this is not the file."""
    code = response.status_code
    if code in LATER:
        raise Failed(f"the server answers {code}")
    if code == 416:  # what is there does not go together with what the server has
        part.unlink(missing_ok=True)
        raise Failed("the server has no bytes beyond those that are here")
    if code not in (200, 206):
        reason = {401: " (log in: `hf auth login`)", 403: " (its terms may have to be accepted)"}.get(code, "")
        raise UserError(f"{url}: the server answers {code}{reason}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise Failed("the server sends a web page instead of the file")
    if code == 200:
        have = 0  # the whole file, whatever was asked for
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise Failed("the server sends another part than was asked for")
    length = response.headers.get("Content-Length")
    announced = have + int(length) if length and length.isdecimal() else None
    if None not in (announced, size) and announced != size:
        raise Failed(f"the server announces {announced:,} bytes, expected {size:,}")
    whole = announced if size is None else size
    if whole is not None and shutil.disk_usage(part.parent).free < whole - have:
        free = shutil.disk_usage(part.parent).free
        raise UserError(f"{part}: needs {whole - have:,} more bytes on this disk, which has {free:,}; make room")
    return have, whole


def fetch_shards(urls, out_dir, open_shard, manifest) -> list[Path]:
    """Fetches token shards, build-nanogpt's .npy or llm.c's .bin, which training reads as they are. UserError."""
    names = [urlsplit(url).path.rsplit("/", 1)[-1] for url in urls]
    good = [re.fullmatch(r"[\w-][\w.+-]*\.(npy|bin)", name, re.ASCII) for name in names]
    good = [fits and urlsplit(url).scheme in ("http", "https") for fits, url in zip(good, urls)]
    found = [f"{url}: expected http(s)://.../NAME.npy or .bin" for url, fits in zip(urls, good) if not fits]
    found += [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]
    if (Path(out_dir) / manifest).exists():
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
    return paths
