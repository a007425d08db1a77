"""HellaSwag: of four endings of a scene, does the model give the true one the highest probability?

    python hellaswag_eval.py --checkpoint checkpoints/demo               # four accuracies, beside GPT-2's
    python hellaswag_eval.py --hf_model gpt2 --dtype float32             # the same code on another model
    torchrun --standalone --nproc_per_node 8 hellaswag_eval.py           # the same numbers, on eight GPUs

The validation set has 10,042 examples of a context and four endings (Zellers et al. 2019). A base model cannot be asked
a question. So each ending is scored by the log-probability of its tokens after the context, and the ending with the
highest score is the model's answer. Two details move the accuracy by points: how the text is cut into tokens, and how
endings of different length are compared. So each number has the name of its convention, and one run gives both:

  completion   raw context; each ending tokenised alone, behind a space. `acc` compares summed log-probabilities,
               `acc_norm` their mean per token. The convention of build-nanogpt and llm.c.
  harness      the activity's name before the context, WikiHow's marks removed; context and ending tokenised together.
               `acc` compares sums, `acc_norm` sums per character. The convention of lm-evaluation-harness.

Products in bfloat16 change single answers (1 of 500): for a comparison with published figures use --dtype float32.

The four endings of an example lie in one row behind their context, which is computed once. Logits are computed only
where a token of an ending is predicted. Ranks share batches, not examples, so the numbers are the same for any number
of ranks, to the last bit.

Shapes: N examples, 4 endings each, S sequences (a context and one ending), B rows in a batch,
T tokens in a row, C channels, E predicted tokens in a batch.
"""

import hashlib
import json
import math
import re
import sys
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from support.cli import UserError, flag, one_line, parse, range_problems, run  # isort: split

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import find_checkpoint, read_model
from support.download import download
from support.files import write_whole
from support.runtime import Runtime, attention_of_any_shape, memory_advice, start
from support.tracking import Progress
from tokenizer import replace_surrogates

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
BLOB = "0f5ee25d72216f12317d5d8a7b92deafa423d81e"  # the official file's git object id
LINES = 10_042
CACHE = Path("hellaswag", "hellaswag_val.jsonl")
MAX_BYTES = 64 * 2**20  # five times the official file; what is longer is something else
ATTEMPTS = 4  # to download it, with 1, 2 and 4 seconds between them
PATIENCE = 20  # seconds without any answer, after which the machine counts as offline

GPT2_124M = {  # percent, on all examples, as build-nanogpt and lm-evaluation-harness report them
    "completion_acc": 28.59,
    "completion_acc_norm": 29.55,
    "harness_acc": 28.92,
    "harness_acc_norm": 31.14,
}
CHANCE = 25.0  # percent
LOGIT_ROWS = 1024  # rows of logits alive at once: 0.2 GB of float32 with GPT-2's vocabulary
HF_BLOCK_SIZE = 2048  # context of a Hugging Face model that states none, as in lm-evaluation-harness

# ---------------------------------------------------------------------------------------
# The data.


def unlike_official(path) -> str | None:
    """What is wrong with a file that should be the official one; None if it is that file."""
    body = Path(path).read_bytes()
    lines = len(body.splitlines())
    if lines != LINES:
        return f"found {lines:,} lines, expected {LINES:,}"
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # how git names a file's content
    return None if blob == BLOB else f"found git blob {blob}, expected {BLOB}"


def download_examples(path):
    """Makes `path` the official file, which is downloaded unless it is there. UserError says how to do without."""
    try:
        download(URL, path, check=unlike_official, at_most=MAX_BYTES, attempts=ATTEMPTS, patience=PATIENCE)
    except UserError as error:
        raise UserError(
            f"HellaSwag could not be fetched ({error}). Fetch {URL} by other means and put it at {path}, "
            "or name a copy of it with --data PATH (train.py: --hellaswag_data PATH)"
        ) from error


