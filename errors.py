"""How a script ends when the person at the keyboard can mend what is wrong: one line, exit code 2."""

import argparse
import os
import sys


class UserError(ValueError):
    """Something the user can mend. The message says what was found, what was expected, what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line too, not a page of usage; flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def run(main) -> int:
    """Exit code of a script: main()'s own, 2 after a UserError or where the system refuses (a full disk, a
    missing permission), and quiet where the reader of a pipe left."""
    try:
        return main() or 0
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head -1`: nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a missing permission: the machine's fault, not the program's
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
