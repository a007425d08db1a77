"""How long training stands still for a checkpoint: copied and written in the background, or written in the foreground.

    python benchmarks/bench_save.py [--out DIR] [--repeats 5] [--device cpu] [--tiny]

The 124M model with AdamW's state, about 1.5 GB. DIR decides which disk is measured. The foreground figure is what
training would wait if it saved before going on; the background figure, what it waits now.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import flag, parse, run  # isort: split

import torch

import checkpoint
from model import GPT, GPTConfig
from support.runtime import pick_device


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
    """(seconds until it returns, its result); a GPU may go on copying."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


@dataclass(frozen=True)
class Config:
    out: str | None = flag(None, "on the disk to measure; default: the temporary one", unit="folder")
    repeats: int = flag(5, "turns", at_least=1)
    device: str = flag("cpu", "where the model is", unit="name")
    tiny: bool = flag(False, "a model of one small layer, to see whether it runs")


def main(argv=None):
    args = parse(Config, argv, __doc__.splitlines()[0], ["python benchmarks/bench_save.py --out /mnt/disk"])
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 512, "valid_vocab_size": 500} if args.tiny else {}
    model = GPT(GPTConfig(**shape)).to(pick_device(args.device))
    optimizer = filled(model)
    stalls, writes, probes, pinned = [], [], [], {}
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        for step in range(args.repeats + 1):
            stall, tensors = timed(lambda: checkpoint.snapshot(model, optimizer, pinned=pinned))
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # as the thread that writes does
            size = sum(t.numel() * t.element_size() for content in tensors.values() for t in content.values())
            write, path = timed(
                lambda step=step, tensors=tensors: checkpoint.save(
                    folder, step, model.config, tensors, {"step": step}, NoTokenizer()
                )
            )
            probe, _ = timed(lambda path=path: checkpoint.verify(path))
            checkpoint.rotate(folder, 1)
            if step:  # the first one warms up
                stalls.append(stall), writes.append(write), probes.append(probe)
    print(f"{model.num_parameters():,} parameters on {args.device}, {size / 1e9:.2f} GB, {args.repeats} saves")
    print(f"{'seconds':<44}{'median':>9}{'min':>9}{'max':>9}")
    both = [a + b for a, b in zip(stalls, writes)]
    for name, values in (
        ("training waits, saving in the foreground", both),
        ("training waits, saving in the background", stalls),
        ("writing, hashing and flushing, unseen", writes),
        ("verifying at the next start", probes),
    ):
        print(f"{name:<44}{statistics.median(values):>9.2f}{min(values):>9.2f}{max(values):>9.2f}")


if __name__ == "__main__":
    sys.exit(run(main))
