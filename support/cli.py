"""The command line of every program: flags from a dataclass, mistakes in one line, exit codes.

    @dataclass(frozen=True)
    class Config:
        out_dir: str = flag("out", "folder to write", unit="folder", group="files")
        steps: int = flag(100, "optimizer steps", at_least=1)

    def main(argv=None):
        config = parse(Config, argv, __doc__)

    if __name__ == "__main__":
        sys.exit(run(main))

Each program imports this module before any installed package, see `say_missing_package`.
"""

import argparse
import difflib
import functools
import math
import operator
import os
import re
import shlex
import sys
import typing
from dataclasses import MISSING, field, fields
from pathlib import Path

from support.terminal import ReaderLeft, open_streams, refuse_unread

LONGEST = 4000  # characters of a message, which may quote from a damaged file
REQUIRED = MISSING  # as the default of a flag: it must be given
ROOT = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """A mistake that the user can correct. The message says what was found, what was expected, what to do.

    Its text is one line of printable characters, also where it quotes a strange name or value."""

    def __str__(self):
        text = super().__str__()
        text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error) -> str:
    """An error of a library, to be quoted in a message."""
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------
# Flags: the fields of a dataclass, and what their values must be.


def flag(default, help, *, at_least=None, above=None, below=None, at_most=None, choices=None, unit=None, group=None,
         positional=False):  # fmt: skip
    """A field of a configuration that is also a flag of the command line.

    Its type is str, int, float, bool, Path, one of these or None, or a tuple of one of these for several values.
    `at_least`, `above`, `below`, `at_most` and `choices` limit each value, but not None. `help` says what the value is
    for; it may end with "; default: ..." where the field's own default would not explain itself. `unit` (tokens, file)
    stands for the value in --help. `group` is a heading in --help above this field and the following ones. A
    `positional` value is given without its name.
    """
    limits = dict(at_least=at_least, above=above, below=below, at_most=at_most)
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    about = dict(help=help, limits=limits, choices=choices, unit=unit, group=group, positional=positional)
    return field(default=default, metadata=about)


@functools.cache  # a training reads them several times at its start
def flags_of(Config) -> list[tuple]:
    """[(field, type of one value, whether it takes several, whether None is allowed)] of the fields made by `flag`."""
    hints, found = typing.get_type_hints(Config), []
    for f in fields(Config):
        if "help" in f.metadata:
            kind, several, optional = hints[f.name], False, False
            if type(None) in typing.get_args(kind):  # X | None
                kind, optional = next(k for k in typing.get_args(kind) if k is not type(None)), True
            if typing.get_origin(kind) in (tuple, list):  # tuple[X, ...]
                kind, several = typing.get_args(kind)[0], True
            found.append((f, kind, several, optional))
    return found


def shown(f) -> str:
    """The field's name as the command line has it."""
    return f.name if f.metadata["positional"] else f"--{f.name}"


def range_of(f) -> str:
    """'at least 0 and below 1', or '' for a field without limits."""
    return " and ".join(f"{name.replace('_', ' ')} {limit:,}" for name, limit in f.metadata["limits"].items())


def within(f, value) -> bool:
    """Whether a number is finite and within the field's limits."""
    tests = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt, "at_most": operator.le}
    return math.isfinite(value) and all(tests[name](value, limit) for name, limit in f.metadata["limits"].items())


def did_you_mean(word, known) -> str:
    """'; did you mean X?', or '' where no known word is close to this one."""
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def type_problems(config) -> list[str]:
    """One line for each value of a wrong type or beyond 64 bits; [] if there is none."""
    found = []
    for f, kind, several, optional in flags_of(type(config)):
        value = getattr(config, f.name)
        if value is None and optional:
            continue
        values = value if several and isinstance(value, (tuple, list)) else [value]
        good = {float: (int, float), Path: (str, os.PathLike)}.get(kind, kind)
        if isinstance(value, (tuple, list)) != several or any(
            not isinstance(v, good) or (isinstance(v, bool) and kind is not bool) for v in values
        ):
            expected = f"several {kind.__name__}, as a tuple" if several else kind.__name__
            found.append(f"{shown(f)} is {value!r} ({type(value).__name__}); it must be {expected}")
        elif any(isinstance(v, int) and abs(v) >= 2**63 for v in values):
            found.append(f"{shown(f)} is beyond 64 bits")
    return found


def range_problems(config) -> list[str]:
    """One line for each value that its field does not allow; [] if there is none."""
    found = type_problems(config)
    if found:
        return found
    for f, kind, several, _ in flags_of(type(config)):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        values = [] if value is None else value if several else [value]
        for v in values:
            if choices and v not in choices:
                known = did_you_mean(v, choices)
                found.append(f"{shown(f)} is {v!r}; it must be one of {', '.join(map(str, choices))}{known}")
            elif kind in (int, float) and not within(f, v):
                found.append(f"{shown(f)} is {v}; it must be {range_of(f) or 'finite'}")
    return found