def checked(example) -> dict:
    """The example, if it has what is needed; a label that is text, as on the hub, becomes a number. Or ValueError."""
    if not isinstance(example, dict):
        raise ValueError(f"found a JSON {type(example).__name__}, expected an object")
    example.setdefault("ctx_b", "")  # as in the dataset that lm-evaluation-harness reads
    for key in ("activity_label", "ctx_a", "ctx_b", "ctx"):
        if not isinstance(example.get(key), str):
            raise ValueError(f"{key} is {example.get(key)!r:.40}, expected a string")
    label, endings = example.get("label"), example.get("endings")
    if label in ("0", "1", "2", "3"):
        example["label"] = label = int(label)
    if type(label) is not int or not 0 <= label <= 3:  # in Python True is an int
        raise ValueError(f"label is {label!r:.40}, expected an integer from 0 to 3")
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e for e in endings)):
        raise ValueError(f"endings is {endings!r:.40}, expected 4 strings, none of them empty")
    return example


def read_examples(path):
    """Yields the examples of a file: JSON lines, or parquet as the hub has it. UserError names file and line."""
    if Path(path).suffix.lower() == ".parquet":
        what, rows = "row", read_parquet(path)
    else:
        what, rows = "line", Path(path).read_bytes().splitlines()
    for number, row in enumerate(rows, 1):
        try:
            yield checked(json.loads(row) if what == "line" else row)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, {what} {number}: {error}") from error


def read_parquet(path) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error


