"""The tokenizer against tiktoken, which is the reference for GPT-2's ids, and against every way of not being there."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, processors

from support.cli import UserError
from tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer
from toy import ROOT

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

HARD = {
    "empty": "",
    "contractions": "I'm you're he's we've they'll she'd don't I'M YOU'RE 'S 'tis ''s 'll'll it's's",
    "typographic apostrophe": "don’t it’s",
    "spaces": " a  b   c    d\te\t\tf \t g",
    "leading and trailing spaces": "   x   ",
    "only spaces": "       ",
    "one newline": "\n",
    "newlines": "a\n\nb\n\n\nc\r\nd\re\n \n  \n f\n",
    "unicode spaces": "a\u00a0b\u2003c\u3000d\u202fe\u200bf\ufeffg\u2028h\u2029i\u0085j\u1680k \u00a0 \u00a0l",
    "other controls": "\x00\x01\x1b[0m\x7f\x80\x9f",
    "NUL in a word": "a\x00b \x00 c",
    "combining marks": "e\u0301 a\u030a\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A\u0489 \u0301 \u0301\u0301",
    "composed and decomposed": unicodedata.normalize("NFC", "Å é ﬁ") + unicodedata.normalize("NFD", "Å é ﬁ"),
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ☺️ 1️⃣ 😀😀 a😀b",
    "right to left": "שלום עולם مرحبا بالعالم \u202eabc\u202c \u200f!",
    "scripts": "日本語 中文 한국어 ไทย हिन्दी Ελληνικά Кириллица አማርኛ 𝔘𝔫𝔦 𐍈 𒀀",
    "digits": "0 12 345 6789 1234567890123 3.14 1,000,000 ²³ ½ Ⅷ ٣٤٥ १२३",
    "digits and letters": "a1b2c3 1st 2nd x86_64 0xDEADBEEF",
    "punctuation": "...!!!??? -- — … (a) [b] {c} <d> a_b a-b a/b \\n #$%&*+=@^`|~ ''' \"\"\"",
    "code": "def f(x):\n    return {'a': x[0], \"b\": x[1:]}  # comment\n\n\tif x != y:\n\t\tpass\n",
    "marker": EOT,
    "markers in text": f"a{EOT}b {EOT} {EOT}{EOT}\n{EOT}",
    "broken markers": "<|endoftext| > <|ENDOFTEXT|> |endoftext|> <|endoftext",
    "other markers": "<s></s> <eos> [EOS] [CLS] <pad> <|im_start|> <|end_of_text|> <unk>",
    "long run of spaces": " " * 3000 + "x",
    "long run of newlines": "\n" * 3000,
    "long run of one letter": "a" * 3000,
    "long run of dashes": "-" * 3000 + "=" * 3000,
    "long word": "Donaudampfschifffahrtsgesellschaft" * 40,
    "not characters": "\ufffe\uffff\U0010ffff\ue000\ufffd",
}
SURROGATES = {  # half a pair is not text; tiktoken writes U+FFFD for it, and joins a pair given in halves
    "high alone": "a\ud800b",
    "low alone": "\udfff",
    "wrong order": "\ude00\ud83d",
    "pair in halves": "x\ud83d\ude00y",
    "pair and half": "\ud83d\ud83d\ude00 é",
}


def printable_bytes():
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def tiktoken_from(vocab):
    """tiktoken's encoder of a byte-level vocabulary {token: id}; an id is the rank of its merge, as in GPT-2."""
    import tiktoken

    byte = printable_bytes()
    ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items() if token != EOT}
    special = {EOT: len(ranks)}
    return tiktoken.Encoding("reference", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="session")
def gpt2(test_data):
    return load_tokenizer(test_data / "gpt2_tokenizer")


