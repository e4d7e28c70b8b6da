# SPDX-License-Identifier: Apache-2.0
"""The grammar in which an op is stated.

    x:T[N,F] k:1..F@x -> values:T[N,k] indices:i64[N,k]

An argument is `name:type`, without spaces.

- Tensors have dimensions in brackets: names that are set by the first argument with them (or the
  one that says `d_out=`), numbers, sums, differences and products; `[...]` is any shape, the same
  everywhere. Their type is T (storage: the first argument of type T sets it), A (the accumulator of
  T), bool, i32, i64, f32, f64, bf16, `index(F)` (int64 or int32 in [0, F)), two of these (`T|A`),
  the name of an argument (its type) or of a rule of the op. A size of an output that nothing says
  depends on the data.
- `row_offsets:offsets(E)[N+1]?` is int64, from 0 to E and nowhere falling: the E entries, whose
  other size is 1 then, belong to N rows. Without it, E is N.
- Numbers: `int`, `float`, `bool`; `1..F` a range, with `@x` the message names the shape of x;
  `0..inf` is a float. Words: `additive|signed`.
- `name!` is written, so it must be contiguous; `*` after it is a list, G the length of each list,
  and a dimension named `_g` at its end is each entry's own; `?` is optional, `?other` given
  together with another; `~` a hint, which changes no result; `=value` a default.

What the grammar cannot say is said by two functions of an op, `given` and `relations`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ARGUMENT = re.compile(
    r"(?P<name>\w+)(?P<written>!)?:(?P<type>[^\[?*~=]+)(?P<dims>\[[^\]]*\])?(?P<many>\*)?"
    r"(?P<optional>\?)?(?P<partner>\w+)?(?P<hint>~)?(=(?P<default>\S+))?"
)


class Argument(NamedTuple):
    """One argument or output, as the line says it."""

    name: str
    type: str
    dims: tuple[str, ...] | None  # None: not a tensor
    written: bool
    many: bool
    optional: bool
    partner: str | None  # given together with it
    hint: bool
    default: str | None


def parse(line: str) -> tuple[list[Argument], list[Argument]]:
    """Arguments and outputs of a line."""
    before, _, after = line.partition("->")
    return [_parse(word) for word in before.split()], [_parse(word) for word in after.split()]


def _parse(word: str) -> Argument:
    found = _ARGUMENT.fullmatch(word)
    if found is None:
        raise ValueError(f"not an argument of an op: {word}")
    dims = found["dims"]
    return Argument(
        found["name"],
        found["type"],
        None if dims is None else tuple(filter(None, dims[1:-1].split(","))),
        found["written"] is not None,
        found["many"] is not None,
        found["optional"] is not None,
        found["partner"],
        found["hint"] is not None,
        found["default"],
    )
