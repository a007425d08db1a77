"""The line of steps of a run: whatever it goes back to, starts from or finds damaged, no good checkpoint is lost and
the newest is the one last trained."""

import contextlib
import functools
import itertools
import json
import os
import random
import re
import shutil
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train as train_module
from support import tracking
from support.cli import UserError
from support.files import read_json
from support.tracking import read_rows
from toy import eventually, trace, vals
from train import train


def names(run_dir, pattern="step_*"):
    return sorted(p.name for p in Path(run_dir).glob(pattern))


def flip(path):
    """Changes one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def short(toy):
    """Steps 4, 8, 12 and so on are saved and validated; nothing else is done."""
    return replace(toy, max_steps=8, save_interval=4, eval_interval=4, sample_interval=0, val_tokens=64, keep_last=3)


# --- a checkpoint of that step is there already


def test_a_damaged_step_is_trained_and_saved_again(short, capsys):
    """Bug: at the step of the damaged checkpoint the save deleted the new one and the old one, and the run ended."""
    short = replace(short, lr=1e-3, min_lr=1e-3, warmup_frac=0.0)  # the same rate however many steps there are
    train(short)
    whole = replace(short, run_name="whole", max_steps=12)
    train(whole)
    flip(short.run_dir / "step_00000008" / checkpoint.MODEL)
    capsys.readouterr()
    assert train(replace(short, max_steps=12))["step"] == 12
    said = capsys.readouterr().err
    assert "set aside: step_00000008 (now aside_step_00000008)" in said and "goes on from step 4" in said
    assert names(short.run_dir) == ["step_00000004", "step_00000008", "step_00000012"]
    for path in checkpoint.steps(short.run_dir):
        checkpoint.verify(path)
    assert trace(replace(short, max_steps=12)) == trace(whole)


def test_saving_a_step_twice_keeps_one_good_copy(tmp_path, byte_tokenizer):
    """Bug: the directory that was being written and the one that was being removed had one name."""
    from test_checkpoint import build, one_step, save

    model, optimizer = build()
    for _ in range(2):
        one_step(model, optimizer)
        path = save(tmp_path, 7, model, optimizer, {"step": 7}, byte_tokenizer)
    checkpoint.verify(path)
    loaded, _ = checkpoint.load_model(tmp_path)
    assert torch.equal(loaded.wte.weight, model.wte.weight), "the later one"
    assert names(tmp_path, "*step_*") == ["step_00000007"]


def test_a_save_that_fails_at_its_last_rename_keeps_the_copy_that_was_there(tmp_path, monkeypatch, byte_tokenizer):
    """Bug: what is moved away for the new copy is gone if that copy never comes."""
    from test_checkpoint import build, save

    model, optimizer = build()
    path = save(tmp_path, 7, model, optimizer, {"step": 7}, byte_tokenizer)
    rename = os.rename

    def full(source, target):
        if Path(target) == path and Path(source).name.startswith(checkpoint.LEFTOVER):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 7, model, optimizer, {"step": 7}, byte_tokenizer)
    checkpoint.verify(path)
    assert names(tmp_path, "*step_*") == ["step_00000007"]


def test_going_back_sets_the_later_steps_aside(short, capsys):
    """Bug: the void steps stayed, the new ones were rotated away, and the next start went on at the void ones."""
    long = replace(short, max_steps=20, keep_last=5)
    train(long)
    void = checkpoint.sha256(short.run_dir / "step_00000020" / checkpoint.MODEL)
    back = replace(long, resume=str(short.run_dir / "step_00000012"), lr=1e-3, keep_last=2, max_steps=16)
    capsys.readouterr()
    train(back)
    said = [line for line in capsys.readouterr().err.splitlines() if "set aside" in line]
    assert len(said) == 1 and all(f"step_000000{n} (now aside_step_000000{n})" in said[0] for n in (16, 20))
    assert names(short.run_dir)[-1] == "step_00000016" and "step_00000012" in names(short.run_dir)
    assert checkpoint.sha256(short.run_dir / "aside_step_00000020" / checkpoint.MODEL) == void
    assert read_json(short.run_dir / "latest.json")["checkpoint"] == "step_00000016"
    assert (short.run_dir / read_json(short.run_dir / "best.json")["checkpoint"]).is_dir()
    assert [row["step"] for row in read_rows(short.run_dir / "metrics.jsonl") if row["kind"] == "train"][-1] == 16
    on = replace(back, resume="auto", max_steps=24)
    train(on)  # a plain start goes on along the new line
    assert "continued at step 16" in capsys.readouterr().out
    assert not names(short.run_dir, "aside_*"), "the new line has passed them with keep_last checkpoints"


def test_hints_name_no_step_that_was_set_aside(short):
    """best.json is what RUN/best opens: it must not name a checkpoint of the void steps."""
    train(replace(short, eval_interval=8))  # step 4 is saved and not validated, so step 8 is the best
    assert read_json(short.run_dir / "best.json")["step"] == 8
    back = replace(short, eval_interval=0, max_steps=5, resume=str(short.run_dir / "step_00000004"))
    train(back)
    assert not (short.run_dir / "best.json").exists()
    assert read_json(short.run_dir / "latest.json")["step"] == 5


def test_the_same_command_again_continues_what_it_began(short, capsys):
    """A scheduler repeats commands: going back each time anew, a run would never get on."""
    train(replace(short, max_steps=16))
    back = replace(short, resume=str(short.run_dir / "step_00000008"), lr=1e-3, max_steps=16)
    real, steps = train_module.train_step, []

    def dying_step(c, rt, net, batch, at):
        steps.append(at.step)
        if at.step == 14 and steps.count(14) == 1:
            raise KeyboardInterrupt
        return real(c, rt, net, batch, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(back)
        shutil.rmtree(short.run_dir / "step_00000008")  # as rotation may have done
        train(back)
    assert steps == [*range(8, 15), *range(12, 16)]
    assert "this same command and goes on from step_00000012" in capsys.readouterr().err
    train(replace(back, lr=2e-3, resume=str(short.run_dir / "step_00000012")))  # but another one goes back again
    assert names(short.run_dir, "aside_*") == [f"aside_step_000000{n}" for n in ("12", "16", "16_2")]


def test_a_run_that_began_elsewhere_continues_its_own(short, capsys):
    """Bug: --resume OLD given again began at OLD again, and met its own checkpoints."""
    train(short)
    new = replace(short, run_name="new", resume=str(short.run_dir / "step_00000004"), max_steps=12)
    real, steps = train_module.train_step, []

    def dying_step(c, rt, net, batch, at):
        steps.append(at.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(c, rt, net, batch, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(new)
        shutil.rmtree(short.run_dir)  # it is not needed again
        train(new)
    assert steps == [*range(4, 10), *range(8, 12)]
    assert "has checkpoints of its own and goes on from step_00000008" in capsys.readouterr().err
    assert names(new.run_dir) == ["step_00000004", "step_00000008", "step_00000012"]


def test_a_start_from_another_run_keeps_no_row_of_an_earlier_attempt(short):
    """Rows of steps that this run has no checkpoint of are of another line: their loss would choose the best."""
    train(short)
    new = replace(short, run_name="new", resume=str(short.run_dir / "step_00000004"))
    new.run_dir.mkdir()
    rows = [{"kind": kind, "step": 4, "tokens": 1, "seconds": 0.0, "loss": 0.01} for kind in ("train", "val")]
    (new.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(new)
    assert vals(new)[4] == vals(short)[4]
    assert [row["step"] for row in read_rows(new.run_dir / "metrics.jsonl") if row["kind"] == "train"] == [5, 6, 7, 8]


def test_a_checkpoint_that_cannot_be_continued_sets_nothing_aside(short):
    """A refused start must leave the run as it was."""
    train(short)
    older = str(short.run_dir / "step_00000004")
    with pytest.raises(UserError, match="seed"):
        train(replace(short, resume=older, seed=7))
    flip(Path(older) / checkpoint.MODEL)
    with pytest.raises(UserError, match="sha256 differs"):
        train(replace(short, resume=older))
    assert names(short.run_dir, "*step_*") == ["step_00000004", "step_00000008"]


def test_what_was_set_aside_continues_as_a_new_run(short):
    """Bug: continued in its own run, it would stand among steps of the other line, and be rotated away as void."""
    train(replace(short, max_steps=12))
    train(replace(short, max_steps=8, lr=1e-3, resume=str(short.run_dir / "step_00000004")))
    aside, before = short.run_dir / "aside_step_00000012", names(short.run_dir, "*step_*")
    with pytest.raises(UserError, match=r"not in the line of steps.*new --run_name"):
        train(replace(short, max_steps=16, resume=str(aside)))
    assert names(short.run_dir, "*step_*") == before
    assert train(replace(short, run_name="new", max_steps=16, resume=str(aside)))["step"] == 16
    assert [row[0] for row in trace(replace(short, run_name="new"))] == [13, 14, 15, 16]


def test_names_of_what_is_set_aside_are_no_steps(tmp_path, capsys):
    """A name that looks like a step would be resumed, counted by rotation, or verified as one."""
    for _ in range(3):
        (tmp_path / "step_00000009").mkdir()
        (tmp_path / "step_00000009" / "x").touch()
        checkpoint.cut_line(tmp_path, 4)
    assert not checkpoint.steps(tmp_path)
    assert sorted(checkpoint.those_aside(tmp_path)) == [
        (tmp_path / f"aside_step_00000009{suffix}", 9) for suffix in ("", "_2", "_3")
    ]


# --- the best, the newest, and the order of events


def test_best_is_the_lowest_loss_not_the_latest_and_rotation_keeps_it(short, monkeypatch):
    """Bugs: best.json follows the newest validation; the best checkpoint is rotated away."""
    losses = iter([9.0, 3.0, 2.0, 4.0, 5.0, 6.0])

    def validate(*args):
        loss = next(losses)
        return {"loss": loss, "perplexity": 1.0, "bits_per_byte": None, "targets": 1}

    monkeypatch.setattr(train_module, "validate", validate)
    train(replace(short, max_steps=20, keep_last=1))
    best = read_json(short.run_dir / "best.json")
    assert (best["step"], best["checkpoint"], best["loss"]) == (8, "step_00000008", 2.0)
    assert names(short.run_dir) == ["step_00000008", "step_00000020"]
    assert checkpoint.find_checkpoint(short.run_dir / "best").name == "step_00000008"


def test_best_is_named_when_it_is_validated(short, monkeypatch):
    """Bugs: only the next save names it, 2,000 steps later; or no later start, where a kill came between."""
    real, named, saved = train_module.validate, {}, iter([".", "step_00000004", "step_00000008"])

    def validate(*args):
        there = short.run_dir / next(saved)
        assert eventually(there.exists)  # a thread writes it
        return real(*args)

    def step(c, rt, net, batch, at):
        if (c.run_dir / "best.json").exists():
            named[at.step] = read_json(c.run_dir / "best.json")["step"]
        return real_step(c, rt, net, batch, at)

    real_step = train_module.train_step
    monkeypatch.setattr(train_module, "validate", validate)
    monkeypatch.setattr(train_module, "train_step", step)
    train(short)
    assert named == {4: 4, 5: 4, 6: 4, 7: 4}
    (short.run_dir / "best.json").unlink()
    train(short)
    assert read_json(short.run_dir / "best.json")["step"] == 8


def test_newest_is_by_step_not_by_time(short):
    """A copied or restored run has times in any order."""
    train(replace(short, max_steps=12))
    for i, path in enumerate(checkpoint.steps(short.run_dir)):
        os.utime(path, (1e9 + i, 1e9 + i))  # the newest step has the oldest time
    assert checkpoint.newest(short.run_dir).name == "step_00000012"
    checkpoint.remove_old(short.run_dir, 1)
    assert names(short.run_dir) == ["step_00000012"]


def test_a_checkpoint_is_flushed_before_its_name_appears(short, monkeypatch):
    """Bug: a name that appears before its bytes are on the disk; after a power cut the newest checkpoint is empty."""
    events, fsync, rename, replaced = [], os.fsync, os.rename, os.replace

    def target_of(fd):
        return Path(os.readlink(f"/proc/self/fd/{fd}"))

    def record_fsync(fd):
        fsync(fd)
        events.append(("flushed", target_of(fd)))

    def record_rename(source, target):
        rename(source, target)
        events.append(("renamed", Path(target)))

    def record_replace(source, target):
        replaced(source, target)
        events.append(("written", Path(target)))  # by write_whole, which flushes: test_manifest_is_written_last

    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux tells a descriptor's file")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    train(replace(short, max_steps=4))
    run_dir = short.run_dir.resolve()
    hidden, final = run_dir / f"{checkpoint.LEFTOVER}step_00000004", run_dir / "step_00000004"
    events = [(what, path.resolve()) for what, path in events]
    appears = events.index(("renamed", final))
    on_disk = {path: i for i, (what, path) in enumerate(events[:appears]) if what in ("flushed", "written")}
    written = [hidden / p.name for p in final.iterdir()]
    assert len(written) >= 6 and not [p.name for p in written if p not in on_disk], "a file is not flushed"
    assert max(written, key=on_disk.get).name == checkpoint.MANIFEST, "the manifest is not the last"
    manifest = on_disk[hidden / checkpoint.MANIFEST]
    assert ("flushed", hidden) in events[manifest:appears], "the names in the directory are not flushed"
    first = min(on_disk[p] for p in written)
    assert ("flushed", run_dir / "metrics.jsonl") in events[:first], "the rows do not come first"
    assert events[appears + 1] == ("flushed", run_dir), "the checkpoint's own name is not flushed"


def test_a_snapshot_shares_no_memory_with_the_weights():
    """Bug: on a CPU the checkpoint that is written behind the next steps holds the weights of those."""
    from test_checkpoint import build, one_step

    model, optimizer = build()
    one_step(model, optimizer)
    taken = checkpoint.snapshot(model, optimizer)
    before = {name: {k: t.clone() for k, t in content.items()} for name, content in taken.items()}
    with torch.no_grad():
        for t in [*model.state_dict().values(), *checkpoint.optimizer_tensors(model, optimizer).values()]:
            t.add_(1)
    for name, content in taken.items():
        assert content and all(torch.equal(t, before[name][k]) for k, t in content.items())


@pytest.mark.skipif(os.name != "posix", reason="no permissions")
def test_a_checkpoint_that_cannot_be_deleted_stops_nothing(short, monkeypatch):
    """Bug: of a protected checkpoint (chmod -w) its rotation ended the run, and every later start."""
    remove = os.unlink

    def refused(path, *args, **how):  # as for a user who is not root, in a folder without the right to write
        if path == checkpoint.MODEL and "dir_fd" in how:
            raise PermissionError(13, "Permission denied", path)
        remove(path, *args, **how)

    monkeypatch.setattr(os, "unlink", refused)
    assert train(replace(short, max_steps=12, keep_last=1))["step"] == 12
    assert names(short.run_dir)[-1] == "step_00000012" and names(short.run_dir, ".unfinished_*")
    assert train(replace(short, max_steps=16, keep_last=1))["step"] == 16
    for n in range(2):  # the same step again, beside what was left of the first
        shutil.copytree(short.run_dir / "step_00000016", short.run_dir / "step_00000004")
        checkpoint.remove(short.run_dir / "step_00000004")
        assert not (short.run_dir / "step_00000004").exists(), n


# --- room for a checkpoint


def test_a_disk_without_room_is_refused_before_the_first_step(short, monkeypatch):
    """Bug: hours of training, and the first save says that there never was room."""
    train(replace(short, run_name="before", max_steps=4))
    tensors = [checkpoint.MODEL, checkpoint.OPTIMIZER]
    size = sum((short.run_dir.with_name("before") / "step_00000004" / name).stat().st_size for name in tensors)
    usage, free = shutil.disk_usage, 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))
    with pytest.raises(UserError, match="are free"):
        train(replace(short, optimizer="muon"))
    once = replace(short, save_interval=0)
    many = replace(short, save_interval=1, keep_last=2)  # the newest two, the best, and the one that is being written
    for config, checkpoints in (once, 1), (many, 4):
        with pytest.raises(UserError, match=rf"need about ([\d,]+) bytes and {free:,} are free") as refused:
            train(config)
        need = int(re.search(r"about ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
        assert need == pytest.approx(checkpoints * size, rel=0.1)
        assert not trace(config) and not names(config.run_dir)
        free = 3 * size  # bug: one fits, and the run ended in the night, when the fourth did not
    train(once)
    free = 1.5 * size  # bug: what a run has on the disk already counted as still to come, and it could not go on
    train(replace(many, run_name="before", save_interval=4, keep_last=1, max_steps=5))
    real, free = usage, 0
    usage = lambda path: real(path)._replace(total=0)  # noqa: E731 (some network file systems say 0 of 0)
    train(replace(short, run_name="network"))


# --- any sequence of what happens to a run

SEQUENCES = 150


class Killed(BaseException):
    """The process is gone: nothing may catch this."""


class World:
    """Two runs on one disk, trained by the real `train` with a step that only leaves a mark in the weights: `tag`,
    which no other step of any session leaves. What is on the disk is compared with what was trained."""

    CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")  # of os: each is a moment to be killed at

    def __init__(self, config, monkeypatch, capsys, rng):
        self.rng, self.capsys, self.sessions = rng, capsys, 0
        self.story = []  # what happened, for the message of a failure
        changes = dict(keep_last=rng.randint(1, 3), save_interval=rng.randint(1, 3), eval_interval=rng.randint(1, 3))
        self.config = replace(config, **changes)
        self.lines = {"a": {}, "b": {}}  # of each run, the tag that was trained last at each step
        self.last_command = {}
        data = train_module.open_data(config, train_module.runtime.start("cpu", "float32"))
        monkeypatch.setattr(train_module, "open_data", lambda c, rt: data)
        batches = contextlib.nullcontext(itertools.repeat(None))
        monkeypatch.setattr(train_module, "FineWebBatchIterator", lambda *args: batches)
        monkeypatch.setattr(train_module, "train_step", self.step)
        monkeypatch.setattr(train_module, "validate", self.validate)
        monkeypatch.setattr(tracking, "record_of_run", lambda *args: {})
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.mortal(getattr(os, name), name == "fsync"))
        monkeypatch.setattr(checkpoint, "save_file", self.mortal(checkpoint.save_file))
        monkeypatch.setattr(checkpoint, "write_checkpoint", self.recorded(checkpoint.write_checkpoint))
        self.calls_left = None

    def mortal(self, real, skip=False):
        def call(*args, **options):
            if self.calls_left is not None:
                self.calls_left -= 1
                if self.calls_left < 0:
                    raise Killed
            return None if skip else real(*args, **options)

        return call

    def recorded(self, real):
        def save(run_dir, step, config, tensors, *rest):
            path = real(run_dir, step, config, tensors, *rest)
            self.saved.append((step, tag_of(tensors[checkpoint.MODEL])))
            return path

        return save

    def step(self, c, rt, net, batch, at):
        if self.calls_left is not None and self.calls_left < 0:
            raise Killed
        weight = net.model.state_dict()["ln_f.weight"]
        if self.began is None:
            self.began = (at.step, tag_of(net.model.state_dict()))
        self.next_tag += 1
        weight[0] = self.next_tag
        self.trained[at.step + 1] = self.next_tag
        at = checkpoint.Position(at.step + 1, at.samples_seen + c.global_batch, at.seconds)
        row = {"loss": 1.0, "lr": c.lr, "grad_norm": 1.0, "checksum": 0}
        return at, types.SimpleNamespace(at=at, read=lambda: (row, False))

    def validate(self, *args):
        return {"loss": self.rng.random(), "perplexity": 1.0, "bits_per_byte": None, "targets": 1}

    next_tag = 1  # a norm's weight at the start, the tag of no step

    def run_dir(self, name):
        return replace(self.config, run_name=name).run_dir

    def good(self, name) -> dict[int, int]:
        """The tag of each step of a run's line that is on the disk and whole."""
        return {step: tag for path in checkpoint.steps(self.run_dir(name)) for step, tag in read_whole(path)}

    def kept(self, name) -> set[tuple[int, int]]:
        aside = [path for path, _ in checkpoint.those_aside(self.run_dir(name))]
        return {*self.good(name).items(), *(found for path in aside for found in read_whole(path))}

    def expected_start(self, c, name):
        """(step, tag) where a session has to begin, and whether that is in the run itself."""
        own = self.good(name)
        newest = max(own, default=None)
        if c.resume == "auto" or (newest is not None and Path(c.resume).parent != c.run_dir):
            return (newest, own[newest], True) if own else (0, 1, False)
        if newest is not None:
            saved_by = read_json(c.run_dir / checkpoint.name_of(newest) / checkpoint.STATE)["config"]
            again = saved_by == json.loads(json.dumps(vars(c)))
            step = newest if again else checkpoint.step_of(Path(c.resume))
            return step, own[step], True
        [(step, tag)] = read_whole(Path(c.resume))
        return step, tag, False

    def session(self, name, kill_at=None, **changes):
        """One start of train.py, perhaps killed, and everything that has to hold after it."""
        c = replace(self.config, run_name=name, **changes)
        self.last_command[name] = changes
        self.story.append((name, kill_at, changes))
        before, bad = self.kept(name), {p.name for p in checkpoint.steps(c.run_dir) if not read_whole(p)}
        own = self.good(name)
        start, tag, inside = self.expected_start(c, name)
        self.began, self.trained, self.saved, self.calls_left = None, {}, [], kill_at
        self.capsys.readouterr()
        try:
            result = train(c)
        except Killed:
            result = None
        self.calls_left = None
        out, err = self.capsys.readouterr()
        if self.began is not None:
            assert self.began == (start, tag), "it began elsewhere"
            line = {k: v for k, v in self.lines[name].items() if k <= start} if inside else {start: tag}
            self.lines[name] = line | self.trained
        elif result is not None and inside:
            self.lines[name] = {k: v for k, v in self.lines[name].items() if k <= start}
        elif not inside and self.good(name):
            self.lines[name] = {start: tag}
        self.check_disk(name, c, before, start, inside, result)
        self.check_words(c, out, err, own, bad, start, inside, result)

    def check_disk(self, name, c, before, start, inside, result):
        good, kept, line = self.good(name), self.kept(name), self.lines[name]
        for found in [*before, *self.saved]:
            passed = sum(step >= found[0] for step in good)
            assert found in kept or passed >= c.keep_last, f"step {found} is lost: {sorted(kept)}"
        if self.trained or result is not None:
            assert all(line[step] == tag for step, tag in good.items()), "a void step is in the line"
            newest = max([*(step for step, _ in self.saved), start if inside else 0])
            assert max(good, default=0) >= newest, "the newest is not the one last saved"
        if result is not None:
            assert result["step"] == max(start, c.max_steps)
        if result is not None and good:  # none: it was at its last step where it began, in another run
            assert max(good) == result["step"], "the newest is not the one last trained"
            assert read_json(c.run_dir / "latest.json")["step"] == max(good)
            assert not list(c.run_dir.glob(f"{checkpoint.LEFTOVER}*"))
            losses = {step: loss for step, loss in vals(c).items() if step in good}
            if losses:
                assert read_json(c.run_dir / "best.json")["step"] == min(losses, key=losses.get)

    def check_words(self, c, out, err, own, bad, start, inside, result):
        for word in re.findall(r"continued at step (\d+)", out):
            assert int(word) == start
        assert "from the beginning" not in out or start == 0
        for path in re.findall(r"checkpoint skipped: (\S+)/", err):
            assert Path(path).name in bad, "what was skipped was good"
        for step in re.findall(r"goes on from step_(\d+)", err):
            assert int(step) == start and inside
        moved = re.findall(r"(step_\d+) \(now (aside_\w+)\)", err)
        void = {checkpoint.name_of(step) for step in own if step > start} | {
            n for n in bad if int(n.removeprefix("step_")) > start
        }
        if result is not None:
            assert {name for name, _ in moved} == (void if inside else set())
            assert all(int(step) == start for step in re.findall(r"training goes on from step (\d+)", err))
            assert "already at step" not in out or (not self.trained and c.max_steps <= start)
        assert err.count("\n") == len(re.findall("^checkpoint ", err, re.M)), err

    def still_possible(self, name):
        """Whether the last command can be given again: what it resumes is there, or is no longer needed."""
        if name not in self.last_command:
            return False
        c = replace(self.config, run_name=name, **self.last_command[name])
        own, there = self.good(name), Path(c.resume)
        if c.resume == "auto" or read_whole(there) or (own and there.parent != c.run_dir):
            return True
        state = c.run_dir / checkpoint.name_of(max(own, default=0)) / checkpoint.STATE
        return bool(own) and read_json(state)["config"] == json.loads(json.dumps(vars(c)))

    def something(self):
        """One thing that happens to one of the runs."""
        rng, name = self.rng, self.rng.choice("ab")
        other = "b" if name == "a" else "a"
        own, theirs = self.good(name), self.good(other)
        newest = max(own, default=0)
        further = dict(max_steps=newest + rng.randint(1, 5), lr=rng.random())
        kill_at = rng.randint(0, 90) if rng.random() < 0.5 else None
        what = rng.choice(["on", "damage", "back", "back", "other", "steps", "again"])
        if what == "damage" and len(own) > 1:
            path = checkpoint.steps(self.run_dir(name))[0]
            if read_whole(path):
                self.story.append((name, f"damage {path.name}"))
                flip(path / rng.choice([checkpoint.MODEL, checkpoint.STATE, checkpoint.CONFIG, checkpoint.MANIFEST]))
                read_unchanged.cache_clear()
        elif what == "back" and own:
            further["max_steps"] = rng.choice([newest, newest + 2, max(1, newest - 3)])
            self.session(
                name, kill_at, resume=str(self.run_dir(name) / checkpoint.name_of(rng.choice([*own]))), **further
            )
        elif what == "other" and theirs:
            there = self.run_dir(other) / checkpoint.name_of(rng.choice([*theirs]))
            self.session(name, kill_at, resume=str(there), **further)
        elif what == "steps":
            self.session(name, kill_at, max_steps=rng.randint(1, 25))
        elif what == "again" and self.still_possible(name):
            self.session(name, kill_at, **self.last_command[name])
        else:
            self.session(name, kill_at, **further)


