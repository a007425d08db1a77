"""HellaSwag: does the model find the true continuation of a scene likelier than three false ones?

10,042 validation examples of a context and four endings (Zellers et al. 2019). A base model is
not asked a question; each ending is scored by the probability the model gives its tokens after
the context, and the likeliest counts as its answer. How the text is cut into tokens and how
lengths are evened out moves the result by points, so every number here carries the name of its
convention:

  completion   raw context; each ending tokenised alone behind a space. `acc` compares summed
               log-probabilities, `acc_norm` their mean per token. The convention of
               build-nanogpt and llm.c, under which GPT-2 124M has 28.59 acc and 29.55 acc_norm.

Notable: rows of one length share a batch, and the projection to the vocabulary, the dearest
part of a small model, is computed only where an ending's token is predicted. Batches, not
examples, are dealt out to the ranks, so each number is bit for bit the same on any number of them.

Shapes: N examples, 4 endings each, R = 4N rows, B rows in a batch, T tokens, C channels,
E tokens of endings in a batch.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import find_checkpoint, load_model
from errors import Parser, UserError, run
from files import write_whole
from runtime import autocast, pick_device, pick_dtype

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
BLOB = "0f5ee25d72216f12317d5d8a7b92deafa423d81e"  # the official file's git object id
LINES = 10_042
CACHE = Path("hellaswag", "hellaswag_val.jsonl")
TIMEOUT = 30  # seconds without a byte
DEADLINE = 600  # seconds for one attempt in all
MAX_BYTES = 64 * 2**20  # five times the official file; what is longer is something else
ATTEMPTS = 4  # with 1, 2 and 4 seconds between them
OFFLINE = 20  # seconds without any answer, after which there is no other attempt

GPT2_124M = {"completion_acc": 28.59, "completion_acc_norm": 29.55}  # percent, as build-nanogpt reports them
CHANCE = 25.0  # percent
LOGIT_ROWS = 1024  # rows of logits alive at once: 0.2 GB of float32 with GPT-2's vocabulary
IGNORE = -100  # the target of a position that predicts no ending token

# ---------------------------------------------------------------------------------------
# The data.


def problem(body: bytes) -> str | None:
    """Why these bytes are not the official file; None if they are."""
    lines = len(body.splitlines())
    if lines != LINES:
        return f"found {lines:,} lines, expected {LINES:,}"
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # how git names a file's content
    return None if blob == BLOB else f"found git blob {blob}, expected {BLOB}"


def fetch(path) -> bytes:
    """The official file from the network. UserError says which file to fetch by hand, and where to put it."""
    began = time.monotonic()
    for attempt in range(ATTEMPTS):
        deadline, body = time.monotonic() + DEADLINE, bytearray()
        try:
            with requests.get(URL, timeout=TIMEOUT, stream=True) as response:
                response.raise_for_status()
                for chunk in response.iter_content(2**16):
                    body += chunk
                    if len(body) > MAX_BYTES or time.monotonic() > deadline:
                        raise ValueError(f"no end after {len(body):,} bytes")
            why = problem(bytes(body))
        except requests.ConnectionError:
            why = "no connection" if not body else f"the connection broke after {len(body):,} bytes"
        except (requests.RequestException, ValueError) as error:
            why = str(error)
        if why is None:
            return bytes(body)
        if not body and time.monotonic() - began > OFFLINE:
            break
        if attempt + 1 < ATTEMPTS:
            time.sleep(2**attempt)
    raise UserError(
        f"HellaSwag could not be fetched ({why}). Fetch {URL} by other means and put it at {path}, "
        "or name any copy of it with --data PATH (train.py: --hellaswag_data PATH)"
    )


def download(path=CACHE) -> Path:
    """The path of the official file, which is fetched unless it is there and whole.

    What arrives is checked before anything is written, and appears at once or not at all. Raises UserError.
    """
    path = Path(path)
    if path.is_file():
        why = problem(path.read_bytes())
        if why is None:
            return path
        print(f"{path}: {why}; fetching it again", file=sys.stderr)
    write(path, fetch(path))
    return path


def write(path, body: bytes):
    """Writes all of it or nothing, and makes the folder where there is none. Raises UserError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, body)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def parse_example(line: bytes) -> dict:
    """The example in a line of JSON; raises ValueError that says what is wrong with it."""
    try:
        example = json.loads(line.strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(example, dict):
        raise ValueError(f"found a JSON {type(example).__name__}, expected an object")
    ctx, label, endings = (example.get(key) for key in ("ctx", "label", "endings"))
    if not isinstance(ctx, str):
        raise ValueError(f"ctx is {ctx!r:.40}, expected a string")
    if type(label) is not int or not 0 <= label <= 3:  # in Python True is an int
        raise ValueError(f"label is {label!r:.40}, expected an integer from 0 to 3")
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e for e in endings)):
        raise ValueError(f"endings is {endings!r:.40}, expected 4 strings, none of them empty")
    return example


