"""How fast text becomes shards, beside tokenizing alone: python benchmarks/bench_prepare.py --data 'corpus/*.parquet'

  tiktoken      encode_ordinary in a loop over the documents, one thread, its own GPT-2 pattern; only the loop is timed
  x cores       that rate times the number of cores: what a perfect use of the machine would give
  transformers  its fast tokenizer, called with batches of documents, threads on all cores; only the calls are timed
  prepare       prepare_fineweb.py as a person calls it, from the first import to the last manifest: reading parquet,
                tokenizing, hashing and writing; with one process and with one per core
  beyond        the same for what the input has more when each file is copied --times times: the rate at sizes where
                a second of start-up does not count
  memory        the most resident bytes of prepare_fineweb.py and its workers together, for the input once and for
                the same input copied --times times; pages that processes share count in each

All read the same text, each in a fresh process, so that nobody has seen it before; they take turns, so that a machine
that slows down slows down all of them, and ratios are those within a turn. The last column counts processor time in
place of time, that of all threads and workers together: it holds also on a machine that others use. All must give
the same number of tokens.
"""

import glob
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, parse, run  # isort: split

import numpy as np

from support.workers import cores
from tokenizer import load_tokenizer

SCRIPT = Path(__file__).parent.parent / "prepare_fineweb.py"
BATCH = 256  # documents in a call of transformers
BARE, TIMES_CORES, FAST = "tiktoken, bare loop", "tiktoken, x cores", "transformers, batches"


def read_texts(files, column) -> list[str]:
    from pyarrow import parquet

    texts = [text for file in files for text in parquet.read_table(file, columns=[column])[column].to_pylist()]
    return [text for text in texts if text and not text.isspace()]


