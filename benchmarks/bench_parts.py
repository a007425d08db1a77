"""What a run spends beside its training steps, one part at a time.

    python benchmarks/bench_parts.py data --step_tokens_per_second 500000
    python benchmarks/bench_parts.py saving --out /mnt/disk
    python benchmarks/bench_parts.py hellaswag --examples 200 --data hellaswag_val.jsonl

data: what reading costs. The shards are made for the purpose, as files with holes: they have the real sizes and hold
zeros, so that the time is the program's own and not a disk's. What is read for the first time still costs the kernel:
around each window it reads ahead (/sys/block/*/queue/read_ahead_kb) and clears that much memory.

  loader     FineWebDataLoader.batch and torch.from_numpy, alone: 16 x 1,024 tokens in 4 micro-steps, windows that
             nobody has read before and then the same ones again
  next()     of FineWebBatchIterator, when a step between two calls gives it time to read ahead. The step is a pause
             as long as --step_tokens_per_second says; its windows are read for the first time, as in an epoch
  opening    a data set of 10M tokens and one of 10B, anew each time, and its first batch from the middle of an epoch
  memory     resident bytes over several epochs, beyond those after the first batch

saving: how long training waits for a checkpoint of the 124M model with AdamW's state, 1.5 GB. In the foreground, if it
were written before training goes on; in the background, as it is: training waits for the copy alone.

hellaswag: examples per second of the 124M model with random weights, which cost what trained ones cost. Tokenizing is
included. The ways take turns, so that a machine that slows down slows down all of them; the examples are spread evenly
over the file, whose first third is much shorter than the rest.

  plain       one example at a time: four padded rows, every logit and every loss (as in build-nanogpt)
  completion  hellaswag_eval.score, the same convention
  both        hellaswag_eval.score, both conventions: twice the sequences
"""

import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import REQUIRED, flag, parse, run  # isort: split

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import hellaswag_eval
from data_processing_fineweb import FineWebBatchIterator, FineWebDataLoader, FineWebDataset
from model import GPT, GPTConfig
from support.runtime import autocast, pick, pick_device, versions
from tokenizer import load_tokenizer

ROWS, MICRO_STEPS, VOCAB = 16, 4, 50257  # of a micro-batch; of a global batch; ids are below it
TARGET = 0.01  # of a training step, that reading may take


@dataclass
class Config:
    part: str = flag(REQUIRED, "what to measure", choices=("data", "saving", "hellaswag"), positional=True)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps: where batches go, and the model is", unit="name")
    out: str | None = flag(None, "on the disk to measure; default: the temporary one", unit="folder")
    repeats: int = flag(5, "turns of saving and of HellaSwag", at_least=1)
    tiny: bool = flag(False, "everything small, to see whether it runs")
    step_tokens_per_second: float | None = flag(None, "of training, as bench_train.py finds it", above=0, group="data")
    step_seconds: float = flag(0.1, "without it, the length of a step", above=0, unit="seconds")
    block_size: int = flag(1024, "per sequence", at_least=1, unit="tokens")
    shards: int = flag(100, "files", at_least=1)
    shard_tokens: int = flag(100_000_000, "in each", at_least=1, unit="tokens")
    batches: int = flag(200, "global batches read for the first row", at_least=1)
    steps: int = flag(30, "waited for", at_least=1, unit="steps")
    opens: int = flag(10, "times each data set is opened", at_least=1)
    epochs: int = flag(5, "read for the last rows", at_least=1)
    epoch_tokens: int = flag(500_000_000, "in each; 0: not measured", at_least=0, unit="tokens")
    examples: int = flag(200, "spread evenly over the file", at_least=1, group="hellaswag")
    data: str | None = flag(None, "HellaSwag on this machine; default: downloaded once", unit="file")
    tokenizer: str = flag("gpt2", "hub name, folder or tokenizer.json", unit="name")
    dtype: str = flag("auto", "of products", unit="name", choices=("auto", "float32", "bfloat16", "float16"))
    batch_tokens: int | None = flag(None, "of a batch in the last two ways; default: theirs", at_least=1, unit="tokens")


