"""Text from a model: sampling rules, cached generation, streaming, the command line. Names and docstrings
say which bug each test guards against. The model is two untrained layers, the tokenizer plain bytes."""

import copy
import io
import json
import math
import os
import random
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import inference
from inference import (
    PRESETS,
    InferenceConfig,
    Sample,
    Sampling,
    TokenDecoder,
    choose,
    generate,
    sample_text,
    sample_token,
)
from model import GPT, GPTConfig
from support import runtime
from support.cli import UserError, run
from toy import bytes_only

GREEDY, PLAIN = PRESETS["greedy"], Sampling()
EOT, VALID, BLOCK = 256, 257, 16


def tiny_model(block_size=BLOCK, **options):
    torch.manual_seed(1)
    shape = dict(n_layer=2, n_head=2, n_embd=32, dropout=0.5, **options)
    net = GPT(GPTConfig(block_size, vocab_size=320, valid_vocab_size=VALID, **shape)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():  # large, so that the best token depends on the context
            if p.dim() == 2:
                p.mul_(4 if "wte" in name else 20)
    return net


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_only()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def says(net, ids, monkeypatch):
    """Makes a model say these ids, whatever it is asked."""
    script = iter(ids)

    def logits(x):
        return torch.nn.functional.one_hot(torch.full((len(x),), next(script)), VALID).float() * 99

    monkeypatch.setattr(net, "logits", logits)
    return net


def columns(steps):
    """Ids of each sample, from what generate() yields."""
    return [list(column) for column in zip(*steps)]


def random_logits(rows=8, size=3000, scale=3.0, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------------------------------
# Sampling.


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])  # 0.1: the nucleus exceeds the first guess of its size
def test_filters_agree_with_transformers(scale):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(scale=scale)
    for k in (1, 7, 3000, 9999):
        torch.testing.assert_close(inference.keep_top_k(logits, k), process.TopKLogitsWarper(k)(None, logits))
    for p in (1e-6, 0.1, 0.5, 0.9, 0.99):
        torch.testing.assert_close(inference.keep_top_p(logits, p), process.TopPLogitsWarper(p)(None, logits))
    for p in (1e-3, 0.05, 0.5, 0.99):
        torch.testing.assert_close(inference.keep_min_p(logits, p), process.MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("scale", [0.1, 2.0, 4.0])  # about 17,600, 4,600 and 60 tokens hold 0.9
def test_nucleus_of_any_size_agrees_with_a_full_sort(scale):
    """Only the best tokens are sorted; a nucleus that is larger must not be cut there."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(2, 20_000, scale)
    logits[1] *= 6  # beside a large nucleus one that is small
    torch.testing.assert_close(inference.keep_top_p(logits, 0.9), process.TopPLogitsWarper(0.9)(None, logits))


def test_penalty_agrees_with_transformers_and_counts_a_token_once():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = random_logits(2, 50), torch.tensor([[1, 1, 1, 7], [0, 49, 49, 3]])
    seen = torch.zeros(2, 50, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.5, 1.0, 1.3):
        expected = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        torch.testing.assert_close(inference.penalize(logits, seen, penalty), expected)


def test_penalty_lowers_negative_logits_too():
    """Dividing a negative logit would make the repeated token more likely."""
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    found = inference.penalize(logits, torch.tensor([[True, True, False]]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0]]


def test_rules_compose_in_transformers_order():
    """Penalty, temperature, top_k, top_p, min_p: another order keeps other tokens."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = random_logits(4, 200), torch.arange(40).view(4, 10)
    expected = logits
    for step in (
        process.RepetitionPenaltyLogitsProcessor(1.4),
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(30),
        process.TopPLogitsWarper(0.85),
        process.MinPLogitsWarper(0.02),
    ):
        expected = step(ids, expected)
    seen = torch.zeros(4, 200, dtype=torch.bool).scatter(1, ids, True)
    sampling = Sampling(0.7, 30, 0.85, 0.02, 1.4)
    for u in torch.linspace(0, 0.999, 50, dtype=torch.float64):
        u = u.expand(4)
        assert torch.equal(choose(logits, sampling, seen, u), sample_token(expected, u))


def test_nucleus_is_the_smallest_set_even_with_ties():
    """A threshold on the probability would keep all equals of the last token."""
    logits = torch.zeros(1, 10)
    assert inference.keep_top_p(logits, 0.55).isfinite().sum() == 6
    assert inference.keep_top_p(logits, 1e-9).isfinite().sum() == 1
    assert inference.keep_top_p(logits, 1e-50).isfinite().sum() == 1, "bug: 0 in float32, and no token was left"


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05, 0.0])
    n = 20_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts = sample_token(p.log().expand(n, -1), u).bincount(minlength=6)
    assert counts[2] == counts[5] == 0
    used = p > 0
    chi_square = ((counts[used] - n * p[used]) ** 2 / (n * p[used])).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: 1 in 1,000 sound generators exceeds it


