"""A benchmark that nobody runs for months stops running: each runs here in its smallest form, and shows numbers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import compare
import data_processing_fineweb
from support.cli import UserError, run
from support.runtime import Runtime
from toy import ROOT, as_flags

NANOGPT = '''
"""As nanoGPT's: the names, the arguments and the pair that forward returns."""
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert not config.bias
        print("number of parameters: few")
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def numbers(text, label) -> list[float]:
    """The numbers in the first line that begins with `label`."""
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])-?\d[\d,]*\.?\d*", line[len(label) :])]


def test_training_benchmark_shows_every_contestant_and_where_the_time_goes(tmp_path, capsys):
    import bench_train

    (tmp_path / "model.py").write_text(NANOGPT)
    bench_train.main(["--tiny", "--rounds", "2", *CPU, "--nanogpt", str(tmp_path), "--profile"])
    out = capsys.readouterr().out
    for name in ("ours", "transformers", "nanogpt"):
        rate, low, high, ratio, teraflops, share = numbers(out, name + " ")[:6]
        assert 0 < low <= rate <= high and ratio > 0 and teraflops > 0 and share > 0
    assert numbers(out, "ours ")[3] == 1.0
    shares = [numbers(out, group)[1] for group in bench_train.GROUPS]
    assert sum(shares) == pytest.approx(100, abs=0.5) and min(shares[:5]) > 0
    assert "number of parameters" not in out


def test_training_benchmark_runs_the_step_of_train_py(monkeypatch, capsys):
    """A step rewritten here would go its own way: what is timed as ours must be train.train_step, and must learn."""
    import bench_train

    results, real = [], bench_train.train.train_step
    monkeypatch.setattr(bench_train.train, "train_step", lambda *a: (results.append(real(*a)), results[-1])[1])
    monkeypatch.setattr(bench_train.train, "lr_at", lambda step, config: 1e-2)
    bench_train.main(["--tiny", "--rounds", "2", "--steps_per_round", "3", *CPU, "--only", "ours"])
    rows = [step.read()[0] for _, step in results]
    assert len(rows) == 3 + 2 * 3  # the first, the warm-up, the first rate, and two rounds
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_a_step_of_the_training_benchmark_accumulates(monkeypatch, capsys):
    """Bug: tokens of one micro-batch counted for a step of several, or the other way round."""
    import bench_train

    seen, real = [], bench_train.train.train_step
    monkeypatch.setattr(bench_train.train, "train_step", lambda *a: (seen.append(a[3]), real(*a))[1])
    bench_train.main(["--tiny", "--rounds", "1", *CPU, "--only", "ours,transformers", "--accumulation", "3"])
    assert {(len(batch.x), batch.n_targets) for batch in seen} == {(3, 3 * 2 * 64)}
    assert "batch 2 x 64 x 3" in capsys.readouterr().out


def test_a_contestant_that_fails_costs_its_row_only(tmp_path, capsys):
    import bench_train

    broken = NANOGPT.replace("logits = ", "raise TypeError('no such\\nthing')\n        logits = ")
    (tmp_path / "model.py").write_text(broken)
    flags = ["--tiny", "--rounds", "1", *CPU, "--only", "ours,nanogpt"]
    bench_train.main([*flags, "--nanogpt", str(tmp_path)])
    out = capsys.readouterr().out
    assert numbers(out, "ours ")[0] > 0
    assert re.search(r"^nanogpt +failed: TypeError: no such\\nthing$", out, re.M)


def test_a_profile_that_fails_costs_no_other_row(monkeypatch, capsys):
    """Bug: the tables of later accumulations were lost with it, on a machine that is rented for minutes."""
    import bench_train

    monkeypatch.setattr(bench_train, "group_of", lambda *_: 1 / 0)
    flags = ["--tiny", "--rounds", "1", *CPU, "--only", "ours", "--accumulation", "1,2", "--profile"]
    assert bench_train.main(flags) == 0
    out = capsys.readouterr().out
    assert out.count("the profile failed: ZeroDivisionError: division by zero\n") == 2
    assert numbers(out.split("batch 2 x 64 x 2")[1], "ours ")[0] > 0


