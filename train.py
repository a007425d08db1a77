"""Pre-training: presets, schedule, optimizer step, evaluation, checkpoints. `python train.py --help`.

Notable: a run is a pure function of its configuration. The data order and the dropout masks are
computed from (seed, position), never drawn from a stream that something else could move, so
evaluating, sampling, saving, logging or being killed and started again changes nothing. The loss
is the true mean over the whole global batch, and no update is applied before it is known to be
finite on every rank. Training waits for a checkpoint to be copied, not for the disk.
"""

import math
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import hellaswag_eval
import inference
import plot_run
from data_processing_fineweb import (
    IGNORE,
    FineWebBatchIterator,
    FineWebDataLoader,
    FineWebDataset,
    find_shards,
    first_windows,
    key64,
    refuse_overlap,
)
from model import GPT, GPTConfig
from muon import Muon
from prepare_fineweb import prepare_demo
from support import runtime
from support.cli import Parser, UserError, run
from support.files import read_json, write_json
from support.tracking import Metrics, Progress, Tracker, duration
from tokenizer import load_tokenizer

# ---------------------------------------------------------------------------------------
# Configuration. Every field is a flag.


def flag(default, text, at_least=None, below=math.inf, choices=None):
    return field(default=default, metadata=dict(help=text, at_least=at_least, below=below, choices=choices))


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the preset gpt2-124m: FineWeb-Edu's 10B-token sample, once."""

    preset: str = flag("gpt2-124m", "set of values that the other flags change")
    run_name: str | None = flag(None, "name of the run's directory; default: the preset's name")
    checkpoint_dir: str = flag(checkpoint.DEFAULT_DIR, "directory of all runs")
    data_dir: str = flag("edu_fineweb10B", "folder of training shards")
    val_data_dir: str | None = flag(None, "folder of validation shards; default: data_dir + _val, or data_dir's own")
    tokenizer: str | None = flag(None, "folder, file or hub name; default: the one kept with the shards, else gpt2")
    # model
    block_size: int = flag(1024, "context length, tokens")
    n_layer: int = flag(12, "number of blocks")
    n_head: int = flag(12, "attention heads per block")
    n_embd: int = flag(768, "channels of the residual stream")
    dropout: float = flag(0.1, "probability of dropping an activation, [0, 1)")
    bias: bool = flag(False, "biases in Linear and LayerNorm")
    norm: str = flag("layernorm", "layernorm or rmsnorm")
    rope_theta: float = flag(10000.0, "base of RoPE's wavelengths")
    # optimization
    max_steps: int = flag(152_587, "optimizer steps", at_least=1)
    batch_size: int = flag(
        16, "sequences per micro-batch and device; the flag to lower when memory runs out", at_least=1
    )
    total_batch_tokens: int = flag(
        65_536, "tokens per optimizer step over all devices; sets the accumulation", at_least=1
    )
    optimizer: str = flag(
        "adamw", "adamw, or muon for the matrices inside the blocks and adamw for the rest", choices=("adamw", "muon")
    )
    lr: float = flag(6e-4, "highest learning rate", at_least=0)
    min_lr: float = flag(6e-5, "learning rate at the last step", at_least=0)
    warmup_frac: float = flag(0.06, "share of the steps with rising learning rate, [0, 1)", at_least=0, below=1)
    weight_decay: float = flag(0.1, "AdamW's, on matrices only", at_least=0)
    beta2: float = flag(0.95, "AdamW's decay of squared gradients, [0, 1)", at_least=0, below=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    # evaluation and saving; an interval of 0 turns a thing off, and the last step counts as due
    eval_interval: int = flag(2000, "steps between validations; 0: never", at_least=0)
    val_tokens: int = flag(5_242_880, "tokens validated on, from the start of the validation shards", at_least=1)
    hellaswag_interval: int = flag(10_000, "steps between HellaSwag evaluations; 0: never", at_least=0)
    hellaswag_data: str | None = flag(None, "local HellaSwag JSONL; default: downloaded once")
    hellaswag_limit: int | None = flag(None, "examples used; default: all 10,042", at_least=1)
    sample_interval: int = flag(10_000, "steps between samples; 0: never", at_least=0)
    sample_prompt: str = flag("The most important", "text that samples continue")
    save_interval: int = flag(2000, "steps between checkpoints; 0: only the last", at_least=0)
    keep_last: int = flag(2, "newest checkpoints kept, besides the best", at_least=1)
    # the run
    resume: str = flag("auto", "auto: continue the run if it exists; never: refuse if it does; PATH: from that one")
    seed: int = flag(1337, "of weights, data order and dropout")
    no_shuffle: bool = flag(False, "read the data in its stored order")
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first of them there is")
    dtype: str = flag(
        "auto",
        "of matrix products: float32, bfloat16, float16, or auto: what the device is best at",
        choices=("auto", *runtime.DTYPES),
    )
    compile: str = flag(
        "auto", "torch.compile the training step: auto (on CUDA with Triton), on, off", choices=("auto", "on", "off")
    )
    fsdp: bool = flag(False, "shard weights, gradients and optimizer state: for models that outgrow one device")
    timeout: float = flag(1800.0, "seconds that a process waits for another before the run fails", at_least=1)
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, about a third slower")
    eval_only: bool = flag(False, "evaluate --checkpoint, or the run's newest, and stop")
    checkpoint: str | None = flag(None, "with --eval_only: a run's directory or one checkpoint")
    tracker: str = flag(
        "off", "also log to wandb, or to trackio, a local dashboard", choices=("off", "wandb", "trackio")
    )
    wandb_project: str | None = flag(None, "project there, and wandb if no --tracker is named; default: gpt")
    wandb_run_name: str | None = flag(None, "name of the run there; default: run_name")

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoint_dir) / (self.run_name or self.preset)

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.total_batch_tokens // self.block_size

    def model_config(self, valid_vocab_size) -> GPTConfig:
        """The model's part, with embedding rows padded to a multiple of 64."""
        own = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)}
        return GPTConfig(vocab_size=-(-valid_vocab_size // 64) * 64, valid_vocab_size=valid_vocab_size, **own)


PRESETS = {
    "gpt2-124m": TrainConfig(),
    # The same model on half the tokens. What each change gained at small scale: benchmarks/RESULTS.md.
    "fast-124m": TrainConfig(
        preset="fast-124m", dropout=0.0, optimizer="muon", lr=2.4e-3, min_lr=2.4e-4, max_steps=76_294
    ),
    # From nothing, offline, in about two minutes on two cores: Python's own documentation, see prepare_fineweb.
    "demo": TrainConfig(
        preset="demo",
        data_dir="demo_corpus",
        block_size=128,
        n_layer=4,
        n_head=4,
        n_embd=128,
        dropout=0.0,
        max_steps=600,
        batch_size=16,
        total_batch_tokens=2048,
        optimizer="muon",
        lr=1e-2,
        min_lr=2.5e-4,
        eval_interval=100,
        val_tokens=20_480,
        hellaswag_interval=0,
        sample_interval=300,
        sample_prompt="The",
        save_interval=100,
    ),
}


def problems(c: TrainConfig, world=1) -> list[str]:
    """Everything wrong with the arguments, a line each, before any work; [] if nothing."""
    huge = [name for name, value in vars(c).items() if type(value) is int and abs(value) >= 2**63]
    if huge:  # nothing can be computed from these
        return [f"{name} is beyond 64 bits" for name in huge]
    found = c.model_config(1).problems()
    for f in fields(c):
        value, low, below, choices = getattr(c, f.name), *(f.metadata[k] for k in ("at_least", "below", "choices"))
        if choices and value not in choices:
            found.append(f"{f.name} is {value!r}; it must be one of {', '.join(choices)}")
        if low is not None and value is not None and not low <= value < below:  # NaN too
            found.append(
                f"{f.name} is {value}; it must be at least {low}" + (f" and below {below}" if below < math.inf else "")
            )
    if not c.min_lr <= c.lr:
        found.append(f"min_lr is {c.min_lr}; it must not exceed lr ({c.lr})")
    tokens = c.batch_size * c.block_size * world
    if tokens > 0 and c.total_batch_tokens % tokens:
        share = f"batch_size {c.batch_size} x block_size {c.block_size} x {world} device(s) = {tokens:,}"
        found.append(f"total_batch_tokens {c.total_batch_tokens:,} does not divide by {share}")
    if c.fsdp and (world == 1 or c.dtype == "float16" or c.compile == "on"):
        found.append("fsdp is for several processes (torchrun), float32 or bfloat16, and without compile")
    if c.checkpoint and not c.eval_only:
        found.append("checkpoint goes with eval_only; to continue a run from a checkpoint use resume")
    return found


def lr_at(step, c: TrainConfig) -> float:
    """Learning rate of update number `step` (from 0): linear warm-up, then half a cosine down to min_lr."""
    warmup = int(c.warmup_frac * c.max_steps)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, c.max_steps - 1 - warmup)  # 1 at the last update
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (c.lr - c.min_lr)


# ---------------------------------------------------------------------------------------
# A run, set up.


@dataclass
class Run:
    """Everything the loop works on. Its position is `step` and `samples_seen`; all else follows from them."""

    config: TrainConfig
    rt: runtime.Runtime
    tokenizer: object
    train_data: FineWebDataset
    val_data: FineWebDataset
    examples: list | None  # HellaSwag's
    model: GPT  # the plain module: evaluates, samples, is saved
    step_model: torch.nn.Module  # the same weights, compiled and distributed: trains
    optimizer: torch.optim.Optimizer | None  # None where nothing is trained
    scaler: torch.amp.GradScaler | None  # does nothing unless dtype is float16
    signals: runtime.StopSignals = field(default_factory=runtime.StopSignals)
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0  # of training, over all sessions
    changed: list[str] = field(default_factory=list)  # flags that are not what the checkpoint's session had
    saved_step: int = -1  # of the newest checkpoint known to be good
    background: ThreadPoolExecutor | None = None  # writes checkpoints
    saving: Future | None = None  # the one being written, on rank 0
    metrics: Metrics | None = None
    tracker: Tracker | None = None
    progress: Progress | None = None

    @property
    def tokens(self) -> int:
        return self.samples_seen * self.config.block_size

    @cached_property
    def identity(self) -> dict:
        """What a run may not change half way: the numbers would no longer belong to one experiment."""
        return {
            **asdict(self.model.config),
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
            "no_shuffle": self.config.no_shuffle,
            "data": self.train_data.fingerprint(),
            "tokenizer": self.tokenizer.fingerprint(),
        }

    def log(self, kind, **values):
        row = self.metrics.log(kind, self.step, tokens=self.tokens, seconds=round(self.seconds, 3), **values)
        if self.tracker:
            self.tracker.log(row)
        return row

    def due(self) -> list[str]:
        """What is to be evaluated at this step and has not been yet, perhaps before a restart."""
        c = self.config
        intervals = {"val": c.eval_interval, "hellaswag": c.hellaswag_interval if self.examples else 0,
                     "sample": c.sample_interval}  # fmt: skip
        due = [k for k, n in intervals.items() if n and (self.step % n == 0 or self.step == c.max_steps)]
        return [k for k in due if (k, self.step) not in self.metrics.done and (self.step > 0 or k == "val")]

    def stop_asked(self) -> bool:
        """Whether this process wants the run to stop: a signal came, or a checkpoint could not be written."""
        failed = self.saving and self.saving.done() and self.saving.exception()
        return bool(self.signals.received or failed)

    def poll(self):
        """Raises Stopped on every rank if one wants to stop. All ranks call it together, between two batches."""
        if self.rt.sum(self.stop_asked())[0]:
            raise runtime.Stopped


def val_directory(c: TrainConfig) -> str:
    beside = c.data_dir.rstrip("/\\") + "_val"
    return c.val_data_dir or (beside if Path(beside).is_dir() else c.data_dir)


def open_data(c: TrainConfig, rt):
    """(tokenizer, training data, validation data), checked against each other."""
    if c.data_dir == PRESETS["demo"].data_dir:
        rt.from_main(lambda: prepare_demo(c.data_dir))
    find_shards(c.data_dir, "train")  # missing data is the first thing to say
    kept = Path(c.data_dir, "tokenizer")
    tokenizer = load_tokenizer(c.tokenizer or (kept if kept.is_dir() else "gpt2"))
    train_data = FineWebDataset(c.data_dir, c.block_size, "train", tokenizer.vocab_size)
    val_data = FineWebDataset(val_directory(c), c.block_size, "val", tokenizer.vocab_size)
    for data in (train_data, val_data):
        refuse_other_tokenizer(data, tokenizer)
    refuse_overlap(train_data, val_data)
    return tokenizer, train_data, val_data


def refuse_other_tokenizer(data, tokenizer):
    theirs = data.manifest.get("tokenizer") or {}
    if "fingerprint" in theirs and theirs["fingerprint"] != tokenizer.fingerprint():
        raise UserError(
            f"{data.directory} was made with tokenizer {theirs.get('name')!r} ({theirs.get('vocab_size')} ids), "
            f"not with {tokenizer.name!r} ({tokenizer.vocab_size} ids); name the data's own, or prepare the data anew"
        )


def load_hellaswag(c: TrainConfig, rt):
    if c.hellaswag_interval:
        return rt.from_main(lambda: hellaswag_eval.load_examples(c.hellaswag_data, c.hellaswag_limit))
    return None


def set_up(c: TrainConfig, rt) -> Run:
    """Data, model and optimizer of a run at step 0."""
    tokenizer, train_data, val_data = open_data(c, rt)
    examples = load_hellaswag(c, rt)
    r = Run(c, rt, tokenizer, train_data, val_data, examples, *build(c, rt, tokenizer.vocab_size))
    rt.refuse_disagreement(r.identity)
    return r


def build(c: TrainConfig, rt, valid_vocab_size):
    """(model, step_model, optimizer, scaler) of a run at step 0; see Run."""
    torch.manual_seed(c.seed)
    model = GPT(c.model_config(valid_vocab_size))
    model.grad_checkpoint = c.grad_checkpoint
    model = shard(model, rt) if c.fsdp else model.to(rt.device)
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[c.optimizer]
    optimizer = kind(
        model.parameter_groups(c.weight_decay), lr=c.lr, betas=(0.9, c.beta2), eps=1e-8, fused=rt.device.type != "mps"
    )
    step_model = model
    if c.compile == "on" or (c.compile == "auto" and runtime.compiles(rt.device) and not c.fsdp):
        step_model = torch.compile(step_model)  # fixed shapes only: evaluation and sampling use `model`
    if rt.world > 1 and not c.fsdp:
        step_model = DistributedDataParallel(step_model, gradient_as_bucket_view=True)
    return model, step_model, optimizer, torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == "float16")


