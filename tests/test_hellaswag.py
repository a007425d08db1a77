"""HellaSwag: the batched scores against a plain loop, the file's lines, and the ways a download goes wrong."""

import copy
import hashlib
import http.server
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from tokenizers import Tokenizer, processors

import checkpoint
import export_hf
import hellaswag_eval as hs
from model import GPT, GPTConfig
from support import download as downloads
from support.cli import UserError, run
from support.runtime import keep_freed_memory
from tokenizer import load_tokenizer
from toy import bytes_only, eventually


@pytest.fixture(scope="module")
def tokenizer():
    """One id per byte, and the marker: 257 ids, so that a test knows how many tokens a text has."""
    return bytes_only()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"block_size": 112, "vocab_size": 320, "n_layer": 2, "n_head": 2, "n_embd": 32}
    gpt = GPT(GPTConfig(**shape, valid_vocab_size=257, dropout=0.5))
    with torch.no_grad():
        gpt.wte.weight.mul_(20)  # far from uniform, so that endings differ in more than their length
    return gpt


def make_examples(n=11, longest=24):
    """Texts of many lengths and with WikiHow's marks, the same at every call; no sequence exceeds the model's
    context, but some rows of four do."""
    rng = np.random.default_rng(1)

    def text(least, most):
        return "".join(rng.choice(list("abcdefgh éß"), rng.integers(least, most))).strip() or "x"

    def example(i):
        a, b = f"[header] {text(3, 20)} [title] X", text(1, 8) if i % 3 else ""
        endings = [("Same " if i % 2 else "") + text(1, longest) + ("" if i % 4 else " [step]  y") for _ in range(4)]
        context = {"activity_label": text(3, 9), "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}".strip()}
        return {**context, "label": int(rng.integers(4)), "endings": endings}

    return [example(i) for i in range(n)]


def simple_example(ctx="c", label=0, endings=("a", "b", "c", "d")):
    """One whose harness text is ": ", then the context."""
    return {"activity_label": "", "ctx_a": ctx, "ctx_b": "", "ctx": ctx, "label": label, "endings": list(endings)}


def clean(text):
    for mark in ("[header]", "[step]", "[substeps]"):
        text = text.strip().replace(" [title]", ". ").replace(mark, "")
    return text.replace("  ", " ")


def plain_score(model, tokenizer, example, convention):
    """(sums, units) of one ending at a time, no padding, every logit: the convention as a reader would write it."""
    sums, units = [], []
    for ending in example["endings"]:
        if convention == "completion":
            context, ids = tokenizer.encode(example["ctx"]), tokenizer.encode(" " + ending)
            units.append(len(ids))
        else:
            b = example["ctx_b"][:1].upper() + example["ctx_b"][1:].lower()
            context = tokenizer.encode(clean(example["activity_label"] + ": " + example["ctx_a"] + " " + b))
            ids = tokenizer.encode(" " + clean(ending))
            units.append(len(clean(ending)))
        with torch.no_grad():
            log_p = model(torch.tensor([context + ids]))[0].log_softmax(-1)
        sums.append(sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(ids)))
    return sums, units


def count_calls(model, monkeypatch):
    """A list that gets the name and the keywords of each call of the model's two methods."""
    calls = []
    for name in ("features", "logits"):
        method = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda *a, name=name, method=method, **k: calls.append((name, sorted(k))) or method(*a, **k)
        )
    return calls


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batches_give_what_a_plain_loop_gives(model, tokenizer, monkeypatch, packed, batch_tokens):
    """Guards the shift by one, positions and mask of packed rows, the padding, the gathering and both renderings."""
    examples, labels = make_examples(), np.array([e["label"] for e in make_examples()])
    model.eval()
    reference = {c: [plain_score(model, tokenizer, e, c) for e in examples] for c in hs.CONVENTIONS}
    model.train()
    calls = count_calls(model, monkeypatch)
    monkeypatch.setattr(model, "packed", packed, raising=False)
    scores = hs.score(model, tokenizer, examples, batch_tokens=batch_tokens)
    if batch_tokens == 1:  # rows one by one: rows of four and, where those exceed the context, of one
        kinds = {tuple(keywords) for name, keywords in calls if name == "features"}
        assert kinds == ({(), ("mask", "positions")} if packed else {()})
    choices, summary = scores.choices(), scores.summary()
    for convention, columns in reference.items():
        sums, units = (np.array(column) for column in zip(*columns))
        np.testing.assert_allclose(scores.sums[convention], sums, atol=1e-4)
        assert (scores.units[convention] == units).all()
        by_sum, by_mean = sums.argmax(1), (sums / units).argmax(1)
        assert (by_sum != by_mean).any()  # or the test could not tell them apart
        assert (choices[f"{convention}_acc"] == by_sum).all()
        assert (choices[f"{convention}_acc_norm"] == by_mean).all()
        assert summary[f"{convention}_acc"] == (by_sum == labels).mean()
        assert summary[f"{convention}_acc_norm"] == (by_mean == labels).mean()
    assert summary["examples"] == 11 and summary["truncated"] == 0
    assert list(summary)[:8] == [name + end for name in hs.GPT2_124M for end in ("", "_stderr")]


