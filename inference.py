"""Continues a text with a trained model: sampling functions, generation with a cache, presets, the command line.

    python inference.py                                              # the newest checkpoint, under every preset
    python inference.py --preset nucleus --prompt "The sea" --num_samples 3

From Python: model, tokenizer = checkpoint.load_model("checkpoints/demo"); sample_text(model, tokenizer, "The").

A sampling function takes logits (B, V) and rules tokens out; `choose` calls them in the order in which they are written
below. Each sample has its own random stream, so it does not depend on how many are drawn beside it, and training's
stream does not move. All samples of a prompt share one pass over the prompt. A piece of text is shown as soon as no
later token can change it.

Shapes: B samples, T tokens, C channels, V ids that the tokenizer can produce.
"""

import contextlib
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path

from support.cli import UserError, flag, parse, range_problems, run  # isort: split

import torch

from checkpoint import find_checkpoint, read_model
from model import KVCache
from support.runtime import attention_of_any_shape, autocast, memory_advice, pick, sample_faster
from support.terminal import refuse_unread

DEFAULT_PROMPT = "The"
GREEDY_BELOW = 1e-5  # lower temperatures are greedy too: in float32 some of them are 0
MOST_NUCLEI = 1024  # most nuclei are smaller; a sort of 50,257 tokens takes 8 to 15% of a token's time on a CPU
REPLACEMENT = "\ufffd"  # Unicode's replacement character: what bytes decode to that are no character, or not yet
SMALL = 16_000_000  # weights, below which float32 samples faster than bfloat16 on a CPU (benchmarks/LOG.md)
WINDOW = 4  # tokens on which the text of the next one can depend; a character has at most 4 bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution."""

    temperature: float = flag(1.0, "divides the logits; 0 is greedy: always the most probable token", at_least=0)
    top_k: int = flag(0, "tokens to draw from, the best N; 0 is off", at_least=0, unit="tokens")
    top_p: float = flag(1.0, "probability to draw from; 1 is off", above=0, at_most=1)
    min_p: float = flag(0.0, "least probability, as a fraction of the best token's; 0 is off", at_least=0, below=1)
    repetition_penalty: float = flag(1.0, "above 1, seen tokens are less likely; 1 is off", above=0)

    def __str__(self):
        on = {k: v for k, v in asdict(self).items() if k == "temperature" or v != getattr(Sampling, k)}
        return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in on.items())


PRESETS = {
    "conservative": Sampling(temperature=0.6, top_k=40),
    "nucleus": Sampling(temperature=0.8, top_p=0.9),
    "greedy": Sampling(temperature=0.0),
}

# ---------------------------------------------------------------------------------------
# Sampling. Each function takes and returns logits (B, V) in float32; a token that is ruled out has -inf.


def penalize(logits, seen, penalty):
    """Makes the tokens that are `seen` (B, V) less likely (CTRL, Keskar et al. 2019).

    A positive logit is divided and a negative one multiplied, so a penalty above 1 lowers both.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits, k):
    """Keeps the k most probable tokens and those equal to the last of them; k is at most V (Fan et al. 2018)."""
    worst_kept = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < worst_kept, -math.inf)


def keep_top_p(logits, p):
    """Keeps the nucleus: the smallest set of tokens whose probability reaches p (Holtzman et al. 2019)."""
    probabilities = logits.softmax(-1)
    best, ids = probabilities.topk(min(MOST_NUCLEI, logits.size(-1)))  # the beginning of the sort, at a lower cost
    if best.sum(-1).min() < p:  # a larger nucleus needs the whole sort
        best, ids = probabilities.sort(-1, descending=True)
    before = best.cumsum(-1) - best  # the probability of the tokens before this one; 0 for the first
    inside = (before < p) | (before == 0)  # a p near 0 is 0 in float32, and one token must stay
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, inside)
    return logits.masked_fill(~keep, -math.inf)


def keep_min_p(logits, min_p):
    """Keeps the tokens with at least min_p times the probability of the best one (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def sample_token(logits, u):
    """One id per row by inverse CDF: the first whose cumulative probability exceeds u (B,), in [0, 1).

    The sum is computed on the CPU, in order and in float64. So it never decreases, a token with probability 0 is never
    chosen, and all devices choose the same. Returns (B,) on the CPU.
    """
    cdf = logits.softmax(-1).cpu().double().cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)


