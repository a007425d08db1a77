"""Fetching: the hub and other servers, played on 127.0.0.1, that break off, stall, answer with errors or web pages."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare_fineweb
from data_processing_fineweb import MANIFEST, FineWebDataset
from support import download as download_module
from support.cli import UserError, run
from support.download import download

ROOT = Path(prepare_fineweb.__file__).parent
BROKEN = "cut", "stall", "no range cut"
SHA = "c0ffee" + "0" * 34
NAME = "HuggingFaceFW/fineweb-edu"
CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*/*"}]
- config_name: sample-10BT
  data_files: [{split: train, path: "sample/10BT/*"}, {split: test, path: "other/[0-9].jsonl"}]
---
"""


class Server(ThreadingHTTPServer):
    """`files` and `faults` by path; the latter go wrong one after the other, before all is well; `log`: requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.info = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """The other side breaks off too, and nobody needs to hear of it."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path, asked = unquote(self.path.split("?")[0]), self.headers.get("Range")
        path += " " + self.path.split("?")[1].split("&")[0] if "/tree/" in path else ""
        self.server.log.append((path, asked))
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.answer(fault, b"out of order")
        if fault == "html":
            return self.answer(
                200, b"<html>log in to this network</html>", {"Content-Type": "text/html; charset=utf-8"}
            )
        if path in self.server.info:
            return self.answer(200, json.dumps(self.server.info[path]).encode(), {"Content-Type": "application/json"})
        if path not in self.server.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = self.server.files[path]
        start, last = 0, len(body) - 1
        if asked and fault not in ("no range", "no range cut"):
            start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            start, last = 0 if fault == "other part" else int(start), min(last, int(end or last))
        if start >= len(body):
            return self.answer(416, b"")
        more = {"Content-Range": f"bytes {start}-{last}/{len(body)}"} if asked else {}
        if "/resolve/" in path:
            more |= {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        body = body[: last + 1]
        if fault == "other bytes":
            body = bytes(len(body))
        rest = body[start:]
        if fault == "wrong length":  # a proxy that cut the file, and knows no better
            rest = rest[: len(rest) // 2]
        self.answer(
            206 if asked and fault not in ("no range", "no range cut") else 200,
            rest,
            more,
            len(rest) // 2 if fault in BROKEN else None,
        )
        if fault == "stall":
            time.sleep(3)
        if fault in BROKEN:
            self.close_connection = True

    do_HEAD = do_GET

    def answer(self, code, body, headers=None, sent=None):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[:sent])
        self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    """Pauses and patience are those of a test, and nothing but this server is asked."""
    monkeypatch.setattr(download_module, "pause", lambda failures: 0.01)
    monkeypatch.setattr(download_module, "TIMEOUT", 0.5)
    monkeypatch.setattr(download_module, "ATTEMPTS", 4)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def sha256_is(body):
    """A check, as `download` takes it."""
    digest = hashlib.sha256(body).digest()
    return lambda path: None if hashlib.sha256(path.read_bytes()).digest() == digest else "sha256 differs"


FAULTS = ["cut", 500, "html", "stall", "wrong length", "other bytes", "no range", 429]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_arrives_whole_whatever_happens_on_the_way(fault, server, tmp_path):
    """Bugs: half a file, an error page or other bytes kept as data; all begun anew when the network drops."""
    body = np.random.default_rng(0).bytes(300_000)
    server.files["/f"], server.faults["/f"] = body, ["cut", "no range"] if fault == "no range" else [fault, fault]
    download(f"{server.url}/f", tmp_path / "f", sha256_is(body))
    assert (tmp_path / "f").read_bytes() == body and os.listdir(tmp_path) == ["f"]
    assert not server.faults["/f"]
    if fault in ("cut", "stall"):  # a half, then a half of the rest, in whole chunks
        assert [asked for _, asked in server.log] == [None, "bytes=131072-", "bytes=196608-"]
    n = len(server.log)
    download(f"{server.url}/f", tmp_path / "f")
    assert len(server.log) == n  # it is there


@pytest.mark.parametrize("fault", ["cut", "html", 503, "stall"])
def test_a_length_that_nobody_knew_before(fault, server, tmp_path):
    """Ready-made shards come without size and hash: what the server announces must arrive."""
    server.files["/f"], server.faults["/f"] = b"0123456789" * 1000, [fault]
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.files["/f"]


def test_a_network_that_drops_more_often_than_there_are_attempts(server, tmp_path):
    """Bugs: a file of gigabytes given up though each attempt brings some of it; another part taken for the next."""
    body = np.random.default_rng(0).bytes(2**22)
    server.files["/f"], server.faults["/f"] = body, ["cut", "other part", "cut", "cut", "cut", "cut"]
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == body and not server.faults["/f"]


def test_giving_up_keeps_what_is_there_and_a_refusal_is_final(server, tmp_path):
    """Bug: hours of waiting for what a server will never give."""
    body = b"0123456789" * 20_000
    server.files["/f"], server.faults["/f"] = body, ["cut", *[500] * 9]
    with pytest.raises(UserError, match="answers 500, 4 times in a row; the same command later continues"):
        download(f"{server.url}/f", tmp_path / "f")
    assert os.listdir(tmp_path) == ["f.part"] and (tmp_path / "f.part").read_bytes() == body[:65536]
    server.faults["/f"] = []
    download(f"{server.url}/f", tmp_path / "f")
    assert server.log[-1] == ("/f", "bytes=65536-") and (tmp_path / "f").read_bytes() == body
    n = len(server.log)
    with pytest.raises(UserError, match="answers 404"):
        download(f"{server.url}/none", tmp_path / "none")
    server.faults["/f"] = [403]
    with pytest.raises(UserError, match=r"answers 403 \(its terms"):
        download(f"{server.url}/f", tmp_path / "g")
    assert len(server.log) == n + 2


def test_other_bytes_for_ever_are_an_error_and_not_kept(server, tmp_path):
    server.files["/f"] = b"x" * 1000
    with pytest.raises(UserError, match="sha256 differs"):
        download(f"{server.url}/f", tmp_path / "f", sha256_is(b"y" * 1000))
    assert not os.listdir(tmp_path)


def test_a_server_that_always_breaks_off_at_the_same_byte_is_left(server, tmp_path):
    """Bug: bytes that arrive again and again taken for progress, for ever."""
    server.files["/f"], server.faults["/f"] = b"x" * 200_000, ["no range cut"] * 9
    with pytest.raises(UserError, match="4 times in a row"):
        download(f"{server.url}/f", tmp_path / "f")
    assert len(server.log) == 4


def test_a_disk_without_room_is_said_before_it_is_full(server, tmp_path, monkeypatch):
    server.files["/f"] = b"x" * 1000
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(UserError, match=r"needs 1,000 more bytes .* has 999"):
        download(f"{server.url}/f", tmp_path / "f")


# --- a dataset on the hub, read by `datasets` in a process of its own, for which the hub is the server above

SHARD_TOKENS = 1100  # two pieces for each file
NAMES = ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet", "sample/10BT/010_00000.parquet"]
API, FILES = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve"


def tree(names, folder, recursive) -> list:
    """What the hub says of the files and folders in a folder."""
    found = {}
    for name, body in names.items():
        if name.startswith(folder):
            inside = name[len(folder) :].split("/")
            for n in range(1, len(inside) + 1 if recursive else 2):
                path = folder + "/".join(inside[:n])
                about = {"type": "file", "size": len(body)} if path == name else {"type": "directory", "size": 0}
                found[path] = about | {"oid": hashlib.sha1(path.encode()).hexdigest(), "path": path}
    return list(found.values())


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """FineWeb-Edu in small: three files of 40 documents in row groups of 15. The working directory is empty."""
    texts = [f"Document {i}: " + "some words to read, " * (i % 9 + 1) for i in range(120)]
    names = {"README.md": CARD, "data/CC-1/0.parquet": b"not asked for"}
    for k, name in enumerate(NAMES):
        table = pyarrow.table({"text": texts[40 * k : 40 * k + 40], "id": list(range(40)), "score": [3.0] * 40})
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "local" / name, row_group_size=15)
        names[name] = (tmp_path / "local" / name).read_bytes()
    lines = "".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(30))
    names["other/1.jsonl"], names["other/notes.jsonl"] = lines.encode(), b"not asked for"
    for name, body in names.items():
        server.files |= {f"{FILES}/{commit}/{name}": body for commit in ("main", SHA)}
    info = {"_id": "1", "id": NAME, "sha": SHA, "siblings": [{"rfilename": name} for name in names], "tags": []}
    info |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    server.info |= {f"{API}{revision}": info for revision in ("", "/revision/main", f"/revision/{SHA}")}
    for folder in "", "data/", "data/CC-1/", "sample/", "sample/10BT/", "other/":
        for recursive in "true", "false":
            path = f"{API}/tree/{SHA}/{folder}".rstrip("/")
            server.info[f"{path} recursive={recursive}"] = tree(names, folder, recursive == "true")
    monkeypatch.chdir(tmp_path)
    return server


