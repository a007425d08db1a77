"""Keeps what a finished run showed: python benchmarks/collect.py checkpoints/RUN benchmarks/results/RUN

Copies run.json, thins metrics.jsonl to every tenth training row (all others whole), draws curves.png from the whole of
it, and writes samples.md (see write_samples.py) from the newest checkpoint.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import REQUIRED, flag, parse, run  # isort: split

from write_samples import write_samples

from plot_run import plot
from support.tracking import read_rows

EVERY = 10


@dataclass(frozen=True)
class Config:
    run: Path = flag(REQUIRED, "a run's directory", positional=True)
    destination: Path = flag(REQUIRED, "the folder for what is kept", positional=True)


def main(argv=None):
    examples = ["python benchmarks/collect.py checkpoints/RUN benchmarks/results/RUN"]
    args = parse(Config, argv, "Keeps what a finished run showed.", examples)
    args.destination.mkdir(parents=True, exist_ok=True)
    plot([args.run], args.destination / "curves.png")
    shutil.copyfile(args.run / "run.json", args.destination / "run.json")
    rows = list(read_rows(args.run / "metrics.jsonl"))
    last = max(row["step"] for row in rows)
    kept = [row for row in rows if row["kind"] != "train" or row["step"] % EVERY == 0 or row["step"] in (1, last)]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    (args.destination / "metrics.jsonl").write_text(text, encoding="utf-8")
    write_samples(args.run, args.destination / "samples.md")
    print(f"{args.destination}: {len(kept)} of {len(rows)} rows, the run's configuration, its curves and its samples")


if __name__ == "__main__":
    sys.exit(run(main))
