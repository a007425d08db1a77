"""Two hosts train one run: two network namespaces of this machine, joined by a cable that can be pulled out.

They share the file system, as hosts with shared storage do. Needs root on Linux and iproute2; skipped elsewhere."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from toy import finished, start, trace, wait_for_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # whatever hangs, hangs no longer
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ip"), reason="needs Linux and iproute2"),
]

NAMESPACE = {host: f"gpt-{os.getpid()}-{host}" for host in "ab"}
ADDRESS = {"a": "10.0.0.1", "b": "10.0.0.2"}  # known inside the namespaces only, like the port
PORT = 29500


def ip(*words, check=True) -> str:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).stdout


def lay_cable():
    """Two namespaces, each with one end of a pair of virtual Ethernet devices, both ends named `cable`."""
    for name in NAMESPACE.values():
        ip("netns", "add", name)
    ends = [["netns", name, "name", "cable"] for name in NAMESPACE.values()]
    ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
    for host, name in NAMESPACE.items():
        ip("-n", name, "address", "add", f"{ADDRESS[host]}/24", "dev", "cable")
        for device in ("lo", "cable"):
            ip("-n", name, "link", "set", device, "up")
        ip("netns", "exec", name, "true")


def living(host) -> list[int]:
    """The processes of a host."""
    return [int(pid) for pid in ip("netns", "pids", NAMESPACE[host], check=False).split()]


@pytest.fixture
def hosts():
    """Yields a function that starts a host's torchrun; afterwards no process and no namespace is left."""
    started = []

    def torchrun_on(host, config, *options, **environment):
        where = f"--rdzv_endpoint={ADDRESS['a']}:{PORT}", f"--local_addr={ADDRESS[host]}"
        # is_host: torchrun knows a host by its name's address, and the two share the name of this machine
        conf = f"--rdzv_conf=is_host={host == 'a'},join_timeout=60"
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                    "--rdzv_id=toy", conf, *where, *options]  # fmt: skip
        inside = ["ip", "netns", "exec", NAMESPACE[host]]
        started.append(start(config, *inside, sys.executable, *launcher, GLOO_SOCKET_IFNAME="cable", **environment))
        return started[-1]

    try:
        try:
            lay_cable()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here, which need root: {error.stderr.strip()}")
        yield torchrun_on
    finally:
        for host, name in NAMESPACE.items():
            for pid in living(host):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip("netns", "delete", name, check=False)
        for process in started:
            process.communicate(timeout=20)


def pull_out():
    ip("-n", NAMESPACE["a"], "link", "set", "cable", "down")


def plug_in():
    ip("-n", NAMESPACE["a"], "link", "set", "cable", "up")


def both_leave(both):
    """Each host's training says in one line why it leaves, and leaves, while the cable is still out."""
    for host, process in both.items():
        while "has not answered" not in (line := process.stdout.readline()):
            assert line and "Traceback" not in line, f"host {host} ended in another way"
        assert "--timeout 10 seconds" in line and "saved checkpoints are intact" in line
    assert "exitcode  : 2 " in finished(both["a"], code=1, timeout=60)
    # b's torchrun waits for a's, which keeps the list of hosts, until the cable is back; b's training does not
    until = time.monotonic() + 30
    while set(living("b")) - {both["b"].pid}:
        assert time.monotonic() < until, "training on host b has not left"
        time.sleep(0.1)


def test_hosts_that_lose_each_other_give_up_and_later_go_on(toy, hosts, whole, tally):
    """A pulled cable closes no connection: without a time-out both hosts would wait for ever, and silently. In the end
    two hosts give the numbers and the files of two processes on one, and one of them speaks."""
    toy = replace(toy, timeout=10.0)
    both = {host: hosts(host, toy) for host in "ab"}
    wait_for_step(toy, 12, both["a"])
    pull_out()
    both_leave(both)
    assert 12 <= len(trace(toy)) < 40, "cut off in the middle"

    plug_in()
    both["b"].kill()  # its torchrun would find the other gone, sooner or later
    both = {host: hosts(host, toy) for host in "ab"}
    first, second = (finished(process) for process in both.values())
    assert "continued at step" in first and "validation loss" in first and "validation loss" not in second
    assert trace(toy) == trace(whole)
    kept = [{path.relative_to(c.run_dir) for path in c.run_dir.rglob("*")} for c in (toy, whole)]
    assert kept[0] == kept[1]
    tally("hosts cut off survived")


def test_hosts_that_never_find_each_other_give_up(toy, hosts, tally):
    """What torch says of a host that it cannot reach at all is another error, and was a traceback."""
    toy = replace(toy, timeout=10.0)
    both = {host: hosts(host, toy) for host in "ab"}
    until = time.monotonic() + 60
    while min(len(living(host)) for host in "ab") < 2:  # torchrun has found the other, and starts the training
        assert time.monotonic() < until, "torchrun did not start the training"
        time.sleep(0.05)
    pull_out()
    both_leave(both)
    assert not toy.run_dir.exists()
    tally("hosts cut off survived")
