"""Every command that the README and the chapters print is run: in a copy of the repository, as printed, then short."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tokenizer import load_tokenizer
from toy import ROOT, Forks

IMPORTED = "torch._dynamo", "datasets", "matplotlib.figure", "scipy.stats", "transformers.models.auto.modeling_auto"
PAGES = [
    *(ROOT / name for name in ("README.md", "benchmarks/RESULTS.md", "tests/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
RUNNERS = r"(?:\w+=\S+ )*(?:\.venv/bin/)?(?:python3?|bash|torchrun|trackio|wandb|pip) "
TINY = (
    "--device cpu --block_size 64 --n_layer 1 --n_head 2 --n_embd 32 --batch_size 2 --total_batch_tokens 256 "
    "--max_steps 4 --eval_interval 2 --val_tokens 512 --hellaswag_data hellaswag.jsonl --hellaswag_limit 4"
)
QUICK = "--max_steps 4 --eval_interval 2 --sample_interval 4 --val_tokens 512 --batch_size 2 --total_batch_tokens 1024"
SHORT = {  # how a command begins -> the flags that make it short; of a flag given twice, the last one counts
    "prepare_fineweb.py": "",
    "prepare_fineweb.py$": "--local_files 'texts/*.parquet' --val_share 0.1",  # for the hub
    "train.py": TINY,
    "train.py --run_name demo": "--max_steps 6 --eval_interval 3",
    "train.py --preset demo": QUICK,
    "train.py --preset small": QUICK,
    "train.py --eval_only": "--val_tokens 512 --hellaswag_data hellaswag.jsonl --hellaswag_limit 4",
    "--standalone": TINY + " --run_name two-processes",  # torchrun
    "inference.py": "--max_new_tokens 8",
    "hellaswag_eval.py": "--data hellaswag.jsonl --limit 8",
    "export_hf.py": "",
    "export_hf.py import": "",
    "plot_run.py": "",
    "report.py": "",
    "compare.py": f"{QUICK} --max_steps 2 --sample_interval 0",  # flags of its runs
    "checkpoint.py verify": "",
    "data_processing_fineweb.py verify": "",
    "docs/fine_tune.py": "--max_steps 2",
    "docs/figures.py --only longer": "",
    "docs/figures.py --only killed": "",
    # context, the last figure, takes a minute
    "docs/figures.py": "--checkpoint checkpoints/edu-10m --only rope schedule order decay attention loss",
    "benchmarks/write_samples.py": "--max_new_tokens 4",
    "benchmarks/bench_parts.py": "--tiny --data hellaswag.jsonl --repeats 1 --examples 8",
    "benchmarks/bench_generate.py": "--tiny",
    "benchmarks/bench_train.py": "--tiny --rounds 1 --threads 1",
}
INSTEAD = {  # of what stands for the reader's own
    " ...": "",
    "RUN RUN": "checkpoints/demo checkpoints/mine-124m",
    "checkpoints/edu-10m-seed2 checkpoints/edu-10m-fast600": "checkpoints/cpu-124m",
    "comparisons/ideas/base/seed_1": "checkpoints/demo",
    "edu_2k": "demo_corpus",
    "checkpoints/one checkpoints/two": "checkpoints/demo checkpoints/mine-124m",
    "checkpoint.py verify DIR": "checkpoint.py verify checkpoints/demo",
    "fineweb.py verify DIR": "fineweb.py verify my_corpus",
    "import FOLDER": "import hf_*",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--seeds 11,12,13,14,15,16,17,18": "--seeds 1",
    "--seeds 2": "--seeds 1",
    "--seeds 3": "--seeds 1",
    # one comparison is made, of the others what is checked before the first run
    "--name qk": "--dry_run --name qk",
    "--name my_rates": "--dry_run --name my_rates",
    "lr=3e-3,1e-2,3e-2": "lr=3e-3,1e-2",
}
NOT_RUN = {  # what a command has in it -> why
    "pip install": "fetches packages; .ci/run does it",
    "-m pytest": "CI runs it, word for word",
    "--nnodes 2": "two hosts: test_hosts.py",
    "--nanogpt DIR": "another project's files: test_benchmarks.py, with a stand-in",
    "torchrun --max-restarts": "named in passing",
    "@benchmarks/": "hours: test_benchmarks.py, with --dry_run",
    "gpu.sh": "test_benchmarks.py, with --short",
    "bench_prepare.py": "test_benchmarks.py, in its --tiny form",
    "bench_train.py --loss": "gpu.sh --short",
    "killed_run.py": "the demo, twice: test_benchmarks.py, with a toy",
}


def printed_commands() -> list[str]:
    """The lines of all blocks of shell and all commands within a sentence, without comments, each once."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block, span in re.findall(rf"^```sh\n(.*?)^```$|`({RUNNERS}[^`]+)`", text, re.M | re.S):
            lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines() or [span]
            found += [re.sub(r"(^|\s+)#\s.*", "", line) for line in lines]
    found = [re.sub(r"^.*requirements.txt && .venv/bin/", "", line) for line in found]
    return list(dict.fromkeys(line for line in found if " " in line and line != "python3 -m venv"))


def short(command) -> str | None:
    """The command with what makes it short; None if it is not to be run. KeyError if nobody has said how."""
    if any(part in command for part in NOT_RUN):
        return None
    for part, other in INSTEAD.items():
        command = command.replace(part, other)
    what = re.sub(rf"^{RUNNERS}", "", command) + "$"
    return f"{command} {SHORT[max((begin for begin in SHORT if what.startswith(begin)), key=len, default=what)]}"


def order(command):
    """Data, models, and what needs them; otherwise as printed."""
    late = "--eval_only" in command or "checkpoints/returned" in command
    return 0 if "prepare_fineweb.py" in command else 1 if "train.py" in command and not late else 2


def hub_cache(folder, data):
    """What huggingface_hub keeps of `gpt2` once it was fetched: here its vocabulary, and a small model of its kind."""
    from transformers import GPT2Config, GPT2LMHeadModel

    snapshot = folder / "hub" / "models--gpt2" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "hub" / "models--gpt2" / "refs").mkdir()
    (folder / "hub" / "models--gpt2" / "refs" / "main").write_text("0" * 40)
    load_tokenizer(data / "gpt2_tokenizer").save(snapshot)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(snapshot)


@pytest.fixture
def checkout(tmp_path, test_data):
    """A copy of the repository, beside it what a reader would have by then: text, HellaSwag, and gpt2 in the cache."""
    place = tmp_path / "checkout"
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "tests", "checkpoints", "__pycache__", "hf_*"))
    for split, name in (("train", "texts"), ("train", "corpus/train"), ("val", "corpus/val")):
        rows = pq.read_table(next((test_data / "corpus" / split).glob("*.parquet"))).slice(0, 100)
        (place / name).mkdir(parents=True)
        pq.write_table(rows, place / name / "0.parquet")
    for n, row in enumerate(rows.column("text").to_pylist()):
        (place / "texts" / f"{n}.txt").write_text(row)
    shutil.copytree(place / "texts", place / "more", ignore=shutil.ignore_patterns("*.parquet"))
    (place / "gpt2_tokenizer").symlink_to(test_data / "gpt2_tokenizer")
    (place / "hellaswag.jsonl").symlink_to(test_data / "hellaswag" / "hellaswag_val.jsonl")
    hub_cache(tmp_path / "hf", test_data)
    return place


@pytest.fixture
def launch(checkout, tmp_path):
    """launch(command) runs it as a shell in the checkout would: (exit code, output, errors). A shell takes it apart;
    Python scripts are run in forks, because half of the commands do nothing that takes as long as importing torch."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    forks = Forks(tmp_path, *IMPORTED, **environment, GPT_TEST_PICTURES="off")  # those of training; plot_run.py draws
    at = dict(cwd=checkout, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def launch(command):
        tell = 'python() { printf "%s\\0" "$@"; }; '  # instead of Python: the arguments that it would get
        done = subprocess.run(["bash", "-c", tell + command], timeout=300, **at)
        if "\0" not in done.stdout:  # torchrun
            return done.returncode, done.stdout, done.stderr
        [done] = forks.run((done.stdout.split("\0")[:-1], os.environ | environment, checkout))
        return done

    yield launch
    forks.close()


@pytest.mark.slow
@pytest.mark.auto
@pytest.mark.timeout(1200)
def test_every_printed_command_runs(launch, tally):
    """Bugs: a flag, file or default that is gone; a command that fails on the data the page told the reader to make; a
    new command that nobody has ever run."""
    commands = printed_commands()
    assert len(commands) > 25
    assert [part for part in NOT_RUN if not any(part in c for c in commands)] == [], "no longer printed"
    failed = []
    for command in filter(None, map(short, sorted(commands, key=order))):
        code, output, errors = launch(command)
        tally("printed commands run")
        if code or "Traceback" in errors:
            failed.append(f"{command}\n{output[-500:]}{errors[-1500:]}")
    assert not failed, "\n\n".join(failed)
