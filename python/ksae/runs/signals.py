# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: noted, so that a run can end after a whole step."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run, after a whole step and with a checkpoint."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        self.signum, self.step, self.path = signum, step, path
        self.exit_code = 128 + signum  # what a shell expects
        name = signal.Signals(signum).name
        super().__init__(f"{name}: stopped after step {step}, saved {path}; go on with --resume")


class Signals:
    """Notes the first SIGINT or SIGTERM, to end the loop after a step; a second acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
