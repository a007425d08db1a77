"""compare.py: a table that says "better" only where it is more than noise, and comparisons that survive a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import compare
import plot_run
import report
from compare import Arm, CompareConfig
from report import paired
from support.cli import UserError, run
from toy import ROOT, as_flags, eventually

# The demo's final validation loss over seeds: 3.79, 3.81, 3.83 (README), of which a pair of arms shares about a half.
SEED_NOISE, OWN_NOISE = 0.02, 0.02


def simulated(rng, truth, seeds=3, arms=1):
    """Final losses of a base and of `arms` arms whose true difference to it is `truth`: {arm: per seed}."""
    shared = rng.normal(3.8, SEED_NOISE, seeds)
    base = shared + rng.normal(0, OWN_NOISE, seeds)
    return [paired(base, shared + truth + rng.normal(0, OWN_NOISE, seeds)) for _ in range(arms)]


def test_an_arm_against_itself_is_no_difference_in_95_of_100_tables():
    """A table that calls noise "better" makes people keep changes that do nothing."""
    rng = np.random.default_rng(1)
    tables = [simulated(rng, 0.0) for _ in range(2000)]
    assert 0.94 <= np.mean([not any(report.holm([d["p"] for d in t])) for t in tables]) <= 0.96


def test_several_arms_together_are_held_to_the_same_chance():
    """Five arms at 5% each would say "better" of nothing in one table of four."""
    rng = np.random.default_rng(2)
    tables = [simulated(rng, 0.0, arms=5) for _ in range(1000)]
    assert np.mean([any(report.holm([d["p"] for d in t])) for t in tables]) <= 0.055


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_smallest_difference_named_is_found_nine_times_of_ten(seeds):
    """A table that promises to see a difference which it mostly misses."""
    rng = np.random.default_rng(seeds)
    error = OWN_NOISE * np.sqrt(2 / seeds)
    truth = report.smallest_shown(error, seeds)
    found = [report.holm([simulated(rng, -truth, seeds)[0]["p"]])[0] for _ in range(2000)]
    assert 0.88 <= np.mean(found) <= 0.92


def test_the_smallest_difference_named_is_that_of_the_whole_table():
    """Bug: with five arms beside the base the promise was that of one, and the difference was found half the time."""
    rng = np.random.default_rng(4)
    truth = report.smallest_shown(OWN_NOISE * np.sqrt(2 / 3), 3, comparisons=5)
    tables = [[simulated(rng, -truth * (arm == 0))[0]["p"] for arm in range(5)] for _ in range(1000)]
    assert 0.87 <= np.mean([report.holm(p)[0] for p in tables]) <= 0.93


def test_two_seeds_of_many_arms_have_a_smallest_difference():
    """Bug: from 48 comparisons on a traceback, after all runs."""
    assert report.smallest_shown(1.0, 2, comparisons=1) == pytest.approx(20.96, abs=0.01)
    assert report.smallest_shown(1.0, 2, comparisons=200) == pytest.approx(4188.6, rel=1e-3)


@pytest.mark.parametrize("truth", [0.0, -0.1])
def test_the_interval_covers_the_truth_in_95_of_100(truth):
    rng = np.random.default_rng(3)
    results = [simulated(rng, truth)[0] for _ in range(2000)]
    assert 0.94 <= np.mean([d["low"] <= truth <= d["high"] for d in results]) <= 0.96


def test_the_paired_test_is_scipys():
    from scipy.stats import ttest_rel

    base, arm = np.array([3.1, 3.4, 3.2, 3.3]), np.array([3.0, 3.35, 3.21, 3.1])
    ours, theirs = paired(base, arm), ttest_rel(arm, base)
    assert ours["p"] == pytest.approx(theirs.pvalue)
    assert [ours["low"], ours["high"]] == pytest.approx(list(theirs.confidence_interval()))


def test_holm_rejects_as_its_author_does():
    """Holm 1979: the i-th smallest p is held against 0.05 / (k - i); after the first that fails all fail."""
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert report.holm([0.04]) == [True] and report.holm([]) == []


def test_one_seed_gives_no_interval_and_says_so():
    d = paired([3.0], [2.9])
    assert d["low"] is None and "one seed" in report.verdict({"difference": d, "measure": "loss"})


def test_a_difference_that_only_counts_alone_is_said_to_be_undecided():
    """Bug: "no difference found" of an interval that is far from zero, and the reader drops the idea."""
    d = {"seeds": 3, "mean": 0.05, "error": 0.005, "low": 0.03, "high": 0.07, "p": 0.01}
    said = report.verdict({"difference": d, "measure": "loss", "real": False}, 5)
    assert said.startswith("too uncertain among 5 comparisons; alone it would be worse by 0.050 ± 0.005")
    assert report.verdict({"difference": d, "measure": "loss", "real": True}, 5).startswith("worse by 0.050 ± 0.005")
    d |= {"low": -0.01, "high": 0.11}
    assert "one of more than 0.110" in report.verdict({"difference": d, "measure": "loss", "real": False}, 5)


def test_an_arm_that_is_the_same_run_has_the_same_numbers():
    """Bug: "3 seeds find a difference of 0.000", from no scatter at all."""
    runs = {arm: {seed: outcome(4, 3 + seed / 10) for seed in (1, 2, 3)} for arm in ("base", "again")}
    rows = report.summarize(runs, {})
    assert rows[1]["difference"]["p"] == 1, "in Holm's test it would lower the bar for the other arms"
    said = report.notes(rows)
    assert said[0] == "again: the same numbers with every seed" and not any("seeds find" in line for line in said)


def test_one_wild_arm_does_not_set_the_smallest_difference_of_all():
    """Bug: "3 seeds find a difference of 0.240", from an arm that diverged, beside arms that differ by 0.02."""
    base = {seed: outcome(4, 3) for seed in (1, 2, 3)}
    runs = {"base": base, "wild": {seed: outcome(9, 8 + 2 * seed) for seed in base}}
    runs |= {name: {seed: outcome(4, 3 + seed / 100) for seed in base} for name in ("one", "two")}
    [said] = [line for line in report.notes(report.summarize(runs, {})) if "seeds find" in line]
    assert f"a difference of {report.smallest_shown(0.01 / 3**0.5, 3, 3):.3f} nats" in said


def test_the_seeds_and_the_errors_of_a_note_are_of_the_same_arms():
    """Bug: "2 seeds find a difference of ..." from an error of mostly three seeds, as the first arm had lost one."""
    runs = {"base": {seed: outcome(4, 3) for seed in (1, 2, 3)}}
    runs["two"] = {seed: outcome(4, 3 + seed) for seed in (1, 2)}
    runs["three"] = {seed: outcome(4, 3 + seed / 100) for seed in (1, 2, 3)}
    [said] = [line for line in report.notes(report.summarize(runs, {})) if "seeds find" in line]
    least = report.smallest_shown(0.01 / 3**0.5, 3, 2)
    assert said == f"3 seeds find a difference of {least:.3f} nats in 90% of such tables"


def config(**values):
    return CompareConfig(name="c", **values)


def test_arms_are_multiplied_by_sweeps():
    arms = compare.all_arms(config(arm=("adamw:", "muon: --optimizer muon"), sweep=("lr=1e-3,3e-3",)))
    assert [a.name for a in arms] == ["adamw, lr=1e-3", "adamw, lr=3e-3", "muon, lr=1e-3", "muon, lr=3e-3"]
    assert arms[2].flags == ("--optimizer", "muon", "--lr", "1e-3")
    assert compare.parse_arm('x: code=a.patch --sample_prompt "a b"') == Arm("x", ("--sample_prompt", "a b"), "a.patch")


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(), "needs two arms"),
        (dict(arm=("base",)), 'expected "NAME: FLAGS"'),
        (dict(arm=("a b:", "a_b:")), "must differ"),
        (dict(sweep=("lr",)), "expected FLAG=VALUE"),
        (dict(arm=("base:", "x: code= --lr 1")), "code= names nothing"),  # an unset shell variable: the base again
        (dict(arm=("rope:", "RoPE:")), "upper and lower case"),  # one folder on a Mac: a run compared with itself
        (dict(arm=("base:", "unchanged: code=x.patch")), "'unchanged': that name is kept"),  # two codes in one folder
    ],
)
def test_wrong_arms_are_refused_in_one_line(values, words):
    with pytest.raises(UserError, match=words):
        compare.all_arms(config(**values))


@pytest.mark.parametrize("text, expected", [("2", [1, 2]), ("1337,7", [1337, 7])])
def test_seeds_are_a_number_or_a_list(text, expected):
    assert compare.all_seeds(config(seeds=text)) == expected
    for wrong in ("0", "a", "1,1", ""):
        with pytest.raises(UserError, match="--seeds"):
            compare.all_seeds(config(seeds=wrong))


def test_tokens_to_a_loss_are_read_between_validations():
    run = {"tokens": [0, 100, 200], "loss": [4.0, 3.0, 2.5]}
    assert report.tokens_to_reach(run, 2.75, "loss") == 150
    assert report.tokens_to_reach(run, 2.0, "loss") is None and report.tokens_to_reach(run, 5.0, "loss") == 0


def outcome(*losses, tokens=100, tokenizer="a", bits=None):
    """Of a run that was validated at equal distances, its last loss after `tokens` tokens."""
    return {
        "tokens": list(np.linspace(0, tokens, len(losses))),
        "loss": list(losses),
        "bits_per_byte": [bits and bits * loss for loss in losses],
        "seconds": 1.0,
        "tokens_per_second": 100,
        "hellaswag": None,
        "tokenizer": tokenizer,
    }


def test_arms_of_other_budgets_are_read_at_their_own_ends():
    """Bug: a schedule that has come to its end beside one cut off in the middle, and nothing that says so."""
    runs = {"base": {1: outcome(4, 3.5, 3)}, "half": {1: outcome(4, 2.5, tokens=50)}}
    rows = report.summarize(runs, {})
    assert rows[1]["difference"]["mean"] == -0.5
    assert rows[1]["token_share"]["mean"] == pytest.approx(1 / 3), "of the base's tokens"
    head, base, half = report.table(rows)
    assert (base[head.index("tokens")], half[head.index("tokens")]) == ("100.0", "50.0")
    assert "the arms' budgets differ: each is read at its own end" in report.notes(rows)
    rows = report.summarize({"base": {1: outcome(4, 3)}, "same": {1: outcome(4, 3)}}, {})
    assert "tokens" not in report.table(rows)[0] and not any("budgets" in line for line in report.notes(rows))


def test_the_share_of_tokens_has_an_interval_and_says_with_how_many_seeds():
    """Bugs: a third of the tokens, from three seeds, without a word on how sure it is; "not reached" beside a better
    mean, because one seed of three did not come to the base's loss."""
    base = {seed: outcome(4, 3.5, 3) for seed in (1, 2, 3)}
    arm = {1: outcome(4, 3, 2), 2: outcome(4, 3.5, 2.5), 3: outcome(5, 3, 2)}
    rows = report.summarize({"base": base, "arm": arm}, {})
    low, high = stats.t.interval(0.95, 2, loc=np.mean([0.5, 0.75, 0.5]), scale=stats.sem([0.5, 0.75, 0.5]))
    column = report.table(rows)[0].index("tokens to base's")
    assert report.table(rows)[2][column] == f"0.58 [{low:.2f}, {high:.2f}]"
    rows = report.summarize({"base": base, "arm": arm | {3: outcome(5, 4, 3.5)}}, {})
    assert report.table(rows)[2][column] == "reached by 2 of 3"
    rows = report.summarize({"base": base, "arm": {seed: outcome(5, 4) for seed in base}}, {})
    assert report.table(rows)[2][column] == "not reached"


