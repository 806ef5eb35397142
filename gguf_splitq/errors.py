# SPDX-License-Identifier: MIT
"""Every failure a user can cause or meet, one class per kind, each with its exit code.

A message is one sentence that names the tensor or file, the cause and the next step. Names come from files that may be
hostile, and a terminal obeys what it is shown: what is not printable is escaped. docs/errors.md has a table of all.
"""


def printable(text: str) -> str:
    """The text with what is not printable escaped: control characters, halves of surrogate pairs, bytes of no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class SplitqError(Exception):
    """Base of all expected failures; the command line prints the message and exits with `exit_code`."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(SplitqError):
    """Options that contradict each other or the situation (an output that exists, an unknown type)."""

    exit_code = 2


class InputError(SplitqError):
    """A file that is damaged, hostile, truncated, or holds NaN or Inf."""

    exit_code = 3


class UnsupportedError(SplitqError):
    """A sound input that this version cannot handle (an unknown architecture, a pickle checkpoint)."""

    exit_code = 4


class ValidationFailed(SplitqError):
    """A measured result past a limit that the caller set."""

    exit_code = 5


class EnvironmentFailed(SplitqError):
    """The machine lacks something: a compiler, a built runtime, a network, disk space, memory."""

    exit_code = 6


def one_line(error: Exception | str) -> str:
    """A library's message as part of a sentence: on one line, cut when long; the error's name when it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
