"""The numbers of a comparison: from the metrics of its runs to a table with error bars. compare.py makes the runs.

    python report.py comparisons/NAME      # the table again, from the runs of it that are finished

Runs of one seed see the same data in the same order and begin with the same weights, unless the arm changes them. So
the arms are compared in pairs: the difference to the base is taken for each seed, and Student's t says how far the mean
of these differences may be from the true one. What a seed does to all arms alike cancels in the difference.
"""

import itertools
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from support import cli  # isort: split

import numpy as np
from scipy import optimize, stats

import plot_run
from support.cli import UserError, flag
from support.files import write_whole
from support.tracking import duration, read_rows

LEVEL = 0.05  # the chance of a false "better" or "worse" in a whole table
POWER = 0.9  # the chance with which the smallest difference that is named is found
UNITS = {"loss": "nats", "bits_per_byte": "bits per byte"}
FINISHED = "finished.json"  # in the directory of a run that has ended well

# ---------------------------------------------------------------------------------------
# Statistics.


def paired(base, arm) -> dict:
    """The difference arm - base of two lists with one value per seed, the same seeds in the same order.

    Its mean, the mean's standard error, 95% interval and p (Student's paired t-test, n - 1 degrees of freedom).
    One seed has a mean only; the rest is None."""
    d = np.asarray(arm, float) - np.asarray(base, float)
    n, mean = len(d), float(d.mean())
    if n < 2:
        return {"seeds": n, "mean": mean, "error": None, "low": None, "high": None, "p": None}
    error = float(d.std(ddof=1) / math.sqrt(n))
    reach = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return {"seeds": n, "mean": mean, "error": error, "low": mean - reach, "high": mean + reach, "p": p}


def holm(p_values) -> list[bool]:
    """Which of several differences are more than noise, with the chance LEVEL of even one false answer (Holm 1979).

    The smallest p is held against LEVEL / k, the next against LEVEL / (k - 1), and so on until one fails."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    real = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > LEVEL / (len(p_values) - rank):
            break
        real[i] = True
    return real


def smallest_shown(error, n, comparisons=1) -> float:
    """The true difference that n seeds find with the chance POWER, where a mean difference has this standard error and
    is the only one among several comparisons, so that Holm's test holds it against LEVEL / comparisons.

    If there is a difference, t has a noncentral distribution; this looks for the difference with which t exceeds the
    critical value with the chance POWER."""
    critical = stats.t.ppf(1 - LEVEL / comparisons / 2, n - 1)
    most = 2 * critical + 10  # enough for two seeds, which need 1.65 * critical
    return error * optimize.brentq(lambda shift: stats.nct.sf(critical, n - 1, shift) - POWER, 0, most)


def standard_error(values) -> float | None:
    """The standard error of the mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# ---------------------------------------------------------------------------------------
# From runs to rows.


def outcome(run_dir) -> dict:
    """What a finished run came to: its validation curve, and the numbers beside it."""
    metrics = Path(run_dir) / "metrics.jsonl"
    rows = list(read_rows(metrics))
    vals = [row for row in rows if row["kind"] == "val"]
    hellaswag = [row["completion_acc_norm"] for row in rows if row["kind"] == "hellaswag"]
    return {
        "tokens": [row["tokens"] for row in vals],
        "loss": [row["loss"] for row in vals],
        "bits_per_byte": [row.get("bits_per_byte") for row in vals],
        "text": text_size(vals[-1]),
        "seconds": max(row["seconds"] for row in rows),
        "tokens_per_second": median_speed(rows),
        "hellaswag": hellaswag[-1] if hellaswag else None,
        "tokenizer": plot_run.tokenizer_of(metrics),
    }


def text_size(val) -> tuple[int, str]:
    """How much text a validation reads: its bytes, or its tokens where their bytes are unknown."""
    if val.get("bits_per_byte"):
        return round(val["loss"] * val["targets"] / math.log(2) / val["bits_per_byte"]), "bytes"
    return val.get("targets", 0), "tokens"


def median_speed(rows) -> float:
    """Tokens per second of the middle training step; NaN before the first one."""
    return statistics.median([row["tokens_per_second"] for row in rows if row["kind"] == "train"] or [math.nan])


def measure_of(outcomes) -> str:
    """In what all runs compare: "loss", or "bits_per_byte" where their tokens differ. UserError where one has none."""
    if len({run["tokenizer"] for run in outcomes}) <= 1:
        return "loss"
    if any(None in run["bits_per_byte"] for run in outcomes):
        raise UserError("the arms' tokenizers differ, and one of them gives no bits per byte: nothing compares")
    return "bits_per_byte"


def tokens_to_reach(outcome, target, measure) -> float | None:
    """Tokens after which the validation is first at `target`, on straight lines between validations; None: never."""
    t, y = outcome["tokens"], outcome[measure]
    i = next((i for i, value in enumerate(y) if value <= target), None)
    if i is None:
        return None
    return float(t[0] if i == 0 else t[i - 1] + (t[i] - t[i - 1]) * (y[i - 1] - target) / (y[i - 1] - y[i]))


