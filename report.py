"""The numbers of a comparison: from the metrics of its runs to a table with error bars. compare.py makes the runs.

Runs of one seed see the same data in the same order and begin with the same weights, in every arm. So the arms are
compared in pairs: the difference to the base is taken for each seed, and Student's t says how far the mean of these
differences may be from the true one. What a seed does to all arms alike cancels in the difference.
"""

import json
import math
import statistics
from pathlib import Path

import numpy as np
from scipy import optimize, stats

import plot_run
from support.cli import UserError
from support.files import read_json, write_whole
from support.tracking import duration, read_rows

LEVEL = 0.05  # the chance of a false "better" or "worse" in a whole table
POWER = 0.9  # the chance with which the smallest difference that is named is found
UNITS = {"loss": "nats", "bits_per_byte": "bits per byte"}

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


def smallest_shown(error, n) -> float:
    """The true difference that n seeds find with the chance POWER, where a mean difference has this standard error.

    If there is a difference, t has a noncentral distribution; the one is looked for that lies beyond the critical
    value with the chance POWER."""
    critical = stats.t.ppf(1 - LEVEL / 2, n - 1)
    return error * optimize.brentq(lambda shift: stats.nct.sf(critical, n - 1, shift) - POWER, 0, 1000)


def standard_error(values) -> float | None:
    """Of the mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# ---------------------------------------------------------------------------------------
# From runs to rows.


def outcome(run_dir) -> dict:
    """What a finished run came to: its validation curve, and the numbers beside it."""
    rows = list(read_rows(Path(run_dir) / "metrics.jsonl"))
    vals = [row for row in rows if row["kind"] == "val"]
    if not vals:
        raise UserError(f"{run_dir}: no validation in it; compare with an --eval_interval above 0")
    hellaswag = [row["completion_acc_norm"] for row in rows if row["kind"] == "hellaswag"]
    return {
        "tokens": np.array([row["tokens"] for row in vals], float),
        "loss": np.array([row["loss"] for row in vals]),
        "bits_per_byte": np.array([row.get("bits_per_byte") or math.nan for row in vals]),
        "seconds": max(row["seconds"] for row in rows),
        "tokens_per_second": median_speed(rows),
        "hellaswag": hellaswag[-1] if hellaswag else None,
        "tokenizer": read_json(Path(run_dir) / "run.json")["identity"]["tokenizer"],
    }


def median_speed(rows) -> float:
    """Tokens per second of the middle training step; NaN before the first one."""
    return statistics.median([row["tokens_per_second"] for row in rows if row["kind"] == "train"] or [math.nan])


def tokens_to_reach(run, target, measure) -> float | None:
    """Tokens after which the validation is first at `target`, on straight lines between validations; None: never."""
    t, y = run["tokens"], run[measure]
    below = np.flatnonzero(y <= target)
    if not len(below):
        return None
    i = int(below[0])
    return float(t[0] if i == 0 else t[i - 1] + (t[i] - t[i - 1]) * (y[i - 1] - target) / (y[i - 1] - y[i]))


def summarize(outcomes, failed) -> list[dict]:
    """A row per arm, the first of which is the base.

    outcomes: {arm: {seed: `outcome`}}; failed: {arm: {seed: message}}. A seed that an arm failed on is in no pair of
    it. Where budgets differ, all curves are read at the smallest; where tokenizers differ, in bits per byte."""
    everything = [run for by_seed in outcomes.values() for run in by_seed.values()]
    equal = min((run["tokens"][-1] for run in everything), default=0)
    measure = "loss" if len({run["tokenizer"] for run in everything}) <= 1 else "bits_per_byte"
    values = {
        arm: {seed: float(np.interp(equal, run["tokens"], run[measure])) for seed, run in by_seed.items()}
        for arm, by_seed in outcomes.items()
    }
    base, rows = next(iter(outcomes)), []
    for arm, by_seed in outcomes.items():
        row = {"arm": arm, "measure": measure, "tokens": equal, "values": values[arm], "failed": failed.get(arm, {})}
        if by_seed:
            row |= means(list(by_seed.values()), list(values[arm].values()), measure)
        pairs = [seed for seed in by_seed if seed in outcomes[base] and arm != base]
        if pairs:
            row["difference"] = paired([values[base][s] for s in pairs], [values[arm][s] for s in pairs])
            reached = [tokens_to_reach(by_seed[s], values[base][s], measure) for s in pairs]
            row["token_share"] = None if None in reached else statistics.fmean(reached) / equal
        rows.append(row)
    compared = [row for row in rows if row.get("difference", {}).get("p") is not None]
    for row, real in zip(compared, holm([row["difference"]["p"] for row in compared])):
        row["real"] = real
    return rows


def means(runs, values, measure) -> dict:
    """What a row of the table says of one arm, over its seeds."""
    t = runs[0]["tokens"]
    curves = np.array([np.interp(t, run["tokens"], run[measure]) for run in runs])
    scores = [run["hellaswag"] for run in runs if run["hellaswag"] is not None]
    return {
        "mean": statistics.fmean(values),
        "error": standard_error(values),
        "last_tokens": max(run["tokens"][-1] for run in runs),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "tokens_per_second": statistics.fmean(run["tokens_per_second"] for run in runs),
        "hellaswag": [statistics.fmean(scores), standard_error(scores)] if scores else None,
        "curve": [t.tolist(), curves.mean(0).tolist(), curves.min(0).tolist(), curves.max(0).tolist()],
    }


# ---------------------------------------------------------------------------------------
# From rows to words.


def verdict(row) -> str:
    """The arm's difference to the base, in words."""
    d, unit = row["difference"], UNITS[row["measure"]]
    if d["error"] is None:
        return f"{d['mean']:+.4f} {unit}; one seed gives no interval, so this may be noise"
    if d["low"] == d["high"] == 0:
        return "the same numbers with every seed"
    low, high = sorted((abs(d["low"]), abs(d["high"])))
    if not row["real"]:
        return f"no difference found; one of more than {high:.3f} {unit} is excluded (95%, {d['seeds']} seeds)"
    word = "better" if d["mean"] < 0 else "worse"
    return (
        f"{word} by {abs(d['mean']):.3f} ± {d['error']:.3f} {unit} (95%: {low:.3f} to {high:.3f}, {d['seeds']} seeds)"
    )