@pytest.fixture(scope="session")
def gpt2_reference(test_data):
    return tiktoken_from(json.loads((test_data / "gpt2_tokenizer" / "vocab.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def byte_reference(byte_tokenizer):
    return tiktoken_from(byte_tokenizer.backend.get_vocab(with_added_tokens=True))


@pytest.fixture(params=["gpt2", "byte"], scope="session")
def pair(request):
    """A tokenizer of ours and tiktoken's of the same vocabulary: GPT-2's where it is here, a small one always."""
    names = {"gpt2": ("gpt2", "gpt2_reference"), "byte": ("byte_tokenizer", "byte_reference")}[request.param]
    return tuple(request.getfixturevalue(name) for name in names)


def same_arrays(arrays, lists):
    return all(a.dtype == np.uint32 and a.tolist() == ids for a, ids in zip(arrays, lists, strict=True))


def agree(pair, text):
    ours, reference = pair
    ids = ours.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert same_arrays(ours.encode_arrays([text]), [ids])
    assert ours.eot_token not in ids
    return ids


# ---------------------------------------------------------------------------------------
# Ids.


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_ids_equal_tiktokens_on_hard_text(pair, text):
    """Guards the split into words, the bytes, the merges, and the way back."""
    assert pair[0].decode(agree(pair, text)) == text


@pytest.mark.parametrize("text", SURROGATES.values(), ids=SURROGATES)
def test_half_a_surrogate_pair_is_encoded_as_in_tiktoken(pair, text):
    """Guards documents cut inside an emoji: an exception here would end a preparation hours in."""
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert pair[0].decode(agree(pair, text)) == repaired


pieces = st.sampled_from(
    [EOT, "<|", "|>", "'s", "'ll", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u0301", "é", "😀", "1"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=8), st.text("ab '", max_size=8)), max_size=12).map("".join)


@given(text=texts)
@example(text="'" + EOT)
def test_ids_equal_tiktokens_on_any_text(pair, text):
    """Guards what nobody thought of; text is drawn with its traps in it."""
    assert pair[0].decode(agree(pair, text)) == text


@given(text=st.text(st.characters(codec=None), max_size=20))  # surrogates included
def test_any_string_at_all_is_encoded(pair, text):
    """Guards against a crash on what Python lets a string hold."""
    agree(pair, text)


def test_ids_equal_tiktokens_on_real_documents(gpt2, gpt2_reference, test_data):
    """Guards whole documents, in one batch; GPT-2's counts of the data itself are a second witness."""
    from pyarrow import parquet

    table = parquet.read_table(test_data / "corpus" / "val" / "00000.parquet", columns=["text", "token_count"])
    documents, counts = (table[name].to_pylist()[::7] for name in ("text", "token_count"))
    assert len(documents) == 40
    ids = gpt2.encode_batch(documents)
    assert same_arrays(gpt2.encode_arrays(documents), ids)
    assert ids == gpt2_reference.encode_ordinary_batch(documents, num_threads=2)
    assert [len(i) for i in ids] == counts
    assert [gpt2.decode(i) for i in ids] == documents


def test_known_ids_of_gpt2(gpt2):
    """Guards against a reference that is wrong in the same way: values as published with GPT-2."""
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.eot_token, gpt2.vocab_size, gpt2.decode([50256])) == (50256, 50257, EOT)
    assert gpt2.fingerprint() == "e49e7a5320e540ba86d47c5db469e6491cc823d5cb7a269eb2c984f35380198c"


def test_a_batch_equals_its_texts_one_by_one(byte_tokenizer):
    """Guards against padding, truncation or order of a batch, and one bad string that changes the others."""
    batch = [*HARD.values(), *SURROGATES.values(), "last"]
    assert byte_tokenizer.encode_batch(batch) == [byte_tokenizer.encode(text) for text in batch]
    assert byte_tokenizer.encode_batch([]) == []


def test_decode_takes_arrays_and_shows_markers(byte_tokenizer):
    """Guards ids as they come from a shard or a model, and markers swallowed on the way out."""
    ids = [byte_tokenizer.eot_token, *byte_tokenizer.encode("né")]
    assert byte_tokenizer.decode(np.array(ids, dtype=np.uint16)) == EOT + "né"
    assert byte_tokenizer.decode([]) == ""
    assert byte_tokenizer.decode(byte_tokenizer.encode("é")[:-1]) == "\ufffd", "half a character is not an exception"


def test_token_bytes_add_up_to_the_text(pair):
    """Guards bits per byte: the denominator is the sum over the ids, each one counted in UTF-8."""
    ours, _ = pair
    sizes = ours.token_bytes()
    for text in HARD.values():
        assert sum(sizes[i] for i in ours.encode(text)) == len(text.encode())


def test_token_bytes_of_each_id(pair):
    """Guards every single id, and the marker, which stands for no byte of text."""
    ours, reference = pair
    sizes = ours.token_bytes()
    assert len(sizes) == ours.vocab_size and sizes[ours.eot_token] == 0
    assert sizes == [
        0 if i == ours.eot_token else len(reference.decode_single_token_bytes(i)) for i in range(len(sizes))
    ]


def test_token_bytes_are_unknown_where_the_vocabulary_is_not_bytes():
    """Guards against a bits-per-byte figure made of characters."""
    assert TextTokenizer(Tokenizer(models.WordLevel({EOT: 0, "é": 1}, unk_token="é")), "words").token_bytes() is None


# ---------------------------------------------------------------------------------------
# The fast way gives the ids of the slow one, or is not taken.


@pytest.fixture(params=["gpt2", "byte"], scope="session")
def quick(request):
    """GPT-2's tokenizer where it is here, a small one always."""
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    return request.getfixturevalue("byte_tokenizer")


def test_the_fast_way_is_taken(quick):
    """Guards the tests below against showing nothing because the fast way is never taken."""
    assert quick.fast is not None


def test_without_the_fast_package_the_ids_are_the_same(byte_tokenizer, monkeypatch):
    """Bug: a machine for which there is no such package cannot prepare data."""
    monkeypatch.setitem(sys.modules, "fastokens", None)
    slow = TextTokenizer(Tokenizer.from_str(byte_tokenizer.backend.to_str()), "slow")
    texts = [*HARD.values()]
    assert slow.fast is None and same_arrays(slow.encode_arrays(texts), byte_tokenizer.encode_batch(texts))


def both_ways(tokenizer, texts):
    """What the slow way gives, after the fast one gave the same."""
    ids = tokenizer.encode_batch(texts)
    assert tokenizer.fast and same_arrays(tokenizer.encode_arrays(texts), ids)
    return ids


def around(characters):
    """Each character within words, digits, spaces and lines, alone and in pairs."""
    return "".join(f"a{c}b {c}1{c} {c}{c}\n{c} \n{c}'{c}s  {c}" for c in characters)


def test_arrays_equal_lists(quick):
    """Guards ids that are ranks, a batch out of order, the empty text and the empty batch."""
    both_ways(quick, [*HARD.values(), *SURROGATES.values(), "last"])
    assert quick.encode_arrays([]) == []


@given(text=texts)
@settings(max_examples=50)
def test_arrays_equal_lists_on_any_text(quick, text):
    both_ways(quick, [text])


def test_both_engines_have_the_same_letters_digits_and_spaces(quick):
    """Guards the classes of characters: two libraries, each with a Unicode table of its own. U+0085 is a space, U+001C
    to U+001F, which Python calls spaces, are not."""
    both_ways(quick, [around(map(chr, range(n, n + 64))) for n in range(0, 0x3100, 64)])


@pytest.mark.slow
def test_both_engines_agree_on_every_character(byte_tokenizer):
    """The same for all of Unicode: a new version of either library may know newer letters than the other. The classes
    do not depend on the vocabulary, so a small one will do. Planes 4 to 13 are empty, 15 and 16 for private use."""
    for n in (*range(0, 0x40000, 4096), *range(0xE0000, 0x110000, 0x10000)):
        both_ways(byte_tokenizer, [around(chr(c) for c in range(n, n + 4096) if not 0xD800 <= c < 0xE000)])


@pytest.mark.slow
def test_arrays_equal_lists_on_real_text(gpt2, test_data):
    """Guards what turns up once in ten million words."""
    from pyarrow import parquet

    path = test_data / "corpus" / "train" / "00000.parquet"
    for part in parquet.ParquetFile(path).iter_batches(256, columns=["text", "token_count"]):
        ids = both_ways(gpt2, part.column(0).to_pylist())
        assert [len(i) for i in ids] == part.column(1).to_pylist()


@pytest.mark.parametrize("text", ["a", "ab", " ", "\n", " \n", "é", "-", "\0", "  x"])
def test_one_megabyte_without_a_border(quick, text):
    """Guards against time that grows with the square of a word's length: this would take hours."""
    whole = text * (10**6 // len(text)) + "x"
    [ids] = quick.encode_arrays([whole])
    assert np.array(quick.token_bytes())[ids].sum() == len(whole.encode())
    both_ways(quick, [whole[-20_000:]])


def test_long_words_of_random_letters(quick):
    """Guards the same where the merges of a word have no order."""
    both_ways(quick, ["".join(random.Random(0).choices("abcdefgh", k=300_000))])


def test_a_million_spaces(quick):
    """Guards regex engines, some of which give up at about a million of them in a row."""
    both_ways(quick, ["a" + " " * 1_100_000 + "b"])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_memory_of_one_large_document(byte_tokenizer, tmp_path):
    """Guards workers against one long document, of which the slow way makes a hundred times its size."""
    byte_tokenizer.save(tmp_path)
    program = """
import re, sys
from pathlib import Path
import tokenizer
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
tokenizer, text = tokenizer.load_tokenizer(sys.argv[1]), "The quick brown fox, 12 naïve\\n\\n" * 300_000
assert tokenizer.fast
before = peak()
[ids] = tokenizer.encode_arrays([text])
assert len(ids) > 1_000_000
print(peak() - before)
"""
    command = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200, "megabytes, for a text of 10"


def normalizer_is(kind):
    def change(contents):
        contents["normalizer"] = {"type": kind}

    return change


def split_is(**settings):
    def change(contents):
        contents["pre_tokenizer"] |= settings

    return change


def split_is_another(contents):
    by_characters = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    bytes_only = contents["pre_tokenizer"] | {"use_regex": False}
    contents["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [by_characters, bytes_only]}


def no_split(contents):
    contents["pre_tokenizer"] = None


def model_has(**settings):
    def change(contents):
        contents["model"] |= settings

    return change


def another_token_is_found_in_text(contents):
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 512, "content": "quick", "special": False})


@pytest.mark.parametrize(
    "change",
    [
        normalizer_is("Lowercase"),
        normalizer_is("NFC"),
        split_is(add_prefix_space=True),
        split_is(use_regex=False),
        split_is_another,
        no_split,
        model_has(ignore_merges=True),
        model_has(end_of_word_suffix="</w>"),
        another_token_is_found_in_text,
    ],
)
def test_a_vocabulary_with_other_settings_goes_the_slow_way(byte_tokenizer, tmp_path, change):
    """Guards each setting that changes ids without changing the vocabulary."""
    tokenizer = TextTokenizer(Tokenizer.from_file(str(edited(byte_tokenizer, tmp_path, change))), "changed")
    assert tokenizer.fast is None
    texts = ["The quick e\u0301 fox", *HARD.values()]
    assert same_arrays(tokenizer.encode_arrays(texts), tokenizer.encode_batch(texts))


def test_merges_by_chance_go_the_slow_way(byte_tokenizer, tmp_path):
    """Guards dropout, which the fast way does not have."""
    assert load_tokenizer(edited(byte_tokenizer, tmp_path, model_has(dropout=1e-9))).fast is None


# ---------------------------------------------------------------------------------------
# Files.


def write_gpt2_files(tokenizer, folder):
    """vocab.json and merges.txt as GPT-2 has them, the marker within the vocabulary."""
    tokenizer.backend.model.save(str(folder))
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return folder


def edited(tokenizer, folder, change):
    """A tokenizer.json after `change` of its contents."""
    contents = json.loads(tokenizer.backend.to_str())
    change(contents)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(contents), encoding="utf-8")
    return path


def same(a, b):
    assert (a.vocab_size, a.eot_token, a.fingerprint()) == (b.vocab_size, b.eot_token, b.fingerprint())
    assert a.encode_batch([*HARD.values()]) == b.encode_batch([*HARD.values()])
    assert a.token_bytes() == b.token_bytes()


def test_save_and_load_keep_the_tokenizer(pair, tmp_path):
    """Guards the copy inside a checkpoint, and that a copy of the copy is the same file."""
    ours, _ = pair
    ours.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    same(loaded, ours)
    first = (tmp_path / "tokenizer.json").read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_a_folder_a_file_and_a_string_name_the_same_tokenizer(byte_tokenizer, tmp_path):
    """Guards each form that --tokenizer takes."""
    byte_tokenizer.save(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
        same(load_tokenizer(place), byte_tokenizer)


def test_both_kinds_of_files_share_ids_and_fingerprint(byte_tokenizer, tmp_path):
    """Guards shards made from one kind of file and trained on with the other."""
    same(load_tokenizer(write_gpt2_files(byte_tokenizer, tmp_path)), byte_tokenizer)


def test_the_library_of_others_writes_a_file_with_our_fingerprint(gpt2, test_data, tmp_path):
    """Guards GPT-2 from its two files against the tokenizer.json of transformers, which is what the hub serves."""
    from transformers import GPT2TokenizerFast

    GPT2TokenizerFast.from_pretrained(test_data / "gpt2_tokenizer").save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    same(load_tokenizer(tmp_path), gpt2)


def test_fingerprint_does_not_depend_on_how_merges_are_written(byte_tokenizer, tmp_path):
    """Guards older files, where a merge is the string "a b" and not the list ["a", "b"]."""

    def old_form(contents):
        contents["model"]["merges"] = [" ".join(m) for m in contents["model"]["merges"]]

    same(load_tokenizer(edited(byte_tokenizer, tmp_path, old_form)), byte_tokenizer)


def test_fingerprint_has_the_value_it_always_had():
    """Guards the shards and checkpoints out there: another way to compute it would refuse them all."""
    vocab, merges = {"a": 0, "b": 1, "ab": 2, EOT: 3}, [("a", "b")]
    written_out = [[[EOT, 3], ["a", 0], ["ab", 2], ["b", 1]], ["a b"], 3]
    expected = hashlib.sha256(json.dumps(written_out).encode()).hexdigest()
    assert TextTokenizer(Tokenizer(models.BPE(vocab, merges)), "small").fingerprint() == expected


def swap_two_ids(contents):
    vocab = contents["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_last_merge(contents):
    contents["model"]["merges"].pop()


def move_marker(contents):
    contents["added_tokens"][0]["content"] = "<eos>"


def add_marker(contents):
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 512, "content": "<extra>"})


@pytest.mark.parametrize("change", [swap_two_ids, drop_last_merge, move_marker, add_marker])
def test_fingerprint_differs_where_ids_mean_something_else(byte_tokenizer, tmp_path, change):
    """Guards training on shards of another vocabulary, however alike."""
    assert load_tokenizer(edited(byte_tokenizer, tmp_path, change)).fingerprint() != byte_tokenizer.fingerprint()


def marker_is_ordinary(contents):
    contents["added_tokens"][0]["special"] = False


def marker_is_in_the_vocabulary_only(contents):
    contents["model"]["vocab"][EOT] = 511
    contents["added_tokens"] = []


@pytest.mark.parametrize("change", [marker_is_ordinary, marker_is_in_the_vocabulary_only])
def test_the_marker_in_text_stays_text_whatever_the_file_says(byte_tokenizer, tmp_path, change):
    """Guards the border between documents against a tokenizer.json that does not call its marker special."""
    same(load_tokenizer(edited(byte_tokenizer, tmp_path, change)), byte_tokenizer)


def test_settings_in_the_file_do_not_change_the_ids(byte_tokenizer, tmp_path):
    """Guards against documents cut, padded or framed in silence because a tokenizer.json was saved that way."""
    backend = Tokenizer.from_str(byte_tokenizer.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    eot = (EOT, byte_tokenizer.eot_token)
    backend.post_processor = processors.TemplateProcessing(single=f"{EOT} $A {EOT}", special_tokens=[eot])
    backend.save(str(tmp_path / "tokenizer.json"))
    same(load_tokenizer(tmp_path), byte_tokenizer)


@pytest.mark.parametrize("marker", END_OF_TEXT)
def test_each_known_marker_is_found(marker):
    """Guards the names under which vocabularies other than GPT-2's keep their end of text."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.add_special_tokens([AddedToken("<other>", special=True), AddedToken(marker, special=True)])
    tokenizer = TextTokenizer(backend, "small")
    assert (tokenizer.eot_token, tokenizer.vocab_size) == (3, 4)


# ---------------------------------------------------------------------------------------
# What is missing or wrong ends in one line that a person can act on.


def refused(name, *expected):
    with pytest.raises(UserError) as error:
        load_tokenizer(name)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"{}", b"[1, 2]", b"<html>\n<body>\n", b"\xff\xfe\x00", b'{"model":\n\n1}']
)
@pytest.mark.parametrize("by_folder", [False, True])
def test_malformed_tokenizer_json(tmp_path, contents, by_folder):
    """Guards against the library's bare Exception: a cut download, a web page in its place, another file."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(contents)
    refused(tmp_path if by_folder else path, str(tmp_path), "not a tokenizer that can be read")


@pytest.mark.parametrize("vocab", ["", "[1]", '{"a": 0'])
def test_malformed_vocab_json(tmp_path, vocab):
    """Guards the two-file form in the same way."""
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    refused(tmp_path, str(tmp_path), "not a tokenizer that can be read")


@pytest.mark.parametrize("vocab", [{"a": 0}, {"a": "b"}, {"a</w>": 0, "b</w>": 1, EOT: 2}])
def test_vocabulary_that_lacks_bytes(tmp_path, vocab):
    """Guards against text that disappears: another model's vocab.json (GPT-1's, CLIP's) is no byte-level one."""
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    refused(tmp_path, str(tmp_path))


def test_malformed_merges(byte_tokenizer, tmp_path):
    """Guards merges of another vocabulary, and lines that are no merges."""
    write_gpt2_files(byte_tokenizer, tmp_path)
    for merges in ("#version: 0.2\nthree words here\n", "#version: 0.2\nqqq zzz\n"):
        (tmp_path / "merges.txt").write_text(merges)
        refused(tmp_path, str(tmp_path), "not a tokenizer that can be read")


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["merges.txt"], ["tokenizer_config.json"]])
def test_folder_without_the_files(tmp_path, files):
    """Guards against asking the hub for a model that has the name of a local folder."""
    for name in files:
        (tmp_path / name).write_text("{}")
    refused(tmp_path, str(tmp_path), "tokenizer.json", "vocab.json", "merges.txt")


def test_vocabulary_without_a_marker():
    """Guards against shards with no border between documents."""
    with pytest.raises(UserError, match=r"small: no end-of-text token; expected one of <\|endoftext\|>"):
        TextTokenizer(Tokenizer(models.BPE({"a": 0}, [])), "small")


@pytest.mark.parametrize(
    "name", ["no/such/folder", "/no/such/folder", "./gpt2_tokenizer", "two words", "a\x00b", "a\nb"]
)
def test_name_that_is_neither_a_path_nor_a_hub_name(monkeypatch, tmp_path, name):
    """Guards a mistyped path, which must not be explained as a network fault."""
    monkeypatch.chdir(tmp_path)
    refused(name, repr(name), "no such file or folder")


def test_name_too_long_for_the_file_system():
    """Guards against an OSError where only the answer "no" was expected."""
    refused("x" * 300)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of the hub, and no way out: any attempt to connect fails the test that made it."""
    import huggingface_hub.constants  # by name: the package loads its parts when they are asked for

    attempts = []

    def connect(*address, **_):
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield tmp_path / "hub"
    assert not attempts


def test_hub_out_of_reach_says_which_file_to_put_where(monkeypatch, hub):
    """Guards the first run without a network: what to fetch, where to put it, which flag names it."""
    import huggingface_hub

    calls = []

    def out_of_reach(name, file):
        calls.append((name, file))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", out_of_reach)
    refused("gpt2", "'gpt2'", "tokenizer.json", "vocab.json and merges.txt", "folder", "--tokenizer")
    assert calls == [("gpt2", "tokenizer_config.json")]


def test_from_the_hub_the_configuration_comes_first(monkeypatch, hub, byte_tokenizer, tmp_path):
    """Guards against a fetch that is cut between the two files: with tokenizer.json alone in the cache, the next start
    would take another end of text. A model without a configuration is none of that."""
    import huggingface_hub

    byte_tokenizer.save(tmp_path)
    there, calls = set(), []

    def fetch(name, file):
        calls.append(file)
        if file not in there:
            raise not_there()
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        there.add(file)
        calls.clear()
        same(load_tokenizer("some/model"), byte_tokenizer)
        assert calls == ["tokenizer_config.json", "tokenizer.json"]


def not_there():
    import httpx
    from huggingface_hub.errors import RemoteEntryNotFoundError

    return RemoteEntryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))


def test_hub_switched_off_says_which_file_to_put_where(monkeypatch, hub):
    """Guards the same through the real library, in its offline mode and with an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("some/model", "'some/model'", "tokenizer.json", "--tokenizer")


def in_cache(hub, name, **contents):
    """Files where the hub's library keeps them."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file, content in contents.items():
        (snapshot / f"{file}.json").write_text(content, encoding="utf-8")


def test_cached_tokenizer_needs_no_network(monkeypatch, hub, byte_tokenizer):
    """Guards every run after the first: nothing is asked of the hub, not even whether there is something newer."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # so that only we can avoid the network
    in_cache(hub, "some/model", tokenizer=byte_tokenizer.backend.to_str(), tokenizer_config="{}")
    tokenizer = load_tokenizer("some/model")
    same(tokenizer, byte_tokenizer)
    assert tokenizer.name == "some/model"


@pytest.mark.parametrize("error", [not_there(), ConnectionError("no route")])
def test_a_cached_file_that_came_alone_asks_for_the_configuration(error, monkeypatch, hub, byte_tokenizer, capsys):
    """Bug: other programs put tokenizer.json alone into the cache, and the end of text then was another one than on the
    next machine, in silence."""
    import huggingface_hub

    asked = []

    def fetch(name, file):
        asked.append(file)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    in_cache(hub, "some/model", tokenizer=byte_tokenizer.backend.to_str())
    same(load_tokenizer("some/model"), byte_tokenizer)
    assert asked == ["tokenizer_config.json"]
    assert ("--eot_token" in capsys.readouterr().err) == isinstance(error, ConnectionError)


def test_a_model_known_to_have_no_tokenizer_is_one_line(monkeypatch, hub, byte_tokenizer):
    """Bug: the cache's mark for a file that the hub does not have was taken for its path."""
    import huggingface_hub

    def fetch(name, file):
        raise not_there()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    in_cache(hub, "some/model", tokenizer_config="{}")
    missing = hub / "models--some--model" / ".no_exist" / ("0" * 40)
    missing.mkdir(parents=True)
    (missing / "tokenizer.json").touch()
    refused("some/model", "the hub gave none", "tokenizer.json")


def test_damaged_file_in_the_cache_is_named(hub, byte_tokenizer):
    """Guards a download that was cut short: the message names the file to delete."""
    in_cache(hub, "some/model", tokenizer=byte_tokenizer.backend.to_str()[:1000], tokenizer_config="{}")
    refused("some/model", os.sep.join(("models--some--model", "snapshots")), "not a tokenizer that can be read")


def test_a_local_folder_comes_before_the_hub(monkeypatch, hub, byte_tokenizer, tmp_path):
    """Guards against the network when a folder of that name is there."""
    (tmp_path / "gpt2").mkdir()
    byte_tokenizer.save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    same(load_tokenizer("gpt2"), byte_tokenizer)
