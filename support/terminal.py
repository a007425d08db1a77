"""Printing that cannot end a program: text that cannot be written is dropped, and the work goes on.

A pipe's reader may leave, a terminal be closed, a disk be full, an encoding lack a character. `cli.run` calls
`open_streams` for every program.
"""

import io
import os
import select
import stat
import sys
from contextlib import suppress


class Talk(io.FileIO):
    """Standard output or error below Python's buffers. It drops what it cannot write."""

    lost = None  # the first error

    def write(self, data):
        try:
            while (written := super().write(data)) is None:  # full, and another process made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def open_streams():
    """Makes printing safe: a reader may leave, a stream may be closed, its encoding may lack characters."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: take its number, or the next file that is opened gets it and what C code prints
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(null, mode, closefd=False, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):  # not one that a test or a notebook put there
            with suppress(OSError):
                stream.flush()
            stream.reconfigure(errors="backslashreplace")
            if type(raw_of(stream)) is io.FileIO:  # a Windows console's is another
                setattr(sys, name, talking(stream))


def raw_of(stream):
    """The unbuffered stream below a text stream; None if there is none."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves the buffer out


def talking(stream):
    """The same text stream on top of a Talk."""
    raw = Talk(stream.fileno(), "w", closefd=False)
    how = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
    return io.TextIOWrapper(io.BufferedWriter(raw) if hasattr(stream.buffer, "raw") else raw, **how)


class ReaderLeft(Exception):
    """Nobody reads standard output any more."""


def refuse_unread():
    """For a program whose result is its output: ReaderLeft if nobody reads it, OSError if a file lacks a part of it."""
    raw = raw_of(sys.stdout)
    if error := getattr(raw, "lost", None):
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise ReaderLeft
        raise OSError(error.errno, error.strerror, "standard output")
