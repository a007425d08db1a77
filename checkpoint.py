"""Checkpoints: how a run saves its state, finds it again after a kill, and continues from it.

    python checkpoint.py verify checkpoints/demo       # checks every file of a run's checkpoints against its hash

A checkpoint is a directory step_NNNNNNNN. It is written under another name, flushed to the disk, and then renamed: so
a checkpoint that has its name is complete. Its manifest holds the sha256 of each file: damage is found, and the
checkpoint before is used. Tensors are safetensors and everything else is JSON, so loading a checkpoint runs no code.

A run's checkpoints are its line of steps. Where a run continues from an earlier one, those after it are void: they are
renamed to aside_step_NNNNNNNN, which the run does not read, before their steps are trained again.
"""

import math
import os
import re
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from support.cli import REQUIRED, UserError, flag, parse, run  # isort: split

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import GPT, GPTConfig
from muon import Muon
from support.files import UNFINISHED, copy_permissions, locked, read_json, sha256, sync, sync_directory, write_json
from support.runtime import gathered, laid_out_like
from tokenizer import FILE as TOKENIZER
from tokenizer import load_tokenizer

MANIFEST = "MANIFEST.json"
MODEL, OPTIMIZER, CONFIG, STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
NEEDED = (MODEL, CONFIG, TOKENIZER)  # to sample and to evaluate
DEFAULT_DIR = "checkpoints"
LEFTOVER = ".unfinished_"  # prefix of directories that are being written
DOOMED = f"{LEFTOVER}removal_"  # prefix of directories that are being deleted
ASIDE = "aside_"  # prefix of checkpoints that are not in the line of steps
MAY_DIFFER = ("block_size", "rope_theta", "dropout")  # of a model from that of --init_from: no weight depends on them

# ---------------------------------------------------------------------------------------
# Saving.


def snapshot(model, optimizer, keep=True, pinned=None) -> dict[str, dict[str, torch.Tensor]]:
    """Copies on the CPU of all that training changes: the tensors of each file of a checkpoint.

    Under FSDP every rank must call it, because each tensor is gathered from all ranks; with keep=False a rank copies
    nothing and gets None for each. pinned: a dict that keeps the memory of the copies for the next snapshot. With it
    nothing waits for a GPU: the copies are complete when the function that `Runtime.so_far` returns has been called."""
    files = {MODEL: model.state_dict(), OPTIMIZER: optimizer_tensors(model, optimizer)}
    return {
        file: {name: copied(gathered(t.detach()), keep, pinned, (file, name)) for name, t in tensors.items()}
        for file, tensors in files.items()
    }


