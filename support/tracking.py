"""What a run tells: metrics.jsonl, the terminal, and Weights & Biases or trackio where they are asked for.

metrics.jsonl is the source of truth: one JSON object a line. Rows after the checkpoint that is resumed are cut
off, so every step has one row. The terminal and the trackers are views of these rows; none of them can stop a run.
"""

import json
import math
import os
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from support.cli import UserError
from support.files import sync, write_json, write_whole
from support.runtime import git_commit, versions

AXES = {"tokens", "seconds"}  # what curves can be drawn against, besides the step
NO_CURVES = {"kind", "step", "checksum", "samples_seen", "targets", "examples"}
PLAIN_SECONDS = 10  # between progress lines where the output is not a terminal


class Log:
    """Tells what a run does: rows to metrics.jsonl and a tracker, lines to the terminal, a summary at the end.

    c is the run's configuration; facts are `train.facts`. As a context it closes what `open` and `begin` opened."""

    def __init__(self, c, rt, facts):
        self.c, self.rt, self.facts = c, rt, facts
        self.metrics = self.progress = self.tracker = None

    def open(self, at, anew=False):
        """Cuts metrics.jsonl at the position `at`, where the run goes on; `anew`: no row there is of its steps."""
        last = -1 if anew else at.step
        self.metrics = Metrics(self.c.run_dir / "metrics.jsonl", last, writes=self.rt.is_main)
        self.progress = Progress(at.step, self.c.max_steps, self.rt.is_main)
        self.seconds = at.seconds

    def begin(self, at, changed):
        """Writes run.json, prints what is trained on what, and starts the tracker. changed: flags, as text."""
        if not self.rt.is_main:
            return
        c, facts = self.c, self.facts
        write_json(c.run_dir / "run.json", record_of_run(c, self.rt, facts))
        introduce(c, self.rt, facts, at, changed)
        library = "wandb" if c.tracker == "off" and c.wandb_project else c.tracker
        if library != "off":
            self.tracker = Tracker(library, c.wandb_project or "gpt", c.wandb_run_name, c.run_dir, asdict(c))

    def due(self, kind, at) -> bool:
        """Whether an evaluation falls on this step and has not been made yet, perhaps before a restart."""
        c = self.c
        interval = {"val": c.eval_interval, "hellaswag": c.hellaswag_interval, "sample": c.sample_interval}[kind]
        scheduled = interval > 0 and (at.step % interval == 0 or at.step == c.max_steps)
        return scheduled and (kind, at.step) not in self.metrics.done and (at.step > 0 or kind == "val")

    def finished(self, at) -> bool:
        """Whether nothing is left to do."""
        return at.step >= self.c.max_steps and not self.anything_due(at)

    def anything_due(self, at) -> bool:
        return any(self.due(kind, at) for kind in ("val", "hellaswag", "sample"))

    def say(self, text):
        self.progress.say(text)

    def row(self, kind, at, **values) -> dict:
        tokens = at.samples_seen * self.c.block_size
        row = self.metrics.log(kind, at.step, tokens=tokens, seconds=round(at.seconds, 3), **values)
        if self.tracker:
            self.tracker.log(row)
        return row

    def train(self, values, at):
        """One optimizer step: its loss, lr, grad_norm and checksum; speed and memory are added here."""
        elapsed, self.seconds = at.seconds - self.seconds, at.seconds
        rate, mfu = self.speed(self.c.total_batch_tokens, elapsed)
        epoch = round(at.samples_seen / self.facts["n_windows"], 4)
        self.row("train", at, **values, samples_seen=at.samples_seen, epoch=epoch, tokens_per_second=round(rate),
                 mfu=mfu and round(mfu, 4), memory=self.rt.memory())  # fmt: skip
        norm = "skipped" if values.get("skipped") else f"norm {values['grad_norm']:.2f}"
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {norm}  {rate:,.0f} tok/s"
        self.progress.update(at.step, text + (f"  MFU {mfu:.1%}" if mfu else ""))

    def val(self, values, at):
        self.row("val", at, **values)
        self.say(f"step {at.step}: validation {validation_in_words(values)}")

    def hellaswag(self, values, at):
        self.row("hellaswag", at, **values)
        self.say(f"step {at.step}: HellaSwag {hellaswag_in_words(values)}")

    def sample(self, text, at):
        self.row("sample", at, prompt=self.c.sample_prompt, text=text)
        self.say(f"step {at.step}: sample: {self.c.sample_prompt}{text}\n")

    def speed(self, tokens, seconds):
        """(tokens per second, share of the devices' peak FLOP/s or None where the peak is not known)."""
        rate, peak = tokens / max(seconds, 1e-9), self.rt.peak_flops()
        return rate, rate * self.facts["flops_per_token"] / (peak * self.rt.world) if peak else None

    def summary(self, at, stopped_by=0) -> dict:
        """Prints the summary of all sessions and returns it. stopped_by: the signal that ended this one early."""
        self.progress.close()
        loss = self.metrics.last_val()
        known = {"val_loss": loss, "perplexity": None if loss is None else perplexity(loss)}
        tokens = at.samples_seen * self.c.block_size
        if stopped_by:
            where = f"stopped after step {at.step}, saved in {self.c.run_dir}; run again to go on"
            self.say(f"signal {stopped_by}: {where}")
        elif self.rt.is_main:
            self.conclude(at, tokens, **known)
        return {"run_dir": str(self.c.run_dir), "signal": stopped_by, "step": at.step, "tokens": tokens, **known}

    def conclude(self, at, tokens, val_loss, perplexity):
        rate, mfu = self.speed(tokens, at.seconds)
        epochs = at.samples_seen / self.facts["n_windows"]
        print(f"\nfinished   step {at.step:,}: {tokens:,} tokens, {epochs:.2f} epochs,"
              f" {duration(at.seconds)} of training")  # fmt: skip
        print(f"speed      {rate:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else ""))
        if val_loss is not None:
            print(f"validation loss {val_loss:.4f}, perplexity {perplexity:.2f}")
        if "hellaswag" in self.metrics.last:
            print(f"HellaSwag  {hellaswag_in_words(self.metrics.last['hellaswag'])}")
        print(f"kept       {self.c.run_dir}: checkpoints, metrics.jsonl, curves.png")
        print(f"next       python inference.py --checkpoint {self.c.run_dir}", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for opened in (self.tracker, self.progress, self.metrics):
            if opened is not None:
                opened.close()


def introduce(c, rt, facts, at, changed):
    """Prints what is trained, on what, and where."""
    accumulation = c.total_batch_tokens // (c.batch_size * c.block_size * rt.world)
    tokens, there = c.max_steps * c.total_batch_tokens, facts["training_tokens"]
    print(f"model      {facts['parameters']:,} parameters, {facts['vocab_size']:,} token vocabulary")
    print(f"data       {there:,} tokens in {c.data_dir}; {tokens:,} to train on ({tokens / there:.2f} epochs)")
    print(f"step       {c.total_batch_tokens:,} tokens = {c.batch_size} x {c.block_size} x {accumulation} micro-steps"
          f" x {rt.world} device(s)")  # fmt: skip
    print(f"device     {rt.device}, {rt.dtype}{', compiled' if facts['compiled'] else ''}")
    print(f"run        {c.run_dir}, {f'continued at step {at.step}' if at.step else 'from the beginning'}", flush=True)
    if changed:
        print(f"changed    {', '.join(changed)}", flush=True)


def record_of_run(c, rt, facts) -> dict:
    """run.json: what a reader needs to repeat this run."""
    return {
        "config": asdict(c),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "versions": versions(),
        "device": str(rt.device),
        "dtype": rt.dtype,
        "world_size": rt.world,
        **{k: facts[k] for k in ("parameters", "training_tokens", "identity")},
    }


def perplexity(loss) -> float:
    return math.exp(min(loss, 700))  # beyond that a float overflows


def validation_in_words(row) -> str:
    bits = f", {row['bits_per_byte']:.4f} bits per byte" if row["bits_per_byte"] else ""
    return f"loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}{bits}"


def hellaswag_in_words(row) -> str:
    """The accuracies in percent."""
    known = {k: v for k, v in row.items() if k.endswith(("_acc", "_acc_norm")) and type(v) is float}
    shares = {k.replace("_", " ", 1): v for k, v in known.items()}
    return ", ".join(f"{name} {100 * share:.2f}" for name, share in shares.items()) + " percent"


class Metrics:
    """The rows of one run: {"kind": "train" | "val" | "hellaswag" | "sample", "step", "tokens", "seconds", ...}."""

    def __init__(self, path, step, writes=True):
        """Keeps the rows up to `step`; where it `writes` (one process does), the rest are cut off the file."""
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self.done = {(row["kind"], row["step"]) for row in rows}
        self.last = {row["kind"]: row for row in rows}  # by kind
        self.vals = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
        self.file = None
        if writes:
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def log(self, kind, step, **values) -> dict:
        row = {"kind": kind, "step": step, **values}
        self.done.add((kind, step))
        self.last[kind] = row
        if kind == "val":
            self.vals[step] = row["loss"]
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        return row

    def last_val(self) -> float | None:
        """The newest validation loss."""
        return self.vals[max(self.vals)] if self.vals else None

    def sync(self):
        """To the disk, before a checkpoint that relies on it."""
        if self.file:
            sync(self.file)

    def close(self):
        if self.file:
            self.file.close()


def read_rows(path):
    """The rows of a metrics.jsonl; a last line cut off by a crash is left out. UserError names any other bad one."""
    if not Path(path).exists():
        return
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                whole = type(row["kind"]) is str and type(row["step"]) is int
                if row["kind"] == "val":  # its loss decides which checkpoint is the best
                    whole = whole and type(row["loss"]) in (int, float) and not math.isnan(row["loss"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                whole = False
            if whole:
                yield row
            elif line.endswith(b"\n"):
                raise UserError(f"{path}, line {number}: not a row of metrics; mend that line or delete it")


class Tracker:
    """The rows shown by Weights & Biases, or by trackio's local dashboard, which needs no account and no network.

    Whatever goes wrong there costs one warning, not the run."""

    def __init__(self, library, project, name, run_dir, config):
        """library: "wandb" or "trackio"; a run continued from `run_dir` continues there too."""
        self.library, self.log_row, self.samples = library, None, []
        try:
            begin = {"wandb": begin_wandb, "trackio": begin_trackio}[library]
            self.log_row, self.table, self.finish = begin(project, name or Path(run_dir).name, Path(run_dir), config)
        except Exception as error:
            self.give_up(error)

    def log(self, row):
        if self.log_row is None:
            return
        values = {k if k in AXES else f"{row['kind']}/{k}": v for k, v in row.items() if k not in NO_CURVES}
        try:
            if row["kind"] == "sample":
                self.samples.append([row["step"], row["prompt"], row["text"]])
                values = {"samples": self.table(columns=["step", "prompt", "text"], data=self.samples.copy())}
            self.log_row(row["step"], {k: v for k, v in values.items() if v is not None})
        except Exception as error:
            self.give_up(error)

    def close(self):
        if self.log_row is not None:
            try:
                self.finish()
            except Exception as error:
                self.give_up(error)

    def give_up(self, error):
        self.log_row = None
        print(
            f"warning: {self.library} is off for the rest of this run ({type(error).__name__}: {error})",
            file=sys.stderr,
        )


def begin_wandb(project, name, run_dir, config):
    """(function of step and values, class of tables, function to end with) of a run at Weights & Biases."""
    import wandb  # here: optional, and slow to import

    mode = os.environ.get("WANDB_MODE") or ("online" if has_key(wandb) else "offline")
    if mode == "offline":
        print(f"wandb: offline; send it later with `wandb sync {run_dir}/wandb/offline-run-*`")
    run_id = kept_id(run_dir / "wandb_id.txt")
    place = dict(project=project, name=name, dir=str(run_dir), mode=mode, settings=wandb.Settings(init_timeout=30))
    run = wandb.init(config=config, id=run_id, resume="allow", **place)
    run.define_metric("*", step_metric="step")  # wandb's own step only grows and would drop resumed rows
    return lambda step, values: run.log({"step": step} | values), wandb.Table, run.finish


def kept_id(path) -> str:
    """The run's id at a tracker, made at its first start: a run of the same name in a new directory has another."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def has_key(wandb) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # it raises where there is none
        return False


def begin_trackio(project, name, run_dir, config):
    """The same of a run in trackio, which keeps it in a database of the user's (TRACKIO_DIR). It knows runs by name,
    so the name has the run's id in it."""
    import trackio

    name = f"{name} {kept_id(run_dir / 'trackio_id.txt')}"
    run = trackio.init(
        project, name, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    return lambda step, values: run.log(values, step), trackio.Table, trackio.finish


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds. The last step always shows."""

    def __init__(self, step, total, shown):
        self.total, self.shown, self.last = total, shown, -PLAIN_SECONDS
        self.first, self.began = step, time.monotonic()
        self.live, self.bar = shown and sys.stderr.isatty(), None

    def update(self, step, text):
        if self.live:
            if self.bar is None:  # not before the first step, so that nothing is printed into it
                self.bar = tqdm(total=self.total, initial=self.first, unit="step", dynamic_ncols=True, smoothing=0.05)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.shown and (time.monotonic() - self.last >= PLAIN_SECONDS or step == self.total):
            self.last = time.monotonic()
            left = (self.last - self.began) / max(1, step - self.first) * (self.total - step)
            print(f"step {step:>{len(str(self.total))}}/{self.total}  {text}  left {duration(left)}", flush=True)

    def say(self, text):
        if self.shown:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def duration(seconds) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
