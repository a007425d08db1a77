"""What reading the data costs training: python benchmarks/bench_data.py [--step_tokens_per_second 500000]

  loader     FineWebDataLoader.batch and torch.from_numpy, alone: 16 x 1,024 tokens in 4 micro-steps, windows that
             nobody has read before and then the same ones again
  waiting    what next() of FineWebBatchIterator takes when a step between two calls gives it time to read ahead
  opening    a data set of 10M tokens and one of 10B, anew each time, and its first batch from the middle of an epoch
  memory     resident bytes over several epochs, beyond those after the first batch

The shards are files with holes, made for the purpose: they have the real sizes and hold zeros, so that this is
the program's own time and no disk's. What is read for the first time still costs the kernel: around each window it
reads ahead (/sys/block/*/queue/read_ahead_kb) and clears that much memory. The step is a pause of the length that
--step_tokens_per_second gives it, and its windows are read for the first time, as in an epoch.
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

from support.cli import flag, parse, run  # isort: split

import numpy as np
import torch

from data_processing_fineweb import FineWebBatchIterator, FineWebDataLoader, FineWebDataset
from support.runtime import pick_device, versions

ROWS, STEPS_ALIKE, VOCAB = 16, 4, 50257  # of a micro-batch; micro-steps; ids below it
TARGET = 0.01  # of a training step, that reading may take


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
    return FineWebDataLoader(dataset, ROWS, ROWS * STEPS_ALIKE, seed=0)


def tensors(loader, start):
    batch = loader.batch(start)
    return torch.from_numpy(batch.x), torch.from_numpy(batch.y)


def seconds_of(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


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


# ---------------------------------------------------------------------------------------


def row(name, values, unit, places=2) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{name:<46}{middle:>14,.{places}f}{low:>14,.{places}f}{high:>14,.{places}f}  {unit}"


def milliseconds(name, seconds) -> str:
    return row(name, [1e3 * s for s in seconds], "ms")


def measure(work, args):
    """Runs everything in the folder `work`, a row of the table at a time."""
    tokens = ROWS * STEPS_ALIKE * args.block_size
    print(f"{versions()['device_name']}; a global batch is {tokens:,} tokens")
    print(f"{'':<46}{'median':>14}{'min':>14}{'max':>14}")
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


@dataclass
class Config:
    step_tokens_per_second: float | None = flag(None, "of training, as bench_train.py finds it", above=0)
    step_seconds: float = flag(0.1, "without it, the length of a step", above=0, unit="seconds")
    device: str = flag("cpu", "to which batches are copied", unit="name")
    out: str | None = flag(None, "disk for the files with holes; default: the temporary one", unit="folder")
    block_size: int = flag(1024, "per sequence", at_least=1, unit="tokens")
    shards: int = flag(100, "files", at_least=1)
    shard_tokens: int = flag(100_000_000, "in each", at_least=1, unit="tokens")
    batches: int = flag(200, "global batches read for the first row", at_least=1)
    steps: int = flag(30, "waited for", at_least=1, unit="steps")
    opens: int = flag(10, "times each data set is opened", at_least=1)
    epochs: int = flag(5, "read for the last rows", at_least=1)
    epoch_tokens: int = flag(500_000_000, "in each; 0: not measured", at_least=0, unit="tokens")
    tiny: bool = flag(False, "small shards and few batches, to see whether everything runs")


def parse_args(argv) -> Config:
    args = parse(Config, argv, "Time the data loader; the table goes to stdout.", ["python benchmarks/bench_data.py"])
    if args.tiny:
        args.shards, args.shard_tokens, args.block_size, args.epoch_tokens = 3, 200_000, 64, 100_000
        args.batches, args.steps, args.opens, args.step_seconds = 5, 3, 2, 0.01
    return args


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        measure(Path(work), args)


if __name__ == "__main__":
    sys.exit(run(main))
