"""Every flag reaches what it names. Each test drives `train(config)` and looks at what came of it, not at a function
alone: a flag that is read, explained and then ignored passes every other test."""

import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
import inference
import model as model_module
import muon
import train as train_module
from data_processing_fineweb import FineWebDataLoader, FineWebDataset
from model import GPT
from support import runtime, tracking
from support.cli import UserError
from support.files import read_json, write_json
from support.tracking import read_rows
from toy import ROOT, losses, trace, vals
from train import PRESETS, lr_at, problems, train

# --- presets


@pytest.mark.parametrize(
    "name, figures",
    [
        ("gpt2-124m", dict(optimizer="adamw", lr=6e-4, last=6e-5, dropout=0.1, max_steps=152_587, tokens=65_536)),
        ("fast-124m", dict(optimizer="muon", lr=2.4e-3, last=0, dropout=0.0, max_steps=76_294, tokens=65_536)),
        (
            "demo",
            dict(optimizer="muon", lr=1e-2, last=2.5e-4, dropout=0.0, max_steps=600, tokens=2048, dtype="float32"),
        ),
    ],
)
def test_a_preset_is_the_published_one(name, figures):
    """A digit that slips in a preset spoils a run of days, and no other test trains with it."""
    c = PRESETS[name]
    last, peak = lr_at(c.max_steps - 1, c), max(lr_at(step, c) for step in range(0, c.max_steps // 10))
    found = {key: getattr(c, key) for key in figures if hasattr(c, key)}
    assert found | dict(lr=peak, last=last, tokens=c.total_batch_tokens) == pytest.approx(figures)
    assert (c.weight_decay, c.beta2, c.grad_clip, c.warmup_frac, c.norm, c.bias, c.rope_theta) == (
        0.1, 0.95, 1.0, 0.06, "layernorm", False, 10_000)  # fmt: skip
    assert not problems(c)


def test_a_124m_preset_is_the_124m_model():
    for name in ("gpt2-124m", "fast-124m"):
        config = PRESETS[name].model_config(50_257)
        assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (12, 12, 768, 1024)
        assert (config.vocab_size, config.valid_vocab_size) == (50_304, 50_257)


SIZES = {  # GPT-2's: layers, heads, channels, parameters without biases and learned positions, GB in training
    "gpt2-124m": (12, 12, 768, 123_587_328, 9.9),
    "gpt2-350m": (24, 16, 1024, 353_551_360, 24.8),
    "gpt2-774m": (36, 20, 1280, 772_271_360, 47.2),
    "gpt2-1558m": (48, 25, 1600, 1_555_201_600, 56.0),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_size_in_its_name(name):
    """Bugs: a digit that slips in a shape; a preset that the memory it was made for does not hold."""
    n_layer, n_head, n_embd, parameters, gigabytes = SIZES[name]
    c = PRESETS[name]
    with torch.device("meta"):
        model = GPT(c.model_config(50_257))
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (n_layer, n_head, n_embd, 1024)
    assert model.num_parameters() == parameters == 50_304 * n_embd + n_layer * (12 * n_embd + 2) * n_embd + n_embd
    assert model.training_bytes(c.batch_size) == pytest.approx(1e9 * gigabytes, abs=5e7)
    assert not problems(c)
    same = ("optimizer", "max_steps", "total_batch_tokens", "weight_decay", "beta2", "grad_clip", "dropout", "schedule")
    assert all(getattr(c, key) == getattr(PRESETS["gpt2-124m"], key) for key in same)


@pytest.mark.parametrize("name", ["gpt2-350m", "gpt2-774m", "gpt2-1558m"])
def test_a_slice_of_a_larger_preset_trains(name):
    """Bug: a width or number of heads with which the model or the optimizer cannot work."""
    c = PRESETS[name]
    torch.manual_seed(0)  # with some seeds the first loss is 6% off
    model = GPT(replace(c.model_config(64), n_layer=1, block_size=16))
    optimizer = torch.optim.AdamW(model.parameter_groups(c.weight_decay), lr=c.lr)
    idx = torch.arange(16)[None]
    before = model(idx, idx)
    before.backward()
    optimizer.step()
    assert model.h[0].attn.n_head * 64 == c.n_embd, "GPT-2's heads have 64 channels"
    assert before.item() == pytest.approx(16 * math.log(64), rel=0.05) and model(idx, idx) < before


# --- the optimizer

OPTIMIZER = dict(weight_decay=0.7, beta2=0.8, grad_clip=0.3, lr=5e-3, min_lr=1e-3, warmup_frac=0.3)
STEPS = 5


def plain_run(c, clip):
    """The first STEPS steps written with torch alone: (the model after them, losses, gradient norms)."""
    torch.manual_seed(c.seed)
    model = GPT(c.model_config(512))
    embedding, vectors = [model.wte.weight], [p for p in model.parameters() if p.dim() < 2]
    if c.optimizer == "adamw":
        matrices = [{"params": [p for p in model.h.parameters() if p.dim() == 2], "weight_decay": 0.7}]
        kind = torch.optim.AdamW
    else:  # whose own steps are compared with torch's in test_muon.py
        matrices, kind = [group for group in model.parameter_groups(0.7) if "parts" in group], muon.Muon
    groups = [{"params": embedding, "weight_decay": 0.7}, {"params": vectors, "weight_decay": 0.0}, *matrices]
    optimizer = kind(groups, lr=5e-3, betas=(0.9, 0.8), eps=1e-8)
    shares = [(c.embed_lr or c.lr) / c.lr, (c.vector_lr or c.lr) / c.lr, 1.0, 1.0]
    data = FineWebDataset(c.data_dir, c.block_size, "train", 512)
    loader = FineWebDataLoader(data, 8, 8, c.seed)
    found_losses, norms = [], []
    for step in range(STEPS):
        x, y = (torch.from_numpy(a) for a in data.rows(loader.windows(8 * step)))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, clip / (float(norm) + 1e-6))
        for group, share in zip(optimizer.param_groups, shares):
            group["lr"] = lr_at(step, c) * share
        optimizer.step()
        found_losses.append(loss.item())
        norms.append(float(norm))
    return model, found_losses, norms


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip, rates", [(0.3, {}), (0.0, {}), (0.3, {"embed_lr": 2e-2, "vector_lr": 1e-3})])
def test_training_steps_are_those_of_plain_torch(toy, optimizer, clip, rates):
    """Bugs: --grad_clip, --beta2, --weight_decay, --optimizer, --lr, --embed_lr or --vector_lr read and ignored; decay
    on norms; a learning rate that reaches one group only; the gradient divided once too often."""
    changes = OPTIMIZER | rates | {"grad_clip": clip}
    c = replace(toy, dropout=0.0, optimizer=optimizer, max_steps=STEPS, bias=True, **changes)
    train(c)
    expected, expected_losses, norms = plain_run(c, clip or math.inf)
    rows = [row for row in read_rows(c.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert min(norms) > 0.5 > clip, "so that clipping changes every step"
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert losses(c) == pytest.approx(expected_losses, abs=1e-5)
    found = checkpoint.load_model(c.run_dir)[0].state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# --- checks and modes


def test_a_slash_behind_the_folder_of_the_data_changes_nothing(toy):
    """Bug: of `--data_dir corpus/`, as the shell completes it, the validation shards beside it were not found."""
    train(replace(toy, data_dir=f"{toy.data_dir}/", max_steps=1))
    assert vals(toy)


@pytest.mark.parametrize("bad, words", [(dict(lr=-1.0), "lr is -1"), (dict(fsdp=True), "--fsdp is for several")])
def test_a_call_from_python_is_checked_as_the_command_is(toy, bad, words):
    with pytest.raises(UserError, match=words):
        train(replace(toy, **bad))


def test_training_shards_do_not_validate(toy, tmp_path):
    """Validated on what it was trained on, a model looks better the more it remembers."""
    with pytest.raises(UserError, match="also a training shard"):
        train(replace(toy, val_data_dir=toy.data_dir))
    assert not toy.run_dir.exists()


def count_blocks(monkeypatch):
    """The number of times that a block of the model ran while training."""
    calls, real = [], model_module.Block.forward

    def forward(self, *args, **kwargs):
        calls.append(self.training)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(model_module.Block, "forward", forward)
    return lambda: sum(calls)


def test_grad_checkpoint_recomputes_the_blocks_and_changes_no_number(toy, monkeypatch):
    """The flag was read, and the memory stayed what it was."""
    plain = replace(toy, max_steps=3)
    count = count_blocks(monkeypatch)
    train(plain)
    once = count()
    assert once == 3 * 2 * plain.n_layer, "steps x micro-steps x blocks"
    less = replace(plain, run_name="less", grad_checkpoint=True)
    train(less)
    assert count() - once == 2 * once
    assert trace(less) == trace(plain)


def test_only_training_builds_a_graph(toy, monkeypatch, scenes):
    """An evaluation that keeps activations runs out of memory where training does not; one in training mode drops; one
    in float32 takes three times as long as one in the run's precision."""
    modes, real = set(), GPT.features

    def features(self, *args, **kwargs):
        modes.add((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "features", features)
    c = replace(toy, max_steps=2, sample_interval=1, eval_interval=1, hellaswag_interval=1, hellaswag_data=scenes)
    c = replace(c, dtype="bfloat16")
    train(c)
    kinds = [row["kind"] for row in read_rows(c.run_dir / "metrics.jsonl")]
    assert kinds.count("train") == 2 and {"val", "hellaswag", "sample"} <= {*kinds}
    assert modes == {(True, True, True), (False, False, True)}
    modes.clear()
    train(replace(c, eval_only=True))
    assert modes == {(False, False, True)}


@pytest.mark.parametrize(
    "flags, due",
    [
        (dict(eval_interval=3), {"val": [0, 3, 6, 7]}),
        (dict(sample_interval=2), {"sample": [2, 4, 6, 7]}),
        (dict(hellaswag_interval=4), {"hellaswag": [4, 7]}),
    ],
)
def test_an_interval_says_when_and_the_last_step_counts(toy, scenes, flags, due):
    off = dict(eval_interval=0, sample_interval=0, hellaswag_interval=0, hellaswag_data=scenes, save_interval=0)
    c = replace(toy, max_steps=7, **off | flags)
    train(c)
    rows = [row for row in read_rows(c.run_dir / "metrics.jsonl") if row["kind"] != "train"]
    assert {kind: [row["step"] for row in rows if row["kind"] == kind] for kind in {r["kind"] for r in rows}} == due
    assert [path.name for path in checkpoint.steps(c.run_dir)] == ["step_00000007"]


def test_save_interval_and_keep_last_say_what_is_kept(toy):
    train(replace(toy, max_steps=7, save_interval=2, keep_last=3, eval_interval=0))
    assert [checkpoint.step_of(path) for path in checkpoint.steps(toy.run_dir)] == [7, 6, 4]


def test_flags_of_evaluation_reach_it(toy, scenes):
    """--val_tokens, --hellaswag_limit, --sample_prompt: an evaluation on other text than was asked for."""
    c = replace(toy, max_steps=1, hellaswag_interval=1, hellaswag_data=scenes, val_tokens=100, sample_interval=1)
    train(replace(c, hellaswag_limit=3, sample_prompt="Zebra"))
    rows = {row["kind"]: row for row in read_rows(c.run_dir / "metrics.jsonl")}
    assert rows["val"]["targets"] == 128, "whole windows of 32 that cover 100 tokens"
    assert rows["hellaswag"]["examples"] == 3
    assert rows["sample"]["prompt"] == "Zebra"


def test_no_shuffle_reads_in_stored_order(toy):
    """The windows of the first batches, in order, told by the checksum of their tokens."""
    c = replace(toy, no_shuffle=True, max_steps=3)
    train(c)
    x, _ = FineWebDataset(c.data_dir, 32, "train", 512).rows(list(range(24)))
    expected = [sum(zlib.crc32(x[8 * step + r], r) for r in range(8)) for step in range(3)]
    assert [row["checksum"] for row in read_rows(c.run_dir / "metrics.jsonl") if row["kind"] == "train"] == expected


def test_seed_decides_weights_and_order(toy):
    """A second seed that repeats the first makes error bars of zero."""
    one, two = (replace(toy, run_name=f"seed{seed}", seed=seed, max_steps=2, dropout=0.0) for seed in (1, 2))
    train(one), train(two)
    assert vals(one)[0] != vals(two)[0], "the weights"
    assert {row[4] for row in trace(one)}.isdisjoint(row[4] for row in trace(two)), "the order"


@pytest.mark.parametrize("change", [dict(no_shuffle=True), dict(optimizer="muon"), dict(norm="rmsnorm"), dict(seed=5)])
def test_what_makes_another_experiment_is_refused(toy, change):
    """Half the steps of one run and half of another, under one name."""
    train(replace(toy, max_steps=1))
    with pytest.raises(UserError, match=f"cannot be continued with another {next(iter(change))} .was .*, now "):
        train(replace(toy, **change))


def test_other_data_is_refused(toy, tmp_path):
    """Data prepared anew under the old name, one token longer or other."""
    for name in ("data", "data_val"):
        shutil.copytree(Path(toy.data_dir).parent / name, tmp_path / name)
    toy = replace(toy, data_dir=str(tmp_path / "data"), max_steps=1)
    train(toy)
    manifest = read_json(tmp_path / "data" / "manifest.json")
    manifest["shards"][-1]["sha256"] = "0" * 64
    write_json(tmp_path / "data" / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"another data .was"):
        train(replace(toy, max_steps=2))


def test_validation_data_of_another_tokenizer_is_refused(toy, tmp_path):
    """Its ids mean other words; the loss would be a number without sense."""
    shutil.copytree(f"{toy.data_dir}_val", tmp_path / "other")
    manifest = read_json(tmp_path / "other" / "manifest.json")
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    write_json(tmp_path / "other" / "manifest.json", manifest)
    for c in (toy, replace(toy, eval_only=True)):
        with pytest.raises(UserError, match="other was made with tokenizer"):
            train(replace(c, val_data_dir=str(tmp_path / "other"), max_steps=1))
        train(replace(toy, max_steps=1))


def test_eval_only_evaluates_the_checkpoint_that_is_named(toy):
    """A flag that is ignored gives the newest one's number, which looks as good."""
    train(replace(toy, max_steps=20, keep_last=9, val_tokens=64))
    named = train(replace(toy, eval_only=True, checkpoint=str(toy.run_dir / "step_00000010"), val_tokens=64))
    assert named["loss"] == vals(toy)[10] != vals(toy)[20]


def test_a_sample_is_the_nucleus_presets_of_the_runs_seed(toy):
    """64 tokens of --sample_prompt; the same command on the checkpoint gives the same text."""
    c = replace(toy, max_steps=2, sample_interval=2, sample_prompt="print", seed=7)
    train(c)
    [row] = [row for row in read_rows(c.run_dir / "metrics.jsonl") if row["kind"] == "sample"]
    model, tokenizer = checkpoint.load_model(c.run_dir)
    assert row["text"] == inference.sample_text(model, tokenizer, "print", inference.PRESETS["nucleus"], 64, seed=7)[0]


class Clock:
    """Python's time module, but each look at the clock of performance takes a quarter of a second."""

    now = 0.0

    def __getattr__(self, name):
        return getattr(time, name)

    def perf_counter(self):
        self.now += 0.25
        return self.now


def test_rows_say_how_far_and_how_fast(toy, monkeypatch):
    """Axes of every picture and comparison: tokens, seconds of all sessions, epochs, speed, MFU."""
    monkeypatch.setattr(train_module, "time", Clock())
    monkeypatch.setattr(runtime.Runtime, "peak_flops", lambda self: 1e9)
    c = replace(toy, eval_interval=0, sample_interval=0)
    train(replace(c, max_steps=3))
    result = train(replace(c, max_steps=5))
    rows = [row for row in read_rows(c.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    flops = GPT(c.model_config(512)).flops_per_token()
    assert result["tokens"] == rows[-1]["tokens"] and len(rows) == 5
    for step, row in enumerate(rows, 1):
        assert (row["step"], row["tokens"], row["samples_seen"]) == (step, 256 * step, 8 * step)
        assert row["seconds"] == 0.25 * step and row["tokens_per_second"] == 1024
        assert row["epoch"] == round(8 * step / 163, 4) and row["mfu"] == round(1024 * flops / 1e9, 4)
        assert row["memory"] > 2**24


def test_rows_are_there_as_soon_as_they_are_made(toy, monkeypatch):
    """A run that is watched from outside, or killed, keeps every step that it has told of."""
    real, there = train_module.train_step, []

    def step(*args):
        there.append(sum(row["kind"] == "train" for row in read_rows(toy.run_dir / "metrics.jsonl")))
        return real(*args)

    monkeypatch.setattr(train_module, "train_step", step)
    train(replace(toy, max_steps=4))
    assert there == [0, 1, 2, 3]


def test_the_scale_of_float16_survives_a_restart(toy, monkeypatch):
    """Begun anew, it overshoots and skips updates that the undisturbed run made."""
    real = torch.amp.GradScaler
    how = dict(init_scale=64.0, growth_interval=3, enabled=True)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, **how))
    whole = replace(toy, run_name="whole", max_steps=8)
    train(whole)
    for steps in (4, 8):
        train(replace(toy, max_steps=steps))
    scales = [read_json(c.run_dir / "step_00000008" / "state.json")["scaler"] for c in (whole, replace(toy))]
    assert scales[0] == scales[1] and scales[0]["scale"] == 256.0


# --- several processes


def test_gradients_are_sent_at_the_last_micro_step(toy, monkeypatch):
    """Bug: sent at each micro-step they are the same, and take as often the time of the network."""
    real, sent = runtime.sync_gradients, []
    monkeypatch.setattr(runtime, "sync_gradients", lambda model, now: sent.append(now) or real(model, now))
    train(replace(toy, max_steps=2, batch_size=2))
    assert sent == [False, False, False, True] * 2


SECOND = """
import json, os, sys
import torch
import faulthandler
import test_wiring, train
faulthandler.dump_traceback_later(200, exit=True)  # rather than wait for a rank that has failed
torch.set_num_threads(1)
for config, os.environ["MASTER_PORT"] in json.loads(sys.argv[1]):
    print("masks", json.dumps(test_wiring.random_states(lambda: train.train(train.TrainConfig(**config)))), flush=True)
os._exit(0)
"""


def random_states(function) -> list[int]:
    """The state of torch's random stream whenever a micro-batch enters the model, while function() runs."""
    states, real = [], GPT.forward

    def forward(self, *args, **kwargs):
        if self.training:
            states.append(zlib.crc32(torch.get_rng_state().numpy().tobytes()))
        return real(self, *args, **kwargs)

    GPT.forward = forward
    try:
        function()
    finally:
        GPT.forward = real
    return states


def test_two_processes_give_the_losses_of_one_and_drop_others(toy, monkeypatch):
    """Two gloo ranks, of which this process is one: same batches, same losses to rounding, one set of files. And bug:
    a dropout seed without the micro-step or the rank, which is the same mask for several parts of one batch."""
    plain = replace(toy, dropout=0.0, max_steps=25, batch_size=2, timeout=120.0)
    dropping = replace(plain, run_name="dropping", dropout=0.1, max_steps=3, eval_interval=0, sample_interval=0)
    one = replace(plain, run_name="one")
    train(one)
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
        ports = [str(s.getsockname()[1]) for s in (a, b)]  # the second run must not meet in the first one's place
    world = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    environment = os.environ | world | {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SECOND, json.dumps([(vars(plain), ports[0]), (vars(dropping), ports[1])])]
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT), str(ROOT / "tests")])
    second = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, value in (world | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": ports[0]}).items():
        monkeypatch.setenv(name, value)
    try:
        train(plain)
        monkeypatch.setenv("MASTER_PORT", ports[1])
        masks = random_states(lambda: train(dropping))
        output, _ = second.communicate(timeout=200)
    finally:
        second.kill()
    assert second.returncode == 0, output
    assert [row[4] for row in trace(plain)] == [row[4] for row in trace(one)], "same batches"
    assert losses(plain) == pytest.approx(losses(one), abs=1e-5)
    assert vals(plain) == pytest.approx(vals(one), abs=1e-5)
    assert "loss" not in output, "only one rank speaks"
    masks += json.loads(re.findall("^masks (.*)$", output, re.M)[1])
    assert len(masks) == len({*masks}) == 3 * 2 * 2, "steps x micro-steps x ranks"


# --- trackers


class Stub:
    """The part of wandb's and trackio's interface that is used; notes the calls, and fails where it is told to."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at
        self.Table, self.Settings = (lambda columns, data: [columns, *data]), dict

    def init(self, *args, **kwargs):
        self.calls.append(("init", args, kwargs))
        return self

    def login(self, prompt):
        return True

    def define_metric(self, *args, **kwargs):
        self.calls.append(("define_metric", args, kwargs))

    def log(self, values, step=None):
        self.calls.append(("log", values, step))
        if self.fails_at == len(self.rows()):
            raise ConnectionError("no such host")

    def finish(self):
        self.calls.append(("finish",))

    def rows(self):
        """The values of each row, its step among them."""
        return [c[1] | ({} if c[2] is None else {"step": c[2]}) for c in self.calls if c[0] == "log"]


@pytest.fixture
def stub(monkeypatch, toy):
    """stub(library, ...) puts a stand-in where the library is imported from."""

    def place(library, **how):
        stand_in = Stub(**how)
        monkeypatch.setitem(sys.modules, library, stand_in)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        return stand_in

    return place


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_gets_every_row_by_its_own_step(toy, stub, library):
    """wandb counts steps by itself and drops what comes with a lower one, as after a resume."""
    seen = stub(library)
    train(replace(toy, tracker=library, max_steps=4, eval_interval=2, sample_interval=4))
    if library == "wandb":
        assert ("define_metric", ("*",), {"step_metric": "step"}) in seen.calls
    assert [row["step"] for row in seen.rows() if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in seen.rows() if "val/loss" in row] == [0, 2, 4]
    assert [row["step"] for row in seen.rows() if "samples" in row] == [4]
    written = {row["step"]: row for row in read_rows(toy.run_dir / "metrics.jsonl") if row["kind"] == "train"}
    for row in seen.rows():
        if "train/loss" in row:
            own = written[row["step"]]
            assert row["train/loss"] == own["loss"] and row["train/lr"] == own["lr"] and row["tokens"] == own["tokens"]
    assert seen.calls[-1] == ("finish",)


@pytest.mark.parametrize("library", ["wandb", "trackio"])
@pytest.mark.parametrize(
    "flags, project, name",
    [({}, "gpt", "toy"), (dict(wandb_project="thesis", wandb_run_name="third"), "thesis", "third")],
)
def test_a_tracker_is_given_project_name_and_flags(toy, stub, library, flags, project, name):
    seen = stub(library)
    train(replace(toy, tracker=library, max_steps=1, lr=4e-3, **flags))
    [[_, args, kwargs]] = [call for call in seen.calls if call[0] == "init"]
    given = dict(zip(("project", "name"), args)) | kwargs
    assert (given["project"], given["config"]["lr"]) == (project, 4e-3)
    assert given["name"].split()[0] == name  # trackio's name ends with what tells runs of one name apart


@pytest.mark.parametrize("library", ["wandb", "trackio"])
@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_tracker_that_fails_in_the_midst_costs_one_warning(toy, stub, capsys, library, fails_at):
    """Bugs: the failing row swallowed without a word; a warning for each row that follows; a run that stops."""
    seen = stub(library, fails_at=fails_at)
    train(replace(toy, tracker=library, max_steps=5))
    assert len(seen.rows()) == fails_at
    said = capsys.readouterr().err
    assert said.count(f"warning: {library} is off for the rest of this run (ConnectionError: no such host)") == 1, said
    train(replace(toy, run_name="without", max_steps=5))
    assert trace(toy) == trace(replace(toy, run_name="without"))


# --- what the terminal shows


def test_plain_lines_of_progress(toy, capsys):
    """Where the output is a file or a scheduler's log: the first step, the last, and now and then one between."""
    train(replace(toy, max_steps=30))
    lines = re.findall(r"^step +(\d+)/30  (.*)  left (\d+:\d\d)$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _, _ in lines][:: len(lines) - 1] == [1, 30] and len(lines) < 30
    row = [row for row in read_rows(toy.run_dir / "metrics.jsonl") if row["kind"] == "train"][-1]
    assert lines[-1][1].startswith(f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}")
    assert re.search(r"  [\d,]+ tok/s$", lines[-1][1]) and lines[-1][2] == "0:00"


def test_the_time_left_is_that_of_the_steps_left(monkeypatch, capsys):
    """Of this session's own steps: a run that is continued has not made the earlier ones in no time."""
    times = iter([100.0, 120.0, 120.0, 120.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(times))
    tracking.Progress(10, 50).show(20, "text")
    assert capsys.readouterr().out == "step 20/50  text  left 1:00\n"
    assert [tracking.duration(s) for s in (0, 59.9, 61, 3600, 36_062)] == [
        "0:00",
        "0:59",
        "1:01",
        "1:00:00",
        "10:01:02",
    ]


def test_a_bar_on_a_terminal_and_only_there_where_plain_lines_are_off(monkeypatch, capsys):
    """Bugs: a bar of control characters in a scheduler's log; a bar that says steps where it counts examples."""
    for total in (3, 300):
        bar = tracking.Progress(0, total, unit="example", plain=False)
        bar.show(3, "text"), bar.close()
    assert capsys.readouterr() == ("", "")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = tracking.Progress(1, 3, unit="example", plain=False)
    bar.show(2, "3 MB"), bar.show(2, "4 MB")
    assert "4 MB" in terminal.getvalue(), "a piece of an hour shows nothing new"
    bar.show(3, "text"), bar.close()
    assert "3/3" in terminal.getvalue() and "example" in terminal.getvalue() and "text" in terminal.getvalue()


def test_speed_counts_every_device(toy):
    """MFU of two devices against the peak of one would be twice what it is."""
    two = types.SimpleNamespace(world=2, is_main=True, peak_flops=lambda: 1e6)
    assert math.isfinite(tracking.perplexity(1e5)), "a run that diverges ended in OverflowError"
    assert tracking.Log(toy, two, {"flops_per_token": 10}).speed(1000, 2.0) == (500, 500 * 10 / 2e6)
