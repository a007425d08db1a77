"""Python imports this at its start: conftest.py puts this folder on PYTHONPATH for the processes that tests start."""

import os
import sys

import auto_watch  # its import is what counts


def draw_nothing(plot_run):
    plot_run.plot = lambda *args: None


if os.environ.get("GPT_TEST_PICTURES") == "off":  # a picture takes half a second, and a run draws one at each save
    sys.meta_path.insert(0, auto_watch.Finder("plot_run", draw_nothing))
