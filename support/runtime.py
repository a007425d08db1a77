"""The machine: device, precision, processes, signals. Every question about it is asked here.

One process and many run the same code: every call here is also right for a single process. Where this file does not
know a fact, such as the peak speed of a new GPU, it says None and does not guess.
"""

import ctypes
import functools
import importlib.util
import inspect
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.cli import UserError, one_line

# Dense bf16/fp16 FLOP/s with fp32 accumulation, from the makers' data sheets; first match counts.
PEAK_FLOPS = [
    (r"Laptop|Max-Q|MIG|RTX 4090 D|RTX 3090 Ti", None),  # the name of a faster or slower card, or of a whole one
    (r"B200", 2250e12),
    (r"H200 NVL", 836e12),
    (r"H200|H100 80GB HBM3|GH200", 989e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"A10", 125e12),
    (r"RTX A6000", 155e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
    (r"V100-PCIE", 112e12),
    (r"V100", 125e12),
    (r"T4", 65e12),
]
GIT_SECONDS = 10  # to wait for git's answer
EXIT_SECONDS = 0.3  # that a process of several waits at its end
SHARED = 2**19  # elements of a matrix from which on a CPU's threads share it
left_groups = []  # see Runtime.__exit__
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# ---------------------------------------------------------------------------------------
# Device, precision, compiler.


def pick_device(name="auto") -> torch.device:
    """cuda, else mps, else cpu for "auto"; otherwise the named one, or UserError where it is not there."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in has.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not has.get(device.type):
        raise UserError(f"device {name!r} is not available; this machine has {', '.join(k for k in has if has[k])}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not available; there are {torch.cuda.device_count()} CUDA device(s)")
    return device


def pick_dtype(name, device) -> str:
    """The precision of matrix products. "auto": bf16 where the hardware multiplies it, fp16 on older
    CUDA cards, else fp32. UserError where a named one cannot run."""
    if device.type == "cuda":
        best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        best = "bfloat16"  # without such instructions, bf16 products are slower than fp32, some by a factor of 400
    else:
        best = "float32"
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype float16 is not for CPUs; use float32 or bfloat16")
    return best if name == "auto" else name


def pick(device, dtype) -> tuple[torch.device, str]:
    """Both, for a script that is not a run; `tune` is called too."""
    device = pick_device(device)
    tune(device)
    return device, pick_dtype(dtype, device)


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` ("float32": as they are, see `tune`)."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def tune(device):
    """Faster settings of torch and of the C library. On CUDA, products of float32 tensors may use TF32, which rounds
    their inputs to 10 bits; on a CPU, freed memory is kept."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()


def keep_freed_memory():
    """Lets glibc reuse large freed blocks. Otherwise it returns them to the kernel, which fills each page with zeros
    again: on a CPU a fifth of a training step with GPT-2's vocabulary. No effect with another C library."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is not cut off


def peak_flops(device_name) -> float | None:
    """That of PEAK_FLOPS for the name that CUDA gives a device."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(rf"\b({pattern})\b", device_name)), None)


def cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def git_commit() -> str | None:
    """The commit of this code; None without git, without a repository, or where git does not answer in time."""
    how = dict(stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_SECONDS, cwd=Path(__file__).parent)
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], check=True, **how).stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict:
    """What a reader of run.json wants to know of the machine."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device_name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def lacks_to_compile(device) -> str | None:
    """What torch.compile needs and this machine lacks, in words; None where nothing is known to be missing."""
    if device.type == "cpu":
        names = [os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
        return None if any(map(shutil.which, names)) else f"a C++ compiler ({names[0]})"
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if sys.platform == "win32":  # Triton for Windows brings a compiler
        return None
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, names)):  # Triton builds its launchers with it, when the first kernel runs
        return f"a C compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.exists() else f"Python's headers ({header}, of a package such as python3-dev)"


def should_compile(choice, device) -> bool:
    """Whether to compile, by --compile: "auto" does on CUDA, where Triton has what it needs and knows the card.
    UserError where "on" cannot work."""
    lacking = None if choice == "off" else lacks_to_compile(device)
    if choice == "on" and lacking:
        raise UserError(f"--compile on needs {lacking}; install it, or train with --compile off")
    if choice == "auto":
        return device.type == "cuda" and not lacking and torch.cuda.get_device_capability(device) >= (7, 0)
    return choice == "on"


@contextmanager
def compile_advice():
    """Turns a failure within torch.compile, whose message is pages long, into a UserError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = one_line(str(error).split("\n\n")[0])  # what follows is how to debug torch
        raise UserError(f"torch.compile failed ({why}); --compile off trains without it") from error


