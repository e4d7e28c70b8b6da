# SPDX-License-Identifier: Apache-2.0
"""The functional ops for arrays of other frameworks: NumPy, JAX, CuPy, whatever speaks DLPack.

Arguments are taken without a copy, where their device allows it, and results are of the kind of the
first array (JAX makes indices int32 unless jax_enable_x64 is set). No gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from ksae import functional

# Frameworks whose results are made with `from_dlpack` of this module.
_MAKERS = {"numpy": "numpy", "jax": "jax.dlpack", "jaxlib": "jax.dlpack", "cupy": "cupy"}


def tensor(name: str, array: Any) -> Tensor:
    """A tensor on the memory of `array`, copied only where it must be (read-only NumPy memory).

    Raises:
        TypeError: `array` neither has `__dlpack__` nor is a tensor.
    """
    if isinstance(array, Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.copy()  # torch has no such tensors
        if array.dtype.byteorder == ">" or array.dtype.hasobject:
            raise TypeError(f"dlpack: {name} must be of a native number type, got {array.dtype}")
        return torch.from_numpy(array)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"dlpack: {name} must have __dlpack__, got {type(array).__name__}")
    return torch.utils.dlpack.from_dlpack(array)


def like(array: Any, result: Tensor) -> Any:
    """`result` on its own memory as an array of the kind of `array`.

    An array of a framework not known here comes back as a tensor, which has `__dlpack__`.
    """
    root = type(array).__module__.partition(".")[0]
    if root == "numpy":
        return result.numpy()
    maker = _MAKERS.get(root)
    return result if maker is None else importlib.import_module(maker).from_dlpack(result)


def _wrap(op: Callable[..., Any], **arrays: Any) -> Any:
    given = {name: a if a is None else tensor(name, a) for name, a in arrays.items()}
    first = next(a for a in arrays.values() if a is not None)
    with torch.no_grad():
        result = op(**given)
    if isinstance(result, Tensor):
        return like(first, result)
    return tuple(like(first, part) for part in result)


def topk(x: Any, k: int) -> tuple[Any, Any]:
    """`ksae.topk` of an array [..., F] -> values [..., k], indices [..., k] int64.

    Example:
        >>> import numpy as np
        >>> from ksae import dlpack
        >>> dlpack.topk(np.array([1.0, 3.0, 3.0, 2.0]), 2)
        (array([3., 3.]), array([1, 2]))
    """
    return _wrap(lambda x: functional.topk(x, k), x=x)  # type: ignore[no-any-return]


def topk_encode(
    x: Any, W_enc: Any, b_enc: Any, k: int, b_dec: Any = None, mask: Any = None
) -> tuple[Any, Any]:
    """`ksae.topk_encode` of arrays: x [..., d], W_enc [F, d], b_enc [F], b_dec [d], mask [F] bool.

    Example:
        >>> import numpy as np
        >>> from ksae import dlpack
        >>> dlpack.topk_encode(np.array([1.0, 2.0]), np.eye(2), np.zeros(2), 1)
        (array([2.]), array([1]))
    """

    def op(**arrays: Any) -> Any:
        return functional.topk_encode(k=k, **arrays)

    return _wrap(op, x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec, mask=mask)  # type: ignore[no-any-return]


def sparse_decode(values: Any, indices: Any, W_dec: Any, b_dec: Any = None) -> Any:
    """`ksae.sparse_decode` of arrays: values, indices [..., k], W_dec [F, d], b_dec [d].

    Example:
        >>> import numpy as np
        >>> from ksae import dlpack
        >>> dlpack.sparse_decode(np.array([2.0]), np.array([1]), np.eye(2))
        array([0., 2.])
    """
    return _wrap(functional.sparse_decode, values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
