"""What a run tells: metrics.jsonl, the terminal, and Weights & Biases or trackio where they are asked for.

Notable: metrics.jsonl is the truth, one JSON object a line, and exact across restarts: rows after
the checkpoint that is resumed are cut off, so every step has one row. The rest are views of it;
none of them can stop a run.
"""

import json
import math
import os
import secrets
import sys
import time
from pathlib import Path

from tqdm import tqdm

from support.cli import UserError
from support.files import write_whole

AXES = {"tokens", "seconds"}  # what curves can be drawn against, besides the step
NO_CURVES = {"kind", "step", "checksum", "samples_seen", "targets", "examples"}
PLAIN_SECONDS = 10  # between progress lines where the output is not a terminal


class Metrics:
    """The rows of one run: {"kind": "train" | "val" | "hellaswag" | "sample", "step", "tokens", "seconds", ...}."""

    def __init__(self, path, step, writes=True):
        """Keeps the rows up to `step`; where it `writes` (one process does), the rest are cut off the file."""
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self.done = {(row["kind"], row["step"]) for row in rows}
        self.last = {}  # row logged, by kind
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

    def sync(self):
        """To the disk, before a checkpoint that relies on it."""
        if self.file:
            os.fsync(self.file.fileno())

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
    id_file = run_dir / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    place = dict(project=project, name=name, dir=str(run_dir), mode=mode, settings=wandb.Settings(init_timeout=30))
    run = wandb.init(config=config, id=run_id, resume="allow", **place)
    id_file.write_text(run_id + "\n")
    run.define_metric("*", step_metric="step")  # wandb's own step only grows and would drop resumed rows
    return lambda step, values: run.log({"step": step} | values), wandb.Table, run.finish


def has_key(wandb) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # it raises where there is none
        return False


def begin_trackio(project, name, run_dir, config):
    """The same of a run in trackio, which keeps it in a database of the user's (TRACKIO_DIR)."""
    import trackio

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
            self.bar.update(1)
        elif self.shown and (time.monotonic() - self.last >= PLAIN_SECONDS or step == self.total):
            self.last = time.monotonic()
            left = (self.last - self.began) / (step - self.first) * (self.total - step)
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