def test_a_failure_of_ours_costs_its_rows_only(monkeypatch, capsys):
    """Bug: the rows of all others were lost with it, and of all other batch sizes."""
    import bench_train

    monkeypatch.setattr(bench_train, "our_step", lambda *_, **__: 1 / 0)
    flags = ["--tiny", "--rounds", "1", *CPU, "--only", "ours,transformers", "--accumulation", "1,2"]
    assert bench_train.main(flags) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"^ours +failed: ZeroDivisionError", out, re.M)) == 2
    assert numbers(out.split("batch 2 x 64 x 2")[1], "transformers ")[0] > 0


def test_whatever_transformers_raises_costs_no_row_of_ours(monkeypatch, capsys):
    """Bug: a version of it that takes other arguments ended the benchmark of sampling before its first row."""
    import bench_generate

    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_generate.export_hf, "hf_config", lambda _: {"model_type": "no such type"})
    bench_generate.main(["--tiny", "--repeats", "1", "--batches", "1", *CPU])
    out = capsys.readouterr().out
    assert "transformers failed (" in out and numbers(out, "    1  ours ")[0] > 0


def test_ratios_compare_the_steps_of_one_turn():
    """On a machine that becomes slower, medians of each contestant alone would compare different moments."""
    import bench_train

    ours = bench_train.Contestant("ours", print, seconds=[1.0, 4.0, 4.0])
    other = bench_train.Contestant("other", print, seconds=[2.0, 2.0, 8.0])
    text = bench_train.table([ours, other], [0.5], 100, 1e9, 1e12, Runtime(torch.device("cpu"), "float32"))
    assert numbers(text, "ours ")[:6] == [25, 25, 100, 1.0, 0.025, 1.2]
    assert numbers(text, "other ")[:6] == [50, 12, 50, 0.5, 0.05, 2.5]


