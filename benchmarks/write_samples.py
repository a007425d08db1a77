"""What a model says, uncut: a fixed set of prompts under each sampling preset, as one markdown file.

    python benchmarks/write_samples.py [--checkpoint DIR] [--output samples.md] [--seed 0] [--max_new_tokens 100]

There is one sample for each prompt and preset: the first one. None is chosen, shortened or corrected. The
prompts are the same for every run, so that two files can be laid side by side, and the head of the file names the
checkpoint, the seed and the command that writes it again.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, parse, run  # isort: split

import torch

from checkpoint import find_checkpoint, read_model, step_of
from inference import PRESETS, Sample, stream_text
from support.files import write_whole
from support.runtime import autocast, pick

PROMPTS = (  # an encyclopedia, a textbook, a recipe of steps, a story, code, and nothing at all
    "The water cycle begins when",
    "In mathematics, a prime number is",
    "To learn a new language, you should first",
    "Once upon a time, in a small village,",
    "def factorial(n):",
    "",
)


def fenced(text) -> str:
    """The text as a block of code: behind a fence longer than any in it, so that it shows as it is."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def samples(model, tokenizer, seed, max_new_tokens):
    """Yields the sections: each prompt, and under it its continuation by each preset, with how it ended."""
    for prompt in PROMPTS:
        title = f"`{prompt}`" if prompt else "No prompt: the model begins a document"
        yield f"## {title}\n"
        for name, sampling in PRESETS.items():
            tokens = tokenizer.encode(prompt)
            sample = Sample(tokenizer, prompt=tokens)
            for _ in stream_text([sample], model, tokens, sampling, max_new_tokens, seed):
                pass
            ended = {"length": "cut by the limit", "end_of_text": "ended by the model"}[sample.finish_reason]
            yield f"**{name}** ({sampling}; {sample.tokens} tokens, {ended})\n"
            yield fenced(prompt + sample.text)


def head(path, seed, max_new_tokens, device, dtype) -> str:
    """What a reader needs to write the same file again."""
    command = f"python benchmarks/write_samples.py --checkpoint checkpoints/{path.parent.name}/{path.name}"
    where = f"Seed {seed}, {device}, {dtype}, torch {torch.__version__}"
    command += f" --seed {seed} --max_new_tokens {max_new_tokens} --device {device} --dtype {dtype}"
    return (
        f"# Samples of {path.parent.name}, step {step_of(path):,}\n\n"
        f"One for each prompt and preset, none chosen, none shortened: the prompt and at most {max_new_tokens} tokens. "
        f"{where}; another device or version rounds otherwise, and one other token changes all that follow it.\n\n"
        f"```sh\n{command} --output samples.md\n```\n"
    )


def write_samples(checkpoint, output, seed=0, max_new_tokens=100, device="auto", dtype="auto") -> Path:
    """Writes the samples of a run's newest checkpoint, or of the one named, to `output`; returns its path."""
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}; it must be at least 1")
    device, dtype = pick(device, dtype)
    path = find_checkpoint(checkpoint).resolve()
    model, tokenizer = read_model(path, device)
    with torch.inference_mode(), autocast(device, dtype):
        parts = [head(path, seed, max_new_tokens, device, dtype), *samples(model, tokenizer, seed, max_new_tokens)]
    write_whole(output, "\n".join(parts).encode(errors="replace"))
    return Path(output)


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = flag(None, "a run or one checkpoint; default: newest under checkpoints/", unit="folder")
    output: str = flag("samples.md", "the markdown", unit="file")
    seed: int = flag(0, "of the samples")
    max_new_tokens: int = flag(100, "per sample, at most", at_least=1, unit="tokens")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", unit="name")
    dtype: str = flag("auto", "of products", choices=("auto", "float32", "bfloat16", "float16"))


def main(argv=None):
    print(write_samples(**vars(parse(Config, argv, __doc__))))


if __name__ == "__main__":
    sys.exit(run(main))
