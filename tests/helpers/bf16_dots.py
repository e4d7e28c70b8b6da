# SPDX-License-Identifier: Apache-2.0
"""For tests of what needs BF16 dot instructions of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ksae import _cpu

ISA = "avx512bf16"


def skip_without() -> None:
    """Leave out the module that calls it, aloud: such a CPU has nothing to test there."""
    if ISA not in _cpu.isas():
        pytest.skip(
            "this CPU has no BF16 dot instructions: certified screening cannot run",
            allow_module_level=True,
        )


@pytest.fixture
def bf16_dots() -> Iterator[None]:
    """The kernels run at that level."""
    before = _cpu.isa()
    _cpu.set_isa(ISA)
    yield
    _cpu.set_isa(before)
