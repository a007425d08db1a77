"""What every test shares: one thread, no network, real data where there is some, and a tokenizer made on the spot."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of huggingface_hub: no test reaches the network

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenizer import TextTokenizer

torch.set_num_threads(1)  # the models here are too small to share, and one thread repeats its sums exactly
settings.register_profile("repository", deadline=None, derandomize=True)  # the same examples on every run
settings.load_profile("repository")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with GPT-2's vocabulary and real text, named by GPT_TEST_DATA; skips where there is none."""
    if not os.environ.get("GPT_TEST_DATA"):
        pytest.skip("GPT_TEST_DATA names no folder with gpt2_tokenizer/ and corpus/")
    folder = Path(os.environ["GPT_TEST_DATA"])
    assert folder.is_dir(), f"GPT_TEST_DATA is {folder}, which is no folder"
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> TextTokenizer:
    """A byte-level BPE of 512 ids, like GPT-2's but small: 256 bytes, 255 merges, then <|endoftext|>."""
    from pydoc_data import topics  # text that every CPython carries

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=511, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text for _, text in sorted(topics.topics.items())][:20], trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return TextTokenizer(backend, "byte")


counts = {}  # of what the long suites did, by name


@pytest.fixture(scope="session")
def tally():
    """tally(name, n): adds to what the last line of the test run tells."""

    def add(name, n=1):
        counts[name] = counts.get(name, 0) + n

    return add


def pytest_terminal_summary(terminalreporter):
    if counts:
        terminalreporter.write_line(", ".join(f"{name} {n:,}" for name, n in counts.items()))
