# SPDX-License-Identifier: Apache-2.0
"""The kernels that serve the ops, by device."""