# ---------------------------------------------------------------------------------------
# Several processes: DDP and FSDP.


def is_dtensor(t):
    """Whether t is a tensor of FSDP's, of which each rank holds a part."""
    return hasattr(t, "full_tensor")  # importing DTensor for isinstance takes a second


def gathered(t):
    """The whole tensor on every rank; all ranks must call this together. Other tensors are returned as they are."""
    return t.full_tensor() if is_dtensor(t) else t


def laid_out_like(own, t):
    """This rank's part of the whole tensor t where `own` is one of FSDP's, else t."""
    if not is_dtensor(own):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(own.device, own.dtype), own.device_mesh, own.placements, src_data_rank=None)


def apply_fsdp(model, rt, blocks, entries):
    """FSDP2 (Zhao et al. 2023): each rank keeps a part of every tensor, and gathers the parts of one of the `blocks`
    when it is used. entries: names of the methods besides forward by which the model is entered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(rt.device.type, (rt.world,))
    half = None if rt.dtype == "float32" else DTYPES[rt.dtype]  # weights are sent in the precision of the products
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for method in entries:
        register_fsdp_forward_method(model, method)
    return model


def apply_ddp(model, rt):
    """DDP: each rank keeps all of the model, and a backward pass averages the gradients. One process: the model."""
    if rt.world == 1:
        return model
    # the buffers (RoPE's angles) are constants and need not be sent before each forward pass
    known = inspect.signature(DistributedDataParallel).parameters
    sending = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{sending: False})


def sync_gradients(model, now):
    """Context of a backward pass that averages the gradients over the ranks if `now`, and leaves it to a later one if
    not. model: as `apply_fsdp` or `apply_ddp` returned it."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's
        model.set_requires_gradient_sync(now)
        return nullcontext()
    return nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync()


def optimizer_step(optimizer, skip):
    """optimizer.step(), unless `skip`, a bool tensor with one element, is true. A fused optimizer reads `skip` on the
    device, so that Python need not wait for its value."""
    parameters = optimizer.param_groups[0]["params"]
    if optimizer.defaults.get("fused") and not is_dtensor(parameters[0]):
        optimizer.found_inf = skip.float()  # torch's scaler for fp16 uses this attribute to skip a step
        optimizer.step()
    elif not skip:
        optimizer.step()


def in_float64(value, device):
    """A number or a tensor as a float64 tensor on the device. It is moved first and converted then: MPS has no float64,
    and torch would convert it there."""
    if not torch.is_tensor(value):
        return torch.full((), float(value), dtype=torch.float64, device=device)
    return value.to(device).double()


# ---------------------------------------------------------------------------------------
# One process of a run.