def shard(model, rt):
    """FSDP2 (Zhao et al. 2023): each rank keeps its part of every tensor and gathers a block's when it is used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(rt.device.type, (rt.world,))
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh)
    for method in ("features", "logits"):  # by which evaluation and sampling enter the model
        register_fsdp_forward_method(model, method)
    return model


def resume(r: Run):
    """Moves a run to its newest good checkpoint, or to the one named; leaves it at step 0 if there is none."""
    c = r.config
    found = r.rt.from_main(lambda: find_start(c))
    if found is None:
        return
    state = read_state(found / checkpoint.STATE)
    changed = [
        f"{k} (was {state['identity'].get(k)}, now {v})" for k, v in r.identity.items() if state["identity"].get(k) != v
    ]
    if changed:
        raise UserError(f"{found} cannot be continued with another {', '.join(changed)}; give a new --run_name")
    checkpoint.load_training(found, r.model, r.optimizer)
    r.step, r.samples_seen, r.seconds = state["step"], state["samples_seen"], state["seconds"]
    before = state.get("config") or {}
    r.changed = [f"{k} {before[k]} -> {v}" for k, v in asdict(c).items() if k in before and before[k] != v]
    if r.scaler.is_enabled() and state.get("scaler"):
        r.scaler.load_state_dict(state["scaler"])
    if found.parent.resolve() == c.run_dir.resolve():
        r.saved_step = r.step
        r.rt.from_main(lambda: checkpoint.point(c.run_dir, "latest", r.step))


def read_state(path) -> dict:
    """state.json, with UserError unless its values are such as `save` writes: they decide where a run continues."""
    state = read_json(path)
    limits = {"step": (int, 0), "samples_seen": (int, 0), "seconds": (float, 0)}
    good = {k: type(state.get(k)) is kind and low <= state[k] < 2**62 for k, (kind, low) in limits.items()}
    good["identity"] = isinstance(state.get("identity"), dict)
    good |= {k: isinstance(state.get(k) or {}, dict) for k in ("scaler", "config")}
    if not all(good.values()):
        raise UserError(f"{path}: missing or wrong: {', '.join(k for k in good if not good[k])}")
    return state


def find_start(c: TrainConfig) -> Path | None:
    checkpoint.clean(c.run_dir)
    if c.resume == "auto":
        return checkpoint.newest(c.run_dir)
    if c.resume != "never":
        found = checkpoint.find_checkpoint(c.resume)
        checkpoint.verify(found)
        return found
    if checkpoint.steps(c.run_dir):
        raise UserError(f"{c.run_dir} already holds a run, and --resume is never; give a new --run_name")
    return None


def describe(r: Run):
    """run.json: what a reader needs to repeat this run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    facts = {
        "config": asdict(r.config),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git.stdout.strip() or None,
        "versions": runtime.versions(),
        "device": str(r.rt.device),
        "dtype": r.rt.dtype,
        "world_size": r.rt.world,
        "parameters": r.model.num_parameters(),
        "training_tokens": r.train_data.n_tokens,
        "identity": r.identity,
    }
    write_json(r.config.run_dir / "run.json", facts)


