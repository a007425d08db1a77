"""Pre-trains a GPT: presets, schedule, the optimizer step, and the loop in `train`.

    python train.py --preset demo                      # two minutes on a laptop, offline: corpus, training, samples
    python train.py                                    # GPT-2 124M on edu_fineweb10B/, on one device
    torchrun --nproc_per_node 8 train.py               # the same run on eight GPUs
    python train.py --run_name mine --max_steps 5000   # given again after a crash or a kill, it continues the run

What is exact: the data order and the dropout masks are computed from (seed, position). So evaluating, sampling,
saving, or being killed and started again changes no training number. The loss is the mean over all targets of the
global batch, and an update is applied only when loss and gradient are finite on every rank.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from support.cli import UserError, did_you_mean, flag, range_problems, read_flags, refuse, run, type_problems  # isort: split

import torch

import checkpoint
import hellaswag_eval
import inference
import plot_run
from checkpoint import Position, Saver
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
from support import runtime
from support.files import read_json
from support.tracking import Log, perplexity, validation_in_words
from tokenizer import load_tokenizer

# ---------------------------------------------------------------------------------------
# Configuration. Every field is a flag.

# What each preset changes of the defaults below.
PRESET_VALUES = {
    # FineWeb-Edu's 10B-token sample, once.
    "gpt2-124m": dict(min_lr=6e-5),
    # The same model on half the tokens. What each change gained at small scale: benchmarks/RESULTS.md.
    "fast-124m": dict(dropout=0.0, optimizer="muon", lr=2.4e-3, min_lr=2.4e-4, max_steps=76_294),
    # From nothing, offline, in about two minutes on two cores: Python's own documentation, see prepare_fineweb.
    "demo": dict(
        data_dir="demo_corpus", block_size=128, n_layer=4, n_head=4, n_embd=128, dropout=0.0, max_steps=600,
        batch_size=16, total_batch_tokens=2048, optimizer="muon", lr=1e-2, min_lr=2.5e-4, eval_interval=100,
        val_tokens=20_480, hellaswag_interval=0, sample_interval=300, sample_prompt="The", save_interval=100,
    ),
    # A few MB of your own text and a CPU: prepare_fineweb.py --train_tokenizer 16384 --out_dir my_corpus.
    "small": dict(
        data_dir="my_corpus", block_size=256, n_layer=6, n_head=6, n_embd=192, max_steps=600, batch_size=16,
        total_batch_tokens=4096, optimizer="muon", lr=5e-3, min_lr=2.5e-4, eval_interval=100, val_tokens=65_536,
        hellaswag_interval=0, sample_interval=300, sample_prompt="", save_interval=100,
    ),
}  # fmt: skip


@dataclass(frozen=True, init=False)
class TrainConfig:
    """One run. TrainConfig("demo", lr=1e-3) is what `--preset demo --lr 1e-3` is: a preset, changed by what is given.

    Paths may be given as Path; they are stored as str. UserError for an unknown preset."""

    preset: str = flag("gpt2-124m", "set of values that the other flags change", unit="name",
                       choices=tuple(PRESET_VALUES), group="the run and its data")  # fmt: skip
    run_name: str | None = flag(
        None,
        "the run's directory; where that run exists and no --preset is given, it continues with the flags and data "
        "that its run.json remembers; default: the preset's name",
        unit="name",
    )
    checkpoint_dir: str = flag(checkpoint.DEFAULT_DIR, "directory of all runs", unit="folder")
    data_dir: str = flag("edu_fineweb10B", "training shards", unit="folder")
    val_data_dir: str | None = flag(
        None, "validation shards; default: data_dir + _val, or data_dir's own", unit="folder"
    )
    tokenizer: str | None = flag(
        None, "folder, file or hub name; default: the one kept with the shards, else gpt2", unit="name"
    )
    eot_token: str | None = flag(
        None, "the token that ends a text; default: what the tokenizer's own files say", unit="token"
    )

    block_size: int = flag(1024, "context length", at_least=1, unit="tokens", group="model")
    n_layer: int = flag(12, "number of blocks", at_least=1)
    n_head: int = flag(12, "attention heads per block", at_least=1)
    n_embd: int = flag(768, "channels of the residual stream", at_least=1)
    dropout: float = flag(0.1, "probability of dropping an activation", at_least=0, below=1)
    bias: bool = flag(False, "biases in Linear and LayerNorm")
    norm: str = flag("layernorm", "normalization", unit="name", choices=("layernorm", "rmsnorm"))
    rope_theta: float = flag(10000.0, "base of RoPE's wavelengths", above=0)

    max_steps: int = flag(152_587, "optimizer steps", at_least=1, unit="steps", group="optimization")
    batch_size: int = flag(
        16, "per micro-batch and device; the flag to lower when memory runs out", at_least=1, unit="sequences"
    )
    total_batch_tokens: int = flag(
        65_536, "per optimizer step over all devices; sets the accumulation", at_least=1, unit="tokens"
    )
    optimizer: str = flag(
        "adamw", "muon is for the matrices inside the blocks, with adamw for the rest", unit="name",
        choices=("adamw", "muon"),
    )  # fmt: skip
    lr: float = flag(6e-4, "highest learning rate", at_least=0)
    min_lr: float | None = flag(None, "learning rate at the last step; default: a tenth of --lr", at_least=0)
    warmup_frac: float = flag(0.06, "share of the steps with rising learning rate", at_least=0, below=1)
    weight_decay: float = flag(0.1, "AdamW's, on matrices only", at_least=0)
    beta2: float = flag(0.95, "AdamW's decay of squared gradients", at_least=0, below=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)

    # an interval of 0 turns a thing off, and the last step counts as due
    eval_interval: int = flag(2000, "between validations; 0: never", at_least=0, unit="steps",
                              group="evaluation and saving")  # fmt: skip
    val_tokens: int = flag(
        5_242_880, "validated on, from the start of the validation shards", at_least=1, unit="tokens"
    )
    hellaswag_interval: int = flag(10_000, "between HellaSwag evaluations; 0: never", at_least=0, unit="steps")
    hellaswag_data: str | None = flag(None, "HellaSwag on this machine; default: downloaded once", unit="file")
    hellaswag_limit: int | None = flag(None, "used of HellaSwag; default: all 10,042", at_least=1, unit="examples")
    sample_interval: int = flag(10_000, "between samples; 0: never", at_least=0, unit="steps")
    sample_prompt: str = flag("The most important", "what samples continue", unit="text")
    save_interval: int = flag(2000, "between checkpoints; 0: only the last", at_least=0, unit="steps")
    keep_last: int = flag(2, "newest checkpoints kept, besides the best", at_least=1)
    eval_only: bool = flag(False, "evaluate --checkpoint, or the run's newest, and stop")
    checkpoint: str | None = flag(
        None, "with --eval_only: a run or one checkpoint; the run's own data is used", unit="folder"
    )

    resume: str = flag("auto", "auto: continue the run if it exists; never: refuse if it does; PATH: from that one",
                       unit="path", group="how it runs")  # fmt: skip
    seed: int = flag(1337, "of weights, data order and dropout")
    no_shuffle: bool = flag(False, "read the data in its stored order")
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first of them there is", unit="name")
    dtype: str = flag("auto", "of matrix products; auto: what the device is best at", unit="name",
                      choices=("auto", *runtime.DTYPES))  # fmt: skip
    compile: str = flag("auto", "torch.compile the training step; auto: on CUDA with Triton", unit="when",
                        choices=("auto", "on", "off"))  # fmt: skip
    deterministic: bool = flag(False, "on CUDA: the same bits whenever the same run is repeated or resumed; slower")
    fsdp: bool = flag(False, "shard weights, gradients and optimizer state: for models that outgrow one device")
    timeout: float = flag(1800.0, "that a process waits for another before the run fails", at_least=1, unit="seconds")
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, about a third slower")

    tracker: str = flag("off", "also log to wandb, or to trackio, a local dashboard", unit="name",
                        choices=("off", "wandb", "trackio"), group="trackers")  # fmt: skip
    wandb_project: str | None = flag(
        None, "project there, and wandb if no --tracker is named; default: gpt", unit="name"
    )
    wandb_run_name: str | None = flag(None, "name of the run there; default: run_name", unit="name")

    def __init__(self, preset="gpt2-124m", **given):
        known = {f.name: f.default for f in fields(self)}
        if str(preset) not in PRESET_VALUES:
            wrong = f"preset {preset!r} does not exist; there are {', '.join(PRESET_VALUES)}"
            raise UserError(wrong + did_you_mean(preset, PRESET_VALUES))
        if unknown := given.keys() - known.keys():
            raise TypeError(f"TrainConfig has no {', '.join(sorted(unknown))}")
        values = known | PRESET_VALUES[preset] | {"preset": preset}
        if "lr" in given:  # the preset's last learning rate belongs to the preset's highest
            values["min_lr"] = None
        for name, value in (values | given).items():
            object.__setattr__(self, name, os.fspath(value) if isinstance(value, os.PathLike) else value)

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoint_dir) / (self.run_name or self.preset)

    @property
    def last_lr(self) -> float:
        """Learning rate at the last step: min_lr, or a tenth of lr."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.total_batch_tokens // self.block_size

    def model_config(self, valid_vocab_size) -> GPTConfig:
        """The model's part, with embedding rows padded to a multiple of 64."""
        own = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)}
        return GPTConfig(vocab_size=-(-valid_vocab_size // 64) * 64, valid_vocab_size=valid_vocab_size, **own)


PRESETS = {name: TrainConfig(name) for name in PRESET_VALUES}


def problems(c: TrainConfig, world=None) -> list[str]:
    """Everything wrong with the arguments, a line each, before any work; [] if nothing.

    `world` is the number of devices; None takes torchrun's."""
    world = world or int(os.environ.get("WORLD_SIZE", 1))
    found = type_problems(c)
    if found:
        return found
    found = range_problems(c) + [p for p in c.model_config(1).problems() if "must be" not in p]  # ranges are said
    found += [f"--{name} is {value!a}; it must be UTF-8 text" for name, value in vars(c).items() if not is_text(value)]
    if c.last_lr > c.lr:
        found.append(f"--min_lr is {c.min_lr}; it must not exceed --lr ({c.lr})")
    if not c.eval_only:
        found += batch_problems(c, world)
    if c.fsdp and (world == 1 or c.dtype == "float16" or c.compile == "on"):
        found.append("--fsdp is for several processes (torchrun), float32 or bfloat16, no --compile on; or --no_fsdp")
    if c.checkpoint and not c.eval_only:
        found.append("--checkpoint goes with --eval_only; to continue a run from a checkpoint use --resume")
    return found


def is_text(value) -> bool:
    """False for text with a byte that was not UTF-8: it can be shown and written nowhere."""
    return not isinstance(value, str) or value.encode(errors="replace").decode() == value


def batch_problems(c: TrainConfig, world) -> list[str]:
    """[] if the micro-batches of all devices fill the global batch; else one line, with the sizes that do."""
    tokens = c.batch_size * c.block_size * world
    if tokens <= 0 or c.total_batch_tokens % tokens == 0:
        return []
    rows, rest = divmod(c.total_batch_tokens, c.block_size * world)  # sequences of one device in a step
    if rest == 0:
        sizes = [n for n in range(1, min(rows, 4096) + 1) if rows % n == 0]
        flag_name, good = "batch_size", sorted(sorted(sizes, key=lambda n: abs(n - c.batch_size))[:4])
    else:
        below = c.total_batch_tokens // tokens * tokens
        flag_name, good = "total_batch_tokens", [n for n in (below, below + tokens) if n]
    return [
        f"--total_batch_tokens {c.total_batch_tokens:,} does not divide by batch_size {c.batch_size} x block_size "
        f"{c.block_size} x {world} device(s) = {tokens:,}; --{flag_name} could be {', '.join(map(str, good))}"
    ]


def lr_at(step, c: TrainConfig) -> float:
    """Learning rate of update number `step` (from 0): linear warm-up, then half a cosine down to the last one."""
    warmup = round(c.warmup_frac * c.max_steps)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, c.max_steps - 1 - warmup)  # 1 at the last update
    return c.last_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (c.lr - c.last_lr)


# ---------------------------------------------------------------------------------------
# What a run works on.


@dataclass
class Data:
    """What a run reads."""

    tokenizer: object
    train: FineWebDataset | None  # None where nothing is trained
    val: FineWebDataset
    examples: list | None  # HellaSwag's; None where they are never evaluated


@dataclass
class Net:
    """What a run trains."""

    model: GPT  # the plain module: evaluates, samples, is saved
    step_model: torch.nn.Module  # the same weights, compiled and distributed: trains
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16


def make_demo_corpus(c: TrainConfig, rt):
    from prepare_fineweb import prepare_demo  # here: no other run needs the preparation

    rt.from_main(lambda: prepare_demo(c.data_dir))


def open_data(c: TrainConfig, rt) -> Data:
    """All that the run reads, checked against each other. UserError where something is missing or does not fit."""
    find_shards(c.data_dir, "train")  # missing data is the first thing to say
    kept = Path(c.data_dir, "tokenizer")
    tokenizer = load_tokenizer(c.tokenizer or (kept if kept.is_dir() else "gpt2"), c.eot_token)
    refuse_long_prompt(c, tokenizer)
    train_data = FineWebDataset(c.data_dir, c.block_size, "train", tokenizer.vocab_size)
    val_data = FineWebDataset(val_directory(c), c.block_size, "val", tokenizer.vocab_size)
    for data in (train_data, val_data):
        refuse_other_tokenizer(data, tokenizer)
    refuse_overlap(train_data, val_data)
    return Data(tokenizer, train_data, val_data, load_hellaswag(c, rt))


def val_directory(c: TrainConfig) -> str:
    beside = c.data_dir.rstrip("/\\") + "_val"
    return c.val_data_dir or (beside if Path(beside).is_dir() else c.data_dir)


def refuse_long_prompt(c: TrainConfig, tokenizer):
    """UserError before the first step, not at the first sample."""
    tokens = len(tokenizer.encode(c.sample_prompt)) if c.sample_interval else 0
    if tokens > c.block_size:
        raise UserError(
            f"--sample_prompt {c.sample_prompt!r} has {tokens} tokens, and the context --block_size {c.block_size}; "
            "give a shorter one, or --sample_interval 0"
        )


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


def build(c: TrainConfig, rt, valid_vocab_size) -> Net:
    """The network of a run at step 0; its weights are a function of the seed and the model's configuration."""
    torch.manual_seed(c.seed)
    model = GPT(c.model_config(valid_vocab_size))
    model.grad_checkpoint = c.grad_checkpoint
    if c.fsdp:  # evaluation and sampling enter the model by features and logits
        model = runtime.shard(model, rt, blocks=model.h, entries=("features", "logits"))
    else:
        model = model.to(rt.device)
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[c.optimizer]
    optimizer = kind(
        model.parameter_groups(c.weight_decay), lr=c.lr, betas=(0.9, c.beta2), eps=1e-8, fused=rt.device.type != "mps"
    )
    step_model = model
    if c.compile == "on":
        runtime.refuse_to_compile(rt.device)
    if c.compile == "on" or (c.compile == "auto" and runtime.compiles(rt.device) and not c.fsdp):
        step_model = torch.compile(step_model)  # fixed shapes only: evaluation and sampling use `model`
    if not c.fsdp:
        step_model = runtime.replicate(step_model, rt)
    return Net(model, step_model, optimizer, torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == "float16"))


