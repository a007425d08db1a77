"""Text to token ids and back: the one file that knows tokenizers.

GPT-2's byte-level BPE by default, or any tokenizer.json. Text is only text: a literal
"<|endoftext|>" inside a document is split like any other characters and never becomes the
marker that separates documents.

Notable: two ways to the same ids. `tokenizers` reads every tokenizer.json, and what it gives is the
definition; for a vocabulary of GPT-2's kind tiktoken gives the same ids about eight times as fast.
`tiktoken_of` says when the two are equal, and why.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.cli import UserError

FILE = "tokenizer.json"
GPT2_FILES = ("vocab.json", "merges.txt")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # the first one present

# GPT-2's words. All but the lookahead is in one group, which the regex engine runs as one automaton: 1.7 times as fast
# as tiktoken's own form of the same pattern.
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"


class TextTokenizer:
    """encode, decode, and what others need to know of a vocabulary."""

    def __init__(self, backend: Tokenizer, name: str):
        backend.encode_special_tokens = True  # special tokens in the text are text
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.name = backend, name
        present = [t for t in END_OF_TEXT if backend.token_to_id(t) is not None]
        if not present:
            raise UserError(f"{name}: no end-of-text token; expected one of {', '.join(END_OF_TEXT)}")
        self.eot_token = backend.token_to_id(present[0])
        backend.add_special_tokens([AddedToken(present[0], special=True, normalized=False)])  # if the file forgot to
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        if self.vocab_size > 2 * len(ids) + 1024:  # tables and models have a row for each id, used or not
            raise UserError(f"{name}: {len(ids):,} tokens, but one has the id {max(ids):,}; expected ids without gaps")

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with nothing added before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, for many; half a surrogate pair, which is not text, becomes U+FFFD as in tiktoken."""
        texts = [replace_surrogates(text) for text in texts]
        with failing_in_one_line(f"tokenizer {self.name!r} cannot encode this text"):
            return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode_batch`, with an array (n,) of uint32 for each text: for corpora, fast and small in memory."""
        if self.fast is None:
            return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]
        return [self.encode_fast(text) for text in texts]

    @cached_property
    def fast(self):
        """`tiktoken_of` this tokenizer, made when it is first asked for: it takes a quarter of a second."""
        return tiktoken_of(self.backend)

    def encode_fast(self, text: str) -> np.ndarray:
        encoding, ids = self.fast
        with failing_in_one_line(f"tokenizer {self.name!r} cannot encode this text"):
            try:
                return ids[encoding.encode_to_numpy(replace_surrogates(text), disallowed_special=())]
            except ValueError:  # a million spaces in a row overflow the stack of its regex engine
                return np.array(self.encode(text), np.uint32)

    def decode(self, ids) -> str:
        """The text of the ids, markers included; bytes that are not UTF-8 become U+FFFD."""
        with failing_in_one_line(f"tokenizer {self.name!r} cannot decode these ids"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> list[int] | None:
        """Bytes of text that each id stands for, 0 for markers; None if the BPE is not byte-level."""
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        sizes = [0] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            sizes[i] = len(token)  # a byte-level BPE writes each byte as one character
        for i in self.backend.get_added_tokens_decoder():
            sizes[i] = 0
        return sizes

    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges and marker: equal where ids mean the same, wherever it came from."""
        return self._fingerprint

    @cached_property  # a fifth of a second for GPT-2, and asked for again and again
    def _fingerprint(self):
        merges = json.loads(self.backend.to_str())["model"].get("merges") or []
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        vocab = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps([vocab, merges, self.eot_token]).encode()).hexdigest()

    def save(self, directory):
        """Writes tokenizer.json; `load_tokenizer(directory)` gives this tokenizer back."""
        Path(directory, FILE).write_text(self.backend.to_str(), encoding="utf-8")


@contextmanager
def failing_in_one_line(what):
    """Turns what the library raises into a UserError: bare Exceptions for malformed files, and panics of
    its Rust code, which are no Exceptions, for files that only seem well formed."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({error})") from error


def replace_surrogates(text: str) -> str:
    """The text, with U+FFFD for each half of a surrogate pair that stands alone and so has no UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def tiktoken_of(backend: Tokenizer):
    """(tiktoken's encoder, id of each of its ranks as an array), or None where it could give other ids than `backend`.

    They differ in one rule: `tokenizers` merges the listed pairs of neighbours, in the order of the list; tiktoken
    merges any two neighbours whose bytes together are a token, the earliest token first. The ids are the same if
      1. words are split in GPT-2's way, and merges alone decide what becomes of a word (`is_gpt2_like`),
      2. each merge joins bytes or results of earlier merges, and no two give the same token,
      3. each token is what its own text is encoded to.
    Why: by 2 each merge only makes parts for later ones, so they take place in the order of the list. Take two
    neighbours x and y whose bytes are those of a token t. No merge has crossed the ends of that stretch, so it is in
    the state it would be in as a text of its own; and by 3 such a text is, when t's turn comes, in the two parts of
    t's listed merge, and afterwards t. If x and y are not these parts, t's turn is still to come, and before it comes
    x or y must merge with a neighbour outside. So tiktoken, too, merges nothing but the listed pairs.
    """
    import tiktoken

    contents = json.loads(backend.to_str())
    if not is_gpt2_like(contents):
        return None
    byte, vocab, model = byte_characters(), contents["model"]["vocab"], backend.model
    tokens = dict.fromkeys(byte)  # in the order of their ranks
    for a, b in contents["model"]["merges"]:
        if a not in tokens or b not in tokens or a + b in tokens:
            return None
        tokens[a + b] = None
    if not tokens.keys() <= vocab.keys() or any([t.id for t in model.tokenize(t)] != [vocab[t]] for t in tokens):
        return None
    ranks = {bytes(byte[c] for c in token): rank for rank, token in enumerate(tokens)}
    marker = {END_OF_TEXT[0]: len(ranks)}  # never given out; without one tiktoken is half as fast
    encoding = tiktoken.Encoding("of tokenizer.json", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=marker)
    return encoding, np.array([vocab[token] for token in tokens], np.uint32)


def is_gpt2_like(contents: dict) -> bool:
    """Whether a tokenizer.json splits words as GPT-2 does, changes no text before, and only merges within words."""
    words, model = contents["pre_tokenizer"] or {}, contents["model"]
    return (
        contents["normalizer"] is None
        and all(token["special"] for token in contents["added_tokens"])  # the others would be found in the text
        and words.get("type") == "ByteLevel"
        and words["use_regex"]
        and not words["add_prefix_space"]
        and model["type"] == "BPE"
        and not any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model["ignore_merges"]
    )


def byte_characters() -> dict[str, int]:
    """The byte that each of the 256 characters of a byte-level vocabulary stands for: those that print for themselves,
    in the order of the others U+0100, U+0101, ... for the rest (Radford et al. 2019)."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def load_tokenizer(name_or_path: str | os.PathLike = "gpt2") -> TextTokenizer:
    """A folder or file on disk if there is one of that name, else a model on the Hugging Face hub.

    A folder holds tokenizer.json, or GPT-2's vocab.json and merges.txt. From the hub (fetched
    once, then served from its cache) comes tokenizer.json. Raises UserError.
    """
    path, name = Path(name_or_path), Path(name_or_path).name
    if os.path.isfile(path / FILE):  # os.path's tests are False, not errors, for a name no file can have
        path = path / FILE
    elif os.path.isdir(path) and not all((path / f).is_file() for f in GPT2_FILES):
        raise UserError(f"{path}: found neither {FILE} nor {' and '.join(GPT2_FILES)} in it")
    elif not os.path.exists(path):
        path, name = Path(download(str(name_or_path))), str(name_or_path)
    with failing_in_one_line(f"{path}: not a tokenizer that can be read"):
        if path.is_dir():
            return TextTokenizer(byte_level_bpe(*(str(path / f) for f in GPT2_FILES)), "gpt2")
        return TextTokenizer(Tokenizer.from_file(str(path)), name)


def download(name: str) -> str:
    """Path of the hub model's tokenizer.json in the local cache; fetches it the first time."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        try:
            return hf_hub_download(name, FILE, local_files_only=True)  # no network once it is here
        except LocalEntryNotFoundError:
            return hf_hub_download(name, FILE)
    except HFValidationError as error:
        raise UserError(f"tokenizer {name!r}: no such file or folder, and not a name on the hub") from error
    except Exception as error:  # a hub has many ways to be out of reach
        raise UserError(
            f"tokenizer {name!r}: not on disk, not in the cache, and the hub gave none "
            f"({type(error).__name__}). Put {FILE} (or {' and '.join(GPT2_FILES)}) of {name!r} "
            "into a folder and name that folder with --tokenizer"
        ) from error


def byte_level_bpe(vocab: str, merges: str) -> Tokenizer:
    """GPT-2's tokenizer from its two original files (Radford et al. 2019)."""
    backend = Tokenizer(models.BPE.from_file(vocab, merges))
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - backend.get_vocab().keys()
    if missing:
        raise UserError(f"{vocab}: lacks {len(missing)} of the 256 bytes, so it is not GPT-2's kind of vocabulary")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT[0], special=True)])
    return backend
