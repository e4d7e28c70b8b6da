# SPDX-License-Identifier: Apache-2.0
"""float32 products are float32, whatever the process allows, and its settings stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import randn
from torch._subclasses.fake_tensor import FakeTensorMode

import ksae
from ksae.backends import product as products

settings = torch.backends.cuda.matmul


def by_the_old_api() -> None:
    torch.set_float32_matmul_precision("high")


def by_the_oldest_api() -> None:
    settings.allow_tf32 = True


def by_the_new_api() -> None:
    settings.fp32_precision = "tf32"


def by_the_new_api_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


ALLOWING = (by_the_old_api, by_the_oldest_api, by_the_new_api, by_the_new_api_for_all)


def state() -> list[Any]:
    """What a process may ask, errors included: torch refuses to answer where its APIs are mixed."""
    seen: list[Any] = []
    questions: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        lambda: settings.allow_tf32,
        lambda: settings.fp32_precision,
        lambda: torch.backends.fp32_precision,
    ]
    for ask in questions:
        try:
            seen.append(ask())
        except RuntimeError as error:
            seen.append(str(error)[:60])
    return seen


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    generic = torch.backends.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = generic
    settings.fp32_precision = "none"


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sets anything, not even for a moment: another thread would see it."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"a setting of the process was changed: {args}")

    for name in dir(torch._C):
        if name.startswith("_set") and ("tf32" in name or "fp32" in name or "float32" in name):
            monkeypatch.setattr(torch._C, name, refuse)


@pytest.mark.parametrize("allow", ALLOWING)
def test_allowed_tf32_is_seen_by_every_api(allow: Callable[[], None]) -> None:
    assert not products.tf32_allowed()
    allow()
    assert products.tf32_allowed()


@pytest.mark.parametrize("allow", [None, *ALLOWING])
def test_products_and_steps_leave_the_settings(
    allow: Callable[[], None] | None, request: pytest.FixtureRequest
) -> None:
    if allow is not None:
        allow()
    before = state()
    request.getfixturevalue("untouched")
    for dtype in (torch.float32, torch.bfloat16):
        products.product(randn(3, 4, dtype=dtype), randn(4, 9, dtype=dtype))
    ksae.TrainStep(ksae.Transcoder(4, 5, 16, 2, skip=True), clip_norm=1.0)(randn(9, 4), randn(9, 5))
    assert state() == before


@pytest.mark.parametrize("allow", [None, *ALLOWING])
def test_where_tf32_is_allowed_triton_multiplies(
    allow: Callable[[], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if allow is not None:
        allow()
    by: list[str] = []
    monkeypatch.setattr(products, "_without_tf32", lambda a, b: by.append("triton") or a)
    monkeypatch.setattr(torch, "mm", lambda a, b, **_: by.append("torch") or a)
    with FakeTensorMode():
        a, b = torch.empty(3, 4, device="cuda"), torch.empty(4, 9, device="cuda")
        products.product(a, b)
        products.product(a.bfloat16(), b.bfloat16())  # TF32 has no say in it
    assert by == ["torch" if allow is None else "triton", "torch"]


def test_without_triton_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)  # type: ignore
    by_the_old_api()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="set_float32_matmul_precision"):
        products.product(torch.empty(3, 4, device="cuda"), torch.empty(4, 9, device="cuda"))
