"""The training loop: the same numbers whatever interrupts it, evaluates it, or shares its work."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import checkpoint
import plot_run
import train as train_module
from model import GPT, GPTConfig
from support.both_ways import refuse_wrong_products
from support.cli import UserError, run
from support.files import read_json
from support.runtime import Runtime
from support.tracking import read_rows
from toy import ROOT, as_flags, losses, start, trace, vals, wait_for_step
from train import PRESETS, TrainConfig, lr_at, parse, problems, train

CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def toy(toy, device):
    """The toy run on each device; on CUDA equal bits are what --deterministic promises."""
    return replace(toy, device=device, deterministic=device == "cuda")


# --- the schedule and the arguments


def test_schedule_warms_up_falls_along_a_cosine_and_ends_at_min_lr():
    c = TrainConfig(max_steps=1000, warmup_frac=0.1, lr=1.0, min_lr=0.1)
    rates = [lr_at(step, c) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1.0 and rates[100] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    parameter = nn.Parameter(torch.zeros(1))  # torch's own cosine over the same stretch
    torch_cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=1.0), 899, eta_min=0.1)
    for step in range(100, 1000):
        assert rates[step] == pytest.approx(torch_cosine.get_last_lr()[0], abs=1e-9)
        torch_cosine.optimizer.step()
        torch_cosine.step()


def test_linear_schedule_is_warm_up_then_constant_then_a_straight_line():
    """Bugs: a decay that begins a step early or late, that misses min_lr at the last update, or that a rounding of
    the two shares lets overlap the warm-up."""
    c = TrainConfig(schedule="linear", max_steps=20, warmup_frac=0.2, decay_frac=0.4, lr=1.0, min_lr=0.2)
    by_hand = [0.25, 0.5, 0.75, 1.0, *[1.0] * 8, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert [lr_at(step, c) for step in range(20)] == pytest.approx(by_hand)
    whole = replace(c, warmup_frac=0.0, decay_frac=1.0, max_steps=5, min_lr=0.0)
    assert [lr_at(step, whole) for step in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    constant = replace(c, decay_frac=0.0)
    assert [lr_at(step, constant) for step in range(20)] == [0.25, 0.5, 0.75, *[1.0] * 17]
    half = replace(c, max_steps=5, warmup_frac=0.5, decay_frac=0.5)  # 2.5 steps each
    assert [lr_at(step, half) for step in range(5)] == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])
    assert lr_at(19, replace(c, min_lr=None)) == pytest.approx(0.1), "by default a tenth of lr"
    assert TrainConfig("small", lr=1e-2).last_lr == 0, "bug: a preset's end at zero was lost with another --lr"
    assert problems(replace(c, device="cpu", warmup_frac=0.7)) == [
        "--warmup_frac 0.7 and --decay_frac 0.4 together exceed 1; lower one"
    ]
    assert not problems(replace(PRESETS["gpt2-124m"], decay_frac=1.0)), "a cosine does not read decay_frac"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_the_linear_schedule_and_rates_by_group_continues_to_the_same_bits(toy, optimizer):
    """Bugs: a schedule kept in an object that a restart forgets; the rates of the groups taken from the checkpoint, or
    lost there."""
    rates = dict(schedule="linear", decay_frac=0.5, embed_lr=9e-3, vector_lr=1e-3)
    c = replace(toy, optimizer=optimizer, run_name="whole", keep_last=9, **rates)
    train(c)
    whole = trace(c)
    assert [float.fromhex(row[3]) for row in whole] == [lr_at(step, c) for step in range(40)]
    for step in (30, 35, 40):
        shutil.rmtree(c.run_dir / checkpoint.name_of(step))
    train(c)
    assert trace(c) == whole
    for step in (30, 35, 40):
        shutil.rmtree(c.run_dir / checkpoint.name_of(step))
    train(replace(c, embed_lr=3e-2))  # may change half way, as lr may
    changed = trace(c)
    assert changed[:26] == whole[:26] and changed[26][1] != whole[26][1]


def test_default_preset_is_gpt2_124m_on_ten_billion_tokens():
    c = PRESETS["gpt2-124m"]
    assert c.max_steps * c.total_batch_tokens == pytest.approx(10e9, rel=1e-5)
    assert c.total_batch_tokens // (c.batch_size * c.block_size) == 4
    assert not problems(c) and not problems(PRESETS["demo"])


def test_all_argument_problems_are_said_at_once(capsys):
    bad = ["--lr", "-1", "--warmup_frac", "2", "--batch_size", "7", "--n_head", "5", "--norm", "batchnorm", *CPU]
    before = time.monotonic()
    assert run(lambda: train_module.main(bad)) == 2
    assert time.monotonic() - before < 5, "arguments are checked before any work"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in ("lr is -1", "warmup_frac is 2", "does not divide by batch_size 7", "n_head 5", "batchnorm"):
        assert word in error, error


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--preset", "gpt5"], ["gpt5", "demo"]),
        (["--batchsize", "4"], ["--batchsize"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--data_dir", "nowhere"], ["nowhere", "prepare_fineweb.py", "--data_dir"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--eval_only", "--checkpoint", "nowhere"], ["nowhere", "run's directory or name"]),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(lambda: train_module.main([*CPU, *argv])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(w in error for w in words), error
    assert not (tmp_path / "checkpoints").exists(), "nothing is made before the data is there"


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_module.main(["--help"])
    text = capsys.readouterr().out
    for name, f in TrainConfig.__dataclass_fields__.items():
        assert f"--{name}" in text and len(f.metadata["help"]) > 5
        if f.default not in (None, False):
            assert f"(default: {f.default})" in " ".join(text.split()), name


def test_flags_change_a_preset():
    c = parse(["--preset", "demo", "--lr", "0.5", "--bias"])
    assert (c.lr, c.bias, c.n_embd) == (0.5, True, PRESETS["demo"].n_embd)


def test_wrong_tokenizer_is_refused(toy, tmp_path, byte_tokenizer):
    """Ids of another vocabulary are numbers without meaning; training on them looks almost normal."""
    manifest = Path(toy.data_dir).parent / "other" / "manifest.json"
    manifest.parent.mkdir(exist_ok=True)
    facts = read_json(Path(toy.data_dir) / "manifest.json")
    facts["tokenizer"] |= {"fingerprint": "0" * 64, "vocab_size": 999}
    for shard in Path(toy.data_dir).glob("*.npy"):
        (manifest.parent / shard.name).write_bytes(shard.read_bytes())
    manifest.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"999 ids.*512 ids"):
        train(replace(toy, data_dir=str(manifest.parent), tokenizer=str(Path(toy.data_dir) / "tokenizer")))


# --- the trace


def test_two_undisturbed_runs_agree_and_learn(toy):
    result = train(toy)
    again = replace(toy, run_name="again")
    train(again)
    assert trace(toy) == trace(again) and len(trace(toy)) == 40
    assert vals(toy) == vals(again) and sorted(vals(toy)) == [0, 10, 20, 30, 40]
    assert result["val_loss"] == vals(toy)[40] < vals(toy)[0] - 0.7
    kept = [p.name for p in checkpoint.steps(toy.run_dir)]
    assert kept[:2] == ["step_00000040", "step_00000035"]


def test_a_run_draws_its_curves(toy, monkeypatch, capsys):
    """And bug: a picture that cannot be drawn ends the run."""
    monkeypatch.undo()  # the drawing that `toy` turns off
    train(replace(toy, max_steps=2))
    assert (toy.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plot_run, "plot", lambda *args: 1 / 0)
    assert train(replace(toy, run_name="other", max_steps=2))["step"] == 2
    assert capsys.readouterr().err.count("warning: curves.png was not written (ZeroDivisionError") == 1


def test_a_picture_that_takes_long_is_drawn_less_often(toy, monkeypatch):
    """Bug: after 150,000 steps a picture takes two seconds at each save, and eight GPUs wait for it."""
    monkeypatch.undo()
    drawn = []
    monkeypatch.setattr(plot_run, "plot", lambda *args: drawn.append(time.sleep(0.2)))
    train(replace(toy, max_steps=6, save_interval=1))
    assert len(drawn) == 2  # after the first save, and at the end


def test_evaluating_sampling_and_saving_do_not_move_the_trace(toy):
    """The commonest fault of the field: evaluation draws from the training random stream."""
    train(toy)
    quiet = replace(toy, run_name="quiet", eval_interval=0, sample_interval=0, save_interval=0)
    train(quiet)
    assert trace(toy) == trace(quiet)


def test_resume_of_a_resume_of_a_resume_is_exact(toy, monkeypatch):
    """Right once and wrong the second time is how most projects fail; saves fall on and around epoch ends."""
    train(toy)
    cut = replace(toy, run_name="cut", save_interval=1)
    real_step, budget = train_module.train_step, [0]

    def dying_step(*args):
        budget[0] -= 1
        if budget[0] < 0:
            raise KeyboardInterrupt
        torch.rand(3)  # whatever a restart does to the random state must not matter
        return real_step(*args)

    monkeypatch.setattr(train_module, "train_step", dying_step)
    for steps in (7, 0, 13, 1, 100):
        budget[0] = steps
        try:
            train(cut)
        except KeyboardInterrupt:
            assert steps < 100
    assert trace(cut) == trace(toy)
    assert vals(cut) == vals(toy)


def test_killed_process_resumes_to_the_same_bits(toy, capsys):
    """SIGKILL gives no time to say goodbye; what the next start finds must be enough."""
    train(replace(toy, run_name="whole"))
    process = start(toy, sys.executable)
    wait_for_step(toy, 12, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    capsys.readouterr()
    train(toy)
    assert "continued at step" in capsys.readouterr().out
    assert trace(toy) == trace(replace(toy, run_name="whole"))
    assert vals(toy) == vals(replace(toy, run_name="whole"))


def test_last_lines_sum_up_all_sessions(toy, capsys):
    """Bugs: time and tokens of the last session only; a value of an earlier step; a block after a run cut short."""
    train(replace(toy, max_steps=10, lr=1e-3))
    capsys.readouterr()
    train(toy)
    said = capsys.readouterr().out
    rows = list(read_rows(toy.run_dir / "metrics.jsonl"))
    seconds = max(row["seconds"] for row in rows)
    sessions = [[r["seconds"] for r in rows if r["kind"] == "train" and r["step"] in steps] for steps in ((10,), (11,))]
    assert 0 < sessions[0][0] < sessions[1][0], "the second session goes on from the first one's seconds"
    [tokens] = re.findall(r"^finished   step 40: ([\d,]+) tokens, 1.96 epochs,", said, re.M)
    [rate] = re.findall(r"^speed      ([\d,]+) tokens/s$", said, re.M)
    assert tokens == f"{40 * toy.total_batch_tokens:,}"
    assert float(rate.replace(",", "")) == pytest.approx(40 * toy.total_batch_tokens / seconds, rel=1e-2)
    assert said.count(f"\nvalidation loss {vals(toy)[40]:.4f}, perplexity {math.exp(vals(toy)[40]):.2f}\n") == 1


def test_finished_run_says_so_and_rewrites_nothing(toy, capsys):
    train(toy)
    before = {p: p.stat().st_mtime_ns for p in toy.run_dir.rglob("*") if p.name not in (".lock", "metrics.jsonl")}
    text = (toy.run_dir / "metrics.jsonl").read_text()
    first = capsys.readouterr().out
    result = train(toy)
    said = capsys.readouterr().out
    assert "already at step 40 of 40" in said
    assert said[said.index("\nfinished") :] == first[first.index("\nfinished") :], "what came of it, the same again"
    assert result["val_loss"] == vals(toy)[40]
    assert before == {p: p.stat().st_mtime_ns for p in before} and text == (toy.run_dir / "metrics.jsonl").read_text()


@pytest.mark.parametrize("signal_at", [None, 7])
def test_numbers_that_are_read_a_step_late_are_the_same_rows(toy, monkeypatch, signal_at):
    """As on a GPU. Bugs: the step before an evaluation, the end or a stop has no row; a row under another step."""
    real_reader, real_step, steps = train_module.StepReader, train_module.train_step, []
    toy = replace(toy, max_steps=12, eval_interval=5, sample_interval=0, save_interval=0)
    train(toy)

    def step(*args):
        if len(steps) == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(len(trace(late)))
        return real_step(*args)

    monkeypatch.setattr(train_module, "StepReader", lambda delay: real_reader(delay=True))
    monkeypatch.setattr(train_module, "train_step", step)
    late = replace(toy, run_name="late")
    train(late)
    assert steps[:8] == [0, 0, 1, 2, 3, 5, 5, 6], (
        "rows on the disk when a step starts: one late, unless something is due"
    )
    if signal_at:
        assert [row[0] for row in trace(late)] == [*range(1, checkpoint.step_of(checkpoint.steps(late.run_dir)[0]) + 1)]
        train(late)
    kinds = [(row["kind"], row["step"]) for row in read_rows(toy.run_dir / "metrics.jsonl")]
    assert kinds == [(row["kind"], row["step"]) for row in read_rows(late.run_dir / "metrics.jsonl")]
    assert trace(late) == trace(toy)


def test_killed_between_last_save_and_last_evaluation_still_evaluates(toy, monkeypatch):
    monkeypatch.setattr(train_module, "validate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(replace(toy, eval_interval=40, max_steps=6))
    monkeypatch.undo()
    result = train(replace(toy, eval_interval=40, max_steps=6))
    assert result["step"] == 6 and result["val_loss"] == vals(toy)[6]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_accumulation_changes_losses_only_by_rounding(toy, batch_size):
    """Loss of the last micro-batch only, or mean of unequal means, would show here."""
    plain = replace(toy, dropout=0.0, max_steps=25)  # 25 steps reach the padded window at the epoch's end
    other = replace(plain, run_name="other", batch_size=batch_size)
    train(plain), train(other)
    assert [row[4] for row in trace(plain)] == [row[4] for row in trace(other)], "same batches"
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)
    assert vals(other)[25] == pytest.approx(vals(plain)[25], abs=1e-5)


def test_loss_is_the_mean_over_the_whole_global_batch(toy):
    """The first step's loss, recomputed plainly from the model's logits."""
    c = replace(toy, dropout=0.0, max_steps=1)
    train(c)
    rt = train_module.runtime.start("cpu", "float32")
    data = train_module.open_data(c, rt)
    model = train_module.build(c, rt, data.tokenizer.vocab_size).model
    windows = train_module.FineWebDataLoader(data.train, 8, 8, c.seed).windows(0)
    x, y = (torch.from_numpy(a) for a in data.train.rows(windows))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten())
    assert losses(c)[0] == pytest.approx(float(expected), abs=1e-5)


def test_changed_identity_is_refused_with_both_values(toy):
    train(replace(toy, max_steps=5))
    with pytest.raises(UserError, match=r"seed \(was 1337, now 7\)"):
        train(replace(toy, seed=7))
    with pytest.raises(UserError, match=r"n_layer \(was 2, now 3\).*rope_theta"):
        train(replace(toy, n_layer=3, rope_theta=500.0))
    with pytest.raises(UserError, match="resume is never"):
        train(replace(toy, resume="never"))
    assert len(trace(toy)) == 5


def test_a_run_goes_on_when_the_model_gains_a_field(toy, monkeypatch):
    """Bug: the run's identity lacks a field that is newer than it, and that counted as another model."""
    train(replace(toy, max_steps=5))
    path = checkpoint.newest(toy.run_dir)
    for name in (checkpoint.CONFIG, checkpoint.STATE):
        values = read_json(path / name)
        del values.get("identity", values)["rope_theta"]
        (path / name).write_text(json.dumps(values))
    manifest = read_json(path / checkpoint.MANIFEST)
    for name, facts in manifest["files"].items():
        facts |= {"size": (path / name).stat().st_size, "sha256": checkpoint.sha256(path / name)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert train(replace(toy, max_steps=6))["step"] == 6
    assert [row[0] for row in trace(toy)] == [1, 2, 3, 4, 5, 6]


def test_global_batch_changed_on_purpose_loses_no_window(toy, capsys):
    train(replace(toy, max_steps=10))
    train(replace(toy, max_steps=15, total_batch_tokens=512))
    assert "changed    max_steps 10 -> 15, total_batch_tokens 256 -> 512\n" in capsys.readouterr().out
    seen = [r["samples_seen"] for r in read_rows(toy.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert seen == [*range(8, 88, 8), *range(96, 176, 16)]


def test_resume_from_a_named_checkpoint_starts_a_new_run(toy):
    train(toy)
    branch = replace(toy, run_name="branch", resume=str(toy.run_dir / "step_00000035"))
    train(branch)
    assert trace(branch) == trace(toy)[35:]
    with pytest.raises(UserError, match="does not exist"):
        train(replace(toy, run_name="new", resume=str(toy.run_dir / "step_00000099")))


def test_a_moved_run_continues(toy, tmp_path):
    """An absolute path inside would point to where the run once was."""
    train(toy)
    part = replace(toy, run_name="part", save_interval=20)
    train(part)
    shutil.rmtree(part.run_dir / "step_00000040")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(part.run_dir, tmp_path / "elsewhere" / "renamed")
    there = replace(part, checkpoint_dir=str(tmp_path / "elsewhere"), run_name="renamed")
    assert train(there)["step"] == 40
    assert trace(there) == trace(toy)


def test_no_secret_is_written(toy, monkeypatch, capsys):
    """A key that is in the environment must not end in run.json, which people publish."""
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "hush-hush-1234567890")
    train(replace(toy, max_steps=6))
    written = [p for p in toy.run_dir.rglob("*") if p.is_file()]
    assert len(written) > 8 and not any(b"hush-hush" in p.read_bytes() for p in written)
    assert "hush-hush" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Invalid buffer size: 14.06 GiB"),  # of one tensor on MPS
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_flag_to_lower(monkeypatch, capsys, error):
    """The allocator's own message is a page, and on a CPU not even of a type of its own."""
    monkeypatch.setattr(train_module, "train", lambda c: (_ for _ in ()).throw(error))
    assert run(lambda: train_module.main([])) == 2
    said = capsys.readouterr().err
    assert "batch_size 16; lower --batch_size" in said and said.count("\n") == 1


# --- faults


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_update_and_before_any_save(toy, monkeypatch, where):
    """A NaN that reaches the weights, or a checkpoint, cannot be undone."""
    train(replace(toy, max_steps=5))
    real = train_module.train_step

    def poisoned(c, rt, net, batch, at):
        hook = net.model.ln_f.register_forward_hook(
            (lambda m, i, o: o * math.nan)
            if where == "loss"
            else (lambda m, i, o: o.register_hook(lambda g: g * math.inf) and None)
        )
        before = [p.detach().clone() for p in net.model.parameters()]
        try:
            return real(c, rt, net, batch, at)
        finally:
            hook.remove()
            assert all(torch.equal(a, b) for a, b in zip(before, net.model.parameters()))

    monkeypatch.setattr(train_module, "train_step", poisoned)
    with pytest.raises(UserError, match=r"step 6: loss .* samples 40 to 47; the update was not applied"):
        train(toy)
    assert checkpoint.steps(toy.run_dir)[0].name == "step_00000005"


def test_a_validation_of_nan_stops_the_run_and_leaves_a_file_that_can_be_read(toy, monkeypatch):
    """Bugs: a NaN in metrics.jsonl, which no later start could read; a broken model that trains on unsaid."""
    real = train_module.validate
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "validate", lambda *args: real(*args) | {"loss": math.nan})
        with pytest.raises(UserError, match=r"step 0: validation loss nan; lower --lr"):
            train(toy)
    assert train(replace(toy, max_steps=2))["step"] == 2


def test_no_row_of_another_model_is_kept_where_nothing_was_saved(toy, monkeypatch):
    """Bug: a run killed before its first save, started again with other flags, kept the first one's validation."""
    real = train_module.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(toy)
    assert train_module.train_step is real and vals(toy).keys() == {0}
    other = replace(toy, seed=7, n_embd=64, max_steps=1)
    train(other)
    fresh = replace(other, run_name="fresh")
    train(fresh)
    assert vals(other) == vals(fresh)


def test_a_gradient_of_zeros_stops_before_the_update(toy, monkeypatch):
    """Bug: a compiler that loses the gradient (torch 2.11) trains for days with a correct loss that never falls."""
    real = train_module.train_step

    def without_gradient(c, rt, net, batch, at):
        hook = net.model.register_forward_hook(lambda m, i, loss: loss.register_hook(lambda g: g * 0) and None)
        before = [p.detach().clone() for p in net.model.parameters()]
        try:
            return real(c, rt, net, batch, at)
        finally:
            hook.remove()
            assert all(torch.equal(a, b) for a, b in zip(before, net.model.parameters()))

    monkeypatch.setattr(train_module, "train_step", without_gradient)
    with pytest.raises(UserError, match=r"step 1: .* gradient norm 0.0 .* samples 0 to 7; the update was not applied"):
        train(toy)
    assert not checkpoint.steps(toy.run_dir)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_of_fp16s_scale_skips_the_update_and_says_so(toy, monkeypatch, optimizer):
    """Bugs: the weights, Muon's momentum or AdamW's averages take part in a skipped step; Infinity in metrics.jsonl,
    which is not JSON. float16 is not for CPUs, but its scaler works there."""
    real_build, real_step, unmoved = train_module.build, train_module.train_step, []

    def build(c, rt, vocabulary):
        net = real_build(c, rt, vocabulary)
        return replace(net, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))

    def step(c, rt, net, batch, at):
        def now():
            return {
                name: t for file in checkpoint.snapshot(net.model, net.optimizer).values() for name, t in file.items()
            }

        before, result = now(), real_step(c, rt, net, batch, at)
        unmoved.append(all(torch.equal(t, before.get(name, t * 0)) for name, t in now().items()))
        return result

    monkeypatch.setattr(train_module, "build", build)
    monkeypatch.setattr(train_module, "train_step", step)
    train(replace(toy, optimizer=optimizer, max_steps=10, dropout=0.0, sample_interval=0))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (toy.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in (json.loads(line, parse_constant=refuse) for line in lines) if row["kind"] == "train"]
    skipped = [row.get("skipped", False) for row in rows]
    assert skipped == unmoved and 1 <= sum(skipped) < 10
    assert all(row["grad_norm"] is None for row in rows if row.get("skipped"))
    assert rows[-1]["loss"] < rows[0]["loss"]


