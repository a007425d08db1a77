"""What a training run is: the flags of train.py with their ranges, the presets, and the command line.

Every field of `TrainConfig` is a flag. A preset is a set of values that the flags given change.
"""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from support.cli import UserError, did_you_mean, flag, range_problems, read_flags, refuse, type_problems  # isort: split

import checkpoint
from model import GPTConfig
from support import runtime
from support.files import read_json

# What each preset changes of the defaults below.
PRESET_VALUES = {
    # FineWeb-Edu's 10B-token sample, once.
    "gpt2-124m": dict(min_lr=6e-5),
    # GPT-2's other sizes, on the same recipe. Learning rate: that of the nearest size in table 2.1 of GPT-3 (Brown et
    # al. 2020), where 125M has the 6e-4 of gpt2-124m; a larger model needs smaller steps. batch_size: the largest power
    # of two up to 16 that leaves a seventh of an 80 GB card free, by GPT.training_bytes: 25, 47 and 56 GB.
    "gpt2-350m": dict(n_layer=24, n_head=16, n_embd=1024, lr=3e-4),
    "gpt2-774m": dict(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4),
    "gpt2-1558m": dict(n_layer=48, n_head=25, n_embd=1600, lr=2e-4, batch_size=8),
    # The same model as gpt2-124m on half the tokens. What each change gained at small scale: benchmarks/RESULTS.md.
    "fast-124m": dict(
        dropout=0.0, optimizer="muon", lr=2.4e-3, min_lr=0.0, schedule="linear", decay_frac=0.7, max_steps=76_294,
    ),
    # From nothing, offline, in about two minutes on two cores: Python's own documentation, see prepare_fineweb. In
    # float32, which is faster than bfloat16 for matrices this small, and gives all machines nearly the same numbers.
    "demo": dict(
        data_dir="demo_corpus", block_size=128, n_layer=4, n_head=4, n_embd=128, dropout=0.0, max_steps=600,
        batch_size=16, total_batch_tokens=2048, optimizer="muon", lr=1e-2, min_lr=2.5e-4, eval_interval=100,
        val_tokens=20_480, hellaswag_interval=0, sample_interval=300, sample_prompt="The", save_interval=100,
        dtype="float32",
    ),
    # A few MB of your own text and a CPU: prepare_fineweb.py --train_tokenizer 4096 --out_dir my_corpus.
    "small": dict(
        data_dir="my_corpus", block_size=256, n_layer=6, n_head=6, n_embd=192, max_steps=600, batch_size=16,
        total_batch_tokens=4096, optimizer="muon", lr=5e-3, min_lr=0.0, schedule="linear", decay_frac=0.7,
        eval_interval=100, val_tokens=65_536, hellaswag_interval=0, sample_interval=300, sample_prompt="",
        save_interval=100,
    ),
}  # fmt: skip


