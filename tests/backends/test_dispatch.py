# SPDX-License-Identifier: Apache-2.0
"""Which way CUDA tensors are encoded: by the table's rows, by dtype, and by what is there.

No GPU is needed: tensors are fake, and kernels answer with their names.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ksae.backends import cuda, triton
from ksae.backends import serving as gpu
from ksae.backends.triton import Kernels
from ksae.ops.specs import BY_NAME

N, D, F, K = 8, 768, 24576, 32
T32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


def row(way: str, kind: str = "float32", **changes: Any) -> gpu.Row:
    return gpu.Row("9.0", kind, D, F, way, "a test")._replace(**changes)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu, "generation", lambda device: "9.0")
    monkeypatch.setattr(gpu.triton, "kernels", Kernels())
    monkeypatch.setattr(gpu.cuda, "kernels", None)
    gpu.row.cache_clear()
    yield
    gpu.row.cache_clear()


def fake(dtype: torch.dtype, F: int = F) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc on a GPU that is not there."""
    with FakeTensorMode():
        sizes = ((N, D), (F, D), (F,))
        return tuple(torch.empty(*s, dtype=dtype, device="cuda") for s in sizes)  # type: ignore


def answering(method: Any, name: str) -> Any:
    """A method with the arguments of `method` that returns its name."""

    @functools.wraps(method)
    def answer(self: Any, **args: Any) -> str:
        inspect.signature(method).bind(self, **args)  # knows them all
        return name

    return answer


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Any:
    """called(op, dtype, ...): the name of the method of the kernels that serves the call."""
    for op in ("topk_encode", "grad_topk_encode", "topk_encode_aux", "batch_topk_encode"):
        for name in (op, f"screened_{op}", f"fused_{op}"):
            if hasattr(Kernels, name):
                monkeypatch.setattr(Kernels, name, answering(getattr(Kernels, name), name))

    def call(op: str, dtype: torch.dtype, k: int = K, F: int = F) -> str:
        x, W, b = fake(dtype, F)
        args = {
            "topk_encode": (x, W, b, k),
            "batch_topk_encode": (x, W, b, k),
            "grad_topk_encode": (x, x, W, b, W, k, 0.5),
            "topk_encode_aux": (x, W, b, k, 64, b > 0),
        }[op]
        assert args[0].is_cuda
        encode, server = gpu.kernel(BY_NAME[op]) or (None, None)
        assert encode is not None and server == "triton"
        return str(encode(**BY_NAME[op].bind(args)))

    return call


def test_float32_is_screened_by_default_and_halves_are_not(called: Any) -> None:
    for op in ("topk_encode", "topk_encode_aux"):
        assert called(op, T32) == f"screened_{op}"
        assert called(op, B16) == called(op, F16) == op
    for op in ("grad_topk_encode", "batch_topk_encode"):  # no screened form of these
        assert called(op, T32) == called(op, B16) == op


def test_many_of_few_are_not_screened(called: Any) -> None:
    assert called("topk_encode", T32, k=384) == "screened_topk_encode"  # a 64th of all
    assert called("topk_encode", T32, k=385) == "topk_encode"
    assert called("topk_encode", T32, k=1025, F=1 << 17) == "topk_encode"


def test_a_measurement_overturns_the_default_of_one_dtype(
    called: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "TABLE", (row("product"), row("fused", "16 bit", aux="product")))
    assert called("topk_encode", T32) == "topk_encode"
    assert called("topk_encode", B16) == "fused_topk_encode"
    assert called("grad_topk_encode", B16) == "fused_grad_topk_encode"
    assert called("topk_encode_aux", B16) == "topk_encode_aux"  # fused takes a second product
    monkeypatch.setattr(gpu, "TABLE", (row("screened"), row("product", "16 bit", aux="fused")))
    gpu.row.cache_clear()
    assert called("topk_encode", T32) == "screened_topk_encode"
    assert called("topk_encode_aux", B16) == "fused_topk_encode_aux"