class Compiled(torch.nn.Module):
    """What stands in for a compiled model: the model, and a factor for its gradient."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x, y):
        loss = self.model(x, y)
        loss.register_hook(lambda g: g * self.factor)
        return loss


@pytest.mark.parametrize("dropout, factor", [(0.0, 0), (0.0, 1.1), (0.1, 0), (0.1, 2)])
def test_a_compiler_that_is_wrong_is_refused_before_the_first_step(toy, monkeypatch, dropout, factor):
    """Bug: torch 2.11 compiled every gradient to zero, and nothing said so."""
    monkeypatch.setattr(torch, "compile", lambda model: Compiled(model, factor))
    with pytest.raises(UserError, match=rf"torch {re.escape(torch.__version__)} computes .*--compile off"):
        train(replace(toy, compile="on", dropout=dropout, eval_interval=0))
    assert losses(toy) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_check_of_the_compiler_moves_no_number(toy, monkeypatch, dropout):
    """Bugs: its gradients stay, its dropout moves the random stream, the model keeps its mode."""
    toy = replace(toy, dropout=dropout, max_steps=10)
    train(toy)
    monkeypatch.setattr(torch, "compile", lambda model: Compiled(model, 1))
    again = replace(toy, run_name="again", compile="on")
    train(again)
    assert trace(again) == trace(toy)


class Graphs(list):
    """A backend of torch.compile that only notes the graphs that it is given."""

    def __init__(self, monkeypatch):
        super().__init__()
        real = torch.compile
        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=self))

    def __call__(self, graph, inputs):
        self.append(graph)
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_code_that_is_checked_is_the_code_that_trains(toy, monkeypatch, rows):
    """Bug: with one row, the check's batch had other strides; the step was compiled again, and nothing checked that."""
    graphs = Graphs(monkeypatch)
    train(replace(toy, compile="on", batch_size=rows, max_steps=2, eval_interval=0, sample_interval=0))
    assert len(graphs) == 1


