# SPDX-License-Identifier: Apache-2.0
"""Shows the example of a docstring as code: the section that the parser knows is named Examples."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """`Example:` in a docstring means `Examples:`."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