@pytest.fixture
def start(hub, byte_tokenizer, tmp_path):
    """Starts prepare_fineweb.py with the hub at HF_ENDPOINT; returns the process."""
    (tmp_path / "vocabulary").mkdir()
    byte_tokenizer.save(tmp_path / "vocabulary")
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "no_proxy": "*"}
    argv = [sys.executable, str(ROOT / "prepare_fineweb.py"), "--tokenizer", "vocabulary", "--num_proc", "1"]
    argv += ["--val_share", "0.2", "--shard_tokens", str(SHARD_TOKENS)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return lambda *flags: subprocess.Popen([*argv, *flags], env=env, **pipes)


@pytest.fixture
def made(start):
    def finished(*flags):
        process = start(*flags)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    return finished


def from_disk(out_dir):
    """The same from the same files on this machine."""
    flags = dict(local_files="local/**/*.parquet", tokenizer="vocabulary", val_share=0.2, shard_tokens=SHARD_TOKENS)
    prepare_fineweb.prepare(prepare_fineweb.PrepareConfig(out_dir=out_dir, num_proc=1, **flags))


def shards(directory):
    folders = Path(directory), Path(f"{directory}_val")
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for d in folders for p in sorted(d.glob("*.npy"))]


def test_a_dataset_is_read_at_one_commit_in_order(hub, made):
    """Bugs: files of other configurations; order; a dataset asked for again when all is done; patterns of the card."""
    made("--out_dir", "d")
    from_disk("e")
    assert shards("d") == shards("e") and len(shards("d")) > 5
    manifest = json.loads(Path("d", MANIFEST).read_text())
    assert manifest["source"] == {
        "dataset": NAME, "subset": "sample-10BT", "split": "train", "revision": None, "text_column": "text"
    }  # fmt: skip
    assert manifest["source_version"] == SHA
    assert not any("data/CC-1/0" in path for path, _ in hub.log)
    for file in Path("d", MANIFEST), Path("d_val", MANIFEST):  # as it was written when the default had no name in it
        older = json.loads(file.read_text())
        older["source"] |= {"dataset": None, "subset": None}
        file.write_text(json.dumps(older))
    n = len(hub.log)
    assert "already prepared" in made("--out_dir", "d") and len(hub.log) == n
    made("--out_dir", "f", "--dataset", NAME, "--subset", "sample-10BT", "--split", "test", "--revision", SHA)
    assert json.loads(Path("f", MANIFEST).read_text())["documents"] + len(list(Path("f_val").glob("*.npy"))) > 20


