"""How fast a training step is, beside others' and beside the machine: python benchmarks/bench_train.py --batch_size 4

  ours          train.train_step with the model and the optimizer that train.py makes
  muon          the same with --optimizer muon
  transformers  its GPT-2 of the same shape: next-token loss, fused AdamW on the same parameter groups
  nanogpt       GPT and configure_optimizers of the checkout that --nanogpt names

A step is forward and backward over --accumulation micro-batches of made-up tokens, clip and update. With --compile all
of them are compiled, and ours also runs eagerly. They take turns, a large matrix product of the same dtype among them,
so that a machine that slows down slows down all of them; ratios are medians over the turns. Ours reads its loss and
gradient norm, on CUDA one step late, because train.py does; the others read nothing.

--loss times the loss and its gradients alone, at C channels and GPT-2's vocabulary, beside F.cross_entropy on the
whole table of logits, which autograd keeps: both compiled, and eager. Each one's peak memory is that of a process
of its own, without what the inputs take.

FLOP/s are the model's by GPT.flops_per_token (6N + 12LCT, our N for all), as a share of the matrix product and of the
data sheet (MFU). Memory is a contestant's own peak on CUDA; a CPU only tells the peak of the whole process. "first s"
are the seconds of the first step, with the compilation of what this process, or the compiler's cache where
TORCHINDUCTOR_CACHE_DIR names one, has not compiled before: muon runs the code of ours.
Autocast, TF32 and, on a CPU, the heap that keeps its pages (runtime.keep_freed_memory) serve all contestants.
"""

import contextlib
import copy
import functools
import gc
import importlib.util
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, parse, run  # isort: split

import torch

import train
from data_processing_fineweb import Batch
from model import GPT, GPTConfig, LinearCrossEntropy
from support import runtime

CONTESTANTS = ("ours", "muon", "transformers", "nanogpt")
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32}
VOCAB = {"gpt2-124m": 50257, "demo": 2048, "tiny": 500}  # ids a token can have
PRODUCT = {"cuda": 8192, "mps": 4096, "cpu": 2048}  # side of the large matrices

# ---------------------------------------------------------------------------------------
# Contestants: each a function that does one step.


def micro_batches(config) -> int:
    return config.total_batch_tokens // (config.batch_size * config.block_size)


def our_step(config, rt, x, y, vocab, compiled, optimizer="adamw"):
    """One batch again and again through train.train_step."""
    config = replace(config, compile="on" if compiled else "off", optimizer=optimizer)
    net, at, launched, n = train.build(config, rt, vocab), train.Position(), [], micro_batches(config)
    batch = Batch(0, 0, x.expand(n, *x.shape), y.expand(n, *y.shape), n * y.numel(), 0)

    def step():
        launched.append(train.train_step(config, rt, net, batch, at)[1])
        while len(launched) > (rt.device.type == "cuda"):
            launched.pop(0).read()

    return step


def usual_step(config, rt, model, optimizer, loss):
    """The step of a script with nothing to check or log; `loss()` is the forward pass."""
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == "float16")
    n, grad_clip = micro_batches(config), config.grad_clip

    def step():
        for _ in range(n):
            with rt.autocast():
                value = loss() / n
            scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_step(config, rt, x, y, vocab, compiled):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = config.model_config(vocab)
    shape = {"vocab_size": c.vocab_size, "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head,
             "n_embd": c.n_embd}  # fmt: skip
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    model = GPT2LMHeadModel(GPT2Config(**shape, **dropout, use_cache=False, bos_token_id=0, eos_token_id=0))
    model.to(rt.device).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=rt.device.type != "mps")
    step_model = torch.compile(model) if compiled else model
    return usual_step(config, rt, model, optimizer, lambda: step_model(input_ids=x, labels=x).loss)


def nanogpt_step(directory, config, rt, x, y, vocab, compiled):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(directory, "model.py"))
    theirs = importlib.util.module_from_spec(spec)  # `import model` would find ours
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    c = config.model_config(vocab)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells about itself
        model = theirs.GPT(theirs.GPTConfig(**{name: getattr(c, name) for name in names}, bias=False)).to(rt.device)
        betas = (0.9, config.beta2)
        optimizer = model.configure_optimizers(config.weight_decay, config.lr, betas, rt.device.type)
    step_model = torch.compile(model) if compiled else model
    return usual_step(config, rt, model, optimizer, lambda: step_model(x, y)[1])


