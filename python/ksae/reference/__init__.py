# SPDX-License-Identifier: Apache-2.0
"""The meaning of every op, in plain torch, written to be read.

N tokens, d width, F latents, k active latents a token. T is the storage type (float32, bfloat16,
float16 or float64). Sums are accumulated in float32, and in float64 where T is float64. These
functions are the default kernels on every device, the oracle of the tests and the baseline of the
benchmarks; a faster kernel that differs from them is wrong.

Selection: larger first, equal scores by the smaller index, NaN before everything, -0 equal to +0.
An entry with value 0 contributes nothing to any product, even if the other factor is not finite.

The names here are those that the modules list in their `__all__`.
"""

from . import batch_topk, decode, dtypes, encode, group, prefixes, rounding, rows, scalars
from .batch_topk import *
from .decode import *
from .dtypes import *
from .encode import *
from .group import *
from .prefixes import *
from .rounding import *
from .rows import *
from .scalars import *
from .topk import topk

__all__ = ["topk"]
__all__ += batch_topk.__all__
__all__ += decode.__all__
__all__ += dtypes.__all__
__all__ += encode.__all__
__all__ += group.__all__
__all__ += prefixes.__all__
__all__ += rounding.__all__
__all__ += rows.__all__
__all__ += scalars.__all__
