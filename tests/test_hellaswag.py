"""HellaSwag: the batched scores against a plain loop, the file's lines, and the ways a download goes wrong."""

import copy
import hashlib
import http.server
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import hellaswag_eval as hs
from errors import UserError, run
from model import GPT, GPTConfig
from tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One id per byte, and the marker: 257 ids, so that a test knows how many tokens a text has."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return TextTokenizer(backend, "bytes")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(block_size=48, vocab_size=320, valid_vocab_size=257, n_layer=2, n_head=2, n_embd=32, dropout=0.5)
    gpt = GPT(config)
    with torch.no_grad():
        gpt.wte.weight.mul_(20)  # far from uniform, so that endings differ in more than their length
    return gpt


def make_examples(n=11, longest=24):
    """Texts of many lengths, the same at every call; none longer than the model's context."""
    rng = np.random.default_rng(1)

    def text(least, most):
        return "".join(rng.choice(list("abcdefgh éß"), rng.integers(least, most))).strip() or "x"

    return [
        {"ctx": text(1, 12), "label": int(rng.integers(4)), "endings": [text(1, longest) for _ in range(4)]}
        for _ in range(n)
    ]


def plain_score(model, tokenizer, example):
    """One ending at a time, no padding, every logit: the convention as a reader would write it."""
    sums, tokens = [], []
    for ending in example["endings"]:
        context, ids = tokenizer.encode(example["ctx"]), tokenizer.encode(" " + ending)
        with torch.no_grad():
            log_p = model(torch.tensor([context + ids]))[0].log_softmax(-1)
        sums.append(sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(ids)))
        tokens.append(len(ids))
    return sums, tokens


def test_batches_give_what_a_plain_loop_gives(model, tokenizer):
    """Guards the shift by one, the padding and the gathering of positions."""
    examples = make_examples()
    scores = hs.score(model, tokenizer, examples, batch_tokens=100)
    model.eval()
    reference = [plain_score(model, tokenizer, e) for e in examples]
    model.train()
    sums, tokens = (np.array(column) for column in zip(*reference))
    np.testing.assert_allclose(scores.sums, sums, atol=1e-4)
    assert (scores.tokens == tokens).all()
    assert (scores.choices()["completion_acc"] == sums.argmax(1)).all()
    assert (scores.choices()["completion_acc_norm"] == (sums / tokens).argmax(1)).all()
    assert (sums.argmax(1) != (sums / tokens).argmax(1)).any()  # or the test could not tell them apart
    labels = np.array([e["label"] for e in examples])
    summary = scores.summary()
    assert summary["completion_acc"] == (sums.argmax(1) == labels).mean()
    assert summary["completion_acc_norm"] == ((sums / tokens).argmax(1) == labels).mean()
    assert summary["examples"] == 11 and summary["truncated"] == 0


@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000])
def test_batch_size_does_not_matter(model, tokenizer, batch_tokens):
    examples = make_examples()
    a = hs.score(model, tokenizer, examples)
    b = hs.score(model, tokenizer, examples, batch_tokens=batch_tokens)
    np.testing.assert_allclose(a.sums, b.sums, atol=1e-4)
    assert a.summary() == b.summary()


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_logits_in_parts(model, tokenizer, monkeypatch, limit):
    """Guards the border between two blocks of logits."""
    examples = make_examples(3)
    whole = hs.score(model, tokenizer, examples).sums
    monkeypatch.setattr(hs, "LOGIT_ROWS", limit)
    np.testing.assert_allclose(hs.score(model, tokenizer, examples).sums, whole, atol=1e-4)


def test_batches_keep_the_budget_and_every_row():
    rows = [([0] * n, 1) for n in [3, 9, 2, 50, 9, 4, 9]]
    found = list(hs.batches(rows, 20))
    assert sorted(r for batch in found for r in batch) == list(range(7))
    assert found[0] == [3]  # alone, as it exceeds the budget by itself
    assert all(len(b) * (max(len(rows[r][0]) for r in b) - 1) <= 20 for b in found[1:])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_tokens", [60, 100_000])  # uneven shares; one batch, so ranks without any