def test_a_base_that_overfits_is_held_against_its_own_first_time_at_that_loss():
    """Bug: an arm that is the base again "needs 0.22 of the tokens", because the base was that low before its end."""
    base = outcome(7, 3.2, 4)  # 3.2 in the middle, 4 at the end
    rows = report.summarize({"base": {1: base}, "again": {1: base}}, {})
    assert rows[1]["token_share"]["mean"] == 1.0


def test_other_tokenizers_compare_in_bits_per_byte():
    """Bug: "better by 0.5 nats" of an arm whose tokens are shorter."""
    runs = {"base": {1: outcome(4, 3, bits=1)}, "other": {1: outcome(4, 2.5, bits=1.3, tokenizer="b")}}
    rows = report.summarize(runs, {})
    assert rows[1]["difference"]["mean"] == pytest.approx(0.25)
    head, _, other = report.table(rows)
    assert other[head.index("bits per byte")] == "3.2500"
    assert any("losses per token do not compare" in line for line in report.notes(rows))
    with pytest.raises(UserError, match="gives no bits per byte"):
        report.summarize(runs | {"third": {1: outcome(4, 3, tokenizer="c")}}, {})


@pytest.mark.parametrize(
    "best, said",
    [
        ("lr=1e-2", []),
        ("lr=3e-2", ["lr=3e-2"]),
        ("muon, lr=1e-3, wd=0", ["lr=1e-3", "wd=0"]),
        ("muon", []),
        ("alone=5", []),
    ],
)
def test_a_best_value_at_the_edge_of_a_sweep_is_said(best, said):
    names = ["muon", "lr=1e-2", "lr=3e-2", "muon, lr=1e-3, wd=0", "x, wd=1, norm=rms", "alone=5"]
    rows = [{"arm": name, "mean": 2.0 if name == best else 3.0} for name in names]
    assert report.edges(rows) == [f"the best value lies at the edge of the sweep: {value}" for value in said]