def load_examples(path=None, limit: int | None = None) -> list[dict]:
    """Examples with ctx (str), label (0..3) and endings (4 str), in the file's order; the first `limit` of them.

    A `path` is taken as it is, whatever its number of lines; without one comes the official
    file. Raises UserError that names file and line where one is malformed.
    """
    official, path, examples = path is None, Path(path or CACHE), []
    try:
        if official:
            download(path)
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    examples.append(parse_example(line))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples[:limit]


# ---------------------------------------------------------------------------------------
# The scores.


@dataclass
class Scores:
    """What the model says about N examples; from it every accuracy follows."""

    labels: np.ndarray  # (N,) which ending is the true one
    sums: np.ndarray  # (N, 4) float64: summed log-probability of an ending's tokens, nats
    tokens: np.ndarray  # (N, 4) how many tokens were summed
    truncated: int  # examples of which some row lost its beginning

    def choices(self) -> dict[str, np.ndarray]:
        """The ending (N,) that the model prefers, by the name of the accuracy; of equals the first."""
        mean = self.sums / self.tokens
        return {"completion_acc": self.sums.argmax(1), "completion_acc_norm": mean.argmax(1)}

    def summary(self) -> dict:
        """Accuracies as fractions of 1, each with its standard error, and the counts."""
        n, result = len(self.labels), {}
        for name, choice in self.choices().items():
            p = float((choice == self.labels).mean())
            result[name] = p
            result[f"{name}_stderr"] = (p * (1 - p) / max(n - 1, 1)) ** 0.5
        return result | {"examples": n, "truncated": self.truncated}


def render_completion(example: dict, tokenizer) -> tuple[list[int], list[list[int]]]:
    """(ids of the context, ids of each of the 4 endings) in the `completion` convention."""
    context, *endings = tokenizer.encode_batch([example["ctx"]] + [" " + e for e in example["endings"]])
    return context or [tokenizer.eot_token], endings  # the first token of an ending needs one before it


def fit(context: list[int], ending: list[int], block_size: int) -> tuple[list[int], int]:
    """A row: (ids, how many of the last are scored). What is too long loses its beginning.

    The last id is predicted but never read, so block_size + 1 of them fit.
    """
    ids = (context + ending)[-(block_size + 1) :]
    return ids, min(len(ending), len(ids) - 1)


