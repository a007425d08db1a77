"""What every test shares: one thread, no network, real data where there is some, and a tokenizer made on the spot."""

import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of huggingface_hub: no test reaches the network

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import auto_watch  # first: it watches the import of support.runtime
import train as train_module
from data_processing_fineweb import ShardWriter
from tokenizer import TextTokenizer
from toy import Forks, seed_the_cpu_alone
from train import TrainConfig

children = [str(Path(auto_watch.__file__).parent), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, children))  # processes that tests start watch it too
seed_the_cpu_alone()
torch.set_num_threads(1)  # the models here are too small to share, and one thread repeats its sums exactly
settings.register_profile("repository", deadline=None, derandomize=True)  # the same examples on every run
settings.load_profile("repository")


# The slow tests that take longest come first: the processes of pytest-xdist then end at about the same time.
LONGEST = (
    "test_gpu_sh_in_its_short_form", "test_every_printed_command_runs", "test_killed_at_every_file_system_call",
    "test_killed_at_random_moments_gives_the_same_table", "test_disk_full_from_one_of_the_file_system_calls_on",
    "test_harness_gives_the_same_for_an_exported_model", "test_a_comparison_from_command_to_report",
    "test_read_only_folders", "test_a_rank_that_dies_is_started_again",
    "test_preparation_benchmark_shows_every_row", "test_hosts_that_lose_each_other_give_up_and_later_go_on",
    "test_any_sequence_leaves_the_newest_last_trained_and_nothing_lost",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.function.__name__, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before all fixtures: a test names device and dtype unless it is marked `auto`."""
    os.environ[auto_watch.RULE] = "allowed" if item.get_closest_marker("auto") else "refused"


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, byte_tokenizer):
    """Four shards of unequal length, none a multiple of T = 32, in which the next token can be guessed."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    facts = {"name": "byte", "vocab_size": 512, "fingerprint": byte_tokenizer.fingerprint()}
    for name, sizes in (("data", (1999, 1500, 701, 1000)), ("data_val", (1300,))):
        writer = ShardWriter(folder / name, 512, 10_000)
        for size in sizes:
            writer.add(np.cumsum(rng.integers(1, 4, size)) % 512, size * 3)
            writer.flush()
        writer.close(tokenizer=facts)
        (folder / name / "tokenizer").mkdir()
        byte_tokenizer.save(folder / name / "tokenizer")
    return folder / "data"


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request) -> str:
    """Each device that this machine has; tests that take it run once on each."""
    return request.param


@pytest.fixture
def toy(corpus, tmp_path, monkeypatch) -> TrainConfig:
    """40 steps of a two-layer model, over two epochs of 163 windows in batches of 8 rows; pictures off, for speed."""
    monkeypatch.setattr(train_module, "plot_curves", lambda run_dir: 0.0)
    monkeypatch.setenv("GPT_TEST_PICTURES", "off")  # in processes of its own too
    return TrainConfig(
        run_name="toy", checkpoint_dir=str(tmp_path / "runs"), data_dir=str(corpus), block_size=32, n_layer=2, n_head=2,
        n_embd=32, dropout=0.1, max_steps=40, batch_size=4, total_batch_tokens=256, lr=3e-3, min_lr=3e-4,
        eval_interval=10, val_tokens=600, hellaswag_interval=0, sample_interval=20, save_interval=5, keep_last=2,
        device="cpu", dtype="float32", compile="off",
    )  # fmt: skip


@pytest.fixture
def scenes(tmp_path):
    """Seven HellaSwag examples, so that two ranks cannot share them evenly."""
    path = tmp_path / "scenes.jsonl"
    example = {"activity_label": "Cooking", "ctx_b": "the cook", "label": 1}
    example["endings"] = ["runs away.", "stirs the soup.", "sleeps.", "sings about the moon."]
    scenes = [f"A pot stands on stove {i}." + " It is warm." * i for i in range(7)]
    path.write_text("".join(json.dumps(example | {"ctx_a": s, "ctx": f"{s} the cook"}) + "\n" for s in scenes))
    return str(path)


@pytest.fixture(scope="session")
def made_once():
    """What several tests compare with, by name."""
    return {}


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts train.py in several processes, without importing torch in each."""
    modules = "torch._dynamo", "torch.distributed.fsdp"
    forks = Forks(tmp_path_factory.mktemp("forks"), *modules, GPT_TEST_PICTURES="off")
    yield forks
    forks.close()


@pytest.fixture
def whole(toy, made_once, forks) -> TrainConfig:
    """The toy run by two processes, undisturbed."""
    if "whole" not in made_once:
        config = replace(toy, run_name="whole")
        forks.ranks(config)
        made_once["whole"] = config
    return made_once["whole"]


counts = {}  # of what the long suites did, by name


@pytest.fixture(scope="session")
def tally():
    """tally(name, n): adds to what the last line of the test run tells."""

    def add(name, n=1):
        counts[name] = counts.get(name, 0) + n

    return add


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: the one that prints is another
        session.config.workeroutput["counts"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, n in getattr(node, "workeroutput", {}).get("counts", {}).items():
        counts[name] = counts.get(name, 0) + n


def pytest_terminal_summary(terminalreporter):
    if counts:
        terminalreporter.write_line(", ".join(f"{name} {n:,}" for name, n in counts.items()))
