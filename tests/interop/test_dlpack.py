# SPDX-License-Identifier: Apache-2.0
"""Arrays of other frameworks in and out of the functional ops."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

import ksae
from ksae import dlpack

N, D, F, K = 5, 7, 11, 3


class Foreign:
    """An array of a framework that ksae has never heard of."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    def __dlpack__(self, **options: object) -> object:
        return self.t.__dlpack__(**options)

    def __dlpack_device__(self) -> object:
        return self.t.__dlpack_device__()


def arrays(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"x": (N, D), "W_enc": (F, D), "b_enc": (F,), "b_dec": (D,), "W_dec": (F, D)}
    return {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numpy(dtype: type) -> None:
    a = arrays(dtype)
    t = {name: torch.from_numpy(array) for name, array in a.items()}
    mask = np.arange(F) % 2 == 0
    values, indices = dlpack.topk_encode(a["x"], a["W_enc"], a["b_enc"], K, a["b_dec"], mask)
    expected = ksae.topk_encode(
        t["x"], t["W_enc"], t["b_enc"], K, t["b_dec"], torch.from_numpy(mask)
    )
    recon = dlpack.sparse_decode(values, indices, a["W_dec"], a["b_dec"])
    for ours, theirs in zip((values, indices), expected, strict=True):
        assert isinstance(ours, np.ndarray)
        np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(
        recon, ksae.sparse_decode(*expected, t["W_dec"], t["b_dec"]).numpy()
    )
    values, indices = dlpack.topk(a["W_enc"], K)
    np.testing.assert_array_equal(values, np.take_along_axis(a["W_enc"], indices, 1))
    np.testing.assert_array_equal(values, -np.sort(-a["W_enc"], axis=1)[:, :K])


def test_no_copy_of_writable_memory() -> None:
    x = arrays()["x"]
    assert dlpack.tensor("x", x).data_ptr() == x.ctypes.data
    assert dlpack.tensor("x", Foreign(torch.from_numpy(x))).data_ptr() == x.ctypes.data
    out = torch.ones(3)
    assert dlpack.like(x, out).ctypes.data == out.data_ptr()


@pytest.mark.parametrize("ugly", ["read-only", "reversed", "transposed", "strided", "empty"])
def test_memory_that_torch_has_no_tensor_for(ugly: str) -> None:
    x = arrays()["W_enc"]
    shapes = {"reversed": x[::-1, ::-1], "transposed": x.T, "strided": x[::2], "empty": x[:0]}
    given = shapes.get(ugly, x.copy())
    given.flags.writeable = ugly != "read-only"
    before = given.copy()
    values, indices = dlpack.topk(given, 2)
    np.testing.assert_array_equal(values, -np.sort(-given, axis=1)[:, :2])
    np.testing.assert_array_equal(np.take_along_axis(given, indices, 1), values)
    np.testing.assert_array_equal(given, before)


def test_an_unknown_framework_gets_tensors() -> None:
    x = torch.randn(N, F)
    values, indices = dlpack.topk(Foreign(x), K)
    expected = ksae.topk(x, K)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_results_are_of_the_kind_of_the_first_array(monkeypatch: pytest.MonkeyPatch) -> None:
    class Array(Foreign):
        pass

    def from_dlpack(result: torch.Tensor) -> Array:
        return Array(torch.from_dlpack(result))

    module = type("fake", (), {"from_dlpack": staticmethod(from_dlpack)})
    for framework, maker in {"jaxlib": "jax.dlpack", "cupy": "cupy"}.items():
        monkeypatch.setitem(__import__("sys").modules, maker.partition(".")[0], module)
        monkeypatch.setitem(__import__("sys").modules, maker, module)
        monkeypatch.setattr(Array, "__module__", f"{framework}.array")
        values, indices = dlpack.topk(Array(torch.randn(N, F)), K)
        assert type(values) is Array
        assert type(indices) is Array


def test_gradients_are_not_recorded() -> None:
    x = torch.randn(N, F, requires_grad=True)
    assert not dlpack.topk(x, K)[0].requires_grad


def test_bad_arguments() -> None:
    a = arrays()
    with pytest.raises(TypeError, match="dlpack: x must have __dlpack__, got list"):
        dlpack.topk([1.0, 2.0], 1)
    with pytest.raises(TypeError, match=r"dlpack: x must be of a native number type, got >f4"):
        dlpack.topk(a["x"].astype(">f4"), 1)
    with pytest.raises(ValueError, match=r"topk: k must be in \[1, 7\]"):
        dlpack.topk(a["x"], 0)
    with pytest.raises(TypeError, match=r"topk_encode: .*float"):
        dlpack.topk_encode(a["x"], a["W_enc"].astype(np.float64), a["b_enc"], 1)


def test_the_examples_are_right() -> None:
    result = doctest.testmod(dlpack)
    assert result.attempted > 0
    assert result.failed == 0
