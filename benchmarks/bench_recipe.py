"""How many tokens a recipe needs to reach a loss: python benchmarks/bench_recipe.py --local_files ... --val_files ...

A small model (the demo's shape, 1M parameters) is trained by each recipe with several seeds, on text read at most once,
and its final validation loss compared with that of the default recipe for the same seeds. Each row changes one thing of
the recipe that its name begins with. The default recipe is trained on twice the tokens too, so that a gain in loss can
be told in tokens: the fast recipe is done when it reaches, on half the tokens, what the default reaches on all of them.

Its learning rate is the preset's by width, 6e-4 x 768 / 128 = 3.6e-3, and its dropout, warm-up, decay and betas are the
preset's. Runs are kept in --results as they end, a JSON line each, and are not repeated. Each run takes one core.
"""

import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, parse, run  # isort: split

import torch
import torch.nn.functional as F

import model
import train
from prepare_fineweb import PrepareConfig, prepare

STEPS = 500  # of 2,048 tokens: 1M tokens, about one for each parameter
SHAPE = dict(block_size=128, n_layer=4, n_head=4, n_embd=128, batch_size=16, total_batch_tokens=2048)
CORPUS_TOKENS = 10_000_000
LR = 6e-4 * 768 / SHAPE["n_embd"]
MUTE = dict(
    eval_interval=10**6, hellaswag_interval=0, sample_interval=0, save_interval=0, device="cpu", dtype="float32"
)

# What each recipe changes of the default one. "base: change" is compared with "base". `patch` names what is no flag.
NO_DROPOUT = {"dropout": 0.0}
MUON = NO_DROPOUT | {"optimizer": "muon"}


def lr(factor):
    return {"lr": factor * LR, "min_lr": factor * LR / 10}


