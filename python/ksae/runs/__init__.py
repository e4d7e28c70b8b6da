# SPDX-License-Identifier: Apache-2.0
"""A training run: configuration, data, loop, log, directory."""
