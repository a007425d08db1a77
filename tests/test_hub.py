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

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import journal
import prepare_fineweb
import sources
from data_processing_fineweb import MANIFEST, FineWebDataset
from prepare_fineweb import prepare
from support import download as download_module
from support.cli import UserError, run
from support.download import download

ROOT = Path(prepare_fineweb.__file__).parent
BROKEN = "cut", "stall", "no range cut"
SHA = "c0ffee" + "0" * 34
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
    ]
}


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
        path, asked = self.path.split("?")[0], self.headers.get("Range")
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
            return self.answer(404, b"")
        body = self.server.files[path]
        start = (
            int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and fault not in ("no range", "no range cut") else 0
        )
        if start >= len(body):
            return self.answer(416, b"")
        more = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        if fault == "other bytes":
            body = bytes(len(body))
        rest = body[start:]
        if fault == "wrong length":  # a proxy that cut the file, and knows no better
            rest = rest[: len(rest) // 2]
        self.answer(206 if start else 200, rest, more, len(rest) // 2 if fault in BROKEN else None)
        if fault == "stall":
            time.sleep(3)
        if fault in BROKEN:
            self.close_connection = True

    def answer(self, code, body, headers=None, sent=None):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:sent])
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


FAULTS = ["cut", 500, "html", "stall", "wrong length", "other bytes", "no range", 429]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_arrives_whole_whatever_happens_on_the_way(fault, server, tmp_path):
    """Bugs: half a file, an error page or other bytes kept as data; all begun anew when the network drops."""
    body = np.random.default_rng(0).bytes(300_000)
    server.files["/f"], server.faults["/f"] = body, ["cut", "no range"] if fault == "no range" else [fault, fault]
    download(f"{server.url}/f", tmp_path / "f", len(body), hashlib.sha256(body).hexdigest())
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


def test_giving_up_keeps_what_is_there_and_a_refusal_is_final(server, tmp_path):
    """Bug: hours of waiting for what a server will never give."""
    body = b"0123456789" * 20_000
    server.files["/f"], server.faults["/f"] = body, ["cut", *[500] * 9]
    with pytest.raises(UserError, match="answers 500, 4 times in a row; the same command later goes on"):
        download(f"{server.url}/f", tmp_path / "f", len(body))
    assert os.listdir(tmp_path) == ["f.part"] and (tmp_path / "f.part").read_bytes() == body[:65536]
    server.faults["/f"] = []
    download(f"{server.url}/f", tmp_path / "f", len(body))
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
        download(f"{server.url}/f", tmp_path / "f", 1000, hashlib.sha256(b"y" * 1000).hexdigest())
    assert not os.listdir(tmp_path)


def test_a_server_that_always_breaks_off_at_the_same_byte_is_left(server, tmp_path):
    """Bug: bytes that arrive again and again taken for progress, for ever."""
    server.files["/f"], server.faults["/f"] = b"x" * 200_000, ["no range cut"] * 9
    with pytest.raises(UserError, match="4 times in a row"):
        download(f"{server.url}/f", tmp_path / "f", 200_000)
    assert len(server.log) == 4


def test_a_disk_without_room_is_said_before_it_is_full(server, tmp_path, monkeypatch):
    server.files["/f"] = b"x" * 1000
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(UserError, match=r"needs 1,000 more bytes .* has 999"):
        download(f"{server.url}/f", tmp_path / "f", 1000)


# --- a dataset on the hub

