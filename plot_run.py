"""Curves of one run or of several: metrics.jsonl in, one PNG out.

Notable: works without a display and without pyplot's global state, so training calls it at every
save; a long run is thinned to what a screen can show; the picture replaces the old one at once.
"""

import io
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from support.cli import UserError, flag, parse, run  # isort: split

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from support.files import write_whole

WIDTH, DPI = 10, 120  # inches, and pixels in one
POINTS = 2000  # of a curve at most; more than there are pixels
MARKERS = 40  # on a curve at most
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
DASHES = ("-", "--", ":")  # of the first seven runs, the next seven, and so on
GREY = "#555555"
LEGEND = 165  # characters that fit side by side above the picture
CIRCLE = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"}
GPT2_124M, CHANCE = 29.55, 25.0  # HellaSwag, completion acc_norm, percent: see hellaswag_eval.py
AXES = {"tokens": "tokens", "steps": "step", "seconds": "seconds"}  # --x -> column
LEAST, MOST = {"perplexity": 1}, 1e100  # of a column, 0 where it is not named; what lies outside is damage
FALL = 0.04  # of a curve's length: where the steep beginning is over
KEYS = {  # what is drawn, by the kind of the row
    "train": ("loss", "lr", "tokens_per_second"),
    "val": ("loss", "perplexity"),
    "hellaswag": ("completion_acc_norm", "completion_acc_norm_stderr"),
}

# ---------------------------------------------------------------------------------------
# Numbers.


def read_metrics(path) -> dict[str, dict[str, np.ndarray]]:
    """rows[kind][key], one array per column, NaN where a row has no such number or one outside LEAST and MOST.

    A last line that was cut off is left out; anything else malformed is a UserError with file and line.
    """
    columns = {kind: {key: [] for key in ("step", "tokens", "seconds", *keys)} for kind, keys in KEYS.items()}
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    kind = columns.get(row["kind"], {})
                    values = [float("nan") if row.get(key) is None else float(row[key]) for key in kind]
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                    if line.endswith(b"\n"):
                        raise UserError(f"{path}, line {number}: not a row of metrics ({error!r})") from error
                    break
                for column, value in zip(kind.values(), values):
                    column.append(value)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return {kind: {k: possible(k, np.array(v)) for k, v in column.items()} for kind, column in columns.items()}


def possible(key, values):
    return np.where((values >= LEAST.get(key, 0)) & (values <= MOST), values, np.nan)


