"""What only a GPU can show; skipped where there is none. Sizes are small: all of it takes about two minutes on an H100,
most of which the compiler takes. `python -m pytest -m cuda` runs these alone."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import inference
import model as model_file
import train as train_module
from data_processing_fineweb import Batch
from model import GPT, IGNORE, GPTConfig, LinearCrossEntropy
from support import runtime
from toy import ROOT, as_flags, losses, start, trace, wait_for_step
from train import TrainConfig, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIDDLE = GPTConfig(block_size=256, vocab_size=5056, valid_vocab_size=5000, n_layer=4, n_head=6, n_embd=384, dropout=0.0)


@pytest.fixture
def rt():
    return runtime.start("cuda", "bfloat16")


@pytest.fixture
def on_gpu(toy) -> TrainConfig:
    return replace(toy, device="cuda", dtype="bfloat16", n_embd=64)


def tokens(rows, T=256, seed=0):
    return torch.randint(5000, (rows, T), generator=torch.Generator().manual_seed(seed)).cuda()


def one_step(rt, **changes):
    """(net, function that makes one optimizer step) of a middle-sized model on one batch of 2 x 8 windows."""
    c = TrainConfig(
        block_size=256, n_layer=4, n_head=6, n_embd=384, batch_size=8, total_batch_tokens=4096, device="cuda",
        dtype="bfloat16", **{"dropout": 0.0, "compile": "off", **changes},
    )  # fmt: skip
    net, x, y = train_module.build(c, rt, 5000), tokens(16).view(2, 8, 256), tokens(16, seed=1).view(2, 8, 256)
    batch = Batch(0, 0, x, y, y.numel(), 0)
    return net, lambda at=None: train_module.train_step(c, rt, net, batch, at or train_module.Position())


def gradients(model, forward, *batch):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = forward(*batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_compiled_gradients_equal_the_eager_ones(rt):
    """Bug: torch 2.11 compiled every gradient to zero, beside a correct loss."""
    torch.manual_seed(0)
    model = GPT(MIDDLE).cuda().train()
    batch = tokens(40), tokens(40, seed=1)  # 10,240 rows: two blocks of the loss
    loss, eager = gradients(model, model, *batch)
    loss_2, compiled = gradients(model, torch.compile(model, fullgraph=True), *batch)
    assert loss_2 == pytest.approx(loss, rel=1e-3)
    for name, g in eager.items():
        assert g.norm() > 0 and (compiled[name] - g).norm() <= 0.05 * g.norm(), name


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_is_that_of_float64(rt, compiled):
    """Bugs: sums in 16 bits; TF32 in the softmax; rows of the second block left out."""
    torch.manual_seed(0)
    N, C, V, valid = 9000, 128, 5056, 5000
    x, weight = torch.randn(N, C).cuda(), (torch.randn(V, C) * 0.2).cuda()
    targets = torch.randint(valid, (N,)).cuda()
    targets[::7] = IGNORE

    def run(x, weight):
        with torch.autocast("cuda", torch.bfloat16):
            return LinearCrossEntropy.apply(x, weight, targets, valid, True)

    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1][:valid].t(), targets, reduction="sum", ignore_index=IGNORE)
    ours = [t.requires_grad_() for t in (x, weight)]
    loss = (torch.compile(run) if compiled else run)(*ours)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected_grads, grads = torch.autograd.grad(expected, exact), torch.autograd.grad(loss, ours)
    for g, e in zip(grads, expected_grads):
        assert (g - e).norm() <= 0.02 * e.norm()
    assert not grads[0][targets == IGNORE].any() and not grads[1][valid:].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_holds_one_block_of_logits(rt, compiled):
    """Bug: the compiler makes the logits of all blocks before the first softmax (30 GB at micro-batch 64)."""
    N, V = 65_536, 50_304
    x, weight = torch.randn(N, 64, device="cuda"), torch.randn(V, 64, device="cuda")
    targets = torch.randint(50_257, (N,), device="cuda")

    def run(x, weight):
        with torch.autocast("cuda", torch.bfloat16):
            return LinearCrossEntropy.apply(x, weight, targets, 50_257, True)

    run = torch.compile(run) if compiled else run
    inputs = x.requires_grad_(), weight.requires_grad_()
    run(*inputs).backward()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*inputs).backward()
    block = (model_file.LOSS_ROWS_FUSED if compiled else model_file.LOSS_ROWS) * V * 4
    assert torch.cuda.max_memory_allocated() - before < (2 if compiled else 6) * block + 8 * weight.nbytes


def test_deterministic_runs_and_a_killed_one_have_the_same_bits(on_gpu):
    """Bug: atomic additions in the embedding's gradient or in attention's: equal to rounding, not to the bit."""
    c = replace(on_gpu, deterministic=True, compile="on", max_steps=40)
    for name in ("a", "b"):
        process = start(replace(c, run_name=name), sys.executable)
        assert process.wait(timeout=200) == 0, process.stdout.read()
    killed = replace(c, run_name="killed")
    process = start(killed, sys.executable)
    wait_for_step(killed, 20, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert start(killed, sys.executable).wait(timeout=200) == 0
    a, b, killed = (replace(c, run_name=name) for name in ("a", "b", "killed"))
    assert trace(a) == trace(b) == trace(killed) and len(trace(a)) == 40
    weights = [checkpoint.load_model(run.run_dir)[0].state_dict() for run in (a, b, killed)]
    assert all(torch.equal(weights[0][name], w[name]) for w in weights for name in weights[0])


def test_dropout_depends_on_seed_step_and_micro_step_alone(rt):
    """Bug: its masks come from a stream that an evaluation, or a restart, moves."""

    def loss(at, noise):
        _, step = one_step(rt, dropout=0.3)
        torch.rand(noise, device="cuda")
        return step(at)[1].read()[0]["loss"]

    first, second = train_module.Position(3, 48), train_module.Position(4, 64)
    assert loss(first, 1) == pytest.approx(loss(first, 1000), rel=1e-6)
    assert loss(first, 1) != pytest.approx(loss(second, 1), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_does_not_wait_for_the_gpu(rt, optimizer):
    """Bug: `.item()` or a copy from pageable memory within a step; the GPU then idles while the host prepares."""
    _, step = one_step(rt, optimizer=optimizer)
    for _ in range(3):
        step()[1].read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, launched = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launched.read()[0]["loss"] > 0


def test_nothing_is_compiled_again_over_twenty_steps_and_an_evaluation(rt):
    """Bug: an evaluation changes a flag that the compiled step depends on, and every return costs a minute."""
    torch.compiler.reset()
    net, step = one_step(rt, compile="on")
    for _ in range(2):
        step()[1].read()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(20):
            step()[1].read()
            if n == 10:
                net.model.eval()
                with torch.no_grad(), rt.autocast():
                    net.model(tokens(3, 100), tokens(3, 100))


def test_the_first_sample_is_at_most_twice_as_slow_as_the_second(rt):
    """Bug: cuDNN plans its attention anew for each length of the cache, some 30 ms a token."""
    model = GPT(MIDDLE).cuda().eval()
    seconds = []
    with torch.inference_mode(), rt.autocast():
        list(inference.generate(model, [1], inference.PRESETS["greedy"], 3))  # loads kernels
        for _ in range(2):
            began = time.perf_counter()
            list(inference.generate(model, [1, 2, 3], inference.PRESETS["greedy"], 200))
            seconds.append(time.perf_counter() - began)
    assert seconds[0] < 2 * seconds[1]


def test_a_snapshot_taken_while_training_goes_on_is_that_of_its_step(rt):
    """Bug: the copies are read before they are made, or show weights of a later step."""
    net, step = one_step(rt)
    pinned = {}
    for _ in range(3):
        step()
        expected = {name: p.detach().clone() for name, p in net.model.named_parameters()}
        files = checkpoint.snapshot(net.model, net.optimizer, pinned=pinned)
        wait = rt.so_far()
        for _ in range(3):
            step()
        wait()
        for name, p in expected.items():
            assert torch.equal(files[checkpoint.MODEL][name], p.cpu()), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_of_fp16_skips_the_update(optimizer):
    """Bug: the scaler's first overshoots reach the weights, or a momentum."""
    rt = runtime.start("cuda", "float16")
    net, step = one_step(rt, optimizer=optimizer)
    net.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    before = [p.detach().clone() for p in net.model.parameters()]
    row, _ = step()[1].read()
    assert row["skipped"] and row["grad_norm"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, net.model.parameters()))
    assert not any(t.any() for t in checkpoint.optimizer_tensors(net.model, net.optimizer).values())


