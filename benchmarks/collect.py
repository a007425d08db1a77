"""Keeps what a finished run showed: python benchmarks/collect.py checkpoints/RUN benchmarks/results/RUN

Copies run.json and curves.png, and metrics.jsonl with every tenth training row (all others whole).
"""

import json
import shutil
import sys
from pathlib import Path

EVERY = 10


def main(run, destination):
    run, destination = Path(run), Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "curves.png"):
        shutil.copyfile(run / name, destination / name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(row["step"] for row in rows)
    kept = [row for row in rows if row["kind"] != "train" or row["step"] % EVERY == 0 or row["step"] in (1, last)]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    (destination / "metrics.jsonl").write_text(text, encoding="utf-8")
    print(f"{destination}: {len(kept)} of {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