# ---------------------------------------------------------------------------------------
# A step.


def train_step(r: Run, batch):
    """One update from one global batch: accumulate, reduce, clip, check, step.

    Returns its row of metrics and whether any rank wants to stop. UserError, with nothing
    updated, if the loss or the gradient is not finite."""
    c, rt = r.config, r.rt
    r.step_model.train()
    loss_sum = torch.zeros((), device=rt.device)
    for micro, (x, y) in enumerate(zip(batch.x, batch.y)):
        # dropout's masks are a function of the position, so nothing that draws numbers elsewhere can move them
        torch.manual_seed(int(key64(c.seed, r.step, micro, rt.rank)[0]) % 2**63)
        with gradients_travel(r, micro == len(batch.x) - 1):  # once a step
            with rt.autocast():
                loss = r.step_model(x, y)
            # the sum over this micro-batch, divided by the whole global batch's count; DDP averages over ranks
            r.scaler.scale(loss * (rt.world / batch.n_targets)).backward()
        loss_sum += loss.detach()
    r.scaler.unscale_(r.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(r.model.parameters(), c.grad_clip or math.inf)
    norm = norm.full_tensor() if c.fsdp else norm
    total, checksum, stop = rt.sum(loss_sum, batch.checksum, r.stop_asked())
    loss, norm, lr = total / batch.n_targets, float(norm), lr_at(r.step, c)
    # fp16's scaler finds its scale by overshooting now and then: it skips such an update itself
    if not (math.isfinite(loss) and (math.isfinite(norm) or r.scaler.is_enabled())):
        raise UserError(
            f"step {r.step + 1}: loss {loss}, gradient norm {norm} at lr {lr:.3g}, samples {batch.start} to "
            f"{batch.start + c.global_batch - 1}; the update was not applied. Lower --lr, or look at that data"
        )
    for group in r.optimizer.param_groups:
        group["lr"] = lr
    r.scaler.step(r.optimizer)
    r.scaler.update()
    r.optimizer.zero_grad(set_to_none=True)
    r.step, r.samples_seen = r.step + 1, r.samples_seen + c.global_batch
    return {"loss": loss, "lr": lr, "grad_norm": norm, "checksum": int(checksum)}, stop > 0


def gradients_travel(r: Run, now):
    """Context in which the backward pass averages gradients over the ranks, or leaves them to a later one."""
    if r.config.fsdp:
        r.model.set_requires_gradient_sync(now)
        return nullcontext()
    return nullcontext() if now or r.rt.world == 1 else r.step_model.no_sync()


def train_steps(r: Run):
    """Trains to the last step. Raises Stopped between two steps if any rank wants to stop."""
    c, rt = r.config, r.rt
    loader = FineWebDataLoader(r.train_data, c.batch_size, c.global_batch, c.seed, not c.no_shuffle, rt.rank, rt.world)
    peak, flops = rt.peak_flops(), r.model.flops_per_token()
    with FineWebBatchIterator(loader, r.samples_seen, rt.device) as batches:
        while r.step < c.max_steps:
            began = time.perf_counter()
            row, stop = train_step(r, next(batches))
            elapsed = time.perf_counter() - began
            r.seconds += elapsed
            rate = c.total_batch_tokens / elapsed
            mfu = rate * flops / (peak * rt.world) if peak else None
            epoch = r.samples_seen / r.train_data.n_windows
            r.log("train", **row, samples_seen=r.samples_seen, epoch=round(epoch, 4), tokens_per_second=round(rate),
                  mfu=mfu and round(mfu, 4), memory=rt.memory())  # fmt: skip
            text = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  {rate:,.0f} tok/s"
            r.progress.update(r.step, text + (f"  MFU {mfu:.1%}" if mfu else ""))
            if stop:
                raise runtime.Stopped
            finish_step(r)


def finish_step(r: Run):
    """What is due between two steps. Saving comes first: what follows may take long, and changes nothing."""
    c = r.config
    saving = r.step > 0 and (r.step == c.max_steps or (c.save_interval and r.step % c.save_interval == 0))
    if saving and r.saved_step != r.step:
        save(r)
    for kind in r.due():
        {"val": log_validation, "hellaswag": log_hellaswag, "sample": log_sample}[kind](r)
    if saving and r.rt.is_main:
        draw(r)


def save(r: Run):
    """Copies this step's state, and has it written, and old checkpoints removed, while training goes on."""
    finish_saving(r)
    tensors = checkpoint.snapshot(r.model, r.optimizer, keep=r.rt.is_main)
    r.saved_step = r.step
    if not r.rt.is_main:
        return
    state = {
        "step": r.step,
        "samples_seen": r.samples_seen,
        "seconds": r.seconds,
        "identity": r.identity,
        "config": asdict(r.config),
        "scaler": r.scaler.state_dict() if r.scaler.is_enabled() else None,
    }
    step, best = r.step, best_step(r)

    def write():
        r.metrics.sync()
        checkpoint.save(r.config.run_dir, step, r.model.config, tensors, state, r.tokenizer)
        checkpoint.rotate(r.config.run_dir, r.config.keep_last, best)

    r.saving = r.background.submit(write)


def finish_saving(r: Run):
    """Waits until the checkpoint in flight is on the disk. If that failed, every rank raises its error."""
    r.rt.from_main(lambda: r.saving and r.saving.result())
    keep_best(r)


def best_step(r: Run) -> int | None:
    """Of the checkpoints there are, the one with the lowest validation loss."""
    steps = [checkpoint.step_of(p) for p in checkpoint.steps(r.config.run_dir)]
    return min((s for s in steps if s in r.metrics.vals), key=lambda s: (r.metrics.vals[s], s), default=None)


def keep_best(r: Run):
    if r.rt.is_main and (best := best_step(r)) is not None:
        checkpoint.point(r.config.run_dir, "best", best, loss=r.metrics.vals[best])


def draw(r: Run):
    try:
        plot_run.plot([r.config.run_dir], r.config.run_dir / "curves.png")
    except Exception as error:  # a picture is not worth a run
        print(f"warning: curves.png was not drawn ({type(error).__name__}: {error})", file=sys.stderr)


# ---------------------------------------------------------------------------------------
# Evaluation.


@torch.no_grad()  # not inference_mode: FSDP's buffers, made here, serve training too
def validate(r: Run) -> dict:
    """Loss (nats per token), perplexity and bits per byte of text over the first val_tokens targets.

    The same windows whatever the batch size, the number of devices or the moment."""
    r.model.eval()
    nats, targets, text_bytes = 0.0, 0, 0
    sizes = r.tokenizer.token_bytes()
    sizes = None if sizes is None else torch.tensor(sizes)
    for x, y in first_windows(r.val_data, r.config.val_tokens, r.config.batch_size, r.rt.rank, r.rt.world):
        r.poll()
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        with r.rt.autocast():
            nats += float(r.model(x.to(r.rt.device), y.to(r.rt.device)))
        y = y[y != IGNORE]
        targets += y.numel()
        text_bytes += 0 if sizes is None else int(sizes[y].sum())
    nats, targets, text_bytes = r.rt.sum(nats, targets, text_bytes)
    loss = nats / targets
    bits = nats / math.log(2) / text_bytes if text_bytes else None
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits, "targets": int(targets)}


