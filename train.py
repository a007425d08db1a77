"""Pre-trains a GPT: presets, schedule, the optimizer step, and the loop in `train`.

    python train.py --preset demo                      # two minutes on a laptop, offline: corpus, training, samples
    python train.py                                    # GPT-2 124M on edu_fineweb10B/, on one device
    torchrun --nproc_per_node 8 train.py --batch_size 8  # the same batches on eight GPUs
    python train.py --run_name mine --max_steps 5000   # given again after a crash or a kill, it continues the run

What is exact: the data order and the dropout masks are computed from (seed, position). So evaluating, sampling,
saving, or being killed and started again changes no training number. The loss is the mean over all targets of the
global batch, and an update is applied only when loss and gradient are finite on every rank.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from support.cli import UserError, one_line, refuse, run  # isort: split

import torch

import checkpoint
import hellaswag_eval
import inference
from checkpoint import Position, Saver
from config import PRESETS, TrainConfig, parse, problems
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
from model import GPT
from muon import Muon
from support import runtime
from support.both_ways import refuse_wrong_products
from support.tracking import Log, perplexity, validation_in_words
from tokenizer import load_tokenizer


def lr_at(step, c: TrainConfig) -> float:
    """Learning rate of update number `step` (from 0): linear warm-up, then --schedule down to the last one.

    cosine: half a cosine from the end of the warm-up on (Loshchilov & Hutter 2017). linear: the highest rate until the
    last decay_frac of the updates, then a straight line (Hägele et al. 2024, arXiv 2405.18392)."""
    warmup = round(c.warmup_frac * c.max_steps)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    if c.schedule == "linear":
        decay = round(c.decay_frac * c.max_steps)  # updates below the highest rate
        remaining = (c.max_steps - 1 - step) / max(1, decay)  # 0 at the last update
        return c.last_lr + min(1.0, remaining) * (c.lr - c.last_lr) if decay else c.lr
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

    @cached_property  # takes seconds, and is the same for each evaluation
    def hellaswag(self):
        return hellaswag_eval.prepare(self.tokenizer, self.examples, self.val.block_size)


@dataclass
class Net:
    """What a run trains."""

    model: GPT  # the plain module: evaluates, samples, is saved
    step_model: torch.nn.Module  # the same weights, compiled and distributed: trains
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16


def open_data(c: TrainConfig, rt) -> Data:
    """All that the run reads, checked against each other; the demo's corpus is made first. UserError where something
    is missing or does not fit."""
    if c.preset == "demo" and c.data_dir == PRESETS["demo"].data_dir:
        from prepare_fineweb import prepare_demo  # here: no other run needs the preparation

        rt.from_main(lambda: prepare_demo(c.data_dir))
    find_shards(c.data_dir, "train")  # missing data is the first thing to say
    kept = Path(c.data_dir, "tokenizer")
    name = c.tokenizer or (kept if kept.is_dir() else checkpoint.origin_of(c) or "gpt2")
    tokenizer = load_tokenizer(name, c.eot_token)
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
        model = runtime.apply_fsdp(model, rt, blocks=model.h, entries=("features", "logits"))
    else:
        model = model.to(rt.device)
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[c.optimizer]
    groups = model.parameter_groups(c.weight_decay, c.lr_scale(c.embed_lr), c.lr_scale(c.vector_lr))
    optimizer = kind(groups, lr=c.lr, betas=(0.9, c.beta2), eps=1e-8, fused=rt.device.type != "mps")
    step_model = model
    if not c.fsdp and runtime.should_compile(c.compile, rt.device):
        step_model = torch.compile(step_model)  # fixed shapes only: evaluation and sampling use `model`
    if not c.fsdp:
        step_model = runtime.apply_ddp(step_model, rt)
    return Net(model, step_model, optimizer, torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == "float16"))


def describe_run(c: TrainConfig, net: Net, data: Data) -> dict:
    """What the log tells about a run besides its flags.

    A run may not change its `identity` half way: its numbers would no longer belong to one experiment."""
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


def training_batches(c: TrainConfig, rt, data: Data, at: Position) -> FineWebBatchIterator:
    """This rank's part of each global batch after the position `at`."""
    shuffle = not c.no_shuffle
    loader = FineWebDataLoader(data.train, c.batch_size, c.global_batch, c.seed, shuffle, rt.rank, rt.world)
    return FineWebBatchIterator(loader, at.samples_seen, rt.device)


