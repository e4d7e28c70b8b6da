# SPDX-License-Identifier: Apache-2.0
"""Sparse coders: activation, topology and objective."""