@pytest.mark.parametrize(
    ("name", "shapes", "group"),
    [
        ("aten::mm", [[1024, 768], [768, 3072]], "matrix products"),
        ("aten::mm", [[1024, 768], [768, 50304]], "loss and output head"),
        ("aten::log_softmax", [[1024, 50304], [], []], "loss and output head"),
        ("aten::_fused_adamw_", [[[50304, 768]]], "clip and optimizer"),
        ("aten::_scaled_dot_product_flash_attention", [[4, 12, 1024, 64]], "attention"),
        ("triton_per_fused_native_layer_norm_0", [], "norms, element-wise"),
        ("aten::native_layer_norm", [[4, 1024, 768]], "norms, element-wise"),
        ("autograd::engine::evaluate_function: MmBackward0", [], "rest"),
    ],
)
def test_operations_count_with_the_right_part_of_a_step(name, shapes, group):
    from bench_train import group_of

    assert group_of(name, shapes, (50304, 50257)) == group


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size", "4,x"], "list of int"),
        (["--batch_size", "0"], "at least 1"),
        (["--only", "ours,llama"], "its names are ours, muon, transformers, nanogpt"),
        (["--nanogpt", "/nowhere"], "no model.py"),
        (["--dropout", "1", *CPU], "dropout is 1.0"),
    ],
)
def test_a_wrong_flag_of_the_training_benchmark_is_one_line(flags, words, capsys):
    import bench_train

    assert run(lambda: bench_train.main(flags)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_data_benchmark_shows_every_row(tmp_path, capsys):
    import bench_parts

    flags = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--step_tokens_per_second", "100000"]
    bench_parts.main(["data", *flags])
    out = capsys.readouterr().out
    for label in ("loader, windows read for the first time", "loader, the same windows again"):
        middle, low, high = numbers(out, label)
        assert 0 < low <= middle <= high
    assert numbers(out, "next() after a step of 0.041 s")[0] >= 0
    assert numbers(out, "opening 600,000 tokens")[0] > 0
    assert numbers(out, "reading, not ahead, would be 1% of a step at")[0] > 0
    assert "of a step (the first time" in out
    if sys.platform == "linux":
        assert len(numbers(out, "  epoch by epoch:")) == 5
    assert not list(tmp_path.iterdir()), "the shards are removed"


def test_waiting_is_for_windows_that_nobody_has_read(tmp_path):
    """The pages of the first row's windows are in memory: who reads those again seems to wait for nothing."""
    import bench_parts

    args = bench_parts.parse_args(["data", "--tiny", "--device", "cpu"])
    folder, read = bench_parts.make_shards(tmp_path / "shards", 2, 50_000), []
    real = bench_parts.FineWebDataset.rows

    def rows(self, windows):
        read[-1].update(int(w) for w in windows)
        return real(self, windows)

    bench_parts.FineWebDataset.rows = rows
    try:
        read.append(set())
        bench_parts.time_loader(folder, args)
        read.append(set())
        bench_parts.time_waiting(folder, args, 0.01)
    finally:
        bench_parts.FineWebDataset.rows = real
    assert read[0] and read[1] and not read[0] & read[1]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_row_sees_a_data_set_that_keeps_what_it_has_read(tmp_path, monkeypatch):
    """Without giving pages back, an epoch stays resident as a whole; the row must tell."""
    import bench_parts

    args = bench_parts.parse_args(["data", "--tiny", "--device", "cpu"])
    args.epochs, args.block_size = 2, 1024
    folder = bench_parts.make_shards(tmp_path / "shards", 1, 5_000_000)  # 10 MB
    monkeypatch.setattr(data_processing_fineweb, "RELEASE_BYTES", 2**20)
    given_back = max(bench_parts.growth(folder, args))
    monkeypatch.setattr(data_processing_fineweb, "RELEASE_BYTES", 2**40)
    kept = max(bench_parts.growth(folder, args))
    assert kept > 6e6 and given_back < kept / 2


def test_saving_benchmark_shows_every_row(tmp_path, capsys):
    import bench_parts

    bench_parts.main(["saving", "--tiny", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for where in ("foreground", "background"):
        middle, low, high = numbers(out, f"training waits, saving in the {where}")
        assert 0 <= low <= middle <= high
    assert not list(tmp_path.iterdir())


# --- bench_prepare.py


@pytest.fixture
def vocabulary(byte_tokenizer, tmp_path):
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    byte_tokenizer.save(folder)
    return folder


@pytest.mark.slow
def test_preparation_benchmark_shows_every_row(vocabulary, tmp_path, capsys):
    import bench_prepare

    (tmp_path / "out").mkdir()
    flags = ["--tiny", "--repeats", "1", "--times", "2", "--cores", "1", "--out", tmp_path / "out"]
    bench_prepare.main([*map(str, flags), "--tokenizer", str(vocabulary)])
    out = capsys.readouterr().out
    ways = ("tiktoken, bare loop", "tiktoken, x cores", "transformers, batches", "prepare, 1 proc")
    for label in (*ways, "  beyond that input, 1 proc"):
        rate, low, high, million, ratio, per_cpu = numbers(out, label)
        assert 0 < low <= rate <= high and million > 0 and per_cpu > 0
        assert ratio >= 0  # of two digits: with so little text the start takes nearly all of the time
    assert numbers(out, "tiktoken, x cores")[4] == 1.0
    if sys.platform == "linux":
        assert all(numbers(out, f"memory, 1 proc, input x {n} ")[0] > 20 for n in (1, 2))
    assert not list((tmp_path / "out").iterdir()), "the shards are removed"


def test_rates_of_preparation_compare_what_one_turn_gave():
    """Medians of each way alone would compare different moments of a machine that others use too."""
    import bench_prepare

    times = {bench_prepare.BARE: [(10, 10), (20, 10), (20, 10)], bench_prepare.FAST: [(20, 40)] * 3}
    for n, seconds in (1, [(5, 10), (10, 10), (20, 10)]), (3, [(15, 26), (30, 26), (60, 26)]):
        times |= {f"prepare, {num_proc} proc, input x {n}": seconds for num_proc in (1, 2)}
    args = bench_prepare.parse_args(["--tiny", "--cores", "2", "--times", "3"])
    manifest = {"text_bytes": 10_000_000, "tokens": 2_500_000, "documents": 500_000}
    text = bench_prepare.table(times, {"prepare, 2 proc, input x 3": 3e6}, manifest, args)
    assert numbers(text, "tiktoken, x cores") == [1, 1, 2, 0.2, 1, 1]
    assert numbers(text, "prepare, 2 proc") == [1, 0.5, 2, 0.2, 1, 1]
    assert numbers(text, "  beyond that input, 2 proc") == [1, 0.5, 2, 0.2, 1, 1.25]
    assert numbers(text, "memory, 2 proc, input x 3") == [3]


def test_preparation_benchmark_refuses_ways_that_disagree(monkeypatch, tmp_path):
    """A way that skips half of the text would look twice as fast."""
    import bench_prepare

    monkeypatch.setattr(bench_prepare, "in_fresh_process", lambda function, *_: (1.0, 1.0, 7))
    manifest = {"tokens": 18, "documents": 8, "text_bytes": 50}
    monkeypatch.setattr(bench_prepare, "prepare", lambda *_: (1.0, 1.0, manifest, 0))
    args = bench_prepare.parse_args(["--tiny", "--repeats", "1", "--times", "2"])
    with pytest.raises(UserError, match="numbers of tokens differ"):
        bench_prepare.measure([], tmp_path, args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name the parquet files"),
        (["--data", "/nowhere/*.parquet"], "no such file"),
        (["--tiny", "--repeats", "0"], "at least 1"),
    ],
)
def test_a_wrong_flag_of_the_preparation_benchmark_is_one_line(flags, words, capsys):
    import bench_prepare

    assert run(lambda: bench_prepare.main(flags)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# --- check_gpu.py

ENDS_FIRST = """
import json, sys
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--checkpoint_dir") + 1], sys.argv[sys.argv.index("--run_name") + 1])
run.mkdir(exist_ok=True)
if run.name == "killed" and not (run / "started").exists():
    (run / "started").touch()
    sys.exit("no memory")
rows = [{"kind": "train", "step": step, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "checksum": 1, "samples_seen": step}
        for step in range(1, 61)]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(run / "step_00000060").mkdir()
(run / "step_00000060" / "model.safetensors").touch()
"""


def test_a_resume_that_killed_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    """Bug: a first process that ended by itself was followed by a whole run, and "the same" was said of the two."""
    import check_gpu

    (tmp_path / "train.py").write_text(ENDS_FIRST)
    monkeypatch.setattr(check_gpu, "ROOT", tmp_path)
    assert run(lambda: check_gpu.main(["resume", "--tiny", "--device", "cpu", "--data_dir", "shards"])) == 2
    said = capsys.readouterr()
    assert "this one ended with 1, saved []: no memory" in said.err and "same" not in said.out


# --- gpu.sh


def gpu_sh(*flags, folder, python=sys.executable, **environment):
    """Its results go to folder/out, and what is large to folder/work."""
    env = {**os.environ, "PYTHON": python, "OUT": folder / "out", "WORK": folder / "work", **environment}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *map(str, flags)]
    env = {key: str(value) for key, value in env.items()}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=880)


def test_gpu_sh_refuses_in_one_line(tmp_path):
    usage = gpu_sh("--fast", folder=tmp_path)
    assert usage.returncode == 2 and "usage" in usage.stderr
    no_torch = gpu_sh("--short", folder=tmp_path, python=str(tmp_path / "python"))
    assert no_torch.returncode == 2 and no_torch.stderr.count("\n") == 1 and "has no torch" in no_torch.stderr


def stand_in(folder, data) -> str:
    """An interpreter in which bench_train.py fails and `bench_parts.py data` does what `data` says."""
    path = folder / "python"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "-c*) exit 0 ;;\n"
        "*bench_train*) echo half a table; echo the reason >&2; exit 3 ;;\n"
        f"*bench_parts.py?data*) {data} ;;\n"
        "*) echo all of a table ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return str(path)


def test_gpu_sh_goes_on_after_a_part_that_fails(tmp_path):
    """Ten minutes on a rented machine must not end with the first thing that goes wrong."""
    done = gpu_sh("--short", tmp_path / "nothing", folder=tmp_path, python=stand_in(tmp_path, "exit 0"))
    assert done.returncode == 1
    tables = (tmp_path / "out" / "tables.txt").read_text()
    assert done.stdout == tables, "every row is printed and written"
    assert re.search("^no shards in .*: fast-124m, resume, hellaswag and gpt2-124m are left out$", tables, re.M)
    assert "half a table\ntrain: FAILED with exit code 3" in tables and "the reason" in tables
    assert "all of a table\nsave: done" in tables and "data: done" in tables


@pytest.mark.slow
def test_gpu_sh_stops_a_part_that_hangs(tmp_path):
    began = time.monotonic()
    python = stand_in(tmp_path, "exec sleep 60")
    done = gpu_sh("--short", tmp_path / "nothing", folder=tmp_path, python=python, LIMIT=15)
    assert done.returncode == 1 and time.monotonic() - began < 45
    assert "data: STOPPED after" in (tmp_path / "out" / "tables.txt").read_text()


@pytest.mark.slow
@pytest.mark.auto  # as on the machine that it measures
@pytest.mark.timeout(1000)
def test_gpu_sh_in_its_short_form(tmp_path, byte_tokenizer, scenes):
    """Bugs: a part that lacks what the machine with the GPU lacks; results among files too large to come back."""
    from pydoc_data import topics

    import bench_train

    folder, given = tmp_path / "a folder", tmp_path / "given"
    packed = folder / "packed"
    texts = [text for _, text in sorted(topics.topics.items())]
    for split, part in ("train", texts[4:]), ("val", texts[:4]):
        (given / "corpus" / split).mkdir(parents=True)
        pq.write_table(pa.table({"text": part}), given / "corpus" / split / "0.parquet")
    (given / "gpt2_tokenizer").mkdir()
    (given / "hellaswag").mkdir()
    byte_tokenizer.save(given / "gpt2_tokenizer")
    os.rename(scenes, given / "hellaswag" / "hellaswag_val.jsonl")
    (given / "model.py").write_text(NANOGPT)
    for _ in range(2):  # the second time it finds the shards
        done = gpu_sh("pack", packed, folder=folder, GPT_TEST_DATA=given, NANOGPT=given)
        assert done.returncode == 0 and "MB, for gpu.sh A and B" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(given)

    done = gpu_sh("--short", packed, folder=folder, WORK=tmp_path / "work", LIMIT=800)
    assert done.returncode == 0, done.stdout + (folder / "out" / "stderr.txt").read_text()
    first = ["facts", "train_16", "fast-124m", "bits", "resume", "hellaswag", "gpt2-124m"]
    parts = [*first, "train", "generate", "save", "checkpointed", "loss", "data"]
    assert re.findall(r"^=== (.*)$", done.stdout, re.M) == re.findall(r"^(.*): done in", done.stdout, re.M) == parts
    assert numbers(done.stdout, "ours ")[0] > 0 and numbers(done.stdout, "loader, the same windows again")[0] > 0
    assert numbers(done.stdout, "nanogpt ")[0] > 0 and "completion" in done.stdout.split("=== hellaswag")[1]
    assert re.search(r"^traces of 60 steps +the same$", done.stdout, re.M)
    rows = done.stdout.split("=== loss\n")[1]
    for name in bench_train.LOSSES:
        median, low, high, ratio, _ = numbers(rows, name + "  ")
        assert 0 < low <= median <= high and ratio > 0
    results = {path.name: path.stat().st_size for path in (folder / "out").iterdir()}
    assert results.keys() == {"tables.txt", "stderr.txt", "fast-124m.jsonl", "gpt2-124m.jsonl"}
    assert max(results.values()) < 1e6


# --- the recipe's comparisons


with_patches = [pytest.param(name, marks=pytest.mark.slow) for name in ("recipe_fast", "ideas")]


@pytest.mark.parametrize("name", ["recipe", *with_patches])
def test_the_comparisons_kept_as_files_can_begin(name, tmp_path, monkeypatch, capsys):
    """Bugs: a flag or a patch that the code has left behind; an arm that is another one's double."""
    monkeypatch.chdir(ROOT)
    assert compare.main(["--dir", str(tmp_path), "--dry_run", f"@benchmarks/{name}.args"]) == 0
    lines = capsys.readouterr().out.splitlines()
    arms = [line.partition(", seed 1: ")[0] for line in lines if ", seed 1: " in line]
    assert len(lines) == 3 * len(arms) + 1 and len(arms) >= 5
    half = [line for line in lines if line.startswith("fast, half the tokens, seed 3: ")]
    assert half == ["fast, half the tokens, seed 3: 512,000 tokens"] * (name == "recipe")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_muon_with_qkv_as_one_matrix_is_another_run(toy, tmp_path, monkeypatch):
    """Bug: a patch that applies and changes nothing."""
    monkeypatch.chdir(ROOT)
    flags = as_flags(replace(toy, run_name=None, checkpoint_dir="checkpoints", max_steps=4, optimizer="muon"))
    arms = ["--arm", "three:", "--arm", "one: code=benchmarks/whole_qkv.patch"]
    assert compare.main(["--name", "c", "--dir", str(tmp_path), "--seeds", "1", *arms, "--", *flags]) == 0
    three, one = map(json.loads, (tmp_path / "c" / "report.jsonl").read_text().splitlines())
    assert three["values"] != one["values"]


# --- a killed run


@pytest.mark.slow
def test_a_killed_run_is_compared_and_a_difference_is_found(toy, tmp_path, capsys):
    """A claim of equal numbers that would also be made of two different runs."""
    import killed_run

    flags = shlex.join(as_flags(replace(toy, max_steps=30, save_interval=5, checkpoint_dir="elsewhere", run_name=None)))
    runs = tmp_path / "killed"
    killed_run.main(["--kills", "2", "--flags", flags, "--directory", str(runs), "--output", str(tmp_path / "k.json")])
    assert "2 kills" in capsys.readouterr().out
    facts = json.loads((tmp_path / "k.json").read_text())
    last = [losses for losses in facts["starts"] if losses][-1]  # a kill after the last step leaves nothing to train
    assert len(facts["starts"]) == 3 and last[-1] == facts["undisturbed"][-1]
    names = {"model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"}
    assert facts["equal"]["files"].keys() >= names
    more = killed_run.newest(runs / "killed") / "more.json"
    more.touch()
    with pytest.raises(UserError, match=r"the last checkpoints differ in more\.json"):
        killed_run.compared(runs)
    more.unlink()
    file = runs / "killed" / "metrics.jsonl"
    rows = file.read_text().splitlines()
    i = next(i for i, row in enumerate(rows) if '"train", "step": 17,' in row)
    loss = json.loads(rows[i])["loss"]
    file.write_text("\n".join([*rows[:i], rows[i].replace(str(loss), str(loss + 1e-9)), *rows[i + 1 :]]) + "\n")
    with pytest.raises(UserError, match="differs from the undisturbed one from step 17"):
        killed_run.compared(runs)
