"""Tokenizers that are not GPT-2's: what is shown while a model writes, what is counted, what is refused."""

import io
import json
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import inference
from inference import PRESETS, Sample, TokenDecoder, sample_text
from kinds import (
    KINDS,
    LETTERS,
    SPACES,
    WORDS,
    byte_fallback,
    byte_level,
    metaspace,
    spaces_added,
    tokenizer_of,
    with_gaps,
)
from model import GPT, GPTConfig
from support.cli import UserError, run
from tokenizer import TextTokenizer, load_tokenizer
from train import train

GREEDY = PRESETS["greedy"]


@pytest.fixture(params=KINDS, scope="module")
def kind(request):
    return tokenizer_of(request.param)


def streamed(decoder, ids):
    return [decoder.push(i) for i in ids] + [decoder.finish()]


def common(a, b):
    """How many characters two texts have in common at their beginning."""
    return max(n for n in range(len(a) + 1) if b.startswith(a[:n]))


def continuation(tokenizer, prompt, ids):
    """What decode gives for all ids, less the text of the prompt."""
    whole = tokenizer.decode([*prompt, *ids])
    return whole[common(tokenizer.decode(prompt), whole) :]


def some_ids(tokenizer):
    """Any ids; often those of bytes, of a few characters cut anywhere, and of a literal U+FFFD."""
    one = st.integers(0, tokenizer.vocab_size - 1)
    cut = st.sampled_from(["é", "€", "😀", "\ufffd", "the", " ", "don't,", "▁ "]).map(tokenizer.encode)
    cut = cut.flatmap(lambda ids: st.integers(0, len(ids)).map(lambda n: ids[:n]))
    return st.lists(one.map(lambda i: [i]) | cut, max_size=14).map(lambda parts: [i for part in parts for i in part])


def test_arrays_equal_lists_for_each_kind(kind):
    """Bug: a traceback from each tokenizer that is not a BPE, in preparations and in HellaSwag."""
    texts = ["the cat sat", "don't, 123  é😀", "", "x"]
    assert [ids.tolist() for ids in kind.encode_arrays(texts)] == kind.encode_batch(texts)


# ---------------------------------------------------------------------------------------
# Text while it is written.


def pieces_equal_the_decoded_text(kind, data):
    prompt, ids = data.draw(some_ids(kind)), data.draw(some_ids(kind))
    assert "".join(streamed(TokenDecoder(kind, prompt), ids)) == continuation(kind, prompt, ids)


@pytest.mark.slow
@settings(max_examples=400)
@given(data=st.data())
def test_streamed_pieces_of_many_more_ids(kind, data):
    """Guards the same, where four hundred examples find what thirty do not."""
    pieces_equal_the_decoded_text(kind, data)


@settings(max_examples=30)
@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text_less_the_prompt(kind, data):
    """Bugs: "The" and "water" became "Thewater", "€" three U+FFFD; for any ids at all and any tokenizer."""
    pieces_equal_the_decoded_text(kind, data)


CASES = {
    "gaps": ["â", None, None, None, None, "Ĥ", "¬"],  # the bytes of "€", and between them ids that no token has
    "byte fallback, five spaces stripped": ["a", *[SPACES] * 6, "b"],
    "a decoder that looks at the whole text": ["water", "the"],
}


@pytest.mark.parametrize("name", CASES)
def test_cases_that_chance_seldom_finds(name):
    """Bugs: a window of ids without text, one whose text the decoder strips, one after which the text changes."""
    tokenizer = tokenizer_of(name)
    ids = [151 if token is None else tokenizer.backend.token_to_id(token) for token in CASES[name]]
    assert tokenizer.decode(ids) in ("€", "a      b", "wateRhe")
    assert "".join(streamed(TokenDecoder(tokenizer), ids)) == tokenizer.decode(ids)


