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
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

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
from support.cli import Parser, UserError, run
from support.tracking import Log, perplexity, validation_in_words
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
    tokenizer = load_tokenizer(c.tokenizer or (kept if kept.is_dir() else "gpt2"))
    train_data = FineWebDataset(c.data_dir, c.block_size, "train", tokenizer.vocab_size)
    val_data = FineWebDataset(val_directory(c), c.block_size, "val", tokenizer.vocab_size)
    for data in (train_data, val_data):
        refuse_other_tokenizer(data, tokenizer)
    refuse_overlap(train_data, val_data)
    return Data(tokenizer, train_data, val_data, load_hellaswag(c, rt))


def val_directory(c: TrainConfig) -> str:
    beside = c.data_dir.rstrip("/\\") + "_val"
    return c.val_data_dir or (beside if Path(beside).is_dir() else c.data_dir)


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

    Returns the position after it, its row of metrics, and whether any rank wants to stop. UserError, with nothing
    updated, if the loss or the gradient is not finite."""
    net.step_model.train()
    loss_sum = torch.zeros((), device=rt.device)
    for micro, (x, y) in enumerate(zip(batch.x, batch.y)):
        # dropout's masks are a function of the position, so nothing that draws numbers elsewhere can move them
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
    total, checksum, stop = rt.sum(loss_sum, batch.checksum, rt.stop_asked())
    loss, norm, lr = total / batch.n_targets, float(norm), lr_at(at.step, c)
    # fp16's scaler finds its scale by overshooting now and then: it skips such an update itself
    if not (math.isfinite(loss) and (math.isfinite(norm) or net.scaler.is_enabled())):
        raise UserError(
            f"step {at.step + 1}: loss {loss}, gradient norm {norm} at lr {lr:.3g}, samples {batch.start} to "
            f"{batch.start + c.global_batch - 1}; the update was not applied. Lower --lr, or look at that data"
        )
    for group in net.optimizer.param_groups:
        group["lr"] = lr
    net.scaler.step(net.optimizer)
    net.scaler.update()
    net.optimizer.zero_grad(set_to_none=True)
    at = Position(at.step + 1, at.samples_seen + c.global_batch, at.seconds)
    return at, {"loss": loss, "lr": lr, "grad_norm": norm, "checksum": int(checksum)}, stop > 0


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
    with runtime.start(c.device, c.dtype, c.timeout) as rt:
        refuse_problems(c, rt)
        if c.eval_only:
            return evaluate_only(c, rt)
        if c.data_dir == PRESETS["demo"].data_dir:
            make_demo_corpus(c, rt)
        data = open_data(c, rt)
        net = build(c, rt, data.tokenizer.vocab_size)
        about = facts(c, net, data)
        rt.refuse_disagreement(about["identity"])
        with Log(c, rt, about) as log, Saver(c, rt, about["identity"], data.tokenizer) as saver, rt.signals:
            at = saver.resume(net)
            log.open(at)
            saver.keep_best(log)  # a crash may have come between a validation and this
            if log.finished(at):  # then nothing is written, and no data is read ahead
                log.say(f"{c.run_dir}: already at step {at.step} of {c.max_steps}")
                return log.summary(at)
            log.begin(at, saver.changed)
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
                        at, row, stop = train_step(c, rt, net, next(batches), at)
                        at.seconds += time.perf_counter() - began
                        log.train(row, at)
                        if stop:
                            raise runtime.Stopped
            except runtime.Stopped:
                saver.save(net, at, log)
                signal = max(rt.gather(rt.signals.received))
            saver.wait(log)
            return log.summary(at, stopped_by=signal)


def refuse_problems(c: TrainConfig, rt):
    """UserError on every rank with all that is wrong with the flags, or where the ranks have different ones."""
    wrong = problems(replace(c, dtype=rt.dtype), rt.world)
    if wrong:
        raise UserError("; ".join(wrong))
    rt.refuse_disagreement(asdict(c))


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