def makers(args) -> dict:
    """By name, the function that makes a step; the reference, ours as train.py would run it, is named "ours"."""
    muon = functools.partial(our_step, optimizer="muon")
    chosen = {"ours": our_step, "muon": muon, "transformers": transformers_step}
    if args.nanogpt:
        chosen["nanogpt"] = functools.partial(nanogpt_step, args.nanogpt)
    chosen = {name: make for name, make in chosen.items() if name in args.only}
    if "transformers" in chosen and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: left out")
        del chosen["transformers"]
    made = {name: functools.partial(make, compiled=args.compile) for name, make in chosen.items()}
    if args.compile and "ours" in chosen:
        made["ours, eager"] = functools.partial(our_step, compiled=False)
    return made


# ---------------------------------------------------------------------------------------
# Measuring.


@dataclass
class Contestant:
    name: str
    step: object = None  # None: it could not run, and `note` says why
    note: str = ""
    first: float = 0.0  # seconds of the first step, with what had to be compiled
    memory: int | None = None  # bytes at its peak
    seconds: list = field(default_factory=list)  # a step's, one value for each turn


def timed(step, times, rt) -> float:
    """Seconds of one of `times` steps, the device's work included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(rt.device.type, lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return (time.perf_counter() - began) / times


def prepare(name, make, rt, warm_up, tokens) -> Contestant:
    """Makes a contestant and warms it up; prints a first rate. What its code raises costs its row only."""
    one, cuda = Contestant(name), rt.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(rt.device)
        before = torch.cuda.memory_allocated(rt.device)
    try:
        step = make()
        one.first = timed(step, 1, rt)
        timed(step, warm_up, rt)  # by now the optimizer has its state
        one.step = step
    except Exception as error:
        if runtime.out_of_memory(error):
            one.note = "out of memory"
        else:
            traceback.print_exc()
            one.note = failure(error)
        print(f"{name}: {one.note}", flush=True)
        return one
    if cuda:
        one.memory = torch.cuda.max_memory_allocated(rt.device) - before
    rate = tokens / timed(step, 1, rt)
    size = "" if one.memory is None else f", {one.memory / 2**30:.1f} GiB"
    print(f"{name}: first step {one.first:.1f} s, then {rate:,.0f} tokens/s{size}", flush=True)
    return one


def failure(error) -> str:
    """What was raised, as one short line."""
    return f"failed: {UserError(f'{type(error).__name__}: {error}')}"[:100]


def large_product(rt, tiny):
    """A product of two large square matrices in the run's dtype, and its floating-point operations."""
    size = 128 if tiny else PRODUCT[rt.device.type]
    a, b = (torch.randn(size, size, device=rt.device).to(runtime.DTYPES[rt.dtype]) for _ in range(2))
    return (lambda: a @ b), 2 * size**3


def compete(contestants, product, rt, args) -> list:
    """Fills in the seconds of the contestants turn by turn; returns those of the matrix product."""
    products, many = [], 50 if rt.device.type == "cuda" else 2
    timed(product, many, rt)
    for _ in range(args.rounds):
        products.append(timed(product, many, rt))
        for one in contestants:
            one.seconds.append(timed(one.step, args.steps_per_round, rt))
    return products


# ---------------------------------------------------------------------------------------
# Where the time of a step goes.

GROUPS = ("matrix products", "attention", "loss and output head", "norms, element-wise", "clip and optimizer", "rest")


def group_of(name, shapes, vocab_rows) -> str:
    """The part of a step that an operation belongs to, by its name and the shapes of its inputs; the loss's
    products are known by their `vocab_rows`, and the embedding's gradient counts with them."""
    name = name.lower()

    def has(*words):
        return any(word in name for word in words)

    if has("adam", "optimizer", "foreach", "linalg_vector_norm", "clip_"):
        return "clip and optimizer"
    if has("attention", "flash", "fmha", "sdpa"):
        return "attention"
    if any(rows in shape for rows in vocab_rows for shape in shapes if isinstance(shape, (list, tuple))):
        return "loss and output head"
    if has("log_softmax", "scatter", "gather", "nll_loss", "linearcrossentropy"):
        return "loss and output head"
    if has("::mm", "addmm", "bmm", "matmul", "linear", "gemm", "cutlass", "nvjet"):
        return "matrix products"
    return "norms, element-wise" if name.startswith(("aten::", "triton_", "graph_")) else "rest"