def copied(t, keep, pinned, key):
    if not keep:
        return None
    if pinned is None or not t.is_cuda:
        return t.to("cpu", copy=True).contiguous()
    if key not in pinned:
        pinned[key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
    return pinned[key].copy_(t, non_blocking=True)


def optimizer_tensors(model, optimizer) -> dict:
    """The optimizer's state as named tensors: <parameter>/<key>."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}/{key}": t for p, state in optimizer.state.items() for key, t in state.items()}


def write_checkpoint(run_dir, step, config, tensors, state, tokenizer) -> Path:
    """Writes run_dir/step_NNNNNNNN from a `snapshot` and returns it. A checkpoint of that step is replaced when the new
    one is complete. UserError where it cannot be written, as on a full disk; then nothing of it is left."""
    run_dir = Path(run_dir)
    final, temporary, before = run_dir / name_of(step), run_dir / f"{LEFTOVER}{name_of(step)}", None
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_json(temporary / CONFIG, asdict(config))
        write_json(temporary / STATE, state)
        tokenizer.save(temporary)
        for name, content in tensors.items():
            write_tensors(temporary / name, content)
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"format_version": 1, "step": step, "files": files})
        if final.exists():
            before = set_aside(final)
        os.rename(temporary, final)
        sync_directory(run_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library raises a different error
        if before is not None and not final.exists():
            os.rename(before, final)
        shutil.rmtree(temporary, ignore_errors=True)
        need = sum(t.numel() * t.element_size() for content in tensors.values() for t in content.values())
        free = shutil.disk_usage(run_dir if run_dir.exists() else run_dir.parent).free
        raise UserError(
            f"checkpoint {final} was not written ({error}); it needs about {need:,} bytes and {free:,} are free; "
            "earlier checkpoints are intact"
        ) from error
    if before is not None:
        remove(before)
    point(run_dir, "latest", step)
    return final


def point(run_dir, name, step, **facts):
    """<name>.json says to people which checkpoint is the latest or the best; `find_checkpoint` reads the best."""
    write_json(Path(run_dir) / f"{name}.json", {"step": step, "checkpoint": name_of(step), **facts})


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file and flushes it. It gets the permissions of the CONFIG beside it, which follow the
    user's umask; safetensors itself gives 0600."""
    save_file(tensors, path, metadata)
    copy_permissions(path.with_name(CONFIG), path)
    with open(path, "rb+") as f:
        sync(f)


def remove(directory):
    """Deletes a checkpoint, renamed first: after a kill half way the remains do not look like a checkpoint."""
    doomed = directory.with_name(f"{DOOMED}{directory.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    while doomed.exists():  # the rest of one of this step that cannot be deleted
        doomed = doomed.with_name(f"{doomed.name}_")
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what is left, as of a read-only one, does not stop the run


def set_aside(path) -> Path:
    """Takes a checkpoint out of the line of steps: renames it to aside_step_NNNNNNNN, or aside_step_NNNNNNNN_2 and so
    on where that exists. Returns the new path."""
    aside, n = path.with_name(f"{ASIDE}{path.name}"), 2
    while aside.exists():
        aside, n = path.with_name(f"{ASIDE}{path.name}_{n}"), n + 1
    os.rename(path, aside)
    return aside


def remove_old(run_dir, keep_last, best_step=None):
    """Keeps the newest `keep_last` checkpoints of the line and the one of `best_step`. One that was set aside is
    removed when `keep_last` checkpoints of the line have reached its step."""
    line = steps(run_dir)
    for path in line[keep_last:]:
        if step_of(path) != best_step:
            remove(path)
    for path, step in those_aside(run_dir):
        if sum(step_of(other) >= step for other in line) >= keep_last:
            remove(path)


def clean(run_dir):
    """Removes the unfinished files of a session that was killed."""
    for path in Path(run_dir).glob(f"{LEFTOVER}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(run_dir).glob(f".*{UNFINISHED}"):
        path.unlink()


# ---------------------------------------------------------------------------------------
# Finding.


def name_of(step) -> str:
    return f"step_{step:08d}"


def step_of(path) -> int:
    return int(path.name.removeprefix("step_"))


def steps(run_dir) -> list[Path]:
    """The checkpoints of a run's line, newest first, good or damaged."""
    found = [p for p in Path(run_dir).glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def those_aside(run_dir) -> list[tuple[Path, int]]:
    """The checkpoints that were set aside in a run, each with its step."""
    found = ((p, re.fullmatch(rf"{ASIDE}step_(\d+)(_\d+)?", p.name)) for p in Path(run_dir).glob(f"{ASIDE}step_*"))
    return [(path, int(match[1])) for path, match in found if match and path.is_dir()]


def verify(path, names=None):
    """UserError with the first file, of all or of `names`, that is missing or differs from what was saved."""
    path = Path(path)
    listed = read_json(path / MANIFEST).get("files")
    needed = {*NEEDED, OPTIMIZER, STATE}
    if not isinstance(listed, dict) or not needed <= listed.keys():
        raise UserError(f"{path / MANIFEST}: does not list {', '.join(sorted(needed))}")
    for name in names or listed:
        file, facts = path / name, listed[name]
        if not isinstance(facts, dict) or type(facts.get("size")) is not int or "sha256" not in facts:
            raise UserError(f"{path / MANIFEST}: does not give size and sha256 of {name}")
        if Path(name).name != name or not os.path.isfile(file):  # os.path's answer for an impossible name is no
            raise UserError(f"{file}: listed in {MANIFEST}, but not there")
        if file.stat().st_size != facts["size"]:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes, but {MANIFEST} says {facts['size']:,}")
        if sha256(file) != facts["sha256"]:
            raise UserError(f"{file}: its content is not what was saved (sha256 differs)")


def newest(run_dir, names=None) -> Path | None:
    """The newest good checkpoint of a run; None if the run has none. names: the files that must be good, default all.

    A damaged one is skipped with a message. UserError where all are damaged: the run must not start from scratch
    without the user's knowledge."""
    found = steps(run_dir)
    for path in found:
        try:
            verify(path, names)
            return path
        except UserError as error:
            print(f"checkpoint skipped: {error}", file=sys.stderr)
    if found:
        raise UserError(f"{run_dir}: none of its {len(found)} checkpoints can be used; remove them to start anew")
    return None


def find_checkpoint(path=None, runs=DEFAULT_DIR, names=NEEDED) -> Path:
    """The checkpoint that `path` names: a checkpoint itself, RUN/best, RUN or RUN/latest (its newest), or for None the
    newest under `runs`, the directory of all runs. RUN is a run's directory, or its name under `runs`.

    names: the files of it that are verified; None: all. A large model takes seconds to verify, so a program does that
    once, and then reads what was found."""
    if path is None:
        found = [p for p in Path(runs).glob("*") if steps(p)]
        if not found:
            raise UserError(f"no checkpoint under {runs}/; train one (python train.py) or name it: --checkpoint DIR")
        path = max(found, key=lambda run: steps(run)[0].stat().st_mtime)
    path = under_runs(path, runs)
    if path.name == "latest" and not path.exists():
        path = path.parent
    if path.name == "best" and not path.exists() and path.parent.is_dir():
        path = best_of(path.parent)
    if (path / MANIFEST).is_file():
        verify(path, names)
        return path
    if path.is_dir() and (found := newest(path, names)):
        return found
    raise UserError(f"{path}: {what_it_looks_like(path)}; expected a run's directory or name, or one of its step_* "
                    "checkpoints, best or latest")  # fmt: skip


def under_runs(path, runs) -> Path:
    """`path` under the directory of all runs, where only that is a run or belongs to one; else `path` itself."""

    def is_ours(p):
        in_run = re.fullmatch(r"best|latest|step_\d+", p.name) and steps(p.parent)
        return bool(steps(p) or (p / MANIFEST).is_file() or in_run)

    here, there = Path(path), Path(runs, path)
    return there if is_ours(there) and not is_ours(here) else here


def best_of(run_dir) -> Path:
    """The checkpoint that best.json names."""
    name = read_json(run_dir / "best.json").get("checkpoint")
    if type(name) is not str or not re.fullmatch(r"step_\d+", name) or not (run_dir / name).is_dir():
        raise UserError(f"{run_dir / 'best.json'}: names no checkpoint that is there; name one of {run_dir}/step_*")
    return run_dir / name


def what_it_looks_like(path) -> str:
    if not path.exists():
        return "does not exist"
    if path.is_file():
        pickled = path.suffix in (".pt", ".pth", ".bin", ".ckpt")
        return "is a pickle of another project (which could run code and is not opened)" if pickled else "is a file"
    if (path / CONFIG).is_file():
        return f"holds {CONFIG} but no {MANIFEST} (a Hugging Face model? python export_hf.py import)"
    return "holds no checkpoint"


# ---------------------------------------------------------------------------------------
# Loading.


@contextmanager
def open_tensors(path):
    """A safetensors file, open for reading. UserError where it is not one."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file that can be read ({error})") from error


def read_tensors(path, expected: dict[str, torch.Size]) -> dict:
    """The tensors of a file by name. expected: their shapes by name. UserError names a tensor that is missing, not
    expected, not float32 of that shape, or not finite."""
    with open_tensors(path) as f:
        names = set(f.keys())
        for name in sorted(names ^ expected.keys()):
            raise UserError(f"{path}: tensor {name} is {'not expected' if name in names else 'missing'}")
        for name, shape in expected.items():
            found = f.get_slice(name)
            if list(found.get_shape()) != list(shape) or found.get_dtype() != "F32":
                has = f"{found.get_dtype()} {found.get_shape()}"
                raise UserError(f"{path}: tensor {name} is {has}, expected F32 {list(shape)}")
        tensors = {name: f.get_tensor(name) for name in expected}  # one order on all ranks
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise UserError(f"{path}: tensor {name} holds NaN or Inf")
    return tensors


def read_config(path) -> GPTConfig:
    """The model's configuration. A field that is newer than the file gets its default."""
    values = asdict(GPTConfig()) | read_json(path)
    known = {f.name: f.type for f in fields(GPTConfig)}
    if values.keys() != known.keys():
        raise UserError(f"{path}: unknown keys {sorted(values.keys() - known.keys())}")
    for name, kind in known.items():
        whole = kind is float and type(values[name]) is int and abs(values[name]) < 2**53  # 10 for 10.0
        if type(values[name]) is not kind and not whole:
            raise UserError(f"{path}: {name} is {values[name]!r}, expected {kind.__name__}")
    config = GPTConfig(**values)
    if config.problems():
        raise UserError(f"{path}: {'; '.join(config.problems())}")
    return config


def load_weights(path, model):
    own = model.state_dict()
    tensors = read_tensors(path / MODEL, {name: t.shape for name, t in own.items()})
    model.load_state_dict({name: laid_out_like(own[name], t) for name, t in tensors.items()})


def load_model(path=None, device="cpu"):
    """(GPT in evaluation mode, its tokenizer) of the checkpoint that `path` names, see `find_checkpoint`."""
    return read_model(find_checkpoint(path), device)


def read_model(path, device="cpu"):
    """As `load_model`, of a checkpoint that `find_checkpoint` has found and verified."""
    config, tokenizer = read_config(path / CONFIG), load_tokenizer(path)
    if tokenizer.vocab_size != config.valid_vocab_size:
        raise UserError(f"{path}: {TOKENIZER} has {tokenizer.vocab_size:,} ids, {CONFIG} {config.valid_vocab_size:,}")
    refuse_larger(config, path)
    model = GPT(config)
    load_weights(path, model)
    return model.to(device).eval(), tokenizer


def refuse_larger(c: GPTConfig, path):
    """UserError where the config describes a model larger than the stored weights, before memory is allocated."""
    size = (path / MODEL).stat().st_size
    matrices = c.n_embd * (c.vocab_size + 12 * c.n_layer * c.n_embd)
    angles = c.block_size * c.n_embd // c.n_head  # RoPE's table, which is computed and not stored
    if 4 * matrices > size or 4 * angles > max(size, 2**26):
        raise UserError(f"{path / CONFIG}: a model larger than the {size:,} bytes of {MODEL}")


def kept_keys(optimizer, group):
    """The names of the state that an optimizer keeps for each parameter of a group."""
    muon = isinstance(optimizer, Muon) and "parts" in group
    return ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")


def load_training(path, model, optimizer):
    """Loads weights and optimizer state into existing objects."""
    load_weights(path, model)
    with open_tensors(path / OPTIMIZER) as f:
        started = len(f.keys()) > 0  # an optimizer has no state before its first step
    named = {p: name for name, p in model.named_parameters()}
    keys = {p: kept_keys(optimizer, g) for g in optimizer.param_groups for p in g["params"]} if started else {}
    shapes = {f"{named[p]}/{k}": [] if k == "step" else p.shape for p in keys for k in keys[p]}
    tensors = read_tensors(path / OPTIMIZER, shapes)
    state = {}
    for i, p in enumerate(keys):
        values = {k: tensors[f"{named[p]}/{k}"] for k in keys[p]}
        state[i] = {k: t if k == "step" else laid_out_like(p, t) for k, t in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------------------------------
# A run that saves and continues.


@dataclass
class Position:
    """Where a run stands. What training does next depends on this, the flags, the weights and the optimizer's state."""

    step: int = 0  # optimizer steps completed
    samples_seen: int = 0  # windows that these steps consumed, over all devices
    seconds: float = 0.0  # of training, over all sessions


class Saver:
    """Saves a run's checkpoints while it trains, and finds the one from which it continues.

    As a context it holds the lock of the run's directory; leaving it waits for the checkpoint that is being written.
    c: the run's configuration. identity: settings, by name, that may not change within a run. `net` of the methods has
    model, optimizer and scaler; `log` is a support.tracking.Log. All ranks call the methods together."""

    def __init__(self, c, rt, identity, tokenizer):
        self.c, self.rt, self.identity, self.tokenizer = c, rt, identity, tokenizer
        self.saved_step = -1  # the step of the run's newest good checkpoint; -1: it has none
        self.origin = None  # of the first weights: path, sha256 and step of a checkpoint; None: drawn from the seed
        self.changed = []  # flags that differ from those of the checkpoint's session, as text
        self.writing = None  # on rank 0: the future of the checkpoint that is being written
        self.pinned = {}  # see `snapshot`

    def __enter__(self):
        self.stack = ExitStack()
        self.rt.from_main(lambda: self.stack.enter_context(run_lock(self.c.run_dir)))
        self.writer = self.stack.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(self, *exc):
        self.stack.close()

    def resume(self, net) -> Position:
        """Loads the run's newest good checkpoint, or the one that --resume names, and returns its position. Without one
        the network stays as it is, at step 0. The run's later checkpoints are set aside."""
        c = self.c
        found = self.rt.from_main(lambda: find_start(c))
        if found is None:
            self.start_from_origin(net.model)
            return Position()
        state = read_state(found / STATE)
        was, now = asdict(GPTConfig()) | state["identity"], self.identity  # a newer field had its default
        other = [f"{k} (was {was.get(k)}, now {v})" for k, v in now.items() if was.get(k) != v]
        if other:
            raise UserError(f"{found} cannot be continued with another {', '.join(other)}; give a new --run_name")
        load_training(found, net.model, net.optimizer)
        if net.scaler.is_enabled() and state.get("scaler"):
            net.scaler.load_state_dict(state["scaler"])
        before, self.origin = state.get("config") or {}, state.get("origin")
        if c.init_from and Path(c.init_from) != Path(before.get("init_from") or ""):
            raise UserError(
                f"{found} is of a run that began with the weights of {before.get('init_from') or 'its seed'}, not of "
                f"{c.init_from}; leave --init_from out, or give a new --run_name"
            )
        self.changed = [f"{k} {before[k]} -> {v}" for k, v in asdict(c).items() if k in before and before[k] != v]
        if found.parent.resolve() == c.run_dir.resolve():
            self.saved_step = state["step"]
            self.rt.from_main(lambda: cut_line(c.run_dir, state["step"]))
        return Position(state["step"], state["samples_seen"], state["seconds"])

    def start_from_origin(self, model):
        """Loads the weights that --init_from names into the new model. UserError where they are of another model, or
        were trained with another tokenizer: its ids would be numbers without meaning."""
        c = self.c
        if not c.init_from:
            return
        found = self.rt.from_main(lambda: find_checkpoint(c.init_from, c.checkpoint_dir))
        theirs, tokenizer = read_config(found / CONFIG), load_tokenizer(found)
        if tokenizer.fingerprint() != self.tokenizer.fingerprint():
            raise UserError(
                f"{found} has tokenizer {tokenizer.name!r} ({tokenizer.vocab_size} ids), and {c.data_dir} has "
                f"{self.tokenizer.name!r} ({self.tokenizer.vocab_size} ids); prepare the text with --tokenizer {found}"
            )
        was, now = asdict(theirs), asdict(model.config)
        other = [f"{k} ({was[k]} there, {now[k]} here)" for k in now if now[k] != was[k] and k not in MAY_DIFFER]
        if other:
            raise UserError(f"{found} has another {', '.join(other)}; leave these flags out, or give its values")
        load_weights(found, model)
        manifest = read_json(found / MANIFEST)
        sha = manifest["files"][MODEL]["sha256"]
        self.origin = {"path": str(found), "sha256": sha, "step": manifest.get("step")}

    def due(self, at) -> bool:
        """Whether the schedule has a checkpoint at this step."""
        interval = self.c.save_interval
        return at.step > 0 and (at.step == self.c.max_steps or (interval > 0 and at.step % interval == 0))

    def save(self, net, at, log):
        """Copies the state of this step. A thread writes the copy and removes old checkpoints while training goes on.
        Nothing happens where this step is saved already."""
        if self.saved_step == at.step:
            return
        self.wait(log)
        tensors = snapshot(net.model, net.optimizer, keep=self.rt.is_main, pinned=self.pinned)
        wait_for_copies = self.rt.so_far()
        self.saved_step = at.step
        if not self.rt.is_main:
            return
        scaler = net.scaler.state_dict() if net.scaler.is_enabled() else None
        about = {"identity": self.identity, "config": asdict(self.c), "origin": self.origin}
        state = {**asdict(at), **about, "scaler": scaler}
        step, best = at.step, best_step(self.c.run_dir, log.metrics.val_losses())

        def write():
            try:
                wait_for_copies()
                log.metrics.sync()
                write_checkpoint(self.c.run_dir, step, net.model.config, tensors, state, self.tokenizer)
                remove_old(self.c.run_dir, self.c.keep_last, best)
            except BaseException:
                self.rt.signals.failed = True  # stops the training; then `wait` raises the error
                raise

        self.writing = self.writer.submit(write)

    def wait(self, log):
        """Waits until the last save is on the disk. If it failed, every rank raises its error."""
        self.rt.from_main(lambda: self.writing.result() if self.writing else None)
        self.keep_best(log)

    def keep_best(self, log):
        """Names in best.json the checkpoint of the line with the lowest validation loss."""
        if not self.rt.is_main:
            return
        losses = log.metrics.val_losses()
        best = best_step(self.c.run_dir, losses)
        if best is not None:
            point(self.c.run_dir, "best", best, loss=losses[best])
        else:
            (self.c.run_dir / "best.json").unlink(missing_ok=True)

    def check_space(self, net):
        """UserError where the disk has no room for the checkpoints to come. To be called before the first step."""
        c, run_dir, size = self.c, self.c.run_dir, size_of(net.model, net.optimizer)

        def check():
            saves = math.ceil(c.max_steps / (c.save_interval or c.max_steps))
            at_once = min(c.keep_last + 2, saves)  # the newest, the best, and the one that is being written
            need = size * max(1, at_once - len(steps(run_dir)))
            disk = shutil.disk_usage(run_dir)
            if disk.free < need and disk.total > 0:  # some network file systems say 0 of 0
                raise UserError(f"{run_dir}: checkpoints need about {need:,} bytes and {disk.free:,} are free; make "
                                "room, lower --keep_last, or name another --checkpoint_dir")  # fmt: skip

        self.rt.from_main(check)


def best_step(run_dir, losses) -> int | None:
    """Of a run's checkpoints, the step with the lowest of the validation `losses`, which are given by step."""
    there = [step_of(path) for path in steps(run_dir)]
    return min((step for step in there if step in losses), key=lambda step: (losses[step], step), default=None)


def size_of(model, optimizer) -> int:
    """Bytes of a checkpoint's tensors, all of them float32, after the first step."""
    kept = [(group, len([k for k in kept_keys(optimizer, group) if k != "step"])) for group in optimizer.param_groups]
    states = sum(n * p.numel() for group, n in kept for p in group["params"])
    return 4 * (states + sum(t.numel() for t in model.state_dict().values()))


def find_start(c) -> Path | None:
    """The checkpoint from which the run that `c` describes starts; None: from new weights.

    The run's own newest checkpoint comes before the one that --resume names, because schedulers repeat commands. Only a
    command that names an older checkpoint of the run itself goes back to it, and only the first time."""
    clean(c.run_dir)
    if c.resume == "never":
        if steps(c.run_dir):
            raise UserError(f"{c.run_dir} already holds a run, and --resume is never; give a new --run_name")
        return None
    own = newest(c.run_dir)
    if c.resume == "auto" or (own is not None and not goes_back(c, own)):
        return own
    found = find_checkpoint(c.resume, c.checkpoint_dir, names=None)
    if found.parent.resolve() == c.run_dir.resolve() and found not in steps(found.parent):
        raise UserError(f"{found} is not in the line of steps of its run (set aside, or a copy); continue it as a new "
                        "run: give a new --run_name")  # fmt: skip
    return found


def origin_of(c) -> Path | None:
    """The checkpoint whose architecture and tokenizer --init_from names; None without --init_from. Where the run has
    checkpoints, the newest of them stands for it: the command was given again, and the origin may be gone by now.
    The weights are not verified here, but by `Saver.start_from_origin`, which reads them."""
    if c.init_from is None:
        return None
    small = (CONFIG, TOKENIZER)
    return newest(c.run_dir, small) or find_checkpoint(c.init_from, c.checkpoint_dir, small)


def goes_back(c, own) -> bool:
    """Whether the run goes back to the checkpoint that --resume names: an older one of the run itself, to which this
    very command has not gone back yet. If it had, the newest, `own`, would have been saved with these flags."""
    named, run_dir = under_runs(c.resume, c.checkpoint_dir).resolve(), c.run_dir.resolve()
    if named in (own.resolve(), run_dir, run_dir / "latest"):
        return False
    why = None
    if named.parent != run_dir:
        why = "has checkpoints of its own"
    elif read_json(own / STATE).get("config") == asdict(c):
        why = "went back there by this same command"
    if why:
        print(f"checkpoint {c.resume} is not resumed: {c.run_dir} {why} and goes on from {own.name}", file=sys.stderr)
    return why is None


def cut_line(run_dir, step):
    """Makes `step` the last of a run's line: sets the later ones aside, the newest first. A kill between two renames
    leaves a line that is shorter and without a gap."""
    void = [path for path in steps(run_dir) if step_of(path) > step]
    moved = [f"{path.name} (now {set_aside(path).name})" for path in void]
    if moved:
        sync_directory(run_dir)
        print(f"checkpoint set aside: {', '.join(moved)} in {run_dir}, because training goes on from step {step}; kept "
              "until the new checkpoints have reached it", file=sys.stderr)  # fmt: skip
    point(run_dir, "latest", step)


def read_state(path) -> dict:
    """state.json. UserError unless its values are of the types and ranges that `Saver` writes."""
    state = read_json(path)
    limits = {"step": (int, 0), "samples_seen": (int, 0), "seconds": (float, 0)}
    good = {k: type(state.get(k)) is kind and low <= state[k] < 2**62 for k, (kind, low) in limits.items()}
    good["identity"] = isinstance(state.get("identity"), dict)
    good |= {k: isinstance(state.get(k) or {}, dict) for k in ("scaler", "config", "origin")}
    if not all(good.values()):
        raise UserError(f"{path}: missing or wrong: {', '.join(k for k in good if not good[k])}")
    return state


@contextmanager
def run_lock(run_dir):
    """Context in which this process alone writes to a run's directory. UserError names the one that does already."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+") as f:

        def taken():
            f.seek(0)
            return f"{run_dir} is in use by {f.read().strip() or 'another process'}"

        with locked(f, taken):
            f.truncate(0)
            who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            print(who, file=f, flush=True)
            yield


# ---------------------------------------------------------------------------------------
# Command line.


@dataclass(frozen=True)
class VerifyConfig:
    command: str = flag(REQUIRED, "what to do", unit="verify", choices=("verify",), positional=True)
    directory: str = flag(REQUIRED, "a run's directory or one checkpoint", positional=True)


def main(argv=None):
    path = Path(parse(VerifyConfig, argv, __doc__).directory)
    found = [path] if (path / MANIFEST).is_file() else steps(path)
    if not found:
        raise UserError(f"{path}: {what_it_looks_like(path)}; expected a run's directory or one of its checkpoints")
    bad = 0
    for checkpoint in found:
        try:
            verify(checkpoint)
            print(f"{checkpoint}: whole")
        except UserError as error:
            bad += 1
            print(error)
    if bad:
        raise UserError(f"{bad} of {len(found)} checkpoints cannot be used")


if __name__ == "__main__":
    sys.exit(run(main))