@dataclass(frozen=True)
class Runtime(AbstractContextManager):
    """One process of a run: its device, precision and rank. As a context it leaves the process group at the end."""

    device: torch.device
    dtype: str  # of matrix products: a key of DTYPES
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    signals: "StopSignals" = field(default_factory=lambda: StopSignals())  # a context of its own, see there

    def __exit__(self, *exc):
        """Leaves the process group, but keeps the group's object until the process ends.

        Otherwise DDP's model may hold the last reference. DDP then frees it with Python's lock held and waits for a
        thread of gloo, which may be waiting for that lock: the process hangs after its work (seen with torch 2.13)."""
        if torch.are_deterministic_algorithms_enabled():  # the call imports the compiler, which takes seconds
            torch.use_deterministic_algorithms(False)
        if dist.is_initialized():
            left_groups.append(dist.group.WORLD)
            dist.destroy_process_group()
            # A process that ended at once aborted (seen once, torch 2.13, under load): a thread of gloo still held a
            # tensor, and freeing it needs Python's lock, which it can take while this thread sleeps.
            time.sleep(EXIT_SECONDS)

    @property
    def is_main(self):
        return self.rank == 0

    def stop_asked(self) -> bool:
        """Whether this process wants the run to stop: a signal came, or a checkpoint could not be written."""
        return bool(self.signals.received or self.signals.failed)

    def poll(self):
        """Raises Stopped on every rank if one wants to stop. All ranks call it together, between two batches."""
        asked = self.stop_asked()
        if self.world > 1:
            asked = self.sum(asked)[0] > 0
        if asked:
            raise Stopped

    def autocast(self):
        return autocast(self.device, self.dtype)

    def sum(self, *values):
        """Each value (number or one-element tensor) summed over ranks: a float64 tensor, on CUDA where CUDA is used,
        so that Python need not wait for the GPU."""
        device = self.device if self.device.type == "cuda" else "cpu"
        return self.reduce(torch.stack([in_float64(v, device) for v in values]))

    def read_later(self, tensor):
        """A function that returns the tensor's values as a list, and waits for a GPU only when it is called."""
        copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # into pinned memory
        wait = self.so_far()

        def read():
            wait()
            return copy.tolist()

        return read

    def so_far(self):
        """A function that waits until the GPU has finished the work that it has been given up to now."""
        if self.device.type != "cuda":
            return lambda: None
        done = torch.cuda.Event()
        done.record()
        return done.synchronize

    def reduce(self, tensor):
        """The tensor summed over ranks."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, function):
        """function() on rank 0; all ranks get its result. If it fails, every rank raises, so that none waits for ever;
        a UserError is printed by rank 0 alone."""
        if self.world == 1:
            return function()
        box, failed = [None, None], None  # the result, and what the other ranks raise
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                failed = error
                if isinstance(error, Stopped):
                    box[1] = Stopped()
                elif isinstance(error, (UserError, OSError)):
                    box[1] = SystemExit(2)
                else:
                    box[1] = RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        if box[1] is not None:
            raise failed or box[1]
        return box[0]

    def gather(self, value) -> list:
        """`value` of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def refuse_disagreement(self, mine: dict):
        """UserError on every rank, naming each key on which the ranks' dicts differ, with all the values."""
        everyone = self.gather(mine)
        differing = [key for key in mine if any(other[key] != mine[key] for other in everyone)]
        if differing:
            said = [f"{k} is " + ", ".join(f"{d[k]} on rank {i}" for i, d in enumerate(everyone)) for k in differing]
            raise UserError(f"the processes of this run disagree: {'; '.join(said)}; start all of them alike")

    def peak_flops(self) -> float | None:
        """The peak FLOP/s of one device at this dtype, by its data sheet; None where the table does not know it."""
        if self.device.type != "cuda" or self.dtype == "float32":
            return None
        return peak_flops(torch.cuda.get_device_name(self.device))

    def memory(self) -> int:
        """The most bytes in use so far: of the allocator on CUDA, resident elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start(device="auto", dtype="auto", timeout=1800, deterministic=False) -> Runtime:
    """Joins the process group if torchrun started this process: gloo on CPU, nccl on CUDA. A process that has waited
    `timeout` seconds for another gives up. deterministic: CUDA gives the same bits for the same work, without atomic
    additions and without choosing kernels by measured time; the compiler's own flag is set too."""
    if deterministic:  # before CUDA is used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # new tensors need no value to be overwritten
    rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(device)
    if device.type == "cuda":
        if device.index is None:
            device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    tune(device)
    if world > 1:
        if device.type == "mps":
            raise UserError("several processes cannot train on MPS; start one, or add --device cpu")
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
        dist.init_process_group(backend, store=store_of_attempt(timeout), rank=rank, world_size=world, timeout=timeout)
    return Runtime(device, pick_dtype(dtype, device), rank, local, world)