def log_validation(r: Run):
    row = r.log("val", **validate(r))
    r.progress.say(f"step {r.step}: validation {report(row)}")
    keep_best(r)


def perplexity(loss) -> float:
    return math.exp(min(loss, 700))  # beyond that a float overflows


def report(row) -> str:
    bits = f", {row['bits_per_byte']:.4f} bits per byte" if row["bits_per_byte"] else ""
    return f"loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}{bits}"


def hellaswag(r: Run) -> dict:
    with r.rt.autocast():
        ranks = dict(rank=r.rt.rank, world=r.rt.world, reduce=r.rt.reduce, poll=r.poll)
        return hellaswag_eval.evaluate(r.model, r.tokenizer, r.examples, device=r.rt.device, **ranks)


def log_hellaswag(r: Run):
    row = r.log("hellaswag", **hellaswag(r))
    r.progress.say(f"step {r.step}: HellaSwag {hellaswag_eval.in_a_line(row)}")


def log_sample(r: Run):
    c, rt = r.config, r.rt

    def sample(poll):
        with rt.autocast():
            options = dict(max_new_tokens=64, seed=c.seed, poll=poll)
            return inference.sample_text(r.model, r.tokenizer, c.sample_prompt, inference.PRESETS["nucleus"], **options)

    # a sharded model needs all ranks for each token; they draw the same ones
    [text] = sample(r.poll) if c.fsdp else rt.from_main(lambda: sample(r.signals.check))
    r.log("sample", prompt=c.sample_prompt, text=text)
    r.progress.say(f"step {r.step}: sample: {c.sample_prompt}{text}\n")