def test_extreme_uniforms_never_draw_what_was_ruled_out():
    """u = 0 must not pick a leading zero, nor u next to 1 run past the end."""
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    assert sample_token(logits, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert sample_token(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 3


def test_tokens_that_float32_cannot_add_up_are_drawn():
    """In float32, 0.9999999 + 1e-10 is 0.9999999: of a thousand rare tokens, all but two could never be drawn."""
    logits = torch.full((1, 1001), -math.log(1e10))
    logits[0, 0] = 0.0
    for token in (1, 250, 500, 999):
        u = 1 - (1000.5 - token) * 1e-10  # in the middle of the token's share
        assert abs(sample_token(logits, torch.tensor([u], dtype=torch.float64)).item() - token) <= 1


def test_zero_and_tiny_temperatures_are_greedy_and_do_not_overflow():
    logits, u = random_logits(3, 50), torch.full((3,), 0.999, dtype=torch.float64)
    for temperature in (0.0, 1e-320, 1e-30, 1e-4):
        assert torch.equal(choose(logits, Sampling(temperature), None, u), logits.argmax(-1))


def test_nan_logits_are_an_error_and_not_token_zero():
    logits = torch.zeros(1, 9)
    logits[0, 4] = math.nan
    for sampling in PRESETS.values():
        with pytest.raises(UserError, match="not finite"):
            choose(logits, sampling, None, torch.zeros(1, dtype=torch.float64))


# ---------------------------------------------------------------------------------------
# Generation.


def by_full_passes(net, context, steps):
    """Greedy, without a cache: the whole context again for each token."""
    context, out, start = list(context), [], 0
    for _ in range(steps):
        if len(context) - start > BLOCK:
            start = len(context) - BLOCK // 2
        with torch.no_grad():
            out.append(net(torch.tensor([context[start:]]))[0, -1].argmax().item())
        context.append(out[-1])
    return out


@pytest.mark.parametrize("prompt", [[5], list(range(40, 40 + BLOCK))])
def test_cached_generation_equals_full_passes_past_a_full_context(model, prompt):
    """Off-by-one in the cache's length, or stale entries after the context was encoded again."""
    expected = by_full_passes(model, prompt, 3 * BLOCK)
    assert len(set(expected)) > 5  # a constant would hide errors
    assert columns(generate(model, prompt, GREEDY, 3 * BLOCK)) == [expected]


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_smallest_contexts_go_on(block_size):
    """Half of a context of one token is none."""
    assert len(list(generate(tiny_model(block_size), [5], PLAIN, 7))) == 7


def test_samples_share_one_prefill_and_equal_separate_runs(model, monkeypatch):
    shapes, features = [], model.features
    monkeypatch.setattr(model, "features", lambda idx, **kw: shapes.append(tuple(idx.shape)) or features(idx, **kw))
    three = columns(generate(model, [1, 2, 3], PLAIN, 40, num_samples=3, seed=4))
    assert shapes[:2] == [(1, 3), (3, 1)]
    assert len({tuple(s) for s in three}) == 3
    assert columns(generate(model, [1, 2, 3], PLAIN, 40, num_samples=1, seed=4)) == three[:1]
    assert columns(generate(model, [1, 2, 3], PLAIN, 40, num_samples=2, seed=4)) == three[:2]


def test_seed_decides(model):
    """Same seed, same text; and sample 1 of seed 0 is not sample 0 of seed 1, as with seed + i."""
    first = columns(generate(model, [9], PLAIN, 20, 2, seed=0))
    assert first == columns(generate(model, [9], PLAIN, 20, 2, seed=0))
    other = columns(generate(model, [9], PLAIN, 20, 1, seed=1))[0]
    assert first[0] != other and first[1] != other
    assert columns(generate(model, [9], PLAIN, 20, 1, seed=-(2**70)))  # any integer


def test_training_is_not_disturbed(model, tokenizer):
    """Sampling during training must leave random stream, train mode and autograd as they were, even
    where the caller stops half way or looks around between two tokens."""
    model.train()
    state = torch.get_rng_state()
    text = sample_text(model, tokenizer, "ab", PLAIN, 20, 2, seed=3)
    steps = generate(model, [1], PLAIN, 9)
    next(steps)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    steps.close()
    with pytest.raises(ValueError):
        next(generate(model, [1] * (BLOCK + 1), PLAIN, 9))
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
    assert text == sample_text(model, tokenizer, "ab", PLAIN, 20, 2, seed=3)  # no dropout in either


def test_end_of_text_ends_one_sample_and_not_the_others(model):
    steps = columns(generate(model, [3], PLAIN, 60, 4, seed=1))
    stop = steps[0][10]
    stopped = columns(generate(model, [3], PLAIN, 60, 4, seed=1, stop_token=stop))
    for full, cut in zip(steps, stopped):
        end = full.index(stop) + 1 if stop in full else 60
        assert cut == (full[:end] + [None] * (60 - end))[: len(cut)]


def test_end_of_text_ends_the_text(model, tokenizer, monkeypatch):
    """The marker itself is not text, and nothing is asked of the model after it."""
    script = [*tokenizer.encode("né"), EOT]
    assert sample_text(says(model, script, monkeypatch), tokenizer, "x", GREEDY, 50) == ["né"]


def test_empty_prompt_starts_from_end_of_text(model, tokenizer):
    started = columns(generate(model, [EOT], GREEDY, 5))
    assert columns(generate(model, [], GREEDY, 5, stop_token=EOT)) == started
    assert sample_text(model, tokenizer, "", GREEDY, 5) == [tokenizer.decode(started[0])]
    with pytest.raises(ValueError):
        next(generate(model, [], GREEDY, 5))


def test_padding_rows_are_never_sampled():
    net = tiny_model()
    with torch.no_grad():
        net.wte.weight[VALID:] = 1e3  # would win every argmax, or blow up every softmax
    for sampling in (GREEDY, PLAIN, Sampling(5.0)):
        assert max(max(c) for c in columns(generate(net, [1], sampling, 30, 4))) < VALID


def test_penalty_covers_prompt_and_generated_tokens(model):
    """With an overwhelming penalty no token comes twice, until all have come."""
    (ids,) = columns(generate(model, [1, 2], Sampling(0.0, repetition_penalty=1e6), 200))
    assert len({*ids, 1, 2}) == 202


def test_bfloat16_keeps_its_cache_in_bfloat16(model):
    """A float32 cache under autocast would double its memory and fail in attention."""
    with torch.autocast("cpu", torch.bfloat16):
        assert inference.new_cache(model, 4).k.dtype == torch.bfloat16
        assert len(list(generate(model, [1, 2], PLAIN, 20, 2))) == 20
    assert inference.new_cache(model, 4).k.dtype == torch.float32


def layout(net):
    return [(p.stride(), p.data_ptr()) for p in net.parameters()]


@pytest.fixture
def threads():
    """threads(n) sets how many torch uses; the number before comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_multiply_is_linear_for_any_number_of_threads(threads, monkeypatch, n):
    """Parts in the wrong order, or a number of rows that does not divide; and both ways to store a matrix."""
    monkeypatch.setattr(runtime, "SHARED", 0)
    threads(n)
    stream = torch.Generator().manual_seed(0)
    for rows, shape in ((96, (5, 1, 7)), (7, (2, 7)), (12, (1, 3, 7))):
        weight, bias, x = (torch.randn(s, generator=stream) for s in ((rows, 7), rows, shape))
        for stored in (weight, weight.t().contiguous().t()):
            for b in (bias, None):
                torch.testing.assert_close(runtime.multiply(x, stored, b), torch.nn.functional.linear(x, weight, b))


@pytest.mark.parametrize("norm, bias, shared", [("layernorm", True, 0), ("rmsnorm", False, 2**19)])
def test_the_fast_form_keeps_values_and_text(monkeypatch, norm, bias, shared):
    """Storing a matrix the other way round must not transpose it: a square one would still fit."""
    monkeypatch.setattr(runtime, "SHARED", shared)
    plain = tiny_model(norm=norm, bias=bias)
    fast = runtime.sample_faster(copy.deepcopy(plain), "float32")
    for name, p in fast.named_parameters():
        assert torch.equal(p, plain.get_parameter(name))
        assert p.dim() == 1 or p.t().is_contiguous() == (not name.endswith("mlp.c_proj.weight")), name
    for sampling in (GREEDY, PLAIN):
        expected = columns(generate(plain, [7, 8], sampling, 10, 3, seed=2))
        assert columns(generate(fast, [7, 8], sampling, 10, 3, seed=2)) == expected


def test_sampling_in_training_leaves_the_weights_where_they_are(model, tokenizer):
    """An optimizer, or DDP's buckets, would go on with weights that the model no longer has."""
    before = layout(model)
    sample_text(model, tokenizer, "ab", PLAIN, 5, 2)
    assert layout(model) == before


# ---------------------------------------------------------------------------------------
# Ids to text.

TEXTS = ["naïve 👩‍👩‍👧 ok", "e\u0301a\u0308\u0304", "שלום עולם مرحبا", "漢字🇫🇷🇯🇵", "plain", "\ufffd real"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_split_over_tokens_stream_whole(tokenizer, text):
    """Each token decoded alone shows U+FFFD for every part of an emoji."""
    decoder = TokenDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert decoder.finish() == ""
    assert "".join(pieces) == text
    if "\ufffd" not in text:  # a real one waits for the next character
        assert [p for p in pieces if p] == list(text)  # each with its last byte, none later


def test_streamed_pieces_equal_full_decode_for_any_bytes(tokenizer):
    """Cut, overlong and stray bytes included; and a token costs the same however long the text is."""
    rng = random.Random(0)
    lead = [tokenizer.encode(c) for c in "é漢😀a"]
    sizes = []

    class Watched:
        unused, unsettled = (), ()

        def decode(self, ids):
            sizes.append(len(ids))
            return tokenizer.decode(ids)

    for _ in range(200):
        ids = []
        for _ in range(rng.randrange(60)):
            character = rng.choice(lead)
            ids += rng.choice([character, character[: rng.randint(1, 4)], [rng.randrange(VALID)]])
        decoder = TokenDecoder(Watched())
        assert "".join(decoder.push(i) for i in ids) + decoder.finish() == tokenizer.decode(ids)
    assert max(sizes) <= 5


def test_text_that_ends_within_a_character(tokenizer):
    ids = tokenizer.encode("ok😀")[:-1]
    decoder = TokenDecoder(tokenizer)
    assert ["".join(decoder.push(i) for i in ids), decoder.finish()] == ["ok", "\ufffd"]


def test_stop_string_across_tokens_never_shows_in_part(tokenizer):
    sample = Sample(tokenizer, ["END"])
    pieces = [sample.push(i) for i in tokenizer.encode("a EN b EEN")]
    assert "".join(pieces) == "a EN b E"  # "EN" is held back at the end
    assert sample.push(tokenizer.encode("D")[0]) == "" and sample.finish_reason == "stop"
    assert sample.text == "a EN b E"


def test_held_back_text_appears_if_the_stop_string_does_not(tokenizer):
    for token, reason in ((EOT, "end_of_text"), (None, "length")):
        sample = Sample(tokenizer, ["\n\nQ:"])
        pieces = [sample.push(i) for i in tokenizer.encode("fin\n\nQ")]
        pieces.append(sample.push(token) if token else sample.finish("length"))
        assert "".join(pieces) == sample.text == "fin\n\nQ" and sample.finish_reason == reason


def test_stop_strings_do_not_depend_on_how_the_text_is_cut():
    """Whatever the tokens are, the string that is complete first ends the text."""
    rng = random.Random(1)

    class Letters:
        eot_token, unused, unsettled = -1, (), ()

        def decode(self, ids):
            return "".join(vocabulary[i] for i in ids)

    for _ in range(300):
        vocabulary = ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(20)]
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 2))]
        sample, shown = Sample(Letters(), stops), ""
        for i in range(20):
            if sample.finish_reason is None:
                shown += sample.push(i)
        shown += "" if sample.finish_reason else sample.finish("length")
        text, end = "".join(vocabulary), None
        for end in range(1, len(text) + 1):
            if hit := [s for s in stops if text[:end].endswith(s)]:
                text = text[: end - max(map(len, hit))]
                break
        assert shown == sample.text == text