parts = [*LETTERS, *WORDS, " ", "  ", "\n", "é", "€", "😀", "\u0301", "\ufffd", "▁", "T"]
texts = st.lists(st.sampled_from(parts), max_size=20).map("".join)


@settings(max_examples=25)
@given(text=texts, cut=st.integers(0, 40))
def test_a_text_cut_anywhere_goes_on_as_it_is_decoded(kind, text, cut):
    """Bug: the same for what people write."""
    ids = kind.encode(text)
    prompt, ids = ids[:cut], ids[cut:]
    assert "".join(streamed(TokenDecoder(kind, prompt), ids)) == continuation(kind, prompt, ids)


@settings(max_examples=20)
@given(data=st.data())
def test_a_sample_in_pieces_is_its_text_up_to_the_stop_string(kind, data):
    """Bug: a stop string that is looked for in pieces which later change."""
    prompt, ids = data.draw(some_ids(kind)), data.draw(some_ids(kind))
    ids = [i for i in ids if i != kind.eot_token]
    sample, shown = Sample(kind, ["te", "'t"], prompt), ""
    for i in ids:
        shown += "" if sample.finish_reason else sample.push(i)
    shown += "" if sample.finish_reason else sample.finish("length")
    whole = continuation(kind, prompt, ids)
    ends = [end for end in accumulate([1] * len(whole)) if whole[:end].endswith(("te", "'t"))]
    assert shown == sample.text == (whole[: ends[0] - 2] if ends else whole)