FAST = MUON | lr(4)
RECIPES = {
    "default": {},
    "default, twice the tokens": {"max_steps": 2 * STEPS},
    "no dropout": NO_DROPOUT,
    "no dropout: lr x 2": NO_DROPOUT | lr(2),
    "no dropout: lr / 2": NO_DROPOUT | lr(1 / 2),
    "no dropout: muon": MUON,
    "no dropout: muon, lr / 2": MUON | lr(1 / 2),
    "no dropout: muon, lr x 2": MUON | lr(2),
    "fast": FAST,  # no dropout, Muon, lr x 4
    "fast, half the tokens": FAST | {"max_steps": STEPS // 2},
    "fast, a third of the tokens": FAST | {"max_steps": STEPS // 3},
    "fast: lr x 2": MUON | lr(8),
    "fast: linear to 0": FAST | {"min_lr": 0.0, "patch": "linear"},
    "fast: half the batch": FAST | {"total_batch_tokens": 1024, "batch_size": 8, "max_steps": 2 * STEPS},
    "fast: whole qkv": FAST | {"patch": "whole qkv"},
    "fast: qk norm": FAST | {"patch": "qk norm"},
}


def config_of(recipe, seed, data_dir, steps):
    """TrainConfig of one run."""
    changes = {k: v for k, v in RECIPES[recipe].items() if k != "patch"}
    own = dict(max_steps=steps, lr=LR, min_lr=LR / 10, val_tokens=131_072) | SHAPE | MUTE | changes
    return replace(train.TrainConfig(), seed=seed, data_dir=data_dir, **own)


# ---------------------------------------------------------------------------------------
# What is tried without being a flag. Each changes the modules of the process that makes the run.


def linear(step, c):
    """Warm-up, then straight down to min_lr."""
    warmup = int(c.warmup_frac * c.max_steps)
    down = (c.max_steps - 1 - step) / max(1, c.max_steps - 1 - warmup)
    return min(c.lr * (step + 1) / max(1, warmup), c.last_lr + down * (c.lr - c.last_lr))


def use_linear():
    train.lr_at = linear


def use_whole_qkv():
    """Muon takes queries, keys and values as one matrix."""
    groups = model.GPT.parameter_groups
    model.GPT.parameter_groups = lambda self, *rates: [
        g | {"parts": 1} if "parts" in g else g for g in groups(self, *rates)
    ]


def use_qk_norm():
    """Queries and keys of root mean square 1 before the rotation: another architecture, for the log only."""
    rotate = model.rotate
    model.rotate = lambda x, cos, sin: rotate(F.rms_norm(x, x.shape[-1:]), cos, sin)


PATCHES = {"linear": use_linear, "whole qkv": use_whole_qkv, "qk norm": use_qk_norm}

# ---------------------------------------------------------------------------------------


def one_run(job):
    """Trains one run in a process of its own; its row of --results."""
    recipe, config = job
    torch.set_num_threads(1)
    if patch := RECIPES[recipe].get("patch"):
        PATCHES[patch]()
    with tempfile.TemporaryDirectory() as directory, open(Path(directory) / "log", "w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            result = train.train(replace(config, checkpoint_dir=directory))
        rows = read_rows(Path(result["run_dir"]) / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    tail = statistics.fmean(losses[-max(1, len(losses) // 20) :])
    return {
        "recipe": recipe,
        "seed": config.seed,
        "tokens": result["tokens"],
        "steps": config.max_steps,
        "val_loss": result["val_loss"],
        "train_loss": tail,
        "seconds": rows[-1]["seconds"],
    }


def study(names, seeds, processes, results, data_dir, steps):
    """Runs what is not in the file `results` yet, seed by seed; returns all of its rows."""
    done = {(row["recipe"], row["seed"]) for row in read_rows(results)}
    jobs = [
        (name, config_of(name, seed, data_dir, steps)) for name in names for seed in seeds if (name, seed) not in done
    ]
    if jobs:
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, maxtasksperchild=1) as pool:  # one run per process: patches end with it
            for row in pool.imap(one_run, jobs):
                with open(results, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['recipe']}, seed {row['seed']}: {row['val_loss']:.4f}, {row['seconds']:.0f} s", flush=True)
    return read_rows(results)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def base_of(recipe):
    """The recipe that another changes in one thing, or the default."""
    base = recipe.partition(":")[0]
    return base if base in RECIPES and base != recipe else "default"


def report(rows):
    """A line per recipe: tokens, final validation loss, gain over its base on the same seeds, mean ± deviation."""
    losses = {}
    for row in rows:
        losses.setdefault(row["recipe"], {})[row["seed"]] = row
    print(f"{'recipe':52}{'tokens':>12}{'loss':>9}{'seeds':>7}   gain over its base, nats")
    for recipe in sorted(losses, key=list(RECIPES).index):
        by_seed = losses[recipe]
        base = losses.get(base_of(recipe), {})
        values = [row["val_loss"] for row in by_seed.values()]
        gains = [
            base[s]["val_loss"] - row["val_loss"] for s, row in by_seed.items() if s in base and base is not by_seed
        ]
        tokens = next(iter(by_seed.values()))["tokens"]
        print(f"{recipe:52}{tokens:12,}{statistics.fmean(values):9.4f}{len(values):7}   {spread(gains)}")


def spread(values):
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{deviation}"


def make_corpus(directory, local_files, val_files, vocab_size):
    """Prepared text with a small tokenizer of its own, so that a small model spends its work on text, not on a head."""
    if (Path(directory) / "manifest.json").exists():
        return
    if not (local_files and val_files):
        raise UserError(
            f"{directory}: no corpus there; name parquet files with --local_files and --val_files to make it"
        )
    files = dict(local_files=local_files, val_files=val_files)
    prepare(PrepareConfig(out_dir=directory, **files, train_tokenizer=vocab_size, max_tokens=CORPUS_TOKENS))


@dataclass(frozen=True)
class Config:
    data_dir: str = flag("recipe_corpus", "prepared corpus; made if it is not there", unit="folder")
    local_files: tuple[str, ...] = flag((), "training text to make it from, parquet files", unit="glob")
    val_files: tuple[str, ...] = flag((), "validation text", unit="glob")
    vocab_size: int = flag(2048, "of the corpus's tokenizer", at_least=1)
    recipes: tuple[str, ...] = flag(tuple(RECIPES), "by name; default: all of them", unit="name")
    seeds: tuple[int, ...] = flag((1, 2, 3), "a run each", unit="n")
    steps: int = flag(STEPS, "of the recipes that do not say another number", at_least=1, unit="steps")
    processes: int = flag(2, "runs side by side, one core each", at_least=1)
    results: str = flag("benchmarks/results/recipes.jsonl", "gathers the runs", unit="file")


def main(argv=None):
    examples = ["python benchmarks/bench_recipe.py --recipes default fast"]
    args = parse(Config, argv, "Final loss of training recipes at small scale.", examples)
    unknown = [name for name in args.recipes if name not in RECIPES]
    if unknown:
        raise UserError(f"no recipe {unknown[0]!r}; there are: {'; '.join(RECIPES)}")
    make_corpus(args.data_dir, args.local_files, args.val_files, args.vocab_size)
    report(study(args.recipes, args.seeds, args.processes, args.results, args.data_dir, args.steps))


if __name__ == "__main__":
    sys.exit(run(main))