def evaluate_only(c: TrainConfig, rt) -> dict:
    """--eval_only: every number of one checkpoint, printed and returned."""
    path = rt.from_main(lambda: checkpoint.find_checkpoint(c.checkpoint or c.run_dir))
    model, tokenizer = checkpoint.load_model(path, rt.device)
    val_data = FineWebDataset(val_directory(c), model.config.block_size, "val", tokenizer.vocab_size)
    refuse_other_tokenizer(val_data, tokenizer)
    r = Run(c, rt, tokenizer, None, val_data, None, model, model, None, None)
    result = {"checkpoint": str(path), **validate(r)}
    if rt.is_main:
        print(f"{path}: validation {report(result)}", flush=True)
    r.examples = load_hellaswag(c, rt)
    if r.examples:
        result |= hellaswag(r)
        if rt.is_main:
            print(hellaswag_eval.report(result))
    return result


# ---------------------------------------------------------------------------------------


def train(config: TrainConfig) -> dict:
    """Trains, or continues, the run that `config` describes, up to its last step.

    Returns its summary: run_dir, step, tokens, val_loss, perplexity, and `signal` if one ended it early."""
    with ExitStack() as stack:
        rt = runtime.start(config.device, config.dtype, config.timeout)
        stack.callback(runtime.stop)
        wrong = problems(replace(config, dtype=rt.dtype), rt.world)
        if wrong:
            raise UserError("; ".join(wrong))
        rt.refuse_disagreement(asdict(config))
        if config.eval_only:
            return evaluate_only(config, rt)
        r = set_up(config, rt)
        if rt.is_main:
            stack.enter_context(checkpoint.run_lock(config.run_dir))
        stack.enter_context(r.signals)
        resume(r)
        r.metrics = Metrics(config.run_dir / "metrics.jsonl", r.step, writes=rt.is_main)
        stack.callback(r.metrics.close)
        r.background = stack.enter_context(ThreadPoolExecutor(1))  # leaving it waits for the save in flight
        return run_to_end(r, stack)


