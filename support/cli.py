"""How a script ends when the person at the keyboard can mend what is wrong: one line, exit code 2."""

import argparse
import os
import sys

LONGEST = 4000  # characters of a message; a hostile file may want to be quoted at any length


class UserError(ValueError):
    """Something the user can mend. The message says what was found, what was expected, what to do.

    As text it is one line that a terminal shows as it is, whatever name or value it quotes."""

    def __str__(self):
        text = super().__str__()
        text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error) -> str:
    """What a library raised, for the middle of a message."""
    return " ".join(str(error).split())[:200]


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line too, not a page of usage; flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for flag in (arg.removesuffix("=--") for arg in args if arg.startswith("--") and arg.endswith("=--")):
            self.error(f"argument {flag}: -- is no value")  # argparse would make an empty list of it
        return super().parse_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def run(main) -> int:
    """Exit code of a script: main()'s own, 2 after a UserError or where the system refuses (a full disk, a missing
    permission, a name too long), and quiet where the reader of a pipe left."""
    try:
        return main() or 0
    except BrokenPipeError:  # `| head -1`: nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {UserError(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
