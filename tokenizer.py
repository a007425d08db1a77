"""Text to token ids and back: loads, trains and saves tokenizers.

    tokenizer = load_tokenizer("gpt2")               # from the Hugging Face hub, or its cache
    tokenizer = load_tokenizer("my_tokenizer/")      # a folder with tokenizer.json, or vocab.json and merges.txt
    ids = tokenizer.encode("Once upon a time")
    text = tokenizer.decode(ids)

A literal "<|endoftext|>" inside a document is text: it is split like any other characters and never becomes the marker
that separates documents.

The ids are those of the library `tokenizers`, which reads every tokenizer.json. For byte-level BPE of GPT-2's kind the
package fastokens gives the same ids 20 to 50 times as fast; `encode_arrays` uses it for corpora. Tests compare the two,
and a preparation compares them on a sample of its text.
"""

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from support.cli import UserError  # isort: split

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from support.files import write_json, write_whole

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"  # its eos_token names the token that ends a text; transformers reads it too
GPT2_FILES = ("vocab.json", "merges.txt")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # the first one present, if none is named

ALPHABET = pre_tokenizers.ByteLevel.alphabet()  # the 256 characters that stand for bytes (Radford et al. 2019)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # of a byte fallback (SentencePiece, Llama)
KEEP_TEXT = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts"}  # pre-tokenizers; but see `token_bytes`
BY_TOKEN = {"ByteLevel", "ByteFallback", "BPEDecoder", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class TextTokenizer:
    """Encodes and decodes, and describes its vocabulary.

    name         where it came from, for messages
    eot_token    id of the marker that ends a text (__init__ takes its name; default: the first of END_OF_TEXT)
    vocab_size   the largest id + 1
    unused       ids below vocab_size that no token has
    unk_token    id of characters that have no token. None where every byte has a token, or where the library refuses
                 such characters

    What a tokenizer changes on purpose (upper case, accents, spaces) does not count as lost. `load_tokenizer` refuses a
    vocabulary with which characters would vanish from a text.
    """

    def __init__(self, backend: Tokenizer, name: str, eot_token: str | None = None):
        backend.encode_special_tokens = True  # special tokens in the text are text
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.name = backend, name
        known = END_OF_TEXT if eot_token is None else (eot_token,)
        present = [t for t in known if backend.token_to_id(t) is not None]
        if not present:
            another = "; --eot_token names another" if eot_token is None else ""
            raise UserError(f"{name}: no end-of-text token; expected one of {', '.join(known)}{another}")
        self.eot_token = backend.token_to_id(present[0])
        marker = AddedToken(present[0], special=True, normalized=False)
        backend.add_special_tokens([marker])  # some files do not say that it is special
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        if self.vocab_size > 2 * len(ids) + 1024:  # a model has a row for each id, used or not
            raise UserError(f"{name}: {len(ids):,} tokens, but one has the id {max(ids):,}; expected ids without gaps")
        self.unused = frozenset(range(self.vocab_size)) - frozenset(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with nothing added before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, for many texts. Half a surrogate pair, which is not text, becomes U+FFFD, as in tiktoken."""
        texts = [replace_surrogates(text) for text in texts]
        with failing_in_one_line(f"tokenizer {self.name!r} cannot encode this text"):
            batch = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [self.without_marker(text) if self.eot_token in ids else ids for text, ids in zip(texts, batch)]

    def without_marker(self, text: str) -> list[int]:
        """Ids of a text whose characters became the marker, because a Unigram model has the marker among its words.

        The text is cut within each such place, and the parts are encoded alone. UserError where the marker is still
        there."""
        marker = self.backend.id_to_token(self.eot_token)
        first, *others = text.split(marker)
        parts = [first]
        for other in others:  # the cut is behind the marker's first character
            parts[-1] += marker[:1]
            parts.append(marker[1:] + other)
        ids = [i for part in parts for i in self.backend.encode(part, add_special_tokens=False).ids]
        if self.eot_token in ids:
            raise UserError(f"tokenizer {self.name!r} turns text into its end-of-text token {marker!r}; name another")
        return ids

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode_batch`, with an array (n,) of uint32 for each text: for corpora, faster and with less memory."""
        if self.fast is not None and texts:
            with failing_in_one_line(f"tokenizer {self.name!r} cannot encode this text"):
                ids, ends = self.fast.encode_batch_flat([replace_surrogates(text) for text in texts])
            ids, ends = np.frombuffer(ids, "<u4"), np.frombuffer(ends, "<u8").astype(np.int64)
            if self.eot_token not in ids:  # else characters of the text became the marker
                return np.split(ids, ends[1:-1])
        return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]

    @cached_property
    def fast(self):
        """The same tokenizer in the package fastokens. None where that is not installed, and for tokenizers other than
        byte-level BPE that cuts text into words as GPT-2 does: no test compares those."""
        tokens = self.backend.get_added_tokens_decoder().values()
        if not splits_as_gpt2(self.backend) or not all(token.special for token in tokens):
            return None  # `tokenizers` looks for an added token in the text unless it is special
        try:
            from fastokens import Tokenizer as FastTokenizer

            return FastTokenizer.from_json_str(json.dumps(self.contents | {"added_tokens": []}))
        except (ImportError, ValueError):  # not installed, or it cannot read this one, such as ids with gaps
            return None

    def decode(self, ids) -> str:
        """The text of the ids, markers included; bytes that are not UTF-8 become U+FFFD."""
        with failing_in_one_line(f"tokenizer {self.name!r} cannot decode these ids"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def contents(self) -> dict:
        """What tokenizer.json holds."""
        return json.loads(self.backend.to_str())

    @cached_property
    def unsettled(self):
        """The ids after which a later id may change the text so far; a set or a range.

        These are the byte tokens of a byte fallback, because the library decodes a run of them as a whole: one byte
        that does not fit turns all of the run into U+FFFD. They are all ids, if the decoder joins the tokens and then
        changes the text. After any id, a U+FFFD at the end may change too: it can be the first part of a character."""
        found, joined = frozenset(), False
        for step in steps(self.contents["decoder"]):
            kind = step["type"]
            local = kind in ("Fuse", "Strip") or (kind == "Replace" and len(step["pattern"].get("String", "")) == 1)
            if kind not in BY_TOKEN or (joined and not local):
                return range(self.vocab_size)
            joined = joined or kind in ("Fuse", "ByteLevel")
            if kind == "ByteFallback":
                vocab = self.backend.get_vocab(with_added_tokens=True).items()
                found = frozenset(i for t, i in vocab if len(t) == 6 and t.startswith("<0x") and t.endswith(">"))
        return found

    @cached_property
    def lossless(self) -> bool:
        """Whether each of the 256 bytes has a token of its own, so that every text has its ids."""
        model, cuts = self.contents["model"], steps(self.contents["pre_tokenizer"])
        if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in cuts):
            before, after = {"", model["continuing_subword_prefix"] or ""}, {"", model["end_of_word_suffix"] or ""}
            needed = [b + character + a for character in ALPHABET for b in before for a in after]
        else:
            needed = BYTE_TOKENS if model.get("byte_fallback") else [""]
        return all(self.backend.model.token_to_id(token) is not None for token in needed)

    @cached_property
    def unk_token(self) -> int | None:
        model = self.contents["model"]
        if self.lossless:
            return None
        if model["type"] == "Unigram":
            return model["unk_id"]
        return self.backend.model.token_to_id(model["unk_token"] or "")

    def refuse_silent_loss(self, path):
        """UserError where characters would have no id at all, or the marker's."""
        vanish = self.contents["model"]["type"] == "BPE" and self.contents["model"]["unk_token"] is None
        if self.lossless or not (vanish or self.unk_token == self.eot_token):
            return
        raise UserError(
            f"{path}: not every byte has a token, and what has none would "
            f"{'vanish from the text' if vanish else 'become the end-of-text token'}; expected a token for each of the "
            "256 bytes (initial_alphabet or byte_fallback of the trainer), or an unk_token of its own"
        )

    def token_bytes(self) -> list[int] | None:
        """Bytes of text for each id, 0 for markers. The sum over the ids of a text is its size in UTF-8.

        None unless this holds for every text: the BPE must be byte-level and have each byte, and nothing may change
        the text before (lower case, Unicode forms, a space added before it, spaces removed or taken into a token)."""
        before, model = steps(self.contents["pre_tokenizer"]), self.contents["model"]
        keep = all(step["type"] in KEEP_TEXT and step.get("behavior") != "Removed" for step in before)
        added = self.backend.get_added_tokens_decoder()
        changes = self.contents["normalizer"] or any(step.get("add_prefix_space") for step in before)
        changes = changes or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        changes = changes or any((t.lstrip or t.rstrip) and not t.special for t in added.values())
        if changes or not keep or not self.lossless or not any(step["type"] == "ByteLevel" for step in before):
            return None
        sizes = [0] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            sizes[i] = len(token)  # a byte-level BPE writes each byte as one character
        for i, token in added.items():  # one that is not special is found in the text before the BPE
            sizes[i] = 0 if token.special else len(token.content.encode())
        return sizes

    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges and marker: equal for tokenizers with the same ids, wherever they came from."""
        return self._fingerprint

    @cached_property  # takes a fifth of a second for GPT-2
    def _fingerprint(self):
        merges = self.contents["model"].get("merges") or []
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        vocab = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps([vocab, merges, self.eot_token]).encode()).hexdigest()

    def save(self, directory):
        """Writes tokenizer.json, and tokenizer_config.json, which names the marker, and flushes them to the disk."""
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.backend.id_to_token(self.eot_token)}
        write_whole(Path(directory, FILE), self.backend.to_str().encode())
        write_json(Path(directory, CONFIG), about)


def steps(part) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, in their order."""
    if part is None:
        return []
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part] if inner is None else [step for each in inner for step in steps(each)]