def test_a_micro_batch_that_mps_adds_up_wrong_is_refused(toy):
    """Bug: torch before 2.14 computes a gradient wrong on an M1 that is a sum over 32,767 tokens; the loss is right."""
    net = train_module.Net(GPT(toy.model_config(60)), None, None, None)
    with pytest.raises(UserError, match="lower --batch_size"):
        refuse_wrong_products(net, Runtime(torch.device("mps"), "float32"), 2**15 // toy.block_size, dropout=0.0)


def test_the_check_lets_the_compiler_divide_the_graph_for_ddp(monkeypatch):
    """Bug: compiled outside of DDP the model was one graph, so no gradient was sent before all of them were there."""
    graphs = Graphs(monkeypatch)
    config = GPTConfig(block_size=8, vocab_size=64, valid_vocab_size=60, n_layer=4, n_head=2, n_embd=128, dropout=0.0)
    model = GPT(config)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        step_model = torch.nn.parallel.DistributedDataParallel(torch.compile(model), bucket_cap_mb=1)
        net = train_module.Net(model, step_model, torch.optim.AdamW(model.parameters()), None)
        refuse_wrong_products(net, Runtime(torch.device("cpu"), "float32"), batch_size=2, dropout=0.0)
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) > 1 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_between_two_steps_saves_and_gives_its_exit_code(toy, number, monkeypatch, capsys):
    real, steps = train_module.train_step, []

    def step(*args):
        steps.append(args)
        if len(steps) == 8:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train_module, "train_step", step)
    toy = replace(toy, eval_interval=0, sample_interval=0, save_interval=0)
    assert train_module.main(as_flags(toy)) == 128 + number
    assert "saved in" in capsys.readouterr().out
    assert [checkpoint.step_of(path) for path in checkpoint.steps(toy.run_dir)] == [8] and len(trace(toy)) == 8