def notes(rows, sweeps) -> list[str]:
    """What the table means, a line each. sweeps: {flag: [value, ...]}."""
    said = [f"{row['arm']}: {verdict(row)}" for row in rows if "difference" in row]
    said += [f"{row['arm']}: failed with seed {s}: {text}" for row in rows for s, text in row["failed"].items()]
    good = [row for row in rows if "mean" in row]
    compared = [row["difference"] for row in rows if "real" in row]
    if compared:
        tables = "1 comparison" if len(compared) == 1 else f"{len(compared)} comparisons"
        said.append(f"{tables}: a false 'better' or 'worse' somewhere in {LEVEL:.0%} of such tables (Holm's test)")
        n, error = compared[0]["seeds"], math.sqrt(statistics.fmean(d["error"] ** 2 for d in compared))
        said.append(f"{n} seeds find a difference of {smallest_shown(error, n):.3f} {POWER:.0%} of the time")
    if good and good[0]["error"] is not None:
        deviation = statistics.stdev(good[0]["values"].values())
        said.append(f"noise of {good[0]['arm']} over its seeds: standard deviation {deviation:.4f}")
    if good and good[0]["measure"] == "bits_per_byte":
        said.append("the arms' tokenizers differ: losses per token do not compare, so all is in bits per byte of text")
    if any(row["last_tokens"] > row["tokens"] for row in good):
        said.append(f"the arms' budgets differ: all are read at {rows[0]['tokens']:,.0f} tokens, amid longer schedules")
    return said + (edges(good, sweeps) if good else [])


def edges(rows, sweeps) -> list[str]:
    """A best value at the end of a sweep says that a better one may lie beyond."""
    best, said = min(rows, key=lambda row: row["mean"])["arm"].split(", "), []
    for flag, values in sweeps.items():
        try:
            ends = [min(values, key=float), max(values, key=float)]
        except ValueError:  # not numbers
            continue
        said += [f"the best value lies at the edge of the sweep: {flag}={v}" for v in ends if f"{flag}={v}" in best]
    return said


def table(rows) -> list[list[str]]:
    """Head and cells; a column that would be empty is left out."""
    measure = "bits per byte" if rows[0]["measure"] == "bits_per_byte" else "validation loss"
    head = ["arm", measure, "difference [95%]", "tokens to base's", "HellaSwag (%)", "tokens/s", "time"]
    lines = [head, *map(cells, rows)]
    keep = [i for i in range(len(head)) if any(line[i] for line in lines[1:])]
    return [[line[i] for i in keep] for line in lines]


def cells(row) -> list[str]:
    if "mean" not in row:
        return [row["arm"], "failed", "", "", "", "", ""]
    difference = share = hellaswag = ""
    if d := row.get("difference"):
        difference = f"{d['mean']:+.4f}" + ("" if d["low"] is None else f" [{d['low']:+.4f}, {d['high']:+.4f}]")
        share = "not reached" if row["token_share"] is None else f"{row['token_share']:.2f}"
    if row["hellaswag"]:
        hellaswag = with_error(*(x and 100 * x for x in row["hellaswag"]), digits=2)
    speed = f"{row['tokens_per_second']:,.0f}"
    loss = with_error(row["mean"], row["error"], digits=4)
    return [row["arm"], loss, difference, share, hellaswag, speed, duration(row["seconds"])]


def with_error(value, error, digits) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def write(folder, rows, said):
    """Prints the table; writes report.md, report.jsonl and comparison.png into `folder`."""
    lines = table(rows)
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