def summarize(outcomes, failed) -> list[dict]:
    """A row per arm, the first of which is the base. All runs are read at their last validation.

    outcomes: {arm: {seed: `outcome`}}; failed: {arm: {seed: message}}. A seed that an arm has not finished is in no
    pair of it."""
    measure = measure_of([run for by_seed in outcomes.values() for run in by_seed.values()])
    values = {arm: {seed: run[measure][-1] for seed, run in by_seed.items()} for arm, by_seed in outcomes.items()}
    base, rows = next(iter(outcomes)), []
    for arm, by_seed in outcomes.items():
        row = {"arm": arm, "measure": measure, "values": values[arm], "failed": failed.get(arm, {})}
        if by_seed:
            row |= means(list(by_seed.values()), list(values[arm].values()), measure)
        pairs = [seed for seed in by_seed if seed in values[base] and arm != base]
        if pairs:
            bases = [outcomes[base][s] for s in pairs]
            row["difference"] = paired([values[base][s] for s in pairs], [values[arm][s] for s in pairs])
            reached = [tokens_to_reach(by_seed[s], values[base][s], measure) for s in pairs]
            # of the base all tokens, or fewer if it overfits: those after which it first has its final loss
            own = [tokens_to_reach(run, run[measure][-1], measure) or run["tokens"][-1] for run in bases]
            shares = [t / of for t, of in zip(reached, own) if t is not None]
            row["reached"] = len(shares)  # seeds with which the arm comes to the base's final loss
            row["token_share"] = paired([0.0] * len(shares), shares) if len(shares) == len(pairs) else None
        rows.append(row)
    compared = [row for row in rows if row.get("difference", {}).get("p") is not None]
    for row, real in zip(compared, holm([row["difference"]["p"] for row in compared])):
        row["real"] = real
    return rows


def means(runs, values, measure) -> dict:
    """What a row says of one arm, over its seeds."""
    t = runs[0]["tokens"]
    curves = np.array([np.interp(t, run["tokens"], run[measure]) for run in runs])
    scores = [run["hellaswag"] for run in runs if run["hellaswag"] is not None]
    return {
        "mean": statistics.fmean(values),
        "error": standard_error(values),
        "tokens": max(run["tokens"][-1] for run in runs),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "tokens_per_second": statistics.fmean(run["tokens_per_second"] for run in runs),
        "hellaswag": [statistics.fmean(scores), standard_error(scores)] if scores else None,
        "curve": [list(t), curves.mean(0).tolist(), curves.min(0).tolist(), curves.max(0).tolist()],
    }


# ---------------------------------------------------------------------------------------
# From rows to words.


def verdict(row, comparisons=1) -> str:
    """The arm's difference to the base, in words, as one of so many comparisons."""
    d, unit = row["difference"], UNITS[row["measure"]]
    if d["error"] is None:
        return f"{d['mean']:+.4f} {unit}; one seed gives no interval, so this may be noise"
    if d["low"] == d["high"] == 0:
        return "the same numbers with every seed"
    low, high = sorted((abs(d["low"]), abs(d["high"])))
    word = "better" if d["mean"] < 0 else "worse"
    size = f"{abs(d['mean']):.3f} ± {d['error']:.3f} {unit} (95%: {low:.3f} to {high:.3f}, {d['seeds']} seeds)"
    if row["real"]:
        return f"{word} by {size}"
    if d["low"] * d["high"] > 0:
        return f"too uncertain among {comparisons} comparisons; alone it would be {word} by {size}"
    return f"no difference found; one of more than {high:.3f} {unit} is excluded (95%, {d['seeds']} seeds)"


def notes(rows) -> list[str]:
    """What the table means, a line each."""
    compared = [row["difference"] for row in rows if "real" in row]
    said = [f"{row['arm']}: {verdict(row, len(compared))}" for row in rows if "difference" in row]
    said += [f"{row['arm']}: failed with seed {s}: {text}" for row in rows for s, text in row["failed"].items()]
    good = [row for row in rows if "mean" in row]
    if compared:
        tables = "1 comparison" if len(compared) == 1 else f"{len(compared)} comparisons"
        said.append(f"{tables}: a false 'better' or 'worse' somewhere in {LEVEL:.0%} of such tables (Holm's test)")
        n = max(d["seeds"] for d in compared)
        error = statistics.median(d["error"] for d in compared if d["seeds"] == n)  # one wild arm speaks for itself
        if error:  # arms that are the same run scatter not at all
            least = smallest_shown(error, n, len(compared))
            unit = UNITS[good[0]["measure"]]
            said.append(f"{n} seeds find a difference of {least:.3f} {unit} in {POWER:.0%} of such tables")
    if good and good[0]["error"] is not None:
        deviation = statistics.stdev(good[0]["values"].values())
        said.append(f"noise of {good[0]['arm']} over its seeds: standard deviation {deviation:.4f}")
    if good and good[0]["measure"] == "bits_per_byte":
        said.append("the arms' tokenizers differ: losses per token do not compare, bits per byte of text do")
    if len({row["tokens"] for row in good}) > 1:
        said.append("the arms' budgets differ: each is read at its own end")
    return said + edges(good)