def test_a_token_costs_the_same_however_long_the_text_is(kind, monkeypatch):
    """Bug: decoding all that was written for each new token, which for a long text takes the square of the time."""
    ids = torch.randint(kind.vocab_size, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    decoder, sizes, decode = TokenDecoder(kind), [], kind.decode
    monkeypatch.setattr(kind, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    streamed(decoder, ids)
    assert sum(sizes) < 11 * len(ids)


@pytest.mark.parametrize("name", ["byte-level", "byte fallback", "metaspace", "word piece", "words"])
def test_text_is_shown_with_its_token(name):
    """Bug: a rule that holds everything back to the end is right, and of no use to who is reading."""
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode("the water not the water")
    pieces = streamed(TokenDecoder(tokenizer, ids[:1]), ids[1:])
    assert all(pieces[:-1]) and pieces[-1] == ""


@pytest.fixture
def world(monkeypatch):
    """world(tokenizer, ids): a model that says these ids, whatever it is asked; --prompt and so on as in real life."""

    def make(tokenizer, ids):
        torch.manual_seed(0)
        shape = dict(n_layer=1, n_head=1, n_embd=8, dropout=0.0)
        net = GPT(GPTConfig(64, vocab_size=tokenizer.vocab_size, valid_vocab_size=tokenizer.vocab_size, **shape)).eval()
        script = iter(ids)

        def logits(x):
            told = torch.full((len(x),), next(script, tokenizer.eot_token))
            return torch.nn.functional.one_hot(told, tokenizer.vocab_size).float() * 99

        monkeypatch.setattr(net, "logits", logits)
        monkeypatch.setattr(inference, "find_checkpoint", lambda path: Path("toy/step_00000007"))
        monkeypatch.setattr(inference, "read_model", lambda path, device: (net, tokenizer))
        monkeypatch.setattr(inference, "sample_faster", lambda net, dtype: net)
        return net

    return make


def after(tokenizer, prompt, text):
    """The ids that turn the prompt's into those of prompt + text."""
    ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + text)
    assert whole[: len(ids)] == ids
    return whole[len(ids) :]


SAID = {
    "byte fallback": ("the", " water € 😀."),
    "metaspace": ("the", " water not the"),
    "word piece": ("the", " water, don't!"),
    "words": ("the", " water not"),
    "suffixes": ("the", " water"),
    "byte-level": ("the", " water € 😀."),
}


@pytest.mark.parametrize("name", SAID)
def test_samples_in_training_continue_their_prompt(name, world):
    """Bugs: a first word without its space ("The waterarticle"), and U+FFFD for "€"."""
    tokenizer, (prompt, text) = tokenizer_of(name), SAID[name]
    net = world(tokenizer, after(tokenizer, prompt, text))
    expected = tokenizer.decode(tokenizer.encode(prompt + text)).removeprefix(prompt)
    assert sample_text(net, tokenizer, prompt, GREEDY, 40) == [expected]
    assert expected.startswith(" ") and "\ufffd" not in expected


@pytest.mark.parametrize("name", SAID)
def test_the_command_line_continues_its_prompt(name, world, capsys, monkeypatch):
    """Bug: the same in what is streamed, in --json and in a conversation."""
    tokenizer, (prompt, text) = tokenizer_of(name), SAID[name]
    ids = after(tokenizer, prompt, text)
    expected = tokenizer.decode(tokenizer.encode(prompt + text)).removeprefix(prompt)
    flags = ["--preset", "greedy", "--device", "cpu", "--dtype", "float32", "--max_new_tokens", "40"]
    for more in (["--prompt", prompt], ["--prompt", prompt, "--json"], ["--interactive"]):
        world(tokenizer, ids)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{prompt}\n".encode())))
        assert run(lambda more=more: inference.main([*flags, *more])) == 0
        out = capsys.readouterr().out
        shown = json.loads(out)["text"] if "--json" in more else out.removeprefix("> ").split("\n")[0]
        assert shown == ("" if "--interactive" in more or "--json" in more else prompt) + expected


# ---------------------------------------------------------------------------------------
# Text and its bytes.


def test_bytes_of_added_tokens_count():
    """Bug: runs of spaces counted 0 bytes, so that bits per byte of code was 28% too high, silently."""
    tokenizer = TextTokenizer(spaces_added(), "spaces")
    sizes = tokenizer.token_bytes()
    for text in ("def f(x):\n        return   x", " " * 50 + "größe\t größe", "<|endoftext|>"):
        assert sum(sizes[i] for i in tokenizer.encode(text)) == len(text.encode())
    assert sizes[tokenizer.eot_token] == 0 and sizes[tokenizer.encode(" " * 24)[0]] == 24


@settings(max_examples=25)
@given(text=st.text(max_size=30) | texts)
def test_bytes_of_tokens_add_up_to_the_text_or_are_not_given(kind, text):
    """Bug: a figure of bits per byte that is wrong in silence."""
    sizes = kind.token_bytes()
    assert sizes is None or sum(sizes[i] for i in kind.encode(text)) == len(text.encode())


def normal(backend):
    backend.normalizer = normalizers.NFC()


def prefix_space(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def dropped_spaces(backend):
    cut = pre_tokenizers.Split(" ", "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def swallowed_spaces(backend):
    backend.add_tokens([AddedToken("x", rstrip=True)])


def kept(backend):
    cuts = [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Digits(True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])


CHANGES = {"normal": normal, "prefix": prefix_space, "dropped": dropped_spaces, "swallowed": swallowed_spaces}


@pytest.mark.parametrize("change", CHANGES)
def test_no_sizes_where_text_is_changed_before_it_is_cut(change):
    """Bug: bytes that the tokens do not stand for; each of these changes a text's size."""
    backend = byte_level()
    CHANGES[change](backend)
    tokenizer = TextTokenizer(backend, "changed")
    text = "a\u0301 x  y"
    assert len(tokenizer.encode(text)) != len(text.encode())  # every token here is one byte
    assert tokenizer.token_bytes() is None


def test_sizes_where_the_text_is_only_cut_otherwise():
    """Bug: a rule so strict that Llama 3's kind, which cuts words by a pattern of its own, has no bits per byte."""
    backend = byte_level()
    kept(backend)
    assert TextTokenizer(backend, "kept").token_bytes() == TextTokenizer(byte_level(), "plain").token_bytes()


# ---------------------------------------------------------------------------------------
# What a vocabulary cannot express.


def saved(backend, folder, **about):
    backend.save(str(folder / "tokenizer.json"))
    if about:
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def without(backend, *tokens, **changes):
    """The tokenizer without some tokens of its BPE, and with other settings of it."""
    contents = json.loads(backend.to_str())
    contents["model"] |= changes
    for token in tokens:
        del contents["model"]["vocab"][token]
    return Tokenizer.from_str(json.dumps(contents))


def characters_only():
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", *LETTERS])}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


LOSING = {
    "byte-level without a byte": (lambda: without(byte_level(), "Ã"), "vanish from the text"),
    "BPE of characters": (characters_only, "vanish from the text"),
    "byte fallback without a byte": (lambda: without(byte_fallback(), "<0xC3>", unk_token=None), "vanish"),
    "the marker is the unknown token": (
        lambda: without(with_gaps(), "Ã", unk_token="<eos>"),
        "become the end-of-text token",
    ),
}


@pytest.mark.parametrize("what", LOSING)
def test_a_vocabulary_that_loses_text_in_silence_is_refused(what, tmp_path):
    """Bug: "naïve" lost a letter, and nothing was counted or said."""
    make, words = LOSING[what]
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(saved(make(), tmp_path))
    assert "\n" not in str(error.value) and "256 bytes" in str(error.value)


@pytest.mark.parametrize("name", KINDS)
def test_text_without_a_token_is_counted_by_one_id(name, tmp_path):
    """Bug: losses that who prepares a corpus cannot count."""
    tokenizer = load_tokenizer(saved(KINDS[name](), tmp_path))
    ids = tokenizer.encode("naïve 漢")
    if tokenizer.unk_token is None:
        assert tokenizer.lossless and tokenizer.decode(ids) == "naïve 漢"
    else:
        assert not tokenizer.lossless and tokenizer.unk_token in ids
    assert tokenizer.lossless == (name in ("byte-level", "spaces added", "gaps") or "fallback" in name)


def test_a_byte_level_vocabulary_with_an_unknown_token_counts_it(tmp_path):
    """Bug: the neighbour of a refused one, which loses the same letter but says so."""
    backend = without(byte_level(), "Ã", unk_token="?")
    tokenizer = load_tokenizer(saved(backend, tmp_path))
    assert tokenizer.encode("é?").count(tokenizer.unk_token) == 2 and tokenizer.token_bytes() is None


# ---------------------------------------------------------------------------------------
# The marker.


@pytest.mark.parametrize("name", KINDS)
def test_a_literal_marker_never_becomes_the_marker(name):
    """Bug: a Unigram model or a list of words has the marker among its words, and "</s>" in a text ended a document."""
    tokenizer = tokenizer_of(name)
    marker = tokenizer.backend.id_to_token(tokenizer.eot_token)
    for text in (marker, f"the {marker} water", f"{marker}{marker} {marker}", f"the{marker}water"):
        assert tokenizer.eot_token not in tokenizer.encode(text)
        assert tokenizer.encode(text)
    if tokenizer.lossless:
        assert tokenizer.decode(tokenizer.encode(f"a{marker}b")) == f"a{marker}b"


def test_a_marker_that_text_cannot_avoid_is_an_error():
    """Bug: the letter "x" as the end of text, which words then hold."""
    with pytest.raises(UserError, match="turns text into its end-of-text token 'x'"):
        TextTokenizer(metaspace(), "x", "x").encode("xx")


def other_marker():
    """A vocabulary whose end of text has a name of its own."""
    contents = json.loads(byte_level().to_str())
    contents["added_tokens"][0]["content"] = "<|story|>"
    backend = Tokenizer.from_str(json.dumps(contents))
    backend.add_special_tokens(["<|pad|>"])
    return backend


def test_a_marker_of_another_name_is_named_by_the_flag(tmp_path):
    """Bug: a vocabulary whose end of text is none of the five known names was refused, with no flag to name it."""
    folder = saved(other_marker(), tmp_path)
    with pytest.raises(UserError, match=r"expected one of <\|endoftext\|>.*; --eot_token names another"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "<|story|>").eot_token == 256
    with pytest.raises(UserError, match=r"no end-of-text token; expected one of <\|nowhere\|>$"):
        load_tokenizer(folder, "<|nowhere|>")


@pytest.mark.parametrize("marker", ["<|story|>", "<|pad|>"])
def test_the_choice_of_a_marker_is_saved(marker, tmp_path):
    """Bug: a checkpoint whose tokenizer cannot be loaded, or that ends its texts with another token than it learnt."""
    (tmp_path / "copy").mkdir()
    chosen = load_tokenizer(saved(other_marker(), tmp_path), marker)
    chosen.save(tmp_path / "copy")
    back = load_tokenizer(tmp_path / "copy")
    assert (back.eot_token, back.fingerprint()) == (chosen.eot_token, chosen.fingerprint())
    assert load_tokenizer(tmp_path / "copy" / "tokenizer.json").eot_token == chosen.eot_token


@pytest.mark.parametrize("about", ["<|story|>", {"content": "<|story|>", "__type": "AddedToken", "special": True}])
def test_the_marker_that_a_hugging_face_folder_names(about, tmp_path):
    """Bug: the five names come before what the folder itself says."""
    backend = other_marker()
    backend.add_special_tokens(["</s>"])
    assert load_tokenizer(saved(backend, tmp_path, eos_token=about)).eot_token == 256
    assert load_tokenizer(tmp_path, "</s>").eot_token == 258


@pytest.mark.parametrize("about", [None, 5, [], "<|nowhere|>", {"content": None}])
def test_a_configuration_that_names_no_token_of_the_vocabulary(about, tmp_path):
    """Bug: junk in a stranger's file in the place of a known name."""
    assert load_tokenizer(saved(byte_level(), tmp_path, eos_token=about)).eot_token == 256
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_training_takes_the_marker_from_its_flag(toy, corpus, tmp_path):
    """Bug: a flag that is read and not handed on: the data, made with another end of text, must be refused."""
    contents = json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 512, "content": "<|story|>"})
    folder = saved(Tokenizer.from_str(json.dumps(contents)), tmp_path)
    with pytest.raises(UserError, match=r"no end-of-text token; expected one of <\|nowhere\|>"):
        train(replace(toy, tokenizer=str(folder), eot_token="<|nowhere|>"))
    with pytest.raises(UserError, match="was made with tokenizer 'byte'"):
        train(replace(toy, tokenizer=str(folder), eot_token="<|story|>"))


def test_transformers_reads_the_marker_that_is_saved(tmp_path):
    """Bug: a note about the marker that only this repository understands."""
    transformers = pytest.importorskip("transformers")
    load_tokenizer(saved(other_marker(), tmp_path), "<|story|>").save(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 256


def test_checkpoints_keep_the_choice(tmp_path):
    """Bug: the same through a checkpoint, whose manifest names every file."""
    import checkpoint

    tokenizer = TextTokenizer(other_marker(), "stories", "<|story|>")
    config = GPTConfig(8, vocab_size=320, valid_vocab_size=258, n_layer=1, n_head=1, n_embd=8, dropout=0.0)
    tensors = {checkpoint.MODEL: GPT(config).state_dict(), checkpoint.OPTIMIZER: {}}
    checkpoint.write_checkpoint(tmp_path / "run", 1, config, tensors, {"step": 1}, tokenizer)
    checkpoint.verify(tmp_path / "run" / "step_00000001")
    assert checkpoint.load_model(tmp_path / "run")[1].fingerprint() == tokenizer.fingerprint()
