# SPDX-License-Identifier: Apache-2.0
"""Whether a CUDA driver here can run the kernels of a module."""

from __future__ import annotations

from types import ModuleType


def why_not_by_version(module: ModuleType) -> str:
    """Why no driver here can run the kernels of `module`; empty if one can.

    Asks for versions alone: once a process has asked the driver for its devices, the children that
    it forks cannot use them.
    """
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return "no CUDA driver is installed"
    if driver // 1000 < runtime // 1000:
        newest, built = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        return (
            f"the driver is too old: it runs CUDA up to {newest}, the kernels are built with"
            f" {built}; update the driver"
        )
    return ""


def why_not(module: ModuleType) -> str:
    """Why the kernels of `module` cannot run here, in one line; empty if they can.

    Asks the driver for a device, but opens none.
    """
    if reason := why_not_by_version(module):
        return reason
    try:
        return "" if module.device_count() else "no CUDA device"
    except RuntimeError as error:
        return str(error)