def store_of_attempt(timeout):
    """A store by which the processes of one host find each other, with the number of torchrun's attempt in its keys.

    torchrun restarts a failed job with the same store, in which a process may read the address of a process that is
    dead (pytorch issue 135712). None leaves the choice to torch: with several hosts not all of them know the number of
    the attempt; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment has this effect."""
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if not (one_host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


# ---------------------------------------------------------------------------------------
# Sampling.


def attention_of_any_shape():
    """Context for attention whose shapes differ from call to call, as with a cache that grows by each token. It leaves
    out cuDNN's kernel, which takes about 30 ms to plan each new shape. No effect off CUDA."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def sample_faster(model, dtype):
    """Makes a model sample faster with products in `dtype`, in place: its parameters and shapes stay. Returns it.

    In 16 bits each matrix is stored once in that precision; autocast would convert it for every token. In float32 on a
    CPU, matrices at least as high as wide are stored by columns: a thread reads columns of 768 channels at 24 GB/s and
    rows at 15 (AMD Milan, torch 2.13 with MKL).
    Not for a model in training: the optimizer's state and DDP's buckets have the other layout."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if dtype != "float32":
        for module in linear:
            module.weight.data = module.weight.data.to(DTYPES[dtype])
    elif model.wte.weight.device.type == "cpu":
        for p in model.parameters():
            if p.dim() == 2 and p.size(0) >= p.size(1):
                p.data = p.data.t().contiguous().t()
    for module in linear:
        module.forward = fast_product(module.weight.detach(), module.bias)
    # the embedding keeps its precision, because the residual stream is float32; in 16 bits the head is a copy of it
    head = fast_product(model.wte.weight.detach().to(DTYPES[dtype]))
    valid = model.config.valid_vocab_size  # cut off after the product: all rows divide evenly among the threads
    model.logits = lambda x: head(x.to(DTYPES[dtype]))[..., :valid]
    return model


def fast_product(weight, bias=None):
    """F.linear with this matrix (N, K) as a function of x (..., K), in the fastest form for one vector."""
    product = torch.nn.functional.linear
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        product = multiply
    elif weight.device.type == "cpu" and packs_bfloat16() and weight.dtype == torch.bfloat16:
        product, weight = multiply_packed, torch.ops.mkldnn._reorder_linear_weight(weight)
    return functools.partial(product, weight=weight, bias=bias)


def packs_bfloat16() -> bool:
    """Whether this torch and this CPU have oneDNN's products with packed bfloat16 matrices."""
    has = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return has and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiply_packed(x, weight, bias=None):
    """F.linear in bfloat16 with a matrix that oneDNN has packed, in the order in which the CPU's instructions for
    bfloat16 read it: 39 to 53 GB/s with one vector, where the plain form reads 23 to 29 (AMD Turin, torch 2.13)."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), weight, bias, "none", (), "")


def multiply(x, weight, bias=None):
    """F.linear in about as many parts as there are threads: x (..., K), weight (N, K) -> (..., N).

    A product with one vector takes as long as reading the matrix, and MKL gives it to one thread. A batch of products
    is shared among all threads, so each of them gets a part of the rows. Small matrices are not worth sharing."""
    if weight.numel() < SHARED:
        return torch.nn.functional.linear(x, weight, bias)
    count = next(n for n in range(torch.get_num_threads(), 0, -1) if len(weight) % n == 0)  # 8 of 10 threads for 768
    parts = weight.unflatten(0, (count, -1))  # (S, N/S, K)
    y = torch.bmm(x.reshape(1, -1, x.size(-1)).expand(len(parts), -1, -1), parts.mT)  # (S, rows of x, N/S)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


# ---------------------------------------------------------------------------------------
# Stopping: signals, memory, a process that is gone.


class Stopped(Exception):
    """The run is asked to stop. Every rank raises it at the same place."""


class StopSignals:
    """Context in which SIGTERM, SIGUSR1 (Slurm's notice), SIGHUP (the terminal was closed) and Ctrl-C only set
    `.received`, which the run reads where it can stop without loss. A second Ctrl-C exits at once. SIGHUP stays
    ignored where it was ignored before, as nohup does."""

    NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
    received = 0
    failed = False  # set by the thread that writes checkpoints when it cannot

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for name in self.NAMES:
                number = getattr(signal, name, None)  # Windows lacks some
                kept = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
                if number and not kept:
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.received == number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number

    def check(self):
        """Raises Stopped if this process has been told to stop."""
        if self.received:
            raise Stopped

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def end_with_parent():
    """For a new child process: the kernel sends it SIGTERM when its parent is gone, however that ended. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def out_of_memory(error) -> bool:
    """Whether the device has no memory left; not every library has an exception type of its own for it."""
    words = ["can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"]  # a CPU; CUDA, NCCL, MPS; cuBLAS
    words += ["Invalid buffer size"]  # MPS, of one tensor
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


@contextmanager
def memory_advice(advice):
    """Turns running out of memory into a UserError that ends with the advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory {advice}") from error


def lost_peer(error) -> bool:
    """Whether an error means that another process of the run died, hangs, or cannot be reached."""
    words = ["gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting"]
    words += ["wait timeout", "client socket", "Broken pipe", "Failed to recv"]  # while they look for each other
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in str(error) for word in words)