def test_a_signal_saves_and_the_next_start_continues_exactly(toy):
    """The real command line in another process, stopped with nothing else due for long."""
    number = signal.SIGTERM
    toy = replace(toy, max_steps=150, eval_interval=0, sample_interval=0, save_interval=0, total_batch_tokens=128)
    process = start(toy, sys.executable)
    wait_for_step(toy, 8, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "saved in" in output, output
    stopped = checkpoint.step_of(checkpoint.steps(toy.run_dir)[0])
    assert len(trace(toy)) == stopped < 150, "saved at the step where it stopped"
    train(toy), train(replace(toy, run_name="whole"))
    assert trace(toy) == trace(replace(toy, run_name="whole"))


def test_a_save_that_fails_in_the_background_stops_the_run_soon(toy, monkeypatch):
    """Noticed only at the next save, it would cost all the work between the two."""

    real, tried = train_module.train_step, threading.Event()

    def full(*args):
        tried.set()
        raise UserError("no space")

    def step(c, rt, net, batch, at):
        if at.step == 6:  # a toy's steps are faster than the start of a thread on a busy machine
            assert tried.wait(60)
            time.sleep(0.2)
        return real(c, rt, net, batch, at)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    monkeypatch.setattr(train_module, "train_step", step)
    with pytest.raises(UserError, match="no space"):
        train(replace(toy, save_interval=5, eval_interval=0))
    assert 5 <= len(trace(toy)) < 10


SCENE = {"activity_label": "Cooking", "ctx": "A pot. A cook", "ctx_a": "A pot.", "ctx_b": "A cook", "label": 1}
SCENE["endings"] = ["runs away.", "stirs the soup.", "sleeps.", "sings."]


def test_hellaswag_is_tokenized_once(toy, tmp_path, monkeypatch):
    """Bug: each evaluation of a run tokenized and packed all examples again, on every rank: seconds without a GPU."""
    scenes, made = tmp_path / "scenes.jsonl", []
    scenes.write_text((json.dumps(SCENE) + "\n") * 3)
    real = train_module.hellaswag_eval.prepare
    monkeypatch.setattr(train_module.hellaswag_eval, "prepare", lambda *args: made.append(real(*args)) or made[-1])
    train(replace(toy, max_steps=4, eval_interval=0, hellaswag_interval=2, hellaswag_data=str(scenes)))
    rows = [row for row in read_rows(toy.run_dir / "metrics.jsonl") if row["kind"] == "hellaswag"]
    assert len(made) == 1 and len(rows) > 1


@pytest.mark.parametrize(
    "during, module, function",
    [
        ("val", train_module, "first_windows"),
        ("hellaswag", train_module.hellaswag_eval, "score_batch"),
        ("sample", train_module.inference, "choose"),
        ("save", checkpoint, "write_tensors"),
    ],
)
def test_a_signal_is_obeyed_within_what_takes_long(toy, tmp_path, monkeypatch, during, module, function):
    """A preempted job has seconds; an evaluation may take minutes. What it left undone, the next start does."""
    scenes = tmp_path / "scenes.jsonl"
    scenes.write_text((json.dumps(SCENE) + "\n") * 20)
    toy = replace(toy, max_steps=16, val_tokens=1200, batch_size=1, hellaswag_interval=10, sample_interval=10,
                  hellaswag_data=str(scenes))  # fmt: skip
    whole = replace(toy, run_name="whole")
    train(whole)
    calls, first = [], {"val": 50, "hellaswag": 2, "sample": 3, "save": 3}[during]
    real = getattr(module, function)

    def count():
        calls.append(function)
        if len(calls) == first:  # in the midst of the second validation, the first HellaSwag, sample, or second save
            os.kill(os.getpid(), signal.SIGTERM)

    def counted(*args, **options):
        count()
        return real(*args, **options)

    def counted_windows(*args):
        for batch in real(*args):
            count()
            yield batch

    monkeypatch.setattr(module, function, counted_windows if during == "val" else counted)
    result = train(toy)
    monkeypatch.setattr(module, function, real)
    assert result["signal"] == signal.SIGTERM and result["step"] in (10, 11)
    assert len(calls) <= first + (3 if during == "save" else 0), "it went on after the signal"
    assert (during, 10) not in {(r["kind"], r["step"]) for r in read_rows(toy.run_dir / "metrics.jsonl")}
    train(toy)
    assert trace(toy) == trace(whole)
    evaluations = [
        sorted((r["kind"], r["step"], r.get("loss"), r.get("text")) for r in read_rows(c.run_dir / "metrics.jsonl"))
        for c in (toy, whole)
    ]
    assert evaluations[0] == evaluations[1]


def test_a_signal_within_the_first_validation_saves_step_0(toy, monkeypatch):
    """Bug: a checkpoint of an optimizer that has no state yet counts as damaged, and the run can never go on."""
    real = train_module.first_windows

    def windows(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*args)

    toy = replace(toy, max_steps=5)
    monkeypatch.setattr(train_module, "first_windows", windows)
    assert train(toy)["step"] == 0 and checkpoint.steps(toy.run_dir)[0].name == "step_00000000"
    monkeypatch.setattr(train_module, "first_windows", real)
    train(toy), train(replace(toy, run_name="whole"))
    assert trace(toy) == trace(replace(toy, run_name="whole"))


def test_second_ctrl_c_exits_at_once():
    """A person who presses it twice does not want to wait for a save."""
    code = "import os, signal, time\nfrom support import runtime\nwith runtime.StopSignals() as s:\n"
    code += "  for _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n  time.sleep(60)"
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 130
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("name", ["edufineweb_{}_{:06d}.npy", "fineweb_{}_{:06d}.bin"])
def test_shards_of_build_nanogpt_and_of_llm_c_train_unchanged(toy, corpus, tmp_path, name):
    """Bugs: a header trained on as tokens, validation shards in the same folder trained on, another order."""
    for split, folder, first in (("train", corpus, 1), ("val", Path(f"{corpus}_val"), 0)):
        for i, shard in enumerate(sorted(folder.glob("*.npy")), first):
            tokens, path = numpy.load(shard), tmp_path / "theirs" / name.format(split, i)
            path.parent.mkdir(exist_ok=True)
            header = numpy.array([20240520, 1, len(tokens), *[0] * 253], "<i4").tobytes()
            numpy.save(path, tokens) if path.suffix == ".npy" else path.write_bytes(header + tokens.tobytes())
    theirs = replace(toy, run_name="theirs", data_dir=str(tmp_path / "theirs"), tokenizer=str(corpus / "tokenizer"))
    train(replace(toy, max_steps=5))
    train(replace(theirs, max_steps=5))
    assert trace(theirs) == trace(toy) and vals(theirs) == vals(toy)


def test_second_process_on_one_run_is_refused(toy):
    toy.run_dir.mkdir(parents=True)
    (toy.run_dir / ".lock").write_text("process 1 on another\n" * 2)  # those that had it before are not named
    us = f"{re.escape(str(toy.run_dir))} is in use by process {os.getpid()} on "
    with checkpoint.run_lock(toy.run_dir), pytest.raises(UserError, match=us):
        train(toy)
    train(replace(toy, max_steps=2))  # and free again


def test_eval_only_repeats_the_number_of_the_run(toy, capsys):
    result = train(toy)
    again = train(replace(toy, eval_only=True))
    assert again["loss"] == result["val_loss"]
    other_batch = train(replace(toy, eval_only=True, batch_size=1, checkpoint=str(toy.run_dir)))
    assert other_batch["loss"] == pytest.approx(result["val_loss"], abs=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_targets(toy):
    train(replace(toy, max_steps=1))
    row = next(r for r in read_rows(toy.run_dir / "metrics.jsonl") if r["kind"] == "val")
    data = train_module.open_data(toy, train_module.runtime.start("cpu", "float32"))
    targets, tokenizer = data.val.tokens(1, 1 + row["targets"]), data.tokenizer
    text_bytes = sum(len(tokenizer.backend.id_to_token(int(t))) for t in targets if t != tokenizer.eot_token)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["targets"] / math.log(2) / text_bytes)


@pytest.mark.slow
def test_a_compiled_run_with_dropout_gives_its_own_losses_again(toy):
    """Bug: compiled dropout that is left out, or that does not follow the step."""
    plain = replace(toy, dropout=0.0, max_steps=6)
    compiled = replace(toy, run_name="c", max_steps=6, compile="on", dropout=0.1)
    train(plain), train(compiled)
    assert losses(compiled)[0] != losses(plain)[0] == pytest.approx(losses(compiled)[0], abs=0.1)
    again = replace(compiled, run_name="again")
    train(again)
    assert trace(again) == trace(compiled)


@pytest.mark.slow
def test_a_signal_during_compilation_stops_after_the_first_step(toy):
    """Ctrl-C goes to the whole process group, to the compiler's processes too; none of them may fail from it."""
    toy = replace(toy, compile="on", eval_interval=0)
    process = start(toy, sys.executable, process_group=0, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    for line in process.stdout:
        if line.startswith("run "):
            break
    time.sleep(2)  # the first step compiles for much longer, as nothing is kept from another test
    assert not list(read_rows(toy.run_dir / "metrics.jsonl"))
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped after step 1, saved" in output and "Traceback" not in output, output
    checkpoint.verify(toy.run_dir / "step_00000001")