def load_examples(path=None, limit: int | None = None) -> list[dict]:
    """The first `limit` examples of a file of JSON lines or parquet, in its order.

    An example has activity_label, ctx_a, ctx_b ("" if there is none), ctx (ctx_a and ctx_b), label (0..3) and endings
    (4 texts). Without a `path` the file is the official one, downloaded the first time. UserError names file and line
    where one is malformed.
    """
    if path is None:
        download_examples(path := CACHE)
    try:
        examples = list(read_examples(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples[:limit]


# ---------------------------------------------------------------------------------------
# The two conventions: text to (ids of the context, ids of an ending).


def render_completion(examples, tokenizer):
    """The `completion` convention: 4 pairs (ids of the context, ids of an ending) for each example.

    Returns (pairs, units). The units are the lengths (4N,) by which acc_norm divides; None: the endings' tokens.
    """
    pairs = []
    texts = [text for e in examples for text in (e["ctx"], *(f" {ending}" for ending in e["endings"]))]
    for context, *endings in ids_of(texts, tokenizer):
        context = context or [tokenizer.eot_token]  # the first token of an ending needs one before it
        pairs += [(context, ending) for ending in endings]
    return pairs, None


def render_harness(examples, tokenizer):
    """The `harness` convention, by the rules of lm-evaluation-harness 0.4: (pairs, units) as `render_completion` gives.

    The units are characters. A context begins with the `prefix` of the tokenizer where it has one, see `HFTokenizer`.
    """
    prefix, pairs, texts, units = getattr(tokenizer, "prefix", ()), [], [], []
    for e in examples:
        query = harness_text(f"{e['activity_label']}: {e['ctx_a']} {e['ctx_b'].capitalize()}")
        endings = [harness_text(ending) for ending in e["endings"]]
        texts += [query.rstrip(), *(f"{query} {ending}" for ending in endings)]
        units += [len(ending) for ending in endings]  # without the space before it
    for context, *wholes in ids_of(texts, tokenizer):
        start = [*prefix, *context] or [tokenizer.eot_token]
        pairs += [(start, whole[len(context) :]) for whole in wholes]  # spaces at the query's end go to the ending
    return pairs, units


def harness_text(text: str) -> str:
    """The text without WikiHow's marks: "How to bow [title] Stand. [step] Lean." is "How to bow. Stand. Lean."."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")  # once: of three spaces two remain


def ids_of(texts, tokenizer):
    """The ids of five texts at a time: those of a context and of four endings."""
    ids = [array.tolist() for array in tokenizer.encode_arrays(texts)]
    return [ids[i : i + 5] for i in range(0, len(ids), 5)]


CONVENTIONS = {"completion": render_completion, "harness": render_harness}


# ---------------------------------------------------------------------------------------
# The scores.


@dataclass
class Scores:
    """The scores of N examples, from which every accuracy follows. Dictionaries are by convention."""

    labels: np.ndarray  # (N,) which ending is the true one
    sums: dict[str, np.ndarray]  # (N, 4) float64: summed log-probability of an ending's tokens, nats
    units: dict[str, np.ndarray]  # (N, 4) length of an ending: tokens for completion, characters for harness
    truncated: int  # examples of which some sequence lost its beginning

    def choices(self) -> dict[str, np.ndarray]:
        """The ending (N,) with the highest score, by the name of the accuracy; the first of equal ones."""
        result = {}
        for name, sums in self.sums.items():
            with np.errstate(divide="ignore"):  # an ending of marks alone has no characters; -x / 0 = -inf loses
                per_unit = sums / self.units[name]
            result |= {f"{name}_acc": sums.argmax(1), f"{name}_acc_norm": per_unit.argmax(1)}
        return result

    def summary(self) -> dict:
        """Accuracies as fractions of 1, each with its standard error, and the counts."""
        n, result = len(self.labels), {}
        for name, choice in self.choices().items():
            p = float((choice == self.labels).mean())
            result[name] = p
            result[f"{name}_stderr"] = (p * (1 - p) / max(n - 1, 1)) ** 0.5
        return result | {"examples": n, "truncated": self.truncated}


class Row(NamedTuple):
    """Sequences in one row of a batch: the beginning that they share, then the rest of each of them.

    Lists as `pack` returns them; `make_rows` returns int32 arrays, which take less memory."""

    ids: list[int]  # (T,)
    positions: list[int]  # (T,) of each token in its own sequence
    parts: list[int]  # (T,) 0 in the shared beginning, n in the rest of the n-th sequence
    where: list[int]  # (E,) the token in this row after which an ending's token is predicted
    targets: list[int]  # (E,) the id that should come
    owners: list[int]  # (E,) number of the sequence to which the prediction counts


def pack(sequences, numbers) -> Row:
    """The row of the sequences with these numbers. A sequence: (ids, how many of the last are scored).

    The beginning that all of them have in common is in the row once. It is the context, or less where a sequence lost
    its beginning or was tokenised differently; the scores are the same in each case.
    """
    inputs = [sequences[n][0][:-1] for n in numbers]
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*inputs)))
    row = Row(inputs[0][:shared], list(range(shared)), [0] * shared, [], [], [])
    for part, (number, own) in enumerate(zip(numbers, inputs), 1):
        ids, scored = sequences[number]
        shift, first = len(row.ids) - shared, len(own) - scored
        row.where.extend(p if p < shared else p + shift for p in range(first, len(own)))
        row.targets.extend(ids[-scored:])
        row.owners.extend([number] * scored)
        row.ids.extend(own[shared:])
        row.positions.extend(range(shared, len(own)))
        row.parts.extend([part] * (len(own) - shared))
    return row


def make_rows(sequences, block_size, packed=True) -> list[Row]:
    """A row for each four sequences, or for each one where not `packed` or where four exceed block_size."""
    rows = []
    for first in range(0, len(sequences), 4):
        four = range(first, first + 4)
        some = [pack(sequences, four)] if packed else []
        if not packed or len(some[0].ids) > block_size:
            some = [pack(sequences, [number]) for number in four]
        rows += [Row(*(np.array(column, np.int32) for column in row)) for row in some]
    return rows


def batches(rows, batch_tokens: int):
    """Lists of rows, the longest rows first, so that a batch that exceeds the memory fails at once.

    B rows padded to T tokens have B·T <= batch_tokens; but a batch has at least one row.
    """
    rows = sorted(rows, key=lambda row: -len(row.ids))  # stable: equals stay in order
    start = 0
    while start < len(rows):
        end = start + max(1, batch_tokens // len(rows[start].ids))
        yield rows[start:end]
        start = end


def visible(parts):
    """Part of each token (B, T) -> mask (B, 1, T, T), True where a query may look at a key.

    A query may look at the tokens of its own sequence up to itself. So each query has at least one key, padding too."""
    query, key = parts[:, :, None], parts[:, None, :]
    causal = torch.ones(parts.size(1), parts.size(1), dtype=torch.bool, device=parts.device).tril()
    return (((key == 0) | (key == query)) & causal)[:, None]


def score_batch(model, batch, device, pieces=1) -> np.ndarray:
    """Log-probability (E,), nats, of the targets of all rows, in order; the logits are computed in `pieces`."""
    T = max(len(row.ids) for row in batch)
    padded = torch.zeros(3, len(batch), T, dtype=torch.long)  # on the right, where no query of a sequence looks
    for b, row in enumerate(batch):
        padded[:, b, : len(row.ids)] = torch.from_numpy(np.stack([row.ids, row.positions, row.parts]))
    ids, positions, parts = padded.to(device)
    where = np.concatenate([np.add(b * T, row.where) for b, row in enumerate(batch)])
    where = torch.from_numpy(where).to(device)
    targets = torch.from_numpy(np.concatenate([row.targets for row in batch])).to(device).long()
    # without parts there is one sequence a row, for which plain causal attention is right
    options = {"positions": positions, "mask": visible(parts)} if padded[2].any() else {}
    with attention_of_any_shape():
        x = model.features(ids, **options)
    x = x.flatten(0, 1)[where]  # (E, C)
    nats = [
        F.cross_entropy(model.logits(x_piece).float(), y_piece, reduction="none")
        for x_piece, y_piece in zip(x.tensor_split(pieces), targets.tensor_split(pieces))
    ]
    return -torch.cat(nats).cpu().double().numpy()  # MPS has no float64


@torch.no_grad()  # not inference_mode, whose tensors a sharded model could not use again in training
def score_rows(model, rows, n, rt, batch_tokens, progress=None) -> np.ndarray:
    """Summed log-probability (S,), nats, of the scored ids of each of the `n` sequences in the rows.

    With several ranks, 0 where another rank has the sequence; the sum over the ranks is the result. In each round
    every rank calls `rt.poll` once, `model.features` once, and `model.logits` as often as the others, because all ranks
    of a sharded model compute together. After each batch of its own a rank calls `progress(sums, done)`, where `done`
    (S,) is True for the sequences that are scored.
    """
    todo = list(batches(rows, batch_tokens))
    pieces = max(-(-sum(len(row.targets) for row in batch) // LOGIT_ROWS) for batch in todo)
    sums, done = np.zeros(n), np.zeros(n, dtype=bool)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(todo), rt.world):
            rt.poll()
            idle = first + rt.rank >= len(todo)
            batch = todo[-1][-1:] if idle else todo[first + rt.rank]  # an idle rank computes the shortest row again
            log_p = score_batch(model, batch, rt.device, pieces)
            if idle:
                continue
            owners = np.concatenate([row.owners for row in batch])
            np.add.at(sums, owners, log_p)
            done[owners] = True
            if progress is not None:
                progress(sums, done)
    finally:
        model.train(was_training)
    return sums


@dataclass
class Task:
    """N examples as rows of ids: what no weight changes. Dictionaries are by convention."""

    labels: np.ndarray  # (N,) which ending is the true one
    rows: list[Row]  # of the sequences, which are in the order (convention, example, ending)
    units: dict[str, np.ndarray]  # (N, 4), see `Scores`
    truncated: int  # see `Scores`


def prepare(tokenizer, examples, block_size, packed=True, conventions=CONVENTIONS) -> Task:
    """Renders, cuts and packs the examples. That takes seconds for all of HellaSwag, and training does it once.

    packed: whether the four sequences of an example share a row. UserError where an ending has no tokens."""
    shape = (len(conventions), len(examples), 4)
    rendered = [CONVENTIONS[name](examples, tokenizer) for name in conventions]
    pairs = [pair for some, _ in rendered for pair in some]
    without = next((i for i, (_, ending) in enumerate(pairs) if not ending), None)
    if without is not None:
        raise UserError(f"HellaSwag example {without // 4 % len(examples)} has an ending without tokens")
    longest = block_size + 1  # ids fit, because the last one is predicted and never an input
    sequences = [((context + ending)[-longest:], min(len(ending), block_size)) for context, ending in pairs]
    tokens = np.array([scored for _, scored in sequences]).reshape(shape)
    cut = np.array([len(context) + len(ending) > longest for context, ending in pairs]).reshape(shape)
    return Task(
        labels=np.array([example["label"] for example in examples]),
        rows=make_rows(sequences, block_size, packed),
        units={
            name: tokens[i] if units is None else np.array(units).reshape(-1, 4)
            for i, (name, (_, units)) in enumerate(zip(conventions, rendered))
        },
        truncated=int(cut.any((0, 2)).sum()),
    )


def score(model, tokenizer, examples, rt=None, batch_tokens=None, progress=None, conventions=CONVENTIONS) -> Scores:
    """The model's `Scores` on the examples, under the caller's autocast; log-probabilities are float32.

    model, tokenizer: of this repository, or `HFModel` and `HFTokenizer`. conventions: names, some of CONVENTIONS. The
    others: see `score_task`."""
    packed = getattr(model, "packed", True)
    task = prepare(tokenizer, examples, model.config.block_size, packed, conventions)
    return score_task(model, task, rt, batch_tokens, progress)


def score_task(model, task, rt=None, batch_tokens=None, progress=None) -> Scores:
    """As `score`, for examples that `prepare` has prepared.

    rt: the support.runtime.Runtime of this process; default: one process on the model's device. Every rank gives all
    the examples and gets all the scores. `progress` is that of `score_rows`. What it or `rt.poll` raises ends the
    evaluation; the model keeps the mode it had."""
    rt = rt or Runtime(next(model.parameters()).device, "float32")
    batch_tokens = batch_tokens or (1024 if rt.device.type == "cpu" else 16_384)  # larger ones are not faster on a CPU
    shape = (len(task.units), len(task.labels), 4)
    sums = score_rows(model, task.rows, math.prod(shape), rt, batch_tokens, progress)
    if rt.world > 1:
        sums = rt.reduce(torch.from_numpy(sums).to(rt.device)).cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        example = bad[0] // 4 % len(task.labels)
        raise UserError(f"the model gives the endings of HellaSwag example {example} no finite log-probability")
    return Scores(task.labels, dict(zip(task.units, sums.reshape(shape))), task.units, task.truncated)


# ---------------------------------------------------------------------------------------
# Models of others.


class HFModel(torch.nn.Module):
    """A causal language model of transformers with the methods that `score` calls.

    Some architectures scale or cap their logits after the projection. Where the projection of the last states does not
    equal the logits of the model's own forward pass, `features` are those logits, for all tokens.
    """

    packed = False  # each row holds one sequence, because architectures differ in how they take positions and masks

    def __init__(self, lm, block_size):
        super().__init__()
        self.lm, self.config = lm.eval(), SimpleNamespace(block_size=block_size)
        self.head = lm.get_output_embeddings()
        self.plain = self.head is not None and lm.base_model is not lm
        with torch.no_grad():
            probe = torch.arange(8)[None]
            self.plain = self.plain and torch.equal(self.logits(self.features(probe)), lm(input_ids=probe).logits)

    def features(self, idx):
        if self.plain:
            return self.lm.base_model(input_ids=idx, use_cache=False).last_hidden_state
        return self.lm(input_ids=idx, use_cache=False).logits

    def logits(self, x):
        return self.head(x) if self.plain else x


class HFTokenizer:
    """A tokenizer of transformers with the names that `score` uses."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.eot_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ends = zip(tokenizer("")["input_ids"], tokenizer("a")["input_ids"])  # the first may have a </s> behind it
        self.prefix = [i for i, _ in takewhile(lambda pair: pair[0] == pair[1], ends)]  # Llama's <s>; GPT-2 has none

    def encode_arrays(self, texts):
        texts = [replace_surrogates(text) for text in texts]
        return [np.array(ids, np.int64) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def load_hf(name, device) -> tuple[HFModel, HFTokenizer]:
    """The model and tokenizer of a Hugging Face folder or hub name, with float32 weights. Raises UserError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("--hf_model needs the package transformers: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)  # never a pickle
    except Exception as error:  # the library raises whatever its parts do
        what = "no causal language model with a tokenizer and safetensors could be loaded"
        raise UserError(f"--hf_model {name}: {what} ({one_line(error)})") from error
    stated = (getattr(lm.config, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx"))
    block_size = next((size for size in stated if size), HF_BLOCK_SIZE)
    return HFModel(lm, block_size).to(device), HFTokenizer(tokenizer)


# ---------------------------------------------------------------------------------------
# The command line.


def running_accuracy(bar, labels, world=1):
    """A `progress` for `score`: the bar shows the share of the work that is done, in examples, and the accuracies by
    sum of those that this rank has completed. It sees its own batches only, and takes the others to be as far."""

    def progress(sums, done):
        complete = done.reshape(-1, len(labels), 4).all((0, 2))
        right = sums.reshape(-1, len(labels), 4).argmax(2) == labels  # (conventions, N)
        shares = zip(CONVENTIONS, right) if complete.any() else ()
        shown = ", ".join(f"{name}_acc={100 * r[complete].mean():.2f}" for name, r in shares)
        bar.show(min(len(labels), int(done.mean() * world * len(labels))), shown)

    return progress


def as_json_lines(scores: Scores) -> str:
    """A JSON object a line: index, label, sums (nats) and units (tokens or characters) by convention, choices."""
    choices, lines = scores.choices(), []
    for index, label in enumerate(scores.labels.tolist()):
        line = {"index": index, "label": label}
        for name, sums in scores.sums.items():
            line[name] = {"sums": sums[index].tolist(), "units": scores.units[name][index].tolist()}
        line["choices"] = {name: int(choice[index]) for name, choice in choices.items()}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def report(result: dict) -> str:
    """The table that is printed: percent and standard error, beside GPT-2 124M and chance."""
    lines = [f"{'HellaSwag, percent':<22}{'this model':>14}{'GPT-2 124M':>12}{'chance':>8}"]
    for name, reference in GPT2_124M.items():
        value = f"{100 * result[name]:.2f} ± {100 * result[f'{name}_stderr']:.2f}"
        lines.append(f"{name.replace('_', ' ', 1):<22}{value:>14}{reference:>12.2f}{CHANCE:>8.2f}")
    lines.append("completion: raw context; acc by sum, acc_norm by mean per token (build-nanogpt, llm.c)")
    lines.append("harness: activity and cleaned context; acc by sum, acc_norm per character (lm-evaluation-harness)")
    if result["examples"] != LINES:
        lines.append(f"on {result['examples']:,} examples; GPT-2's numbers are for all {LINES:,}")
    if result["truncated"]:
        lines.append(f"{result['truncated']:,} examples were longer than the context and lost their beginning")
    return "\n".join(lines)


@dataclass(frozen=True)
class HellaSwagConfig:
    """Which model is scored on which examples, and how."""

    checkpoint: str | None = flag(
        None, "a run or one checkpoint; default: newest under checkpoints/", unit="folder", group="model and examples"
    )
    hf_model: str | None = flag(None, "a Hugging Face folder or hub model instead; needs transformers", unit="name")
    data: str | None = flag(
        None, f"HellaSwag, JSON lines or parquet, on this machine; default: {CACHE}, downloaded once", unit="file"
    )
    limit: int | None = flag(None, "the first N of the file; default: all", at_least=1, unit="examples")

    batch_tokens: int | None = flag(
        None, "in a batch, padded; default: 16,384, on a CPU 1,024", at_least=1, unit="tokens", group="how it runs"
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps; auto: the fastest there is", unit="name")
    dtype: str = flag("auto", "of products; auto: the hardware's fastest; compare with others in float32", unit="name",
                      choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    json: str | None = flag(None, "each example's scores are written here, one JSON object a line", unit="file")


def problems(c: HellaSwagConfig) -> list[str]:
    found = range_problems(c)
    if c.checkpoint and c.hf_model:
        found.append("--checkpoint and --hf_model are both given; one run scores one model")
    return found


def evaluate(args: HellaSwagConfig, rt) -> Scores:
    """The scores of the model that the flags name; the main process says how far it is."""
    if rt.dtype == "float32":
        torch.set_float32_matmul_precision("highest")  # published figures are compared with these: no TF32
    path = None if args.hf_model else find_checkpoint(args.checkpoint)
    examples = rt.from_main(lambda: load_examples(args.data, args.limit))
    with memory_advice("on the device; name another --device"):
        model, tokenizer = load_hf(args.hf_model, rt.device) if args.hf_model else read_model(path, rt.device)
    if rt.is_main:
        name = args.hf_model or f"checkpoint {path.parent.name}/{path.name}"
        print(f"{name} on {rt.device} in {rt.dtype}", file=sys.stderr)
    labels = np.array([example["label"] for example in examples])
    with (
        closing(Progress(0, len(examples), rt.is_main, unit="example", plain=False)) as bar,
        memory_advice("on the device; lower --batch_tokens"),
        rt.autocast(),
    ):
        progress = running_accuracy(bar, labels, rt.world) if rt.is_main else None
        return score(model, tokenizer, examples, rt, args.batch_tokens, progress)


def main(argv=None):
    args = parse(HellaSwagConfig, argv, __doc__, problems)
    with start(args.device, args.dtype) as rt:
        scores = evaluate(args, rt)
    if not rt.is_main:
        return
    try:
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.json, as_json_lines(scores).encode())
    finally:  # the scores took long: the table is shown even where the file cannot be written
        print(report(scores.summary()))


if __name__ == "__main__":
    sys.exit(run(main))