NAMES = ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet", "sample/10BT/010_00000.parquet"]


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """FineWeb-Edu in small: three files of 40 documents in row groups of 15. The working directory is empty."""
    texts = [f"Document {i}: " + "some words to read, " * (i % 9 + 1) for i in range(120)]
    for k, name in enumerate(NAMES):
        part = texts[40 * k : 40 * k + 40]
        table = pyarrow.table({"text": part, "id": [f"<urn:{40 * k + i}>" for i in range(40)], "score": [3.0] * 40})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=15)
        server.files[f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{SHA}/{name}"] = (
            tmp_path / "x.parquet"
        ).read_bytes()
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.parquet").rename(tmp_path / "local" / name)
    server.files[f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{SHA}/data/CC-1/0.parquet"] = b"not asked for"
    siblings = [{"rfilename": "README.md", "size": 9, "blobId": "b"}]
    for path, body in server.files.items():
        lfs = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "pointerSize": 134}
        siblings.append({"rfilename": path.split(f"{SHA}/")[1], "size": len(body), "blobId": "b", "lfs": lfs})
    info = {"_id": "1", "id": "HuggingFaceFW/fineweb-edu", "sha": SHA, "siblings": siblings, "cardData": CARD}
    info |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    for revision in ("", "/revision/main", f"/revision/{SHA}"):
        server.info[f"/api/datasets/HuggingFaceFW/fineweb-edu{revision}"] = info
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(journal, "draw_lengths", lambda lengths, path: None)
    monkeypatch.chdir(tmp_path)
    return server


@pytest.fixture
def options(byte_tokenizer, tmp_path):
    (tmp_path / "vocabulary").mkdir()
    byte_tokenizer.save(tmp_path / "vocabulary")
    return dict(tokenizer=tmp_path / "vocabulary", val_share=0.2, shard_tokens=700, num_proc=1)


def shards(directory):
    folders = Path(directory), Path(f"{directory}_val")
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for d in folders for p in sorted(d.glob("*.npy"))]


def fetched(hub):
    return [path.rsplit("/", 1)[1] for path, _ in hub.log if "/resolve/" in path]


def test_hub_files_of_one_commit_pass_through_in_order(hub, options):
    """Bugs: a newer commit in the midst; files of other configurations; order; files left over."""
    made = prepare("d", **options)
    prepare("e", local_files=["local/**/*.parquet"], **options)
    assert shards("d") == shards("e") and len(shards("d")) > 8
    assert made["train"]["source"] == {
        "dataset": "HuggingFaceFW/fineweb-edu", "subset": "sample-10BT", "revision": None, "text_column": "text"
    }  # fmt: skip
    assert made["train"]["source_version"] == made["val"]["source_version"] == SHA
    assert fetched(hub) == [Path(name).name for name in NAMES]
    assert not Path("d_downloads").exists() and not list(Path("d").glob(".*"))
    n = len(hub.log)
    assert prepare("d", **options) == made and len(hub.log) == n  # complete: nobody is asked
    prepare("k", keep_downloads=True, **options)
    assert sorted(p.name for p in Path("k_downloads").rglob("*.parquet")) == [Path(name).name for name in NAMES]


def test_all_that_can_go_wrong_between_here_and_the_hub(hub, options):
    prepare("e", local_files=["local/**/*.parquet"], **options)
    hub.faults["/api/datasets/HuggingFaceFW/fineweb-edu"] = [500, 503, "html"]
    for name, faults in zip(NAMES, (["cut", 500, 500], ["html", "stall", "other bytes"], ["wrong length", 429, "cut"])):
        hub.faults[f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{SHA}/{name}"] = faults
    prepare("d", **options)
    assert shards("d") == shards("e") and not any(hub.faults.values())


def test_a_hub_that_goes_away_is_an_error_and_a_rerun_goes_on_at_the_same_commit(hub, options, capsys, monkeypatch):
    """Bugs: begun anew after a night; the rest taken from a commit that was made meanwhile."""
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0)
    monkeypatch.setattr(prepare_fineweb, "BATCH_ROWS", 8)
    last = f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{SHA}/{NAMES[2]}"
    hub.faults[last] = [500] * 8
    with pytest.raises(UserError, match=r"010_00000.parquet: the server answers 500.*goes on"):
        prepare("d", **options)
    assert not list(Path().glob(f"d*/{MANIFEST}"))
    hub.faults[last], before = [], len(hub.log)
    newer = dict(hub.info["/api/datasets/HuggingFaceFW/fineweb-edu"], sha="deadbeef" * 5, siblings=[])
    hub.info["/api/datasets/HuggingFaceFW/fineweb-edu"] = newer
    made = prepare("d", **options)
    assert "going on after" in capsys.readouterr().err
    assert [path for path, _ in hub.log[before:]] == [f"/api/datasets/HuggingFaceFW/fineweb-edu/revision/{SHA}", last]
    prepare("e", local_files=["local/**/*.parquet"], **options)
    assert shards("d") == shards("e") and made["train"]["source_version"] == SHA
    assert not Path("d_downloads").exists()


