# SPDX-License-Identifier: Apache-2.0
"""What a call of an op runs: straight code, generated from its line (grammar.py).

A training step calls some fifteen ops, and on a small one the check of their arguments would be a
tenth of its time. The code here compares each argument with what the line says, one expression
each, and calls the kernel by argument names. An argument that does not fit goes to `Spec.check`,
which has the words.

A kernel's own signature declares what it serves: with an optional argument that it does not name,
and that is no hint, the reference serves the call, and so it does for float64, the oracle's type.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from ..reference.dtypes import ENTRIES, FLOATS, accumulator
from .grammar import Argument
from .messages import index_range, offsets_range
from .rows import Offsets
from .spec import FIXED, Spec

_eval_frame = torch._C._dynamo.eval_frame
_ACCUMULATORS = {T: accumulator(T) for T in FLOATS}
_NAMES = re.compile(r"[A-Za-z_]\w*")


def named(kernel: Callable[..., Any], spec: Spec) -> tuple[str, ...]:
    """The arguments of the op that `kernel` takes, in the order of the line."""
    own = inspect.signature(kernel).parameters
    return tuple(name for name in spec.names if name in own)


def unserved(kernel: Callable[..., Any], spec: Spec) -> tuple[str, ...]:
    """The optional arguments with which the reference serves a call instead of `kernel`."""
    own = named(kernel, spec)
    return tuple(a for a in spec.names if a in spec.optional - spec.hints and a not in own)


def kernel(
    spec: Spec, serve: Callable[..., Any], oracle: Callable[..., Any], device: str | None
) -> Callable[..., Any]:
    """The op as `serve` computes it, behind the check.

    device: where its tensors are, which must be the same for all and contiguous; None: it is the
    reference, which takes any.
    """
    known: dict[str, Any] = {"write": lambda: _write(run, spec, serve, oracle, device)}
    run: Any = FunctionType(_unwritten.__code__, known, spec.name)
    return untraced(run)


def _unwritten(*args: Any, **named: Any) -> Any:
    """What a kernel is until its first call, so that an import writes none. `write` is among the
    globals of the kernel."""
    return write()(*args, **named)  # type: ignore[name-defined]  # noqa: F821


def untraced(run: Any) -> Callable[..., Any]:
    """`run`, which dynamo leaves alone, and what it calls.

    torch.library.register_kernel sees to it too, but imports dynamo for it at the first call of an
    op, which takes seconds.
    """
    both = [_eval_frame._FrameAction.SKIP] * 2
    _eval_frame.set_code_exec_strategy(run.__code__, _eval_frame._FrameExecStrategy(*both))
    return run  # type: ignore[no-any-return]


def _write(
    run: Any,
    spec: Spec,
    serve: Callable[..., Any],
    oracle: Callable[..., Any],
    device: str | None,
) -> Callable[..., Any]:
    """`run` with the code of the op, for good."""
    lines = _Lines(spec)
    known = run.__globals__
    known |= {
        "check": lambda *args: spec.check(spec.bind(args)),
        "serve": serve,
        "oracle": oracle,
        "given": spec.given,
        "relations": spec.relations,
        "index_range": index_range,
        "offsets_range": offsets_range,
        "increment_version": torch.autograd.graph.increment_version,
        "FLOATS": frozenset(FLOATS),
        "ACCUMULATORS": _ACCUMULATORS,
        "inf": math.inf,
        **{f"dtype_{name}": dtype for name, dtype in FIXED.items()},
    }
    source = "\n".join(
        [
            f"def run({', '.join(_parameters(spec, known))}):",
            *(f"    {line}" for line in lines.checked(device)),
            *(f"    {line}" for line in _serving(spec, serve, device)),
            f"def refused({', '.join(spec.names)}):",
            f"    check({', '.join(spec.names)})",  # raises, where run's look was right
            f"    T = {lines.lead}.dtype",
            *(f"    {line}" for line in _serving(spec, serve, device)),
        ]
    )
    exec(compile(source, f"<ksae::{spec.name}>", "exec"), known)
    written = known["run"]
    run.__defaults__, run.__code__ = written.__defaults__, written.__code__
    return untraced(run)


def _parameters(spec: Spec, known: dict[str, Any]) -> list[str]:
    """What the dispatcher drops is the default."""
    words = []
    for name in spec.names:
        if name in spec.defaults:
            known[f"default_{name}"] = spec.defaults[name]
            words.append(f"{name}=default_{name}")
        else:
            words.append(name)
    return words


def _serving(spec: Spec, serve: Callable[..., Any], device: str | None) -> list[str]:
    """The lines that call the kernel and say what it wrote."""
    every = ", ".join(f"{name}={name}" for name in spec.names)
    lines = [f"index_range({spec.name!r}, {name}, {_F(spec, F)})" for name, F in spec.indices]
    if (of := spec.offsets) is not None:
        look = f"offsets_range({spec.name!r}, {of.name!r}, {of.name}, {of.entries}.shape[0])"
        lines.append(f"if {of.name} is not None: {look}")
    if device is None:
        lines.append(f"out = oracle({every})")
    else:
        own = ", ".join(f"{name}={_contiguous(spec, name)}" for name in named(serve, spec))
        others = [f"{name} is not None" for name in unserved(serve, spec)]
        lines.append(f"if {' or '.join(['T is dtype_f64', *others])}: out = oracle({every})")
        lines.append(f"else: out = serve({own})")
    if spec.written:  # below autograd: tell it
        optional = [name for name in spec.written if name in spec.optional]
        always = [name for name in spec.written if name not in optional]
        lines.append(f"changed = [{', '.join(always)}]")
        lines += [f"if {name} is not None: changed.append({name})" for name in optional]
        lines.append("increment_version(changed)")
    return [*lines, "return out"]


def _F(spec: Spec, name: str) -> str:
    """Where the number of latents stands: in an argument or in the shape of one."""
    if name in spec.names:
        return name
    for a in spec.arguments:
        if a.dims is not None and name in a.dims and not a.many and not a.optional:
            return f"{a.name}.shape[{a.dims.index(name)}]"
    raise ValueError(f"{spec.name}: no argument has the size {name}")


def _contiguous(spec: Spec, name: str) -> str:
    a = next(a for a in spec.arguments if a.name == name)
    if a.dims is None or a.written:
        return name
    packed = f"[t.contiguous() for t in {name}]" if a.many else f"{name}.contiguous()"
    return f"None if {name} is None else {packed}" if a.optional else packed


class _Lines:
    """The lines that compare the arguments of an op with what its line says."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.refuse = f"return refused({', '.join(spec.names)})"
        first = spec.lead
        self.lead = f"{first.name}[0]" if first.many else first.name
        self.known: set[str] = {"G"}  # sizes that have a value
        self.perhaps: set[str] = set()  # those that an optional argument sets: None without it
        self.lines: list[str] = []

    def checked(self, device: str | None) -> list[str]:
        spec = self.spec
        self.device = f".is_{device}" if device else ".device == device"
        lists = [a for a in spec.arguments if a.many]
        if lists:
            self.lines.append(f"G = len({spec.counted.name})")
            self.unless("G", *(f"len({a.name}) == G" for a in lists if not a.optional))
        types = "T in FLOATS" if spec.lead.type == "T" else "T is dtype_f32 or T is dtype_f64"
        self.lines += [f"T = {self.lead}.dtype"]
        self.unless(types)
        self.lines += ["A = ACCUMULATORS[T]"]
        if device is None:
            self.lines.append(f"device = {self.lead}.device")
        self.unless(*(f"({a} is None) == ({b} is None)" for a, b in spec.partners))
        for name, rule in spec.rules.items():
            self.lines.append(f"type_{name} = {rule}")
        for a in spec.order:
            if spec.offsets is None or a.name != spec.offsets.name:
                self.argument(a)
            if a is spec.lead and spec.offsets is not None:
                self.row_offsets(spec.offsets)
        self.entries([a for a in lists if a.dims is not None])
        for hook, name in ((spec.given, "given"), (spec.relations, "relations")):
            if hook is not None:
                self.lines.append(f"{name}({spec.name!r}, {', '.join(spec.wanted(hook))})")
        return self.lines

    def unless(self, *conditions: str, indent: str = "") -> None:
        if conditions:
            self.lines.append(f"{indent}if not ({' and '.join(conditions)}): {self.refuse}")

    def argument(self, a: Argument) -> None:
        if a.dims is None:
            self.number(a)
        elif a.many and a.optional:
            return  # in `entries`
        elif a.many:  # its sizes, from the first; the rest in `entries`
            self.sizes(a, f"{a.name}[0]", "")
            self.lines.append(f"type_{a.name} = {a.name}[0].dtype")
        elif a.optional:
            new = _names(a) - self.known
            self.lines += [f"{name} = None" for name in sorted(new - self.perhaps)]
            self.perhaps |= new
            self.lines.append(f"if {a.name} is not None:")
            self.tensor(a, a.name, "    ")
            self.known -= new
        else:
            self.tensor(a, a.name, "")

    def row_offsets(self, of: Offsets) -> None:
        """The sizes that row offsets tie, one of which is known."""
        E, N, t = of.E, of.N, of.name
        known, other = (E, N) if E in self.known else (N, E)
        self.lines += [f"if {t} is None:", f"    {other} = {known}", "else:"]
        of_size = f"{of.entries}.shape[1] == 1", f"{of.entries}.shape[0] <= {ENTRIES}"
        one_each = (f"len({of.entries}.shape) == 2", *of_size)
        look = (f"len({t}.shape) == 1", f"{t}.shape[0] > 0", f"{t}.dtype is dtype_i64")
        self.unless(*look, f"{t}{self.device}", *one_each, indent="    ")
        if known == N:
            self.unless(f"{t}.shape[0] == {N} + 1", indent="    ")
            self.lines.append(f"    {E} = {of.entries}.shape[0]")
        else:
            self.lines.append(f"    {N} = {t}.shape[0] - 1")
        self.known |= {E, N}

    def number(self, a: Argument) -> None:
        if "|" in a.type:
            self.unless(f"{a.name} in {tuple(a.type.split('|'))}")
        elif ".." in a.type:
            low, high = a.type.partition("@")[0].split("..")
            self.unless(f"{low} <= {a.name} {'<' if high == 'inf' else '<='} {high}")
        if not a.many:
            self.known.add(a.name)

    def sizes(self, a: Argument, t: str, indent: str) -> None:
        """Names for sizes of `t` that have none yet."""
        dims = _dims(a)
        if dims == ("...",):
            if "..." not in self.known:
                self.lines.append(f"{indent}any_shape = {t}.shape")
                self.known.add("...")
            return
        new = [(i, d) for i, d in enumerate(dims) if not _names_of(d) <= self.known]
        new = [(i, d) for i, d in new if not (a.many and d.endswith("_g"))]
        if not new:
            return
        self.lines.append(f"{indent}shape = {t}.shape")
        self.unless(f"len(shape) == {len(dims)}", indent=indent)
        for i, d in new:
            name, more = (d[:-2], " - 1") if d.endswith("+1") else (d, "")
            if name not in self.known:
                unset = f"if {name} is None: " if name in self.perhaps else ""
                self.lines.append(f"{indent}{unset}{name} = shape[{i}]{more}")
                self.known.add(name)

    def tensor(self, a: Argument, t: str, indent: str) -> None:
        self.sizes(a, t, indent)
        self.unless(*self.conditions(a, t), indent=indent)

    def conditions(self, a: Argument, t: str) -> list[str]:
        dims = _dims(a)
        shape = "any_shape" if dims == ("...",) else f"({''.join(f'{d}, ' for d in dims)})"
        found = [f"{t}.shape == {shape}", _type(a, t), f"{t}{self.device}"]
        return [*found, f"{t}.is_contiguous()"] if a.written else found

    def entries(self, lists: Sequence[Argument]) -> None:
        """The entries of lists: one loop for all, and one for each that is optional."""
        always = [a for a in lists if not a.optional]
        if always:
            self.loop(always, always, "")
        for a in lists:
            if a.optional:
                self.lines.append(f"if {a.name} is not None:")
                self.unless(f"len({a.name}) == G", indent="    ")
                self.loop([*always, a], [a], "    ")

    def loop(self, lists: Sequence[Argument], looked_at: Sequence[Argument], indent: str) -> None:
        """A loop over the entries of `lists`, which set sizes."""
        entry = {a.name: f"{a.name}_g" for a in lists}
        names = ", ".join(entry.values())
        self.lines.append(f"{indent}for {names}, in zip({', '.join(entry)}):")
        own: set[str] = set()
        indent += "    "
        for a in lists:
            t, before = entry[a.name], set(self.known)
            for i, d in enumerate(_dims(a)):
                if d.endswith("_g") and d not in own and d.isidentifier():
                    if a in looked_at:
                        self.unless(f"len({t}.shape) == {len(_dims(a))}", indent=indent)
                    self.lines.append(f"{indent}{d} = {t}.shape[{i}]")
                    own.add(d)
            if a in looked_at:
                self.unless(*self.conditions(a, t), indent=indent)
            self.known = before


def _dims(a: Argument) -> tuple[str, ...]:
    return tuple(d.removesuffix("=") for d in a.dims or ())


def _names_of(dim: str) -> set[str]:
    return {dim} if dim == "..." else set(_NAMES.findall(dim))


def _names(a: Argument) -> set[str]:
    return {n for d in _dims(a) for n in _names_of(d)}


def _type(a: Argument, t: str) -> str:
    """Whether the type of `t` is one of those of `a`."""
    if a.type.startswith("index("):
        return f"({t}.dtype is dtype_i64 or {t}.dtype is dtype_i32)"
    words = []
    for kind in a.type.split("|"):
        if kind in ("T", "A"):
            words.append(kind)
        else:
            words.append(f"dtype_{kind}" if kind in FIXED else f"type_{kind}")
    if len(words) == 1:
        return f"{t}.dtype is {words[0]}"
    return "(" + " or ".join(f"{t}.dtype is {word}" for word in words) + ")"