def test_one_convention_alone(model, tokenizer):
    examples = make_examples()
    both, harness = (hs.score(model, tokenizer, examples, conventions=c) for c in (hs.CONVENTIONS, ["harness"]))
    np.testing.assert_allclose(harness.sums["harness"], both.sums["harness"], atol=1e-4)
    assert list(harness.choices()) == ["harness_acc", "harness_acc_norm"]


def test_standard_errors_by_hand():
    """Bugs: n for n - 1; the percentage for the fraction; the deviation of one example for that of the mean."""
    sums = np.full((7, 4), -2.0)
    sums[:, 1] = -1.0  # ending 1 is chosen throughout, and right in three of seven
    scores = hs.Scores(np.array([1, 1, 1, 0, 0, 2, 3]), {"completion": sums}, {"completion": np.ones((7, 4))}, 2)
    summary = scores.summary()
    assert summary["completion_acc"] == summary["completion_acc_norm"] == pytest.approx(3 / 7)
    for name in ("acc", "acc_norm"):
        assert summary[f"completion_{name}_stderr"] == pytest.approx(0.202031, abs=1e-6)  # sqrt(3/7 * 4/7 / 6)
    assert (summary["examples"], summary["truncated"]) == (7, 2)


def test_an_empty_context_is_the_end_of_text():
    """The first token of an ending needs one before it: any other token would be a context that nobody wrote."""

    class Tokenizer:
        eot_token = 7

        def encode_arrays(self, texts):
            return [np.array([ord(c) for c in text], np.int64) for text in texts]

    examples = [simple_example(ctx="")]
    assert [context for context, _ in hs.render_completion(examples, Tokenizer())[0]] == [[7]] * 4


def test_another_models_text_begins_with_its_first_token():
    """Llama's is not its end of text, by which the first word of a text would be less likely."""

    class Theirs:
        eos_token_id, bos_token_id = 2, 1

        def __call__(self, text):
            return {"input_ids": []}

    assert hs.HFTokenizer(Theirs()).eot_token == 1
    Theirs.bos_token_id = None
    assert hs.HFTokenizer(Theirs()).eot_token == 2


def test_one_example_has_no_spread():
    """A division by n - 1 = 0, on --limit 1."""
    scores = hs.Scores(np.array([0]), {"completion": np.zeros((1, 4))}, {"completion": np.ones((1, 4))}, 0)
    assert scores.summary()["completion_acc_stderr"] == 0


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_logits_in_pieces(model, tokenizer, monkeypatch, limit):
    """Guards the border between two pieces of logits."""
    examples = make_examples(3)
    whole = hs.score(model, tokenizer, examples).sums
    monkeypatch.setattr(hs, "LOGIT_ROWS", limit)
    found = hs.score(model, tokenizer, examples).sums
    for convention in whole:
        np.testing.assert_allclose(found[convention], whole[convention], atol=1e-4)


def test_batches_keep_the_budget_and_every_row():
    rows = [hs.pack([(list(range(n + 1)), 1)], [0]) for n in [3, 9, 2, 50, 9, 4, 9]]
    found = list(hs.batches(rows, 20))
    assert sorted(len(row.ids) for batch in found for row in batch) == [2, 3, 4, 9, 9, 9, 50]
    assert [len(row.ids) for row in found[0]] == [50]  # alone, as it exceeds the budget by itself
    assert all(len(batch) * max(len(row.ids) for row in batch) <= 20 for batch in found[1:])


def test_a_row_shares_what_its_sequences_begin_with():
    """Guards an ending that begins as the others do, one of a single token, and none in common at all."""
    row = hs.pack([([7, 8, 1, 2, 3], 3), ([7, 8, 1, 4, 5], 3), ([7, 8, 1], 1), ([7, 8, 1, 4], 2)], [0, 1, 2, 3])
    assert row.ids == [7, 8, 1, 2, 1, 4, 1] and row.positions == [0, 1, 2, 3, 2, 3, 2]
    assert row.parts == [0, 0, 1, 1, 2, 2, 4] and row.owners == [0, 0, 0, 1, 1, 1, 2, 3, 3]
    assert row.where == [1, 2, 3, 1, 4, 5, 1, 1, 6] and row.targets == [1, 2, 3, 1, 4, 5, 1, 1, 4]
    row = hs.pack([([1, 2, 3], 1), ([2, 2, 3], 2)], [0, 1])
    assert row.ids == [1, 2, 2, 2] and row.positions == [0, 1, 0, 1] and row.parts == [1, 1, 2, 2]


def test_who_sees_whom():
    """A row of softmax that may look nowhere would be NaN, and a cheating one would look ahead."""
    mask = hs.visible(torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 0, 0]]))  # the second has padding
    assert mask.shape == (2, 1, 6, 6)
    looks = [[query.nonzero()[:, 0].tolist() for query in row[0]] for row in mask]
    assert looks[0] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]
    assert looks[1][:3] == [[0], [0, 1], [0, 2]] and all(looks[1])


def a_rank(rank, world, reduce=None, poll=lambda: None):
    """What an evaluation asks of a support.runtime.Runtime."""
    return SimpleNamespace(device=torch.device("cpu"), rank=rank, world=world, reduce=reduce, poll=poll)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_tokens", [300, 100_000])  # uneven shares; one batch, so ranks without any