def run_to_end(r: Run, stack) -> dict:
    c, rt = r.config, r.rt
    r.progress = Progress(r.step, c.max_steps, rt.is_main)
    stack.callback(r.progress.close)
    keep_best(r)  # a crash may have come between a validation and this
    summary = {"run_dir": str(c.run_dir), "signal": 0}
    if r.step >= c.max_steps and not r.due():
        r.progress.say(f"{c.run_dir}: already at step {r.step} of {c.max_steps}")
        conclude(r)
        return summary | final_values(r)
    if rt.is_main:
        describe(r)
        introduce(r)
        library = "wandb" if c.tracker == "off" and c.wandb_project else c.tracker
        if library != "off":
            r.tracker = Tracker(library, c.wandb_project or "gpt", c.wandb_run_name, c.run_dir, asdict(c))
            stack.callback(r.tracker.close)
    try:
        finish_step(r)  # the first validation; or what a restart found undone
        train_steps(r)
    except runtime.Stopped:
        if r.saved_step != r.step:
            save(r)
        summary["signal"] = max(rt.gather(r.signals.received))
    finish_saving(r)
    if summary["signal"]:
        said = f"signal {summary['signal']}: stopped after step {r.step}, saved in {c.run_dir}; run again to go on"
        r.progress.say(said)
    else:
        conclude(r)
    return summary | final_values(r)