def train_step(c: TrainConfig, rt, net: Net, batch, at: Position):
    """One update from one global batch: accumulate, reduce, clip, check, step.

    Returns the position after the step, and the step as started: a GPU may still be computing it. The update is not
    applied where the loss or the gradient is not finite, or where the gradient is zero."""
    if not net.model.training:
        net.step_model.train()
    loss_sum = torch.zeros((), device=rt.device)
    for micro, (x, y) in enumerate(zip(batch.x, batch.y)):
        if c.dropout:  # the masks depend on the position alone, not on random numbers used elsewhere
            torch.manual_seed(int(key64(c.seed, at.step, micro, rt.rank)[0]) % 2**63)
        with runtime.sync_gradients(net.step_model, now=micro == len(batch.x) - 1):  # at the last micro-step
            with rt.autocast():
                loss = net.step_model(x, y)
            # the sum over this micro-batch, divided by the whole global batch's count; DDP averages over ranks
            net.scaler.scale(loss * (rt.world / batch.n_targets)).backward()
        loss_sum += loss.detach()
    net.scaler.unscale_(net.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.model.parameters(), c.grad_clip or math.inf)
    norm = norm.full_tensor() if c.fsdp else norm
    sums = rt.sum(loss_sum, batch.checksum, rt.stop_asked())
    bad = ~(norm.isfinite() & sums[0].isfinite().to(norm.device)) | (norm == 0)
    lr = lr_at(at.step, c)
    for group in net.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    runtime.optimizer_step(net.optimizer, skip=bad)
    net.scaler.update()
    net.optimizer.zero_grad(set_to_none=True)
    at = Position(at.step + 1, at.samples_seen + c.global_batch, at.seconds)
    numbers = rt.read_later(torch.cat([sums, runtime.in_float64(norm, sums.device).reshape(1)]))
    return at, StartedStep(at, lr, batch.samples_seen, batch.n_targets, net.scaler.is_enabled(), numbers)


@dataclass
class StartedStep:
    """A step whose numbers the device may still be computing."""

    at: Position  # after it
    lr: float
    first: int  # number of the batch's first window
    n_targets: int
    scaled: bool  # whether fp16's scaler is on
    numbers: Callable  # waits for the device; returns sum of losses, checksum, stops asked for, gradient norm

    def read(self):
        """(numbers for the log, whether any rank wants to stop). UserError where the update was not applied.

        With fp16 an infinite gradient is no error: the scaler finds the largest usable scale by trying larger ones.
        Such a step is marked as skipped."""
        total, checksum, stop, norm = self.numbers()
        loss = total / self.n_targets
        values = {"loss": loss, "lr": self.lr, "grad_norm": norm, "checksum": int(checksum)}
        if self.scaled and math.isfinite(loss) and not math.isfinite(norm):
            return values | {"grad_norm": None, "skipped": True}, stop > 0  # JSON has no infinity
        if not (math.isfinite(loss) and math.isfinite(norm)) or norm == 0:
            raise UserError(
                f"step {self.at.step}: loss {loss}, gradient norm {norm} at lr {self.lr:.3g}, samples {self.first} to "
                f"{self.at.samples_seen - 1}; the update was not applied. Lower --lr, or look at that data"
            )
        return values, stop > 0


class StepReader:
    """Reads the numbers of training steps: on a GPU those of a step are read after the next step was started.

    Reading a loss waits until the GPU has computed it. Without the delay the GPU would then have no work until Python
    has started the next step. A CPU computes a step before `train_step` returns, so nothing is delayed there."""

    def __init__(self, delay):
        self.delay, self.unread = delay, []

    def read(self, started=None, delay=True):
        """Adds a step; returns (position, values, stop) of each step that is read now; all of them with delay=False."""
        self.unread += [started] if started else []
        keep = 1 if self.delay and delay else 0
        ready = self.unread[: len(self.unread) - keep]
        self.unread = self.unread[len(ready) :]
        return [(step.at, *step.read()) for step in ready]


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
    nats, targets, text_bytes = rt.sum(nats, targets, text_bytes).tolist()
    loss = nats / targets
    bits = nats / math.log(2) / text_bytes if text_bytes else None
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits, "targets": int(targets)}


def hellaswag(c: TrainConfig, rt, model, data: Data) -> dict:
    """Accuracies and their standard errors, as hellaswag_eval.Scores.summary gives them."""
    with rt.autocast():
        return hellaswag_eval.score_task(model, data.hellaswag, rt).summary()