def test_all_that_can_go_wrong_between_here_and_the_hub(hub, made):
    """Bugs: a night's work lost to one answer of 500; half a file taken for all of it; a stall without end."""
    from_disk("e")
    for name, faults in zip(NAMES, ([500, 500], ["cut", 429], ["stall"])):
        hub.faults[f"{FILES}/{SHA}/{name}"] = faults
    made("--out_dir", "d")
    assert shards("d") == shards("e") and not any(hub.faults.values())


def test_what_the_hub_does_not_have_is_one_line(start):
    """Bug: a traceback of a hundred lines about a name that was mistyped."""
    for flags, says in [
        (["--subset", "sample-11BT"], "sample-11BT"),
        (["--split", "validation"], "--split takes"),
        (["--dataset", "no/such"], "--local_files"),
        (["--text_column", "content"], "no column content, but text, id, score"),
    ]:
        process = start("--out_dir", "d", *flags)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1 and says in err, err


@pytest.mark.slow
def test_killed_while_reading_from_the_hub_the_same_command_goes_on(hub, start, made):
    """Killed four times; the rest is of the same commit though a newer one was made meanwhile."""
    from_disk("e")
    for n in 1, 2, 4, 5:
        process = start("--out_dir", "d")
        while process.poll() is None and len(list(Path("d").glob("pieces/0*.json"))) < n:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    newer = dict(hub.info[API], sha="deadbeef" * 5, siblings=[])
    hub.info |= {API: newer, f"{API}/revision/main": newer}
    made("--out_dir", "d")
    assert shards("d") == shards("e") and json.loads(Path("d", MANIFEST).read_text())["source_version"] == SHA