# ---------------------------------------------------------------------------------------
# Command line.


@pytest.fixture
def command(monkeypatch, capsys, model, tokenizer):
    """command(*flags) -> (exit code, stdout, stderr), with the tiny model in place of a checkpoint."""
    monkeypatch.setattr(inference, "find_checkpoint", lambda path: Path(path or "checkpoints/toy/step_00000007"))
    monkeypatch.setattr(inference, "read_model", lambda path, device: (model, tokenizer))
    monkeypatch.setattr(
        inference, "sample_faster", lambda net, dtype: net
    )  # it alters the model, which other tests use too

    def call(*flags):
        code = run(lambda: inference.main(["--device", "cpu", "--dtype", "float32", *flags]))
        return code, *capsys.readouterr()

    return call


def test_alone_it_shows_every_preset_on_the_default_prompt(command, monkeypatch):
    monkeypatch.setattr(inference, "DEFAULT_PROMPT", "The sea")
    code, out, err = command("--max_new_tokens", "5")
    assert code == 0
    for name in PRESETS:
        assert f"=== {name} (temperature" in out and f"{name}: " in err
    assert out.count("The sea") == 3
    assert "toy/step_00000007" in err and "tokens/s" in err and "first after" in err


def test_statistics_count_tokens_and_seconds(command, monkeypatch):
    """Seconds a token shown as tokens a second look plausible for a small model."""
    looks = iter(range(100))
    clock = types.SimpleNamespace(perf_counter=lambda: next(looks) / 4)
    monkeypatch.setattr(inference, "time", clock)
    _, out, err = command("--preset", "greedy", "--prompt", "a", "--max_new_tokens", "3", "--json")
    count = json.loads(out)["tokens"]
    assert f"greedy: {count} tokens, {count / 0.5:.1f} tokens/s, first after 250 ms\n" in err