def facts(c: TrainConfig, net: Net, data: Data) -> dict:
    """What the log tells of a run besides its flags.

    `identity` is what a run may not change half way: the numbers would no longer belong to one experiment."""
    identity = {
        **asdict(net.model.config),
        "optimizer": c.optimizer,
        "seed": c.seed,
        "no_shuffle": c.no_shuffle,
        "data": data.train.fingerprint(),
        "tokenizer": data.tokenizer.fingerprint(),
    }
    inside = getattr(net.step_model, "module", net.step_model)  # of DDP
    return {
        "identity": identity,
        "parameters": net.model.num_parameters(),
        "flops_per_token": net.model.flops_per_token(),
        "vocab_size": data.tokenizer.vocab_size,
        "training_tokens": data.train.n_tokens,
        "n_windows": data.train.n_windows,
        "compiled": inside is not net.model,
    }


# ---------------------------------------------------------------------------------------
# A step.


def train_step(c: TrainConfig, rt, net: Net, batch, at: Position):
    """One update from one global batch: accumulate, reduce, clip, check, step.

    Returns the position after it and the step, launched: on a GPU the work may still be going on, and `Launched.read`
    waits for its numbers. Nothing is updated from a loss or a gradient that is not finite, or from one of zeros."""
    if not net.model.training:
        net.step_model.train()
    loss_sum = torch.zeros((), device=rt.device)
    for micro, (x, y) in enumerate(zip(batch.x, batch.y)):
        if c.dropout:  # the masks are a function of the position, so nothing that draws numbers elsewhere can move them
            torch.manual_seed(int(key64(c.seed, at.step, micro, rt.rank)[0]) % 2**63)
        with runtime.sync_gradients(net.step_model, now=micro == len(batch.x) - 1):  # once a step
            with rt.autocast():
                loss = net.step_model(x, y)
            # the sum over this micro-batch, divided by the whole global batch's count; DDP averages over ranks
            net.scaler.scale(loss * (rt.world / batch.n_targets)).backward()
        loss_sum += loss.detach()
    net.scaler.unscale_(net.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.model.parameters(), c.grad_clip or math.inf)
    norm = norm.full_tensor() if c.fsdp else norm
    sums = rt.sum_later(loss_sum, batch.checksum, rt.stop_asked())
    bad = ~(norm.isfinite() & sums[0].isfinite().to(norm.device)) | (norm == 0)
    lr = lr_at(at.step, c)
    for group in net.optimizer.param_groups:
        group["lr"] = lr
    runtime.update(net.optimizer, skip=bad)
    net.scaler.update()
    net.optimizer.zero_grad(set_to_none=True)
    at = Position(at.step + 1, at.samples_seen + c.global_batch, at.seconds)
    numbers = rt.read_later(torch.cat([sums, norm.to(sums).reshape(1)]))
    return at, Launched(at, lr, batch.start, batch.n_targets, net.scaler.is_enabled(), numbers)


