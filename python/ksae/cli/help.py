# SPDX-License-Identifier: Apache-2.0
"""The help of a command, in two columns that fit a terminal of 80 columns.

An option's name and type stand on the left, what it means on the right; a name that is too long for
its column has a line of its own.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

LEFT = 26  # columns of names, with the space after them
WIDEST = 100  # longer lines are hard to read


def text(command: Any, ctx: Any) -> str:
    """The whole help of a typer command."""
    width = max(50, min(WIDEST, shutil.get_terminal_size().columns))
    parts = [ctx.command.get_usage(ctx), *_description(command.help or "", width)]
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)  # left and right
        if record is not None:
            argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None)
            panels.setdefault(panel or ("Arguments" if argument else "Options"), []).append(record)
    for name in sorted(panels, key=lambda name: name == "Options"):  # with --help last
        parts.append("")
        parts.append(f"{name}:")
        parts += [line for left, right in panels[name] for line in _row(left, right, width)]
    return "\n".join(parts)


def _description(help: str, width: int) -> Iterator[str]:
    for paragraph in textwrap.dedent(help).strip().split("\n\n"):
        yield ""
        for line in paragraph.splitlines():
            yield from _wrap(line, width, "  ")


def _row(left: str, right: str, width: int) -> Iterator[str]:
    lines = _wrap(right, width, " " * LEFT)
    if len(left) + 4 <= LEFT and lines:
        yield f"  {left}".ljust(LEFT) + lines[0].lstrip()
        yield from lines[1:]
        return
    yield from _wrap(left, width, "  ")
    yield from lines


def _wrap(line: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        line,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
