"""The README, and the list of promises beside the tests, name only what exists."""

import math
import re
from pathlib import Path

import train
from config import parse, problems
from support.tracking import read_rows, validation_in_words
from train import PRESETS, TrainConfig

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
ARMS = (ROOT / "arms" / "README.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists():
    """A promise whose test was renamed or removed."""
    named = re.findall(r"\[`(test_\w+)`\]\((?:tests/)?(test_\w+\.py)\)", README + PROMISES)
    assert len(named) >= 60
    for name, file in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_every_link_leads_somewhere():
    pages = {"": README, "tests": PROMISES, "arms": ARMS, "benchmarks": RESULTS}
    for folder, page in ((ROOT / name, page) for name, page in pages.items()):
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", page) if "://" not in link]
        assert links and all((folder / link).exists() for link in links), links


def test_every_flag_of_train_it_shows_exists():
    """A command that a reader copies and that ends with exit code 2."""
    commands = re.findall(r"\btrain\.py((?:[^\n`]|\\\n)*)", README)
    flags = {flag for command in commands for flag in re.findall(r"--(\w+)", command)}
    assert {"preset", "data_dir", "batch_size"} <= flags <= TrainConfig.__dataclass_fields__.keys()
    assert set(re.findall(r"--preset ([\w-]+)", README)) <= PRESETS.keys()


def test_its_commands_for_several_gpus_divide_the_batch():
    """Bug: the command for eight GPUs, in train.py and for SLURM, was refused: 16 sequences each exceed the batch."""
    slurm = (ROOT / "docs" / "train.sbatch").read_text(encoding="utf-8")
    commands = re.findall(r"(torchrun .*?)train\.py(.*?)(?:#|$)", README.replace("\\\n", " ") + train.__doc__, re.M)
    assert len(commands) >= 3
    commands.append((slurm, re.search(r"sbatch docs/train.sbatch(.*)", slurm)[1]))
    for launcher, flags in commands:
        counts = re.findall(r"--(?:nnodes|nproc_per_node|nodes|ntasks-per-node)[ =](\d+)", launcher)
        assert counts and problems(parse(flags.split()), math.prod(map(int, counts))) == [], (launcher, flags)


def test_results_it_quotes_are_those_of_the_committed_runs():
    """A run made again under a text, or a line of output, that still tells of the old one."""
    results = ROOT / "benchmarks" / "results"
    said = " ".join((README + RESULTS).split())
    vals = {
        name: {row["step"]: row for row in read_rows(results / name / "metrics.jsonl") if row["kind"] == "val"}
        for name in ("demo", "edu-10m", "edu-10m-seed2", "edu-10m-fast600")
    }
    printed = re.findall(r"^step (\d+): validation (.*)$", README, re.M)
    assert len(printed) >= 3 and all(text == validation_in_words(vals["demo"][int(step)]) for step, text in printed), (
        printed
    )
    for name, rows in vals.items():
        first, last = rows[0]["perplexity"], rows[max(rows)]["perplexity"]
        assert re.search(rf"(?<![\d,.]){first:,.0f}\b", said) and re.search(rf"(?<![\d,.]){last:.1f}\b", said), name