def edges(rows) -> list[str]:
    """A best value at the end of a sweep says that a better one may lie beyond. The arms of a sweep are named
    "flag=value, flag=value"."""
    settings = [dict(part.split("=", 1) for part in row["arm"].split(", ") if "=" in part) for row in rows]
    _, best = min(zip(rows, settings), key=lambda pair: pair[0]["mean"], default=(None, {}))
    said = []
    for name, value in best.items():
        try:
            values = {float(other[name]) for other in settings if name in other}
        except ValueError:  # not numbers
            continue
        if len(values) > 1 and float(value) in (min(values), max(values)):
            said.append(f"the best value lies at the edge of the sweep: {name}={value}")
    return said


def table(rows) -> list[list[str]]:
    """Head and cells; a column that says nothing is left out."""
    budgets = len({row["tokens"] for row in rows if "mean" in row}) > 1
    lines = [cells(row, budgets) for row in rows]
    head = [name for name in dict.fromkeys(itertools.chain(*lines)) if any(line.get(name) for line in lines)]
    return [head, *([line.get(name, "") for name in head] for line in lines)]


def cells(row, budgets) -> dict[str, str]:
    """{column: text} of one arm; budgets: whether the arms' tokens differ."""
    measure = {"loss": "validation loss", "bits_per_byte": "bits per byte"}[row["measure"]]
    if "mean" not in row:
        return {"arm": row["arm"], measure: "no finished run"}
    difference = share = hellaswag = ""
    if d := row.get("difference"):
        difference = f"{d['mean']:+.4f}" + ("" if d["low"] is None else f" [{d['low']:+.4f}, {d['high']:+.4f}]")
        share = f"reached by {row['reached']} of {d['seeds']}" if row["reached"] else "not reached"
        if t := row["token_share"]:
            share = f"{t['mean']:.2f}" + ("" if t["low"] is None else f" [{t['low']:.2f}, {t['high']:.2f}]")
    if row["hellaswag"]:
        mean, error = row["hellaswag"]
        hellaswag = with_error(100 * mean, None if error is None else 100 * error, digits=2)
    return {
        "arm": row["arm"],
        measure: with_error(row["mean"], row["error"], digits=4),
        "difference [95%]": difference,
        "tokens to base's": share,
        "HellaSwag (%)": hellaswag,
        "tokens": f"{row['tokens']:,}" if budgets else "",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "time": duration(row["seconds"]),
    }


def with_error(value, error, digits) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


# ---------------------------------------------------------------------------------------


def write(folder, runs, failed):
    """Prints the table; writes report.md, report.jsonl and comparison.png into the comparison's folder.

    runs: {arm: {seed: directory of a finished run}}, the base first; failed: {arm: {seed: message}}."""
    outcomes = {arm: {seed: outcome(path) for seed, path in by_seed.items()} for arm, by_seed in runs.items()}
    rows = summarize(outcomes, failed)
    lines, said = table(rows), notes(rows)
    texts = sorted({run["text"] for by_seed in outcomes.values() for run in by_seed.values()})
    if len(texts) > 1:
        sizes = ", ".join(f"{n:,} {unit}" for n, unit in texts)
        said.insert(0, f"the arms validate on different amounts of text ({sizes}): if it is not nearly all the same, "
                    "their losses do not compare")  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print("\n" + "\n".join(said), flush=True)
    drawn = [row for row in rows if "mean" in row]
    if drawn:
        plot_run.plot_comparison(drawn, folder)
    markdown = [f"| {' | '.join(line)} |" for line in lines]
    markdown.insert(1, "|" + "---|" * len(lines[0]))
    picture = ["![curves and differences](comparison.png)", ""] if drawn else []
    text = "\n".join([f"# {folder.name}", "", *picture, *markdown, "", *(f"- {line}" for line in said), ""])
    write_whole(folder / "report.md", text.encode())
    write_whole(folder / "report.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


@dataclass(frozen=True)
class ReportConfig:
    """Which comparison's report is written again."""

    folder: Path = flag(cli.REQUIRED, "a comparison's folder", positional=True)


def main(argv=None):
    folder = cli.parse(ReportConfig, argv, __doc__).folder
    found = {name: (folder / arm).glob(f"seed_*/{FINISHED}") for arm, name in plot_run.arms_in(folder).items()}
    runs = {name: dict(sorted((int(f.parent.name[5:]), f.parent) for f in files)) for name, files in found.items()}
    if not any(runs.values()):
        raise UserError(f"{folder}: no finished run in it")
    write(folder, runs, {})


if __name__ == "__main__":
    sys.exit(cli.run(main))
