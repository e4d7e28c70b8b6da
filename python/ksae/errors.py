# SPDX-License-Identifier: Apache-2.0
"""Errors of the package. The first line of a message says all."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line and says what to do."""


class RankError(RuntimeError):
    """Another rank of a distributed run has stopped, ended or not answered in time."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
