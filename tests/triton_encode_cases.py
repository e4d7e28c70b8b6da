# SPDX-License-Identifier: Apache-2.0
"""One case of the interpreted encode against the reference; integers make sums exact."""

import importlib.util
import sys
from pathlib import Path

import torch
import triton_interpreter  # noqa: F401  first: sets the mode
from cases import integers

from ksae import reference

path = Path(__file__).parents[1] / "kernels" / "encode.py"
spec = importlib.util.spec_from_file_location("encode", path)
encode = importlib.util.module_from_spec(spec)
sys.modules["encode"] = encode
spec.loader.exec_module(encode)

case = sys.argv[1]
N, d, F, k = {
    "random": (5, 40, 300, 9),
    "no row": (0, 7, 33, 4),
    "one row": (1, 1, 33, 1),
    "k is F": (2, 17, 33, 33),
    "half": (3, 40, 300, 9),
}.get(case, (3, 17, 200, 6))
dtype = torch.float16 if case == "half" else torch.float32
x, W, b = integers(N, d, dtype=dtype), integers(F, d, dtype=dtype, seed=1), integers(F, dtype=dtype)
options, more = {}, {}
if case == "overflow":  # the guess lets everything through, and a buffer is compacted on the way
    options = {"tau": torch.full((N,), -torch.inf), "capacity": 128}
elif case == "shortfall":
    options = {"tau": torch.full((N,), torch.inf)}
elif case == "all equal":
    W, options = torch.ones_like(W), {"capacity": 128}
elif case == "infinite":
    b[:] = -torch.inf
    b[77], options = torch.inf, {"capacity": 128}
elif case == "one NaN latent":
    b[150] = torch.nan
elif case == "winners in one tile":
    b[128:140] = 1000
elif case == "centred":
    more["b_dec"] = integers(d, seed=3)
elif case == "masked":  # fewer living latents than k
    more["mask"] = torch.arange(F) % 50 == 0

values, indices = encode.topk_encode(x, W, b, k, **more, **options)
expected = reference.topk_encode(x, W, b, k, **more)
assert torch.equal(values.nan_to_num(-1), expected[0].nan_to_num(-1)), (values, expected[0])
assert torch.equal(indices, expected[1]), (indices, expected[1])
print("equal")