def choose(logits, sampling, seen, u):
    """The next id of each row, (B,) on the CPU. logits (B, V) in any precision, seen (B, V), u (B,).

    Raises UserError where the logits are NaN or infinite.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    best = logits.amax(-1, keepdim=True)
    if not best.isfinite().all():  # the maximum of a row with NaN is NaN
        raise UserError("the logits are not finite: a damaged checkpoint, or too extreme a repetition penalty")
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1).cpu()
    logits = (logits - best) / sampling.temperature  # the best is 0 now, so nothing overflows
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return sample_token(logits, u)


# ---------------------------------------------------------------------------------------
# Generation.


def random_stream(seed, sample):
    """The random stream of one sample. Its seed is a hash: with seed + sample the second sample of seed 0 would be the
    first of seed 1. torch's generator on the CPU uses 32 bits of it."""
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def new_cache(model, capacity):
    """A cache of one row in the dtype of attention: autocast's, or the weights'."""
    weight = model.wte.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return KVCache(model.config, 1, capacity, weight.device, dtype)


@torch.no_grad()  # holds within each step; the caller's code between two steps is outside
def generate(model, tokens, sampling, max_new_tokens, num_samples=1, seed=0, stop_token=None):
    """Yields, step by step, the next id of each sample: [int] * num_samples, None once it has ended.

    `tokens` is the prompt, at most block_size ids. `stop_token` (end of text) ends a sample; where the prompt is empty,
    generation starts from it. When the context is full, its last half is encoded again at the first positions.
    Sample i depends on (seed, i) alone, except for rounding that changes with the batch size.
    Raises ValueError for a prompt that is too long, or empty without stop_token, or a bad `sampling`.
    """
    tokens = list(tokens) or [stop_token]
    if range_problems(sampling) or tokens == [None]:
        raise ValueError("; ".join(range_problems(sampling)) or "no token to start from")
    config, device, was_training = model.config, model.wte.weight.device, model.training
    streams = [random_stream(seed, i) for i in range(num_samples)]
    seen = torch.zeros(num_samples, config.valid_vocab_size, dtype=torch.bool, device=device)
    seen[:, tokens] = True
    contexts, alive = [tokens.copy() for _ in range(num_samples)], [True] * num_samples
    cache, feed = new_cache(model, min(config.block_size, len(tokens) + max_new_tokens)), [tokens]
    model.eval()
    try:
        for step in range(max_new_tokens):
            with attention_of_any_shape():
                x = model.features(torch.tensor(feed, device=device), cache=cache)  # (1, T, C), later (B, 1, C)
            logits = model.logits(x[:, -1])  # (B, V)
            if step == 0:  # all samples share the pass over the prompt
                cache.repeat(num_samples)
                logits = logits.expand(num_samples, -1)
            u = torch.stack([torch.rand((), generator=s, dtype=torch.float64) for s in streams])
            ids = choose(logits, sampling, seen, u)
            seen.scatter_(1, ids[:, None].to(device), True)
            for context, token in zip(contexts, ids.tolist()):
                context.append(token)
            yield [c[-1] if a else None for c, a in zip(contexts, alive)]
            alive = [a and c[-1] != stop_token for c, a in zip(contexts, alive)]
            if not any(alive):
                return
            fresh = 1
            if cache.length == config.block_size:  # full: encode the last half again
                cache.length, fresh = 0, max(1, config.block_size // 2)
            feed = [c[-fresh:] for c in contexts]
    finally:
        model.train(was_training)


# ---------------------------------------------------------------------------------------
# Ids to text, one after the other.


class TokenDecoder:
    """The text of the ids that follow a prompt; each piece is returned as soon as no later id can change it.

    Prompt and continuation are decoded together, because many tokenizers drop the space before the first token of a
    text. The text of the continuation is what follows the longest common beginning of decode(prompt) and
    decode(prompt + continuation). Two things are held back: a U+FFFD at the end, which may be the first part of a
    character, and the text of the ids in `tokenizer.unsettled`.

    Only the last WINDOW ids are decoded again for each new id, so the time of an id does not grow with the text. This
    is enough, because the text of an id depends on the id, on whether it is the first, and on at most 4 bytes of one
    character. New text is found by its position, so it does not matter that the first character of the window may be
    cut.
    """

    def __init__(self, tokenizer, prompt=()):
        self.tokenizer = tokenizer
        self.window = [i for i in prompt if i not in tokenizer.unused]
        self.prompt = tokenizer.decode(self.window)  # None as soon as text has followed it
        self.returned = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """The text that no later id can change now; '' if there is none."""
        if token in self.tokenizer.unused:
            return ""
        self.window.append(token)
        if token in self.tokenizer.unsettled:
            return ""
        text = self.settled(self.window)
        piece = self.new(text)
        if piece or self.prompt is None:
            self.prompt, self.returned = None, len(text)
            text = self.settled(self.window[-WINDOW:])
            if text:  # else a decoder would take the next id for the first of the text
                self.window, self.returned = self.window[-WINDOW:], len(text)
        return piece

    def finish(self) -> str:
        """The text that was held back; no id follows."""
        return self.new(self.tokenizer.decode(self.window))

    def new(self, text):
        """The part of the window's text that was not returned yet and is not the prompt's."""
        if self.prompt is not None:
            alike = (a == b for a, b in zip(self.prompt, text))
            self.returned = sum(takewhile(bool, alike))
        return text[self.returned :]

    def settled(self, ids):
        """The text of the ids, less a U+FFFD at its end, which other bytes of a character may change."""
        return self.tokenizer.decode(ids).removesuffix(REPLACEMENT)


class Sample:
    """One sample: takes ids, returns text, until end of text, a stop string or the length ends it."""

    def __init__(self, tokenizer, stops=(), prompt=()):  # prompt: the ids before the sample
        self.decoder, self.eot_token, self.stops = TokenDecoder(tokenizer, prompt), tokenizer.eot_token, stops
        self.held = ""  # text that may be the beginning of a stop string
        self.text, self.tokens = "", 0  # tokens: their number, without the end of text
        self.finish_reason = None  # "end_of_text", "stop" or "length"

    def push(self, token: int) -> str:
        """Takes the next id; returns the text that no later id can change now."""
        if token == self.eot_token:
            return self.finish("end_of_text")
        self.tokens += 1
        return self.add(self.decoder.push(token))

    def finish(self, reason: str) -> str:
        """Ends the sample; returns the text that was held back."""
        piece = self.add(self.decoder.finish())
        if self.finish_reason is None:
            piece, self.text, self.finish_reason = piece + self.held, self.text + self.held, reason
        return piece

    def add(self, piece):
        """The text up to the stop string that is complete first, or up to the beginning of a possible one."""
        text, self.held = self.held + piece, ""
        complete = [(text.find(s) + len(s), text.find(s)) for s in self.stops if s in text]  # (end, start)
        if complete:
            self.finish_reason, text = "stop", text[: min(complete)[1]]
        else:
            beginnings = (s[:n] for s in self.stops for n in range(1, len(s)))
            cut = len(text) - max((len(b) for b in beginnings if text.endswith(b)), default=0)
            text, self.held = text[:cut], text[cut:]
        self.text += text
        return text


def stream_text(samples, model, tokens, sampling, max_new_tokens, seed):
    """Generates until all samples are finished; yields the new text of each step, [str] * len(samples)."""
    ids = generate(model, tokens, sampling, max_new_tokens, len(samples), seed, samples[0].eot_token)
    with contextlib.closing(ids):  # where stop strings end it early, the model gets its mode back here
        for step in ids:
            yield [s.push(token) if s.finish_reason is None else "" for s, token in zip(samples, step)]
            if all(s.finish_reason for s in samples):
                return
    yield [s.finish("length") if s.finish_reason is None else "" for s in samples]


def sample_text(
    model, tokenizer, prompt, sampling=PRESETS["nucleus"], max_new_tokens=200, num_samples=1, seed=0, poll=None
) -> list[str]:
    """Continuations of the prompt, num_samples of them, each without the prompt itself.

    The model's mode and torch's random stream are the same afterwards as before. `poll` is called after each token;
    what it raises ends the sampling. Raises ValueError where the prompt exceeds block_size tokens."""
    tokens = tokenizer.encode(prompt)
    samples = [Sample(tokenizer, prompt=tokens) for _ in range(num_samples)]
    for _ in stream_text(samples, model, tokens, sampling, max_new_tokens, seed):
        if poll is not None:
            poll()
    return [s.text for s in samples]


# ---------------------------------------------------------------------------------------
# Command line.


def unset(name):
    """The flag of a field of Sampling with None as its default. A value that is given overrides the preset's."""
    about = Sampling.__dataclass_fields__[name].metadata
    return field(default=None, metadata={**about, "help": f"{about['help']}; default: the preset's"})


@dataclass(frozen=True)
class InferenceConfig:
    """Which model, which text, which sampling. Every field is a flag."""

    checkpoint: str | None = flag(
        None, "a run or one checkpoint; default: newest under checkpoints/", unit="folder", group="model and text"
    )
    prompt: str | None = flag(None, f"to continue, '' starts a new text; default: {DEFAULT_PROMPT!r}", unit="text")
    prompt_file: str | None = flag(
        None, "UTF-8 text to continue, less one newline at its end; - reads all of stdin; default: none", unit="file"
    )
    interactive: bool = flag(False, "continue each line typed, until end of input")
    truncate_left: bool = flag(False, "cut a prompt of too many tokens on its left; else an error")

    preset: str = flag("all", f"{'; '.join(f'{name}: {s}' for name, s in PRESETS.items())}; all: one after the other",
                       unit="name", choices=(*PRESETS, "all"), group="sampling")  # fmt: skip
    temperature: float | None = unset("temperature")
    top_k: int | None = unset("top_k")
    top_p: float | None = unset("top_p")
    min_p: float | None = unset("min_p")
    repetition_penalty: float | None = unset("repetition_penalty")
    seed: int = flag(0, "same seed, same text; any integer")

    max_new_tokens: int = flag(200, "of a sample, at most", at_least=1, unit="tokens", group="output")
    num_samples: int = flag(1, "per preset; one is shown as it grows", at_least=1, unit="samples")
    stop: tuple[str, ...] = flag((), "end before this text; repeatable", unit="text")
    json: bool = flag(False, "one JSON object a sample; else prompt and text")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps; auto: the fastest there is", unit="name")
    dtype: str = flag(
        "auto", "of products; auto: what the hardware is best at, and float32 for a small model on a CPU", unit="name",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip


def problems(c: InferenceConfig) -> list[str]:
    """Everything wrong with the flags and with the file that they name, a line each."""
    found = range_problems(c)
    if "" in c.stop:
        found.append("--stop is empty; it must hold text")
    prompts = [f"--{n}" for n in ("prompt", "prompt_file", "interactive") if getattr(c, n) not in (None, False)]
    if len(prompts) > 1:
        found.append(f"{' and '.join(prompts)} exclude each other")
    if c.prompt_file not in (None, "-") and not Path(c.prompt_file).is_fifo():  # a pipe can be read once only
        try:
            read_text(c.prompt_file)
        except UserError as error:
            found.append(str(error))
    return found


def read_text(source):
    """A UTF-8 file, or stdin for "-", without the newline that editors and `echo` put at its end."""
    try:
        with open(0 if source == "-" else source, encoding="utf-8-sig", closefd=source != "-") as file:
            return file.read().removesuffix("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or NUL in the name
        raise UserError(f"prompt file {source}: {getattr(error, 'strerror', None) or error}") from error


def read_prompt(c: InferenceConfig) -> str:
    """The text to continue. stdin is read only when it is named, because in a shell's loop, or in a script that the
    shell itself reads from stdin, what stands there are the next commands."""
    if c.prompt_file is not None:
        return read_text(c.prompt_file)
    return DEFAULT_PROMPT if c.prompt is None else c.prompt


def presets_of(c: InferenceConfig) -> dict:
    """The presets to show, by name, changed by the sampling flags that were given."""
    given = {f.name: getattr(c, f.name) for f in fields(Sampling) if getattr(c, f.name) is not None}
    return {name: replace(PRESETS[name], **given) for name in (PRESETS if c.preset == "all" else [c.preset])}


def show(text):
    """Prints at once. Raises ReaderLeft where nobody reads the output any more; that ends the program."""
    print(text, end="", flush=True)
    refuse_unread()


def cut_prompt(tokens, limit, truncate_left):
    """The prompt's ids if the context holds them, or their last `limit`. Raises UserError."""
    cut = len(tokens) - limit
    if cut <= 0:
        return tokens
    if not truncate_left:
        raise UserError(f"the prompt has {len(tokens)} tokens, the context {limit}; --truncate_left cuts its beginning")
    print(f"the first {cut} of the prompt's {len(tokens)} tokens are cut", file=sys.stderr)
    return tokens[cut:]


def complete(model, tokenizer, prompt, presets, args):
    """Continues one prompt under each preset and prints the texts. UserError for a prompt that is too long."""
    tokens = cut_prompt(tokenizer.encode(prompt), model.config.block_size, args.truncate_left)
    many = args.num_samples > 1
    streamed, titled = not (many or args.json), not args.json and (many or len(presets) > 1)
    before = "" if args.interactive else prompt  # a typed line is on the screen already
    for name, sampling in presets.items():
        show((f"=== {name} ({sampling}) ===\n" if titled else "") + (before if streamed else ""))
        samples = [Sample(tokenizer, args.stop, tokens) for _ in range(args.num_samples)]
        start, first = time.perf_counter(), None
        for pieces in stream_text(samples, model, tokens, sampling, args.max_new_tokens, args.seed):
            first = first or time.perf_counter() - start
            show(pieces[0] if streamed else "")
        seconds = time.perf_counter() - start
        show("\n" if streamed else "")
        for i, sample in enumerate(samples):
            if args.json:
                row = {"preset": name, "sample": i, "seed": args.seed, "prompt": prompt, "text": sample.text}
                row |= {"tokens": sample.tokens, "finish_reason": sample.finish_reason}
                show(json.dumps(row | {"tokens_per_second": round(sample.tokens / seconds, 1)}) + "\n")
            elif many:
                show(f"--- sample {i + 1} of {len(samples)} ---\n{before}{sample.text}\n")
        count = sum(s.tokens for s in samples)
        rate = f"{count} tokens, {count / seconds:.1f} tokens/s, first after {first * 1000:.0f} ms"
        print(f"{name}: {rate}", file=sys.stderr)


def converse(model, tokenizer, presets, args):
    """Continues each line that is typed, as a prompt of its own, until end of input."""
    while True:
        try:
            complete(model, tokenizer, input("" if args.json else "> "), presets, args)
        except EOFError:
            return show("" if args.json else "\n")
        except UserError as error:  # one bad line does not end the program
            print(f"error: {error}", file=sys.stderr)


def main(argv=None):
    """Text goes to stdout, what is said about it to stderr."""
    args = parse(InferenceConfig, argv, __doc__, problems)
    device, dtype = pick(args.device, args.dtype)
    presets, prompt = presets_of(args), read_prompt(args)
    for stream in (sys.stdin, sys.stdout):  # UTF-8 whatever the console's own; lone surrogates print as "?"
        with contextlib.suppress(AttributeError):  # a notebook has other streams
            stream.reconfigure(encoding="utf-8", errors="replace")
    path = find_checkpoint(args.checkpoint)
    with memory_advice("on the device; name another --device"):
        model, tokenizer = read_model(path, device)
    if args.dtype == "auto" and device.type == "cpu" and model.num_parameters() < SMALL:
        dtype = "float32"  # reading so few weights takes less time than converting x for each product
    print(f"checkpoint {path.parent.name}/{path.name} on {device} in {dtype}", file=sys.stderr)
    with memory_advice("on the device; lower --num_samples or --max_new_tokens"):
        sample_faster(model, dtype)
        with torch.inference_mode(), autocast(device, dtype):  # faster than no_grad alone
            if args.interactive:
                converse(model, tokenizer, presets, args)
            else:
                complete(model, tokenizer, prompt, presets, args)


if __name__ == "__main__":
    sys.exit(run(main))