def batches(rows, batch_tokens: int):
    """Lists of row numbers, longest rows first, so that too large a batch fails at once and not at the end.

    B rows padded to T tokens satisfy B·T <= batch_tokens, except that a batch has at least one row.
    """
    order = sorted(range(len(rows)), key=lambda r: -len(rows[r][0]))  # stable: equals stay in order
    start = 0
    while start < len(order):
        T = len(rows[order[start]][0]) - 1
        end = start + max(1, batch_tokens // T)
        yield order[start:end]
        start = end


def score_batch(model, rows, device) -> list[float]:
    """Summed log-probability, nats, of the scored ids of each (ids, scored) in `rows`."""
    B, T = len(rows), max(len(ids) for ids, _ in rows) - 1
    inputs = torch.zeros(B, T, dtype=torch.long)  # padded on the right, where causal attention cannot look
    targets = torch.full((B, T), IGNORE)
    for b, (ids, scored) in enumerate(rows):
        end = len(ids) - 1
        inputs[b, :end] = torch.tensor(ids[:-1])
        targets[b, end - scored : end] = torch.tensor(ids[-scored:])
    where = (targets.flatten() != IGNORE).nonzero()[:, 0]  # (E,) row after row
    x = model.features(inputs.to(device)).flatten(0, 1)[where.to(device)]  # (E, C)
    y = targets.flatten()[where].to(device)
    nats = [
        F.cross_entropy(model.logits(x_part).float(), y_part, reduction="none")
        for x_part, y_part in zip(x.split(LOGIT_ROWS), y.split(LOGIT_ROWS))
    ]
    per_row = torch.cat(nats).cpu().double().split([scored for _, scored in rows])
    return [-row.sum().item() for row in per_row]


@torch.inference_mode()
def score_rows(model, rows, device, batch_tokens, rank=0, world=1, progress=None) -> np.ndarray:
    """Summed log-probability (R,), nats, of the scored ids of each (ids, scored) in `rows`.

    With several ranks, 0 where another rank has the row: the sum over the ranks is whole.
    After each batch `progress(sums, done)` is called, `done` (R,) being True where a row is scored.
    """
    sums, done = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    was_training = model.training
    model.eval()
    try:
        for number, batch in enumerate(batches(rows, batch_tokens)):
            if number % world == rank:
                sums[batch] = score_batch(model, [rows[r] for r in batch], device)
                done[batch] = True
                if progress is not None:
                    progress(sums, done)
    finally:
        model.train(was_training)
    return sums


def score(
    model, tokenizer, examples, device=None, batch_tokens=None, rank=0, world=1, reduce=None, progress=None
) -> Scores:
    """The model's `Scores` on the examples, under the caller's autocast; log-probabilities are float32.

    Every rank passes all the examples and gets the whole answer; `reduce`, needed where there are
    several, adds a float64 tensor on `device` up over the ranks and returns it. `progress` is called
    as in `score_rows`; what it raises ends the evaluation and leaves the model in the mode it had.
    """
    device = torch.device(device or next(model.parameters()).device)
    batch_tokens = batch_tokens or (2048 if device.type == "cpu" else 16_384)  # CPUs like what fits their caches
    block_size = model.config.block_size
    rendered = [render_completion(example, tokenizer) for example in examples]
    rows = [fit(context, ending, block_size) for context, endings in rendered for ending in endings]
    sums = score_rows(model, rows, device, batch_tokens, rank, world, progress)
    if world > 1:
        sums = reduce(torch.from_numpy(sums).to(device)).cpu().numpy()
    if not np.isfinite(sums).all():
        bad = np.flatnonzero(~np.isfinite(sums))[0] // 4
        raise UserError(f"the model gives the endings of HellaSwag example {bad} no finite log-probability")
    longest = [len(context) + max(map(len, endings)) for context, endings in rendered]
    return Scores(
        labels=np.array([example["label"] for example in examples]),
        sums=sums.reshape(-1, 4),
        tokens=np.array([scored for _, scored in rows]).reshape(-1, 4),
        truncated=sum(length > block_size + 1 for length in longest),
    )


def evaluate(model, tokenizer, examples, **options) -> dict:
    """The `Scores.summary()` of `score(model, tokenizer, examples, **options)`."""
    return score(model, tokenizer, examples, **options).summary()


# ---------------------------------------------------------------------------------------
# The command line.


def running_accuracy(bar, labels):
    """A `progress` that shows on the bar how many examples are complete, and the accuracy among them."""

    def progress(sums, done):
        complete = done.reshape(-1, 4).all(1)
        right = sums.reshape(-1, 4).argmax(1) == labels
        bar.set_postfix(completion_acc=f"{100 * right[complete].mean():.2f}" if complete.any() else "-", refresh=False)
        bar.update(int(complete.sum()) - bar.n)

    return progress


def as_json_lines(scores: Scores) -> str:
    """One object a line: index, label, sums (nats), tokens, choices."""
    columns = zip(scores.labels.tolist(), scores.sums.tolist(), scores.tokens.tolist())
    choices = {name: choice.tolist() for name, choice in scores.choices().items()}
    lines = []
    for index, (label, sums, tokens) in enumerate(columns):
        line = {"index": index, "label": label, "sums": sums, "tokens": tokens}
        line["choices"] = {name: choice[index] for name, choice in choices.items()}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def report(result: dict) -> str:
    """The table for a person: percent and standard error, beside GPT-2 124M and chance."""
    lines = [f"{'HellaSwag, percent':<22}{'this model':>14}{'GPT-2 124M':>12}{'chance':>8}"]
    for name, reference in GPT2_124M.items():
        value = f"{100 * result[name]:.2f} ± {100 * result[f'{name}_stderr']:.2f}"
        lines.append(f"{name.replace('_', ' ', 1):<22}{value:>14}{reference:>12.2f}{CHANCE:>8.2f}")
    lines.append("completion: raw context; acc by sum, acc_norm by mean per token (build-nanogpt, llm.c)")
    if result["examples"] != LINES:
        lines.append(f"on {result['examples']:,} examples; GPT-2's numbers are for all {LINES:,}")
    if result["truncated"]:
        lines.append(f"{result['truncated']:,} examples were longer than the context and lost their beginning")
    return "\n".join(lines)


def parse_args(argv):
    parser = Parser(description="Score a checkpoint on HellaSwag; the table goes to stdout.")
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="a run's directory or one checkpoint (default: newest under checkpoints/)")
    add("--data", metavar="FILE", help=f"HellaSwag JSONL on this machine (default: {CACHE}, downloaded once)")
    add("--limit", type=int, metavar="N", help="examples, the first N of the file (default: all)")
    add("--batch_tokens", type=int, metavar="N", help="in a batch, with padding (default: 16,384; on a CPU 2,048)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto, the fastest there is)")
    choices = ["auto", "float32", "bfloat16"]
    add("--dtype", choices=choices, default="auto", help="of products (default: auto, the hardware's fastest)")
    add("--json", metavar="FILE", help="write each example's scores here, one JSON object a line (default: nowhere)")
    args = parser.parse_args(argv)
    given = {"limit": args.limit, "batch_tokens": args.batch_tokens}
    wrong = [f"--{name} is {n}; it must be at least 1" for name, n in given.items() if n is not None and n < 1]
    if wrong:
        raise UserError("; ".join(wrong))
    return args


def main(argv=None):
    """The command line; raises UserError, which `errors.run` turns into one line and exit code 2."""
    args = parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    path = find_checkpoint(args.checkpoint)
    examples = load_examples(args.data, args.limit)
    model, tokenizer = load_model(path, device)
    print(f"checkpoint {path.parent.name}/{path.name} on {device} in {dtype}", file=sys.stderr)
    labels = np.array([example["label"] for example in examples])
    try:
        with autocast(device, dtype), tqdm(total=len(examples), unit=" examples", disable=None, leave=False) as bar:
            progress = running_accuracy(bar, labels)  # disable=None: no bar where stderr is not a terminal
            scores = score(model, tokenizer, examples, device, args.batch_tokens, progress=progress)
    except torch.OutOfMemoryError as error:
        raise UserError("out of memory on the device; lower --batch_tokens") from error
    print(report(scores.summary()))
    if args.json:
        write(args.json, as_json_lines(scores).encode())


if __name__ == "__main__":
    sys.exit(run(main))