def seconds_of(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def row(name, values, unit, places=2) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{name:<46}{middle:>14,.{places}f}{low:>14,.{places}f}{high:>14,.{places}f}  {unit}"


def in_turns(ways, repeats) -> dict[str, list]:
    """Seconds by name of the way, one for each repeat; the ways take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(seconds_of(way))
    return seconds


def header() -> str:
    return f"{'':<46}{'median':>14}{'min':>14}{'max':>14}"


def small_model(args, **shape) -> GPT:
    """GPT-2 124M in shape, or one small layer where everything is tiny."""
    torch.manual_seed(0)
    shape |= {"n_layer": 1, "n_head": 2, "n_embd": 32} if args.tiny else {}
    return GPT(GPTConfig(**shape))


# ---------------------------------------------------------------------------------------
# data


def make_shards(folder, shards, tokens) -> Path:
    """A folder of `shards` files that announce `tokens` uint16 tokens each and occupy a block of the disk."""
    folder.mkdir()
    for i in range(shards):
        with open(folder / f"shard_{i:06d}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
            f.truncate(f.tell() + 2 * tokens)
    return folder


def make_loader(folder, args) -> FineWebDataLoader:
    dataset = FineWebDataset(folder, args.block_size, "train", VOCAB)
    return FineWebDataLoader(dataset, ROWS, ROWS * MICRO_STEPS, seed=0)


def tensors(loader, start):
    batch = loader.batch(start)
    return torch.from_numpy(batch.x), torch.from_numpy(batch.y)


def time_loader(folder, args) -> tuple[list, list]:
    """Seconds of each of --batches global batches, one after the other; and of the same ones once more."""
    loader = make_loader(folder, args)
    starts = range(0, args.batches * loader.global_batch, loader.global_batch)
    first, again = ([seconds_of(lambda at=at: tensors(loader, at)) for at in starts] for _ in range(2))
    return first, again


def time_waiting(folder, args, step_seconds) -> list:
    """Seconds in next(), without the first, for which nothing could be read ahead. Starts behind `time_loader`."""
    loader, waits = make_loader(folder, args), []
    with FineWebBatchIterator(loader, args.batches * loader.global_batch, pick_device(args.device)) as batches:
        next(batches)
        for _ in range(args.steps):
            time.sleep(step_seconds)
            waits.append(seconds_of(lambda: next(batches)))
    return waits


def time_opening(folder, args) -> tuple[list, list, list]:
    """Seconds to open the data set, then to get a first batch from somewhere in its fourth epoch, then to get
    that batch with the data set opened anew, but its pages in memory."""
    opening, seeking, again, places = [], [], [], random.Random(0)
    for _ in range(args.opens):
        began = time.perf_counter()
        loader = make_loader(folder, args)
        opening.append(time.perf_counter() - began)
        start = int((3 + places.random()) * loader.dataset.n_windows)
        seeking.append(seconds_of(lambda loader=loader, start=start: tensors(loader, start)))
        loader = make_loader(folder, args)
        again.append(seconds_of(lambda loader=loader, start=start: tensors(loader, start)))
    return opening, seeking, again


def resident() -> int:
    """Bytes of this process in memory, the pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(folder, args) -> list:
    """By epoch, the most resident bytes seen beyond those after the first batch."""
    loader = make_loader(folder, args)
    tensors(loader, 0)
    before, most = resident(), [0] * args.epochs
    for start in range(loader.global_batch, args.epochs * loader.dataset.n_windows, loader.global_batch):
        tensors(loader, start)
        epoch = start // loader.dataset.n_windows
        most[epoch] = max(most[epoch], resident() - before)
    return most


def milliseconds(name, seconds) -> str:
    return row(name, [1e3 * s for s in seconds], "ms")


def measure_data(work, args):
    """Prints a row of the table at a time."""
    tokens = ROWS * MICRO_STEPS * args.block_size
    print(f"{versions()['device_name']}; a global batch is {tokens:,} tokens")
    print(header())
    small = make_shards(work / "small", 1, args.shard_tokens // 10)
    large = make_shards(work / "large", args.shards, args.shard_tokens)
    first, again = time_loader(large, args)
    rate = tokens / statistics.median(again)
    print(row("loader, windows read for the first time", [tokens / s for s in first], "tokens/s", 0))
    print(row("loader, the same windows again", [tokens / s for s in again], "tokens/s", 0))
    training = args.step_tokens_per_second
    step_seconds = tokens / training if training else args.step_seconds
    waits = time_waiting(large, args, step_seconds)
    print(milliseconds(f"next() after a step of {step_seconds:.3g} s", waits))
    for folder in (small, large):
        opening, seeking, again = time_opening(folder, args)
        whole = make_loader(folder, args).dataset.n_tokens
        print(milliseconds(f"opening {whole:,} tokens", opening))
        print(milliseconds("  its first batch, mid-epoch", seeking))
        print(milliseconds("  that batch with its pages in memory", again))
    if args.epoch_tokens and Path("/proc/self/statm").exists():
        epoch = make_shards(work / "epoch", 5, args.epoch_tokens // 5)
        grown = [g / 1e6 for g in growth(epoch, args)]
        print(row(f"memory, {args.epochs} epochs of {2 * args.epoch_tokens / 1e9:g} GB", grown, "MB", 1))
        print(f"  epoch by epoch: {', '.join(f'{g:.1f}' for g in grown)} MB")
    if training:
        print(f"at {training:,.0f} tokens/s reading is {training / rate:.2%} of a step (the first time "
              f"{training * statistics.median(first) / tokens:.2%}), were it not done ahead; "
              f"next() is {statistics.median(waits) / step_seconds:.3%}")  # fmt: skip
    print(f"reading, not ahead, would be {TARGET:.0%} of a step at {TARGET * rate:,.0f} tokens/s of training")


# ---------------------------------------------------------------------------------------
# saving


class NoTokenizer:
    """A checkpoint's tokenizer is 3 MB of 1,500."""

    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def filled(model):
    """An optimizer with the state it has after a step."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def timed(function):
    """(seconds until it and the GPU's work are done, its result).

    A snapshot returns while the GPU copies. But the next training step is computed after these copies, so training
    waits for them too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - began, result


def measure_saving(work, args):
    model = small_model(args, **({"vocab_size": 512, "valid_vocab_size": 500} if args.tiny else {}))
    optimizer = filled(model.to(pick_device(args.device)))
    stalls, writes, probes, pinned = [], [], [], {}
    for step in range(args.repeats + 1):
        stall, tensors = timed(lambda: checkpoint.snapshot(model, optimizer, pinned=pinned))
        size = sum(t.numel() * t.element_size() for content in tensors.values() for t in content.values())
        content = (step, model.config, tensors, {"step": step}, NoTokenizer())
        write, path = timed(lambda content=content: checkpoint.write_checkpoint(work, *content))
        probe, _ = timed(lambda path=path: checkpoint.verify(path))
        checkpoint.remove_old(work, 1)
        if step:  # the first one warms up
            stalls.append(stall), writes.append(write), probes.append(probe)
    print(f"{model.num_parameters():,} parameters on {args.device}, {size / 1e9:.2f} GB, {args.repeats} saves")
    print(header())
    print(row("training waits, saving in the foreground", [a + b for a, b in zip(stalls, writes)], "s"))
    print(row("training waits, saving in the background", stalls, "s"))
    print(row("writing, hashing and flushing, unseen", writes, "s"))
    print(row("verifying at the next start", probes, "s"))


# ---------------------------------------------------------------------------------------
# hellaswag


@torch.no_grad()
def plain(model, tokenizer, examples, device) -> np.ndarray:
    """Summed log-probability (N, 4), nats, of the endings in the completion convention."""
    sums = []
    for example in examples:
        context = tokenizer.encode(example["ctx"])
        endings = [tokenizer.encode(" " + ending) for ending in example["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        counts = torch.zeros_like(tokens)
        for number, ending in enumerate(endings):
            end = len(context) + len(ending)
            tokens[number, :end] = torch.tensor(context + ending)
            counts[number, len(context) : end] = 1
        tokens, counts = tokens.to(device), counts.to(device)
        logits = model(tokens)[:, :-1].float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        sums.append(-(nats.view(4, -1) * counts[:, 1:]).sum(1).cpu().numpy())
    return np.array(sums)


def measure_hellaswag(work, args):
    device, dtype = pick(args.device, args.dtype)
    examples = hellaswag_eval.load_examples(args.data)
    examples = examples[:: max(1, len(examples) // args.examples)][: args.examples]
    tokenizer = load_tokenizer(args.tokenizer)
    model = small_model(args, valid_vocab_size=tokenizer.vocab_size, dropout=0.0).to(device).eval()
    options = {"batch_tokens": args.batch_tokens}
    score = hellaswag_eval.score
    ways = {
        "plain": lambda some=examples: plain(model, tokenizer, some, device),
        "completion": lambda some=examples: score(model, tokenizer, some, conventions=["completion"], **options),
        "both": lambda some=examples: score(model, tokenizer, some, **options),
    }
    with autocast(device, dtype):
        reference, scores = (ways[name](examples[:8]) for name in ("plain", "both"))  # also warms up
        difference = np.abs(reference - scores.sums["completion"]).max()
        turns = in_turns(ways, args.repeats)
    middle = {name: statistics.median(seconds) for name, seconds in turns.items()}
    parameters, name = model.num_parameters() / 1e6, versions()["device_name"]
    print(f"{name}, {torch.get_num_threads()} threads, {dtype}, {parameters:.0f}M parameters, {len(examples)} examples")
    print(header())
    for name, seconds in turns.items():
        ratio = middle["plain"] / middle[name]
        print(row(name, [len(examples) / s for s in seconds], f"examples/s, {ratio:.2f} times plain"))
    print(f"both conventions take {middle['both'] / middle['completion']:.2f} times as long as one")
    print(f"sums of plain and completion differ by at most {difference:.2g} nats on 8 examples")


def parse_args(argv) -> Config:
    args = parse(Config, argv, __doc__)
    if args.tiny:
        args.shards, args.shard_tokens, args.block_size, args.epoch_tokens = 3, 200_000, 64, 100_000
        args.batches, args.steps, args.opens, args.step_seconds = 5, 3, 2, 0.01
    return args


def main(argv=None):
    args = parse_args(argv)
    measure = {"data": measure_data, "saving": measure_saving, "hellaswag": measure_hellaswag}[args.part]
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        measure(Path(work), args)


if __name__ == "__main__":
    sys.exit(run(main))
