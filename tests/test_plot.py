"""Curves: every mixture of rows gives a whole picture, runs of one arm share a colour, and what is no metrics file is
named."""

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
            speed = {"tokens_per_second": 18000 + step, "mfu": None, "memory": 10, "epoch": step / 100}
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


def figure(runs, x="tokens"):
    return plot_run.make_figure(plot_run.find_arms(runs), x)


def panels(folder):
    """The vertical labels of what would be drawn."""
    return [ax.get_ylabel().split(" (")[0] for ax in figure([folder]).axes]


def make_comparison(folder, arms, seeds=(1, 2), gap=0.1):
    """comparisons/NAME as compare.py leaves it; the loss of seed n is `gap` n higher. Returns the runs, sorted by name
    as a shell does."""
    runs = []
    for arm in arms:
        for seed in seeds:
            rows = [row | {"loss": row["loss"] + gap * seed} if "loss" in row else row for row in make_rows()]
            runs.append(make_run(folder / plot_run.arm_folder(arm) / f"seed_{seed}", rows))
    (folder / "comparison.json").write_text(json.dumps({"common": [], "arms": {arm: {} for arm in arms}}))
    return sorted(runs)


def colors(fig) -> dict:
    """{name: color} of the legend."""
    [legend] = fig.legends
    return {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}


def test_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_run, "DPI", 120)
    folder = make_run(tmp_path / "run", make_rows())
    out = plot_run.plot([folder], tmp_path / "new" / "curves.png")
    assert out == tmp_path / "new" / "curves.png"
    width, height = check_png(out)
    assert width == 1200 and height > 800 and out.stat().st_size > 30_000
    assert os.listdir(out.parent) == ["curves.png"]
    names = ["loss", "validation perplexity", "HellaSwag acc_norm ± s.e.", "learning rate", NORM, "tokens per second"]
    assert panels(folder) == names


NORM = "gradient norm before clipping"


@pytest.mark.parametrize(
    "kinds, names",
    [
        (("train", "val"), ["loss", "validation perplexity", "learning rate", NORM, "tokens per second"]),
        (("train",), ["loss", "learning rate", NORM, "tokens per second"]),
        (("val",), ["validation perplexity"]),
        (("hellaswag",), ["HellaSwag acc_norm ± s.e."]),
    ],
)
def test_a_panel_without_rows_is_left_out(tmp_path, kinds, names):
    folder = make_run(tmp_path / "run", make_rows(kinds=kinds))
    assert panels(folder) == names
    check_png(plot_run.plot([folder], tmp_path / "out.png"))


def test_bits_per_byte_have_a_panel_where_they_are_known(tmp_path):
    rows = [row | {"bits_per_byte": 2.0} if row["kind"] == "val" else row for row in make_rows()]
    assert panels(make_run(tmp_path / "run", rows))[2] == "validation bits per byte"


def test_the_seeds_of_an_arm_are_one_line_with_a_band(tmp_path):
    """Bug: eighteen runs of six arms in eighteen styles, where nobody sees an arm."""
    runs = make_comparison(tmp_path / "c", ["base", "zero init"])
    fig = figure(runs)
    assert list(colors(fig))[:2] == ["base (2 seeds)", "zero init (2 seeds)"]
    loss = fig.axes[0]
    [mean] = [line for line in loss.lines if line.get_linewidth() == 1.4 and line.get_color() == plot_run.COLORS[0]]
    expected = 0.15 + plot_run.smooth(np.array([row["loss"] for row in make_rows() if row["kind"] == "train"]))
    assert mean.get_ydata() == pytest.approx(expected), "the mean of the seeds"
    box = loss.collections[0].get_paths()[0].get_extents()
    assert box.y0 == pytest.approx(expected.min() - 0.05) and box.y1 == pytest.approx(expected.max() + 0.05)


def test_an_arm_has_one_colour_in_every_picture(tmp_path, monkeypatch):
    """Bug: colours by the order of the names on the command line, so that an arm changes its colour from picture to
    picture, or when another arm fails."""
    folder, names = tmp_path / "c", ["muon", "base", "a b"]
    runs = make_comparison(folder, names)
    expected = dict(zip(names, plot_run.COLORS))
    found = colors(figure(runs))
    assert {name: found[f"{name} (2 seeds)"] for name in names} == expected
    assert (
        colors(figure([folder / "a_b" / "seed_2", tmp_path / "c" / "base" / "seed_1"]))["a b, seed_2"]
        == expected["a b"]
    )
    drawn = []
    monkeypatch.setattr(plot_run, "write_figure", lambda fig, path: drawn.append((fig, path)))
    row = {"measure": "loss", "curve": [[0, 100], [4, 3], [4, 2.9], [4, 3.1]]}
    d = {"difference": {"mean": -0.1, "low": -0.2, "high": 0.0}}
    plot_run.plot_comparison([row | {"arm": "base"}, row | {"arm": "a b"} | d], folder)
    [(fig, path)] = drawn
    assert path == folder / "comparison.png"
    left, right = fig.axes
    [legend] = [left.get_legend()]
    found = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert found == {name: expected[name] for name in ("base", "a b")}
    assert right.lines[0].get_color() == expected["a b"]


