# SPDX-License-Identifier: Apache-2.0
"""Mistakes put into the Triton kernels, interpreted: what the case that should see each comes to.

Prints a JSON object: the name of each mutant that is asked for, and "equal" or what differs.
"""

import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton_bound_cases as bounds
import triton_encode_cases as encodes
import triton_interpreter  # noqa: F401
import triton_screen_cases as screens
import triton_stored_cases as stored

import ksae.kernels

KERNELS = Path(ksae.kernels.__path__[0])


class Mutant(NamedTuple):
    file: str
    old: str  # occurs once
    new: str
    case: str  # "bound: ", "screen: ", "stored: " or "topk: " and the case that sees it


MUTANTS = {
    # ----------------------------------------------------------------------------------- the bound
    "a quarter of the margins": Mutant(
        "bound.py", "return m + bias", "return 0.75 * m + bias",
        "bound: rounding of x",
    ),
    "a quarter of the margins, W": Mutant(
        "bound.py", "return m + bias", "return 0.75 * m + bias",
        "bound: rounding of W",
    ),
    "a twentieth of a row's norms": Mutant(
        "bound.py", "of_lost * slack", "0.95 * of_lost * slack", "bound: rounding of x",
    ),
    "a twentieth of the norm that meets what W lost": Mutant(
        "bound.py", "of_lost = full * (1 + g)", "of_lost = 0.95 * full * (1 + g)",
        "bound: rounding of W",
    ),
    "no term of x's rounding": Mutant(
        "bound.py", "of_rounded = lost + g", "of_rounded = 0 * lost + g", "bound: rounding of x"
    ),
    "no term of W's rounding": Mutant(
        "bound.py", "m = w_lost * of_lost", "m = 0 * w_lost * of_lost", "bound: rounding of W"
    ),
    "no term of the accumulation": Mutant(
        "bound.py", "lost + g * (rounded + full)", "lost", "bound: accumulation"
    ),
    "no term of the bias": Mutant(
        "bound.py", "size * 2.0**-20", "size * 0.0", "bound: a large bias"
    ),
    "no floor under the squares": Mutant(
        "bound.py", " + d * 2.0**-126)", ")", "bound: squares that underflow"
    ),
    "an upper end below the score": Mutant(
        "product.py", "s = u + m", "s = u", "bound: rounding of x"
    ),
    "a lower end above the score": Mutant(
        "product.py", "low = u - m", "low = u", "bound: rounding of x"
    ),
    # ---------------------------------------------------------------------------------- its guards
    "a norm that may overflow": Mutant(
        "bound.py", "safe = size <= 2.0**60", "safe = size == size", "bound: norms"
    ),
    "a bias that may overflow": Mutant(
        "bound.py", "size < 1e37", "size < 3.5e38", "bound: a bias that overflows"
    ),
    "an unbounded score is certain": Mutant(
        "product.py", "tl.where(low == low, low, float(\"-inf\"))", "low",
        "bound: a row that overflows",
    ),
    "a NaN is below": Mutant(
        "gate.py", "tl.where(below, 0, bit)", "tl.where(s >= tau[:, None, None, None], bit, 0)",
        "screen: NaN latent",
    ),
    # --------------------------------------------------------------------------- proofs and buffers
    "screen: overflow unseen": Mutant(
        "screen.py", "(count <= CAPACITY) & (", "(count >= 0) & (", "screen: half masked, overflow"
    ),
    "screen: guess too high unseen": Mutant(
        "screen.py", "(bound >= order_of(tau))", "(bound >= NOTHING)", "screen: guess too high"
    ),
    # ---------------------------------------------------------------------------- scores in memory
    "stored: a group's maximum is certain": Mutant(
        "screen_stored.py", "_lower(best, m)", "_lower(best, 0 * m)", "stored: rounding of x"
    ),
    "stored: a group reaches no higher than its maximum": Mutant(
        "screen_stored.py", "reach = order_of(best + m)", "reach = order_of(best)",
        "stored: hidden by its copy",
    ),
    "stored: a group's smallest loss": Mutant(
        "screen_stored.py", "tl.max(lost, axis=1)", "tl.min(lost, axis=1)",
        "stored: hidden by its copy",
    ),
    "stored: a group's smallest copy": Mutant(
        "screen_stored.py", "tl.max(rounded, axis=1)", "tl.min(rounded, axis=1)",
        "stored: hidden by the row's copy",
    ),
    "stored: an upper end below the score": Mutant(
        "screen_stored.py", "top = s + own_m", "top = s", "stored: hidden by its copy"
    ),
    "stored: a lower end above the score": Mutant(
        "screen_stored.py", "of_order(_lower(s, own_m))", "of_order(_lower(s, 0 * own_m))",
        "stored: rounding of W",
    ),
    "stored: overflow unseen": Mutant(
        "screen_stored.py", "count += tl.sum(one)", "count += tl.sum(fits.to(tl.int32))",
        "stored: near ties, overflow",
    ),
    "stored: masked latents pass": Mutant(
        "screen_stored.py", "passed & (tl.load(mask_ptr + f, inside, 0) != 0)", "passed",
        "stored: masked",
    ),
    "redo: overflow unseen": Mutant(
        "redo.py", "(short | (count > CAPACITY))", "short", "topk: overflow"
    ),
    "redo: shortfall unseen": Mutant(
        "redo.py", "(short | (count > CAPACITY))", "(count > CAPACITY)", "topk: shortfall"
    ),
}  # fmt: skip


def mutated(number: int, mutant: Mutant, folder: Path) -> str:
    """The name of a package of the kernels with this mistake."""
    name = f"kernels_{number}"
    copied = Path(shutil.copytree(KERNELS, folder / name)) / mutant.file
    text = copied.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} must contain {mutant.old!r} once"
    copied.write_text(text.replace(mutant.old, mutant.new))
    return name


def module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def of_bound(package: str, case: str) -> str:
    bounds.screen, bounds.bound = module(package, "screen"), module(package, "bound")
    return bounds.outcome(case)


def of_screen(package: str, case: str) -> str:
    screens.screen, screens.bound = module(package, "screen"), module(package, "bound")
    return screens.outcome(case)


def of_stored(package: str, case: str) -> str:
    stored.screen_stored, stored.bound = module(package, "screen_stored"), module(package, "bound")
    return stored.outcome(case)


def of_topk(package: str, case: str) -> str:
    encodes.encode = module(package, "topk_encode")
    return encodes.outcome(f"topk, {case}")


RUN: dict[str, Callable[[str, str], str]] = {
    "bound": of_bound,
    "screen": of_screen,
    "stored": of_stored,
    "topk": of_topk,
}


def outcomes(names: list[str]) -> dict[str, str]:
    """Of each mutant, and of each of their cases with the kernels as they are."""
    said = {}
    for case in sorted({MUTANTS[name].case for name in names}):
        kind, _, of = case.partition(": ")
        said[case] = RUN[kind]("ksae.kernels", of)
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number, name in enumerate(names):
            kind, _, of = MUTANTS[name].case.partition(": ")
            said[name] = RUN[kind](mutated(number, MUTANTS[name], Path(folder)), of)
    return said


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    print(json.dumps(outcomes(sys.argv[1:] or list(MUTANTS))))
