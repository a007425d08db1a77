"""How many HellaSwag examples a second, in three ways: python benchmarks/bench_hellaswag.py --examples 200

  plain       one example at a time: four padded rows, every logit and every loss (as in build-nanogpt)
  completion  hellaswag_eval.score, the same convention
  both        hellaswag_eval.score, both conventions: twice the sequences

The model has the shape of GPT-2 124M and random weights, which cost what trained ones cost. All ways
include tokenising. They take turns, so that a machine that slows down slows down all of them; the
examples are spread evenly over the file, whose first third is much shorter than the rest.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import flag, parse, run  # isort: split

import numpy as np
import torch
import torch.nn.functional as F

import hellaswag_eval
from model import GPT, GPTConfig
from support.runtime import autocast, pick, versions
from tokenizer import load_tokenizer


@torch.no_grad()
def plain(model, tokenizer, examples, device) -> np.ndarray:
    """Summed log-probability (N, 4), nats, of the endings in the completion convention."""
    sums = []
    for example in examples:
        context = tokenizer.encode(example["ctx"])
        endings = [tokenizer.encode(" " + ending) for ending in example["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        counts = torch.zeros_like(tokens)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            tokens[row, :end] = torch.tensor(context + ending)
            counts[row, len(context) : end] = 1
        tokens, counts = tokens.to(device), counts.to(device)
        logits = model(tokens)[:, :-1].float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        sums.append(-(nats.view(4, -1) * counts[:, 1:]).sum(1).cpu().numpy())
    return np.array(sums)


def timed(ways, repeats):
    """Seconds by name of the way, one for each repeat; the ways take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(seconds, examples) -> str:
    lines = [f"{'':<12}{'examples/s':>12}{'spread':>9}{'to plain':>10}"]
    reference = statistics.median(seconds["plain"])
    for name, all_of_it in seconds.items():
        middle = statistics.median(all_of_it)
        spread = (max(all_of_it) - min(all_of_it)) / middle
        lines.append(f"{name:<12}{examples / middle:>12.2f}{spread:>9.1%}{reference / middle:>9.2f}x")
    ratio = statistics.median(seconds["both"]) / statistics.median(seconds["completion"])
    lines.append(f"both conventions take {ratio:.2f} times as long as one")
    return "\n".join(lines)


@dataclass
class Config:
    examples: int = flag(200, "spread evenly over the file", at_least=1)
    data: str | None = flag(None, "HellaSwag on this machine; default: downloaded once", unit="file")
    tokenizer: str = flag("gpt2", "hub name, folder or tokenizer.json", unit="name")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", unit="name")
    dtype: str = flag("auto", "of products", unit="name", choices=("auto", "float32", "bfloat16"))
    batch_tokens: int | None = flag(None, "of a batch in the last two ways; default: theirs", at_least=1, unit="tokens")
    repeats: int = flag(5, "turns", at_least=1)
    tiny: bool = flag(False, "a model of one small layer, to see whether everything runs")


def main(argv=None):
    examples = ["python benchmarks/bench_hellaswag.py --data hellaswag_val.jsonl"]
    args = parse(Config, argv, "Time HellaSwag in three ways; the table goes to stdout.", examples)
    device, dtype = pick(args.device, args.dtype)
    examples = hellaswag_eval.load_examples(args.data)
    examples = examples[:: max(1, len(examples) // args.examples)][: args.examples]
    tokenizer = load_tokenizer(args.tokenizer)
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32} if args.tiny else {}
    model = GPT(GPTConfig(**shape, valid_vocab_size=tokenizer.vocab_size, dropout=0.0)).to(device).eval()
    options = {"device": device, "batch_tokens": args.batch_tokens}
    ways = {
        "plain": lambda some=examples: plain(model, tokenizer, some, device),
        "completion": lambda some=examples: hellaswag_eval.score(
            model, tokenizer, some, conventions=["completion"], **options
        ),
        "both": lambda some=examples: hellaswag_eval.score(model, tokenizer, some, **options),
    }
    with autocast(device, dtype):
        reference, scores = (ways[name](examples[:8]) for name in ("plain", "both"))  # also warms up
        difference = np.abs(reference - scores.sums["completion"]).max()
        seconds = timed(ways, args.repeats)
    parameters, name = model.num_parameters() / 1e6, versions()["device_name"]
    print(f"{name}, {torch.get_num_threads()} threads, {dtype}, {parameters:.0f}M parameters, {len(examples)} examples")
    print(table(seconds, len(examples)))
    print(f"sums of plain and completion differ by at most {difference:.2g} nats on 8 examples")


if __name__ == "__main__":
    sys.exit(run(main))