def final_values(r: Run) -> dict:
    loss = r.metrics.vals[max(r.metrics.vals)] if r.metrics.vals else None
    known = {"val_loss": loss, "perplexity": None if loss is None else perplexity(loss)}
    return {"step": r.step, "tokens": r.tokens, **known}


def introduce(r: Run):
    c, rt = r.config, r.rt
    accumulation = c.total_batch_tokens // (c.batch_size * c.block_size * rt.world)
    tokens = c.max_steps * c.total_batch_tokens
    print(f"model      {r.model.num_parameters():,} parameters, {r.tokenizer.vocab_size:,} token vocabulary")
    print(f"data       {r.train_data.n_tokens:,} tokens in {c.data_dir}; {tokens:,} to train on"
          f" ({tokens / r.train_data.n_tokens:.2f} epochs)")  # fmt: skip
    print(f"step       {c.total_batch_tokens:,} tokens = {c.batch_size} x {c.block_size} x {accumulation} micro-steps"
          f" x {rt.world} device(s)")  # fmt: skip
    compiled = getattr(r.step_model, "module", r.step_model) is not r.model  # DDP's .module is what it wraps
    print(f"device     {rt.device}, {rt.dtype}{', compiled' if compiled else ''}")
    print(f"run        {c.run_dir}, " + (f"continued at step {r.step}" if r.step else "from the beginning"), flush=True)
    if r.changed:
        print(f"changed    {', '.join(r.changed)}", flush=True)


