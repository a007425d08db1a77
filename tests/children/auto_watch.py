"""Holds tests to naming the device and the dtype, in this process and in every Python that a test starts.

What "auto" means depends on the machine: on a CPU with AMX it is bfloat16, whose numbers are not those of float32. So a
test that lets it decide passes here and fails there. Importing this file wraps `pick_device` and `pick_dtype` of
support/runtime.py as soon as that module is imported. The file imports nothing heavy: each child process loads it.
"""

import functools
import importlib.util
import os
import sys

RULE = "GPT_TEST_AUTO"  # "refused" or "allowed"; conftest.py sets it for each test, and children inherit it
FORCED = "GPT_TEST_AUTO_DTYPE"  # what "auto" shall mean where it is allowed; given by whoever starts pytest


class LeftToAuto(BaseException):
    """Not an Exception, so that no handler of the code under test takes it for one of its own."""


def refuse(what):
    if os.environ.get(RULE) == "refused":
        raise LeftToAuto(
            f"this test lets the machine choose the {what}: give --{what} (in Python {what}=...), "
            "or mark the test with @pytest.mark.auto if the choice is what it tests"
        )


def watch(runtime):
    """Wraps the two functions of the module in place."""
    device_of, dtype_of = runtime.pick_device, runtime.pick_dtype

    @functools.wraps(device_of)
    def pick_device(name="auto"):
        if name == "auto":
            refuse("device")
        return device_of(name)

    @functools.wraps(dtype_of)
    def pick_dtype(name, device):
        if name == "auto":
            refuse("dtype")
            name = os.environ.get(FORCED, "auto")
        return dtype_of(name, device)

    runtime.pick_device, runtime.pick_dtype = pick_device, pick_dtype


class Finder:
    """Stands before Python's own finders until module `name` is looked for; after its import calls change(module)."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            self.change(module)

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, Finder("support.runtime", watch))
