# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and what the run says about the implementations that it exercised."""

from __future__ import annotations

import os

# Before torch is imported, and inherited by child processes: a thread that waits gives its core to
# the other test process instead of spinning, and the number of threads is the same everywhere.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")

# isort: split
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, Implementation, dtype_id, implementations
from emulation import build

from ksae.backends import cpu as native

_exercised: Counter[str] = Counter()


def pytest_report_header() -> str:
    missing = "" if native.available() else f"; native kernels: {native.reason()}"
    return f"ksae implementations: {', '.join(implementations())}{missing}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: one of several processes
        session.config.workeroutput["exercised"] = dict(_exercised)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _exercised.update(getattr(node, "workeroutput", {}).get("exercised", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _exercised:
        runs = ", ".join(f"{name} ({_exercised[name]})" for name in implementations())
        missing = "" if native.available() else f"; NOT the native kernels: {native.reason()}"
        terminalreporter.write_line(f"implementations exercised (tests): {runs}{missing}")


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty gives NaN or the largest integer: memory that is not written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=implementations())
def impl(request: pytest.FixtureRequest, poison: None) -> Iterator[Implementation]:
    """Each implementation in turn."""
    name: str = request.param
    _exercised[name] += 1
    if name == "reference":
        yield Implementation(name)
        return
    from ksae import _cpu

    before = _cpu.isa()
    _cpu.set_isa(name.removeprefix("cpu-"))
    yield Implementation(name)
    _cpu.set_isa(before)


@pytest.fixture(params=DTYPES, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each storage type of the kernels."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated() -> build.Emulator:
    """ksae._cuda, executed on the host."""
    return build.cuda()


@pytest.fixture(scope="session")
def emulated_kernels() -> build.Emulator:
    """The test kernels of the emulator itself."""
    return build.kernels()
