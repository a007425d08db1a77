"""Curves of one run or of several: metrics.jsonl in, one picture out.

    python plot_run.py checkpoints/demo                                         # curves.png beside its metrics
    python plot_run.py checkpoints/one checkpoints/two --x seconds --output both.pdf
    python plot_run.py comparisons/ideas/*/seed_* --only loss --output ideas.svg

The seeds of one arm of a comparison (compare.py) share a colour: their mean is a line, their range a band. An arm has
the same colour in all pictures of its comparison. Training calls `plot` after saves, so this file needs no display
and changes no global state of matplotlib. The new picture replaces the old one by one rename.
"""

import functools
import io
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from support.cli import UserError, flag, parse, run  # isort: split

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from support.files import read_json, write_whole

WIDTH, DPI = 10, 120  # inches, and pixels in one
FORMATS = (".png", ".svg", ".pdf")
POINTS = 2000  # of a curve at most; more than there are pixels
MARKERS = 40  # on a curve at most
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
DASHES = ("-", "--", ":")  # of the first seven runs, the next seven, and so on
GREY = "#555555"
BORDERS = 20  # ends of epochs at most
LEGEND = 165  # characters that fit side by side above the picture
CIRCLE = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"}
GPT2_124M, CHANCE = 29.55, 25.0  # HellaSwag, completion acc_norm, percent: see hellaswag_eval.py
AXES = {"tokens": "tokens", "steps": "step", "seconds": "seconds"}  # --x -> column
LEAST, MOST = {"perplexity": 1}, 1e100  # of a column, 0 where it is not named; what lies outside is damage
FALL = 0.04  # of a curve's length: where the steep beginning is over
KEYS = {  # what is drawn, by the kind of the row
    "train": ("loss", "lr", "grad_norm", "tokens_per_second", "epoch"),
    "val": ("loss", "perplexity", "bits_per_byte"),
    "hellaswag": ("completion_acc_norm", "completion_acc_norm_stderr"),
}

# ---------------------------------------------------------------------------------------
# Numbers.