@dataclass(frozen=True, init=False)
class TrainConfig:
    """One run. TrainConfig("demo", lr=1e-3) is what `--preset demo --lr 1e-3` is: a preset, changed by what is given.

    Paths may be given as Path; they are stored as str. UserError for an unknown preset."""

    preset: str = flag("gpt2-124m", "set of values that the other flags change", unit="name",
                       choices=tuple(PRESET_VALUES), group="the run and its data")  # fmt: skip
    run_name: str | None = flag(None, "the run's directory; where that run exists and no --preset is given, it"
        " continues with the flags of its run.json; default: the preset's name", unit="name")  # fmt: skip
    checkpoint_dir: str = flag(checkpoint.DEFAULT_DIR, "directory of all runs", unit="folder")
    data_dir: str = flag("edu_fineweb10B", "training shards", unit="folder")
    val_data_dir: str | None = flag(None, "validation shards; default: DATA_DIR_val, or data_dir's own", unit="folder")
    tokenizer: str | None = flag(None, "folder, file or hub name; default: the shards' own, else gpt2", unit="name")
    eot_token: str | None = flag(None, "the token that ends a text; default: the tokenizer's own", unit="token")

    block_size: int = flag(1024, "context length", at_least=1, unit="tokens", group="model")
    n_layer: int = flag(12, "number of blocks", at_least=1)
    n_head: int = flag(12, "attention heads per block", at_least=1)
    n_embd: int = flag(768, "channels of the residual stream", at_least=1)
    dropout: float = flag(0.1, "probability of dropping an activation", at_least=0, below=1)
    bias: bool = flag(False, "biases in Linear and LayerNorm")
    norm: str = flag("layernorm", "normalization", unit="name", choices=("layernorm", "rmsnorm"))
    rope_theta: float = flag(10000.0, "base of RoPE's wavelengths", above=0)

    max_steps: int = flag(152_587, "optimizer steps", at_least=1, unit="steps", group="optimization")
    batch_size: int = flag(16, "per micro-batch and device; lower it if memory runs out", at_least=1, unit="sequences")
    total_batch_tokens: int = flag(65_536, "per step, all devices; sets the accumulation", at_least=1, unit="tokens")
    optimizer: str = flag("adamw", "muon is for the matrices inside the blocks, with adamw for the rest", unit="name",
                          choices=("adamw", "muon"))  # fmt: skip
    lr: float = flag(6e-4, "highest learning rate", at_least=0)
    embed_lr: float | None = flag(None, "of embedding and output head, scheduled like lr; default: --lr", at_least=0)
    vector_lr: float | None = flag(None, "of norms and biases, scheduled like lr; default: --lr", at_least=0)
    min_lr: float | None = flag(None, "learning rate at the last step; default: a tenth of --lr", at_least=0)
    warmup_frac: float = flag(0.06, "share of the steps with rising learning rate", at_least=0, below=1)
    schedule: str = flag("cosine", "learning rate after the warm-up; linear: constant, then straight to --min_lr",
                         unit="name", choices=("cosine", "linear"))  # fmt: skip
    decay_frac: float = flag(0.4, "share of the steps with falling learning rate, for --schedule linear",
                             at_least=0, at_most=1)  # fmt: skip
    weight_decay: float = flag(0.1, "AdamW's, on matrices only", at_least=0)
    beta2: float = flag(0.95, "AdamW's decay of squared gradients", at_least=0, below=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)

    # an interval of 0 turns a thing off, and the last step counts as due
    eval_interval: int = flag(2000, "between validations; 0: never", at_least=0, unit="steps",
                              group="evaluation and saving")  # fmt: skip
    val_tokens: int = flag(5_242_880, "validated on: the first of the validation shards", at_least=1, unit="tokens")
    hellaswag_interval: int = flag(10_000, "between HellaSwag evaluations; 0: never", at_least=0, unit="steps")
    hellaswag_data: str | None = flag(None, "HellaSwag on this machine; default: downloaded once", unit="file")
    hellaswag_limit: int | None = flag(None, "used of HellaSwag; default: all 10,042", at_least=1, unit="examples")
    sample_interval: int = flag(10_000, "between samples; 0: never", at_least=0, unit="steps")
    sample_prompt: str = flag("The most important", "what samples continue", unit="text")
    save_interval: int = flag(2000, "between checkpoints; 0: only the last", at_least=0, unit="steps")
    keep_last: int = flag(2, "newest checkpoints kept, besides the best", at_least=1)
    eval_only: bool = flag(False, "evaluate --checkpoint, or the run's newest, and stop")
    checkpoint: str | None = flag(None, "with --eval_only: a run or a checkpoint; on that run's data", unit="folder")

    init_from: str | None = flag(None, "a run, one of its checkpoints or RUN/best: a new run starts at step 0 with"
        " these weights, and has their architecture and tokenizer; --block_size, --rope_theta and --dropout may differ",
        unit="folder", group="how it runs")  # fmt: skip
    resume: str = flag("auto", "auto: continue the run if it exists; never: refuse if it does; PATH: from that one",
                       unit="path")  # fmt: skip
    seed: int = flag(1337, "of weights, data order and dropout")
    no_shuffle: bool = flag(False, "read the data in its stored order")
    device: str = flag("auto", "cuda, mps, cpu, or auto: the first of them there is", unit="name")
    dtype: str = flag("auto", "of matrix products; auto: what the device is best at", unit="name",
                      choices=("auto", *runtime.DTYPES))  # fmt: skip
    compile: str = flag("auto", "torch.compile the training step; auto: on CUDA with Triton", unit="when",
                        choices=("auto", "on", "off"))  # fmt: skip
    deterministic: bool = flag(False, "on CUDA: the same bits whenever the same run is repeated or resumed; slower")
    fsdp: bool = flag(False, "divide weights, gradients and optimizer state among the devices: for larger models")
    timeout: float = flag(1800.0, "that a process waits for another before the run fails", at_least=1, unit="seconds")
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, about a third slower")

    tracker: str = flag("off", "also log to wandb, or to trackio, a local dashboard", unit="name",
                        choices=("off", "wandb", "trackio"), group="trackers")  # fmt: skip
    wandb_project: str | None = flag(None, "project there; without --tracker it means wandb; default: gpt", unit="name")
    wandb_run_name: str | None = flag(None, "name of the run there; default: run_name", unit="name")

    def __init__(self, preset="gpt2-124m", **given):
        known = {f.name: f.default for f in fields(self)}
        if str(preset) not in PRESET_VALUES:
            wrong = f"preset {preset!r} does not exist; there are {', '.join(PRESET_VALUES)}"
            raise UserError(wrong + did_you_mean(preset, PRESET_VALUES))
        if unknown := given.keys() - known.keys():
            raise TypeError(f"TrainConfig has no {', '.join(sorted(unknown))}")
        values = known | PRESET_VALUES[preset] | {"preset": preset}
        if "lr" in given and values["min_lr"]:  # the preset's last rate belongs to its highest; 0 belongs to any
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

    def lr_scale(self, own) -> float:
        """What a group multiplies the run's learning rate with. own: its highest rate; None: the run's."""
        return 1.0 if own is None else own / self.lr

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
    for name, value in vars(c).items():
        if re.search("[\ud800-\udfff]", str(value)):  # stands for a byte that was not UTF-8; no file takes it
            found.append(f"--{name} is {value!a}; it must be UTF-8 text")
    if c.last_lr > c.lr:
        found.append(f"--min_lr is {c.min_lr}; it must not exceed --lr ({c.lr})")
    if c.lr == 0 and (c.embed_lr, c.vector_lr) != (None, None):
        found.append("--embed_lr and --vector_lr follow the schedule of --lr in proportion; --lr must be above 0")
    if c.schedule == "linear" and c.warmup_frac + c.decay_frac > 1:
        found.append(f"--warmup_frac {c.warmup_frac} and --decay_frac {c.decay_frac} together exceed 1; lower one")
    if not c.eval_only:
        found += batch_problems(c, world)
    if c.fsdp and (world == 1 or c.dtype == "float16" or c.compile == "on"):
        found.append("--fsdp is for several processes (torchrun), float32 or bfloat16, no --compile on; or --no_fsdp")
    if c.checkpoint and not c.eval_only:
        found.append("--checkpoint goes with --eval_only; to continue a run from a checkpoint use --resume")
    return found


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