def tag_of(tensors) -> int:
    return int(tensors["ln_f.weight"][0])


def read_whole(path) -> list[tuple[int, int]]:
    """[(step, tag)] of a checkpoint that verifies, else []."""
    if not path.is_dir():
        return []
    facts = sorted((f.name, f.inode(), f.stat().st_mtime_ns, f.stat().st_size) for f in os.scandir(path))
    return read_unchanged(path, tuple(facts))


@functools.lru_cache  # speed: each is looked at ten times before anything happens to it
def read_unchanged(path, facts):
    try:
        checkpoint.verify(path)
    except UserError:
        return []
    return [(read_json(path / checkpoint.STATE)["step"], tag_of(load_file(path / checkpoint.MODEL)))]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_sequence_leaves_the_newest_last_trained_and_nothing_lost(toy, tmp_path, capsys, tally):
    """Train on, be killed, damage the newest, go back, start from another run, change max_steps, repeat a command."""
    small = dict(block_size=8, n_layer=1, n_head=1, n_embd=8, batch_size=2, total_batch_tokens=16, sample_interval=0)
    for seed in range(SEQUENCES):
        config = replace(toy, **small, checkpoint_dir=str(tmp_path / str(seed)))
        with pytest.MonkeyPatch.context() as patch:
            world = World(config, patch, capsys, random.Random(seed))
            for _ in range(8):
                try:
                    world.something()
                except BaseException as error:
                    error.add_note(f"sequence {seed}: {world.story}")
                    raise
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    tally("sequences of saves, kills and damage", SEQUENCES)