@contextmanager
def failing_in_one_line(what):
    """Turns what the library raises into a UserError, also panics of its Rust code, which are BaseExceptions."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({error})") from error


def replace_surrogates(text: str) -> str:
    """The text, with U+FFFD for each half of a surrogate pair that stands alone: it cannot be written as UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def splits_as_gpt2(backend: Tokenizer) -> bool:
    """Whether the tokenizer cuts text into words as GPT-2 does, changes nothing before, and merges within words."""
    words, model = backend.pre_tokenizer, backend.model
    if not isinstance(words, pre_tokenizers.ByteLevel) or not isinstance(model, models.BPE):
        return False  # only a BPE has the settings below
    others = (model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix, model.ignore_merges)
    return words.use_regex and not words.add_prefix_space and backend.normalizer is None and not any(others)


def load_tokenizer(name_or_path: str | os.PathLike = "gpt2", eot_token: str | None = None) -> TextTokenizer:
    """The tokenizer in a folder or file if there is one of that name, else that of a model on the Hugging Face hub.

    A folder holds tokenizer.json, or GPT-2's vocab.json and merges.txt. From the hub comes tokenizer.json, downloaded
    once and kept in the hub's cache. The token that ends a text is `eot_token` if given, else the eos_token of a
    tokenizer_config.json beside the file, else the first of END_OF_TEXT that is in the vocabulary. Raises UserError.
    """
    path, name = Path(name_or_path), Path(name_or_path).name
    if os.path.isfile(path / FILE):  # os.path answers False, and raises nothing, for impossible names
        path = path / FILE
    elif os.path.isdir(path) and not all((path / f).is_file() for f in GPT2_FILES):
        raise UserError(f"{path}: found neither {FILE} nor {' and '.join(GPT2_FILES)} in it")
    elif not os.path.exists(path):
        path, name = Path(fetch_from_hub(str(name_or_path))), str(name_or_path)
    with failing_in_one_line(f"{path}: not a tokenizer that can be read"):
        if path.is_dir():
            backend, name = byte_level(models.BPE.from_file(*(str(path / f) for f in GPT2_FILES))), "gpt2"
            backend.add_special_tokens([END_OF_TEXT[0]])  # the two files do not say that it is special
        else:
            backend = Tokenizer.from_file(str(path))
        tokenizer = TextTokenizer(backend, name, eot_token or named_marker(path, backend))
        tokenizer.refuse_silent_loss(path)
    return tokenizer


