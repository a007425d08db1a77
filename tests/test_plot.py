"""Curves: every mixture of rows gives a whole PNG, and what is no metrics file is named."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hellaswag_eval
import plot_run
from support.cli import UserError, run


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """A ninth of the pixels, to save time."""
    monkeypatch.setattr(plot_run, "DPI", 40)


def make_rows(steps=60, kinds=("train", "val", "hellaswag", "sample")):
    rows = []
    for step in range(steps + 1):
        at = {"step": step, "tokens": step * 65536, "seconds": step * 3.5}
        loss = 3 + 8 * math.exp(-step / 5)
        if "train" in kinds and step:
            speed = {"tokens_per_second": 18000 + step, "mfu": None, "memory": 10}
            rows.append({"kind": "train", **at, "loss": loss, "lr": 6e-4 / step, "grad_norm": 1.0, **speed})
        if "val" in kinds and step % 10 == 0:
            rows.append({"kind": "val", **at, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": None})
        if "hellaswag" in kinds and step % 20 == 0:
            accuracy = {"completion_acc": 0.26, "completion_acc_norm": 0.27, "completion_acc_norm_stderr": 0.004}
            rows.append({"kind": "hellaswag", **at, **accuracy})
        if "sample" in kinds and step % 30 == 0:
            rows.append({"kind": "sample", "step": step, "prompt": "a", "text": "b\n"})
    return rows


def make_run(folder, rows, tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def check_png(path):
    """Width and height of a whole PNG."""
    body = path.read_bytes()
    assert body[:8] == b"\x89PNG\r\n\x1a\n" and body[-8:-4] == b"IEND" and len(body) > 3_000
    return struct.unpack(">II", body[16:24])


def panels(folder, x="tokens"):
    """The vertical labels of what would be drawn."""
    rows = {"name": "run", "color": "black", "dash": "-", **plot_run.read_metrics(folder / "metrics.jsonl")}
    return [ax.get_ylabel().split(" (")[0] for ax in plot_run.draw([rows], x).axes]


def test_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_run, "DPI", 120)
    folder = make_run(tmp_path / "run", make_rows())
    out = plot_run.plot([folder], tmp_path / "new" / "curves.png")
    assert out == tmp_path / "new" / "curves.png"
    width, height = check_png(out)
    assert width == 1200 and height > 800 and out.stat().st_size > 30_000
    assert os.listdir(out.parent) == ["curves.png"]
    names = ["loss", "validation perplexity", "HellaSwag acc_norm ± s.e.", "learning rate", "tokens per second"]
    assert panels(folder) == names


@pytest.mark.parametrize(
    "kinds, names",
    [
        (("train", "val"), ["loss", "validation perplexity", "learning rate", "tokens per second"]),
        (("train",), ["loss", "learning rate", "tokens per second"]),
        (("val",), ["validation perplexity"]),
        (("hellaswag",), ["HellaSwag acc_norm ± s.e."]),
    ],
)
def test_a_panel_without_rows_is_left_out(tmp_path, kinds, names):
    folder = make_run(tmp_path / "run", make_rows(kinds=kinds))
    assert panels(folder) == names
    check_png(plot_run.plot([folder], tmp_path / "out.png"))


def test_only_some_panels(tmp_path, capsys):
    folder = make_run(tmp_path / "run", make_rows())
    few, all_of_them = (
        check_png(plot_run.plot([folder], tmp_path / "out.png", only=only)) for only in (["loss"], plot_run.PANELS)
    )
    assert few[0] == all_of_them[0] and few[1] < all_of_them[1] / 2, "one panel makes a low picture"
    plot_run.main([str(folder), "--only", "lr", "loss"])
    assert run(lambda: plot_run.main([str(folder), "--only", "accuracy"])) == 2
    assert "it must be one of loss, perplexity" in capsys.readouterr().err


def test_several_runs(tmp_path):
    """Other lengths and kinds, more runs than colours, equal names, a name with a dollar, a bare file."""
    runs = [make_run(tmp_path / f"{i}" / "same", make_rows(10 + i)) for i in range(8)]
    runs.append(make_run(tmp_path / "_$x^$", make_rows(5, ("train",))))
    runs.append(make_run(tmp_path / "sweep", make_rows(5, ("val",))) / "metrics.jsonl")
    check_png(plot_run.plot(runs, tmp_path / "out.png", "seconds"))


@pytest.mark.parametrize(
    "x, count, name",
    [("tokens", 1, "one"), ("steps", 3, "short"), ("seconds", 10, "edu-10m-with-a-long-name-that-tells-all-of-it")],
)
def test_runs_are_told_apart_and_the_legend_covers_none(tmp_path, monkeypatch, x, count, name):
    """Guards a legend that lay over the curves of ten runs, and an eighth run that looked like the first."""
    runs = [make_run(tmp_path / f"{name}{i}", make_rows(10 + i)) for i in range(count)]
    drawn, real = [], plot_run.draw
    monkeypatch.setattr(plot_run, "draw", lambda *a: (drawn.append(real(*a)), drawn[-1])[1])
    plot_run.plot(runs, tmp_path / "out.png", x)
    fig = drawn[0]
    [legend] = fig.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:count] == [run.name for run in runs] and names[count + 1] == "validation"
    styles = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()[:count]}
    assert len(styles) == count
    for ax in fig.axes:
        assert styles <= {(line.get_color(), line.get_linestyle()) for line in ax.lines}
        assert not ax.get_window_extent().overlaps(legend.get_window_extent())
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width


@pytest.mark.parametrize("steps", [0, 1])
def test_the_first_moments_of_a_run(tmp_path, steps):
    check_png(plot_run.plot([make_run(tmp_path / "run", make_rows(steps))], tmp_path / "out.png"))


def test_numbers_that_are_none(tmp_path):
    rows = make_rows()
    for row in rows[::3]:
        row["loss"] = float("nan")
    rows[4]["loss"], rows[7]["lr"] = float("inf"), None
    del rows[10]["tokens"]
    rows.append({"kind": "a later version's", "step": 1, "loss": "?"})
    check_png(plot_run.plot([make_run(tmp_path / "run", rows)], tmp_path / "out.png"))


def test_cut_last_line(tmp_path):
    rows = make_rows()
    whole, cut = make_run(tmp_path / "whole", rows), make_run(tmp_path / "cut", rows, '{"kind": "train", "st')
    a, b = (plot_run.read_metrics(folder / "metrics.jsonl") for folder in (whole, cut))
    assert all(np.array_equal(a[kind][key], b[kind][key], equal_nan=True) for kind in a for key in a[kind])
    check_png(plot_run.plot([cut], tmp_path / "out.png"))


@pytest.mark.parametrize(
    "line", ['{"kind": "train", "st', "[]", "", "{}", '{"kind": 1, "step": 2', '{"kind": "val", "loss": "x"}', "\0" * 9]
)
def test_malformed_line_is_named(tmp_path, line):
    folder = make_run(tmp_path / "run", make_rows(1), f"{line}\n" + '{"kind": "sample", "step": 1}\n')
    number = len(make_rows(1)) + 1
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line {number}: not a row"):
        plot_run.plot([folder], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_smooth_and_thin():
    y = np.arange(1000.0) % 2  # 0, 1, 0, 1: the mean of 21 is near a half
    assert np.abs(plot_run.smooth(y)[10:] - 0.5).max() < 0.05
    assert plot_run.smooth(y)[0] == y[0]
    y[5:] = np.nan
    assert np.isnan(plot_run.smooth(y)[-1]) and plot_run.smooth(y)[2] == 0.4
    assert len(plot_run.smooth(np.zeros(0))) == 0
    x = np.arange(100_000)
    a, b = plot_run.thin(x, -x)
    assert len(a) == plot_run.POINTS and a[0] == 0 and a[-1] == x[-1] and (a == -b).all()
    assert len(plot_run.thin(x[:7])[0]) == 7 and len(plot_run.thin(x[:0])[0]) == 0


def test_the_beginning_does_not_flatten_the_rest(tmp_path):
    """Guards the limits: a fall from 11 to 3 in the first steps, then all that matters within 0.2."""
    rows = make_rows(400)
    folder = make_run(tmp_path / "run", rows)
    r = {"name": "run", "color": "black", "dash": "-", **plot_run.read_metrics(folder / "metrics.jsonl")}
    loss, perplexity = plot_run.draw([r], "steps").axes[:2]
    assert 2.9 < loss.get_ylim()[0] < 3 < loss.get_ylim()[1] < 4
    assert 15 < perplexity.get_ylim()[0] < math.exp(3) < perplexity.get_ylim()[1] < 50


@pytest.mark.parametrize("value, text", [(0, "0"), (500, "500"), (65536, "65.54K"), (2.5e6, "2.5M"), (1e10, "10B")])
def test_big_numbers(value, text):
    assert plot_run.number(value) == text


def test_time_has_a_unit(tmp_path):
    for end, label, expected in ((90, "seconds", 90), (600, "minutes", 10), (7300, "hours", 2.03), (2e5, "days", 2.31)):
        r = {kind: {"seconds": np.array([0.0, end])} for kind in plot_run.KEYS}
        found, text = plot_run.measure([r], "seconds")
        assert found == pytest.approx(expected, abs=0.01) and text == f"training time ({label})"
        assert r["train"]["seconds"][1] == found


def test_references_are_the_evaluation_s():
    assert hellaswag_eval.GPT2_124M["completion_acc_norm"] == plot_run.GPT2_124M
    assert hellaswag_eval.CHANCE == plot_run.CHANCE


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(lambda: plot_run.main([])) == 2
    assert "no run under checkpoints/" in capsys.readouterr().err
    old, new = (make_run(tmp_path / "checkpoints" / name, make_rows(5)) for name in ("old", "new"))
    os.utime(old / "metrics.jsonl", (1, 1))
    assert run(lambda: plot_run.main([])) == 0
    assert capsys.readouterr().out.strip() == str(Path("checkpoints", "new", "curves.png"))
    check_png(new / "curves.png")
    assert run(lambda: plot_run.main([str(old), str(new), "--output", "both.png", "--x", "steps"])) == 0
    check_png(tmp_path / "both.png")
    assert not (old / "curves.png").exists()


def test_command_line_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, empty = make_run(tmp_path / "run", make_rows(5)), make_run(tmp_path / "empty", [])
    for flags, words in (
        (["missing"], "missing: no such file"),
        ([str(tmp_path)], "metrics.jsonl: no such file"),
        ([str(empty)], "no metrics to draw yet"),
        ([str(folder), "--x", "weeks"], "weeks"),
        ([str(folder), "--output", str(folder / "metrics.jsonl" / "x.png")], "cannot be written"),
    ):
        assert run(lambda flags=flags: plot_run.main(flags)) == 2
        assert words in capsys.readouterr().err


def test_a_failed_drawing_keeps_the_old_picture(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", make_rows(5))
    out = folder / "curves.png"
    out.write_bytes(b"the old one")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        plot_run.plot([folder], out)
    assert out.read_bytes() == b"the old one" and sorted(os.listdir(folder)) == ["curves.png", "metrics.jsonl"]


def test_no_display_and_no_global_state():
    """Guards training on a server: importing must neither look for a screen nor bring pyplot in."""
    code = "import sys, plot_run; sys.exit('matplotlib.pyplot' in sys.modules)"
    env = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(plot_run.__file__).parent, env=env).returncode == 0
