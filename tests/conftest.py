# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and what the run says about the implementations that it exercised."""

from __future__ import annotations

import inspect
import os

# Before torch is imported, and inherited by child processes: a thread that waits gives its core to
# the other test process instead of spinning, and the number of threads is the same everywhere.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")

# isort: split
from collections import Counter
from collections.abc import Iterator
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401  before anything imports triton

# isort: split
import implementations as served
import pytest
import torch
from cases import DTYPES, Implementation, dtype_id, implementations
from emulation import build

from ksae.backends import cpu as native

_exercised: Counter[str] = Counter()


def pytest_report_header() -> str:
    missing = "" if native.available() else f"; native kernels: {native.reason()}"
    return f"ksae implementations: {', '.join(implementations())}{missing}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("implementations")
    marked = mark.args if mark else served.ON_HOST
    interpreted = (served.INTERPRETED, served.INTERPRETED_FUSED)
    if served.INTERPRETING:
        marked = [name for name in marked if name in interpreted]
    else:
        marked = [name for name in marked if name not in interpreted]
    test = metafunc.function
    encodes = "encode" in test.__name__ or "encode" in test.__module__
    metafunc.parametrize("impl", list(served.parameters(marked, encodes)), indirect=True)


def nothing_serves(item: pytest.Item) -> bool:
    """A test whose implementations are all for another process."""
    return "NOTSET" in item.name and "impl" in getattr(item, "fixturenames", ())


def wanted_by_the_interpreter(item: pytest.Item) -> bool:
    """Whether the mark `interpreted`, if there is one, takes the test's parameters."""
    mark, call = item.get_closest_marker("interpreted"), getattr(item, "callspec", None)
    if mark is None or call is None:
        return True
    where = mark.kwargs["where"]
    return bool(where(**{name: call.params[name] for name in inspect.signature(where).parameters}))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [item for item in items if nothing_serves(item)]
    if served.INTERPRETING:
        folder = config.rootpath / "tests" / "native" / "triton"
        elsewhere += [
            item
            for item in items
            if "impl" not in getattr(item, "fixturenames", ()) and folder not in item.path.parents
        ]
        elsewhere += [item for item in items if not wanted_by_the_interpreter(item)]
    if elsewhere:
        items[:] = [item for item in items if item not in elsewhere]
        config.hook.pytest_deselected(items=elsewhere)
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
        names = [*implementations(), *sorted(_exercised.keys() - set(implementations()))]
        runs = ", ".join(f"{name} ({_exercised[name]})" for name in names)
        missing = "" if native.available() else f"; NOT the native kernels: {native.reason()}"
        terminalreporter.write_line(f"implementations exercised (tests): {runs}{missing}")


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty gives NaN or the largest integer: memory that is not written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def impl(request: pytest.FixtureRequest, poison: None) -> Iterator[Implementation]:
    """Each implementation in turn: those that the test's mark names (implementations.py)."""
    name: str = request.param
    _exercised[name] += 1
    if name in ("reference", served.HOST):
        yield Implementation(name)
        return
    if name == served.EMULATED:
        emulator: build.Emulator = request.getfixturevalue("emulated")
        emulator.seed(0)
        emulator.blocks_in_flight(3)
        emulator.step_limit(2**40)
        yield served.Emulated(emulator)
        return
    if name in (served.INTERPRETED, served.INTERPRETED_FUSED):
        yield served.Interpreted() if name == served.INTERPRETED else served.Fused()
        return
    if not name.startswith("cpu-"):
        yield served.OnCuda(name)
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


if served.INTERPRETING:
    import triton.language as tl
    from triton_sort import numpy_sort

    @pytest.fixture(autouse=True)
    def quick_sort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """NumPy's sort for Triton's, which takes a second; one test has the latter."""
        if "own_sort" not in request.node.name:
            monkeypatch.setattr(tl, "sort", numpy_sort)


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
def oracle() -> dict[str, Any]:
    """The float64 training steps, by autograd, one for each case."""
    from training import CASES, one_step

    return {case: one_step(case, torch.float64, fused=False) for case in CASES}


@pytest.fixture(scope="session")
def emulated_kernels() -> build.Emulator:
    """The test kernels of the emulator itself."""
    return build.kernels()
