# SPDX-License-Identifier: Apache-2.0
"""The error for a user's mistake: one line, no traceback on the command line."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line and says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