@dataclass
class Launched:
    """A step whose numbers may not be known yet."""

    at: Position  # after it
    lr: float
    start: int  # number of the batch's first window
    n_targets: int
    scaled: bool  # whether fp16's scaler is on
    numbers: Callable  # waits for the device; returns sum of losses, checksum, stops asked for, gradient norm

    def read(self):
        """(row of metrics, whether any rank wants to stop). UserError where the step was not applied; but fp16's
        scaler finds its scale by overshooting now and then, and that step is only marked as skipped."""
        total, checksum, stop, norm = self.numbers()
        loss = total / self.n_targets
        row = {"loss": loss, "lr": self.lr, "grad_norm": norm, "checksum": int(checksum)}
        if self.scaled and math.isfinite(loss) and not math.isfinite(norm):
            return row | {"grad_norm": None, "skipped": True}, stop > 0  # JSON has no infinity
        if not (math.isfinite(loss) and math.isfinite(norm)) or norm == 0:
            raise UserError(
                f"step {self.at.step}: loss {loss}, gradient norm {norm} at lr {self.lr:.3g}, samples {self.start} to "
                f"{self.at.samples_seen - 1}; the update was not applied. Lower --lr, or look at that data"
            )
        return row, stop > 0


def refuse_wrong_products(c: TrainConfig, rt, net: Net):
    """UserError where one micro-batch has another loss or gradient than in the plain way: eager, and on MPS in float32.

    torch 2.11 compiled the gradients of an earlier version of this model to zeros, and on MPS it had wrong products in
    half precision (pytorch issue 180776); the loss looked right. Nothing of this is left behind."""
    step_model = getattr(net.step_model, "module", net.step_model)  # DDP's
    half = rt.device.type == "mps" and rt.dtype != "float32"
    if step_model is net.model and not half:
        return
    tokens = (
        torch.arange(c.batch_size * (c.block_size + 1), device=rt.device) * 7919 % net.model.config.valid_vocab_size
    )
    tokens = tokens.view(c.batch_size, -1)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def both(model, precision):
        with precision:
            loss = model(x, y) / y.numel()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.model.parameters()])
        net.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    net.step_model.train()
    kept = net.model.grad_checkpoint
    with torch.random.fork_rng([rt.device] if rt.device.type == "cuda" else []):
        loss, norm = both(step_model, rt.autocast())
        net.model.grad_checkpoint = True  # the eager way takes more memory, so it keeps less
        try:
            plain_loss, plain_norm = both(net.model, nullcontext() if half else rt.autocast())
        finally:
            net.model.grad_checkpoint = kept
    far = 0.5 if c.dropout else 0.02 if rt.dtype == "float32" else 0.1  # dropout: other masks in each way
    if not (plain_norm / (1 + far) <= norm <= plain_norm * (1 + far) and abs(loss - plain_loss) <= far * plain_loss):
        raise UserError(
            f"torch {torch.__version__} computes a wrong training step here: loss {loss:.4f} and gradient norm "
            f"{norm:.4g}, where {'float32' if half else 'eager code'} gives {plain_loss:.4f} and {plain_norm:.4g}; "
            f"add {'--dtype float32' if half else '--compile off'}, or use another version of torch"
        )