def profile(step, rt, vocab_rows, steps) -> str:
    """Two tables of self time (the device's on CUDA): by part of the step, and the twelve costliest operations."""
    from torch.profiler import DeviceType, ProfilerActivity

    cuda = rt.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        timed(step, steps, rt)
    events = profiler.key_averages(group_by_input_shape=True)
    groups, names, counts = dict.fromkeys(GROUPS, 0.0), {}, {}
    operations = [e for e in events if e.device_type == DeviceType.CPU]  # which know what their kernels took
    for e in operations:
        spent = e.self_device_time_total if cuda else e.self_cpu_time_total
        groups[group_of(e.key, e.input_shapes or [], vocab_rows)] += spent
        names[e.key], counts[e.key] = names.get(e.key, 0) + spent, counts.get(e.key, 0) + e.count
    if cuda:  # kernels that no operation is known to have started
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        groups["rest"] += max(0.0, sum(e.self_device_time_total for e in kernels) - sum(groups.values()))
    whole = sum(groups.values()) or 1.0
    lines = [f"{'part of a step':<58}{'ms':>10}{'share':>9}"]
    lines += [f"{name:<58}{spent / steps / 1e3:>10.2f}{spent / whole:>9.1%}" for name, spent in groups.items()]
    lines += ["", f"{'operation':<58}{'ms':>10}{'share':>9}{'calls':>8}"]
    for name in sorted(names, key=names.get, reverse=True)[:12]:
        calls = counts[name] / steps
        lines.append(f"{name[:57]:<58}{names[name] / steps / 1e3:>10.2f}{names[name] / whole:>9.1%}{calls:>8.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------


def table(contestants, products, tokens, flops_per_token, product_flops, rt) -> str:
    peak, sheet = product_flops / statistics.median(products), rt.peak_flops()
    low, high = product_flops / max(products) / 1e12, product_flops / min(products) / 1e12
    lines = [f"large matrix product, {rt.dtype}: {peak / 1e12:.4g} TFLOP/s ({low:.4g} to {high:.4g})"]
    lines.append(f"{'':<14}{'tokens/s':>11}{'min':>11}{'max':>11}{'to ours':>9}{'TFLOP/s':>10}{'of product':>12}"
                 f"{'MFU':>8}{'GiB':>7}{'first s':>9}")  # fmt: skip
    ours = next((one for one in contestants if one.name == "ours" and one.step), None)
    for one in contestants:
        if not one.step:
            lines.append(f"{one.name:<14} {one.note}")
            continue
        rates = [tokens / seconds for seconds in one.seconds]
        rate = statistics.median(rates)
        ratio = f"{statistics.median(a / b for a, b in zip(ours.seconds, one.seconds)):.2f}x" if ours else "-"
        flops = rate * flops_per_token
        mfu = f"{flops / sheet:.1%}" if sheet else "-"
        memory = f"{one.memory / 2**30:.1f}" if one.memory is not None else "-"
        lines.append(f"{one.name:<14}{rate:>11,.0f}{min(rates):>11,.0f}{max(rates):>11,.0f}{ratio:>9}"
                     f"{flops / 1e12:>10.4g}{flops / peak:>12.1%}{mfu:>8}{memory:>7}{one.first:>9.1f}")  # fmt: skip
    return "\n".join(lines)


def bench(batch_size, accumulation, args, rt) -> bool:
    """All contestants at one micro-batch and accumulation; prints their table. Whether none of ours failed."""
    T, vocab = args.block_size, VOCAB["tiny" if args.tiny else args.preset]
    shape = TINY if args.tiny else {"n_layer": args.layers} if args.layers else {}
    config = replace(train.PRESETS[args.preset], **shape, batch_size=batch_size, block_size=T, dropout=args.dropout,
                     grad_checkpoint=args.grad_checkpoint, total_batch_tokens=accumulation * batch_size * T,
                     )  # fmt: skip
    if train.problems(config):
        raise UserError("; ".join(train.problems(config)))
    torch.manual_seed(0)
    x, y = torch.randint(vocab, (2, batch_size, T)).to(rt.device)
    product, product_flops = large_product(rt, args.tiny)
    everyone = [
        prepare(name, functools.partial(make, config, rt, x, y, vocab), rt, args.warm_up, config.total_batch_tokens)
        for name, make in makers(args).items()
    ]
    able = [one for one in everyone if one.step]
    products = compete(able, product, rt, args)
    with torch.device("meta"):
        model = GPT(config.model_config(vocab))
    how = "compiled" if args.compile else "eager"
    print(f"\nbatch {batch_size} x {T} x {accumulation}, {model.num_parameters() / 1e6:.1f}M parameters, {rt.dtype}, "
          f"{how}, {args.rounds} rounds of {args.steps_per_round} steps")  # fmt: skip
    print(table(everyone, products, config.total_batch_tokens, model.flops_per_token(), product_flops, rt), flush=True)
    if args.profile and able:
        one = next((one for one in able if one.name == "ours"), able[0])
        rows = (model.config.vocab_size, model.config.valid_vocab_size)
        try:
            print(f"\n{one.name}, profiled\n{profile(one.step, rt, rows, args.steps_per_round)}", flush=True)
        except Exception as error:  # the profiler has failures of its own; the next table needs none of it
            traceback.print_exc()
            print(f"the profile {failure(error)}", flush=True)
    return not any(one.note.startswith("failed") for one in everyone if one.name in ("ours", "muon", "ours, eager"))


# ---------------------------------------------------------------------------------------
# The loss alone.

LOSSES = ("plain, compiled", "ours, compiled", "plain", "ours")


def loss_step(name, rows, args, rt):
    """A function that computes the loss of `rows` made-up rows and its gradients."""
    C, V, valid = (32, 512, 500) if args.tiny else (GPTConfig.n_embd, GPTConfig.vocab_size, GPTConfig.valid_vocab_size)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, C).to(rt.device), (0.02 * torch.randn(V, C)).to(rt.device)
    x, weight, targets = x.requires_grad_(), weight.requires_grad_(), torch.randint(valid, (rows,)).to(rt.device)

    def ours(x, weight):
        return LinearCrossEntropy.apply(x, weight, targets, valid, True) / rows

    def plain(x, weight):
        return torch.nn.functional.cross_entropy(x @ weight.t(), targets)

    function = ours if name.startswith("ours") else plain
    function = torch.compile(function) if name.endswith("compiled") else function

    def step():
        x.grad = weight.grad = None
        with rt.autocast():
            loss = function(x, weight)
        loss.backward()

    return step


