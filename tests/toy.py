"""What several test files share: the trace that must not change, the real command line in another process, and the
smallest of tokenizers and models."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.tracking import read_rows
from tokenizer import TextTokenizer
from train import PRESETS

ROOT = Path(__file__).parent.parent
TRACE = ("step", "loss", "grad_norm", "lr", "checksum", "samples_seen")


def trace(config) -> list[tuple]:
    """Per step everything that must not change, floats to the last bit."""
    rows = [r for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    return [tuple(v.hex() if isinstance(v := row[k], float) else v for k in TRACE) for row in rows]


def losses(config):
    return [r["loss"] for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] == "train"]


def vals(config):
    return {r["step"]: r["loss"] for r in read_rows(config.run_dir / "metrics.jsonl") if r["kind"] == "val"}


def as_flags(config) -> list[str]:
    """The command line that means this configuration, and nothing that an earlier start of the run has said."""
    base = PRESETS[config.preset]
    changed = {k: v for k, v in vars(config).items() if v is not None and v != getattr(base, k)}
    given = [part for k, v in changed.items() for part in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    return ["--preset", config.preset, *given]


def start(config, *before, process_group=None, **environment):
    """The real command line in another process."""
    command = [*before, str(ROOT / "train.py"), *as_flags(config)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, **pipes, env=env, cwd=ROOT, process_group=process_group)


def torchrun(config, *options, processes=2, **environment):
    """torchrun as a person would start it, in its own process group."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    return start(config, sys.executable, *launcher, **environment)


def seed_the_cpu_alone():
    """Speed: torch.manual_seed notes its whole call stack for each kind of device that is not there, a millisecond."""
    if not torch.cuda.is_available():
        torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Forks:
    """Python scripts in forks of one process that has imported `modules`: one starts in 0.3 seconds instead of 3."""

    def __init__(self, folder, *modules, **environment):
        self.folder = folder
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads cannot be forked
        command = [sys.executable, ROOT / "tests" / "children" / "forks.py", *modules]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=os.environ | threads | environment, **pipes)

    def run(self, *processes) -> list[tuple[int, str, str]]:
        """(exit code, output, errors) of each (argv, environment, working directory); they run side by side."""
        files = [[str(self.folder / f"{n}.{name}") for name in ("out", "err")] for n in range(len(processes))]
        request = [
            {"argv": [*map(str, argv)], "env": env, "cwd": str(cwd), "out": out, "err": err}
            for (argv, env, cwd), (out, err) in zip(processes, files)
        ]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        return [(code, *(Path(file).read_text() for file in pair)) for code, pair in zip(codes, files)]

    def ranks(self, *configs, code=0, places=(ROOT, ROOT)) -> list[str]:
        """Two processes of one training, each with its flags and its working directory; what each of them says."""
        first, second = configs if len(configs) == 2 else configs * 2
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        done = self.run(*(
            ([ROOT / "train.py", *as_flags(config)], os.environ | address | {"RANK": rank, "LOCAL_RANK": rank}, place)
            for config, rank, place in zip((first, second), "01", places)
        ))  # fmt: skip
        assert [ended for ended, _, _ in done] == [code, code], done
        return [output + errors for _, output, errors in done]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def finished(process, code=0, timeout=240) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return output


def wait_for_step(config, step, process):
    for _ in range(1200):
        if process.poll() is not None or any(r["step"] >= step for r in read_rows(config.run_dir / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


def eventually(holds, seconds=30):
    """Whether holds() becomes true in that time."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        threading.Event().wait(0.02)  # a test may have replaced time.sleep
    return holds()


def bytes_only():
    """256 bytes, no merges, and the marker: every character beyond ASCII is split over tokens."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return TextTokenizer(backend, "bytes")


def spread(model):
    """The model with large random weights, biases and norms: nothing is zero, one or too small to matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3)
            if p.dim() == 1 and name.endswith("weight"):
                p.add_(1)
    return model.eval()
