"""The command line that all programs share: flags from a dataclass, one line for a mistake, exit codes."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from support.cli import REQUIRED, UserError, flag, parse, range_problems, read_flags, run
from toy import ROOT

OTHERS = ("prepare_fineweb.py", "fine_tune.py")  # one needs no torch, the other uses nothing of this repository
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]
    if "__main__" in path.read_text(encoding="utf-8") and path.name not in OTHERS
)


@dataclass(frozen=True)
class Config:
    command: str = flag("write", "what to do", choices=("write", "read"), unit="command", positional=True)
    runs: tuple[str, ...] = flag((), "folders", unit="run", positional=True)
    lr: float = flag(1e-3, "rate", above=0, below=1, group="optimization")
    theta: float = flag(1.0, "without limits")
    steps: int | None = flag(None, "how many; default: all", at_least=1, at_most=1000, unit="steps")
    bias: bool = flag(False, "with biases")
    no_shuffle: bool = flag(False, "in order")
    out: Path = flag(Path("out"), "where to", group="files")
    only: tuple[str, ...] = flag(("loss", "speed"), "panels", choices=("loss", "speed"))


def test_types_and_several_values():
    """Bugs: a path as text, a list where a tuple is promised, a default shared by two configurations."""
    c = parse(
        Config,
        ["read", "a", "b", "--steps", "3", "--bias", "--out", "x", "--only", "loss", "--only", "speed", "--lr", ".5"],
    )
    assert c == Config("read", ("a", "b"), 0.5, 1.0, 3, True, False, Path("x"), ("loss", "speed"))
    assert parse(Config, []) == Config()
    assert read_flags(Config, ["--lr", "0.1"]) == {"lr": 0.1}, "what is not given is left out"
    assert parse(Config, ["--bias", "--no_bias"]).bias is False


def test_all_problems_at_once_with_found_and_expected():
    """Bug: one mistake a start, each after half a minute of imports."""
    with pytest.raises(UserError) as refused:
        parse(Config, ["rite", "--lr", "1", "--steps", "0", "--only", "lost"])
    assert str(refused.value) == (
        "command is 'rite'; it must be one of write, read; did you mean write?; "
        "--lr is 1.0; it must be above 0 and below 1; --steps is 0; it must be at least 1 and at most 1,000; "
        "--only is 'lost'; it must be one of loss, speed; did you mean loss?"
    )


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_no_number_is_nan_or_infinite(text):
    """Bug: every comparison with NaN is false, so a check written the other way round lets it pass."""
    for name in ("lr", "theta"):
        assert run(lambda name=name: parse(Config, [f"--{name}={text}"])) == 2


@pytest.mark.parametrize("values, expected", [
    ({"lr": "fast"}, "--lr is 'fast' (str); it must be float"),
    ({"steps": 2.5}, "--steps is 2.5 (float); it must be int"),
    ({"steps": True}, "--steps is True (bool); it must be int"),
    ({"runs": "one"}, "runs is 'one' (str); it must be several str, as a tuple"),
    ({"lr": None}, "--lr is None (NoneType); it must be float"),
    ({"steps": 2**63}, "--steps is beyond 64 bits"),
])  # fmt: skip
def test_wrong_types_from_python(values, expected):
    """Bugs: a string read letter by letter as a list of files; a TypeError far from where the value was given."""
    assert range_problems(replace(Config(), **values)) == [expected]
    assert range_problems(replace(Config(), lr=0.5, out="text", only=["loss"])) == []


@pytest.mark.parametrize("argv, words", [
    (["--step"], "unrecognized arguments: --step; did you mean --steps?"),
    (["--no-shuffle"], "--no-shuffle; did you mean --no_shuffle?"),
    (["--stepz=3"], "did you mean --steps?"),
    (["--zzz"], "unrecognized arguments: --zzz (--help lists the flags)"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--steps=--"], "argument --steps: -- is no value"),
    (["--zzz=a=--"], "unrecognized arguments: --zzz=a=--"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line(argv, words, capsys):
    """Bugs: a page of usage; an abbreviation that is taken for another flag; no hint at the right name."""
    assert run(lambda: parse(Config, argv)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said


def test_required_flags():
    @dataclass
    class Needs:
        folder: str = flag(REQUIRED, "which", positional=True)

    assert parse(Needs, ["a"]).folder == "a"
    with pytest.raises(UserError, match="required: FOLDER"):
        parse(Needs, [])


def test_help_shows_range_default_group_and_examples(capsys):
    """Bug: a page of flags in one list, without a range, a default or a command to start from."""
    with pytest.raises(SystemExit):
        read_flags(Config, ["--help"], "What it does.\n\n    python it.py read a\n    python it.py --lr 0.1\n\nHow.\n")
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text and text.endswith("examples: python it.py read a python it.py --lr 0.1")
    assert "optimization: --lr X rate; above 0 and below 1 (default: 0.001)" in text
    assert "--steps STEPS how many; at least 1 and at most 1,000 (default: all)" in text
    assert "panels [loss, speed] (default: all)" in text and "--no_bias" not in text
    assert text.index("--bias") < text.index("files: --out PATH where to (default: out)")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_package_is_one_line(program, tmp_path):
    """Bug: ModuleNotFoundError with a traceback, as the first thing that a newcomer sees."""
    for name in ("numpy", "torch"):  # whichever is imported first
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / program], capture_output=True, text=True, env=env)
    said = f"{Path(program).name}: error: the Python package torch is not installed; python -m pip install -r requirem"
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1, done.stderr