def test_world_size_does_not_matter(model, tokenizer, world, batch_tokens):
    """Bit for bit: the ranks share the batches of a single rank, and never make other ones."""
    examples = make_examples()
    single = hs.score(model, tokenizer, examples, batch_tokens=batch_tokens)
    shares = []
    for rank in range(world):
        args = {"batch_tokens": batch_tokens, "rank": rank, "world": world}
        hs.score(model, tokenizer, examples, reduce=lambda t: shares.append(t) or t, **args)
    for rank in range(world):
        args = {"batch_tokens": batch_tokens, "rank": rank, "world": world}
        whole = hs.score(model, tokenizer, examples, reduce=lambda t: sum(shares), **args)
        assert (whole.sums == single.sums).all()
        assert whole.summary() == single.summary()


def test_too_long_rows_lose_their_beginning_and_are_counted(model, tokenizer):
    T = model.config.block_size
    fits = {"ctx": "c" * (T - 9), "label": 0, "endings": ["e" * 9, "e", "ee", "eee"]}  # T + 1 ids: the last is not read
    long_context = {"ctx": "c" * (T - 8), "label": 0, "endings": ["e" * 9, "e", "ee", "eee"]}
    long_ending = {"ctx": "c", "label": 0, "endings": ["e" * (T + 5), "e", "ee", "eee"]}
    assert hs.evaluate(model, tokenizer, [fits])["truncated"] == 0
    assert hs.evaluate(model, tokenizer, [fits, long_context, long_ending])["truncated"] == 2
    scores = hs.score(model, tokenizer, [long_context, long_ending])
    assert scores.tokens.tolist() == [[10, 2, 3, 4], [T, 2, 3, 4]]
    short = {**long_context, "ctx": "c" * (T - 9)}  # cutting by hand what is cut from the left
    np.testing.assert_allclose(scores.sums[0, 0], hs.score(model, tokenizer, [short]).sums[0, 0], atol=1e-4)


def test_ties_and_an_empty_context(model, tokenizer):
    scores = hs.score(model, tokenizer, [{"ctx": "", "label": 1, "endings": ["same"] * 4}])
    assert np.isfinite(scores.sums).all()
    scores.sums[:] = -1.0
    assert [choice.tolist() for choice in scores.choices().values()] == [[0], [0]]