def test_world_size_does_not_matter(model, tokenizer, monkeypatch, world, batch_tokens):
    """Bit for bit: the ranks share the batches of a single rank, and never make other ones. And in lock-step:
    the forward pass of a sharded model waits for all ranks, so one call more on one of them is a deadlock."""
    examples = make_examples()
    calls, shares, per_rank, done_by = count_calls(model, monkeypatch), [], [], []
    monkeypatch.setattr(hs, "LOGIT_ROWS", 150)  # several pieces of logits
    single = hs.score(model, tokenizer, examples, batch_tokens=batch_tokens)
    for rank in range(world):
        calls.clear()
        rt = a_rank(rank, world, lambda t: shares.append(t) or t, lambda: calls.append(("poll", [])))
        done_by.append(0)
        count = lambda sums, done: done_by.__setitem__(-1, int(done.sum()))  # noqa: E731
        hs.score(model, tokenizer, examples, rt, batch_tokens, count)
        per_rank.append([name for name, _ in calls])
    assert all(calls == per_rank[0] for calls in per_rank)
    assert per_rank[0][0] == "poll" and per_rank[0].count("poll") == per_rank[0].count("features")
    assert per_rank[0].count("logits") > per_rank[0].count("features")
    assert sum(done_by) == 8 * len(examples)
    for rank in range(world):
        rt = a_rank(rank, world, lambda t: sum(shares))
        whole = hs.score(model, tokenizer, examples, rt, batch_tokens)
        assert all((whole.sums[c] == single.sums[c]).all() for c in hs.CONVENTIONS)
        assert whole.summary() == single.summary()


def test_too_long_sequences_lose_their_beginning_and_are_counted(model, tokenizer):
    T = model.config.block_size
    fits = simple_example("c" * (T - 11), endings=["e" * 9, "e", "ee", "eee"])  # T + 1 ids; the last is not read
    long_context = simple_example("c" * (T - 10), endings=["e" * 9, "e", "ee", "eee"])  # too long with harness's ": "
    long_ending = simple_example(endings=["e" * (T + 5), "e", "ee", "eee"])
    assert hs.score(model, tokenizer, [fits]).summary()["truncated"] == 0
    assert hs.score(model, tokenizer, [fits, long_context, long_ending]).summary()["truncated"] == 2
    assert (
        hs.score(model, tokenizer, [long_context, long_ending], conventions=["completion"]).summary()["truncated"] == 1
    )
    scores = hs.score(model, tokenizer, [long_context, long_ending])
    assert scores.units["completion"].tolist() == [[10, 2, 3, 4], [T, 2, 3, 4]]
    cut = {**long_context, "activity_label": "", "ctx_a": "c" * (T - 10)}
    model.eval()
    with torch.no_grad():  # cutting by hand what is cut from the left
        ids = tokenizer.encode(": " + cut["ctx_a"] + " " + "e" * 9)[1:]
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    model.train()
    np.testing.assert_allclose(scores.sums["harness"][0, 0], log_p[-10:, :].gather(
        1, torch.tensor(ids[-10:])[:, None]).sum().item(), atol=1e-4)  # fmt: skip


def test_ties_and_an_empty_context(model, tokenizer):
    scores = hs.score(model, tokenizer, [simple_example("", 1, ["same"] * 4)])
    for sums in scores.sums.values():
        assert np.isfinite(sums).all()
        sums[:] = -1.0
    assert [choice.tolist() for choice in scores.choices().values()] == [[0]] * 4


def test_an_ending_of_marks_alone_is_never_the_harness_choice(model, tokenizer):
    """It has no characters to divide by: NaN would be preferred by argmax, and a warning would be printed."""
    example = simple_example(endings=["[step]", "long enough", "b", "c"])
    assert hs.score(model, tokenizer, [example]).choices()["harness_acc_norm"] != [0]