def test_the_fast_form_is_that_of_the_precision(command, monkeypatch):
    """Bugs: `auto` samples in the slower of two precisions: a large model in float32, or a small one in bfloat16, on a
    CPU that multiplies bfloat16; or it overrules the flag."""
    done = []
    monkeypatch.setattr(inference, "sample_faster", lambda net, dtype: done.append(dtype))
    monkeypatch.setattr(runtime, "pick_dtype", lambda name, device: "bfloat16" if name == "auto" else name)
    for small, dtype in ((0, "auto"), (10**9, "auto"), (0, "float32"), (10**9, "bfloat16")):
        monkeypatch.setattr(inference, "SMALL", small)
        flags = ["--device", "cpu", "--dtype", dtype, "--preset", "greedy", "--prompt", "a", "--max_new_tokens", "2"]
        assert command(*flags)[0] == 0
    assert done == ["bfloat16", "float32", "float32", "bfloat16"]


@pytest.mark.parametrize("packs", [False, True])
def test_in_16_bits_the_fast_form_stores_the_weights_once_and_keeps_the_bits(monkeypatch, packs):
    """Bugs: autocast casts every weight anew for each token; the residual stream is rounded with the weights; a packed
    matrix loses its bias or its last rows."""
    if packs and not runtime.packs_bfloat16():
        pytest.skip("this CPU has no packed products in bfloat16")
    monkeypatch.setattr(runtime, "packs_bfloat16", lambda: packs)
    model = tiny_model(bias=True)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    fast = runtime.sample_faster(copy.deepcopy(model), "bfloat16")
    assert fast.h[0].mlp.c_fc.weight.dtype == torch.bfloat16 and fast.wte.weight.dtype == torch.float32
    idx = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad(), runtime.autocast(torch.device("cpu"), "bfloat16"):
        # two kernels may add in another order, and bfloat16 keeps 8 bits
        torch.testing.assert_close(fast(idx), model(idx), rtol=2**-7 if packs else 0, atol=2**-7 if packs else 0)