# ---------------------------------------------------------------------------------------
# Evaluation: numbers out, nothing printed, no training number moved.


@torch.no_grad()  # not inference_mode: FSDP's buffers, made here, serve training too
def validate(c: TrainConfig, rt, model, data: Data) -> dict:
    """Loss (nats per token), perplexity and bits per byte of text over the first val_tokens targets.

    The same windows whatever the batch size, the number of devices or the moment."""
    model.eval()
    nats, targets, text_bytes = 0.0, 0, 0
    sizes = data.tokenizer.token_bytes()
    sizes = None if sizes is None else torch.tensor(sizes)
    for x, y in first_windows(data.val, c.val_tokens, c.batch_size, rt.rank, rt.world):
        rt.poll()
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        with rt.autocast():
            nats += float(model(x.to(rt.device), y.to(rt.device)))
        y = y[y != IGNORE]
        targets += y.numel()
        text_bytes += 0 if sizes is None else int(sizes[y].sum())
    nats, targets, text_bytes = rt.sum(nats, targets, text_bytes)
    loss = nats / targets
    bits = nats / math.log(2) / text_bytes if text_bytes else None
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits, "targets": int(targets)}


def hellaswag(c: TrainConfig, rt, model, data: Data) -> dict:
    """Accuracies and their standard errors, as hellaswag_eval.Scores.summary gives them."""
    with rt.autocast():
        ranks = dict(rank=rt.rank, world=rt.world, reduce=rt.reduce, poll=rt.poll)
        return hellaswag_eval.evaluate(model, data.tokenizer, data.examples, device=rt.device, **ranks)