def test_an_arm_whose_base_has_not_finished_is_in_the_table():
    rows = report.summarize({"base": {}, "idea": {1: outcome(4, 3)}}, {"base": {1: "nan"}})
    head, base, idea = report.table(rows)
    assert base == ["base", "no finished run", "", ""] and idea[:2] == ["idea", "3.0000"] and len(head) == 4


def finished_comparison(folder, **arms):
    """What compare.py leaves of finished runs; arms: {name: final losses by seed}."""
    for arm, losses in arms.items():
        for seed, loss in enumerate(losses, 1):
            run_dir = folder / arm / f"seed_{seed}"
            run_dir.mkdir(parents=True)
            val = {"kind": "val", "seconds": 1.0, "bits_per_byte": None, "targets": 64}
            rows = [val | {"step": n, "tokens": 100 * n, "loss": loss + 1 - n} for n in (0, 1)]
            rows.append({"kind": "train", "step": 1, "tokens": 100, "seconds": 1.0, "tokens_per_second": 100})
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (run_dir / "run.json").write_text(json.dumps({"identity": {"tokenizer": "a"}}))
            (run_dir / "finished.json").write_text("{}")
    (folder / "comparison.json").write_text(json.dumps({"common": [], "arms": {name: {} for name in arms}}))


def test_a_report_is_written_again_from_its_finished_runs(tmp_path, capsys):
    """Bug: a comparison that was kept without its code, and whose table nobody can check."""
    finished_comparison(tmp_path / "c", base=[3.0, 3.1, 3.2], idea=[2.9, 3.01, 3.09])
    assert run(lambda: report.main([str(tmp_path / "c")])) == 0
    said = capsys.readouterr().out
    assert "idea: better by 0.100 ± 0.006 nats" in said and "3 seeds" in said
    assert {p.name for p in (tmp_path / "c").iterdir() if p.is_file()} == {
        "comparison.json", "comparison.png", "report.jsonl", "report.md",
    }  # fmt: skip
    (tmp_path / "c" / "idea" / "seed_2" / "finished.json").unlink()
    assert run(lambda: report.main([str(tmp_path / "c")])) == 0
    assert "2 seeds" in capsys.readouterr().out, "a run that goes on is in no pair"
    assert run(lambda: report.main([str(tmp_path)])) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_arms_that_validate_on_other_texts_are_said_not_to_compare(tmp_path, capsys):
    """Bug: an arm with --data_dir validates on text of its own, and the table said "better" of it."""
    finished_comparison(tmp_path / "c", base=[3.0, 3.1], data=[2.9, 3.01])
    for n in (1, 2):
        file = tmp_path / "c" / "data" / f"seed_{n}" / "metrics.jsonl"
        file.write_text(file.read_text().replace('"targets": 64', '"targets": 32'))
    assert run(lambda: report.main([str(tmp_path / "c")])) == 0
    said = capsys.readouterr().out
    assert "the arms validate on different amounts of text (32 tokens, 64 tokens): " in said