def test_training_is_not_disturbed(model, tokenizer):
    """Guards the mode, the random stream and the gradients, also where the evaluation is interrupted."""
    model.train()
    before = torch.get_rng_state()
    a = hs.score(model, tokenizer, make_examples(3)).summary()
    assert a == hs.score(model, tokenizer, make_examples(3)).summary()  # no dropout
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())

    def stop(*args):
        raise KeyboardInterrupt

    for options in ({"progress": stop}, {"rt": a_rank(0, 1, poll=stop)}):
        with pytest.raises(KeyboardInterrupt):
            hs.score(model, tokenizer, make_examples(3), **options)
        assert model.training


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_softmax_is_float32(model, how):
    """bfloat16 log-probabilities have three digits: they would lie on a coarse grid."""
    batch = [hs.pack([([i, 2 * i, 250 - i], 1), ([i, 2 * i, 3, 7], 2)], [0, 1]) for i in range(20)]
    rough = copy.deepcopy(model.eval())
    if how == "weights":
        rough = rough.bfloat16()
    with torch.inference_mode():
        exact = hs.score_batch(model, batch, "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = torch.tensor(hs.score_batch(rough, batch, "cpu"))
    model.train()
    np.testing.assert_allclose(found, exact, atol=0.5)
    assert (found.bfloat16().double() != found).sum() > 30


def test_a_model_without_finite_numbers_has_no_accuracy(tokenizer):
    gpt = GPT(GPTConfig(block_size=112, vocab_size=257, valid_vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        gpt.wte.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="example 0 no finite"):
        hs.score(gpt, tokenizer, make_examples(2))


def test_an_ending_without_tokens_is_named(model, tokenizer):
    """A tokenizer that drops spaces leaves nothing of an ending of marks; its sum of nothing, 0, would win."""

    class Strips:
        eot_token = 256

        def encode_arrays(self, texts):
            return tokenizer.encode_arrays([text.strip() for text in texts])

    good, empty = simple_example(), simple_example(endings=["a", "b", "[step]", "d"])
    with pytest.raises(UserError, match="example 1 has an ending without tokens"):
        hs.score(model, Strips(), [good, empty, good])


# ---------------------------------------------------------------------------------------
# The text of lm-evaluation-harness.


@pytest.mark.parametrize(
    "raw, text",
    [
        ("How to bow [title] Stand. [step] Lean.", "How to bow. Stand. Lean."),
        ("[header] How to bow", " How to bow"),
        (" ends with a mark [step] ", "ends with a mark "),
        (" [title] Begins with one", " Begins with one"),  # stripped first, so there is no " [title]" to become ". "
        ("three   spaces", "three  spaces"),  # one pass of replace
        ("a [b] c ] d [e", "a c ] d [e"),
        ("line [a\nb] line", "line [a\nb] line"),  # the dot is no line break
    ],
)
def test_harness_text(raw, text):
    assert hs.harness_text(raw) == text


class Merging:
    """A tokenizer that has a token for "s x" and so does not split where an ending begins; others are characters."""

    eot_token = 0

    def encode_arrays(self, texts):
        return [np.array([ord(c) for c in text.replace("s x", "€")]) for text in texts]


def test_harness_cuts_where_the_context_alone_ends():
    """The context keeps the tokens it has alone; the ending is what the joint text has behind as many."""
    pairs, units = hs.render_harness([simple_example("cats", 0, ["xyz", "ab", "x", "q"])], Merging())
    assert [("".join(map(chr, c)), "".join(map(chr, e))) for c, e in pairs] == [
        (": cats", "yz"), (": cats", " ab"), (": cats", ""), (": cats", " q"),
    ]  # fmt: skip
    assert units == [3, 2, 1, 1]
    tokenizer = Merging()
    tokenizer.prefix = [1]
    pairs, _ = hs.render_harness([simple_example("c [step]", 0, "abcd")], tokenizer)
    assert pairs[0] == ([1, *map(ord, ": c")], [*map(ord, "  a")])  # spaces at the context's end go to the ending


def test_rendering_is_that_of_lm_eval(test_data):
    """Against the harness's own functions, on real text with its marks put back."""
    lm_eval_model = pytest.importorskip("lm_eval.api.model")
    from lm_eval.tasks.hellaswag import utils

    tokenizer = load_tokenizer(test_data / "gpt2_tokenizer")
    examples = hs.load_examples(test_data / "hellaswag" / "hellaswag_val.jsonl")[::101]
    for i, e in enumerate(examples):
        e["ctx_a"] = e["ctx_a"].replace(". ", [". ", " [title] ", ". [step] ", " [substeps]"][i % 4], 1)
        e["endings"] = [["", "[title] ", "[step]"][j % 3] + x + " [x]" * (j % 2) for j, x in enumerate(e["endings"])]

    class Documents(list):
        def map(self, function):
            return [function(e) for e in self]

    encoder = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    expected, characters = [], []
    for document in utils.process_docs(Documents(examples)):
        for choice in document["choices"]:
            pair = lm_eval_model.TemplateLM._encode_pair(encoder, document["query"], " " + choice)
            expected.append(tuple(map(list, pair)))
            characters.append(len(choice))
    pairs, units = hs.render_harness(examples, tokenizer)
    assert len(pairs) == 400 and pairs == expected and units == characters


# ---------------------------------------------------------------------------------------
# Files.

GOOD = simple_example("A man sits.", 2)


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
        ({**GOOD, "ctx_b": None}, "ctx_b is None"),
        ({key: GOOD[key] for key in ("activity_label", "ctx", "label", "endings")}, "ctx_a is None"),
        ({**GOOD, "activity_label": ["x"]}, r"activity_label is \['x'\]"),
        ({**GOOD, "label": 4}, "label is 4"),
        ({**GOOD, "label": "4"}, "label is '4'"),
        ({**GOOD, "label": True}, "label is True"),
        ({**GOOD, "endings": ["a", "b", "c"]}, "expected 4 strings"),
        ({**GOOD, "endings": ["a", "b", "c", ""]}, "none of them empty"),
        ({**GOOD, "endings": ["a", "b", "c", 1]}, "expected 4 strings"),
        ({"label": 1}, "activity_label is None"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, why):
    path = write_lines(tmp_path / "some.jsonl", GOOD, line, GOOD)
    with pytest.raises(UserError, match=rf"some\.jsonl, line 2: .*{why}"):
        hs.load_examples(path)


def test_examples_as_the_hub_has_them(tmp_path):
    """Bug: the label as text, as Rowan/hellaswag ships it in JSON and parquet, was refused."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    theirs = {"ind": 3, **GOOD, "label": "3", "source_id": "x", "split": "val", "split_type": "indomain"}
    lines = write_lines(tmp_path / "hub.jsonl", theirs)
    parquet.write_table(pyarrow.Table.from_pylist([theirs, theirs | {"label": "0"}]), tmp_path / "hub.parquet")
    assert [e["label"] for e in hs.load_examples(lines)] == [3]
    assert hs.load_examples(lines)[0]["endings"] == GOOD["endings"]
    assert [e["label"] for e in hs.load_examples(tmp_path / "hub.parquet")] == [3, 0]
    assert hs.load_examples(tmp_path / "hub.parquet", 1) == hs.load_examples(lines)
    parquet.write_table(pyarrow.Table.from_pylist([theirs, theirs | {"label": ""}]), tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"test\.parquet, row 2: label is ''"):
        hs.load_examples(tmp_path / "test.parquet")
    (tmp_path / "page.parquet").write_text("<html>")
    with pytest.raises(UserError, match=r"page\.parquet: cannot be read"):
        hs.load_examples(tmp_path / "page.parquet")


def test_local_files(tmp_path):
    path = write_lines(tmp_path / "some.jsonl", GOOD, {**GOOD, "label": 0}, GOOD)
    assert [e["label"] for e in hs.load_examples(path)] == [2, 0, 2]
    assert [e["label"] for e in hs.load_examples(path, limit=2)] == [2, 0]
    without = {key: value for key, value in GOOD.items() if key != "ctx_b"}  # no fragment: as if empty
    assert hs.load_examples(write_lines(tmp_path / "without.jsonl", without))[0]["ctx_b"] == ""
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


ENDLESS = "endless"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(script, served): request number i is answered as script[i] says, the last entry for ever.

    An entry is (status, body, bytes promised beyond the body, seconds of silence after it); ENDLESS goes on sending.
    """
    script, served = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            entry = script[min(len(served), len(script) - 1)]
            if entry is ENDLESS:
                served.append(self.send_without_end())
                return
            status, body, missing, silence = entry
            served.append(status)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + missing))
            self.end_headers()
            self.wfile.write(body)
            threading.Event().wait(silence)

        def send_without_end(self):
            """Sends 32 MB, for a test has to end; returns how much of it was taken."""
            self.send_response(200)
            self.end_headers()
            for sent in range(0, 2**25, 2**16):
                try:
                    self.wfile.write(b"x" * 2**16)
                except OSError:  # the reader has left
                    return sent
            return 2**25

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
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    monkeypatch.setattr(downloads, "pause", lambda failures: 0)
    yield script, served
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def files_below(folder):
    """Paths of the files; the downloader keeps what has arrived of a file under a name of its own."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".part")


FAULTS = {
    "server error": (500, b"sorry", 0, 0),
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
    """Guards memory: a body without a length and an end is read as it comes, and no further than is sensible."""
    script, served = server
    script.append(ENDLESS)
    monkeypatch.setattr(hs, "MAX_BYTES", 2 * len(BODY))
    with pytest.raises(UserError, match="no end after"):
        hs.load_examples()
    assert eventually(lambda: len(served) == hs.ATTEMPTS)
    assert max(served) < 2**24, "all of it was taken: it would never have ended"
    assert files_below(tmp_path) == []


def test_corrupt_cache_is_fetched_again(server, tmp_path, capsys):
    script, served = server
    script.append((200, BODY, 0, 0))
    hs.CACHE.parent.mkdir()
    for bad in (BODY[:-1] + b"x", BODY[:300], b"", b"<html>"):
        hs.CACHE.write_bytes(bad)
        hs.load_examples()
        assert hs.CACHE.read_bytes() == BODY
        assert "downloading it again" in capsys.readouterr().err
    assert len(served) == 4
    assert files_below(tmp_path) == ["hellaswag/hellaswag_val.jsonl"]


def test_good_cache_needs_no_network(server, monkeypatch):
    hs.CACHE.parent.mkdir()
    hs.CACHE.write_bytes(BODY)
    monkeypatch.setattr(downloads, "fetch_rest", lambda *args: pytest.fail("went to the network"))
    assert len(hs.load_examples(limit=7)) == 7


def test_offline_without_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hs, "URL", "http://127.0.0.1:9/val.jsonl")  # nobody listens there
    monkeypatch.setattr(downloads, "pause", lambda failures: 0)
    with pytest.raises(UserError, match=r"no connection.* Fetch .* put it at .*--data PATH"):
        hs.load_examples()
    assert files_below(tmp_path) == []


def test_offline_is_noticed_soon(tmp_path, monkeypatch):
    """Where names are looked up in vain, one attempt takes half a minute."""
    calls = []

    def get(*args, **kwargs):
        calls.append(args)
        raise requests.ConnectionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(hs, "PATIENCE", -1)
    with pytest.raises(UserError, match="no connection"):
        hs.load_examples()
    assert len(calls) == 1


def test_a_file_that_the_server_does_not_have_is_final(server, tmp_path):
    """Bug: one that has moved asked for again and again; and its page of excuses taken for data."""
    script, served = server
    script.append((404, b"not found", 0, 0))
    with pytest.raises(UserError, match=r"answers 404\)\. Fetch http.* put it at .*--data"):
        hs.load_examples()
    assert served == [404] and files_below(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(server, tmp_path, capsys):
    script, _ = server
    script.append((200, BODY, 0, 0))
    (tmp_path / "hellaswag").write_text("a file where the folder should be")
    assert run(lambda: hs.load_examples()) == 2
    assert "error: hellaswag: File exists\n" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------
# The command line.


@pytest.fixture
def command_line(tmp_path, monkeypatch, model, tokenizer):
    """Runs main() on the tiny model and a local file of 11 examples, with the given flags besides."""
    monkeypatch.setattr(hs, "find_checkpoint", lambda path: tmp_path)
    monkeypatch.setattr(hs, "read_model", lambda path, device: (model.eval(), tokenizer))
    data = write_lines(tmp_path / "some.jsonl", *make_examples())
    return lambda *flags: run(lambda: hs.main(["--device", "cpu", "--dtype", "float32", "--data", str(data), *flags]))


def test_command_line(command_line, tmp_path, capsys, model, tokenizer):
    out = tmp_path / "scores.jsonl"
    torch.set_float32_matmul_precision("high")  # as `tune` sets it on CUDA: TF32, which moves single answers
    assert command_line("--limit", "7", "--batch_tokens", "300", "--json", str(out)) == 0
    assert torch.get_float32_matmul_precision() == "highest"
    table = capsys.readouterr().out
    for words in (
        "completion acc ",
        "completion acc_norm ",
        "harness acc ",
        "harness acc_norm ",
        "31.14",
        "25.00",
        "±",
    ):
        assert words in table
    assert "on 7 examples" in table
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    scores = hs.score(model, tokenizer, make_examples()[:7])
    assert [line["index"] for line in lines] == list(range(7))
    assert [line["label"] for line in lines] == scores.labels.tolist()
    for name in hs.CONVENTIONS:
        np.testing.assert_allclose([line[name]["sums"] for line in lines], scores.sums[name], atol=1e-4)
        assert [line[name]["units"] for line in lines] == scores.units[name].tolist()
    for name, choice in scores.choices().items():
        assert [line["choices"][name] for line in lines] == choice.tolist()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_share_the_batches_of_the_command(command_line, tmp_path, capsys, model, tokenizer):
    """Bug: under torchrun each process scored all examples, and all of them wrote the same file."""
    state = {"step": 0, "samples_seen": 0, "seconds": 0.0, "identity": {}, "config": {}, "scaler": None}
    tensors = {checkpoint.MODEL: model.state_dict(), checkpoint.OPTIMIZER: {}}
    path = checkpoint.write_checkpoint(tmp_path / "run", 0, model.config, tensors, state, tokenizer)
    flags = ["--device", "cpu", "--dtype", "float32", "--data", tmp_path / "some.jsonl", "--batch_tokens", "300"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, hs.__file__, "--checkpoint", path, *flags, "--json", tmp_path / "two.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("harness acc_norm") == 1 and done.stderr.count("on cpu in float32") == 1
    assert command_line("--batch_tokens", "300", "--json", str(tmp_path / "one.jsonl")) == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_neither_file_nor_table_costs_the_other(command_line, tmp_path, capsys, monkeypatch):
    """Bugs: the table cannot be printed and the scores were not written yet; or the other way round."""
    assert command_line("--json", str(tmp_path / "some.jsonl" / "x")) == 2  # below a file
    assert "harness acc_norm" in capsys.readouterr().out
    monkeypatch.setattr(hs, "report", lambda result: "±".encode("ascii"))
    with pytest.raises(UnicodeEncodeError):
        command_line("--json", str(tmp_path / "scores.jsonl"))
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 11


def test_command_line_errors(command_line, tmp_path, capsys):
    assert command_line("--data", str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    assert command_line("--json", str(tmp_path / "some.jsonl" / "x")) == 2  # below a file
    assert "some.jsonl: File exists" in capsys.readouterr().err
    assert command_line("--limit", "0", "--batch_tokens", "-1") == 2
    err = capsys.readouterr().err
    assert "--limit is 0" in err and "--batch_tokens is -1" in err
    assert command_line("--checkpoint", "a", "--hf_model", "b") == 2
    assert "both given" in capsys.readouterr().err


def test_out_of_memory_names_the_flag(command_line, model, monkeypatch, capsys):
    def features(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "features", features)
    assert command_line() == 2
    assert "lower --batch_tokens" in capsys.readouterr().err
    monkeypatch.setattr(hs, "read_model", features)
    assert command_line() == 2
    assert "name another --device" in capsys.readouterr().err, "bug: a traceback where the model alone is too large"


def test_bar_shows_the_share_that_is_done():
    """The accuracies are of examples whose endings are all scored in both conventions. Bug: with eight ranks, of which
    each sees its own batches, the bar ended at 3%."""

    class Bar:
        n, shown = 0, None

        def show(self, done, text):
            self.n, self.shown = done, [part.split("=")[1] for part in text.split(", ") if part]

    bar, labels = Bar(), np.array([1, 0])
    progress = hs.running_accuracy(bar, labels)
    sums = np.array([-2.0, -1, -3, -4, -9, -8, -7, -6, -1, -2, -3, -4, -1, -2, -3, -4])
    done = np.array([True] * 4 + [False] * 4 + [True] * 3 + [False] * 5)
    progress(sums, done)
    assert (bar.n, bar.shown) == (0, [])
    done[11] = True
    progress(sums, done)
    assert (bar.n, bar.shown) == (1, ["100.00", "0.00"])
    hs.running_accuracy(bar, labels, 2)(sums, done)
    assert bar.n == 2
    done[:] = True
    progress(sums, done)
    assert (bar.n, bar.shown) == (2, ["50.00", "50.00"])


def test_benchmark_runs(tmp_path, tokenizer, capsys, monkeypatch):
    """A benchmark that nobody runs for months stops running."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_parts

    tokenizer.save(tmp_path)
    data = write_lines(tmp_path / "some.jsonl", *make_examples())
    flags = ["--tiny", "--examples", "3", "--repeats", "1", "--device", "cpu", "--dtype", "float32"]
    bench_parts.main(["hellaswag", *flags, "--data", str(data), "--tokenizer", str(tmp_path)])
    out = capsys.readouterr().out
    assert all(f"\n{way} " in out for way in ("plain", "completion", "both")) and "3 examples" in out
    assert float(out.split("at most ")[1].split()[0]) < 1e-3  # the three ways do the same work


