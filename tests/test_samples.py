"""Samples and results that are kept: uncut, as the model gives them, and written again by the command in their head."""

import json
import re
import shlex
import shutil

import pytest
import torch

import checkpoint
import report
from inference import PRESETS, sample_text
from model import GPT, GPTConfig
from support.cli import run
from toy import ROOT, spread

MACHINE = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def run_dir(tmp_path, byte_tokenizer):
    """checkpoints/toy with one checkpoint and the rows of 25 steps."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=512, valid_vocab_size=512, n_layer=1, n_head=2, n_embd=16, dropout=0.0)
    model = spread(GPT(config))
    optimizer = torch.optim.AdamW(model.parameters())
    folder = tmp_path / "checkpoints" / "toy"
    checkpoint.write_checkpoint(folder, 25, config, checkpoint.snapshot(model, optimizer), {"step": 25}, byte_tokenizer)
    at = {"tokens": 64, "seconds": 1.0, "loss": 3.0}
    rows = [{"kind": "train", "step": step, **at, "lr": 1e-3, "tokens_per_second": 9} for step in range(1, 26)]
    rows += [{"kind": "val", "step": step, **at, "perplexity": 20.1} for step in (0, 7, 25)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text("{}")
    return folder


def test_every_prompt_under_every_preset_uncut(run_dir, tmp_path):
    """Guards samples that were chosen or shortened: each is what inference.sample_text gives, whole."""
    from write_samples import PROMPTS, fenced, write_samples

    text = write_samples(run_dir, tmp_path / "samples.md", 3, 9, **MACHINE).read_text()
    model, tokenizer = checkpoint.load_model(run_dir)
    at = 0
    for prompt in PROMPTS:
        for name, sampling in PRESETS.items():
            [sample] = sample_text(model, tokenizer, prompt, sampling, 9, seed=3)
            at = text.index(fenced(prompt + sample), text.index(f"**{name}** ({sampling}; ", at))
    assert text.count("**nucleus**") == len(PROMPTS) and "step 25" in text and str(tmp_path) not in text


def test_the_command_in_the_head_writes_the_same_file(run_dir, tmp_path, monkeypatch):
    from write_samples import main

    flags = ["--seed", "5", "--max_new_tokens", "4", "--device", "cpu", "--dtype", "bfloat16"]
    main(["--checkpoint", str(run_dir), *flags, "--output", str(tmp_path / "a.md")])
    text = (tmp_path / "a.md").read_text()
    words = shlex.split(re.search(r"^python benchmarks/write_samples\.py (.*)$", text, re.M)[1])
    monkeypatch.chdir(tmp_path)
    main(words)
    assert (tmp_path / "samples.md").read_text() == text


def test_text_with_fences_shows_as_it_is():
    """A sample of markdown would end its own block of code, and what follows would be rendered."""
    from write_samples import fenced

    lines = fenced("a\n````\nb").splitlines()
    assert lines == ["`````text", "a", "````", "b", "`````"]


def test_collect_keeps_configuration_rows_curves_and_samples(run_dir, tmp_path, monkeypatch):
    import collect

    monkeypatch.setattr(collect, "write_samples", lambda run, output: output.write_text(str(run)))
    assert run(lambda: collect.main([str(run_dir), str(tmp_path / "kept")])) == 0
    kept = tmp_path / "kept"
    assert sorted(p.name for p in kept.iterdir()) == ["curves.png", "metrics.jsonl", "run.json", "samples.md"]
    rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "train"] == [*range(1, 21), 25]
    assert [r["step"] for r in rows if r["kind"] == "val"] == [0, 7, 25]


def test_collect_keeps_a_comparison_whose_report_can_be_written_again(run_dir, tmp_path, capsys):
    """Bug: rows that the table needs are thinned away."""
    import collect

    folder = tmp_path / "comparison"
    for arm in ("base", "same"):
        shutil.copytree(run_dir, folder / arm / "seed_1", ignore=shutil.ignore_patterns("step_*"))
        (folder / arm / "seed_1" / "finished.json").write_text("{}")
    (folder / "comparison.json").write_text(json.dumps({"common": [], "arms": {"base": {}, "same": {}}}))
    report.main([str(folder)])
    assert run(lambda: collect.main([str(folder), str(tmp_path / "kept")])) == 0
    names = {"comparison.json", "comparison.png", "report.jsonl", "report.md"}
    names |= {f"{arm}/seed_1/{name}.json" for arm in ("base", "same") for name in ("run", "finished")}
    names |= {f"{arm}/seed_1/metrics.jsonl" for arm in ("base", "same")}
    kept = tmp_path / "kept"
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()} == names
    whole, thinned = (
        json.loads(f.read_text().splitlines()[1]) for f in (folder / "report.jsonl", kept / "report.jsonl")
    )
    assert whole.pop("tokens_per_second") and thinned.pop("tokens_per_second") and whole == thinned


@pytest.mark.parametrize(
    "flags, words", [(["--max_new_tokens", "0"], "at least 1"), (["--checkpoint", "x"], "x: does")]
)
def test_mistakes_are_one_line(flags, words, tmp_path, monkeypatch, capsys):
    from write_samples import main

    monkeypatch.chdir(tmp_path)
    assert run(lambda: main(["--device", "cpu", "--dtype", "float32", *flags])) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
