"""One small tokenizer of each kind that people bring along, made on the spot."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tokenizer import TextTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz'.,!?"
WORDS = ["the", "water", "wa", "ter", "do", "n't", "not", "naïve", "t"]
SPACES = "▁"


def byte_level(**changes):
    """GPT-2's kind without merges."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def spaces_added():
    """GPT-NeoX's kind: runs of spaces, and other text, as added tokens that are not special."""
    backend = byte_level()
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)] + ["größe"])
    return backend


def byte_fallback(strip=1):
    """Llama's kind, or with `strip` 0 Gemma's: what has no token becomes the tokens of its bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), SPACES, *LETTERS, "th", "the", "wa"]
    merges = [("t", "h"), ("th", "e"), ("w", "a")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend(SPACES)] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACES)])
    rest = [decoders.Strip(" ", strip, 0)] if strip else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACES, " "), decoders.ByteFallback(), decoders.Fuse(), *rest]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace():
    """T5's kind: a Unigram model; the marker is one of its words, as in files made from SentencePiece."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), (SPACES, -3.0), *((c, -9.0) for c in LETTERS)]
    pieces += [(w, -5.0) for w in WORDS if len(w) > 1] + [(SPACES + w, -4.0) for w in WORDS]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def word_piece(first_id=0, cleanup=True):
    """BERT's kind: lower case, "##" within words, and a decoder that removes spaces before punctuation."""
    tokens = [
        "[UNK]",
        "[EOS]",
        *LETTERS,
        *("##" + c for c in LETTERS),
        *WORDS,
        *("##" + w for w in WORDS if len(w) > 1),
    ]
    vocab = {token: first_id + i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    backend.add_special_tokens(["[UNK]", "[EOS]"])
    return backend


def words(decoder=None):
    """Whole words, joined by spaces."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *WORDS, *",.!"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def suffixes():
    """GPT-1's kind: "</w>" at the end of each word."""
    tokens = ["<unk>", "<eos>", *LETTERS, *(c + "</w>" for c in LETTERS), "th", "the</w>"]
    merges, vocab = [("t", "h"), ("th", "e</w>")], {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    backend.add_special_tokens(["<unk>", "<eos>"])
    return backend


def with_gaps():
    """Byte-level, with 100 ids in the middle that no token has."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i + 100 * (i > 150) for i, c in enumerate(tokens)} | {"<eos>": 356}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


JOINED = [decoders.Fuse(), decoders.Replace(Regex(r"rt+"), "R")]
KINDS = {
    "byte-level": byte_level,
    "spaces added": spaces_added,
    "byte fallback": byte_fallback,
    "byte fallback, not stripped": lambda: byte_fallback(strip=0),
    "byte fallback, five spaces stripped": lambda: byte_fallback(strip=5),
    "metaspace": metaspace,
    "word piece": word_piece,
    "word piece, ids from 50": lambda: word_piece(50),
    "word piece, not cleaned": lambda: word_piece(cleanup=False),
    "words": words,
    "words without spaces": lambda: words(decoders.Fuse()),
    "words, each once": lambda: words(decoders.CTC(pad_token="<unk>", word_delimiter_token="t")),
    "a decoder that looks at the whole text": lambda: words(decoders.Sequence(JOINED)),
    "suffixes": suffixes,
    "gaps": with_gaps,
}


def tokenizer_of(kind) -> TextTokenizer:
    return TextTokenizer(KINDS[kind](), kind)