def test_seeds_of_other_lengths_are_drawn_where_all_of_them_are(tmp_path):
    """An arm in the midst of its runs: the mean of what only one seed has would jump."""
    runs = make_comparison(tmp_path / "c", ["base"])
    make_run(tmp_path / "c" / "base" / "seed_3", [])
    short = [row for row in make_rows(20) if row["step"] != 5]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    [arm] = plot_run.find_arms([*runs, tmp_path / "c" / "base" / "seed_3"])
    assert arm["train"]["loss"].shape == (2, 19) and arm["val"]["loss"].shape == (2, 3)
    assert (arm["train"]["step"][0] == arm["train"]["step"][1]).all()
    check_png(plot_run.plot(runs, tmp_path / "out.png"))


def vertical(ax):
    return [line for line in ax.lines if line.get_linestyle() == ":" and len(set(line.get_xdata())) == 1]


def test_ends_of_epochs_are_thin_lines(tmp_path):
    """Drawn from the rows' `epoch`: none at the end of the run; in a run's colour where runs differ; few of many."""

    def run(name, per_step, steps=60):
        rows = [row | {"epoch": row["step"] * per_step} if row["kind"] == "train" else row for row in make_rows(steps)]
        return make_run(tmp_path / name, rows)

    one, two, many = run("one", 1 / 20), run("two", 1 / 40), run("many", 5)
    for ax in figure([one], "steps").axes:
        assert [line.get_xdata()[0] for line in vertical(ax)] == pytest.approx([20, 40])
    assert {line.get_color() for line in vertical(figure([one, one]).axes[0])} == {plot_run.GREY}
    fig = figure([one, two], "steps")
    assert {line.get_color() for line in vertical(fig.axes[0])} == set(plot_run.COLORS[:2])
    fig = figure([many], "steps")
    assert len(vertical(fig.axes[0])) == 19 and list(colors(fig))[-1] == "end of an epoch, one in 15"
    assert list(colors(figure([run("short", 1 / 60)])))[-1] == "validation", "a line where nothing ends"


def test_other_vocabularies_are_said(tmp_path):
    """Bug: two curves of nats per token in one panel, of other tokens."""
    runs = [make_run(tmp_path / name, make_rows()) for name in "abc"]
    for folder, tokenizer in zip(runs, ("x", "y")):
        (folder / "run.json").write_text(json.dumps({"identity": {"tokenizer": tokenizer}}))
    notes = [ax.get_title(loc="left") for ax in figure(runs).axes]
    assert [i for i, note in enumerate(notes) if "vocabularies differ" in note] == [0, 1], "loss and perplexity"
    assert not any(ax.get_title(loc="left") for ax in figure([runs[0], runs[2]]).axes)


@pytest.mark.parametrize("name, first", [("a.svg", b"<?xml"), ("a.PDF", b"%PDF-"), ("a.png", b"\x89PNG")])
def test_the_format_is_what_the_name_says(tmp_path, capsys, name, first):
    """Bug: `--output curves.pdf` wrote a PNG."""
    folder = make_run(tmp_path / "run", make_rows(5))
    assert plot_run.plot([folder], tmp_path / name).read_bytes().startswith(first)
    for wrong in ("a.jpg", "a"):
        assert run(lambda wrong=wrong: plot_run.main([str(folder), "--output", str(tmp_path / wrong)])) == 2
        assert capsys.readouterr().err.endswith(f"{wrong}: a picture's name ends in .png, .svg, .pdf\n")


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
    drawn, real = [], plot_run.make_figure
    monkeypatch.setattr(plot_run, "make_figure", lambda *a: (drawn.append(real(*a)), drawn[-1])[1])
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
    assert plot_run.POINTS * 0.8 < len(a) <= plot_run.POINTS and a[-1] == x[-1] and (a == -b).all()
    assert list(a[:80]) == list(range(80)) and np.diff(a).max() < 120, "the early bend, and no gap later"
    assert len(plot_run.thin(x[:7])[0]) == 7 and len(plot_run.thin(x[:0])[0]) == 0


def test_the_beginning_does_not_flatten_the_rest(tmp_path):
    """Guards the limits: a fall from 11 to 3 in the first steps, then all that matters within 0.2."""
    rows = make_rows(400)
    folder = make_run(tmp_path / "run", rows)
    loss, perplexity = figure([folder], "steps").axes[:2]
    assert 2.9 < loss.get_ylim()[0] < 3 < loss.get_ylim()[1] < 4
    assert 15 < perplexity.get_ylim()[0] < math.exp(3) < perplexity.get_ylim()[1] < 50


@pytest.mark.parametrize("value, text", [(0, "0"), (500, "500"), (65536, "65.54K"), (2.5e6, "2.5M"), (1e10, "10B")])
def test_big_numbers(value, text):
    assert plot_run.number(value) == text


def test_time_has_a_unit(tmp_path):
    for end, label, expected in ((90, "seconds", 90), (600, "minutes", 10), (7300, "hours", 2.03), (2e5, "days", 2.31)):
        r = {kind: {"seconds": np.array([0.0, end])} for kind in plot_run.KEYS}
        found, text = plot_run.axis_of([r], "seconds")
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