# ---------------------------------------------------------------------------------------
# The command line.


class Parser(argparse.ArgumentParser):
    """argparse with one line for a wrong flag instead of a page of usage. Flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for flag in (arg.removesuffix("=--") for arg in args if re.fullmatch("--[^=]*=--", arg)):
            self.error(f"argument {flag}: -- is no value")  # argparse would make an empty list of it
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            wrong = next((arg.split("=")[0] for arg in unknown if arg.startswith("-")), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(wrong, self._option_string_actions)}")
        return found

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def words_of(argv) -> list[str]:
    """A command line with the words that are in FILE in place of @FILE; there # begins a comment."""
    words = []
    for word in argv:
        if not word.startswith("@"):
            words.append(word)
            continue
        try:
            words += shlex.split(Path(word[1:]).read_text(encoding="utf-8"), comments=True)
        except ValueError as error:  # a quotation without end, or no text
            raise UserError(f"{word}: {error}") from error
    return words


def default_of(f, several) -> str:
    """A field's default for --help; '' where there is none to show."""
    if f.default is None or f.default is MISSING:
        return ""
    if f.default is False:
        return "off"
    if several:
        return "all" if f.default == f.metadata["choices"] else ", ".join(map(str, f.default)) or "none"
    return str(f.default)


def add_flag(group, f, kind, several):
    """Adds one field to a group of a parser, without a default: the result has only the flags that were given."""
    about = f.metadata
    what, _, default = about["help"].partition("; default: ")
    if not default:
        default = default_of(f, several)
    text = "; ".join(filter(None, [what, range_of(f)]))
    text += f" [{', '.join(map(str, about['choices']))}]" if about["choices"] else ""
    text += f" (default: {default})" if default else ""
    how = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(f"--{f.name}", action="store_true", **how)
        if not f.name.startswith("no_"):  # --no_NAME overrides what a preset or an earlier start of the run has set
            hidden = how | {"help": argparse.SUPPRESS}
            group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", **hidden)
        return
    short = {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
    how |= {"type": kind, "metavar": (about["unit"] or (f.name if about["positional"] else short)).upper()}
    if about["positional"]:
        required, optional = ("+", "*") if several else (None, "?")
        group.add_argument(f.name, nargs=required if f.default is MISSING else optional, **how)
    elif several:  # --only a b and --only a --only b
        group.add_argument(f"--{f.name}", nargs="+", action="extend", required=f.default is MISSING, **how)
    else:
        group.add_argument(f"--{f.name}", required=f.default is MISSING, **how)


def read_flags(Config, argv=None, about=None) -> dict:
    """The flags that the command line gives, by field name. UserError with everything that is wrong.

    `argv` is sys.argv's without the program. `about` is the program's docstring: --help begins with its first line and
    ends with its commands, which are indented by four spaces.
    """
    first, *others = (about or "").splitlines() or [""]
    commands = [line[2:] for line in others if re.match(r" {4}(python|torchrun) ", line)]
    parser = Parser(description=first, epilog="\n".join(["examples:", *commands]) if commands else None)
    group = parser
    for f, kind, several, _ in flags_of(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        add_flag(group, f, kind, several)
    given = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def parse(Config, argv=None, about=None, check=range_problems):
    """The configuration that a command line means. UserError with everything that `check` finds wrong with it.
    argv, about: see `read_flags`."""
    config = Config(**read_flags(Config, argv, about))
    refuse(check(config))
    return config


def refuse(problems):
    """UserError with all of them in one line, if there are any."""
    if problems:
        raise UserError("; ".join(problems))


# ---------------------------------------------------------------------------------------
# The end of a program.


def run(main) -> int:
    """Runs a program; returns its exit code: main()'s own, or 2 after a UserError or an OSError such as a full disk. An
    output that nobody reads any more (`| head -1`) is no error."""
    open_streams()
    try:
        code = main() or 0
        sys.stdout.flush()
        if code == 0:
            refuse_unread()
        return code
    except ReaderLeft:
        return 0
    except (UserError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {UserError(explain(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def explain(error) -> str:
    """An error as text; for one of the system the files first, and without its number."""
    files = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return f"{' -> '.join(files)}: {error.strerror}" if files and error.strerror else str(error)


def say_missing_package(kind, error, traceback):
    """Python's hook for errors that nobody caught: one line and exit code 2 for a package that is not installed.

    A hook, because programs import packages before any of their code could catch the error. A missing module of the
    repository or of Python itself keeps its traceback."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    ours = not name or (ROOT / name).is_dir() or name in sys.stdlib_module_names
    if not issubclass(kind, ModuleNotFoundError) or ours:
        return earlier_hook(kind, error, traceback)
    said = f"the Python package {name} is not installed; python -m pip install -r requirements.txt"
    print(f"{os.path.basename(sys.argv[0])}: error: {said}", file=sys.stderr)
    raise SystemExit(2)


earlier_hook, sys.excepthook = sys.excepthook, say_missing_package