def sample(c: TrainConfig, rt, model, data: Data) -> str:
    """A continuation of --sample_prompt."""

    def text(poll):
        with rt.autocast():
            how, options = inference.PRESETS["nucleus"], dict(max_new_tokens=64, seed=c.seed, poll=poll)
            return inference.sample_text(model, data.tokenizer, c.sample_prompt, how, **options)

    # a sharded model needs all ranks for each token; they draw the same ones
    [one] = text(rt.poll) if c.fsdp else rt.from_main(lambda: text(rt.signals.check))
    return one


def draw(run_dir):
    """The curves so far, as curves.png."""
    try:
        plot_run.plot([run_dir], run_dir / "curves.png")
    except Exception as error:  # a picture is not worth a run
        print(f"warning: curves.png was not drawn ({type(error).__name__}: {error})", file=sys.stderr)


def evaluate_only(c: TrainConfig, rt) -> dict:
    """--eval_only: every number of one checkpoint, printed and returned."""
    path = rt.from_main(lambda: checkpoint.find_checkpoint(c.checkpoint or c.run_dir))
    model, tokenizer = checkpoint.load_model(path, rt.device)
    val_data = FineWebDataset(val_directory(c), model.config.block_size, "val", tokenizer.vocab_size)
    refuse_other_tokenizer(val_data, tokenizer)
    data = Data(tokenizer, None, val_data, load_hellaswag(c, rt))
    result = {"checkpoint": str(path), **validate(c, rt, model, data)}
    if rt.is_main:
        print(f"{path}: validation {validation_in_words(result)}", flush=True)
    if data.examples:
        result |= hellaswag(c, rt, model, data)
        if rt.is_main:
            print(hellaswag_eval.report(result))
    return result