def loss_memory(name, rows, args, rt) -> int:
    """Bytes at the peak of two steps, less those before the first."""
    if rt.device.type == "cuda":
        step = loss_step(name, rows, args, rt)
        timed(step, 1, rt)
        torch.cuda.reset_peak_memory_stats(rt.device)
        before = torch.cuda.memory_allocated(rt.device)
        timed(step, 1, rt)
        return torch.cuda.max_memory_allocated(rt.device) - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(loss_memory_here, (name, rows, args, rt.dtype))


def loss_memory_here(name, rows, args, dtype) -> int:
    """The same in a process of its own, whose resident memory then shows this one thing."""
    rt = runtime.Runtime(torch.device("cpu"), dtype)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    small = copy.copy(args)
    small.tiny = True
    timed(loss_step(name, 64, small, rt), 1, rt)  # loads the compiler
    step, before = loss_step(name, rows, args, rt), rt.memory()
    timed(step, 2, rt)
    return rt.memory() - before


def bench_loss(rows, args, rt):
    """All forms of the loss, turn by turn; a row each."""
    print(f"\nloss and gradients, {rows:,} rows, {rt.dtype}, {args.rounds} rounds")
    print(f"{'':<18}{'ms':>9}{'min':>9}{'max':>9}{'to plain, compiled':>20}{'peak MiB':>10}", flush=True)
    steps = {name: loss_step(name, rows, args, rt) for name in LOSSES}
    for step in steps.values():
        timed(step, args.warm_up, rt)
    seconds = {name: [] for name in LOSSES}
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, args.steps_per_round, rt))
    del steps
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds["plain, compiled"]))
        ms = [1e3 * f(each) for f in (statistics.median, min, max)]
        memory = loss_memory(name, rows, args, rt) / 2**20
        print(f"{name:<18}{ms[0]:>9.1f}{ms[1]:>9.1f}{ms[2]:>9.1f}{ratio:>20.2f}{memory:>10,.0f}", flush=True)