def test_a_gradient_that_is_not_finite_updates_nothing_and_is_told_a_step_later(on_gpu, monkeypatch):
    """Bug: the check on the device lets a NaN pass, or the error names the step after it."""
    real, seen = train_module.train_step, {}

    def poisoned(c, rt, net, batch, at):
        if at.step == 7:
            seen["before"] = [p.detach().clone() for p in net.model.parameters()]
            hook = net.model.ln_f.register_forward_hook(lambda m, i, o: o * float("nan"))
        result = real(c, rt, net, batch, at)
        if at.step == 7:
            hook.remove()
            seen["same"] = all(torch.equal(a, b) for a, b in zip(seen["before"], net.model.parameters()))
        return result

    monkeypatch.setattr(train_module, "train_step", poisoned)
    with pytest.raises(train_module.UserError, match=r"step 8: .* samples 56 to 63; the update was not applied"):
        train(on_gpu)
    assert seen["same"] and checkpoint.steps(on_gpu.run_dir)[0].name == "step_00000005"


def test_ddp_on_one_rank_gives_the_losses_of_one_process(on_gpu):
    """Bug: what DDP adds (buckets, hooks, nccl) breaks the compiled step; one rank is enough to see it."""
    plain, ddp = replace(on_gpu, compile="on", dropout=0.0), replace(on_gpu, run_name="ddp", compile="on", dropout=0.0)
    train(plain)
    script = (
        "import sys, train; from support import runtime; from torch.nn.parallel import DistributedDataParallel as DDP;"
        "runtime.apply_ddp = lambda model, rt: DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False);"
        "real = runtime.start; import torch.distributed as dist;"
        "runtime.start = lambda *a: (dist.init_process_group('nccl', 'tcp://127.0.0.1:29577', rank=0, world_size=1),"
        " real(*a))[1]; sys.exit(train.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *as_flags(ddp)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert losses(ddp) == pytest.approx(losses(plain), rel=1e-2)