def sample(c: TrainConfig, rt, model, data: Data) -> str:
    """A continuation of --sample_prompt."""

    def text(poll):
        with rt.autocast():
            how, options = inference.PRESETS["nucleus"], dict(max_new_tokens=64, seed=c.seed, poll=poll)
            return inference.sample_text(model, data.tokenizer, c.sample_prompt, how, **options)

    # under FSDP every token needs all ranks; with one seed they choose the same tokens
    [one] = text(rt.poll) if c.fsdp else rt.from_main(lambda: text(rt.signals.check))
    return one


def plot_curves(run_dir) -> float:
    """Writes curves.png from the metrics so far. Returns the moment before which it should not be drawn again, so that
    a long run, whose picture takes seconds, spends 1% of its time on it. A failure costs one warning, not the run."""
    began = time.monotonic()
    try:
        import plot_run  # here: the first step need not wait for matplotlib

        plot_run.plot([run_dir], run_dir / "curves.png")
    except Exception as error:
        print(f"warning: curves.png was not written ({type(error).__name__}: {error})", file=sys.stderr)
    return time.monotonic() + 100 * (time.monotonic() - began)


def evaluate_only(c: TrainConfig, rt) -> dict:
    """--eval_only: every number of one checkpoint, printed and returned."""
    path = rt.from_main(lambda: checkpoint.find_checkpoint(c.checkpoint or c.run_dir, c.checkpoint_dir))
    model, tokenizer = checkpoint.read_model(path, rt.device)
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
        refuse(problems(replace(c, dtype=rt.dtype), rt.world))
        rt.refuse_disagreement(asdict(c))
        if c.eval_only:
            return evaluate_only(c, rt)
        data = open_data(c, rt)
        net = build(c, rt, data.tokenizer.vocab_size)
        about = describe_run(c, net, data)
        rt.refuse_disagreement(about["identity"])
        with Log(c, rt, about) as log, Saver(c, rt, about["identity"], data.tokenizer) as saver, rt.signals:
            at = saver.resume(net)
            log.open(at, anew=saver.saved_step < 0)  # no checkpoint of this run: no row of it counts
            saver.keep_best(log)  # the last session may have ended between a validation and this
            if log.finished(at):
                log.say(f"{c.run_dir}: already at step {at.step} of {c.max_steps}")
                return log.summary(at)
            saver.check_space(net)
            log.introduce(at, saver.changed, saver.origin)
            refuse_wrong_products(net, rt, c.batch_size, c.dropout)
            reader, plot_again = StepReader(delay=rt.device.type == "cuda"), 0.0
            try:
                with training_batches(c, rt, data, at) as batches:
                    while True:  # max_steps + 1 times: the first and the last state are evaluated like any other
                        saving = saver.due(at)
                        if saving:  # before the evaluations, which take long and change nothing
                            saver.save(net, at, log)
                        if log.due("val", at):
                            log.val(validate(c, rt, net.model, data), at)
                            saver.keep_best(log)
                        if log.due("hellaswag", at):
                            log.hellaswag(hellaswag(c, rt, net.model, data), at)
                        if log.due("sample", at):
                            log.sample(sample(c, rt, net.model, data), at)
                        last = at.step >= c.max_steps
                        if saving and rt.is_main and (last or time.monotonic() >= plot_again):
                            plot_again = plot_curves(c.run_dir)
                        if last:
                            break
                        began = time.perf_counter()
                        at, started = train_step(c, rt, net, next(batches), at)
                        results = reader.read(started, delay=not (saver.due(at) or log.anything_due(at)))
                        at.seconds += time.perf_counter() - began
                        for after, values, _ in results:
                            log.train(values, after)
                        if any(stop for _, _, stop in results):
                            raise runtime.Stopped
            except runtime.Stopped:
                for after, values, _ in reader.read(delay=False):
                    log.train(values, after)
                saver.save(net, at, log)
                signal = max(rt.gather(rt.signals.received))
            saver.wait(log)
            return log.summary(at, stopped_by=signal)


def main(argv=None) -> int:
    config = parse(argv, __doc__)
    advice = (
        f"at batch_size {config.batch_size}; lower --batch_size (the global batch stays the same) "
        "or add --grad_checkpoint. Saved checkpoints are intact"
    )
    try:
        with runtime.memory_advice(advice), runtime.compile_advice():
            result = train(config)
    except RuntimeError as error:
        if not runtime.lost_peer(error):
            raise
        why = str(error).split("Exception raised from")[0].rpartition("Last error:")[2]  # NCCL's own reason, if any
        raise UserError(
            f"another process of this run is gone, has not answered for --timeout {config.timeout:g} seconds, or "
            f"cannot connect ({one_line(why)}); saved checkpoints are intact: start all processes again"
        ) from error
    if result.get("signal"):
        return 128 + result["signal"]
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
