# SPDX-License-Identifier: Apache-2.0
"""The version, which pyproject.toml alone states."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("ksae")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+unknown"