def smooth(y):
    """Mean of the finite values within 1% of the rows on either side; fewer at the beginning, where y is steep."""
    finite, i = np.isfinite(y), np.arange(len(y))
    half = np.minimum(i, len(y) // 100)
    first, last = i - half, np.minimum(i + half + 1, len(y))
    total = np.concatenate([[0], np.cumsum(np.where(finite, y, 0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    count = count[last] - count[first]
    return np.where(count > 0, (total[last] - total[first]) / np.maximum(count, 1), np.nan)


def thin(*columns):
    """Every k-th row and the last one, at most POINTS in all."""
    n = len(columns[0])
    rows = np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))
    return [column[rows] for column in columns]


# ---------------------------------------------------------------------------------------
# Panels. Each draws every run into one pair of axes.


def number(value, _=None) -> str:
    """12K, 3.5M, 10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def noisy(ax, r, x, y):
    """A curve with a value at every step: light as it is, strong as it runs."""
    x, y, mean = thin(x, y, smooth(y))
    ax.plot(x, y, color=r["color"], linewidth=0.6, alpha=0.3)
    ax.plot(x, mean, color=r["color"], linestyle=r["dash"], linewidth=1.4)


def marked(ax, r, x, y, line=None):
    """A curve with a value now and then: a circle at each, or at every k-th of many; `line` "none": no curve."""
    x, y = thin(x, y)
    every = max(1, len(x) // MARKERS)
    ax.plot(x, y, color=r["color"], linestyle=line or r["dash"], linewidth=1.2, markevery=every, **CIRCLE)


def frame(ax):
    """Limits that show what comes after the first fall, which is alike in all runs and would flatten the rest."""
    curves = [line.get_data() for line in ax.lines if len(line.get_xdata())]
    late = np.concatenate([y[x >= FALL * x[-1]] for x, y in curves])
    late = late[np.isfinite(late)]
    if len(late) and late.min() < late.max():
        ax.set_ylim(late.min(), late.max())
        low, high = ax.transData.inverted().transform(ax.transAxes.transform([(0, -0.05), (0, 1.05)]))[:, 1]
        ax.set_ylim(low, high)  # 5% of air, on a logarithmic axis too


def loss_panel(ax, runs, x):
    ax.set_ylabel("loss (nats per token)")
    for r in runs:
        noisy(ax, r, r["train"][x], r["train"]["loss"])
    for r in runs:
        marked(ax, r, r["val"][x], r["val"]["loss"], line="none")
    frame(ax)


def perplexity_panel(ax, runs, x):
    ax.set_ylabel("validation perplexity")
    ax.set_yscale("log")
    for r in runs:
        marked(ax, r, r["val"][x], r["val"]["perplexity"])
    frame(ax)
    low, high = ax.get_ylim()
    if high < 10 * low:  # too few powers of ten to be ticks
        ax.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(number))
    ax.yaxis.set_minor_formatter(NullFormatter())


def hellaswag_panel(ax, runs, x):
    ax.set_ylabel("HellaSwag acc_norm ± s.e. (%)")
    for r in runs:
        where, value, error = (r["hellaswag"][key] for key in (x, *KEYS["hellaswag"]))
        marked(ax, r, where, 100 * value)
        bars = {"ecolor": r["color"], "elinewidth": 1, "alpha": 0.6, "zorder": 1.5}
        ax.errorbar(*thin(where, 100 * value, 100 * error), fmt="none", **bars)
    references = [  # (percent, name, where to write it: chance at the end, where curves have left it)
        (GPT2_124M, f"GPT-2 124M, completion acc_norm {GPT2_124M}", "left", 0.01),
        (CHANCE, f"chance {CHANCE:g}", "right", 0.99),
    ]
    for value, name, side, at in references:
        ax.axhline(value, color=GREY, linewidth=1, linestyle="--")
        ax.annotate(name, (at, value), (0, 3), ("axes fraction", "data"), "offset points", ha=side, color=GREY, size=9)
    ax.margins(y=0.1)


def lr_panel(ax, runs, x):
    ax.set_ylabel("learning rate")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    for r in runs:
        ax.plot(*thin(r["train"][x], r["train"]["lr"]), color=r["color"], linestyle=r["dash"], linewidth=1.4)
    ax.set_ylim(bottom=0)


def speed_panel(ax, runs, x):
    ax.set_ylabel("tokens per second")
    ax.yaxis.set_major_formatter(FuncFormatter(number))
    for r in runs:
        noisy(ax, r, r["train"][x], r["train"]["tokens_per_second"])
    ax.set_ylim(bottom=0)


PANELS = {  # --only -> (draws it, the column without which it is left out)
    "loss": (loss_panel, "train", "loss"),
    "perplexity": (perplexity_panel, "val", "perplexity"),
    "hellaswag": (hellaswag_panel, "hellaswag", "completion_acc_norm"),
    "lr": (lr_panel, "train", "lr"),
    "speed": (speed_panel, "train", "tokens_per_second"),
}

# ---------------------------------------------------------------------------------------
# The picture.


def draw(runs, x, only=PANELS) -> Figure:
    """The first panel over the whole width, the others in rows below it."""
    wanted = [PANELS[name] for name in PANELS if name in only]
    panels = [panel for panel, kind, key in wanted if any(np.isfinite(r[kind][key]).any() for r in runs)]
    if not panels:
        raise UserError(f"{', '.join(r['name'] for r in runs)}: no metrics to draw yet")
    below = len(panels) - 1
    columns = 3 if below == 3 else min(below, 2) or 1
    rows = 1 + -(-below // columns)
    fig = Figure(figsize=(WIDTH, 1.2 + 2.7 * rows + 0.1 * len(runs)), dpi=DPI, facecolor="white", layout="constrained")
    grid = fig.add_gridspec(rows, columns, height_ratios=[1.4] + [1] * (rows - 1))
    end, label = measure(runs, x)
    for i, panel in enumerate(panels):
        ax = fig.add_subplot(grid[0, :] if i == 0 else grid[1 + (i - 1) // columns, (i - 1) % columns])
        panel(ax, runs, AXES[x])
        ax.set_xlim(-0.02 * end, 1.02 * end)
        ax.xaxis.set_major_formatter(FuncFormatter(number))
        ax.grid(color="#E5E5E5", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    fig.align_ylabels()
    fig.supxlabel(label, fontsize="medium")
    legend(fig, runs)
    return fig


def measure(runs, x) -> tuple[float, str]:
    """(end of the horizontal axis, its label); seconds are turned into minutes, hours or days where they are many."""
    columns = [r[kind][AXES[x]] for r in runs for kind in KEYS]
    end = max((np.nanmax(column) for column in columns if np.isfinite(column).any()), default=0) or 1
    if x != "seconds":
        return end, {"tokens": "training tokens", "steps": "optimizer step"}[x]
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, size in units.items() if end > 2 * size), "seconds")
    for column in columns:
        column /= units[unit]
    return end / units[unit], f"training time ({unit})"


def legend(fig, runs):
    """Above the panels, where it covers no curve: an entry per run, then what light, strong and a circle mean."""
    names = [r["name"].replace("$", r"\$") for r in runs]  # a bare dollar would begin a formula
    entries = [
        Line2D([], [], color=r["color"], linestyle=r["dash"], linewidth=2, label=name) for r, name in zip(runs, names)
    ]
    entries.append(Line2D([], [], color=GREY, linewidth=1.4, label="training: each step light, running mean strong"))
    entries.append(Line2D([], [], color=GREY, linestyle="none", label="validation", **CIRCLE))
    columns = max(1, min(len(entries), LEGEND // max(len(entry.get_label()) + 8 for entry in entries)))
    fig.legend(handles=entries, fontsize=9, frameon=False, loc="outside upper center", ncols=columns, columnspacing=1.2)


def find_metrics(path) -> tuple[str, Path]:
    """(name of the run, its metrics.jsonl) for a run's directory or the file itself. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a run's directory or its metrics.jsonl")
    return path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem, path


def plot(runs, output, x="tokens", only=PANELS) -> Path:
    """Draws runs (directories or metrics.jsonl files) into one PNG over tokens, steps or seconds, all panels there
    are numbers for or `only` some; returns its path.

    Raises UserError where a file is missing or malformed, or the picture cannot be written.
    """
    names, files = zip(*map(find_metrics, runs))
    if len(set(names)) < len(names):
        names = [str(path) for path in runs]
    styles = itertools.cycle(itertools.product(DASHES, COLORS))
    drawn = [{"name": n, "color": c, "dash": d, **read_metrics(path)} for n, (d, c), path in zip(names, styles, files)]
    fig = draw(drawn, x, only)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        save(fig, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    return Path(output)


def plot_comparison(arms, output):
    """compare.py's picture: validation curves, a line and a band over the seeds per arm, and the paired differences.

    arms: dicts with "arm" (the name), "measure", "curve" (tokens, mean, least, greatest) and, for all but the base,
    "difference" (mean, low and high end of its interval, both None for one seed)."""
    fig = Figure(figsize=(WIDTH, 4.2 + 0.2 * len(arms)), dpi=DPI, facecolor="white", layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    unit = {"loss": "nats per token", "bits_per_byte": "bits per byte"}[arms[0]["measure"]]
    colors = {row["arm"]: color for row, color in zip(arms, itertools.cycle(COLORS))}
    for row in arms:
        tokens, mean, least, greatest = map(np.array, row["curve"])
        left.plot(tokens, mean, color=colors[row["arm"]], linewidth=1.4, label=row["arm"], **CIRCLE)
        left.fill_between(tokens, least, greatest, color=colors[row["arm"]], alpha=0.2, linewidth=0)
    frame(left)
    left.set_xlabel("training tokens")
    left.set_ylabel(f"validation ({unit}): mean, and range over seeds")
    left.xaxis.set_major_formatter(FuncFormatter(number))
    left.legend(frameon=False, fontsize=9)
    compared = [row for row in arms if "difference" in row]
    for height, row in enumerate(reversed(compared)):
        d, color = row["difference"], colors[row["arm"]]
        if d["low"] is not None:
            right.plot([d["low"], d["high"]], [height, height], color=color, linewidth=2)
        right.plot(d["mean"], height, "o", color=color)
    right.axvline(0, color=GREY, linewidth=1, linestyle="--")
    right.set_yticks(range(len(compared)), [row["arm"] for row in reversed(compared)])
    right.set_ylim(-0.7, len(compared) - 0.3)
    right.set_xlabel(f"difference to {arms[0]['arm']} ({unit}), 95% interval\nless is better")
    for ax in (left, right):
        ax.grid(color="#E5E5E5", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    save(fig, output)


def draw_lengths(splits, ends, output):
    """A histogram of documents' lengths into the PNG `output`. `splits` has, by name, the numbers of documents by
    the lower end of their bin, in tokens and as text (JSON's keys); `ends` are the lower ends of all bins, in order."""
    used = [i for i, end in enumerate(ends) if any(counts.get(str(end)) for counts in splits.values())]
    edges = ends[used[0] : used[-1] + 2] if used[-1] + 1 < len(ends) else [*ends[used[0] :], 2 * ends[-1]]
    fig = Figure(figsize=(WIDTH, 4), dpi=DPI, facecolor="white", layout="constrained")
    ax = fig.add_subplot()
    for (name, counts), color in zip(splits.items(), COLORS):
        total = max(1, sum(counts.values()))
        share = [100 * counts.get(str(edge), 0) / total for edge in edges[:-1]]
        ax.stairs(share, edges, color=color, linewidth=1.4, label=f"{name}: {total:,} documents")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(number))
    ax.set_xlabel("tokens in a document, its marker included")
    ax.set_ylabel("documents (%)")
    ax.legend(frameon=False)
    ax.grid(color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, output)


def save(fig, output):
    picture = io.BytesIO()
    fig.savefig(picture, format="png")
    write_whole(output, picture.getvalue())


def newest_run() -> Path:
    found = sorted(Path("checkpoints").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no run under checkpoints/; train one (python train.py) or name a run's directory")
    return found[-1].parent


EXAMPLES = [
    "python plot_run.py checkpoints/demo",
    "python plot_run.py checkpoints/one checkpoints/two --x seconds --only loss speed --output both.png",
]


@dataclass(frozen=True)
class PlotConfig:
    """Which runs are drawn, and over what."""

    runs: tuple[str, ...] = flag((), "directory or metrics.jsonl; default: the newest run", unit="run", positional=True)
    output: str | None = flag(None, "the picture; default: curves.png beside the first run's metrics", unit="file")
    x: str = flag("tokens", "horizontal axis", unit="name", choices=tuple(AXES))
    only: tuple[str, ...] = flag(tuple(PANELS), "panels", unit="panel", choices=tuple(PANELS))


def main(argv=None):
    """The command line; raises UserError, which `cli.run` turns into one line and exit code 2."""
    description = "Draw the curves of one run, or of several for comparison, into a PNG."
    args = parse(PlotConfig, argv, description, EXAMPLES)
    runs = args.runs or [newest_run()]
    output = args.output or find_metrics(runs[0])[1].with_name("curves.png")
    print(plot(runs, output, args.x, args.only))


if __name__ == "__main__":
    sys.exit(run(main))
