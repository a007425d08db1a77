"""What must be known of a GPU before its speed means something: python benchmarks/check_gpu.py [facts | bits | resume]

  facts   versions; a large product and a copy, as ceilings; compiled against eager gradients; attention's kernels
  bits    three training steps, twice in processes of their own: the same bits? As it is, and with --deterministic
  resume  a run of 60 steps with --deterministic, and the same killed with SIGKILL near step 33 and started again

Processes that are compared run side by side, because they compile for most of their time. Each row is printed as soon
as it is known. Exit code 1 where something is not as it must be. It also runs on a CPU.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import REQUIRED, UserError, flag, parse, run  # isort: split

import torch
from bench_train import TINY, timed

import train
from data_processing_fineweb import Batch
from support import runtime
from support.tracking import read_rows

ROOT = Path(__file__).parent.parent
SMALL = (
    "--n_layer 2 --n_head 2 --n_embd 32 --batch_size 1 --block_size 64 --total_batch_tokens 128 --compile off "
    "--dtype float32"
)
SCHEDULE = (
    "--deterministic --max_steps 60 --save_interval 15 --eval_interval 30 --hellaswag_interval 0 --sample_interval 0"
)
KILL_AT, LAST = 33, "step_00000060"  # at step 33 the checkpoint of 15 is complete: the save of 30 waited for it


def row(name, text):
    print(f"{name:<28}{text}", flush=True)


def net_and_batch(args, rt, **changes):
    """(configuration, network, one batch of two micro-batches) of gpt2-124m, or of a tiny model."""
    shape = {**TINY, "block_size": 64, "batch_size": 2} if args.tiny else {}
    config = replace(train.TrainConfig(), **shape, **changes)
    config = replace(config, total_batch_tokens=2 * config.batch_size * config.block_size)
    torch.manual_seed(0)
    vocab = 500 if args.tiny else 50257
    x, y = torch.randint(vocab, (2, 2, config.batch_size, config.block_size)).to(rt.device)
    return config, train.build(config, rt, vocab), Batch(0, 0, x, y, y.numel(), 0)


def facts(args) -> bool:
    rt = runtime.start(args.device)
    cuda = rt.device.type == "cuda"
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if cuda else {}
    row("versions", json.dumps(runtime.versions() | libraries))
    side, size = (8192, 2**32) if cuda else (512, 2**24)
    a = torch.randn(side, side, device=rt.device).to(runtime.DTYPES[rt.dtype])
    source, target = (torch.empty(size // 4, device=rt.device) for _ in range(2))
    works = [(lambda: a @ a, 2 * side**3 / 1e12, "product", f"TFLOP/s, {rt.dtype}")]
    works += [(lambda: target.copy_(source), 2 * size / 1e9, "copy", "GB/s, read and written")]
    for work, amount, name, unit in works:
        timed(work, 3, rt)
        row(name, f"{amount / timed(work, 20, rt):.4g} {unit}")
    config, net, batch = net_and_batch(args, rt, compile="on", dropout=0.0)
    began = time.perf_counter()
    try:
        train.refuse_wrong_products(net, rt, config.batch_size, config.dropout)
        right, said = True, "the same loss and norm"
    except UserError as error:
        right, said = False, f"WRONG: {error}"
    row("compiled against eager", f"{said}, {time.perf_counter() - began:.0f} s with compilation")
    _, launched = train.train_step(config, rt, net, batch, train.Position())
    row("first step", json.dumps(launched.read()[0]))
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        train.train_step(config, rt, net, batch, train.Position())[1].read()
    words = ("attention", "flash", "fmha", "sdpa", "cudnn_generated")
    names = {e.key for e in profiler.key_averages() if any(word in e.key.lower() for word in words)}
    for name in sorted(names):
        row("attention runs", name[:150])
    return right


def three_steps(args):
    """Prints a hash of the weights after three steps."""
    rt = runtime.start(args.device, deterministic=args.deterministic)
    config, net, batch = net_and_batch(args, rt, compile="off" if args.tiny else "on", deterministic=args.deterministic)
    at = train.Position()
    for _ in range(3):
        at, launched = train.train_step(config, rt, net, batch, at)
        launched.read()
    digest = hashlib.sha256()
    for p in net.model.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    print(digest.hexdigest()[:16])
    return True


def bits(args) -> bool:
    """With dropout and the shapes of gpt2-124m and of `resume`, which then find their code compiled."""
    good, started, pipes = True, {}, dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for deterministic in (False, True):
        flags = ["--device", args.device, *["--tiny"] * args.tiny, *["--deterministic"] * deterministic]
        command = [sys.executable, __file__, "three_steps", *flags]
        started[deterministic] = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for deterministic, pair in started.items():
        said = [one.communicate() for one in pair]
        hashes = [output.strip() or f"failed: {errors.strip()[-200:]}" for output, errors in said]
        sys.stderr.writelines(errors for _, errors in said)
        same = hashes[0] == hashes[1] and not any(one.returncode for one in pair)
        name = "--deterministic" if deterministic else "as it is"
        row(name, f"{hashes[0]} {hashes[1]} {'same' if same else 'DIFFERENT'}")
        good = good and (same or not deterministic)
    return good


def resume(args) -> bool:
    """Needs --data_dir."""
    flags = (SMALL if args.tiny else "--batch_size 16").split()
    flags += [*SCHEDULE.split(), "--val_tokens", "512" if args.tiny else "65536"]
    flags += ["--device", args.device, "--data_dir", args.data_dir]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def start(name):
            command = [sys.executable, str(ROOT / "train.py"), "--run_name", name, "--checkpoint_dir", folder, *flags]
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

        def rows(name):
            return [r for r in read_rows(Path(folder, name, "metrics.jsonl")) if r["kind"] == "train"]

        def finish(process):
            output, _ = process.communicate()
            if process.returncode:
                raise UserError(f"train.py ended with {process.returncode}: {output[-500:]}")

        whole, killed = start("whole"), start("killed")
        while killed.poll() is None and not any(r["step"] >= KILL_AT for r in rows("killed")):
            time.sleep(0.02)
        killed.kill()
        output, _ = killed.communicate()
        saved = sorted(p.name for p in Path(folder, "killed").glob("step_*"))
        if killed.returncode != -signal.SIGKILL or not saved or saved[-1] == LAST:
            whole.kill()
            said = f"ended with {killed.returncode}, saved {saved}: {output[-500:]}"
            raise UserError(f"expected a run that is killed between its first checkpoint and its last, this one {said}")
        row("killed at step", f"{max(r['step'] for r in rows('killed'))}, goes on from {saved[-1]}")
        finish(whole)
        finish(start("killed"))
        keys = ("step", "loss", "grad_norm", "lr", "checksum", "samples_seen")
        traces = [[tuple(r[k] for k in keys) for r in rows(name)] for name in ("whole", "killed")]
        files = [Path(folder, name, LAST, "model.safetensors") for name in ("whole", "killed")]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    same = traces[0] == traces[1] and len(traces[0]) == 60 and hashes[0] == hashes[1]
    parted = next((a[0] for a, b in zip(*traces) if a != b), min(map(len, traces)) + 1)
    row("traces of 60 steps", "the same" if traces[0] == traces[1] else f"DIFFERENT from step {parted}")
    row("final weights", f"{hashes[0]} {hashes[1]} {'same' if hashes[0] == hashes[1] else 'DIFFERENT'}")
    return same


@dataclass(frozen=True)
class CheckConfig:
    """What to check, and where."""

    what: str = flag(REQUIRED, "what to check; three_steps: one part of bits", positional=True,
                     choices=("facts", "bits", "resume", "three_steps"))  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", unit="name")
    data_dir: str | None = flag(None, "shards, for resume", unit="folder")
    deterministic: bool = flag(False, "for three_steps")
    tiny: bool = flag(False, "a model of two small layers, to see whether everything runs")


def main(argv=None) -> int:
    args = parse(CheckConfig, argv, __doc__)
    if args.what == "resume" and not args.data_dir:
        raise UserError("resume needs --data_dir")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return 0 if {"facts": facts, "bits": bits, "resume": resume, "three_steps": three_steps}[args.what](args) else 1


if __name__ == "__main__":
    sys.exit(run(main))