def test_a_file_goes_when_its_tokens_are_safe_and_not_before(hub, options, monkeypatch):
    """Bugs: disk for all files at once; a file deleted whose tokens are not in the journal yet."""
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0)
    monkeypatch.setattr(prepare_fineweb, "BATCH_ROWS", 8)
    save, seen = journal.Output.save, []

    def saved(output, position):
        there = {p.name[:3] for p in Path("d_downloads").rglob("*.parquet")}
        if position > (0, 0):
            needed = Path(NAMES[position[0]]).name[:3]
            assert needed in there or position[1] == 40, f"{needed} is gone at {position}"
        save(output, position)
        seen.append(len(there))

    monkeypatch.setattr(journal.Output, "save", saved)
    prepare("d", **options)
    assert len(seen) > 10 and max(seen) <= 3 and seen[-1] < 3
    assert max(seen[8:]) <= 2  # the one that is read, and the next


def test_a_hub_out_of_reach_and_names_it_does_not_have(hub, options, capsys, monkeypatch):
    hub.faults["/api/datasets/HuggingFaceFW/fineweb-edu"] = [500] * 4
    argv = [f"--{k}={v}" for k, v in options.items()]

    def refused(*more):
        capsys.readouterr()
        assert run(lambda: prepare_fineweb.main([*argv, *more])) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "the hub could not be read" in refused() and "--local_files" in refused("--dataset", "no/such")
    assert "sample-10BT" in refused("--subset", "sample-11BT")
    assert "no column 'content', but text, id, score" in refused("--text_column", "content")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in refused()
    assert not list(Path().glob(f"edu*/{MANIFEST}"))


def two_splits(name):
    files = [{"split": "test", "path": "sample/**"}, {"split": "train", "path": ["top.*", "data/**/*.zst"]}]
    return {"configs": [{"config_name": name, "data_files": files}]}


@pytest.mark.parametrize(
    ("subset", "card", "expected"),
    [
        ("sample-10BT", CARD, NAMES),
        ("sample/10BT", CARD, NAMES),
        (None, CARD, ["data/CC-1/0.parquet", "data/CC-1/b.jsonl.zst"]),
        (None, None, ["data/CC-1/0.parquet", "data/CC-1/b.jsonl.zst", *NAMES, "top.jsonl"]),
        ("x", {"configs": [{"config_name": "x", "data_files": "*.jsonl"}]}, ["top.jsonl"]),
        ("x", two_splits("x"), ["data/CC-1/b.jsonl.zst", "top.jsonl"]),
    ],
)  # fmt: skip
def test_which_files_a_configuration_has(subset, card, expected):
    """Bugs: test splits trained on; `*` that reaches into folders; 10 before 2."""
    names = [*reversed(NAMES), "data/CC-1/0.parquet", "README.md", "top.jsonl", "data/CC-1/b.jsonl.zst", "x.py"]
    siblings = [SimpleNamespace(rfilename=name, size=1, lfs=None) for name in names]
    card_data = card and SimpleNamespace(to_dict=lambda: card)
    info = SimpleNamespace(sha=SHA, card_data=card_data, siblings=siblings)
    assert [f.name for f in sources.files_of("a/b", subset, info)] == expected


@pytest.mark.slow
def test_killed_while_fetching_the_command_line_goes_on(hub, options, tmp_path):
    """The real command with HF_ENDPOINT set, killed four times in downloads and between."""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": hub.url}
    argv = [
        sys.executable,
        str(ROOT / "prepare_fineweb.py"),
        "--out_dir",
        "d",
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    for name in NAMES:  # each stalls after a half, where the process is killed
        hub.faults[f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{SHA}/{name}"] = ["stall"]
    asked = 0
    for _ in range(4):
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(fetched(hub)) <= asked:
            time.sleep(0.05)
        asked = len(fetched(hub))
        time.sleep(0.5)
        process.kill()
        process.wait()
    result = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    prepare("e", local_files=["local/**/*.parquet"], **options)
    assert shards("d") == shards("e") and not Path("d_downloads").exists()


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
