"""Runs scripts again and again for the tests of faults without importing torch each time: a child per run.

Reads requests, one JSON object a line, on stdin: {"script", "argv", "set": {"module.CONSTANT": value},
"output": path, "directory", "at", "how", "kill_after"}, and answers each on stdout: {"code": exit code or minus the
signal's number, "calls": of file-system calls counted}.
`how` is one of faults.c's: 0 count, 1 kill at call `at`, 2 disk full from there on. After
`kill_after` seconds the child gets a SIGKILL. Faults need faults.so preloaded into this process.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time

import datasets  # noqa: F401 (imported late, where it is needed)
import torch._dynamo  # noqa: F401 (every optimizer imports it: two seconds that the children need not spend)

import plot_run
import prepare_fineweb
import train
from support.cli import run
from support.files import write_whole
from toy import seed_the_cpu_alone

seed_the_cpu_alone()
train.plot_curves = lambda run_dir: 0.0  # pictures would take most of the time
plot_run.plot_lengths = lambda lengths, bins, path: write_whole(path, b"picture")


def child(request, reply):
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    faults = ctypes.CDLL(None)
    if request["directory"]:
        faults.faults_arm(request["directory"].encode(), ctypes.c_long(request["at"]), request["how"])
    code, script = 1, {"train": train, "prepare_fineweb": prepare_fineweb}[request["script"]]
    for name, value in request["set"].items():
        module, constant = name.split(".")
        setattr(sys.modules[module], constant, value)
    try:
        code = run(lambda: script.main(request["argv"]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.write(reply, str(faults.faults_calls() if request["directory"] else 0).encode())
        os._exit(code)


def serve(request):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(request, write)
    os.close(write)
    deadline = time.monotonic() + (request.get("kill_after") or 60)
    done = 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
    if not done:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    calls = os.read(read, 100)
    os.close(read)
    return {"code": os.waitstatus_to_exitcode(status), "calls": int(calls or 0)}


if __name__ == "__main__":
    gc.freeze()  # or each child's collector writes to all pages, which the kernel then copies
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
