# SPDX-License-Identifier: Apache-2.0
"""What the row of a way that failed says."""

from __future__ import annotations

import pytest

from ksae.errors import failure


def caught(error: Exception) -> str:
    with pytest.raises(type(error)) as found:
        raise error
    return failure(found.value)


def test_one_line_of_type_and_message() -> None:
    assert caught(RuntimeError("out of memory\nat 3 of 4")) == "RuntimeError: out of memory"
    assert caught(ValueError("\n  k must be at least 1\n")) == "ValueError: k must be at least 1"


def test_without_a_message_the_line_of_code() -> None:
    assert caught(AssertionError()) == "AssertionError: raise error"
    assert failure(KeyError()) == "KeyError"