# ---------------------------------------------------------------------------------------
# The command line.

NOT_REMEMBERED = ("run_name", "checkpoint_dir", "resume", "eval_only", "checkpoint")


def parse(argv=None, about=None) -> TrainConfig:
    """The configuration that a command line means: a preset, or what the named run remembers, changed by the flags
    given. UserError with everything that is wrong. argv, about: see `cli.read_flags`."""
    given = read_flags(TrainConfig, argv, about)
    config = TrainConfig(**(remembered(given) or origins_shape(given)) | given)
    refuse(problems(config))
    return config


def origins_shape(given: dict) -> dict:
    """The flags of the model, as they are in the checkpoint that --init_from names; {} without --init_from."""
    path = None if given.get("eval_only") else checkpoint.origin_of(TrainConfig(**given))
    if path is None:
        return {}
    shape = vars(checkpoint.read_config(path / checkpoint.CONFIG))
    return {f.name: shape[f.name] for f in fields(TrainConfig) if f.name in shape and f.name != "dropout"}


def remembered(given: dict) -> dict:
    """The flags that run.json holds of the run that is continued (--run_name) or evaluated (--checkpoint), where
    there is one and no --preset is given. Says in one line which of them are not the preset's."""
    if "preset" in given:  # names all values anew
        return {}
    if given.get("eval_only") and "checkpoint" in given:
        runs = given.get("checkpoint_dir", checkpoint.DEFAULT_DIR)
        found = checkpoint.find_checkpoint(given["checkpoint"], runs, names=[checkpoint.CONFIG])
        path = found.resolve().parent / "run.json"
    elif "run_name" in given:
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
    if "lr" in given and kept.get("min_lr") and kept["min_lr"] == preset.min_lr:
        kept["min_lr"] = None  # nobody chose it; a tenth of the new one
    if given.get("eval_only"):
        kept["fsdp"] = False  # which serves training alone
    news = [f"{k} {v}" for k, v in kept.items() if k not in given and v not in (None, getattr(preset, k))]
    if os.environ.get("RANK", "0") == "0":
        print(f"remembered {', '.join([f'preset {preset.preset}', *news])} (from {path})", flush=True)
    return kept