def conclude(r: Run):
    """What came of a run that has reached its last step, over all its sessions."""
    r.progress.close()
    if not r.rt.is_main:
        return
    c, rate, known = r.config, r.tokens / max(r.seconds, 1e-9), final_values(r)
    mfu = rate * r.model.flops_per_token() / ((r.rt.peak_flops() or math.inf) * r.rt.world)
    epochs = r.samples_seen / r.train_data.n_windows
    print(f"\nfinished   step {r.step:,}: {r.tokens:,} tokens, {epochs:.2f} epochs, {duration(r.seconds)} of training")
    print(f"speed      {rate:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else ""))
    if known["val_loss"] is not None:
        print(f"validation loss {known['val_loss']:.4f}, perplexity {known['perplexity']:.2f}")
    if "hellaswag" in r.metrics.last:
        print(f"HellaSwag  {hellaswag_eval.in_a_line(r.metrics.last['hellaswag'])}")
    print(f"kept       {c.run_dir}: checkpoints, metrics.jsonl, curves.png")
    print(f"next       python inference.py --checkpoint {c.run_dir}", flush=True)


def parse(argv=None) -> TrainConfig:
    """The configuration that a command line means: a preset, changed by the flags given."""
    parser = Parser(description="Pre-train a GPT. Defaults are those of the preset gpt2-124m.")
    for f in fields(TrainConfig):
        kind = f.type if isinstance(f.type, type) else f.type.__args__[0]  # int | None -> int
        how = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
        if f.name == "preset":
            how = {"choices": PRESETS}
        default = "" if f.default in (None, False) else f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=None, help=f.metadata["help"].replace("%", "%%") + default, **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return replace(PRESETS[given.get("preset", "gpt2-124m")], **given)


def main(argv=None) -> int:
    config = parse(argv)
    advice = (
        f"at batch_size {config.batch_size}; lower --batch_size (the result stays the same) "
        "or add --grad_checkpoint. Saved checkpoints are intact"
    )
    try:
        with runtime.memory_advice(advice):
            result = train(config)
    except RuntimeError as error:
        if not runtime.lost_peer(error):
            raise
        raise UserError(
            f"another process of this run is gone or has not answered for --timeout {config.timeout:g} seconds "
            f"({str(error).splitlines()[0]}); saved checkpoints are intact: start all processes again"
        ) from error
    if result.get("signal"):
        return 128 + result["signal"]
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