def named_marker(path: Path, backend: Tokenizer) -> str | None:
    """The eos_token of the tokenizer_config.json in a folder or beside a tokenizer.json; None if there is none."""
    config = path / CONFIG if path.is_dir() else path.with_name(CONFIG)
    if not config.is_file() or (path.is_file() and path.name != FILE):
        return None
    with failing_in_one_line(f"{config}: cannot be read"):
        token = json.loads(config.read_bytes()).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token  # older versions write all its settings
    return token if isinstance(token, str) and backend.token_to_id(token) is not None else None


def fetch_from_hub(name: str) -> str:
    """Path of a hub model's tokenizer.json in the local cache, which is filled the first time.

    tokenizer_config.json comes with it: other programs fetch tokenizer.json alone, which does not name the marker."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        kept = try_to_load_from_cache(name, FILE)  # no network once both are here
        if try_to_load_from_cache(name, CONFIG) is None:
            try:
                hf_hub_download(name, CONFIG)
            except RemoteEntryNotFoundError:  # not every model has one; the cache remembers that, too
                pass
            except Exception:
                if not isinstance(kept, str):
                    raise
                print(f"warning: {CONFIG} of {name!r} could not be fetched; if the end of text has another name than "
                      f"{', '.join(END_OF_TEXT)}, name it: --eot_token", file=sys.stderr)  # fmt: skip
        return kept if isinstance(kept, str) else hf_hub_download(name, FILE)  # the cache may say that there is none
    except HFValidationError as error:
        raise UserError(f"tokenizer {name!r}: no such file or folder, and not a name on the hub") from error
    except Exception as error:  # each cause has an error of its own
        raise UserError(
            f"tokenizer {name!r}: not on disk, not in the cache, and the hub gave none "
            f"({type(error).__name__}). Put {FILE} (or {' and '.join(GPT2_FILES)}) of {name!r} "
            "into a folder and name that folder with --tokenizer"
        ) from error


def byte_level(model) -> Tokenizer:
    """A tokenizer that cuts text into words as GPT-2 does and writes each byte as one character of ALPHABET."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def train_tokenizer(texts, vocab_size: int, name="trained") -> TextTokenizer:
    """A byte-level BPE of `vocab_size` ids, trained on an iterable of texts; the same texts give the same tokenizer."""
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], initial_alphabet=ALPHABET, show_progress=False
    )
    backend.train_from_iterator(map(replace_surrogates, texts), trainer)
    return TextTokenizer(backend, name)