# ---------------------------------------------------------------------------------------
# Models of others.


def save_model(folder, lm, tokenizer, prefix=None, ends=False):
    """A Hugging Face folder of the model and a `TextTokenizer`; `prefix` names a token put before every text, and
    behind it too if `ends`."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    if prefix is not None:
        number = backend.token_to_id(prefix)
        template = f"{prefix} $A {prefix}" if ends else f"{prefix} $A"
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[(prefix, number)])
    lm.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def tiny_lm(name, vocab_size, **changes):
    """One random layer whose outputs are far from uniform, so that few endings are near ties."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab_size, **sizes, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def as_ours(lm):
    """The model as `plain_score` calls ours."""
    return lambda ids: lm(input_ids=ids).logits


@pytest.mark.parametrize("name, plain", [("Llama", True), ("Gemma2", False)])
def test_hf_model(tmp_path, tokenizer, name, plain):
    """Guards the projection of the scored tokens alone, and that it is not used where (as with Gemma 2's cap)
    logits are more than that."""
    lm = tiny_lm(name, 300)
    found, its_tokenizer = hs.load_hf(save_model(tmp_path, lm, tokenizer), "cpu")
    assert found.plain == plain and found.config.block_size == 512 and list(its_tokenizer.prefix) == []
    scores = hs.score(found, its_tokenizer, make_examples(5))
    for convention, sums in scores.sums.items():
        expected = [plain_score(as_ours(lm), tokenizer, e, convention)[0] for e in make_examples(5)]
        np.testing.assert_allclose(sums, expected, atol=2e-4)


