"""The machine's part: device and precision, peak speed, what counts as a lost process, and signals."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_module
from auto_watch import FORCED, LeftToAuto
from support import runtime
from support.cli import UserError
from toy import ROOT, losses
from train import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pick_dtype = runtime.pick_dtype.__wrapped__  # without the check of the test suite

# --- tests name device and dtype


@pytest.mark.parametrize(
    "pick, flag", [(lambda: runtime.pick_device(), "--device"), (lambda: runtime.pick("cpu", "auto"), "--dtype")]
)
def test_a_test_that_lets_the_machine_choose_fails(pick, flag):
    """Three tests passed on one CPU and failed on the next, whose `auto` is bfloat16."""
    with pytest.raises(LeftToAuto, match=f"give {flag}"):
        pick()


def test_a_process_that_a_test_starts_may_not_let_the_machine_choose_either():
    """The real command line, as tests start it, decides in a process of its own."""
    code = "from support import runtime; runtime.start('cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "give --dtype" in done.stderr, done.stderr


@pytest.mark.auto
def test_a_marked_test_gets_the_answer_that_is_forced(monkeypatch):
    """The way to run the whole suite as on another machine."""
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setenv(FORCED, dtype)
        assert runtime.pick("cpu", "auto") == (CPU, dtype)


# --- device and precision


def test_auto_is_what_the_hardware_multiplies(monkeypatch):
    """Bugs: bfloat16 on a CPU that has no instructions for it, or on a card that only emulates it, which is slower than
    float32; float32 on a CPU that multiplies bfloat16, where a step of the 124M model takes three times as long."""
    for amx, avx512, dtype in ((True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert pick_dtype("auto", CPU) == dtype
    for native, dtype in ((True, "bfloat16"), (False, "float16")):
        asked = lambda including_emulation=True, native=native: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
        assert pick_dtype("auto", CUDA) == dtype
    assert pick_dtype("auto", torch.device("mps")) == "float32"


def test_float32_products_are_fast_on_cuda():
    """Without TF32 a float32 run, and the float32 part of every other, takes several times as long."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        runtime.tune(CPU)
        assert torch.get_float32_matmul_precision() == "highest"
        runtime.tune(CUDA)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_named_dtype_is_taken_or_refused_and_never_changed(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert [pick_dtype(name, CPU) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    assert [pick_dtype(name, CUDA) for name in ("float32", "bfloat16", "float16")] == [*runtime.DTYPES]
    with pytest.raises(UserError, match="float16 is not for CPUs"):
        pick_dtype("float16", CPU)


def test_the_first_device_there_is_is_taken(monkeypatch):
    """Bug: a machine that has both chose the slower one."""
    pick_device = runtime.pick_device.__wrapped__
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto").type == expected
        assert pick_device("cpu") == CPU
    for name in ("cuda", "mps", "abacus", "cpu:x"):
        with pytest.raises(UserError, match=f"'{name}' is not available; this machine has cpu$"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"cuda:2.*2 CUDA device"):
        pick_device("cuda:2")


def test_products_run_in_the_dtype_and_sums_stay_float32():
    a = torch.ones(4, 4)
    for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with runtime.Runtime(CPU, dtype).autocast():
            assert (a @ a).dtype == kind and torch.nn.functional.cross_entropy(a, a).dtype == torch.float32


def test_bfloat16_trains_on_a_cpu(toy):
    """The precision of every current GPU, on the machine that runs the tests: near float32's losses, but not they."""
    exact, coarse = replace(toy, dropout=0.0, max_steps=20), replace(toy, run_name="coarse", max_steps=20, dropout=0.0)
    train(exact)
    result = train(replace(coarse, dtype="bfloat16"))
    assert losses(coarse) == pytest.approx(losses(exact), abs=0.05) and losses(coarse) != losses(exact)
    assert math.isfinite(result["val_loss"]) and losses(coarse)[-1] < losses(coarse)[0] - 0.3


# --- peak speed and memory

CARDS = {  # as their drivers name them -> TFLOP/s of dense bf16 or fp16 products, summed in float32
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 836,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA A10": 125,
    "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 3090": 71,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla T4": 65,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA A10G": None,
    "NVIDIA L40": None,
    "NVIDIA RTX 6000 Ada Generation": None,
    "NVIDIA GeForce GTX 1080 Ti": None,
}


@pytest.mark.parametrize("name", CARDS)
def test_peak_speed_is_the_cards_own_or_unknown(name):
    """An MFU by another card's peak is a wrong number that looks right."""
    assert runtime.peak_flops(name) == (CARDS[name] and CARDS[name] * 1e12)


def test_peak_speed_is_for_half_precision_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert runtime.Runtime(CUDA, "bfloat16").peak_flops() == runtime.Runtime(CUDA, "float16").peak_flops() == 312e12
    assert runtime.Runtime(CUDA, "float32").peak_flops() is None
    assert runtime.Runtime(CPU, "bfloat16").peak_flops() is None


def test_memory_is_in_bytes():
    """getrusage gives kilobytes on Linux and bytes on a Mac."""
    block = torch.ones(2**26)  # 256 MiB
    assert block.numel() * 4 < runtime.Runtime(CPU, "float32").memory() < 2**36


@pytest.mark.parametrize("error", [RuntimeError("memory format is not supported"), KeyError("memory")])
def test_only_the_lack_of_memory_is_taken_for_it(error):
    """Advice to lower the batch size would hide what really failed."""
    with pytest.raises(type(error)), runtime.memory_advice("here; lower it"):
        raise error
    with pytest.raises(UserError, match="out of memory here; lower it"), runtime.memory_advice("here; lower it"):
        raise torch.OutOfMemoryError("CUDA out of memory")


# --- other processes

LOST = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20553",
    "Application timeout caused pair closure: gloo",
    "NCCL communicator was aborted on rank 1.",
    "Timed out waiting 5000ms for recv operation to complete",
    "wait timeout after 5000ms, keys: /default_pg/0//cuda//0",
    "The client socket has timed out after 5000ms while trying to connect to (10.0.0.1, 29500).",
    "Connection reset by peer",
]
OWN = ["mat1 and mat2 shapes cannot be multiplied", "step 6: loss nan", "CUDA error: device-side assert triggered", ""]


@pytest.mark.parametrize("text", LOST)
def test_a_lost_process_is_one_line_that_names_the_timeout(text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_module, "train", fails_with(text))
    with pytest.raises(UserError, match=r"another process of this run is gone.*--timeout 77 seconds"):
        train_module.main(["--timeout", "77"])


@pytest.mark.parametrize("reason", ["Duplicate GPU detected : rank 1 and rank 0", "No space left on device (28)"])
def test_what_nccl_says_is_quoted_to_its_end(reason, monkeypatch):
    """Bug: its first line says "unhandled system error"; the reason, below it, was left out."""
    text = f"NCCL error in: /c10d/NCCLUtils.cpp:93, unhandled system error\nncclSystemError: ...\nLast error:\n{reason}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_module, "train", fails_with(f"{text}\nException raised from x (most recent call first)"))
    with pytest.raises(UserError, match=re.escape(f"({reason})")):
        train_module.main([])


class LikeMPS(TorchDispatchMode):
    """A meta tensor stands for one of MPS: where that is converted to float64, torch raises, or gives zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].is_meta:
            if kwargs.get("dtype") == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return torch.ones(args[0].shape, dtype=args[0].dtype)  # on the CPU
        return function(*args, **kwargs)


def test_mps_is_never_asked_for_float64():
    """Bug: training on a Mac ended at its first step (pytorch issue 197715)."""
    with LikeMPS():
        there = torch.zeros((), device="meta")
        assert runtime.Runtime(CPU, "float32").sum(there, 5, False).tolist() == [1, 5, 0]


def test_several_processes_on_mps_are_one_line(monkeypatch):
    """Bug: a traceback of gloo, which does not know MPS."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runtime, "pick_device", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="add --device cpu"):
        runtime.start("auto", "float32")


@pytest.mark.parametrize("world, text", [*(("2", text) for text in OWN), *(("1", text) for text in LOST)])
def test_an_error_of_its_own_is_not_blamed_on_another_process(world, text, monkeypatch):
    """A traceback that is swallowed sends its reader to look at the network."""
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(train_module, "train", fails_with(text))
    with pytest.raises(RuntimeError) as caught:
        train_module.main([])
    assert str(caught.value) == text and not isinstance(caught.value, UserError)


def fails_with(text):
    def train(config):
        raise RuntimeError(text)

    return train


def test_numbers_that_disagree_are_named_with_the_rank_of_each():
    """Two machines with two versions of the data train something that no one can repeat."""

    class Two(runtime.Runtime):
        def gather(self, value):
            return [value, value | {"lr": 2}]

    with pytest.raises(UserError, match="disagree: lr is 1 on rank 0, 2 on rank 1;"):
        Two(CPU, "float32", world=2).refuse_disagreement({"lr": 1, "seed": 3})
    runtime.Runtime(CPU, "float32").refuse_disagreement({"lr": 1})


class OfTwo(runtime.Runtime):
    """A rank of two, of which the other one wants to stop."""

    def sum(self, *values):
        return [float(v) + 1 for v in values]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_poll_stops_all_ranks_where_one_wants_to(rank):
    with pytest.raises(runtime.Stopped):
        OfTwo(CPU, "float32", rank=rank, world=2).poll()
    runtime.Runtime(CPU, "float32").poll()


@pytest.mark.parametrize(
    "error, elsewhere",
    [(UserError("no space"), SystemExit), (runtime.Stopped(), runtime.Stopped), (KeyError(1), RuntimeError)],
)
def test_what_fails_on_rank_0_ends_every_rank_and_is_told_once(monkeypatch, error, elsewhere):
    """The other ranks would wait in the next reduction; or each of them prints the same line."""
    sent = []

    def fail():
        raise error

    def broadcast(box, src, device):
        sent[:] = sent or box
        box[:] = sent

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(type(error)) as caught:
        runtime.Runtime(CPU, "float32", rank=0, world=2).from_main(fail)
    assert caught.value is error
    with pytest.raises(elsewhere):
        runtime.Runtime(CPU, "float32", rank=1, world=2).from_main(lambda: pytest.fail("for rank 0 alone"))


# --- signals


@pytest.fixture
def exits(monkeypatch):
    """The exit codes with which the process would have ended at once."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize(
    "sent",
    [
        ["SIGTERM", "SIGTERM"],
        ["SIGUSR1", "SIGUSR1", "SIGTERM"],
        ["SIGTERM", "SIGINT"],
        ["SIGINT", "SIGTERM", "SIGTERM"],
    ],
)
def test_only_a_second_ctrl_c_ends_the_save(exits, sent):
    """Slurm and torchrun repeat SIGTERM; a run that exits at the second one loses what it is saving."""
    with runtime.StopSignals() as signals:
        signals.check()  # nothing has come yet
        for name in sent:
            os.kill(os.getpid(), getattr(signal, name))
        assert signals.received and exits == []
        with pytest.raises(runtime.Stopped):
            signals.check()


def test_a_second_ctrl_c_exits_with_its_code(exits):
    with runtime.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT and exits == []
        os.kill(os.getpid(), signal.SIGINT)
        assert exits == [130]


def test_handlers_are_the_old_ones_after_a_run(toy):
    """Whoever calls train() from Python, a notebook say, has handlers of their own; Ctrl-C must stop the notebook."""
    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    old = {name: signal.signal(getattr(signal, name), lambda *_: None) for name in names}
    try:
        mine = {name: signal.getsignal(getattr(signal, name)) for name in names}
        with runtime.StopSignals():
            assert signal.getsignal(signal.SIGTERM) is not mine["SIGTERM"]
        train(replace(toy, max_steps=1))
        assert {name: signal.getsignal(getattr(signal, name)) for name in names} == mine
    finally:
        for name, handler in old.items():
            signal.signal(getattr(signal, name), handler)


def test_a_thread_may_train(toy):
    """Python lets only the main thread set handlers; a notebook's server trains in another."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(replace(toy, max_steps=1))))
    thread.start()
    thread.join()
    assert results[0]["step"] == 1


def test_a_program_that_does_not_train_imports_no_compiler():
    """Bug: two seconds after the last line of output in which nothing was done."""
    program = """
import sys
from support import runtime

with runtime.start("cpu", "float32"):
    pass
sys.exit("torch._inductor.config" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_deterministic_reaches_the_compiler_and_ends_with_the_run():
    """Bug: after a deterministic run what follows, a second run or the cells of a notebook, is slow, or fails where a
    deterministic kernel does not exist."""
    import torch._inductor.config as compiler

    with runtime.start("cpu", "float32", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled() and compiler.deterministic
    assert not torch.are_deterministic_algorithms_enabled() and not compiler.deterministic
