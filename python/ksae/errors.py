# SPDX-License-Identifier: Apache-2.0
"""Errors of the package. The first line of a message says all."""

from __future__ import annotations

import traceback


class UserError(Exception):
    """A mistake the user can mend. The message is one line and says what to do."""


class RankError(RuntimeError):
    """Another rank of a distributed run has stopped, ended or not answered in time."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def failure(error: BaseException) -> str:
    """One line on an error of any kind: its type and the first line of its message, or, where it
    has none, the line of code that raised it."""
    said = str(error).strip() and first_line(error)
    if not said and (frames := traceback.extract_tb(error.__traceback__)):
        said = frames[-1].line or ""
    return ": ".join(filter(None, (type(error).__name__, said)))