@dataclass
class Config:
    preset: str = flag("gpt2-124m", "whose model", unit="name", choices=("gpt2-124m", "demo"))
    batch_size: str | None = flag(None, "per step, one or several; default: the preset's", unit="n,n")
    block_size: int | None = flag(None, "per sequence; default: the preset's", at_least=1, unit="tokens")
    accumulation: str = flag("1", "per step, one or several", unit="n,n")
    grad_checkpoint: bool = flag(False, "ours recomputes activations, as train.py's flag does")
    loss: bool = flag(False, "time the loss and its gradients alone, on --batch_size x --block_size rows")
    layers: int | None = flag(None, "blocks, fewer for a slow CPU; default: the preset's", at_least=1)
    dropout: float = flag(0.0, "0, so that all do the same work", at_least=0, below=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", unit="name")
    dtype: str = flag("auto", "of matrix products", unit="name", choices=("auto", *runtime.DTYPES))
    threads: int | None = flag(None, "of a CPU; default: torch's choice", at_least=1)
    rounds: int = flag(5, "turns of each contestant", at_least=1)
    steps_per_round: int | None = flag(None, "in a turn; default: 10 on CUDA, else 1", at_least=1, unit="steps")
    compile: bool = flag(False, "torch.compile every contestant; ours runs eagerly too")
    nanogpt: str | None = flag(None, "a checkout of nanoGPT", unit="folder")
    only: str = flag(",".join(CONTESTANTS), "contestants", unit="name,name")
    profile: bool = flag(False, "also show where the time of our step goes")
    tiny: bool = flag(False, "a model of two small layers, to see whether everything runs")


def parse_args(argv) -> Config:
    args = parse(Config, argv, __doc__)
    preset = train.PRESETS[args.preset]
    args.only = args.only.split(",")
    args.block_size = args.block_size or preset.block_size
    args.batch_size = args.batch_size or str(preset.batch_size)
    for name in ("batch_size", "accumulation"):
        try:
            setattr(args, name, [int(n) for n in getattr(args, name).split(",")])
        except ValueError:
            raise UserError(f"--{name} is {getattr(args, name)!r}; it must be a list of int: 4,8") from None
    if args.tiny:
        args.batch_size, args.block_size, args.rounds = [2], 64, min(args.rounds, 3)
    if min(*args.batch_size, *args.accumulation) < 1:
        raise UserError("--batch_size and --accumulation must be at least 1")
    if not set(args.only) <= set(CONTESTANTS):
        raise UserError(f"--only is {','.join(args.only)}; its names are {', '.join(CONTESTANTS)}")
    if args.nanogpt and not Path(args.nanogpt, "model.py").is_file():
        raise UserError(f"--nanogpt {args.nanogpt}: found no model.py in it, expected a checkout of nanoGPT")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rt = runtime.start(args.device, args.dtype)
    args.steps_per_round = args.steps_per_round or (10 if rt.device.type == "cuda" else 1)
    args.warm_up = 5 if rt.device.type == "cuda" else 1
    facts, good = runtime.versions(), True
    print(f"{facts['device_name']} ({rt.device}), {facts['threads']} threads, torch {facts['torch']}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cold:
        if args.compile:  # the first step is to pay for the whole compilation, unless the caller names a cache
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cold)
        for batch_size in args.batch_size:
            if args.compile:
                torch.compiler.reset()  # else the second batch size would be compiled for any size
            if args.loss:
                bench_loss(batch_size * args.block_size, args, rt)
            for accumulation in [] if args.loss else args.accumulation:
                good = bench(batch_size, accumulation, args, rt) and good
    if args.compile and not args.loss:
        print("first s: with the compilation of what neither this process nor the compiler's cache had compiled before")
    if rt.device.type != "cuda":
        print(f"\npeak memory of this process: {rt.memory() / 2**30:.1f} GiB (one contestant's: --only ours)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run(main))
