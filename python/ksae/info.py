# SPDX-License-Identifier: Apache-2.0
"""What was built and loaded here, what serves which op, and why not: ``print(ksae.config())``."""

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from . import env

# later changes have no effect
_switches = {name: value for name, value in env.at_import.items() if name != "KSAE_DEBUG"}


class Config(dict[str, Any]):
    """A dict of plain values (json can write it) that prints as aligned lines."""

    def __str__(self) -> str:
        return "\n".join(_lines(self, ""))


def config() -> Config:
    """Versions, native modules and their state, switches, and the implementation of each op.

    Returns:
        A dict with the keys version, python, platform, torch, triton, cpu, cuda, gpu, switches and
        ops. Its ``str`` is for people.

    Example:
        >>> sorted(config()["cuda"])
        ['architectures', 'built', 'devices', 'driver', 'reason', 'runtime', 'usable']
    """
    from . import ops
    from .backends import serving as gpu

    return Config(
        version=metadata.version("ksae"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        torch=metadata.version("torch"),
        triton=_version("triton"),
        cpu=_cpu(),
        cuda=_cuda(),
        gpu=gpu.state(),
        switches=dict(_switches),
        ops=ops.serving(),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    from .backends import cpu as native

    if not native.available():
        return {
            "usable": False,
            "reason": native.reason(),
            "isa": None,
            "isas": [],
            "openmp_threads": 0,
            "screening": False,
        }
    from . import _cpu as module

    threads = module.openmp()
    return {
        "usable": True,
        "reason": None if threads else "built without OpenMP: kernels run on one thread",
        "isa": module.isa(),
        "isas": module.isas(),
        "openmp_threads": threads,
        "screening": native.encode.screening and module.can_screen(),
    }


def _cuda() -> dict[str, Any]:
    state: dict[str, Any] = {
        "built": False,
        "usable": False,
        "reason": None,
        "devices": 0,
        "runtime": None,
        "driver": None,
        "architectures": [],
    }
    if _switches["KSAE_NATIVE"] == "0":
        return state | {"reason": "KSAE_NATIVE=0 skips native code"}
    from .backends import driver

    try:
        module = importlib.import_module("ksae._cuda")
    except ModuleNotFoundError:
        return state | {"reason": "not built: no nvcc on the PATH at installation, or KSAE_CUDA=0"}
    except ImportError as error:
        return state | {"built": True, "reason": f"cannot be loaded: {error}"}
    state |= {
        "built": True,
        "runtime": _cuda_version(module.runtime_version()),
        "driver": _cuda_version(module.driver_version()),
        "architectures": module.architectures.split(),
    }
    if reason := driver.why_not(module):
        return state | {"reason": reason}
    return state | {"usable": True, "devices": module.device_count()}


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _lines(values: dict[str, Any], indent: str) -> Iterator[str]:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if isinstance(value, dict) and not indent:
            yield name
            yield from _lines(value, "  ")
        else:
            yield f"{indent}{name:<{width}}  {_text(value)}"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