def test_training_is_not_disturbed(model, tokenizer):
    """Guards the mode, the random stream and the gradients, also where the evaluation is interrupted."""
    model.train()
    before = torch.get_rng_state()
    a = hs.evaluate(model, tokenizer, make_examples(3))
    assert a == hs.evaluate(model, tokenizer, make_examples(3))  # no dropout
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())

    def stop(sums, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hs.evaluate(model, tokenizer, make_examples(3), progress=stop)
    assert model.training


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_softmax_is_float32(model, how):
    """bfloat16 log-probabilities have three digits: they would lie on a coarse grid."""
    rows = [([i, 2 * i, 250 - i], 1) for i in range(20)]
    rough = copy.deepcopy(model.eval())
    if how == "weights":
        rough = rough.bfloat16()
    with torch.inference_mode():
        exact = hs.score_batch(model, rows, "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = torch.tensor(hs.score_batch(rough, rows, "cpu"), dtype=torch.float64)
    np.testing.assert_allclose(found, exact, atol=0.5)
    assert (found.bfloat16().double() != found).sum() > 10


def test_a_model_without_finite_numbers_has_no_accuracy(tokenizer):
    gpt = GPT(GPTConfig(block_size=48, vocab_size=257, valid_vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        gpt.wte.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="example 0 no finite"):
        hs.evaluate(gpt, tokenizer, make_examples(2))


# ---------------------------------------------------------------------------------------
# Files.

GOOD = {"ctx": "A man sits.", "label": 2, "endings": ["a", "b", "c", "d"]}


def write_lines(path, *lines):
    """Bytes and strings as they are, objects as JSON."""
    lines = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line, why",
    [
        ("", "not JSON: Expecting value at column 1"),
        ('{"ctx": "cut', "Unterminated"),
        ('{"ctx": "\udcff"}'.encode("utf-8", "surrogateescape"), "can't decode byte 0xff"),
        ("[1, 2]", "a JSON list"),
        ("[" * 100_000, "recursion"),
        ({**GOOD, "ctx": 5}, "ctx is 5"),
        ({**GOOD, "label": 4}, "label is 4"),
        ({**GOOD, "label": "2"}, "label is '2'"),
        ({**GOOD, "label": True}, "label is True"),
        ({**GOOD, "endings": ["a", "b", "c"]}, "expected 4 strings"),
        ({**GOOD, "endings": ["a", "b", "c", ""]}, "none of them empty"),
        ({**GOOD, "endings": ["a", "b", "c", 1]}, "expected 4 strings"),
        ({"label": 1}, "ctx is None"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, why):
    path = write_lines(tmp_path / "some.jsonl", GOOD, line, GOOD)
    with pytest.raises(UserError, match=rf"some\.jsonl, line 2: .*{why}"):
        hs.load_examples(path)


def test_local_files(tmp_path):
    path = write_lines(tmp_path / "some.jsonl", GOOD, {**GOOD, "label": 0}, GOOD)
    assert [e["label"] for e in hs.load_examples(path)] == [2, 0, 2]
    assert [e["label"] for e in hs.load_examples(path, limit=2)] == [2, 0]
    with pytest.raises(UserError, match="no examples"):
        hs.load_examples(write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"missing\.jsonl: cannot be read"):
        hs.load_examples(tmp_path / "missing.jsonl")


def test_the_real_file(test_data):
    examples = hs.load_examples(test_data / "hellaswag" / "hellaswag_val.jsonl")
    assert len(examples) == hs.LINES
    assert Counter(e["label"] for e in examples) == {0: 2515, 1: 2485, 2: 2584, 3: 2458}


# ---------------------------------------------------------------------------------------
# Downloads, from a server on this machine that follows a script of faults.

BODY = b"".join(json.dumps({**GOOD, "label": i % 4}).encode() + b"\n" for i in range(20))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(script, served): request number i is answered as script[i] says, the last entry for ever.

    An entry is (status, body, bytes promised beyond the body, seconds of silence after it).
    """
    script, served = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, missing, silence = script[min(len(served), len(script) - 1)]
            served.append(status)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + missing))
            self.end_headers()
            self.wfile.write(body)
            threading.Event().wait(silence)

        def log_message(self, *args):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hs, "URL", f"http://127.0.0.1:{http_server.server_port}/val.jsonl")
    monkeypatch.setattr(hs, "LINES", 20)
    monkeypatch.setattr(hs, "BLOB", hashlib.sha1(b"blob %d\0" % len(BODY) + BODY).hexdigest())
    monkeypatch.setattr(hs, "TIMEOUT", 0.2)
    monkeypatch.setattr(hs.time, "sleep", lambda seconds: None)
    yield script, served
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


FAULTS = {
    "server error": (500, b"sorry", 0, 0),
    "not found": (404, b"not found", 0, 0),
    "page": (200, b"<html><body>Log in to this network</body></html>", 0, 0),
    "cut body": (200, BODY[:300], len(BODY) - 300, 0),
    "cut body, honest length": (200, BODY[:300], 0, 0),
    "one bit": (200, BODY.replace(b"sits", b"sitr", 1), 0, 0),
    "silence": (200, BODY[:300], len(BODY) - 300, 0.4),
    "empty": (200, b"", 0, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_twice_then_good(server, tmp_path, fault):
    script, served = server
    script += [FAULTS[fault], FAULTS[fault], (200, BODY, 0, 0)]
    assert len(hs.load_examples()) == 20
    assert len(served) == 3
    assert files_below(tmp_path) == ["hellaswag/hellaswag_val.jsonl"]
    assert hs.CACHE.read_bytes() == BODY


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_for_ever_leaves_nothing(server, tmp_path, fault):
    script, served = server
    script.append(FAULTS[fault])
    with pytest.raises(UserError, match=r"Fetch http.*val\.jsonl .*put it at hellaswag.hellaswag_val\.jsonl.*--data"):
        hs.load_examples()
    assert len(served) == hs.ATTEMPTS
    assert files_below(tmp_path) == []


def test_endless_body(server, tmp_path, monkeypatch):
    """Guards memory: reading stops, whatever length is promised."""
    script, _ = server
    script.append((200, BODY * 100, 0, 0))
    monkeypatch.setattr(hs, "MAX_BYTES", 2 * len(BODY))
    with pytest.raises(UserError, match="no end after"):
        hs.download()
    assert files_below(tmp_path) == []


def test_corrupt_cache_is_fetched_again(server, tmp_path, capsys):
    script, served = server
    script.append((200, BODY, 0, 0))
    hs.CACHE.parent.mkdir()
    for bad in (BODY[:-1] + b"x", BODY[:300], b"", b"<html>"):
        hs.CACHE.write_bytes(bad)
        assert hs.download().read_bytes() == BODY
        assert "fetching it again" in capsys.readouterr().err
    assert len(served) == 4
    assert files_below(tmp_path) == ["hellaswag/hellaswag_val.jsonl"]


def test_good_cache_needs_no_network(server, monkeypatch):
    hs.CACHE.parent.mkdir()
    hs.CACHE.write_bytes(BODY)
    monkeypatch.setattr(hs.requests, "get", lambda *args, **kwargs: pytest.fail("went to the network"))
    assert len(hs.load_examples(limit=7)) == 7


def test_offline_without_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hs, "URL", "http://127.0.0.1:9/val.jsonl")  # nobody listens there
    monkeypatch.setattr(hs.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"no connection.* Fetch .* put it at .*--data PATH"):
        hs.load_examples()
    assert files_below(tmp_path) == []


def test_offline_is_noticed_soon(tmp_path, monkeypatch):
    """Where names are looked up in vain, one attempt takes half a minute."""
    calls = []

    def get(*args, **kwargs):
        calls.append(args)
        raise hs.requests.ConnectionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hs.requests, "get", get)
    monkeypatch.setattr(hs, "OFFLINE", -1)
    with pytest.raises(UserError, match="no connection"):
        hs.load_examples()
    assert len(calls) == 1


def test_unwritable_folder(server, tmp_path):
    script, _ = server
    script.append((200, BODY, 0, 0))
    (tmp_path / "hellaswag").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        hs.download()


# ---------------------------------------------------------------------------------------
# The command line.


@pytest.fixture
def command_line(tmp_path, monkeypatch, model, tokenizer):
    """Runs main() on the tiny model and a local file of 11 examples, with the given flags besides."""
    monkeypatch.setattr(hs, "find_checkpoint", lambda path: tmp_path)
    monkeypatch.setattr(hs, "load_model", lambda path, device: (model.eval(), tokenizer))
    data = write_lines(tmp_path / "some.jsonl", *make_examples())
    return lambda *flags: run(lambda: hs.main(["--device", "cpu", "--dtype", "float32", "--data", str(data), *flags]))


def test_command_line(command_line, tmp_path, capsys, model, tokenizer):
    out = tmp_path / "scores.jsonl"
    assert command_line("--limit", "7", "--batch_tokens", "64", "--json", str(out)) == 0
    table = capsys.readouterr().out
    for words in ("completion acc ", "completion acc_norm ", "28.59", "29.55", "25.00", "±", "7 examples"):
        assert words in table
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    scores = hs.score(model, tokenizer, make_examples()[:7])
    assert [line["index"] for line in lines] == list(range(7))
    assert [line["label"] for line in lines] == scores.labels.tolist()
    assert [line["tokens"] for line in lines] == scores.tokens.tolist()
    assert [line["choices"]["completion_acc_norm"] for line in lines] == scores.choices()[
        "completion_acc_norm"
    ].tolist()
    np.testing.assert_allclose([line["sums"] for line in lines], scores.sums, atol=1e-4)


def test_command_line_errors(command_line, tmp_path, capsys):
    assert command_line("--data", str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    assert command_line("--json", str(tmp_path / "some.jsonl" / "x")) == 2  # below a file
    assert "cannot be written" in capsys.readouterr().err
    assert command_line("--limit", "0", "--batch_tokens", "-1") == 2
    err = capsys.readouterr().err
    assert "--limit is 0" in err and "--batch_tokens is -1" in err


def test_out_of_memory_names_the_flag(command_line, model, monkeypatch, capsys):
    def features(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "features", features)
    assert command_line() == 2
    assert "lower --batch_tokens" in capsys.readouterr().err


def test_bar_counts_complete_examples():
    class Bar:
        n, text = 0, ""

        def update(self, more):
            self.n += more

        def set_postfix(self, completion_acc, refresh):
            self.text = completion_acc

    bar, labels = Bar(), np.array([1, 0])
    progress = hs.running_accuracy(bar, labels)
    sums, done = np.array([-2.0, -1, -3, -4, -9, -8, -7, -6]), np.array([True] * 3 + [False] * 5)
    progress(sums, done)
    assert (bar.n, bar.text) == (0, "-")
    done[3] = True
    progress(sums, done)
    assert (bar.n, bar.text) == (1, "100.00")
    done[:] = True
    progress(sums, done)
    assert (bar.n, bar.text) == (2, "50.00")
