# SPDX-License-Identifier: Apache-2.0
"""One browser for the pages of a test file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chromium
import pytest


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = chromium.start(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()