def test_hf_tokenizer_with_a_first_token(tmp_path, tokenizer):
    """The harness lets a tokenizer put its <s> before the context; build-nanogpt's convention knows none."""
    folder = save_model(tmp_path, tiny_lm("Llama", 300), tokenizer, "<|endoftext|>", ends=True)
    _, its_tokenizer = hs.load_hf(folder, "cpu")
    assert its_tokenizer.prefix == [256], "without what stands behind a text"
    for render, first in ((hs.render_harness, [256]), (hs.render_completion, [])):
        pairs, _ = render([simple_example("\ud800c")], its_tokenizer)  # half a surrogate pair
        text = tokenizer.encode((": " if first else "") + "\ufffdc")
        assert pairs[0] == (first + text, tokenizer.encode(" a"))


def test_hf_command_line(command_line, tmp_path, capsys, tokenizer, monkeypatch):
    folder = save_model(tmp_path / "hf", tiny_lm("Llama", 300), tokenizer, "<|endoftext|>")
    out = tmp_path / "scores.jsonl"
    assert command_line("--hf_model", str(folder), "--json", str(out)) == 0
    assert "harness acc_norm" in capsys.readouterr().out
    model, its_tokenizer = hs.load_hf(folder, "cpu")
    scores = hs.score(model, its_tokenizer, make_examples())
    found = [json.loads(line)["harness"]["sums"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(found, scores.sums["harness"], atol=1e-4)
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.lm.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for bad in (tmp_path / "none", tmp_path, tmp_path / "pickled"):
        assert command_line("--hf_model", str(bad)) == 2
        err = capsys.readouterr().err
        assert "no causal language model" in err and "Traceback" not in err and err.count("error:") == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command_line("--hf_model", str(folder)) == 2
    assert "pip install transformers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------
# lm-evaluation-harness itself.


def harness_scores(folder, examples, scratch, batch_size=4):
    """What lm-evaluation-harness, offline and in float32, makes of a Hugging Face folder on these examples:
    (sums (N, 4) in nats, right by acc (N,), right by acc_norm (N,)). `scratch` is an empty folder to write in."""
    pytest.importorskip("accelerate")  # lm_eval's own optional part
    evaluator, huggingface = (pytest.importorskip(f"lm_eval.{m}") for m in ("evaluator", "models.huggingface"))
    from lm_eval.tasks.hellaswag.utils import process_docs

    data = write_lines(scratch / "examples.jsonl", *examples)
    task = {  # its hellaswag.yaml, but for where the data come from
        "task": "hellaswag_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(scratch)},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    lm = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)
    result = evaluator.simple_evaluate(lm, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = sorted(result["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    sums = np.array([[answer[0] for answer in sample["filtered_resps"]] for sample in samples])
    return sums, *(np.array([sample[name] for sample in samples]) for name in ("acc", "acc_norm"))


def assert_same_as_harness(scores, sums, acc, acc_norm, tie=1e-4):
    """The `Scores` give the harness's sums, and its choices but for ties; returns how many examples are ties."""
    np.testing.assert_allclose(scores.sums["harness"], sums, atol=1e-3)
    choices, ties = scores.choices(), np.zeros(len(sums), dtype=bool)
    for name, per_unit, right in (("acc", sums, acc), ("acc_norm", sums / scores.units["harness"], acc_norm)):
        best = np.sort(per_unit, 1)
        tied = best[:, -1] - best[:, -2] < tie
        assert (choices[f"harness_{name}"] == per_unit.argmax(1))[~tied].all()
        assert ((choices[f"harness_{name}"] == scores.labels) == right)[~tied].all()
        ties |= tied
    return int(ties.sum())


def real_examples(test_data, every):
    """Each `every`[0]-th of ActivityNet's examples, which are short, and each `every`[1]-th of WikiHow's."""
    keep_freed_memory()  # both make large tables of logits, and the kernel would clear each page anew
    examples = hs.load_examples(test_data / "hellaswag" / "hellaswag_val.jsonl")
    return examples[: 3243 : every[0]] + examples[3243 :: every[1]], load_tokenizer(test_data / "gpt2_tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("name, prefix", [("Llama", None), ("GPT2", "<|endoftext|>")])
def test_harness_gives_the_same_for_models_of_others(tmp_path, test_data, name, prefix):
    """Guards every rule of the harness convention at once, on real text and with GPT-2's vocabulary."""
    examples, tokenizer = real_examples(test_data, (100, 300))
    folder = save_model(tmp_path / "hf", tiny_lm(name, 50257), tokenizer, prefix)
    model, its_tokenizer = hs.load_hf(folder, "cpu")
    scores = hs.score(model, its_tokenizer, examples, conventions=["harness"])
    ties = assert_same_as_harness(scores, *harness_scores(folder, examples, tmp_path))
    assert len(examples) > 50 and ties <= 0.01 * len(examples)


@pytest.mark.slow
def test_harness_gives_the_same_for_an_exported_model(tmp_path, test_data, tally):
    """The number here, from packed rows of a checkpoint, is the number that others get from its export."""
    pytest.importorskip("transformers")
    examples, tokenizer = real_examples(test_data, (8, 68))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=32, dropout=0.0))
    for p in model.parameters():
        p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)  # so that endings differ and ties are rare
    tensors = {checkpoint.MODEL: model.state_dict(), checkpoint.OPTIMIZER: {}}
    path = checkpoint.write_checkpoint(tmp_path / "run", 1, model.config, tensors, {"step": 1}, tokenizer)
    export_hf.export(path, tmp_path / "hf")
    scores = hs.score(model, tokenizer, examples, conventions=["harness"])
    ties = assert_same_as_harness(scores, *harness_scores(tmp_path / "hf", examples, tmp_path))
    assert len(examples) > 500 and ties <= 0.01 * len(examples)
    tally("examples scored as lm-evaluation-harness does", len(examples))


PAGES_TASK = """
task: pages
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
SCENES_TASK = """
task: scenes
dataset_path: json
dataset_kwargs: {data_files: {validation: PATH}}
output_type: multiple_choice
validation_split: validation
process_docs: !function scenes.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def local_tasks(tmp_path):
    """A folder of two tasks that need no network: HellaSwag's rules on a few scenes, and bits per byte of pages."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    examples, pages = make_examples(9), [{"text": f"The sea is wide, and wave {n} follows another."} for n in range(5)]
    for name, task, rows in (("scenes", SCENES_TASK, examples), ("pages", PAGES_TASK, pages)):
        data = write_lines(folder / f"{name}.jsonl", *rows)
        (folder / f"{name}.yaml").write_text(task.replace("PATH", str(data)))
    (folder / "scenes.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    return folder, examples, [page["text"] for page in pages]


@pytest.mark.slow
def test_the_printed_line_scores_the_export_as_we_score_the_checkpoint(tmp_path, model, tokenizer, local_tasks, capsys):
    """The line that export_hf.py prints, with local tasks instead of those that have to be downloaded."""
    pytest.importorskip("lm_eval")
    folder, examples, pages = local_tasks
    tensors = {checkpoint.MODEL: model.state_dict(), checkpoint.OPTIMIZER: {}}
    path = checkpoint.write_checkpoint(tmp_path / "run", 1, model.config, tensors, {"step": 1}, tokenizer)
    export_hf.main(["--checkpoint", str(path), "--out_dir", str(tmp_path / "hf")])
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert line.endswith(" --tasks hellaswag")
    words = [*shlex.split(line.replace("--tasks hellaswag", "--tasks scenes,pages")), "--include_path", str(folder)]
    words += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    ours = hs.score(model.eval(), tokenizer, examples).summary()
    assert found["scenes"]["acc,none"] == pytest.approx(ours["harness_acc"])
    assert found["scenes"]["acc_norm,none"] == pytest.approx(ours["harness_acc_norm"])
    nats = 0
    for text in pages:
        ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode(text)]])
        nats += model(ids[:, :-1], ids[:, 1:]).item()
    bits = nats / math.log(2) / sum(len(text.encode()) for text in pages)
    assert found["pages"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