def test_one_stream_is_plain_text_and_equals_sample_text(command, model, tokenizer):
    """What is piped on must hold no header and no statistics."""
    code, out, _ = command("--preset", "nucleus", "--prompt", "hé", "--max_new_tokens", "30", "--seed", "3")
    text = sample_text(model, tokenizer, "hé", PRESETS["nucleus"], 30, seed=3)[0]
    assert (code, out) == (0, f"hé{text}\n")


def test_json_is_one_object_a_line(command, model, tokenizer):
    flags = ["--json", "--num_samples", "2", "--prompt", "a\nb", "--max_new_tokens", "9", "--temperature", "1.5"]
    code, out, _ = command(*flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["preset"], r["sample"]) for r in rows] == [(p, i) for p in PRESETS for i in (0, 1)]
    for row in rows:
        assert row["prompt"] == "a\nb" and row["seed"] == 0 and row["tokens_per_second"] >= 0
        assert (row["tokens"], row["finish_reason"]) == (9, "length") or row["finish_reason"] == "end_of_text"
    expected = sample_text(model, tokenizer, "a\nb", Sampling(1.5, top_k=40), 9, 2)
    assert [r["text"] for r in rows[:2]] == expected


def test_stop_flag_ends_the_text_and_says_so(command, model, tokenizer, monkeypatch):
    says(model, tokenizer.encode("one, two, three"), monkeypatch)
    _, out, _ = command("--json", "--preset", "greedy", "--prompt", "", "--stop", "thr", "--stop", ", tw")
    row = json.loads(out)
    assert (row["text"], row["finish_reason"], row["tokens"]) == ("one", "stop", 7)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", "-0.1"], ["--temperature is -0.1"]),
        (["--temperature", "nan"], ["--temperature is nan"]),
        (["--top_p", "0"], ["--top_p is 0.0"]),
        (["--top_p", "1.01"], ["--top_p is 1.01"]),
        (["--min_p", "1"], ["--min_p is 1.0"]),
        (["--min_p", "-0.1"], ["--min_p is -0.1"]),
        (["--repetition_penalty", "0"], ["--repetition_penalty is 0.0"]),
        (["--repetition_penalty", "inf"], ["--repetition_penalty is inf"]),
        (["--top_k", "-1"], ["--top_k is -1"]),
        (["--max_new_tokens", "0"], ["--max_new_tokens is 0"]),
        (["--num_samples", "0"], ["--num_samples is 0"]),
        (["--stop", ""], ["--stop is empty"]),
        (["--prompt", "a", "--interactive"], ["--prompt and --interactive exclude each other"]),
        (["--prompt", "", "--prompt_file", os.devnull], ["--prompt and --prompt_file exclude each other"]),
        (["--prompt_file", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--device", "abacus"], ["abacus"]),
        (["--prompt", "x" * 17], ["17 tokens", "context 16", "--truncate_left"]),
        (["--top_p", "2", "--top_k", "-3", "--num_samples", "0", "--prompt_file", "/no"],
         ["--top_p", "--top_k", "--num_samples", "/no"]),
        (["--nonsense"], ["--nonsense"]),
        (["--preset", "wild"], ["wild"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(command, flags, words):
    """A traceback, or torch taking a senseless value in silence; and all problems come at once."""
    code, out, err = command(*flags)
    lines = [line for line in err.splitlines() if not line.startswith("checkpoint ")]
    assert code == 2 and out == "" and len(lines) == 1
    assert all(word in lines[0] for word in words)


def test_top_k_beyond_the_vocabulary_is_clamped(command):
    assert command("--top_k", "99999", "--prompt", "a", "--max_new_tokens", "3")[0] == 0


def test_truncate_left_keeps_the_end_and_counts(command):
    flags = ["--preset", "greedy", "--json", "--max_new_tokens", "5", "--truncate_left", "--prompt"]
    _, long, err = command(*flags, "y" * 9 + "x" * BLOCK)
    _, short, _ = command(*flags, "x" * BLOCK)
    assert "first 9 of the prompt's 25 tokens" in err
    assert json.loads(long)["text"] == json.loads(short)["text"]


def test_lone_surrogate_from_argv_does_not_crash(command):
    for extra in ([], ["--json"]):
        code, out, _ = command("--prompt", "a\udcff", "--max_new_tokens", "2", "--preset", "greedy", *extra)
        assert code == 0 and out


def test_prompt_file_loses_mark_and_last_newline_only(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\n\n")
    assert inference.read_text(path) == "a\nb\n"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="prompt file"):
        inference.read_text(path)


@pytest.fixture
def stdin():
    """A pipe in place of stdin; yields the end that is written to."""
    saved, (reader, writer) = os.dup(0), os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:
        yield pipe
    os.dup2(saved, 0)
    os.close(saved)


def test_a_pipe_named_as_the_prompt_is_read_once(tmp_path, command):
    """Bug: a pipe, as in `--prompt_file <(...)`, was read by the check of the flags, and the prompt was empty."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("hello",))
    writer.start()
    code, out, _ = command(
        "--json", "--preset", "greedy", "--max_new_tokens", "1", "--prompt_file", str(tmp_path / "pipe")
    )
    writer.join()
    assert code == 0 and json.loads(out)["prompt"] == "hello"


def test_a_model_that_does_not_fit_is_one_line(command, monkeypatch):
    """Bug: sampling beside a training that fills the card ended in a traceback while the model was loaded."""

    def read_model(path, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference, "read_model", read_model)
    code, _, err = command("--prompt", "a")
    assert code == 2 and "out of memory" in err and "--device" in err


def test_stdin_is_read_only_where_it_is_named(stdin):
    """Bug: in `while read` loops and in scripts on stdin (a notebook's %%bash) the next lines became the prompt."""
    stdin.write(b"piped\n")
    stdin.close()
    assert inference.read_prompt(InferenceConfig(device="cpu", prompt="")) == ""
    assert inference.read_prompt(InferenceConfig(device="cpu")) == inference.DEFAULT_PROMPT
    assert inference.read_prompt(InferenceConfig(device="cpu", prompt_file="-")) == "piped"
    assert inference.read_prompt(InferenceConfig(device="cpu", prompt_file="-")) == ""


def test_interactive_continues_each_line_alone_and_survives_a_long_one(command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\né\n".encode() + b"z" * 17 + b"\na")))
    code, out, err = command("--interactive", "--preset", "greedy", "--max_new_tokens", "4")
    answers = out.split("> ")[1:]
    assert code == 0 and len(answers) == 5
    assert answers[0] == answers[3].removesuffix("\n") + "\n" and answers[4].strip() == ""
    assert answers[2] == "" and "17 tokens" in err


def test_every_help_line_shows_its_default(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--help"])
    options = capsys.readouterr().out.split("options:")[1].split("\n  --")[1:]
    assert len(options) == 18
    assert [o for o in options if "(default:" not in " ".join(o.split())] == []


def test_reader_that_leaves_is_a_quiet_exit():
    """`| head -1` must give neither a traceback nor an error at shutdown."""
    script = (
        "import sys; sys.path[:0] = ['.', 'tests']; import test_inference as t; from pathlib import Path\n"
        "t.inference.find_checkpoint = lambda path: Path('x')\n"
        "t.inference.read_model = lambda path, device: (t.tiny_model(), t.bytes_only())\n"
        "flags = ['--device', 'cpu', '--dtype', 'float32', '--prompt', 'a', '--max_new_tokens', '100000']\n"
        "sys.exit(t.run(lambda: t.inference.main(flags)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(inference.__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads that wait for each other crawl on a busy machine
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline().startswith(b"=== conservative")
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert "Error" not in error and "Exception" not in error


def test_benchmark_runs(capsys, monkeypatch):
    """A benchmark that nobody runs for months stops running; and both sides must do the same work."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_generate

    bench_generate.main(["--tiny", "--repeats", "1", "--batches", "1,3", "--device", "cpu", "--dtype", "float32"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line[:5].strip() in ("1", "3")]
    assert [r[:2] for r in rows] == [[b, w] for b in "13" for w in ("ours", "transformers", "uncached", "limit")]
    assert all(float(r[-1]) >= 0 for r in rows) and "8 of 8 tokens alike" in out


def test_benchmark_does_without_transformers(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_generate

    monkeypatch.setitem(sys.modules, "transformers", None)
    bench_generate.main(["--tiny", "--repeats", "1", "--batches", "2", "--device", "cpu", "--dtype", "float32"])
    out = capsys.readouterr().out
    assert "transformers not installed" in out and "    2  uncached" in out and "alike" not in out


def test_benchmark_limit_counts_each_byte_once(monkeypatch):
    """Weights once a token for all samples, keys and values of each; by hand for 2 samples of 4 tokens after 3."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_generate

    net = tiny_model()
    rates = {"sum": [1.0], "product": [2.0, 4.0, 3.0], "compute": [1e9]}
    weights, kept = 4 * net.num_parameters(), 2 * 2 * 32 * (3 + 4 + 5 + 6)  # layers, k and v, channels, lengths
    found, binding = bench_generate.limit(net, "float32", rates, 3, 2, 4)
    assert binding == "reading" and found == pytest.approx(2 * 4 * 3.0 / (4 * (weights + 2 * kept)))
    found, binding = bench_generate.limit(net, "float32", rates | {"compute": [1.0]}, 3, 2, 4)
    assert binding == "computing" and found == pytest.approx(1 / (2 * net.num_parameters()))