# ---------------------------------------------------------------------------------------
# The run.


def train(config: TrainConfig) -> dict:
    """Trains, or continues, the run that `config` describes, up to its last step.

    Returns its summary: run_dir, step, tokens, val_loss, perplexity, and `signal` if one ended it early."""
    c, signal = config, 0
    with runtime.start(c.device, c.dtype, c.timeout, c.deterministic) as rt:
        refuse_problems(c, rt)
        if c.eval_only:
            return evaluate_only(c, rt)
        if c.preset == "demo" and c.data_dir == PRESETS["demo"].data_dir:
            make_demo_corpus(c, rt)
        data = open_data(c, rt)
        net = build(c, rt, data.tokenizer.vocab_size)
        about = facts(c, net, data)
        rt.refuse_disagreement(about["identity"])
        with Log(c, rt, about) as log, Saver(c, rt, about["identity"], data.tokenizer) as saver, rt.signals:
            at = saver.resume(net)
            log.open(at, anew=saver.from_other)
            saver.keep_best(log)  # a crash may have come between a validation and this
            if log.finished(at):  # then nothing is written, and no data is read ahead
                log.say(f"{c.run_dir}: already at step {at.step} of {c.max_steps}")
                return log.summary(at)
            saver.check_space(net)
            log.begin(at, saver.changed)
            refuse_wrong_products(c, rt, net)
            launched = []  # steps whose numbers are not read yet
            order = (c.batch_size, c.global_batch, c.seed, not c.no_shuffle, rt.rank, rt.world)
            loader = FineWebDataLoader(data.train, *order)
            try:
                with FineWebBatchIterator(loader, at.samples_seen, rt.device) as batches:
                    while True:  # max_steps + 1 times: the first and the last state are evaluated like any other
                        saving = saver.due(at)
                        if saving:  # first: what follows may take long, and changes nothing
                            saver.save(net, at, log)
                        if log.due("val", at):
                            log.val(validate(c, rt, net.model, data), at)
                            saver.keep_best(log)
                        if log.due("hellaswag", at):
                            log.hellaswag(hellaswag(c, rt, net.model, data), at)
                        if log.due("sample", at):
                            log.sample(sample(c, rt, net.model, data), at)
                        if saving and rt.is_main:
                            draw(c.run_dir)
                        if at.step >= c.max_steps:
                            break
                        began = time.perf_counter()
                        at, step = train_step(c, rt, net, next(batches), at)
                        launched.append(step)
                        # on a GPU the numbers of a step are read while it works on the next, unless something is due
                        unread = rt.device.type == "cuda" and not (saver.due(at) or log.anything_due(at))
                        known = [launched.pop(0) for _ in range(len(launched) - unread)]
                        read = [step.read() for step in known]
                        at.seconds += time.perf_counter() - began
                        for step, (row, _) in zip(known, read):
                            log.train(row, step.at)
                        if any(stop for _, stop in read):
                            raise runtime.Stopped
            except runtime.Stopped:
                for step in launched:
                    log.train(step.read()[0], step.at)
                saver.save(net, at, log)
                signal = max(rt.gather(rt.signals.received))
            saver.wait(log)
            return log.summary(at, stopped_by=signal)