def byte_characters() -> dict[str, int]:
    """The byte that each of the 256 characters of a byte-level vocabulary stands for (Radford et al. 2019): printable
    ones stand for themselves, and U+0100, U+0101, ... for the others in their order."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def time_tiktoken(files, column, folder):
    """(seconds, processor seconds, tokens) of the loop."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    tokenizer, byte = load_tokenizer(folder), byte_characters()
    if tokenizer.token_bytes() is None:
        raise UserError(f"{folder}: a tokenizer of another kind than GPT-2's, which tiktoken cannot express")
    ranks = tokenizer.backend.get_vocab(with_added_tokens=False).items()
    ranks = {bytes(byte[c] for c in token): i for token, i in ranks if i != tokenizer.eot_token}
    encoding = tiktoken.Encoding("r50k", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    texts = read_texts(files, column)
    began, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return time.perf_counter() - began, time.process_time() - cpu, tokens


def time_transformers(files, column, folder):
    """(seconds, processor seconds, tokens) of the calls."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "tokenizer.json")))
    texts, tokens = read_texts(files, column), 0
    began, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), BATCH):
        batch = tokenizer(texts[first : first + BATCH], add_special_tokens=False, return_attention_mask=False)
        tokens += sum(map(len, batch["input_ids"]))
    return time.perf_counter() - began, time.process_time() - cpu, tokens


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident(session) -> int:
    """Bytes in memory of all processes of a session."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                pages += int((stat.parent / "statm").read_text().split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_of_children() -> float:
    """Processor seconds of this process's children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def prepare(files, work, args, num_proc):
    """(seconds, processor seconds, manifest of the training split, peak bytes) of one call of prepare_fineweb.py."""
    with tempfile.TemporaryDirectory(dir=work) as out:
        command = [sys.executable, str(SCRIPT), "--out_dir", f"{out}/shards"]
        command += ["--tokenizer", str(work / "tokenizer"), "--text_column", args.text_column]
        command += ["--num_proc", str(num_proc), "--shard_tokens", str(args.shard_tokens)]
        command += ["--val_files", str(work / "short.txt"), "--local_files", *map(str, files)]
        began, cpu, peak = time.perf_counter(), cpu_of_children(), 0
        with open(f"{out}/log", "w+") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            while (code := child.poll()) is None:
                peak = max(peak, resident(child.pid))
                time.sleep(0.1)
            seconds, cpu = time.perf_counter() - began, cpu_of_children() - cpu
            log.seek(0)
            if code:
                raise UserError(f"prepare_fineweb.py ended with exit code {code}: {log.read()[-500:]}")
        return seconds, cpu, json.loads(Path(out, "shards", "manifest.json").read_text()), peak


def copies(files, work, times) -> list[Path]:
    """The files, each copied `times` times: one file under several names would be read once."""
    folder = work / f"times_{times}"
    folder.mkdir()
    found = [folder / f"{n:04d}_{i:04d}.parquet" for n in range(times) for i in range(len(files))]
    for i, path in enumerate(found):
        shutil.copyfile(files[i % len(files)], path)
    return found


def measure(files, work, args) -> tuple[dict, dict, dict]:
    """By name (seconds, processor seconds), one pair for each turn; by name the peak bytes; and the text's manifest."""
    times, tokens, peaks, made_of = {}, {}, {}, {}
    inputs = {n: copies(files, work, n) for n in (1, args.times)}
    for turn in range(args.repeats):
        for name, function in (BARE, time_tiktoken), (FAST, time_transformers):
            *took, tokens[name] = in_fresh_process(function, files, args.text_column, str(work / "tokenizer"))
            times.setdefault(name, []).append(took)
        for num_proc, n in itertools.product(sorted({1, args.cores}), inputs):
            name = f"prepare, {num_proc} proc, input x {n}"
            *took, made, peak = prepare(inputs[n], work, args, num_proc)
            times.setdefault(name, []).append(took)
            tokens[name] = (made["tokens"] - made["documents"]) / n  # without the markers
            peaks[name] = max(peak, peaks.get(name, 0))
            made_of[n] = made
        took = ", ".join(f"{name}: {turns[-1][0]:.1f}" for name, turns in times.items())
        print(f"turn {turn + 1} of {args.repeats}, seconds: {took}", file=sys.stderr, flush=True)
    if len(set(tokens.values())) != 1:
        raise UserError(f"the numbers of tokens differ: {tokens}")
    return times, peaks, made_of[1]


def rates_of(times, megabytes, args) -> dict:
    """(MB per second, MB per processor second) by name of the row, one pair for each turn."""
    rows = {name: [(megabytes / a, megabytes / b) for a, b in times[name]] for name in (BARE, FAST)}
    found = {BARE: rows[BARE], TIMES_CORES: [(args.cores * r, cpu) for r, cpu in rows[BARE]], FAST: rows[FAST]}
    for num_proc in sorted({1, args.cores}):
        once, often = (np.array(times[f"prepare, {num_proc} proc, input x {n}"]) for n in (1, args.times))
        more = np.maximum(often - once, 1e-3)  # on a machine with other users the larger input can be the faster one
        found[f"prepare, {num_proc} proc"] = megabytes / once
        found[f"  beyond that input, {num_proc} proc"] = (args.times - 1) * megabytes / more
    return found


def table(times, peaks, manifest, args) -> str:
    megabytes, tokens = manifest["text_bytes"] / 1e6, manifest["tokens"] - manifest["documents"]
    found = rates_of(times, megabytes, args)
    lines = [f"{'':<34}{'MB/s':>8}{'min':>8}{'max':>8}{'Mtokens/s':>11}{'to x cores':>12}{'MB/CPU s':>10}"]
    for name, turns in found.items():
        each, per_cpu = zip(*turns)
        middle = statistics.median(each)
        ratio = statistics.median(a / b for a, (b, _) in zip(each, found[TIMES_CORES]))
        row = f"{name:<34}{middle:>8.2f}{min(each):>8.2f}{max(each):>8.2f}{middle * tokens / megabytes / 1e6:>11.3f}"
        lines.append(f"{row}{ratio:>12.2f}{statistics.median(per_cpu):>10.2f}")
    for name, peak in peaks.items():
        if peak:
            lines.append(f"{name.replace('prepare', 'memory'):<34}{peak / 1e6:>8,.0f}  MB")
    return "\n".join(lines)


def make_text(path):
    """2 MB of parquet for --tiny."""
    import pyarrow
    from pyarrow import parquet

    sentence = "The {} quick brown foxes, don't they jump?\n\nNaïve dogs lie  still. "
    texts = ["".join(sentence.format(n * k) for k in range(30)) for n in range(1000)]
    parquet.write_table(pyarrow.table({"text": texts}), path)
    return [str(path)]


@dataclass
class Config:
    data: tuple[str, ...] = flag((), "parquet files to read", unit="glob")
    text_column: str = flag("text", "of the text", unit="name")
    tokenizer: str = flag("gpt2", "hub name, folder or tokenizer.json", unit="name")
    out: str | None = flag(None, "disk for the shards; default: the temporary one", unit="folder")
    cores: int | None = flag(None, "processes of the second row of prepare; default: all cores", at_least=1)
    repeats: int = flag(3, "turns", at_least=1)
    times: int = flag(10, "copies of each file in the larger input", at_least=2)
    shard_tokens: int = flag(5_000_000, "in a shard", at_least=1, unit="tokens")
    tiny: bool = flag(False, "2 MB made for the purpose, to see whether everything runs")


def parse_args(argv) -> Config:
    args = parse(Config, argv, __doc__)
    args.cores = cores() if args.cores is None else args.cores
    if not args.data and not args.tiny:
        raise UserError("--data: name the parquet files to read, for example --data 'corpus/*.parquet'")
    args.files = sorted(file for pattern in args.data or () for file in glob.glob(pattern))
    if args.data and not args.files:
        raise UserError(f"--data {' '.join(args.data)}: no such file")
    return args


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        work = Path(work)
        (work / "tokenizer").mkdir()
        load_tokenizer(args.tokenizer).save(work / "tokenizer")
        (work / "short.txt").write_text("A short document.\n")
        files = args.files or make_text(work / "tiny.parquet")
        times, peaks, manifest = measure(files, work, args)
        size = f"{manifest['text_bytes'] / 1e6:,.1f} MB of text in {manifest['documents']:,} documents"
        print(f"{size}, {manifest['tokens']:,} tokens with their markers; cores: {args.cores}, turns: {args.repeats}")
        print(table(times, peaks, manifest, args))


if __name__ == "__main__":
    sys.exit(run(main))
