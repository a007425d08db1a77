"""Keeps what a finished run or comparison showed, in small files.

    python benchmarks/collect.py checkpoints/RUN benchmarks/results/RUN
    python benchmarks/collect.py comparisons/NAME benchmarks/results/comparisons/NAME

Of a run: run.json, metrics.jsonl thinned to the first twenty and every tenth training row (all others whole),
curves.png drawn from the whole of it, and samples.md (see write_samples.py) from the newest checkpoint. Of a
comparison: comparison.json, and of each finished run run.json and metrics.jsonl, thinned to every hundredth training
row; and the report of these files, as `python report.py benchmarks/results/comparisons/NAME` writes it again. Its
speeds are medians of the rows kept.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import REQUIRED, flag, parse, run  # isort: split

from PIL import Image
from write_samples import write_samples

import report
from plot_run import plot
from support.tracking import read_rows


@dataclass(frozen=True)
class Config:
    run: Path = flag(REQUIRED, "a run's directory, or a comparison's", positional=True)
    destination: Path = flag(REQUIRED, "the folder for what is kept", positional=True)


def thin(source, destination, every, first=1):
    """Copies run.json, and metrics.jsonl with the `first` training rows, where a curve bends most, and every
    so-many-th."""
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "run.json", destination / "run.json")
    rows = list(read_rows(source / "metrics.jsonl"))
    last = max(row["step"] for row in rows)
    kept = [
        r for r in rows if r["kind"] != "train" or r["step"] % every == 0 or r["step"] <= first or r["step"] == last
    ]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    (destination / "metrics.jsonl").write_text(text, encoding="utf-8")
    print(f"{destination}: {len(kept)} of {len(rows)} rows, the run's configuration")


def keep_comparison(source, destination):
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "comparison.json", destination / "comparison.json")
    for finished in sorted(source.glob(f"*/seed_*/{report.FINISHED}")):
        kept = destination / finished.parent.relative_to(source)
        thin(finished.parent, kept, every=100)
        shutil.copyfile(finished, kept / report.FINISHED)
    report.main([str(destination)])
    picture = destination / "comparison.png"
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)  # a third of the bytes


def main(argv=None):
    args = parse(Config, argv, __doc__)
    if (args.run / "comparison.json").exists():
        return keep_comparison(args.run, args.destination)
    thin(args.run, args.destination, every=10, first=20)
    plot([args.run], args.destination / "curves.png")
    write_samples(args.run, args.destination / "samples.md")
    print(f"{args.destination}: its curves and its samples")


if __name__ == "__main__":
    sys.exit(run(main))