KEPT = sorted((ROOT / "benchmarks" / "results" / "comparisons").glob("*/comparison.json"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.parent.name)
def test_a_kept_comparison_gives_the_report_beside_it(kept, tmp_path, monkeypatch, capsys):
    """Bugs: a report of other runs than those beside it; statistics that have changed since, and an old table."""
    folder = tmp_path / kept.parent.name
    shutil.copytree(kept.parent, folder)
    before = (folder / "report.md").read_text(encoding="utf-8")
    (folder / "report.md").unlink()
    monkeypatch.setattr(plot_run, "DPI", 40)
    report.main([str(folder)])
    assert (folder / "report.md").read_text(encoding="utf-8") == before
    assert '"/' not in kept.read_text(), "a path of the machine that it ran on"


def test_a_comparison_is_kept_as_a_file(tmp_path, monkeypatch, capsys):
    """Bugs: a comment, a quoted word or the `--` of a file of arguments is lost."""
    seen = []
    monkeypatch.setattr(compare, "compare", lambda c, common: seen.append((c, common)) or 0)
    text = '# why\n--name c --arm "base:"  # as it is\n--arm "a b: --lr 1e-3"\n--\n--preset demo\n'
    (tmp_path / "c.args").write_text(text)
    assert compare.main(["--dry_run", f"@{tmp_path / 'c.args'}", "--sample_prompt", "# 1"]) == 0
    [(c, common)] = seen
    assert c.arm == ("base:", "a b: --lr 1e-3") and c.dry_run
    assert common == ["--preset", "demo", "--sample_prompt", "# 1"]
    (tmp_path / "bad.args").write_text('--name "c')
    for name, words in (("bad.args", "No closing quotation"), ("none.args", "No such file")):
        assert run(lambda name=name: compare.main([f"@{tmp_path / name}"])) == 2
        said = capsys.readouterr().err
        assert name in said and words in said and said.count("\n") == 1


@pytest.fixture
def tiny(toy):
    """Flags of a run of four steps on the toy corpus, with nothing that the comparison sets itself."""
    from dataclasses import replace

    c = replace(toy, max_steps=4, eval_interval=2, sample_interval=0, save_interval=2)
    flags = as_flags(replace(c, run_name=None, checkpoint_dir="checkpoints"))
    return flags


PATCH = """--- a/model.py
+++ b/model.py
@@ -1 +1,2 @@
+CHANGED = True
 {first}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_from_command_to_report(tiny, tmp_path, capsys):
    """Flags, a patch and an arm that diverges: each in the table; again: nothing runs, the same table."""
    first = (ROOT / "model.py").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "idea.patch").write_text(PATCH.format(first=first))
    arms = ["base:", f"idea: code={tmp_path / 'idea.patch'}", "bad: --lr 1e9"]
    options = [x for arm in arms for x in ("--arm", arm)]
    command = ["--name", "c", "--dir", str(tmp_path / "cs"), "--seeds", "2", *options, "--", *tiny]
    assert compare.main(command) == 1, "one arm failed"
    said = capsys.readouterr().out
    folder = tmp_path / "cs" / "c"
    rows = {row["arm"]: row for row in map(json.loads, (folder / "report.jsonl").read_text().splitlines())}
    assert rows["idea"]["values"] == rows["base"]["values"], "the patch changes no number"
    assert "CHANGED" in (folder / "code" / "idea" / "model.py").read_text(encoding="utf-8")
    assert rows["idea"]["difference"]["seeds"] == 2
    assert "nan" in rows["bad"]["failed"]["1"] and "bad: failed with seed 1" in said
    assert (folder / "comparison.png").stat().st_size > 10_000
    before = (folder / "report.md").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("base/seed_*/*")}
    assert compare.main(command) == 1
    assert (folder / "report.md").read_text() == before
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.glob("base/seed_*/*")}, "finished runs run again"
    command[command.index("bad: --lr 1e9")] = "bad: --lr 1e8"
    with pytest.raises(UserError, match="arm 'bad' is not what it was"):
        compare.main(command)


def test_flags_are_checked_before_any_run(tiny, tmp_path):
    command = ["--name", "c", "--dir", str(tmp_path / "cs"), "--arm", "base:", "--arm", "x: --lr -1", "--", *tiny]
    with pytest.raises(UserError, match=r"arm 'x': .*lr"):
        compare.main(command)
    with pytest.raises(UserError, match=r"arm 'base': nothing is validated; .* --eval_interval above 0"):
        compare.main([*command[: command.index("--arm") + 2], "--arm", "y:", "--", *tiny, "--eval_interval", "0"])
    with pytest.raises(UserError, match="--seed: set by the comparison"):
        compare.main([*command[:-1], "--seed", "3"])
    assert not list((tmp_path / "cs").rglob("metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_gives_the_same_table(tiny, tmp_path, tally):
    """A kill of the comparison itself: its runs end too, and the same command goes on to the same numbers."""
    rng = np.random.default_rng(0)
    options = ["--seeds", "2", "--arm", "base:", "--arm", "muon: --optimizer muon", "--jobs", "2", "--", *tiny]

    def start(folder):
        command = [sys.executable, str(ROOT / "compare.py"), "--name", "c", "--dir", str(folder), *options]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)

    def values(folder):
        rows = map(json.loads, (Path(folder) / "c" / "report.jsonl").read_text().splitlines())
        return [(row["arm"], row["values"], row.get("difference")) for row in rows]

    assert start(tmp_path / "undisturbed").wait(timeout=200) == 0
    steps = tmp_path / "killed" / "c" / "base" / "seed_1" / "metrics.jsonl"
    for _ in range(6):
        process = start(tmp_path / "killed")
        eventually(steps.exists)  # a slow machine would be killed each time before anything is done
        time.sleep(rng.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:  # it was done before
            break
        tally("comparisons killed")
    assert start(tmp_path / "killed").wait(timeout=200) == 0
    assert values(tmp_path / "killed") == values(tmp_path / "undisturbed")


def test_a_mistake_is_one_line(capsys, tmp_path):
    """Bug: of a mistyped patch, git's "fatal: Needed a single revision", and no word on which arm."""
    arms = ["--arm", "x:", "--arm", "y: code=no.patch", "--dir", str(tmp_path)]
    for name, words in ("a/b", "--name"), ("c", "arm 'y': code=no.patch: found no file, no folder and no git revision"):
        assert run(lambda name=name: compare.main(["--name", name, *arms])) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_a_patch_that_a_later_call_adds_changes_the_code_as_it_was(tmp_path, monkeypatch):
    """Bug: an arm that holds the patch and also what a person has edited since its base was copied."""
    here, later = tmp_path / "here", Arm("later", code=str(tmp_path / "idea.patch"))
    here.mkdir()
    monkeypatch.setattr(compare, "HERE", here)
    Path(later.code).write_text("--- a/train.py\n+++ b/train.py\n@@ -1 +1,2 @@\n first\n+patched\n")
    (here / "train.py").write_text("first\n")
    first = Arm("first", code=later.code)
    compare.write_json(tmp_path / "comparison.json", compare.set_up(tmp_path, [first], []))
    (here / "train.py").write_text("first\nsecond\n")
    compare.set_up(tmp_path, [first, later, Arm("base")], [])
    code = {arm: (tmp_path / "code" / arm / "train.py").read_text() for arm in ("first", "later", "unchanged")}
    assert code == {"first": "first\npatched\n", "later": "first\npatched\n", "unchanged": "first\n"}


def test_an_arms_flags_are_read_by_its_own_code(tmp_path, monkeypatch):
    """Bug: in the repository's folder, its train.py came before the arm's."""
    monkeypatch.chdir(ROOT)
    arm = Arm("x", ("--new", "1"), code="a folder")
    (tmp_path / "code" / "x").mkdir(parents=True)
    program = "from types import SimpleNamespace\ndef parse(flags): return SimpleNamespace(flags=flags)\n"
    (tmp_path / "code" / "x" / "train.py").write_text(program)
    assert compare.config_of(tmp_path, arm, ["--lr", "1"]) == {"flags": ["--lr", "1", "--new", "1"]}


TELLS = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"


@pytest.mark.parametrize("given, expected", [("2, GPU-5a,7", ["2", "GPU-5a"]), (None, ["0", "1"])])
def test_runs_share_the_cuda_devices_that_were_given(given, expected, tmp_path, monkeypatch):
    """Bug: of CUDA_VISIBLE_DEVICES=2,3 the runs got 0 and 1, on which others compute."""
    monkeypatch.setattr(compare.runtime, "cuda_devices", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    runs = [
        compare.Run(Arm("a"), n, tmp_path / f"seed_{n}", [sys.executable, "-c", TELLS], 10, 10, "auto") for n in (1, 2)
    ]
    for r in runs:
        r.directory.mkdir()
    with open(tmp_path / "lock", "a") as lock:
        assert compare.run_all(runs, 2, compare.cuda_names(), lock) == 0
    assert [(tmp_path / f"seed_{n}.log").read_text().strip() for n in (1, 2)] == expected


def test_as_many_runs_at_once_as_the_machine_lends(monkeypatch):
    """Bugs: a job with 6 of 64 cores starts 32 runs; a Mac starts several on its one GPU."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for mps, cuda, expected in (False, [], 3), (True, [], 1), (False, ["2", "3"], 2):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert compare.jobs_at_once(cuda) == expected


def test_runs_on_the_cpu_take_no_gpu(tiny, tmp_path, monkeypatch, capsys):
    """Bug: --device cpu on a machine with eight GPUs: eight runs at once, each with all cores."""
    monkeypatch.setattr(compare, "cuda_names", lambda: [str(i) for i in range(8)])
    monkeypatch.setattr(compare, "cores", lambda: 2)
    arms = ["--name", "c", "--dir", str(tmp_path), "--dry_run", "--arm", "a:", "--arm", "b: --lr 1e-3"]
    assert compare.main([*arms, "--", *tiny]) == 0
    assert "1 run(s) at the same time" in capsys.readouterr().out
    assert compare.main([*arms, "--", *tiny, "--device", "cuda"]) == 0
    assert "8 run(s) at the same time" in capsys.readouterr().out


def test_a_run_that_a_signal_killed_says_so(tmp_path, capsys):
    """Bug: "failed with exit code -9" and the last step's line, of a run for which memory was short."""
    code = "import os, signal; print('step 7', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    one = compare.Run(Arm("a"), 1, tmp_path / "seed_1", [sys.executable, "-c", code], 10, 10, "auto")
    with open(tmp_path / "lock", "a") as lock:
        assert compare.run_all([one], 1, [], lock) == 0
    assert one.error == "killed by signal 9 (often for lack of memory), after: step 7"
    assert f"a, seed 1: {one.error} (all of it: " in capsys.readouterr().out


COUNTS = """
import signal, sys, time
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
open(sys.argv[1], "w").close()
end = time.monotonic() + 60
while not seen and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(1)  # it saves
sys.exit(143 if len(seen) == 1 else 1)
"""


def test_a_run_is_asked_once_to_stop_and_is_not_called_failed(tmp_path, capsys):
    """Bugs: a signal each fifth of a second, of which the second ends a run while it saves; a stopped run in the table
    of those that failed."""
    ready = tmp_path / "ready"
    one = compare.Run(Arm("a"), 1, tmp_path / "seed_1", [sys.executable, "-c", COUNTS, str(ready)], 10, 10, "auto")
    stop = threading.Thread(target=lambda: eventually(ready.exists) and os.kill(os.getpid(), signal.SIGTERM))
    stop.start()
    with open(tmp_path / "lock", "a") as lock:
        assert compare.run_all([one], 1, [], lock) == signal.SIGTERM
    stop.join()
    assert one.error is None and not one.finished and "failed" not in capsys.readouterr().out
