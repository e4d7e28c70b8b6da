# SPDX-License-Identifier: Apache-2.0
"""Plugin of pytest for gpu/run.py: failures are told as they happen, and none spreads.

After some errors a process cannot use the device any more, and every later test would fail for no
fault of its own. A worker of pytest-xdist ends then, and xdist puts a new one in its place.
"""

from __future__ import annotations

import os
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(config), "ksae-gpu")


class Plugin:
    def __init__(self, config: pytest.Config) -> None:
        self.config, self.failed = config, False
        self.worker = hasattr(config, "workerinput")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = True
            reporter: Any = self.config.pluginmanager.getplugin("terminalreporter")
            if not self.worker and reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(f"FAILED {report.nodeid}")
                reporter.write_line(report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        runs_tests = self.worker or not self.config.pluginmanager.hasplugin("dsession")
        if not (self.failed and runs_tests):
            return
        self.failed = False
        import torch

        if not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if self.worker:
                os._exit(1)  # what it reported has arrived
            pytest.exit(f"the device is lost after {nodeid}: {error}", returncode=1)