def refuse_problems(c: TrainConfig, rt):
    """UserError on every rank with all that is wrong with the flags, or where the ranks have different ones."""
    refuse(problems(replace(c, dtype=rt.dtype), rt.world))
    rt.refuse_disagreement(asdict(c))


EXAMPLES = [
    "python train.py --preset demo                    # two minutes, offline, from nothing",
    "python train.py --run_name demo --max_steps 900  # continue that run, with its own flags and data",
]
NOT_REMEMBERED = ("run_name", "checkpoint_dir", "resume", "eval_only", "checkpoint")


def parse(argv=None) -> TrainConfig:
    """The configuration that a command line means: a preset, or what the named run remembers, changed by the flags
    given. UserError with everything that is wrong."""
    given = read_flags(TrainConfig, argv, "Pre-train a GPT.", EXAMPLES)
    config = TrainConfig(**remembered(given) | given)
    refuse(problems(config))
    return config


def remembered(given: dict) -> dict:
    """The flags that run.json holds of the run that is continued (--run_name) or evaluated (--checkpoint), where
    there is one and no --preset is given. Says in one line which of them are not the preset's."""
    if "preset" in given:  # names all values anew
        return {}
    if given.get("eval_only") and "checkpoint" in given:
        path = checkpoint.find_checkpoint(given["checkpoint"]).resolve().parent / "run.json"
    elif "run_name" in given and is_text(given["run_name"]):
        path = TrainConfig(**given).run_dir / "run.json"
    else:
        return {}
    if not path.is_file():
        return {}
    config = read_json(path).get("config")
    if not isinstance(config, dict):
        raise UserError(f"{path}: no configuration in it; with --preset NAME it is not read")
    known = {f.name for f in fields(TrainConfig)} - {*NOT_REMEMBERED}
    kept = {name: value for name, value in config.items() if name in known}
    preset = TrainConfig(kept.get("preset", "gpt2-124m"))
    if "lr" in given and kept.get("min_lr") == preset.min_lr:
        kept["min_lr"] = None  # nobody chose it; a tenth of the new one
    if given.get("eval_only"):
        kept["fsdp"] = False  # which serves training alone
    news = [f"{k} {v}" for k, v in kept.items() if k not in given and v not in (None, getattr(preset, k))]
    if os.environ.get("RANK", "0") == "0":
        print(f"remembered {', '.join([f'preset {preset.preset}', *news])} (from {path})", flush=True)
    return kept


def main(argv=None) -> int:
    config = parse(argv)
    advice = (
        f"at batch_size {config.batch_size}; lower --batch_size (the result stays the same) "
        "or add --grad_checkpoint. Saved checkpoints are intact"
    )
    try:
        with runtime.memory_advice(advice), runtime.compile_advice():
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
