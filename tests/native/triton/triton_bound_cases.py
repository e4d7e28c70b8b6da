# SPDX-License-Identifier: Apache-2.0
"""The interpreted screen on inputs whose rounding takes nearly all that the bound allows, and where
a sum overflows: `winner` wins in float32, `other` by the bf16 copies.

Prints a JSON object: the name of each case that is asked for, and "equal" or what differs.
"""

import json
import sys

import torch
import triton_interpreter  # noqa: F401  first: sets the mode
from cases import assert_norms, assert_same, special_rows
from torch import Tensor

from ksae.kernels import bound, screen

NEARLY = 0.99 * 2.0**-8  # of numbers just above 1, what rounding to bf16 loses at most is 2^-8
F, WINNER, OTHER = 100, 70, 20
MOST = torch.finfo(torch.float32).max


def opposite(d: int) -> tuple[Tensor, Tensor]:
    """Two vectors [d] of numbers just above 1 whose roundings all go the other way, half by half:
    up and down against (1, -1). Times (1, -1) they are nearly 0, their copies are far apart."""
    down, up = torch.full((d // 2,), 1 + NEARLY), torch.full((d // 2,), 1 + 2.0**-7 - NEARLY)
    return torch.cat([down, up]), torch.cat([up, down])


def signs(d: int) -> Tensor:
    return torch.cat([torch.ones(d // 2), -torch.ones(d // 2)])


def nobody(d: int) -> tuple[Tensor, Tensor]:
    """W [F, d] and b [F] of latents that win nothing."""
    return torch.zeros(F, d), torch.full((F,), -1000.0)


def rounding(what: str, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """All that the rounding of x, or of W, loses goes against the winner and for the other."""
    d = 64
    (W, b), (below, above) = nobody(d), opposite(d)
    if what == "x":
        x, W[WINNER], W[OTHER] = scale * below[None], signs(d), -signs(d)
    else:
        x, W[WINNER], W[OTHER] = scale * signs(d)[None], below, above
    b[OTHER], b[WINNER] = 0, 0.02 * d * 2.0**-7
    return x, W, b * scale


def bias() -> tuple[Tensor, Tensor, Tensor]:
    """What is lost is small, but it takes both sums over the middle of two numbers at the bias."""
    d = 64
    W, b = nobody(d + 1)
    x = torch.cat([opposite(d)[0], torch.ones(1)])[None]
    b[[WINNER, OTHER]] = 2.0**20  # its neighbour is 2^-3 above, the middle 2^-4
    lean = 1.25 * 2.0**-9 * signs(d)
    W[WINNER] = torch.cat([lean, torch.tensor([2.0**-4 + 2.0**-11])])
    W[OTHER] = torch.cat([-lean, torch.tensor([2.0**-4 - 2.0**-11])])
    return x, W, b


D = 288  # nine steps of the product; float32 scores are summed by column modulo 128


def accumulation() -> tuple[Tensor, Tensor, Tensor]:
    """The copies lose nothing; a product of 2^24 on the way swallows seven of 0.75."""
    W, b = nobody(D)
    W[WINNER, 0], W[WINNER, 256] = 2.0**24, -(2.0**24)
    W[WINNER, torch.arange(33, 256, 32)] = 0.75
    W[OTHER, 5] = 3
    b[[WINNER, OTHER]] = 0
    return torch.ones(1, D), W, b


def overflow(of_x: float, of_W: float) -> tuple[Tensor, Tensor, Tensor]:
    """Products of 2^127: the other's sum is 0 in float32, column by column, but step by step it
    becomes infinite and stays so."""
    assert of_x * of_W == 2.0**127
    W, b = nobody(D)
    W[OTHER, [0, 1]], W[OTHER, [129, 256]] = of_W, -of_W
    W[WINNER, 5] = of_W * 2.0**-30
    b[[WINNER, OTHER]] = 0
    return torch.full((1, D), of_x), W, b


def bias_overflow() -> tuple[Tensor, Tensor, Tensor]:
    """The other's rounding takes its sum with a bias near the largest number beyond it. The winner
    is ahead, and its bound below that number."""
    d, large = 64, 2.0**56
    W, b = nobody(d)
    W[OTHER] = -large * signs(d)
    b[OTHER], b[WINNER] = MOST - 2.0**109, MOST - 0.75 * 2.0**109
    return large * opposite(d)[0][None], W, b


CASES = {
    "rounding of x": lambda: rounding("x"),
    "rounding of W": lambda: rounding("W"),
    "squares that underflow": lambda: rounding("x", 2.0**-80),
    "a large bias": bias,
    "accumulation": accumulation,
    "a row that overflows": lambda: overflow(2.0**64, 2.0**63),
    "a latent that overflows": lambda: overflow(2.0**50, 2.0**77),
    "a bias that overflows": bias_overflow,
}
# Here the bound may tell nothing apart; elsewhere the row must not be scored in full.
IN_FULL = ("squares that underflow", "a row that overflows")


def norms_of_special_rows() -> None:
    for d in (1, 23, 300):
        W = special_rows(d)
        assert_norms(bound.norms(W, W.bfloat16()), W, W.bfloat16())


def case_of(case: str) -> None:
    x, W, b = CASES[case]()
    values, indices, fell = screen.screened_and_redone(x, W, b, 1, capacity=128)
    assert_same("indices", indices, torch.tensor([[WINNER]]))
    exact = x.double() @ W[WINNER].double() + b[WINNER].double()
    assert_same("values", values, exact.float()[None])
    assert case in IN_FULL or not fell.any(), "the row was scored in full"


def outcome(name: str) -> str:
    try:
        norms_of_special_rows() if name == "norms" else case_of(name)
    except Exception as error:  # the report goes on with the next case
        return f"{type(error).__name__}: {error}"
    return "equal"


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))