def read_metrics(path) -> dict[str, dict[str, np.ndarray]]:
    """rows[kind][key], one array per column, NaN where a row has no such number or one outside LEAST and MOST.

    A last line that was cut off is left out; anything else malformed is a UserError with file and line.
    """
    columns = {kind: {key: [] for key in ("step", "tokens", "seconds", *keys)} for kind, keys in KEYS.items()}
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                kind = columns.get(row["kind"], {})
                values = [np.nan if row.get(key) is None else float(row[key]) for key in kind]
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                if line.endswith(b"\n"):
                    raise UserError(f"{path}, line {number}: not a row of metrics ({error!r})") from error
                break
            for column, value in zip(kind.values(), values):
                column.append(value)
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
    """All rows, or about POINTS of many, first and last among them: half of these lie evenly, and half lie the closer
    together the earlier they are, so that a curve keeps its early bend."""
    n = len(columns[0])
    if n <= POINTS:
        return columns
    even, early = np.linspace(0, n - 1, POINTS // 2), np.geomspace(1, n, POINTS // 2) - 1
    rows = np.unique(np.concatenate([even, early]).round().astype(int))
    return [column[rows] for column in columns]


# ---------------------------------------------------------------------------------------
# Arms. An arm is a dict: name, color, dash, tokenizers, and rows[kind][key] of shape (runs, rows). A run outside of a
# comparison is an arm of one run.


def arm_folder(name) -> str:
    """The directory of an arm's runs, below that of its comparison."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def arms_in(comparison) -> dict[str, str]:
    """{directory: name} of the arms in a comparison's folder, in the order of their colours."""
    return {arm_folder(name): name for name in read_json(Path(comparison) / "comparison.json").get("arms", {})}


def styles():
    """Dash and colour of the first arm, of the second, and so on."""
    return itertools.cycle({"dash": dash, "color": color} for dash, color in itertools.product(DASHES, COLORS))


def find_arms(paths) -> list[dict]:
    """The arms of these runs (directories or metrics.jsonl files). UserError where a file is missing or malformed."""
    found, known = {}, {}  # (where, name) -> metrics files; the arms that have a colour, in order
    for path in paths:
        name, file = find_metrics(path)
        where, run_dir = str(path), file.resolve().parent
        arm_dir, comparison = run_dir.parent, run_dir.parent.parent
        if run_dir.name.startswith("seed_") and (comparison / "comparison.json").is_file():
            where, names = comparison, arms_in(comparison)
            name = names.get(arm_dir.name, arm_dir.name)
            known |= {(where, other): None for other in names.values()}
        found.setdefault((where, name), []).append(file)
    names = [name for _, name in found]
    arms = []
    for key, style in zip(known | found, styles()):
        if key in found:
            where, name = key
            label = name if names.count(name) == 1 else f"{where}: {name}" if key in known else where
            if key in known and len(found[key]) == 1:
                label += f", {found[key][0].resolve().parent.name}"
            tokenizers = {tokenizer_of(file) for file in found[key]} - {None}
            rows = aligned([read_metrics(file) for file in found[key]])
            arms.append({"name": label, "tokenizers": tokenizers, **style, **rows})
    return arms


def tokenizer_of(metrics) -> str | None:
    """The fingerprint that the run.json beside metrics.jsonl has of the tokenizer."""
    file = metrics.with_name("run.json")
    return (read_json(file).get("identity") or {}).get("tokenizer") if file.is_file() else None


def aligned(runs) -> dict:
    """rows[kind][key], (runs, rows): of several runs the steps that all of them have. A run that has no row of a kind
    yet is left out of that kind."""
    rows = {}
    for kind in KEYS:
        some = [r[kind] for r in runs if len(r[kind]["step"])] or [runs[0][kind]]
        chosen = [np.arange(len(some[0]["step"]))]
        if len(some) > 1:
            steps, firsts = zip(*(np.unique(r["step"], return_index=True) for r in some))
            common = functools.reduce(np.intersect1d, steps)
            chosen = [first[np.isin(step, common)] for step, first in zip(steps, firsts)]
        rows[kind] = {key: np.stack([r[key][i] for r, i in zip(some, chosen)]) for key in some[0]}
    return rows


# ---------------------------------------------------------------------------------------
# Curves of one arm, drawn into one pair of axes. x and y are (runs, rows); `noisy` and `marked` take (rows,) as well.


def number(value, _=None) -> str:
    """12K, 3.5M, 10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def plain(ax, r, x, y):
    """A curve without noise, of several runs their mean."""
    ax.plot(*thin(x.mean(0), y.mean(0)), color=r["color"], linestyle=r["dash"], linewidth=1.4)


def noisy(ax, r, x, y):
    """A curve with a value at every step. One run: light as it is, strong as its running mean. Several: the running
    means, as a band and their mean."""
    x, y = np.atleast_2d(x), np.atleast_2d(y)
    if len(y) == 1:
        ax.plot(*thin(x[0], y[0]), color=r["color"], linewidth=0.6, alpha=0.3)
    y = np.stack([smooth(row) for row in y])
    band(ax, r, x, y)
    plain(ax, r, x, y)


def marked(ax, r, x, y, line=None):
    """A curve with a value now and then, of several runs their mean: a circle at each, or at every k-th of many;
    `line` "none": no curve."""
    x, y = np.atleast_2d(x), np.atleast_2d(y)
    if line != "none":
        band(ax, r, x, y)
    x, y = thin(x.mean(0), y.mean(0))
    every = max(1, len(x) // MARKERS)
    ax.plot(x, y, color=r["color"], linestyle=line or r["dash"], linewidth=1.2, markevery=every, **CIRCLE)


def band(ax, r, x, y):
    """A band from the least to the greatest of several runs; nothing for one."""
    if len(y) > 1:
        x, low, high = thin(x.mean(0), y.min(0), y.max(0))
        ax.fill_between(x, low, high, color=r["color"], alpha=0.2, linewidth=0)
        for edge in (low, high):  # `frame` sees lines
            ax.plot(x, edge, color=r["color"], linestyle="-", linewidth=0.5, alpha=0.4)


# ---------------------------------------------------------------------------------------
# Panels. These functions complete one, after the curves of all arms are drawn.


def frame(ax, *_):
    """Limits that show what comes after the first fall, which is alike in all runs and would flatten the rest."""
    curves = [line.get_data() for line in ax.lines if len(line.get_xdata())]
    late = np.concatenate([y[x >= FALL * x[-1]] for x, y in curves])
    late = late[np.isfinite(late)]
    if len(late) and late.min() < late.max():
        ax.set_ylim(late.min(), late.max())
        low, high = ax.transData.inverted().transform(ax.transAxes.transform([(0, -0.05), (0, 1.05)]))[:, 1]
        ax.set_ylim(low, high)  # 5% of air, on a logarithmic axis too


def finish_loss(ax, arms, x):
    for r in arms:
        marked(ax, r, r["val"][x], r["val"]["loss"], line="none")
    frame(ax)


def finish_perplexity(ax, arms, x):
    ax.set_yscale("log")
    frame(ax)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5) if high < 50 * low else (1,)))  # else they crowd
    ax.yaxis.set_major_formatter(number)
    ax.yaxis.set_minor_formatter(NullFormatter())


def finish_hellaswag(ax, arms, x):
    for r in arms:
        where, value, error = (r["hellaswag"][key] for key in (x, *KEYS["hellaswag"]))
        if len(value) == 1:
            bars = {"ecolor": r["color"], "elinewidth": 1, "alpha": 0.6, "zorder": 1.5}
            ax.errorbar(*thin(where[0], value[0], error[0]), fmt="none", **bars)
    references = [  # (value, name, where to write it: chance at the end, where curves have left it)
        (GPT2_124M / 100, f"GPT-2 124M, completion acc_norm {GPT2_124M}", "left", 0.01),
        (CHANCE / 100, f"chance {CHANCE:g}", "right", 0.99),
    ]
    for value, name, side, at in references:
        ax.axhline(value, color=GREY, linewidth=1, linestyle="--")
        ax.annotate(name, (at, value), (0, 3), ("axes fraction", "data"), "offset points", ha=side, color=GREY, size=9)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    ax.margins(y=0.1)


def finish_lr(ax, arms, x):
    ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    ax.set_ylim(bottom=0)


def finish_speed(ax, arms, x):
    ax.yaxis.set_major_formatter(number)
    ax.set_ylim(bottom=0)


PANELS = {  # --only -> label; kind and column of the rows, else no panel; what draws a curve; what completes the panel
    "loss": ("loss (nats per token)", "train", "loss", noisy, finish_loss),
    "perplexity": ("validation perplexity", "val", "perplexity", marked, finish_perplexity),
    "bits": ("validation bits per byte", "val", "bits_per_byte", marked, frame),
    "hellaswag": ("HellaSwag acc_norm ± s.e. (%)", "hellaswag", "completion_acc_norm", marked, finish_hellaswag),
    "lr": ("learning rate", "train", "lr", plain, finish_lr),
    "norm": ("gradient norm before clipping", "train", "grad_norm", noisy, frame),
    "speed": ("tokens per second", "train", "tokens_per_second", noisy, finish_speed),
}

# ---------------------------------------------------------------------------------------
# The picture.


def make_figure(arms, x, only=PANELS) -> Figure:
    """The first panel over the whole width, the others in rows below it."""
    wanted = {name: PANELS[name] for name in PANELS if name in only}
    names = [name for name, (_, kind, key, *_) in wanted.items() if any(np.isfinite(r[kind][key]).any() for r in arms)]
    if not names:
        raise UserError(f"{', '.join(r['name'] for r in arms)}: no metrics to draw yet")
    first, *others = names
    half = len(others) // 2 if len(others) > 3 else len(others)
    rows = [row for row in ([first], others[:half], others[half:]) if row]
    fig = Figure(figsize=(WIDTH, 1.2 + 2.7 * len(rows) + 0.1 * len(arms)), dpi=DPI, layout="constrained")
    mosaic = [np.repeat(row, 6 // len(row)).tolist() for row in rows]  # six columns
    axes = fig.subplot_mosaic(mosaic, height_ratios=[1.4] + [1] * (len(rows) - 1))
    end, x_label = axis_of(arms, x)
    tokenizers = set().union(*(r["tokenizers"] for r in arms))
    for name, ax in axes.items():
        label, kind, key, draw, finish = PANELS[name]
        for r in arms:
            draw(ax, r, r[kind][AXES[x]], r[kind][key])
        finish(ax, arms, AXES[x])
        if name in ("loss", "perplexity") and len(tokenizers) > 1:  # numbers per token, and not the same tokens
            ax.set_title("vocabularies differ: not comparable", fontsize=9, loc="left", color="#B00000")
        ax.set_ylabel(label, size=9)
        ax.set_xlim(-0.02 * end, 1.02 * end)
        ax.xaxis.set_major_formatter(number)
        tidy(ax)
    fig.align_ylabels()
    fig.supxlabel(x_label, fontsize="medium")
    legend(fig, arms, mark_epochs(fig.axes, arms, AXES[x]))
    return fig


def tidy(ax):
    """A light grid behind the curves, and no frame."""
    ax.grid(color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def mark_epochs(axes, arms, x) -> str | None:
    """A thin vertical line where an epoch ends, grey, or in the colour of the run where runs differ in it; every k-th
    of many. Returns what the legend says of them."""
    columns = [[r["train"][key].mean(0) for key in ("epoch", x)] for r in arms]
    columns = [(epoch[seen], at[seen]) for epoch, at in columns for seen in [np.isfinite(epoch + at)]]
    counts = [math.ceil(epoch.max(initial=1)) - 1 for epoch, _ in columns]  # the end of a run is no border
    every = math.ceil(max(1, *counts) / BORDERS)
    lines = {}  # where, the color
    for r, count, (epoch, at) in zip(arms, counts, columns):
        numbers = float(every) * np.arange(1, count // every + 1)  # float: a damaged row has any epoch
        lines.setdefault(tuple(np.interp(numbers, epoch, at)) if count else (), r["color"])
    for ax, (ends, color) in itertools.product(axes, lines.items()):
        for end in ends:
            ax.axvline(end, color=GREY if len(lines) == 1 else color, linewidth=0.8, linestyle=":", zorder=0.5)
    return ("end of an epoch" + (f", one in {every}" if every > 1 else "")) if any(lines) else None


def axis_of(arms, x) -> tuple[float, str]:
    """(end of the horizontal axis, its label); seconds are turned into minutes, hours or days where they are many."""
    columns = [r[kind][AXES[x]] for r in arms for kind in KEYS]
    end = max((np.nanmax(column) for column in columns if np.isfinite(column).any()), default=0) or 1
    if x != "seconds":
        return end, {"tokens": "training tokens", "steps": "optimizer step"}[x]
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, size in units.items() if end > 2 * size), "seconds")
    for column in columns:
        column /= units[unit]
    return end / units[unit], f"training time ({unit})"


def legend(fig, arms, borders=None):
    """A legend above the panels, where it covers no curve: an entry per arm, then what light, strong, a circle and a
    vertical line mean."""
    seeds = [max(len(r[kind]["step"]) for kind in KEYS) for r in arms]
    entries = []
    for r, n in zip(arms, seeds):
        name = r["name"].replace("$", r"\$") + (f" ({n} seeds)" if n > 1 else "")  # a bare dollar begins a formula
        entries.append(Line2D([], [], color=r["color"], linestyle=r["dash"], linewidth=2, label=name))
    grey = functools.partial(Line2D, [], [], color=GREY)
    if min(seeds) == 1:
        entries.append(grey(linewidth=1.4, label="training: each step light, running mean strong"))
    if max(seeds) > 1:
        entries.append(grey(linewidth=1.4, label="training: running mean; band: range of seeds"))
    entries.append(grey(linestyle="none", label="validation", **CIRCLE))
    if borders:
        entries.append(grey(linewidth=0.7, linestyle=":", label=borders))
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
    """Draws runs (directories or metrics.jsonl files) into one picture over tokens, steps or seconds, all panels there
    are numbers for or `only` some; returns its path. Its format is what its name ends in: FORMATS.

    Raises UserError where a file is missing or malformed, or the picture cannot be written.
    """
    if Path(output).suffix.lower() not in FORMATS:
        raise UserError(f"{output}: a picture's name ends in {', '.join(FORMATS)}")
    fig = make_figure(find_arms(runs), x, only)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_figure(fig, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    return Path(output)


def plot_comparison(arms, folder):
    """comparison.png in a comparison's folder: validation curves, a line and a band over the seeds per arm, and the
    paired differences.

    arms: dicts with "arm" (the name), "measure", "curve" (tokens, mean, least, greatest) and, for all but the base,
    "difference" (mean, low and high end of its interval, both None for one seed)."""
    fig = Figure(figsize=(WIDTH, 4.2 + 0.2 * len(arms)), dpi=DPI, layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    unit = {"loss": "nats per token", "bits_per_byte": "bits per byte"}[arms[0]["measure"]]
    style = dict(zip(arms_in(folder).values(), styles()))
    for row in arms:
        tokens, mean, *ends = map(np.array, row["curve"])
        band(left, style[row["arm"]], tokens[None], np.stack(ends))
        marked(left, style[row["arm"]], tokens, mean)
        left.lines[-1].set_label(row["arm"].replace("$", r"\$"))
    frame(left)
    left.set_xlabel("training tokens")
    left.set_ylabel(f"validation loss ({unit}): mean, and range of seeds")
    left.xaxis.set_major_formatter(number)
    left.legend(frameon=False, fontsize=9)
    compared = [row for row in arms if "difference" in row]
    for height, row in enumerate(reversed(compared)):
        d, color = row["difference"], style[row["arm"]]["color"]
        if d["low"] is not None:
            right.plot([d["low"], d["high"]], [height, height], color=color, linewidth=2)
        right.plot(d["mean"], height, "o", color=color)
    right.axvline(0, color=GREY, linewidth=1, linestyle="--")
    right.set_yticks(range(len(compared)), [row["arm"].replace("$", r"\$") for row in reversed(compared)])
    right.set_ylim(-0.7, len(compared) - 0.3)
    right.set_xlabel(f"difference to {arms[0]['arm']} ({unit})\n95% interval; less is better".replace("$", r"\$"))
    right.xaxis.set_major_locator(MaxNLocator(5))
    tidy(left)
    tidy(right)
    write_figure(fig, Path(folder) / "comparison.png")


def plot_lengths(splits, ends, output):
    """A histogram of documents' lengths into the PNG `output`. `splits` has, by name, the numbers of documents by
    the lower end of their bin, in tokens and as text (JSON's keys); `ends` are the lower ends of all bins, in order."""
    used = [i for i, end in enumerate(ends) if any(counts.get(str(end)) for counts in splits.values())]
    edges = [*ends, 2 * ends[-1]][used[0] : used[-1] + 2]
    fig = Figure(figsize=(WIDTH, 4), dpi=DPI, layout="constrained")
    ax = fig.add_subplot()
    for (name, counts), color in zip(splits.items(), COLORS):
        total = max(1, sum(counts.values()))
        share = [100 * counts.get(str(edge), 0) / total for edge in edges[:-1]]
        ax.stairs(share, edges, color=color, linewidth=1.4, label=f"{name}: {total:,} documents")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(number)
    ax.set_xlabel("tokens in a document, its marker included")
    ax.set_ylabel("documents (%)")
    ax.legend(frameon=False)
    tidy(ax)
    write_figure(fig, output)


def write_figure(fig, output):
    """Writes a figure in the format that the name ends in."""
    picture = io.BytesIO()
    fig.savefig(picture, format=Path(output).suffix[1:].lower())
    write_whole(output, picture.getvalue())


def newest_run() -> Path:
    found = sorted(Path("checkpoints").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no run under checkpoints/; train one (python train.py) or name a run's directory")
    return found[-1].parent


@dataclass(frozen=True)
class PlotConfig:
    """Which runs are drawn, and over what."""

    runs: tuple[str, ...] = flag((), "directory or metrics.jsonl; default: the newest run", unit="run", positional=True)
    output: str | None = flag(None, ".png, .svg or .pdf; default: curves.png beside the first metrics", unit="file")
    x: str = flag("tokens", "horizontal axis", unit="name", choices=tuple(AXES))
    only: tuple[str, ...] = flag(tuple(PANELS), "panels", unit="panel", choices=tuple(PANELS))


def main(argv=None):
    args = parse(PlotConfig, argv, __doc__)
    runs = args.runs or [newest_run()]
    output = args.output or find_metrics(runs[0])[1].with_name("curves.png")
    print(plot(runs, output, args.x, args.only))


if __name__ == "__main__":
    sys.exit(run(main))
