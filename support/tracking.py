"""What a run tells: metrics.jsonl, the terminal, and Weights & Biases or trackio where they are asked for.

metrics.jsonl has one JSON object a line and is the source of truth: the terminal and the trackers show these rows, and
cannot stop a run. When a run resumes, the rows after its checkpoint are removed, so every step has one row.
"""

import importlib
import json
import math
import os
import secrets
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from support.cli import UserError
from support.files import sync, write_json, write_whole

AXES = {"tokens", "seconds"}  # what curves can be plotted against, besides the step
NO_CURVES = {"kind", "step", "checksum", "samples_seen", "targets", "examples"}
PLAIN_SECONDS = 10  # between progress lines where the output is not a terminal


class Log(AbstractContextManager):
    """Tells what a run does: rows to metrics.jsonl and a tracker, lines to the terminal, a summary at the end.

    c is the run's configuration, about what `train.describe_run` returns. As a context it closes what it opened."""

    def __init__(self, c, rt, about):
        self.c, self.rt, self.about = c, rt, about
        self.metrics = self.progress = self.tracker = None

    def open(self, at, anew=False):
        """Opens metrics.jsonl and removes the rows after the position `at`; `anew`: those of that step too."""
        last = -1 if anew else at.step
        self.metrics = Metrics(self.c.run_dir / "metrics.jsonl", last, writes=self.rt.is_main)
        self.progress = Progress(at.step, self.c.max_steps, self.rt.is_main)
        self.seconds = at.seconds

    def introduce(self, at, changed, origin=None):
        """Writes run.json, prints what is trained on what, and starts the tracker. changed: flags, as text. origin: of
        the first weights, where another run trained them: path, sha256, step."""
        if not self.rt.is_main:
            return
        c, rt, about = self.c, self.rt, self.about
        write_json(c.run_dir / "run.json", record_of_run(c, rt, about) | {"origin": origin})
        accumulation = c.total_batch_tokens // (c.batch_size * c.block_size * rt.world)
        tokens, there = c.max_steps * c.total_batch_tokens, about["training_tokens"]
        print(f"model      {about['parameters']:,} parameters, {about['vocab_size']:,} token vocabulary")
        print(f"data       {there:,} tokens in {c.data_dir}; {tokens:,} to train on ({tokens / there:.2f} epochs)")
        sizes = f"{c.batch_size} x {c.block_size} x {accumulation} micro-steps x {rt.world} device(s)"
        print(f"step       {c.total_batch_tokens:,} tokens = {sizes}")
        print(f"device     {rt.device}, {rt.dtype}{', compiled' if about['compiled'] else ''}")
        beginning = f"from the weights of {origin['path']}" if origin else "from the beginning"
        print(f"run        {c.run_dir}, {f'continued at step {at.step}' if at.step else beginning}")
        if changed:
            print(f"changed    {', '.join(changed)}")
        sys.stdout.flush()
        library = "wandb" if c.tracker == "off" and c.wandb_project else c.tracker
        if library != "off":
            self.tracker = Tracker(library, c.wandb_project or "gpt", c.wandb_run_name, c.run_dir, asdict(c))

    def due(self, kind, at) -> bool:
        """Whether an evaluation is scheduled for this step and has no row yet."""
        c = self.c
        interval = {"val": c.eval_interval, "hellaswag": c.hellaswag_interval, "sample": c.sample_interval}[kind]
        scheduled = interval > 0 and (at.step % interval == 0 or at.step == c.max_steps)
        return scheduled and (kind, at.step) not in self.metrics.evaluations and (at.step > 0 or kind == "val")

    def anything_due(self, at) -> bool:
        return any(self.due(kind, at) for kind in ("val", "hellaswag", "sample"))

    def finished(self, at) -> bool:
        """Whether nothing is left to do."""
        return at.step >= self.c.max_steps and not self.anything_due(at)

    def say(self, text):
        self.progress.say(text)

    def row(self, kind, at, **values):
        tokens = at.samples_seen * self.c.block_size
        row = {"kind": kind, "step": at.step, "tokens": tokens, "seconds": round(at.seconds, 3), **values}
        self.metrics.write(row)
        if self.tracker:
            self.tracker.log(row)

    def train(self, values, at):
        """One optimizer step: its loss, lr, grad_norm and checksum; speed and memory are added here."""
        elapsed, self.seconds = at.seconds - self.seconds, at.seconds
        rate, mfu = self.speed(self.c.total_batch_tokens, elapsed)
        epoch = round(at.samples_seen / self.about["n_windows"], 4)
        self.row("train", at, **values, samples_seen=at.samples_seen, epoch=epoch, tokens_per_second=round(rate),
                 mfu=mfu and round(mfu, 4), memory=self.rt.memory())  # fmt: skip
        norm = "skipped" if values.get("skipped") else f"norm {values['grad_norm']:.2f}"
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {norm}  {rate:,.0f} tok/s"
        self.progress.show(at.step, text + (f"  MFU {mfu:.1%}" if mfu else ""))

    def val(self, values, at):
        if not math.isfinite(values["loss"]):  # its row would not be JSON, and no later start could read it
            back = "lower --lr, and go back with --resume to a checkpoint before this step"
            raise UserError(f"step {at.step}: validation loss {values['loss']}; {back}")
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
        return rate, rate * self.about["flops_per_token"] / (peak * self.rt.world) if peak else None

    def summary(self, at, stopped_by=0) -> dict:
        """Prints the summary of all sessions and returns it. stopped_by: the signal that ended this one early."""
        self.progress.close()
        val = self.metrics.last("val")
        known = {"val_loss": val["loss"] if val else None, "perplexity": perplexity(val["loss"]) if val else None}
        tokens = at.samples_seen * self.c.block_size
        if stopped_by:
            where = f"stopped after step {at.step}, saved in {self.c.run_dir}; run again to go on"
            self.say(f"signal {stopped_by}: {where}")
        elif self.rt.is_main:
            self.print_summary(at, tokens, **known)
        return {"run_dir": str(self.c.run_dir), "signal": stopped_by, "step": at.step, "tokens": tokens, **known}

    def print_summary(self, at, tokens, val_loss, perplexity):
        rate, mfu = self.speed(tokens, at.seconds)
        epochs = at.samples_seen / self.about["n_windows"]
        print(f"\nfinished   step {at.step:,}: {tokens:,} tokens, {epochs:.2f} epochs,"
              f" {duration(at.seconds)} of training")  # fmt: skip
        print(f"speed      {rate:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else ""))
        if val_loss is not None:
            print(f"validation loss {val_loss:.4f}, perplexity {perplexity:.2f}")
        if hellaswag := self.metrics.last("hellaswag"):
            print(f"HellaSwag  {hellaswag_in_words(hellaswag)}")
        print(f"kept       {self.c.run_dir}: checkpoints, metrics.jsonl, curves.png")
        print(f"next       python inference.py --checkpoint {self.c.run_dir}", flush=True)

    def __exit__(self, *exc):
        for opened in (self.tracker, self.progress, self.metrics):
            if opened is not None:
                opened.close()


def record_of_run(c, rt, about) -> dict:
    """run.json: what a reader needs to repeat this run."""
    from support.runtime import git_commit, versions  # here: it imports torch, which preparing data does not need

    return {
        "config": asdict(c),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "versions": versions(),
        "device": str(rt.device),
        "dtype": rt.dtype,
        "world_size": rt.world,
        **{k: about[k] for k in ("parameters", "training_tokens", "identity")},
    }


def perplexity(loss) -> float:
    return math.exp(min(loss, 700))  # beyond that a float overflows


def validation_in_words(row) -> str:
    bits = f", {row['bits_per_byte']:.4f} bits per byte" if row["bits_per_byte"] else ""
    return f"loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}{bits}"


def hellaswag_in_words(row) -> str:
    """The accuracies in percent."""
    known = {k: v for k, v in row.items() if k.endswith(("_acc", "_acc_norm")) and type(v) is float}
    return ", ".join(f"{k.replace('_', ' ', 1)} {100 * share:.2f}" for k, share in known.items()) + " percent"


class Metrics:
    """The rows of one run: {"kind": "train" | "val" | "hellaswag" | "sample", "step", "tokens", "seconds", ...}."""

    def __init__(self, path, step, writes=True):
        """Keeps the rows up to `step`. `writes`: this process removes the others from the file and adds new ones."""
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self.evaluations = {(row["kind"], row["step"]): row for row in rows if row["kind"] != "train"}
        self.file = None
        if writes:
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, row):
        if row["kind"] != "train":
            self.evaluations[row["kind"], row["step"]] = row
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def last(self, kind) -> dict | None:
        """The row of the newest evaluation of this kind."""
        return max((r for r in self.evaluations.values() if r["kind"] == kind), key=lambda r: r["step"], default=None)

    def val_losses(self) -> dict[int, float]:
        """The validation losses by step."""
        return {step: row["loss"] for (kind, step), row in self.evaluations.items() if kind == "val"}

    def sync(self):
        """Brings the rows to the disk: before a checkpoint that relies on them."""
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
                good = type(row["kind"]) is str and type(row["step"]) is int
                if row["kind"] == "val":  # its loss decides which checkpoint is the best
                    good = good and type(row["loss"]) in (int, float) and not math.isnan(row["loss"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                good = False
            if good:
                yield row
            elif line.endswith(b"\n"):
                raise UserError(f"{path}, line {number}: not a row of metrics; correct that line or delete it")


class Tracker:
    """The rows shown by Weights & Biases, or by trackio's local dashboard, which needs no account and no network.

    The first error switches the tracker off with one warning; the run goes on."""

    def __init__(self, library, project, name, run_dir, config):
        """library: "wandb" or "trackio"; a run that continues in `run_dir` continues there too."""
        self.name, self.off, self.samples = library, False, []
        self.attempt(self.start, project, name or run_dir.name, run_dir, config)

    def attempt(self, function, *arguments):
        if self.off:
            return
        try:
            function(*arguments)
        except Exception as error:
            self.off = True
            said = f"{type(error).__name__}: {error}"
            print(f"warning: {self.name} is off for the rest of this run ({said})", file=sys.stderr)

    def start(self, project, name, run_dir, config):
        self.library = importlib.import_module(self.name)  # here: optional, and slow to import
        identifier = run_id(run_dir / f"{self.name}_id.txt")
        if self.name == "wandb":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key(self.library) else "offline")
            if mode == "offline":
                print(f"wandb: offline; send it later with `wandb sync {run_dir}/wandb/offline-run-*`")
            settings = self.library.Settings(init_timeout=30)
            options = dict(name=name, id=identifier, dir=str(run_dir), mode=mode, settings=settings)
        else:  # trackio keeps runs in a database of the user's (TRACKIO_DIR), by name: so the name contains the id
            options = dict(name=f"{name} {identifier}", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        self.run = self.library.init(project=project, config=config, resume="allow", **options)
        if self.name == "wandb":
            self.run.define_metric("*", step_metric="step")  # wandb's own step only grows and would drop resumed rows

    def log(self, row):
        self.attempt(self.log_row, row)

    def log_row(self, row):
        values = {k if k in AXES else f"{row['kind']}/{k}": v for k, v in row.items() if k not in NO_CURVES}
        if row["kind"] == "sample":
            self.samples.append([row["step"], row["prompt"], row["text"]])
            columns = ["step", "prompt", "text"]
            values = {"samples": self.library.Table(columns=columns, data=self.samples.copy())}
        values = {k: v for k, v in values.items() if v is not None}
        if self.name == "wandb":
            self.run.log({"step": row["step"]} | values)
        else:
            self.run.log(values, row["step"])

    def close(self):
        self.attempt(lambda: self.library.finish())


def has_key(wandb) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # it raises where there is none
        return False


def run_id(path) -> str:
    """The run's id at a tracker, made at its first start: a run of the same name in a new directory has another."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


class Progress:
    """The progress bar of all programs. Without a terminal a line every few seconds, or none with plain=False."""

    def __init__(self, done, total, shown=True, unit="step", plain=True):
        """done of total units are done already. shown: whether this process prints anything."""
        self.first, self.total, self.shown, self.unit, self.plain = done, total, shown, unit, plain
        self.began, self.printed = time.monotonic(), -PLAIN_SECONDS
        self.live, self.bar = shown and sys.stderr.isatty(), None

    def show(self, done, text=""):
        """`done` units are done; the text stands behind the bar. The last unit always shows."""
        if self.live:
            if self.bar is None:  # created late: what is printed before the first step does not break the bar
                options = dict(unit=f" {self.unit}", dynamic_ncols=True, smoothing=0.05)
                self.bar = tqdm(total=self.total, initial=self.first, **options)
            self.bar.set_postfix_str(text, refresh=done == self.bar.n)  # update(0) would not show it
            self.bar.update(done - self.bar.n)
        elif self.shown and self.plain:
            now = time.monotonic()
            if now - self.printed >= PLAIN_SECONDS or done == self.total:
                self.printed = now
                left = duration((now - self.began) / max(1, done - self.first) * (self.total - done))
                print(f"{self.unit} {done:>{len(str(self.total))}}/{self.total}  {text}  left {left}", flush=True)

    def say(self, text):
        """Prints a line above the bar."""
        if self.shown:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def duration(seconds) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