@pytest.mark.parametrize("way", gpu.WAYS)
def test_the_environment_overrides_the_table(
    called: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(gpu, "override", way)
    prefix = {"product": "", "screened": "screened_", "fused": "fused_"}[way]
    assert called("topk_encode", T32) == f"{prefix}topk_encode"
    halves = prefix if way == "fused" else ""
    for op in ("topk_encode", "grad_topk_encode", "topk_encode_aux"):
        assert called(op, B16) == f"{halves}{op}"


def test_the_nearest_row_of_the_generation_and_kind_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far = row("product", d=4096, F=131072)
    others = (row("fused", "16 bit"), row("fused", generation="8.0"))
    monkeypatch.setattr(gpu, "TABLE", (row("screened"), far, *others))
    assert gpu.row("9.0", "float32", 1024, 24576) == row("screened")
    assert gpu.row("9.0", "float32", 2048, 100_000) == far
    assert gpu.row("9.0", "16 bit", 2048, 100_000) == others[0]
    assert gpu.row("hip", "float32", 768, 24576) is None
    assert gpu.row("9.0", "float32", 0, 1) is not None


def test_an_unknown_gpu_takes_the_product(called: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "generation", lambda device: "hip")
    assert called("topk_encode", T32) == called("topk_encode", B16) == "topk_encode"


def test_the_table_claims_no_measurement_that_it_lacks() -> None:
    assert {(r.generation, r.kind) for r in gpu.TABLE} >= {("9.0", kind) for kind in gpu.KINDS}
    for r in gpu.TABLE:
        assert {r.way, r.aux} <= {*gpu.WAYS} and r.kind in gpu.KINDS
        by_count = r.measured == gpu.UNMEASURED and {r.way, r.aux} == {gpu.BY_COUNT[r.kind]}
        assert by_count or " ms" in r.measured


NATIVE = cuda.Kernels(types.ModuleType("no kernel is reached"))


@pytest.mark.parametrize(
    ("native", "portable", "ways", "served"),
    [
        (True, True, ["product"], ("native", "native", "native")),
        (True, True, ["screened", "product"], ("native", "native", "native")),
        (True, True, ["fused"], ("native", "triton", "triton")),
        (True, True, ["product", "fused"], ("native", *["native or triton"] * 2)),
        (False, True, ["product"], ("triton", "triton", "triton")),
        (True, False, ["fused"], ("native", "native", "native")),
        (False, False, ["product"], (None, None, None)),
    ],
)
def test_precedence(
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    portable: bool,
    ways: list[str],
    served: tuple[str | None, ...],
) -> None:
    monkeypatch.setattr(gpu.cuda, "kernels", NATIVE if native else None)
    monkeypatch.setattr(gpu.triton, "kernels", Kernels() if portable else None)
    monkeypatch.setattr(gpu, "TABLE", tuple(map(row, ways)))
    names = ("sparse_decode", "topk_encode", "grad_topk_encode")
    found = [gpu.kernel(BY_NAME[name]) for name in names]
    assert tuple(f and f[1] for f in found) == served


def test_without_triton_fused_falls_to_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.triton, "kernels", None)
    monkeypatch.setattr(gpu, "override", "fused")
    assert gpu.way(fake(T32)[1], K) == "screened" and gpu.way(fake(B16)[1], K) == "product"


def test_a_kept_copy_reaches_the_screened_encode_alone(
    called: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product way does not name it, and is not handed it."""
    given: list[set[str]] = []
    for name in ("topk_encode", "screened_topk_encode"):
        method = getattr(Kernels, name)

        @functools.wraps(method)
        def note(self: Any, *, _of: Any = method, **args: Any) -> Any:
            given.append({arg for arg in args if args[arg] is not None})
            return _of(self, **args)

        monkeypatch.setattr(Kernels, name, note)
    x, W, b = fake(T32)
    encode, _ = gpu.kernel(BY_NAME["topk_encode"]) or (None, None)
    with FakeTensorMode():
        kept = torch.empty(F, D, dtype=B16, device="cuda"), torch.empty(3, F, device="cuda")
    for k in (K, 1025):
        encode(**BY_NAME["topk_encode"].bind((x, W, b, k, None, None, *kept)))  # type: ignore
    assert {"W_bf16", "norms"} <= given[0] and not {"W_bf16", "norms"} & given[1]


def test_who_makes_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    for by in (NATIVE, triton.kernels):
        monkeypatch.setattr(type(by), "bf16_copy", lambda self, W: type(self).__module__)
    assert gpu.bf16_copy(fake(T32)[1]) == "ksae.backends.triton"
    monkeypatch.setattr(gpu.cuda, "kernels", NATIVE)
    assert gpu.bf16_copy(fake(T32)[1]) == "ksae.backends.cuda"