# --- shards that others have made


def llmc(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def npy(path, tokens):
    np.save(path, tokens.astype(np.uint16))
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["bin", "npy"])
def test_shards_that_others_have_made_are_fetched_and_read(kind, server, tmp_path, capsys):
    """llm.c's and build-nanogpt's names and layouts, with a download that breaks off; a rerun fetches nothing."""
    tokens = {f"fineweb_{s}_00000{i}": np.arange(100 + i) for s, i in (("val", 0), ("train", 1), ("train", 2))}
    for name, ids in tokens.items():
        server.files[f"/x/{name}.{kind}"] = llmc(ids) if kind == "bin" else npy(tmp_path / "x.npy", ids)
        server.faults[f"/x/{name}.{kind}"] = ["cut"]
    argv = [
        "--out_dir",
        str(tmp_path / "d"),
        "--token_shards",
        *(f"{server.url}{path}?download=true" for path in server.files),
    ]
    assert run(lambda: prepare_fineweb.main(argv)) == 0
    for split, expected in ("train", [*range(101), *range(102)]), ("val", [*range(100)]):
        data = FineWebDataset(tmp_path / "d", 8, split)
        assert data.tokens(0, data.n_tokens).tolist() == expected
    n = len(server.log)
    assert run(lambda: prepare_fineweb.main(argv)) == 0 and len(server.log) == n


def test_what_is_no_shard_is_not_kept_as_one(server, tmp_path, capsys):
    server.files |= {"/a_000001.bin": b"no shard" * 999, "/b.bin": llmc(np.arange(9))[:-2]}

    def refused(*urls):
        argv = ["--out_dir", str(tmp_path / "d"), "--token_shards", *urls]
        assert run(lambda: prepare_fineweb.main(argv)) == 2
        return capsys.readouterr().err

    assert "magic" in refused(f"{server.url}/a_000001.bin")
    assert "announces 9 tokens" in refused(f"{server.url}/b.bin")
    assert not list((tmp_path / "d").iterdir())
    for url in (f"{server.url}/c.txt", "ftp://x/a.bin", "a.bin", f"{server.url}/.bin", f"{server.url}/"):
        assert "expected http(s)" in refused(url)
    assert "twice" in refused(f"{server.url}/b.bin", f"{server.url}/x/b.bin")
